"""The compiled part's group normalisation on the CPU. Arguments have been checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native
from .group_norm_reference import Gradients, Norm
from .native_cpu import FLOATS, addresses_or_0

__all__ = ["backward", "forward"]

_WIDE = {dtype: torch.promote_types(dtype, torch.float32) for dtype in FLOATS}  # what is computed in

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # asking for these takes no view

_FEW = 9  # positions: rows so short are slow, and better copied to a place where the channels lie together


def forward(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """As `group_norm_reference.forward`."""
    y = torch.empty_like(x)
    last, to = _order(y)
    shape, wide = (x.shape[0], len(norm.offsets) - 1), _WIDE[x.dtype]
    mean = x.new_empty(shape, dtype=wide)
    rstd = torch.empty_like(mean)
    tensors = (*_small(norm, wide), _dense(x, last), to, mean, rstd)
    at = addresses_or_0(tensors)
    _c().group_norm_forward(*_numbers(x, norm, last), at[:6], at[6:], torch.get_num_threads())
    return y if to is y else y.copy_(to), mean, rstd


def backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, needs: Sequence[bool]) -> Gradients:
    """As `group_norm_reference.backward`."""
    inputs = (x, *norm.tensors)
    found = [torch.empty_like(t) if need and t is not None else None for t, need in zip(inputs, needs, strict=True)]
    last, to = _order(x if found[0] is None else found[0])
    wide = _WIDE[x.dtype]
    gradients = [None if found[0] is None else to]
    gradients += [None if t is None else t if _fits(t, wide) else t.new_empty(t.shape, dtype=wide) for t in found[1:]]
    read = (*_small(norm, wide), _dense(dy, last), _dense(x, last), mean.contiguous(), rstd.contiguous())
    at = addresses_or_0((*read, *gradients))
    _c().group_norm_backward(*_numbers(x, norm, last), at[:6], at[6:10], at[10:], torch.get_num_threads())
    for gradient, written in zip(found, gradients, strict=True):
        if gradient is not None and written is not None and gradient is not written:
            gradient.copy_(written)
    return tuple(found)


def _numbers(x: Tensor, norm: Norm, last: bool) -> tuple[Any, ...]:
    """What both directions hand over first."""
    sizes = [*x.shape[:2], x.shape[2:].numel()]
    return FLOATS[x.dtype], last, sizes, norm.offsets, norm.eps, norm.silu


def _small(norm: Norm, wide: torch.dtype) -> list[Tensor | None]:
    """weight, bias, scale, shift and time_bias, in what is computed in; keep."""
    small = [t if t is None or _fits(t, wide) else t.to(wide).contiguous() for t in norm.tensors]
    return [*small, None if norm.keep is None else norm.keep.contiguous()]


def _order(like: Tensor) -> tuple[bool, Tensor]:
    """Are channels to lie together in memory? And a tensor to write to: this one, where it is dense in that order."""
    few = like.shape[2:].numel() <= _FEW
    if not few and like.is_contiguous():
        return False, like
    if _is_last(like):
        return True, like
    if few:
        last = like.movedim(1, -1)
        return True, torch.empty_like(last, memory_format=torch.contiguous_format).movedim(-1, 1)
    return False, torch.empty_like(like, memory_format=torch.contiguous_format)


def _is_last(x: Tensor) -> bool:
    """Is it contiguous with the channels last?"""
    form = _LAST.get(x.dim())
    return x.movedim(1, -1).is_contiguous() if form is None else x.is_contiguous(memory_format=form)


def _dense(x: Tensor, last: bool) -> Tensor:
    """Contiguous, or with the channels last."""
    return x if last and _is_last(x) else x.movedim(1, -1).contiguous() if last else x.contiguous()


def _fits(small: Tensor, wide: torch.dtype) -> bool:
    return small.dtype == wide and small.is_contiguous()


def _c() -> Any:
    return native.module()
