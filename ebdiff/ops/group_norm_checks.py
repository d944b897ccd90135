"""What the group normalisation operators refuse. Kernels take raw addresses, so nothing may pass unchecked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from operator import index

import torch
from torch import Tensor

from ..errors import EbdiffError
from .group_norm_reference import Norm

__all__ = ["check_gradient", "check_norm", "offsets_of"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PER_SAMPLE = {Norm._fields.index(name) for name in ("scale", "shift", "time_bias")}
_HOW = "see ebdiff.ops.group_norm_silu"


def offsets_of(groups: int | Sequence[int], x: Tensor) -> Sequence[int]:
    """Where the groups begin, and C."""
    channels = x.shape[1] if x.dim() > 1 else 0
    if type(groups) is type(channels) is int and not torch.compiler.is_compiling():
        return _equal_groups(groups, channels)
    return _offsets_of(groups, channels)


@lru_cache(maxsize=1024)
def _equal_groups(groups: int, channels: int) -> tuple[int, ...]:
    return tuple(_offsets_of(groups, channels))


def _offsets_of(groups: int | Sequence[int], channels: int) -> list[int]:
    try:
        if isinstance(groups, Iterable):
            return [index(start) for start in groups]
        count = index(groups)
    except TypeError:
        count = 0
    if count < 1 or channels % count:
        _refuse("groups", f"a divisor of {channels} channels, or where each begins", str(groups))
    return [i * channels // count for i in range(count + 1)]


def check_norm(x: Tensor, norm: Norm) -> None:
    """Refuse arguments that do not belong together."""
    if x.dtype not in _FLOATS or not 2 <= x.dim() <= 5 or x.layout is not torch.strided:
        _refuse("x", "[N, C, *] with 2 to 5 dimensions, floating, strided", f"{x.dtype} {list(x.shape)}, {x.layout}")
    n, c = x.shape[:2]
    offsets = norm.offsets
    if offsets[-1:] != (c,) or not _rises(offsets):
        _refuse("groups", f"where each begins, rising from 0 to {c}", str(list(offsets)))
    if not norm.eps >= 0:
        _refuse("eps", "a number of at least 0", str(norm.eps))
    device = x.device
    for i, tensor in enumerate(norm[:6]):
        if tensor is None:
            continue
        name, shape = Norm._fields[i], (n, c) if i in _PER_SAMPLE else (c,)
        kind = "bool" if name == "keep" else "floating"
        if tensor.shape != shape or not (
            tensor.is_floating_point() if kind == "floating" else tensor.dtype == torch.bool
        ):
            _refuse(name, f"{kind} {list(shape)}", f"{tensor.dtype} {list(tensor.shape)}")
        if tensor.device != device:
            _refuse(name, f"on {device}, as x", str(tensor.device))


@lru_cache(maxsize=1024)
def _rises(offsets: tuple[int, ...]) -> bool:
    """Are these offsets, from 0 on?"""
    return len(offsets) > 1 and offsets[0] == 0 and all(a <= b for a, b in pairwise(offsets))


def check_gradient(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Norm) -> None:
    """Refuse gradients and statistics that are not of this x."""
    if dy.shape != x.shape or dy.dtype != x.dtype or dy.device != x.device:
        _refuse("dy", f"{x.dtype} {list(x.shape)} on {x.device}", f"{dy.dtype} {list(dy.shape)} on {dy.device}")
    shape, dtype = (x.shape[0], len(norm.offsets) - 1), torch.promote_types(x.dtype, torch.float32)
    for name, tensor in {"mean": mean, "rstd": rstd}.items():
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device:
            _refuse(name, f"{dtype} {list(shape)} on {x.device}", f"{tensor.dtype} {list(tensor.shape)}")


def _refuse(what: str, expected: str, got: str) -> None:
    raise EbdiffError(f"group_norm_silu: {what}", expected=expected, got=got, remedy=_HOW)
