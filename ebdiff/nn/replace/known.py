"""Which modules and functions are group norms and SiLU."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules import module as globally

from ..group_norm import Settings, settings_of
from .written_out import is_silu_written_out, is_widened_norm

__all__ = ["is_bare", "is_silu", "is_widened", "learn", "norm_settings"]

# Found by `learn`: norms that compute in float32 and return the dtype of their input; whatever else is SiLU.
_widened: set[type] = set()
_written_out: set[Any] = set()


def norm_settings(module: Any) -> Settings | None:
    """Those of a group normalisation without SiLU, or of a subclass that does the same, if in float32."""
    kind = type(module)
    if kind is not nn.GroupNorm and isinstance(module, nn.GroupNorm):
        plain = kind.forward is nn.GroupNorm.forward or kind in _widened
        plain = plain and kind.__call__ is nn.Module.__call__ and not hasattr(module, "parametrizations")
        return Settings(module.weight, module.bias, module.num_groups, None, module.eps) if plain else None
    return settings_of(module)


def is_widened(norm: nn.Module) -> bool:
    """Does it compute in float32 and return the dtype of its input, as `learn` has found?"""
    return type(norm) in _widened


def is_silu(act: Any) -> bool:
    """Is it SiLU, as a module or as a function?"""
    kind = type(act)
    known = act is nn.functional.silu or kind is nn.SiLU or kind in _written_out
    return known or (kind is FunctionType and act in _written_out)


def learn(module: Any) -> None:
    """Look whether a module or function is written as one that these two take, so that no call has to."""
    if isinstance(module, nn.GroupNorm) and type(module) not in _widened and is_widened_norm(type(module)):
        _widened.add(type(module))
    elif isinstance(module, nn.Module | FunctionType) and is_silu_written_out(module):
        _written_out.add(type(module) if isinstance(module, nn.Module) else module)


def is_bare(module: Any) -> bool:
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
