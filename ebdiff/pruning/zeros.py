"""Which tensors are zero wherever one of their channels is removed, in the model that `masked` makes.

Parameters are, and so is what linear layers and norms give; SiLU of it is, sigmoid of it is not. That is of no matter
where a layer's weights are zero for what is removed. A product of two activations (q and k of linear attention) counts
the removed channels unless one of the two is zero there: where neither is, the axis stays whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .axes import Axis, freeze, leaves
from .rules import tensors_in

if TYPE_CHECKING:
    from .trace import Tracer

__all__ = ["check_contraction", "clear", "follow"]

_MARK = "_ebdiff_not_zero"
# Pointwise, and zero where all that goes in is.
_KEEPING = {
    "abs", "add", "asinh", "atan", "celu", "clone", "copy", "detach", "div", "elu", "erf", "expm1", "gelu", "hardswish",
    "leaky_relu", "lerp", "log1p", "maximum", "minimum", "mish", "mul", "neg", "pow", "prelu", "relu", "relu6", "rsub",
    "selu", "sgn", "sign", "silu", "sin", "sinh", "sqrt", "sub", "tan", "tanh", "zero", "zeros_like", "_to_copy",
}  # fmt: skip
# Whatever goes in, unless they fill with zero.
_NEVER = {
    "_softmax", "_safe_softmax", "_log_softmax", "logsumexp", "normal", "uniform", "ones_like", "rand_like",
    "randn_like", "full_like", "fill",
}  # fmt: skip
_PRODUCTS = {"linear", "mm", "mv", "addmm", "addmv", "bmm", "baddbmm", "matmul", "convolution"}
_ADDING = ("addm", "badd")  # these have the added term in front
_FRESH = {"native_group_norm", "embedding"}  # zero where removed, whatever goes in
# At zero, or their slope; and which argument it is that is zero.
_SINGULAR = {
    "addcdiv": 2, "digamma": 0, "div": 1, "fmod": 1, "hypot": 0, "lgamma": 0, "log": 0, "log10": 0,
    "log2": 0, "reciprocal": 0, "remainder": 1, "rsqrt": 0, "sqrt": 0,
}  # fmt: skip


def follow(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Mark what an op gives where it may be something else than zero; freeze what would be no number there."""
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    inputs, outputs = tensors_in([args, kwargs]), tensors_in([out])
    if not inputs or not outputs:
        return
    _check_singular(tr, name, args)
    if name in _NEVER:
        marked = name not in ("fill", "full_like") or not (isinstance(args[1], int | float) and args[1] == 0)
    elif torch.Tag.pointwise in func.tags:
        marked = _after_pointwise(tr, name, args, inputs, outputs[0])
    elif name == "scaled_dot_product_attention":
        marked = _is_marked(args[2])
    elif name in _PRODUCTS:
        marked = _after_product(tr, name, args, outputs[0])
    elif name == "expand":
        marked = _is_marked(args[0]) or _is_spread(tr, args[0], outputs[0])
    else:
        marked = name not in _FRESH and any(map(_is_marked, inputs))
    for tensor in outputs:
        if marked:
            _mark(tensor)
            if func._schema.is_mutable and tensor._is_view():
                _mark(tensor._base)  # x[:, 0] = 1
        else:
            clear(tensor)


def _after_pointwise(tr: Tracer, name: str, args: tuple[Any, ...], inputs: list[Tensor], out: Tensor) -> bool:
    if name == "mul":
        return not any(not _is_marked(tensor) and tensor.shape == out.shape for tensor in inputs)
    if name == "div":
        return _is_marked(args[0])
    numbers = [n for n in args[1:] if isinstance(n, int | float) and not isinstance(n, bool)]
    if name in ("add", "sub", "rsub") and any(numbers[:1]):
        return True
    if name == "pow" and not (numbers and numbers[0] > 0):
        return True
    return name not in _KEEPING or any(_is_marked(tensor) or _is_spread(tr, tensor, out) for tensor in inputs)


def _after_product(tr: Tracer, name: str, args: tuple[Any, ...], out: Tensor) -> bool:
    """Rows are zero where those of the first factor are, columns where those of the second, batches where either is."""
    first = 1 if name.startswith(_ADDING) else 0
    a, b = map(_is_marked, args[first : first + 2])
    added = args[0] if first else args[2] if name in ("linear", "convolution") and len(args) > 2 else None
    axes = tr.axes(out)
    batches: list[Axis] = []
    if name == "convolution":
        rows, columns = axes[:1], axes[1:2]
    elif name == "linear":
        rows, columns = axes[:-1], axes[-1:]
    else:
        both = args[first + 1].dim() > 1
        rows, columns, batches = (axes[-2:-1], axes[-1:], axes[:-2]) if both else (axes[-1:], [], axes[:-1])
    if (a and _free(rows)) or (b and _free(columns)) or (a and b and _free(batches)):
        return True
    if not isinstance(added, Tensor):
        return False
    alone = name == "convolution" and _free(axes[:1])  # its bias is along dimension 1
    return _is_marked(added) or alone or (name != "convolution" and _is_spread(tr, added, out))


def _is_spread(tr: Tracer, tensor: Tensor, out: Tensor) -> bool:
    """Is a tensor broadcast along an axis that may shrink, so that it is there where a channel is removed?"""
    missing = out.dim() - tensor.dim()
    axes = tr.axes(out)
    return _free([axis for i, axis in enumerate(axes) if i < missing or tensor.shape[i - missing] != out.shape[i]])


def _free(axes: list[Axis]) -> bool:
    return any(atom.reason is None for axis in axes for atom in leaves(axis))


def _check_singular(tr: Tracer, name: str, args: tuple[Any, ...]) -> None:
    """What is divided by, or taken the root or the logarithm of, and is zero where a channel is removed.

    A module that normalises may do so: its masked form sees nothing but the kept channels.
    """
    power = args[1] if name == "pow" and isinstance(args[1], int | float) else 1
    tensor = args[_SINGULAR.get(name, 0)]
    if (name in _SINGULAR or power < 1) and isinstance(tensor, Tensor) and not _is_marked(tensor):
        reason = f"{name} in {tr.where()}, which has no value or no slope at the zeros of removed channels"
        for axis in tr.labels(tensor) if tr.is_labelled(tensor) else ():
            if _free([axis]):
                tr.statistics.over(axis, reason)


def check_contraction(tr: Tracer, a: Tensor, b: Tensor, axis: Axis) -> None:
    """Freeze an axis over which two tensors are multiplied and added up, where neither is sure to be zero."""
    if _is_marked(a) and _is_marked(b):
        freeze(axis, f"two activations that zero does not map to zero are multiplied along it in {tr.where()}")


def _mark(tensor: Any) -> None:
    if isinstance(tensor, FakeTensor):  # not a table of the user's
        setattr(tensor, _MARK, True)


def clear(tensor: Any) -> None:
    """A tensor that is zero wherever a channel is removed."""
    if _is_marked(tensor):
        delattr(tensor, _MARK)


def _is_marked(tensor: Any) -> bool:
    return hasattr(tensor, _MARK)
