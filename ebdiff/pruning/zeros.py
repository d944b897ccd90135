"""Which tensors are zero wherever one of their channels is removed, in the model that `masked` makes.

Parameters are, and so is what linear layers and norms give; SiLU of it is, sigmoid of it is not. That is of no matter
where a layer's weights are zero for what is removed. A product of two activations (q and k of linear attention) counts
the removed channels unless one of the two is zero there: where neither is, the axis stays whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .axes import Axis, freeze
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
_LINEAR = {"linear", "mm", "mv", "addmm", "addmv", "bmm", "baddbmm", "matmul", "convolution"}
_ADDING = ("addm", "badd")  # these have the added term in front
_FRESH = {"native_group_norm", "embedding"}  # zero where removed, whatever goes in


def follow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Mark what an op gives where it may be something else than zero."""
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    inputs, outputs = tensors_in([args, kwargs]), tensors_in([out])
    if not inputs or not outputs:
        return
    if torch.Tag.pointwise in func.tags:
        marked = _after_pointwise(name, args, kwargs, inputs, outputs[0])
    elif name == "scaled_dot_product_attention":
        marked = _is_marked(args[2])
    elif name in _LINEAR and any(isinstance(factor, nn.Parameter) for factor in args[name.startswith(_ADDING) :][:2]):
        marked = False
    else:
        marked = name not in _FRESH and any(map(_is_marked, inputs))
    for tensor in outputs:
        if not marked:
            clear(tensor)
        elif isinstance(tensor, FakeTensor):  # not a table of the user's
            setattr(tensor, _MARK, True)


def _after_pointwise(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], out: Tensor
) -> bool:
    if name == "mul":
        return not any(not _is_marked(tensor) and tensor.shape == out.shape for tensor in inputs)
    if name == "div":
        return _is_marked(args[0])
    numbers = [n for n in args[1:] if isinstance(n, int | float) and not isinstance(n, bool)]
    if name in ("add", "sub", "rsub") and any(numbers[:1]):
        return True
    if name == "pow" and not (numbers and numbers[0] > 0):
        return True
    return name not in _KEEPING or any(map(_is_marked, inputs))


def check_contraction(tr: Tracer, a: Tensor, b: Tensor, axis: Axis) -> None:
    """Freeze an axis over which two tensors are multiplied and added up, where neither is sure to be zero."""
    if _is_marked(a) and _is_marked(b):
        freeze(axis, f"two activations that zero does not map to zero are multiplied along it in {tr.where()}")


def clear(tensor: Any) -> None:
    """A tensor that is zero wherever a channel is removed."""
    if _is_marked(tensor):
        delattr(tensor, _MARK)


def _is_marked(tensor: Any) -> bool:
    return hasattr(tensor, _MARK)
