"""Group normalisation with time embedding, scale, shift and SiLU in Triton: what chooses and launches the kernels.

All tensors are on one device and in one layout: x, y, dy and dx lie as [N, C, HW], or, where `last`, as [N, HW, C];
`weight`, `bias` and `keep` are dense, rows of `scale`, `shift` and `time_bias` are. Nothing is checked here.
Deterministic: no atomics. Nothing waits for the device, but for the first call with new groups, which copies their
table. Never run on a GPU so far. The same kernels are interpreted with Triton 3.7.1, 3.8.0 and 3.9.0, in part with
3.6.0 (whose interpreter needs numpy < 2.4), and compiled for the architectures with all four, of which 3.9.0 spills
8 bytes in one variant (test_group_norm_aot.py).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import group_norm_one_pass as one
from . import group_norm_two_pass as two
from .group_norm_plan import OnePass, Shape, TwoPass, plan_of, power_of_two

__all__ = ["backward", "forward"]

Norm: TypeAlias = Any  # of ops.group_norm_reference; the kernels know nothing of the operators
Gradients: TypeAlias = tuple[Tensor | None, ...]  # of x, weight, bias, scale, shift, time_bias


def forward(x: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, last: bool) -> None:
    """Write y, and mean and 1 / sqrt(variance + eps) of each group, float32 [N, G]."""
    shape = _shape(x, last)
    plan = plan_of(shape, norm.offsets)
    groups, sizes = len(norm.offsets) - 1, _sizes(shape)
    tables = _tables(norm.offsets, plan.slabs if isinstance(plan, OnePass) else None, x.device)
    how = {"SILU": norm.silu, "LAST": last, **_units(shape)}
    if isinstance(plan, OnePass):
        rb, warps, hold = plan.forward
        one.forward_kernel[(shape.n * len(plan.slabs),)](
            x, y, mean, rstd, *norm[:6], *_rows(norm), tables.slabs, tables.group_of, len(plan.slabs), groups, *sizes,
            EPS=norm.eps, **how, UNIT=plan.unit, CB=plan.cb, RB=rb, GB=plan.gb, HOLD=hold, num_warps=warps,
        )  # fmt: skip
        return
    tile = {"CB": plan.cb, "RB": plan.rb, "num_warps": plan.forward}
    part = x.new_empty((3, shape.n, plan.chunks, shape.c), dtype=torch.float32)
    programs = (shape.n * plan.chunks * plan.blocks,)
    two.moments_kernel[programs](x, *part, plan.chunks, *sizes, LAST=last, **_units(shape), **tile)
    two.combine_kernel[(shape.n * groups,)](
        *part, mean, rstd, norm.time_bias, norm.keep, _rows(norm)[2], tables.offsets, groups, shape.c, shape.hw,
        plan.chunks, EPS=norm.eps, RB=plan.rb, CB=plan.small[0], KB=plan.small[1], num_warps=4,
    )  # fmt: skip
    two.apply_kernel[programs](
        x, y, mean, rstd, *norm[:6], *_rows(norm), tables.group_of, groups, plan.chunks, *sizes, **how, **tile
    )


def backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, gradients: Gradients, last: bool
) -> None:  # fmt: skip
    """Write the gradients that are needed, dense, from what forward has found."""
    shape = _shape(x, last)
    plan = plan_of(shape, norm.offsets)
    dx, dweight, dbias, *others = gradients
    sums = [None, None]
    if dweight is not None or dbias is not None:
        sums = list(x.new_empty((2, shape.n, shape.c), dtype=torch.float32))
    how = {"SILU": norm.silu, "LAST": last, **_units(shape)}
    launch = _backward_in_one if isinstance(plan, OnePass) else _backward_in_two
    launch(dy, x, mean, rstd, norm, dx, [*others, *sums], shape, plan, how)
    if sums[0] is not None:
        cb, nb = 16, min(128, power_of_two(shape.n))
        two.weights_kernel[(-(-shape.c // cb),)](
            *sums, norm.scale, _rows(norm)[0], dweight, dbias, shape.n, shape.c, NB=nb, CB=cb, num_warps=4
        )


def _backward_in_one(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, dx: Tensor | None, others: list[Tensor | None],
    shape: Shape, plan: OnePass, how: dict[str, Any],
) -> None:  # fmt: skip
    tables = _tables(norm.offsets, plan.slabs, x.device)
    rb, warps, hold = plan.backward
    one.backward_kernel[(shape.n * len(plan.slabs),)](
        dy, x, mean, rstd, *norm[:6], *_rows(norm), dx, *others, tables.slabs, tables.group_of, len(plan.slabs),
        len(norm.offsets) - 1, *_sizes(shape), **how, UNIT=plan.unit, CB=plan.cb, RB=rb, GB=plan.gb, HOLD=hold,
        num_warps=warps,
    )  # fmt: skip


def _backward_in_two(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, dx: Tensor | None, others: list[Tensor | None],
    shape: Shape, plan: TwoPass, how: dict[str, Any],
) -> None:  # fmt: skip
    tables, groups, sizes = _tables(norm.offsets, None, x.device), len(norm.offsets) - 1, _sizes(shape)
    part = [*x.new_empty((3 if others[2] is not None else 2, shape.n, plan.chunks, shape.c), dtype=torch.float32)]
    part += [None] * (3 - len(part))
    slopes = x.new_empty((2, shape.n, groups), dtype=torch.float32)
    programs = (shape.n * plan.chunks * plan.blocks,)
    given = (mean, rstd, *norm[:6], *_rows(norm))
    tile = {**how, "CB": plan.cb, "RB": plan.rb, "num_warps": plan.backward}
    two.sums_kernel[programs](dy, x, *given, *part, tables.group_of, groups, plan.chunks, *sizes, **tile)
    two.finish_kernel[(shape.n * groups,)](
        *part, rstd, *norm[:4], norm.keep, *_rows(norm)[:2], *slopes, *others, tables.offsets, groups, shape.c,
        shape.hw, plan.chunks, CB=plan.small[0], KB=plan.small[1], num_warps=4,
    )  # fmt: skip
    if dx is not None:
        two.apply_backward_kernel[programs](
            dy, x, dx, *given, *slopes, tables.group_of, groups, plan.chunks, *sizes, **tile
        )


def _rows(norm: Norm) -> tuple[int, ...]:
    """The distance between samples of scale, shift and time_bias."""
    return tuple(0 if t is None else t.stride(0) for t in (norm.scale, norm.shift, norm.time_bias))


def _shape(x: Tensor, last: bool) -> Shape:
    n, c = x.shape[:2]
    return Shape(n, c, x.numel() // (n * c), x.element_size(), last)


def _sizes(shape: Shape) -> tuple[int, int]:
    """C and HW, the one that lies contiguous divided by the unit that the kernel multiplies it with."""
    return (shape.c // shape.unit, shape.hw) if shape.last else (shape.c, shape.hw // shape.unit)


def _units(shape: Shape) -> dict[str, int]:
    return {"C_UNIT": shape.unit if shape.last else 1, "HW_UNIT": 1 if shape.last else shape.unit}


class _Tables(NamedTuple):
    """int32 on the device: where groups begin [G + 1], the group of each channel [C], the slabs [S, 4]."""

    offsets: Tensor
    group_of: Tensor
    slabs: Tensor | None


@lru_cache(maxsize=1024)
def _tables(offsets: tuple[int, ...], slabs: tuple[tuple[int, int, int, int], ...] | None, device: Any) -> _Tables:
    begins = torch.tensor(offsets, dtype=torch.int32)
    group_of = torch.arange(len(offsets) - 1, dtype=torch.int32).repeat_interleave(begins.diff())
    on_device = (begins.to(device), group_of.to(device))
    return _Tables(*on_device, None if slabs is None else torch.tensor(slabs, dtype=torch.int32).to(device))
