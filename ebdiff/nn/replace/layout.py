"""Weights of 2-D convolutions in channels_last order, where that pays."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["contiguous_again", "is_last", "to_channels_last"]

_MARK = "_ebdiff_channels_last"


def to_channels_last(model: nn.Module, wanted: bool | None) -> str:
    """Lay weights out in channels_last order, if `wanted`, or if it is None and it pays; say what was done and why.

    It pays on CUDA in 16 bits, where cuDNN's convolutions work in that order (NVIDIA's and PyTorch's recommendation;
    not measured here), and on the CPU, where oneDNN otherwise reorders what goes in and out. There it has to be asked
    for: a network of somebody's own may call `view` on what a convolution returns, which this order does not allow; and
    torch 2.13 dies in the backward pass of its own GroupNorm where that is trained, and nothing before it.
    """
    convolutions = [module for module in model.modules() if _weight(module) is not None]
    weights = [weight for weight in map(_weight, convolutions) if weight is not None]
    if not weights or wanted is False:
        return ""
    if all(is_last(weight) for weight in weights):
        return "channels_last already"
    if wanted is None:
        if all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights):
            return "" if all(weight.is_contiguous() for weight in weights) else "channels_last already"  # "": 1x1 alone
        if not all(w.is_cuda and w.dtype in (torch.float16, torch.bfloat16) for w in weights):
            return "left as it was; channels_last pays in 16 bits on CUDA, and if asked for, on the CPU"
    changed = 0
    for module, weight in zip(convolutions, weights, strict=True):
        if not is_last(weight):
            _lay_out(weight, torch.channels_last)
            vars(module)[_MARK] = True
            changed += 1
    return f"{changed} weights became channels_last"


def contiguous_again(module: nn.Module) -> None:
    """Undo `to_channels_last` for one module."""
    weight = _weight(module)
    if vars(module).pop(_MARK, False) and weight is not None:
        _lay_out(weight, torch.contiguous_format)


def _weight(module: nn.Module) -> Tensor | None:
    """That of a 2-D convolution. What torch.nn.Module.to lays out besides is no business of cuDNN's."""
    two = isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    return module._parameters.get("weight") if two else None


def is_last(weight: Tensor) -> bool:
    """As a convolution sees it: by strides, where sizes of 1 leave a choice."""
    return weight.stride() == _strides(weight, torch.channels_last)


def _lay_out(weight: Tensor, order: torch.memory_format) -> None:
    weight.data = _in_order(weight.data, order)
    if weight.grad is not None:
        weight.grad = _in_order(weight.grad, order)


def _in_order(x: Tensor, order: torch.memory_format) -> Tensor:
    return x.contiguous(memory_format=order).as_strided(x.shape, _strides(x, order))


def _strides(x: Tensor, order: torch.memory_format) -> tuple[int, ...]:
    _, c, h, w = x.shape
    return (c * h * w, 1, w * c, c) if order == torch.channels_last else (c * h * w, h * w, w, 1)
