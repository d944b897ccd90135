"""Block-sparse attention in Triton, forward and backward: what launches the kernels.

All tensors are on one device, [B, H, S, D] with channels that lie contiguous and any other strides; the pattern is
that of ops.sparse_attention_reference. Nothing is checked here. Deterministic: no atomics. Nothing waits for the
device. Never run on a GPU so far: the kernels are interpreted, and compiled for the architectures.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .block_sparse_attention_backward import delta_kernel, dkdv_kernel, dq_kernel
from .block_sparse_attention_forward import forward_kernel
from .block_sparse_attention_plan import Plan, Tile, plan_of

__all__ = ["OutOfResources", "backward", "forward"]

Pattern: TypeAlias = Any  # of ops.sparse_attention_reference; the kernels know nothing of the operators
Gradients: TypeAlias = tuple[Tensor | None, ...]  # of q, k, v

_UPCAST = bool(triton.knobs.runtime.interpret)
_DELTA = 32  # queries of a program


def forward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor, pattern: Pattern, scale: float) -> None:
    """Write the result, and log(sum(exp(scores))) of each query, float32 [B, H, Sq]."""
    plan, unit = _plan(q, v, pattern), _unit(q, k, v, o)
    forward_kernel[_grid(q, plan.forward.queries)](
        q, k, v, o, log_sum, pattern.row_start, pattern.row_at, *_strides(unit, q, k, v, o), *_sizes(q, k, pattern, q),
        scale, EVEN=k.shape[2] % pattern.block == 0, UNIT=unit, **_how(q, v, pattern, plan), **_tile(plan.forward),
    )  # fmt: skip


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor, gradients: Gradients, pattern: Pattern,
    scale: float,
) -> None:  # fmt: skip
    """Write the gradients that are needed; of k and v both or neither."""
    dq, dk, dv = gradients
    plan, unit = _plan(q, v, pattern), _unit(do, q, k, v, o, *(g for g in gradients if g is not None))
    how = {"UNIT": unit, **_how(q, v, pattern, plan)}
    delta = torch.empty_like(log_sum)
    delta_kernel[_grid(q, _DELTA)](
        o, do, delta, *_strides(unit, o, do), q.shape[1], q.shape[2],
        UNIT=unit, DV=v.shape[3], D1=plan.d1, D2=plan.d2, TM=_DELTA, num_warps=4,
    )  # fmt: skip
    read = (q, k, v, do, log_sum, delta)
    strides = _strides(unit, q, k, v, do)
    if dq is not None:
        dq_kernel[_grid(q, plan.dq.queries)](
            *read, dq, pattern.row_start, pattern.row_at, *strides, *_strides(unit, dq), *_sizes(q, k, pattern, q),
            scale, EVEN=k.shape[2] % pattern.block == 0, **how, **_tile(plan.dq),
        )  # fmt: skip
    if dk is not None and dv is not None:
        dkdv_kernel[_grid(k, plan.dkdv.keys)](
            *read, dk, dv, pattern.column_start, pattern.column_at, *strides, *_strides(unit, dk, dv),
            *_sizes(q, k, pattern, k), scale, **how, **_tile(plan.dkdv),
        )  # fmt: skip


def _plan(q: Tensor, v: Tensor, pattern: Pattern) -> Plan:
    return plan_of(max(q.shape[3], v.shape[3]), pattern.block, q.element_size())


def _grid(x: Tensor, tokens: int) -> tuple[int]:
    b, heads, length, _ = x.shape
    return (b * heads * -(-length // tokens),)


def _unit(*tensors: Tensor) -> int:
    """Up to 16 bytes of elements: what divides all strides, and so the alignment of every token."""
    strides = _strides(1, *tensors)
    units = (unit for unit in (8, 4, 2) if unit * tensors[0].element_size() <= 16)
    return next((unit for unit in units if all(stride % unit == 0 for stride in strides)), 1)


def _strides(unit: int, *tensors: Tensor) -> list[int]:
    """Of samples, heads and tokens, in units; 0 where there is but one."""
    return [
        0 if size == 1 else stride // unit
        for tensor in tensors
        for size, stride in zip(tensor.shape[:3], tensor.stride(), strict=False)
    ]


def _sizes(q: Tensor, k: Tensor, pattern: Pattern, of: Tensor) -> tuple[int, ...]:
    """Heads of q or k, over which a grid goes; heads that share one of k; rows of the pattern in a sample; tokens."""
    heads = q.shape[1]
    rows = heads * -(-of.shape[2] // pattern.block) if pattern.kept.shape[0] > 1 else 0
    return of.shape[1], heads // k.shape[1], rows, q.shape[2], k.shape[2]


def _how(q: Tensor, v: Tensor, pattern: Pattern, plan: Plan) -> dict[str, int]:
    return {
        "D": q.shape[3], "DV": v.shape[3], "D1": plan.d1, "D2": plan.d2, "BLOCK": pattern.block, "UPCAST": _UPCAST
    }  # fmt: skip


def _tile(tile: Tile) -> dict[str, int]:
    return {"TM": tile.queries, "TN": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}
