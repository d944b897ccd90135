"""What convolutions, matrix products, attention and normalisations do to axes, and what they cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .axes import UNIT, Atom, Axis, freeze, fuse, leaves, size, split, unify
from .plan import Norm
from .rules import meet, rule, tensors_in
from .zeros import check_contraction

if TYPE_CHECKING:
    from .trace import Tracer


# Normalisation --------------------------------------------------------------------------------------------------------


@rule("native_group_norm")
def _group_norm(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, weight, bias, groups = args[0], args[1], args[2], args[6]
    axes, module = tr.axes(x), tr.module
    for affine in (weight, bias):
        if affine is not None:
            unify(axes[1], tr.axes(affine)[0])
    is_stand_in = "group_sizes" in vars(module)
    if (is_stand_in or type(module) is nn.GroupNorm) and weight is not None:
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
    for affine in tensors_in(list(args[2:4])):
        for axis, own in zip(axes[-affine.dim() :], tr.axes(affine), strict=True):
            unify(axis, own)
    reason = f"layer norm over it in {tr.where()}"
    if len(args[1]) == 1:
        tr.statistics.over(axes[-1], reason)
    for axis in axes[len(axes) - len(args[1]) :] if len(args[1]) > 1 else ():
        freeze(axis, f"{reason}, together with other axes")
    tr.label(tensors_in([out])[0], list(axes))


@rule("_weight_norm_interface", "_weight_norm")
def _weight_norm(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """g * v / |v|, lengths taken over all dimensions of v but one."""
    axes, lengths = tr.axes(args[0]), tr.axes(args[1])
    for dim, axis in enumerate(axes):
        if dim == (args[2] if len(args) > 2 else 0) % len(axes):
            unify(axis, lengths[dim])
        else:
            tr.statistics.over(axis, f"weight norm over it in {tr.where()}")
    tensors = tensors_in([out])
    tr.label(tensors[0], list(axes))
    for extra in tensors[1:]:
        tr.label(extra, tr.fixed(extra, "lengths of a weight norm"))


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def _batch_norm(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    axes = tr.axes(args[0])
    for per_channel in tensors_in([args[1:]]):
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
    if transposed and groups == 1:
        tr.transposed.add(id(weight))
    if groups > 1:
        outward, inward = _grouped(tr, axes[1], outward, inward, groups, transposed)
    else:
        unify(axes[1], inward)
        check_contraction(tr, x, weight, inward)
    if bias is not None:
        unify(outward, tr.axes(bias)[0])
    reason = f"positions of a convolution in {tr.where()}"
    for axis in axes[2:]:
        freeze(axis, reason)
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


@rule("mm", "bmm", "mv", "dot", "vdot", "matmul", "linear", "addmm", "baddbmm", "addmv")
def _matrix(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """[..., m, k] x [..., k, n], an added term in front for the add* forms; linear's weight is [n, k]."""
    name = func._schema.name.removeprefix("aten::")
    first = 1 if name.startswith(("addmm", "baddbmm", "addmv")) else 0
    a, b = tr.axes(args[first]), tr.axes(args[first + 1])
    contracted, columns = (
        (b[1], b[:1]) if name == "linear" else (b[-2] if len(b) > 1 else b[-1], b[-1:] if len(b) > 1 else [])
    )
    unify(a[-1], contracted)
    check_contraction(tr, args[first], args[first + 1], contracted)
    axes = [*a[:-1], *columns]
    if name in ("bmm", "baddbmm"):
        unify(a[0], b[0])
        _mark_heads(a[0])
    tr.label(out, axes)
    added = args[0] if first else (args[2] if name == "linear" and len(args) > 2 else None)
    if added is not None:
        _meet_into(tr, added, axes)
    tr.costs.append([*axes, contracted])


@rule("_trilinear")
def _bilinear(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """nn.Bilinear: input, weight and input, given the same dimensions, multiplied, and added up over some of them."""
    factors = []
    for tensor, expanded in zip(args[:3], args[3:6], strict=True):
        axes = list(tr.axes(tensor))
        for dim in expanded:
            axes.insert(dim, UNIT)
        factors.append(axes)
    count = len(factors[0])
    axes = [meet(factors, count - dim, max(size(axes[dim]) for axes in factors)) for dim in range(count)]
    for dim in args[6]:
        check_contraction(tr, args[2 if dim in args[3] else 0], args[1], axes[dim])
    tr.label(out, [axis for dim, axis in enumerate(axes) if dim not in args[6]])
    tr.costs.append(axes)


def _meet_into(tr: Tracer, added: Tensor, axes: list[Axis]) -> None:
    own = tr.axes(added)
    for mine, theirs in zip(reversed(own), reversed(axes), strict=False):
        if size(mine) == size(theirs):
            unify(mine, theirs)


def _mark_heads(axis: Axis) -> None:
    for atom in leaves(axis):
        atom.kind = atom.kind or "head"


@rule("scaled_dot_product_attention")
def _attention(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Scaled dot-product attention on [batch, heads, tokens, dim]: q and k share dim, k and v share tokens.

    With fewer key heads than query heads, each of them serves as many query heads in a row.
    """
    q, k, v = (tr.axes(tensor) for tensor in args[:3])
    mask, scale = args[3], args[6]
    for i in range(len(q) - 2):
        unify(k[i], v[i])
        repeats = size(q[i]) // size(k[i])
        served = split(q[i], repeats) if repeats > 1 else (q[i], UNIT)
        if served is None:
            freeze(k[i], f"shared by query heads in {tr.where()} that do not fit it")
        else:
            unify(served[0], k[i])
            freeze(served[1], f"query heads of one key head in {tr.where()}")
        _mark_heads(q[i])
    unify(q[-1], k[-1])
    check_contraction(tr, args[0], args[1], q[-1])
    unify(k[-2], v[-2])
    if mask is not None:
        _meet_into(tr, mask, [*q[:-1], k[-2]])
    freeze(k[-2], "tokens that a softmax runs over")
    if scale is None and not tr.may_split():
        freeze(q[-1], f"head_dim sets the softmax scale in {tr.where()}, for which there is no rule")
    tr.label(out, [*q[:-1], v[-1]])
    for contracted, width in ((q[-1], k[-2]), (k[-2], v[-1])):
        tr.costs.append([*q[:-1], width, contracted])
