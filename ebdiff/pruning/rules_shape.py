"""What views, permutations, concatenations, slices, pads and shuffles do to axes."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch

from .axes import UNIT, Atom, Axis, Cat, cut, doubt, freeze, fuse, leaves, size, split, unify
from .diffusers_classes import width_of_views
from .rules import meet, rule, tensors_in, unknown

if TYPE_CHECKING:
    from .trace import Tracer


@rule("permute")
def _permute(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    axes = tr.axes(args[0])
    tr.label(out, [axes[dim] for dim in args[1]])


@rule("t", "numpy_T", "transpose", "swapaxes")
def _transpose(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    axes = list(tr.axes(args[0]))
    if len(axes) > 1:
        i, j = args[1:3] if len(args) > 1 else (-2, -1)
        axes[i], axes[j] = axes[j], axes[i]
    tr.label(out, axes)


@rule("unsqueeze")
def _unsqueeze(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    axes = list(tr.axes(args[0]))
    axes.insert(args[1] % out.dim(), UNIT)
    tr.label(out, axes)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "flatten", "unflatten")
def _view(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Match runs of input and output dimensions of equal length; fuse the first, split into the second."""
    before, after = list(tr.axes(args[0])), list(out.shape)
    result: list[Axis] = []
    while before or after:
        pending, wanted = ([before.pop(0)] if before else []), ([after.pop(0)] if after else [])
        while (left := prod(map(size, pending))) != (right := prod(wanted)):
            if left < right:
                pending.append(before.pop(0))
            else:
                wanted.append(after.pop(0))
        result += _divide(tr, fuse(pending), wanted)
    width = width_of_views(tr.module)
    if width is not None and func._schema.name == "aten::view" and args[0].shape == out.shape:
        name = tr.names[id(tr.module)]
        unify(result[-1], tr.axes(tr.parameters[f"{name}.{width}" if name else width])[0])
    tr.label(out, result)


def _divide(tr: Tracer, axis: Axis, wanted: list[int]) -> list[Axis]:
    """An axis as a product of factors of the wanted lengths, outermost first."""
    result: list[Axis] = []
    for length in reversed(wanted):
        undivided = set(leaves(axis))
        parts = split(axis, length)
        if parts is None:
            reason = f"viewed as {tuple(wanted)} in {tr.where()}, which does not fit how it was made"
            freeze(axis, reason)
            return [*(Atom(n, reason) for n in wanted[: len(wanted) - len(result)]), *result]
        axis, inner = parts
        if not tr.may_split() and any(atom.meaning is not None for atom in undivided):
            for part in parts:
                doubt(part, f"viewed as {tuple(wanted)} in {tr.where()}, whose integers no rule updates")
        result.insert(0, inner)
    return result


@rule("expand")
def _expand(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    axes = [*[UNIT] * (out.dim() - args[0].dim()), *tr.axes(args[0])]
    reason = f"matched with a length fixed by expand in {tr.where()}"
    lengths = zip(axes, out.shape, strict=True)
    tr.label(out, [old if size(old) == n else tr.statistics.expanded(n, reason) for old, n in lengths])


@rule("cat", "concatenate")
def _cat(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    parts = [tr.axes(tensor) for tensor in args[0] if tensor.dim() == out.dim()]
    axes = [meet([axes[i : i + 1] for axes in parts], 1, n) if i != dim else UNIT for i, n in enumerate(out.shape)]
    axes[dim] = Cat(tuple(axes[dim] for axes in parts))
    tr.label(out, axes)


@rule("stack")
def _stack(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    axes = [meet([tr.axes(t) for t in args[0]], args[0][0].dim() - i, n) for i, n in enumerate(args[0][0].shape)]
    axes.insert(dim, Atom(len(args[0]), "stacked"))
    tr.label(out, axes)


def _segment(tr: Tracer, axis: Axis, start: int, stop: int) -> Axis:
    """Positions [start, stop) of an axis."""
    head = cut(axis, stop)
    tail = head and cut(head[0], start)
    if tail is None:
        reason = f"cut at {start}:{stop} in {tr.where()}, across a product"
        freeze(axis, reason)
        return Atom(stop - start, reason)
    return tail[1]


@rule("slice")
def _slice(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    given = dict(enumerate(args[1:]))
    dim, step, length = given.get(0, 0), given.get(3, 1), args[0].shape[given.get(0, 0)]
    axes = list(tr.axes(args[0]))
    start, stop, _ = slice(given.get(1), given.get(2)).indices(length)
    if step != 1:
        freeze(axes[dim], f"strided slice in {tr.where()}")
        axes[dim] = Atom(out.shape[dim], f"strided slice in {tr.where()}")
    elif (start, stop) != (0, length):
        axes[dim] = _segment(tr, axes[dim], start, max(start, stop))
    tr.label(out, axes)


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def _split(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Pieces with sizes of their own, or equal ones: those stay equal only where they keep the same indices."""
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    start = 0
    for tensor in out:
        axes = list(tr.axes(args[0]))
        axes[dim] = _segment(tr, axes[dim], start, start + tensor.shape[dim])
        tr.label(tensor, axes)
        start += tensor.shape[dim]
    if "with_sizes" not in func._schema.name:
        for tensor in out[1:]:
            if tensor.shape == out[0].shape:
                unify(tr.axes(out[0])[dim], tr.axes(tensor)[dim])
            else:
                freeze(tr.axes(args[0])[dim], f"cut into pieces of {out[0].shape[dim]} in {tr.where()}")


@rule("select", "unbind")
def _select(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    axes = list(tr.axes(args[0]))
    read = axes.pop(dim)
    for tensor in tensors_in([out]):
        tr.label(tensor, list(axes))
        tr.when_used(tensor, read, f"single positions are read in {tr.where()}")  # not for weight[0].numel()


@rule("index", "index_select")
def _index(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """What is picked by integer tensors: their dimensions come in the place of those they pick from."""
    axes = list(tr.axes(args[0]))
    one = func._schema.name == "aten::index_select"
    indices = [None] * (args[1] % len(axes)) + [args[2]] if one else args[1]
    if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
        return unknown(tr, func, args, kwargs, out)
    reason = f"picked by an index in {tr.where()}"
    picked = [dim for dim, index in enumerate(indices) if index is not None]
    for dim in picked:
        freeze(axes[dim], reason)
    rest = [axis for dim, axis in enumerate(axes) if dim not in picked]
    first = picked[0] if picked[-1] - picked[0] == len(picked) - 1 else 0
    made = out.shape[first : first + out.dim() - len(rest)]
    tr.label(out, [*rest[:first], *(Atom(n, reason) for n in made), *rest[first:]])


@rule("view_as_complex", "view_as_real")
def _complex(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Real and imaginary parts are the last dimension of the real view."""
    *leading, parts = [*tr.axes(args[0]), Atom(2)][: max(args[0].dim(), out.dim())]
    freeze(parts, f"real and imaginary parts in {tr.where()}")
    tr.label(out, [*leading, parts][: out.dim()])


@rule("flip", "roll")
def _flip(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    axes = tr.axes(args[0])
    listed = args[2] if len(args) > 2 else kwargs.get("dims", [] if "roll" in func._schema.name else args[1])
    for dim in listed or range(len(axes)):  # a roll without dims runs over the flattened tensor
        freeze(axes[dim], f"reordered in {tr.where()}")
    tr.label(out, list(axes))


@rule("constant_pad_nd", "pad")
def _pad(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    axes, padding = list(tr.axes(args[0])), args[1]
    for i in range(len(padding) // 2):
        dim, before, after = -1 - i, padding[2 * i], padding[2 * i + 1]
        if min(before, after) < 0:
            axes[dim] = _segment(tr, axes[dim], max(-before, 0), size(axes[dim]) + min(after, 0))
        reason = f"padded in {tr.where()}"
        axes[dim] = Cat((Atom(max(before, 0), reason), axes[dim], Atom(max(after, 0), reason)))
    tr.label(out, axes)


@rule("repeat")
def _repeat(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """The whole axis again and again: copies x positions."""
    axes = [UNIT] * (len(args[1]) - args[0].dim()) + list(tr.axes(args[0]))
    copies = [Atom(n, f"repeated in {tr.where()}") for n in args[1]]
    tr.label(out, [axis if size(n) == 1 else fuse([n, axis]) for n, axis in zip(copies, axes, strict=True)])


@rule("glu")
def _glu(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """The first half of an axis times the sigmoid of the second: the halves keep the same indices."""
    dim = args[1] if len(args) > 1 else -1
    axes = list(tr.axes(args[0]))
    half = size(axes[dim]) // 2
    first, second = _segment(tr, axes[dim], 0, half), _segment(tr, axes[dim], half, 2 * half)
    unify(first, second)
    axes[dim] = first
    tr.label(out, axes)


@rule("pixel_shuffle", "pixel_unshuffle")
def _pixel_shuffle(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Channels x pixels of a cell <-> channels, where cells of the image are cut up or made."""
    name = func._schema.name.removeprefix("aten::")
    reason = f"pixels of a cell of {name} in {tr.where()}"
    *leading, channels, _, _ = tr.axes(args[0])
    for axis in tr.axes(args[0])[-2:]:
        freeze(axis, reason)
    cell = args[1] ** 2
    if name == "pixel_unshuffle":
        channels = fuse([channels, Atom(cell, reason)])
    else:
        channels, pixels = _divide(tr, channels, [size(channels) // cell, cell])
        freeze(pixels, reason)
    tr.label(out, [*leading, channels, *(Atom(n, reason) for n in out.shape[-2:])])


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """groups x channels -> channels x groups."""
    axes = list(tr.axes(args[0]))
    groups, channels = _divide(tr, axes[1], [args[1], size(axes[1]) // args[1]])
    freeze(groups, f"groups of a channel shuffle in {tr.where()}")
    axes[1] = fuse([channels, groups])
    tr.label(out, axes)
