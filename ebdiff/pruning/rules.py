"""What each ATen op does to axes. An op without a rule here freezes the axes it touches, by name.

A rule is ``rule(tracer, func, args, kwargs, out)`` and labels the outputs; `@rule` files it under its ops' names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .axes import UNIT, Atom, Axis, Cat, cut, freeze, fuse, leaves, size, split, unify
from .plan import Norm

if TYPE_CHECKING:
    from .trace import Tracer

__all__ = ["rule", "rule_for"]

Rule = Callable[["Tracer", Any, tuple[Any, ...], dict[str, Any], Any], None]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """File a rule under the names of ATen ops, overloads left out ("add", "native_group_norm")."""

    def file(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return file


def rule_for(func: Any) -> Rule:
    """The rule of an op: its own, else the pointwise one where ATen tags it so, else freezing."""
    name = func._schema.name.removeprefix("aten::")
    found = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    return found or (_pointwise if torch.Tag.pointwise in func.tags else _unknown)


def _tensor_args(args: Any) -> list[Tensor]:
    if isinstance(args, Tensor):
        return [args]
    if isinstance(args, dict):
        args = list(args.values())
    return [t for arg in args for t in _tensor_args(arg)] if isinstance(args, list | tuple) else []


def _unknown(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    if not _tensor_args([out]):
        return  # asks for a device or a size
    reason = f"{func._schema.name.removeprefix('aten::')} in {tr.where()} has no rule"
    for tensor in _tensor_args([args, kwargs]):
        for axis in tr.axes(tensor):
            freeze(axis, reason)
    for tensor in _tensor_args([out]):
        if not hasattr(tensor, "_ebdiff_axes"):
            tr.label(tensor, tr.fixed(tensor, reason))


# Elementwise ----------------------------------------------------------------------------------------------------------


def _pointwise(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Broadcast, aligned at the last dimension; axes that meet are one."""
    inputs = [tr.axes(tensor) for tensor in _tensor_args([args, kwargs])]
    for tensor in _tensor_args([out]):
        tr.label(tensor, [_meet(inputs, tensor.dim() - i, n) for i, n in enumerate(tensor.shape)])


def _meet(inputs: list[list[Axis]], from_end: int, length: int) -> Axis:
    found = [axes[-from_end] for axes in inputs if len(axes) >= from_end and size(axes[-from_end]) == length]
    for other in found[1:]:
        unify(found[0], other)
    return found[0] if found else UNIT


@rule(
    "clone",
    "detach",
    "alias",
    "_to_copy",
    "contiguous",
    "lift_fresh",
    "dropout",
    "native_dropout",
    "bernoulli",
    "_conj",
)
@rule(
    "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "full_like", "fill", "zero", "normal", "uniform"
)
def _same(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    for tensor in _tensor_args([out]):
        tr.label(tensor, list(tr.axes(args[0])))


@rule("copy")
def _copy(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    _pointwise(tr, func, args[:2], {}, out)


@rule("arange", "zeros", "ones", "full", "empty", "empty_strided", "rand", "randn", "linspace", "scalar_tensor", "eye")
@rule("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided", "_local_scalar_dense", "sym_size")
def _made_here(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    reason = f"matched with a fixed table ({func._schema.name.removeprefix('aten::')}) made in {tr.where()}"
    for tensor in _tensor_args([out]):
        tr.label(tensor, tr.fixed(tensor, reason))


# Shape ----------------------------------------------------------------------------------------------------------------


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
                freeze(part, f"viewed as {tuple(wanted)} in {tr.where()}, whose integers no rule updates")
        result.insert(0, inner)
    return result


@rule("expand")
def _expand(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    axes = [*[UNIT] * (out.dim() - args[0].dim()), *tr.axes(args[0])]
    fixed = tr.fixed(out, f"matched with a length fixed by expand in {tr.where()}")
    tr.label(out, [old if size(old) == n else new for old, new, n in zip(axes, fixed, out.shape, strict=True)])


@rule("cat", "concatenate")
def _cat(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    parts = [tr.axes(tensor) for tensor in args[0] if tensor.dim() == out.dim()]
    axes = [_meet([axes[i : i + 1] for axes in parts], 1, n) if i != dim else UNIT for i, n in enumerate(out.shape)]
    axes[dim] = Cat(tuple(axes[dim] for axes in parts))
    tr.label(out, axes)


@rule("stack")
def _stack(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    axes = [_meet([tr.axes(t) for t in args[0]], args[0][0].dim() - i, n) for i, n in enumerate(args[0][0].shape)]
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
    dim, start, stop, step = (*args[1:], *(0, None, None, 1)[len(args) - 1 :])
    axes, length = list(tr.axes(args[0])), args[0].shape[dim]
    start, stop, _ = slice(start, stop).indices(length)
    if step != 1:
        freeze(axes[dim], f"strided slice in {tr.where()}")
        axes[dim] = Atom(out.shape[dim], f"strided slice in {tr.where()}")
    elif (start, stop) != (0, length):
        axes[dim] = _segment(tr, axes[dim], start, max(start, stop))
    tr.label(out, axes)


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def _split(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    start = 0
    for tensor in out:
        axes = list(tr.axes(args[0]))
        axes[dim] = _segment(tr, axes[dim], start, start + tensor.shape[dim])
        tr.label(tensor, axes)
        start += tensor.shape[dim]


@rule("select", "unbind")
def _select(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    axes = list(tr.axes(args[0]))
    freeze(axes.pop(dim), f"single positions are read in {tr.where()}")
    for tensor in _tensor_args([out]):
        tr.label(tensor, list(axes))


@rule("flip", "roll")
def _flip(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    axes = tr.axes(args[0])
    for dim in args[-1]:
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


# Reductions, tables, normalisation ------------------------------------------------------------------------------------


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "norm",
    "linalg_vector_norm",
    "prod",
    "any",
    "all",
    "logsumexp",
    "var_mean",
)
def _reduce(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Reduced axes are frozen: the result depends on how many positions there are."""
    axes = tr.axes(args[0])
    reason = f"reduced by {func._schema.name.removeprefix('aten::')} in {tr.where()}"
    names = [argument.name for argument in func._schema.arguments]
    dims = kwargs.get("dim", args[names.index("dim")] if "dim" in names and len(args) > names.index("dim") else None)
    dims = range(len(axes)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {dim % len(axes) for dim in dims} if axes else set()
    for dim in gone:
        freeze(axes[dim], reason)
    for tensor in _tensor_args([out]):
        whole = tensor.dim() == len(axes)
        tr.label(tensor, [UNIT if i in gone else axis for i, axis in enumerate(axes) if whole or i not in gone])


@rule("_softmax", "_log_softmax", "cumsum", "sort", "_safe_softmax")
def _along(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    axes = tr.axes(args[0])
    if axes:
        freeze(axes[args[1]], f"{func._schema.name.removeprefix('aten::')} along it in {tr.where()}")
    for tensor in _tensor_args([out]):
        tr.label(tensor, list(axes))


@rule("embedding")
def _embedding(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    rows, columns = tr.axes(args[0])
    freeze(rows, "rows of an embedding")
    tr.label(out, [*tr.axes(args[1]), columns])


@rule("native_group_norm")
def _group_norm(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, weight, bias, groups = args[0], args[1], args[2], args[6]
    axes, module = tr.axes(x), tr.module
    for affine in (weight, bias):
        if affine is not None:
            unify(axes[1], tr.axes(affine)[0])
    if type(module) is nn.GroupNorm and weight is not None:
        name, sizes = tr.names[id(module)], getattr(module, "group_sizes", (x.shape[1] // groups,) * groups)
        tr.norms[name] = Norm(name, sizes)
    else:
        freeze(axes[1], f"group_norm without weights of an nn.GroupNorm in {tr.where()}")
    tr.label(out[0], list(axes))
    for statistic in out[1:]:
        tr.label(statistic, tr.fixed(statistic, "statistics of a norm"))


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    axes = tr.axes(args[0])
    for axis in axes[len(axes) - len(args[1]) :]:
        freeze(axis, f"layer norm over it in {tr.where()}")
    tr.label(_tensor_args([out])[0], list(axes))


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def _batch_norm(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    axes = tr.axes(args[0])
    for per_channel in _tensor_args([args[1:]]):
        unify(axes[1], tr.axes(per_channel)[0])
    tr.label(out[0], list(axes))


# Contractions ---------------------------------------------------------------------------------------------------------


@rule("convolution", "_convolution", "cudnn_convolution")
def _convolution(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    axes, (first, second, *kernel) = tr.axes(x), tr.axes(weight)
    for axis in kernel:
        freeze(axis, "kernel size")
    outward, inward = (second, first) if transposed else (first, second)
    if groups > 1:
        outward, inward = _grouped(tr, axes[1], outward, inward, groups, transposed)
    else:
        unify(axes[1], inward)
    if bias is not None:
        unify(outward, tr.axes(bias)[0])
    reason = f"positions of a convolution in {tr.where()}"
    tr.label(out, [axes[0], outward, *(Atom(n, reason) for n in out.shape[2:])])
    positions = x if transposed else out
    spatial = [Atom(n, reason) for n in positions.shape[2:]]
    width = [tr.axes(x)[1], second] if transposed else [outward, second]
    tr.costs.append([axes[0], *width, *spatial, *kernel])


def _grouped(tr: Tracer, x: Axis, outward: Axis, inward: Axis, groups: int, transposed: bool) -> tuple[Axis, Axis]:
    """Both sides as groups x channels; the groups are one axis, free only where an nn.Conv is depthwise."""
    whole, part = (inward, outward) if transposed else (outward, inward)
    sides = split(x, size(x) // groups), split(whole, size(whole) // groups)
    if sides[0] is None or sides[1] is None:
        for axis in (x, whole, part):
            freeze(axis, f"groups of a convolution in {tr.where()} that do not fit how the channels were made")
        return (Atom(size(part) * groups, "grouped convolution"), whole) if transposed else (whole, part)
    unify(sides[0][0], sides[1][0])
    depthwise = size(x) == groups == size(whole) and isinstance(tr.module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if not depthwise:
        freeze(sides[0][0], f"number of groups of a convolution in {tr.where()}")
    if transposed:
        unify(sides[0][1], sides[1][1])
        return fuse([sides[0][0], part]), whole
    unify(sides[0][1], part)
    return whole, part


@rule("mm", "bmm", "mv", "dot", "matmul", "linear", "addmm", "baddbmm", "addmv")
def _matrix(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """[..., m, k] x [..., k, n], an added term in front for the add* forms; linear's weight is [n, k]."""
    name = func._schema.name.removeprefix("aten::")
    first = 1 if name.startswith(("addmm", "baddbmm", "addmv")) else 0
    a, b = tr.axes(args[first]), tr.axes(args[first + 1])
    contracted, columns = (
        (b[1], b[:1]) if name == "linear" else (b[-2] if len(b) > 1 else b[-1], b[-1:] if len(b) > 1 else [])
    )
    unify(a[-1], contracted)
    axes = [*a[:-1], *columns]
    if name in ("bmm", "baddbmm"):
        unify(a[0], b[0])
        _mark_heads(a[0])
    tr.label(out, axes)
    added = args[0] if first else (args[2] if name == "linear" and len(args) > 2 else None)
    if added is not None:
        _meet_into(tr, added, axes)
    tr.add_cost(out, [contracted])


def _meet_into(tr: Tracer, added: Tensor, axes: list[Axis]) -> None:
    own = tr.axes(added)
    for mine, theirs in zip(reversed(own), reversed(axes), strict=False):
        if size(mine) == size(theirs):
            unify(mine, theirs)


def _mark_heads(axis: Axis) -> None:
    for atom in leaves(axis):
        atom.kind = atom.kind or "head"


def _attention(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Scaled dot-product attention on [batch, heads, tokens, dim]: q and k share dim, k and v share tokens."""
    q, k, v = (tr.axes(tensor) for tensor in args[:3])
    for i in range(len(q) - 2):
        unify(q[i], k[i])
        unify(k[i], v[i])
        _mark_heads(q[i])
    unify(q[-1], k[-1])
    unify(k[-2], v[-2])
    freeze(k[-2], "tokens that a softmax runs over")
    if not tr.may_split():
        freeze(q[-1], f"head_dim sets the softmax scale in {tr.where()}, for which there is no rule")
    tensors: Sequence[Tensor] = _tensor_args([out])
    tr.label(tensors[0], [*q[:-1], v[-1]])
    for extra in tensors[1:]:
        tr.label(extra, tr.fixed(extra, "statistics of attention"))
    for contracted, width in ((q[-1], k[-2]), (k[-2], v[-1])):
        tr.costs.append([*q[:-1], width, contracted])


for _kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
    rule(f"_scaled_dot_product_{_kind}")(_attention)
rule("scaled_dot_product_attention", "_scaled_dot_product_fused_attention_overrideable")(_attention)


# Spatial --------------------------------------------------------------------------------------------------------------


def _spatial(last: int) -> Rule:
    """An op that changes only the last dimensions."""

    def apply(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        reason = f"positions after {func._schema.name.removeprefix('aten::')} in {tr.where()}"
        for tensor in _tensor_args([out]):
            kept = tr.axes(args[0])[: tensor.dim() - last]
            tr.label(tensor, [*kept, *(Atom(n, reason) for n in tensor.shape[-last:])])

    return apply


for _last, _suffix in ((1, "1d"), (2, "2d"), (3, "3d")):
    for _op in (
        "avg_pool",
        "max_pool",
        "adaptive_avg_pool",
        "_adaptive_avg_pool",
        "upsample_nearest",
        "_upsample_nearest_exact",
    ):
        rule(_op + _suffix)(_spatial(_last))
    for _op in (
        "reflection_pad",
        "replication_pad",
        "upsample_linear",
        "upsample_bilinear",
        "upsample_trilinear",
        "upsample_bicubic",
    ):
        rule(_op + _suffix)(_spatial(_last))
rule("max_pool2d_with_indices")(_spatial(2))
