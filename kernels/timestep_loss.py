"""Noise added and the timestep loss in Triton: what chooses and launches the kernels.

All images, [B, *], are on one device and lie alike, one sample after another without gaps; the rest is dense. Nothing
is checked here. Deterministic: the only atomics count programs. Nothing waits for the device but the first call on it,
which makes the counters. Never run on a GPU so far; the same kernels are tested interpreted, and compiled for the
architectures.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor
from triton import cdiv, next_power_of_2

from . import timestep_loss_passes as passes
from .timestep_loss_counter import counter
from .timestep_loss_plan import PROGRAMS, plan_of, unit_of

__all__ = ["add_losses_", "backward", "forward", "noised", "scale_"]

Terms: TypeAlias = Any  # of ops.timestep_loss_reference; the kernels know nothing of the operators


def noised(x0: Tensor, noise: Tensor | None, seed: Tensor | None, table: Tensor, row: Tensor, out: Tensor) -> None:
    """Write alpha x0 + sigma noise. table: float32 [2, K]."""
    samples, size = _sizes(x0)
    plan, unit = plan_of(samples, size), unit_of(size)
    passes.noised_kernel[(samples * plan.chunks,)](
        x0, noise, seed, table, row, out, table.shape[1], plan.chunks, size // unit,
        UNIT=unit, STEPS=plan.steps, BLOCK=plan.block, num_warps=plan.warps,
    )  # fmt: skip


def forward(pred: Tensor, terms: Terms, grad: Tensor | None, per_sample: Tensor, loss: Tensor) -> None:
    """Write the loss, [], that of each sample, [B], and the gradient of the loss, where there is memory for it."""
    part = per_sample.new_empty((len(pred), plan_of(*_sizes(pred)).chunks))
    _launch(pred, terms, None, grad, part, per_sample, loss, counter(pred.device))


def backward(pred: Tensor, terms: Terms, grad: Tensor, dloss: Tensor) -> None:
    """Write the gradient of pred for dloss, float32 []."""
    _launch(pred, terms, dloss, grad, None, None, None, None)


def _launch(pred: Tensor, terms: Terms, dloss: Tensor | None, *outputs: Tensor | None) -> None:
    samples, size = _sizes(pred)
    plan, unit = plan_of(samples, size), unit_of(size)
    columns = 1 if terms.table is None else terms.table.shape[1]
    huber_row = 0 if terms.huber_c is None or len(terms.huber_c) == 1 else 1
    passes.loss_kernel[(samples * plan.chunks,)](
        pred, *terms[:-1], dloss, *outputs, columns, len(terms.weight), huber_row, samples, plan.chunks, size // unit,
        KIND=terms.prediction, UNIT=unit, STEPS=plan.steps, BLOCK=plan.block, SB=plan.small[0], CB=plan.small[1],
        num_warps=plan.warps,
    )  # fmt: skip


def scale_(grad: Tensor, dloss: Tensor) -> None:
    """grad *= dloss, float32 []. grad is dense."""
    size, block = grad.numel(), 4096
    unit = unit_of(size)
    programs = min(PROGRAMS, cdiv(size, block))
    passes.scale_kernel[(programs,)](
        grad, dloss, size // unit, STRIDE=PROGRAMS * block, UNIT=unit, BLOCK=block, num_warps=8
    )


def add_losses_(totals: Tensor, buckets: Tensor, cell: Tensor, per_sample: Tensor) -> None:
    """Add the losses, their squares and their number to their buckets' places in totals, [3, K]."""
    many, samples = totals.shape[1], len(per_sample)
    kb, sb = min(16, next_power_of_2(many)), min(128, next_power_of_2(samples))
    passes.totals_kernel[(cdiv(many, kb),)](
        totals, buckets, cell, per_sample, many, len(buckets), samples, SB=sb, KB=kb, num_warps=4
    )


def _sizes(x: Tensor) -> tuple[int, int]:
    """Samples, and the elements of each."""
    return len(x), x.shape[1:].numel()
