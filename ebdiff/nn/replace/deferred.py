"""What a rewritten method computes with: a norm that waits for scale, shift and SiLU, to run as one operator with them.

`flow` has shown that such a value goes to nothing else. Whether the fused operator may serve is decided here, by every
call anew: hooks, other norms and activations, and shapes or dtypes that do not fit get what the original would do.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as globally

from ...errors import EbdiffError
from ...ops import native
from ...ops.group_norm import group_norm_silu
from ..group_norm import Settings, settings_of
from .written_out import is_silu_written_out, is_widened_norm

__all__ = [
    "activated",
    "find_kernels",
    "is_silu",
    "learn",
    "norm_settings",
    "normalised",
    "run_in_order",
    "scaled",
    "shifted",
    "summed",
]

_TENSORS = (Tensor, nn.Parameter, FakeTensor)
# Found by `learn`: norms that compute in float32 and return the dtype of their input; whatever else is SiLU.
widened: set[type] = set()
written_out: set[Any] = set()
# Found by `find_kernels`: the types of devices on which a kernel runs the operator. Elsewhere the original is faster.
served: set[str] = set()
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Sum:
    """x + row, not added yet. row: [N, C, 1...]."""

    def __init__(self, x: Tensor, row: Tensor) -> None:
        self.x, self.row = x, row


class Deferred:
    """norm(x + time_bias) * (1 + scale) + shift, not computed yet; each of the three [N, C, 1...], or None."""

    def __init__(self, norm: nn.Module, settings: Settings, x: Tensor, time_bias: Tensor | None) -> None:
        self.norm, self.settings, self.x, self.time_bias = norm, settings, x, time_bias
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None
        self.version = _version(x)

    def takes(self, row: Any) -> bool:
        """Can the operator multiply by, or add, `row` in the dtype that the original would return?"""
        return _is_row(row, self.x, torch.float32 if _wants_float32(self.x) else self.x.dtype)

    def activated(self) -> Tensor:
        """All of it and SiLU, by the operator."""
        self._check()
        norm, x = self.settings, self.x
        scale, shift, time_bias = (_per_sample(row, x.shape[0]) for row in (self.scale, self.shift, self.time_bias))
        return group_norm_silu(
            x,
            norm.weight,
            norm.bias,
            norm.groups,
            keep=norm.keep,
            scale=scale,
            shift=shift,
            time_bias=time_bias,
            eps=norm.eps,
        )

    def value(self) -> Tensor:
        """All of it as the original computes it."""
        self._check()
        y: Tensor = self.norm(self.x if self.time_bias is None else self.x + self.time_bias)
        y = y if self.scale is None else y * (1 + self.scale)
        return y if self.shift is None else y + self.shift

    def _check(self) -> None:
        if self.version is not None and self.version != _version(self.x):
            raise EbdiffError(
                "the input of a norm was changed in place before the SiLU that follows it",
                expected="the same values until then",
                got=f"{type(self.norm).__name__} whose input was written to",
                remedy="ebdiff.restore(model)",
            )


def _wants_float32(x: Tensor) -> bool:
    """Does torch's group_norm return float32 whatever it is given?"""
    return x.is_cuda and torch.is_autocast_enabled("cuda")


def _version(x: Tensor) -> int | None:
    """How often x was written to; None where nobody counts."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def _is_row(row: Any, x: Tensor, dtype: torch.dtype) -> bool:
    """Is it [N or 1, C, 1...], on x's device, and no wider than `dtype`?"""
    return (
        isinstance(row, Tensor)
        and type(row) in _TENSORS
        and row.dim() == x.dim()
        and row.shape[0] in (1, x.shape[0])
        and row.shape[1] == x.shape[1]
        and all(size == 1 for size in row.shape[2:])
        and row.device == x.device
        and row.is_floating_point()
        and torch.promote_types(row.dtype, dtype) == dtype
    )


def _per_sample(row: Tensor | None, samples: int) -> Tensor | None:
    """[N or 1, C, 1...] -> [N, C]."""
    if row is None or row.shape[0] == samples:
        return None if row is None else row.flatten(1)
    return row.flatten(1).expand(samples, -1)


# Which modules --------------------------------------------------------------------------------------------------------


def norm_settings(module: Any) -> Settings | None:
    """Those of a group normalisation without SiLU, or of a subclass that does the same, if in float32."""
    kind = type(module)
    if kind is not nn.GroupNorm and isinstance(module, nn.GroupNorm):
        plain = kind.forward is nn.GroupNorm.forward or kind in widened
        plain = plain and not hasattr(module, "parametrizations")
        return Settings(module.weight, module.bias, module.num_groups, None, module.eps) if plain else None
    return settings_of(module)


def is_silu(act: Any) -> bool:
    """Is it SiLU, as a module or as a function?"""
    kind = type(act)
    known = act is nn.functional.silu or kind is nn.SiLU or kind in written_out
    return known or (kind is FunctionType and act in written_out)


def find_kernels() -> set[str]:
    """Look for them, so that no call has to."""
    served.update(["cpu"] if native.module() is not None else [])
    served.update(["cuda"] if find_spec("triton") is not None else [])
    return served


def learn(module: Any) -> None:
    """Look whether a module or function is written as one that these two take, so that no call has to."""
    if isinstance(module, nn.GroupNorm) and type(module) not in widened and is_widened_norm(type(module)):
        widened.add(type(module))
    elif isinstance(module, nn.Module | FunctionType) and is_silu_written_out(module):
        written_out.add(type(module) if isinstance(module, nn.Module) else module)


def _is_bare(module: Any) -> bool:
    """Would calling it run its forward alone? Looks for the hooks that nn.Module looks for, and accelerate's."""
    return "forward" not in vars(module) and not (
        module._backward_hooks
        or module._backward_pre_hooks
        or module._forward_hooks
        or module._forward_pre_hooks
        or globally._global_backward_pre_hooks
        or globally._global_backward_hooks
        or globally._global_forward_hooks
        or globally._global_forward_pre_hooks
    )


# What the rewritten code calls ----------------------------------------------------------------------------------------


def summed(a: Any, b: Any) -> Any:
    """a + b, where nothing but a norm follows."""
    if isinstance(a, Tensor) and type(a) in _TENSORS and a.dim() > 2 and _is_row(b, a, a.dtype):
        return Sum(a, b)
    return a + b


def normalised(norm: Any, x: Any) -> Any:
    """norm(x), where nothing but scale, shift and an activation follows."""
    tensor, time_bias = (x.x, x.row) if isinstance(x, Sum) else (x, None)
    settings = norm_settings(norm) if isinstance(tensor, Tensor) and _is_bare(norm) else None
    if settings is not None and _fits(tensor, settings) and not (type(norm) in widened and _wants_float32(tensor)):
        return Deferred(norm, settings, tensor, time_bias)
    return norm(tensor if time_bias is None else tensor + time_bias)


def _fits(x: Tensor, settings: Settings) -> bool:
    affine = settings.weight
    return (
        type(x) in _TENSORS
        and x.device.type in served
        and 2 <= x.dim() <= 5
        and x.dtype in _DTYPES
        and x.layout is torch.strided
        and (affine is None or type(affine) in _TENSORS)
        and (affine is None or (affine.dtype in (x.dtype, torch.float32) and affine.shape[0] == x.shape[1]))
    )


def scaled(x: Any, scale: Any) -> Any:
    """x * (1 + scale)."""
    if not isinstance(x, Deferred):
        return x * (1 + scale)
    if x.scale is None and x.shift is None and x.takes(scale):
        x.scale = scale
        return x
    return x.value() * (1 + scale)


def shifted(x: Any, shift: Any) -> Any:
    """x + shift; either may be the norm."""
    if isinstance(shift, Deferred):
        x, shift = shift, x
    if not isinstance(x, Deferred):
        return x + shift
    if x.shift is None and x.takes(shift):
        x.shift = shift
        return x
    return x.value() + shift


def activated(act: Any, x: Any) -> Any:
    """act(x)."""
    if not isinstance(x, Deferred):
        return act(x)
    if is_silu(act) and (not isinstance(act, nn.Module) or _is_bare(act)):
        return x.activated()
    return act(x.value())


def run_in_order(self: nn.Sequential, input: Any) -> Any:
    """nn.Sequential's forward, with norm and SiLU as one where they follow each other."""
    x, modules = input, list(self)
    for module, following in zip(modules, [*modules[1:], None], strict=True):
        if isinstance(x, Deferred):
            x = activated(module, x)
        elif is_silu(following):
            x = normalised(module, x)
        else:
            x = module(x)
    return x
