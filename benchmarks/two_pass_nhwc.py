"""A GroupNorm + SiLU in two passes for tensors whose channels lie contiguous, forward only: something to compare with.

It works as apex's does: one kernel adds up x and x * x of each group with float atomics, another reads x again and
writes y. The variance is E[x * x] - E[x] ** 2, inexact where the mean is large, and not the same bits twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHANNELS = 64  # of a program, about: rows of 128 bytes in bfloat16
_ELEMENTS = 8192  # of a program


@triton.jit
def _place(C, HW, SIZE: tl.constexpr, GROUPS: tl.constexpr, CB: tl.constexpr, RB: tl.constexpr):
    """Channels [CB] within the program's groups, where a tile [RB, CB] lies in memory, and what of it is there."""
    k = tl.arange(0, CB)
    r = tl.program_id(1) * RB + tl.arange(0, RB)
    c = tl.program_id(2) * GROUPS * SIZE + k
    at = tl.program_id(0).to(tl.int64) * HW * C + r[:, None] * C + c[None, :]
    return k, c, at, (r < HW)[:, None] & ((k < GROUPS * SIZE) & (c < C))[None, :]


@triton.jit
def statistics_kernel(
    X, SUM, SQUARES, C, HW, G,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, CB: tl.constexpr, RB: tl.constexpr, GB: tl.constexpr,
):  # fmt: skip
    """Add a tile's x and x * x to those of its groups: float32 [N, G], zeros at first. Reads T."""
    k, _, at, there = _place(C, HW, SIZE, GROUPS, CB, RB)
    x = tl.load(X + at, mask=there, other=0.0).to(tl.float32)
    g = tl.arange(0, GB)
    member = (k // SIZE)[:, None] == g[None, :]
    group = tl.program_id(2) * GROUPS + g
    mine = (g < GROUPS) & (group < G)
    row = tl.program_id(0) * G + group
    tl.atomic_add(SUM + row, tl.sum(tl.where(member, tl.sum(x, 0)[:, None], 0.0), 0), mask=mine)
    tl.atomic_add(SQUARES + row, tl.sum(tl.where(member, tl.sum(x * x, 0)[:, None], 0.0), 0), mask=mine)


@triton.jit
def apply_kernel(
    X, Y, SUM, SQUARES, WEIGHT, BIAS, C, HW, G,
    EPS: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, CB: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """y. Reads T and writes T."""
    _, c, at, there = _place(C, HW, SIZE, GROUPS, CB, RB)
    live = c < C
    row = tl.program_id(0) * G + c // SIZE
    mean = tl.load(SUM + row, mask=live, other=0.0) / (SIZE * HW)
    square = tl.load(SQUARES + row, mask=live, other=0.0) / (SIZE * HW)
    rstd = 1.0 / tl.sqrt(tl.maximum(square - mean * mean, 0.0) + EPS)
    a = rstd * tl.load(WEIGHT + c, mask=live, other=0.0).to(tl.float32)
    b = tl.load(BIAS + c, mask=live, other=0.0).to(tl.float32) - mean * a
    z = tl.load(X + at, mask=there, other=0.0).to(tl.float32) * a[None, :] + b[None, :]
    tl.store(Y + at, (z / (1.0 + tl.exp(-z))).to(Y.dtype.element_ty), mask=there)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """silu(group_norm(x)) for x of channels_last memory, and equal groups."""
    n, c = x.shape[:2]
    hw, size = x.shape[2:].numel(), c // groups
    some = min(max(_CHANNELS // size, 1), groups)
    cb = triton.next_power_of_2(some * size)
    rb = max(_ELEMENTS // cb, 1)
    grid = n, triton.cdiv(hw, rb), triton.cdiv(groups, some)
    y = torch.empty_like(x)
    sums = torch.zeros((2, n, groups), device=x.device)
    how = {"SIZE": size, "GROUPS": some, "CB": cb, "RB": rb, "num_warps": 8}
    statistics_kernel[grid](x, *sums, c, hw, groups, **how, GB=triton.next_power_of_2(some))
    apply_kernel[grid](x, y, *sums, weight, bias, c, hw, groups, EPS=eps, **how)
    return y
