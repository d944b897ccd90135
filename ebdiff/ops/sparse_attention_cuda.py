"""Sparse attention on a GPU, by the Triton kernels. Arguments have been checked.

Never run on a GPU so far: the kernels are tested interpreted, and compiled without a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .native_cpu import NotTaken, is_lazy
from .sparse_attention_reference import Gradients, Pattern, result_like

__all__ = ["backward", "forward"]


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> tuple[Tensor, Tensor]:
    """As `sparse_attention_reference.forward`.

    Raises:
        NotTaken: float64, lazily negated memory, or a GPU with too little shared memory for this head_dim.
    """
    q, k, v = _readable(q, k, v)
    o, log_sum = result_like(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)
    _launch("forward", q, k, v, o, log_sum, pattern, scale)
    return o, log_sum


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
    written = [None if t is None or _is_dense(t) else t.new_empty(t.shape) for t in wanted]
    out = tuple(t if t is None or w is None else w for t, w in zip(wanted, written, strict=True))
    do, q, k, v, o = _readable(do, q, k, v, o)
    _launch("backward", do, q, k, v, o, log_sum.contiguous(), out, pattern, scale)
    for tensor, buffer in zip(wanted, written, strict=True):
        if tensor is not None and buffer is not None:
            tensor.copy_(buffer)
    return tuple(tensor if need else None for tensor, need in zip(wanted, needs, strict=True))


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
    """With channels that lie contiguous, copied only where they do not."""
    if tensors[0].dtype == torch.float64:
        raise NotTaken("float64 on a GPU")
    if is_lazy(tensors):
        raise NotTaken("lazily negated memory")
    return tuple(tensor if _is_dense(tensor) else tensor.contiguous() for tensor in tensors)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1
