"""Sparse attention on a GPU, by the Triton kernels. Arguments have been checked.

Never run on a GPU so far: the kernels are tested interpreted, and compiled without a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .block_mask import BLOCKS
from .native_cpu import NotTaken, is_lazy
from .sparse_attention_reference import Gradients, Pattern, result_like

__all__ = ["backward", "forward"]

_FARTHEST = (1 << 31) // BLOCKS[-1]  # elements between tokens: places within a block are counted in 32 bits


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> tuple[Tensor, Tensor]:
    """As `sparse_attention_reference.forward`.

    Raises:
        NotTaken: float64, lazily negated memory, or a GPU with too little shared memory for this head_dim.
    """
    o, log_sum = result_like(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)
    q, k, v = _readable(q, k, v)
    written = o if _is_aligned(o) else result_like(q, v)
    _launch("forward", q, k, v, written, log_sum, pattern, scale)
    return _delivered(written, o), log_sum


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor, pattern: Pattern, scale: float,
    needs: Sequence[bool],
) -> Gradients:  # fmt: skip
    """As `sparse_attention_reference.backward`.

    Raises:
        NotTaken: float64, lazily negated memory, or a GPU with too little shared memory for this head_dim.
    """
    both = needs[1] or needs[2]  # of k and v one program makes the gradients
    wanted = [torch.empty_like(t) if need else None for t, need in zip((q, k, v), (needs[0], both, both), strict=True)]
    written = [t if t is None or _is_aligned(t) else t.new_empty((*t.shape[:3], _wide(t))) for t in wanted]
    do, q, k, v, o = _readable(do, q, k, v, o)
    _launch("backward", do, q, k, v, o, log_sum.contiguous(), tuple(written), pattern, scale)
    found = [w if w is None or t is None else _delivered(w, t) for w, t in zip(written, wanted, strict=True)]
    return tuple(tensor if need else None for tensor, need in zip(found, needs, strict=True))


def _launch(direction: str, x: Tensor, *arguments: Any) -> None:
    kernels = _triton()
    with torch.cuda.device_of(x):
        try:
            getattr(kernels, direction)(x, *arguments)
        except kernels.OutOfResources as why:
            raise NotTaken("too little shared memory") from why


def _triton() -> Any:
    return import_module("..kernels.block_sparse_attention", __package__)


def _readable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copied, with zeros behind, where tokens begin at no multiple of 16 bytes or lie far apart, or channels apart."""
    if tensors[0].dtype == torch.float64:
        raise NotTaken("float64 on a GPU")
    if is_lazy(tensors):
        raise NotTaken("lazily negated memory")
    return tuple(t if _is_aligned(t) else F.pad(t, (0, _wide(t) - t.shape[-1])).contiguous() for t in tensors)


def _is_aligned(tensor: Tensor) -> bool:
    size = tensor.element_size()
    apart = (stride * size % 16 for stride, count in zip(tensor.stride()[:-1], tensor.shape, strict=False) if count > 1)
    near = tensor.stride(-1) == 1 and (tensor.shape[-2] == 1 or tensor.stride(-2) < _FARTHEST)
    return near and _wide(tensor) == tensor.shape[-1] and tensor.data_ptr() % 16 == 0 and not any(apart)


def _wide(tensor: Tensor) -> int:
    """Channels, filled up to a multiple of 16 bytes."""
    unit = 16 // tensor.element_size()
    return -(-tensor.shape[-1] // unit) * unit


def _delivered(written: Tensor, result: Tensor) -> Tensor:
    return result if written is result else result.copy_(written[..., : result.shape[-1]])
