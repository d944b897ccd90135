"""Group normalisation on a GPU, by the Triton kernels. Arguments have been checked.

Never run on a GPU so far: the kernels are tested interpreted, and compiled without a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .group_norm_reference import Gradients, Norm
from .native_cpu import NotTaken, is_lazy

__all__ = ["backward", "forward"]

_FLAT = torch.contiguous_format
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def forward(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """As `group_norm_reference.forward`.

    Raises:
        NotTaken: float64 or lazily negated memory.
    """
    _check(x, *norm[:6])
    y, groups = torch.empty_like(x), len(norm.offsets) - 1
    mean, rstd = x.new_empty((2, x.shape[0], groups), dtype=torch.float32)
    x, last = _dense(x)
    out = _buffer(y, last)
    with torch.cuda.device_of(x):
        _triton().forward(x, out, mean, rstd, _dense_along_channels(norm), last)
    return _delivered(out, y), mean, rstd


def backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, needs: Sequence[bool]) -> Gradients:
    """As `group_norm_reference.backward`.

    Raises:
        NotTaken: float64 or lazily negated memory.
    """
    _check(x, dy, *norm[:6])
    wanted = [
        torch.empty_like(tensor) if need and tensor is not None else None
        for tensor, need in zip((x, *norm.tensors), needs, strict=True)
    ]
    x, last = _dense(x)
    dy = dy if _lies(dy, last) else torch.empty_like(x).copy_(dy)
    first = None if wanted[0] is None else _buffer(wanted[0], last)
    out = (first, *(None if w is None else torch.empty_like(w, memory_format=_FLAT) for w in wanted[1:]))
    statistics = mean.contiguous(), rstd.contiguous()
    with torch.cuda.device_of(x):
        _triton().backward(dy, x, *statistics, _dense_along_channels(norm), out, last)
    return tuple(None if w is None or o is None else _delivered(o, w) for o, w in zip(out, wanted, strict=True))


def _triton() -> Any:
    return import_module("..kernels.group_norm_silu", __package__)


def _check(*tensors: Tensor | None) -> None:
    found = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.dtype not in (*_FLOATS, torch.bool) for tensor in found):
        raise NotTaken("float64 on a GPU")
    if is_lazy(found):
        raise NotTaken("lazily negated memory")


def _lies(x: Tensor, last: bool) -> bool:
    """Is x dense, with its channels last or as [N, C, *]?"""
    return x.movedim(1, -1).is_contiguous() if last else x.is_contiguous()


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """x, copied where it lies in neither layout; and whether its channels are last: wherever they can be with HW 1."""
    if x.is_contiguous():
        return x, x.shape[2:].numel() == 1
    if _lies(x, True):
        return x, True
    x = torch.empty_like(x).copy_(x)  # a slice keeps the order of its dimensions
    return (x, True) if _lies(x, True) else (x.contiguous(), False)


def _buffer(result: Tensor, last: bool) -> Tensor:
    """What the kernels write to: the result itself, where it lies right."""
    if _lies(result, last):
        return result
    if not last:
        return torch.empty_like(result, memory_format=_FLAT)
    n, c, *rest = result.shape
    return result.new_empty((n, *rest, c)).movedim(-1, 1)


def _delivered(buffer: Tensor, result: Tensor) -> Tensor:
    return result if buffer is result else result.copy_(buffer)


def _dense_along_channels(norm: Norm) -> Norm:
    strided = {name: t for name, t in zip(Norm._fields, norm[:6], strict=False) if t is not None and t.stride(-1) != 1}
    dense: dict[str, Any] = {name: t.contiguous() for name, t in strided.items()}
    return norm._replace(**dense)
