"""What a rewritten method computes with: a norm that waits for scale, shift and SiLU, to run as one operator with them.

`flow` has shown that such a value goes to nothing else. Whether the fused operator may serve is decided here, by every
call anew: hooks, other norms and activations, and shapes or dtypes that do not fit get what the original would do.
"""

from __future__ import annotations

from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor

from ...errors import EbdiffError
from ...ops import native
from ...ops.group_norm import group_norm_silu
from ..group_norm import Settings
from .known import is_bare, is_silu, is_widened, norm_settings
from .layout import is_last

__all__ = [
    "ACCELERATED",
    "activated",
    "dense",
    "divided",
    "find_kernels",
    "normalised",
    "run_in_order",
    "scaled",
    "shifted",
    "summed",
]

# In vars of a module whose methods may defer. Without it they compute as they were written, whoever holds them still.
ACCELERATED = "_ebdiff_accelerated"
_TENSORS = (Tensor, nn.Parameter, FakeTensor)
# Found by `find_kernels`: the types of devices on which a kernel runs the operator. Elsewhere the original is faster.
served: set[str] = set()
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_FEWEST = 256  # positions, on the CPU: with less, torch's norm is as fast or up to twice as fast
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Sum:
    """x + row, not added yet. row: [N, C, 1...], or what broadcasts to it."""

    def __init__(self, x: Tensor, row: Tensor) -> None:
        self.x, self.row = x, row
        self.seen = [_seen(x), _seen(row)]  # tensors, and how often they had been written to


class Deferred:
    """norm(x), multiplied by 1 + row and shifted by row in any order and number; not computed yet.

    Args:
        norm: the module, and its settings.
        x: its input, or one that a time embedding is added to; where nothing may be written to until it is computed.
    """

    def __init__(self, norm: nn.Module, settings: Settings, x: Tensor | Sum) -> None:
        self.norm, self.settings = norm, settings
        self.x: Tensor = x.x if isinstance(x, Sum) else x
        self.time_bias: Tensor | None = x.row if isinstance(x, Sum) else None
        self.steps: list[tuple[bool, Tensor | float]] = []  # (True to multiply, row)
        self.seen = [*x.seen] if isinstance(x, Sum) else [_seen(x)]

    def takes(self, multiply: bool, row: Any) -> bool:
        """Multiply by 1 + row, or add it, if the operator can, in the dtype that the original would return."""
        dtype = torch.float32 if _wants_float32(self.x) else self.x.dtype
        if type(row) not in (int, float):
            if not _is_row(row, self.x, dtype):
                return False
            self.seen.append(_seen(row))
        self.steps.append((multiply, row))
        return True

    def activated(self) -> Tensor:
        """All of it and SiLU, by the operator."""
        self._check()
        norm, x = self.settings, _ordered(self.x)
        scale, shift = self._modulation()
        return group_norm_silu(
            x,
            norm.weight,
            norm.bias,
            norm.groups,
            keep=norm.keep,
            scale=scale,
            shift=shift,
            time_bias=None if self.time_bias is None else _per_sample(self.time_bias, x),
            eps=norm.eps,
        )

    def _modulation(self) -> tuple[Tensor | None, Tensor | None]:
        """All steps as one scale and one shift, [N, C] each; sums and products of rows in float32 at least."""
        scale: Tensor | None = None
        shift: Tensor | None = None
        for multiply, given in self.steps:
            row = _per_sample(given, self.x)
            if not multiply:
                shift = row if shift is None else _wide(shift) + row
                continue
            shift = None if shift is None else _wide(shift) * (1 + _wide(row))
            scale = row if scale is None else _wide(scale) * (1 + _wide(row)) + row
        return scale, shift

    def value(self) -> Tensor:
        """All of it as the original computes it."""
        self._check()
        y: Tensor = self.norm(self.x if self.time_bias is None else self.x + self.time_bias)
        for multiply, row in self.steps:
            y = y * (1 + row) if multiply else y + row
        return y

    def _check(self) -> None:
        if any(version is not None and version != _version(tensor) for tensor, version in self.seen):
            raise EbdiffError(
                "what a norm computes with was changed in place before the SiLU that follows it",
                expected="the same values until then",
                got=f"{type(self.norm).__name__} whose input, scale or shift was written to",
                remedy="ebdiff.restore(model)",
            )


def _ordered(x: Tensor) -> Tensor:
    """In the order in which torch's group_norm returns it, as what comes next may rely on it."""
    if x.is_contiguous():
        return x
    last = _LAST.get(x.dim())
    certain = 1 not in x.shape[1:] and x.stride(0) * x.shape[0] == x.numel()
    if last is not None and certain and x.is_contiguous(memory_format=last):
        return x  # what the next line finds too, 20 times slower
    return x.contiguous(memory_format=suggest_memory_format(x))


def _wants_float32(x: Tensor) -> bool:
    """Does torch's group_norm return float32 whatever it is given?"""
    return x.is_cuda and torch.is_autocast_enabled("cuda")


def _version(x: Tensor) -> int | None:
    """How often x was written to; None where nobody counts."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def _seen(x: Tensor) -> tuple[Tensor, int | None]:
    return x, _version(x)


def _is_row(row: Any, x: Tensor, dtype: torch.dtype) -> bool:
    """Is it one number per channel (and sample), on x's device, and no wider than `dtype`?"""
    if not isinstance(row, Tensor) or type(row) not in _TENSORS:
        return False
    samples, channels, *others = (1,) * (x.dim() - row.dim()) + row.shape
    return (
        row.dim() <= x.dim()
        and samples in (1, x.shape[0])
        and channels in (1, x.shape[1])
        and all(size == 1 for size in others)
        and row.device == x.device
        and row.is_floating_point()
        and torch.promote_types(row.dtype, dtype) == dtype
    )


def _per_sample(row: Tensor | float, x: Tensor) -> Tensor:
    """What is the same at all positions of x, as [N, C]."""
    if not isinstance(row, Tensor):
        return x.new_full((x.shape[0], x.shape[1]), row, dtype=torch.promote_types(x.dtype, torch.float32))
    if row.dim() != x.dim() or row.shape[:2] != x.shape[:2]:
        row = row.expand(x.shape[0], x.shape[1], *(1,) * (x.dim() - 2))
    return row.flatten(1)


def _wide(row: Tensor) -> Tensor:
    return row.to(torch.promote_types(row.dtype, torch.float32))


def find_kernels() -> set[str]:
    """Look for them, so that no call has to."""
    served.update(["cpu"] if native.module() is not None else [])
    served.update(["cuda"] if find_spec("triton") is not None else [])
    return served


# What the rewritten code calls ----------------------------------------------------------------------------------------


def summed(a: Any, b: Any) -> Any:
    """a + b, where nothing but a norm follows."""
    if isinstance(a, Tensor) and type(a) in _TENSORS and a.dim() > 2 and _is_row(b, a, a.dtype):
        return Sum(a, b)
    return a + b


def normalised(owner: nn.Module, norm: Any, x: Any) -> Any:
    """norm(x) in a method of `owner`, where nothing but scale, shift and an activation follows."""
    tensor = x.x if isinstance(x, Sum) else x
    settings = norm_settings(norm) if ACCELERATED in vars(owner) and isinstance(tensor, Tensor) else None
    if settings is not None and is_bare(norm) and _fits(tensor, norm, settings):
        return Deferred(norm, settings, x)
    return norm(x.x + x.row if isinstance(x, Sum) else x)


def _fits(x: Tensor, norm: nn.Module, settings: Settings) -> bool:
    affine = settings.weight
    return (
        type(x) in _TENSORS
        and x.device.type in served
        and 2 <= x.dim() <= 5
        and (x.device.type != "cpu" or x.shape[2:].numel() >= _FEWEST or not isinstance(norm, nn.GroupNorm))
        and x.dtype in _DTYPES
        and x.layout is torch.strided
        and (affine is None or type(affine) in _TENSORS)
        and (affine is None or (affine.dtype in (x.dtype, torch.float32) and affine.shape[0] == x.shape[1]))
        and not (is_widened(norm) and _wants_float32(x))  # it returns x's dtype there
    )


def scaled(x: Any, scale: Any) -> Any:
    """x * (1 + scale)."""
    if isinstance(x, Deferred):
        return x if x.takes(True, scale) else x.value() * (1 + scale)
    return x * (1 + scale)


def shifted(x: Any, shift: Any) -> Any:
    """x + shift; either may be the norm."""
    if isinstance(shift, Deferred):
        x, shift = shift, x
    if isinstance(x, Deferred):
        return x if x.takes(False, shift) else x.value() + shift
    return x + shift


def divided(x: Any, by: Any) -> Any:
    """x / by, where nothing else holds x: x itself if `by` is the number 1, as it is in most residual blocks."""
    one = type(by) in (int, float) and by == 1
    return x if one and type(x) in _TENSORS and x.is_floating_point() else x / by


def dense(conv: Any, x: Any) -> Any:
    """x.contiguous(), where conv alone follows: one in channels_last order takes such an x as it is."""
    taken = type(conv) is nn.Conv2d and is_bare(conv) and is_last(conv.weight) and type(x) in _TENSORS
    return x if taken and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def activated(act: Any, x: Any) -> Any:
    """act(x)."""
    if not isinstance(x, Deferred):
        return act(x)
    if is_silu(act) and (not isinstance(act, nn.Module) or is_bare(act)):
        return x.activated()
    return act(x.value())


@wraps(nn.Sequential.forward)  # what torch.jit.script reads
def run_in_order(self: nn.Sequential, input: Any) -> Any:
    """nn.Sequential's forward, with norm and SiLU as one where they follow each other."""
    x, modules = input, list(self)
    for module, following in zip(modules, [*modules[1:], None], strict=True):
        if isinstance(x, Deferred):
            x = activated(module, x)
        elif is_silu(following):
            x = normalised(self, module, x)
        else:
            x = module(x)
    return x
