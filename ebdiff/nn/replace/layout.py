"""Weights of 2-D convolutions in channels_last order, where that pays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["contiguous_again", "to_channels_last"]

_MARK = "_ebdiff_channels_last"


def to_channels_last(model: nn.Module, wanted: bool | None) -> str:
    """Lay weights out in channels_last order, if `wanted`, or if it is None and it pays; say what was done and why.

    It pays on CUDA in 16 bits, where cuDNN's convolutions work in that order (NVIDIA's and PyTorch's recommendation;
    not measured here). On the CPU it makes no difference: oneDNN reorders for itself.
    """
    weights = [p for p in model.parameters() if p.dim() == 4]
    if not weights or wanted is False:
        return ""
    if all(_is_last(p) for p in weights):  # as those of 1x1 convolutions are in either case
        return "" if all(p.is_contiguous() for p in weights) else "channels_last already"
    if wanted is None:
        half = all(p.is_cuda and p.dtype in (torch.float16, torch.bfloat16) for p in weights)
        if not half:
            return "left as it was: channels_last pays in 16 bits on CUDA; channels_last=True asks for it anyway"
    _lay_out(weights, torch.channels_last)
    vars(model)[_MARK] = True
    return f"{len(weights)} weights became channels_last"


def contiguous_again(model: nn.Module) -> None:
    """Undo `to_channels_last`."""
    if vars(model).pop(_MARK, False):
        _lay_out([p for p in model.parameters() if p.dim() == 4], torch.contiguous_format)


def _is_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last)


def _lay_out(weights: Sequence[Tensor], order: torch.memory_format) -> None:
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=order)
        if weight.grad is not None:
            weight.grad = weight.grad.contiguous(memory_format=order)
