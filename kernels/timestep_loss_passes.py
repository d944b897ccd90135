"""Noise added, and the loss of a prediction with its gradient: each reads and writes memory once, in one launch.

A program takes STEPS blocks of one sample. Of the loss, the last program to finish adds up what all have found, in a
fixed order: every run gives the same bits. Not run on a GPU yet: interpreted and compiled.
"""

import triton
import triton.language as tl

from .timestep_loss_tile import error_and_slope, noise_of, scales, share, target_of, weight_of


@triton.jit
def noised_kernel(
    X0, NOISE, SEED, TABLE, ROW, OUT, columns, chunks, units,
    UNIT: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """alpha x0 + sigma noise. Reads 2T, or T where the noise is drawn, and writes T."""
    n, first = share(chunks, STEPS, BLOCK)
    size = units * UNIT
    alpha, sigma = scales(TABLE, ROW, n, columns)
    for step in range(STEPS):
        begin = first + step * BLOCK
        i = begin + tl.arange(0, BLOCK)
        at, there = n * size + i, i < size
        x0 = tl.load(X0 + at, mask=there, other=0.0).to(tl.float32)
        x = alpha * x0 + sigma * noise_of(NOISE, SEED, n, begin, at, there, BLOCK)
        tl.store(OUT + at, x.to(OUT.dtype.element_ty), mask=there)


@triton.jit
def loss_kernel(
    PRED, TARGET, X0, NOISE, SEED, TABLE, ROW, WEIGHT, CELL, HUBER, MASK, DLOSS,
    GRAD, PART, PER_SAMPLE, LOSS, COUNTER, columns, weights, huber_row, samples, chunks, units,
    KIND: tl.constexpr, UNIT: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    SB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """With PART, the losses; with GRAD, the gradient for DLOSS, or 1. Reads 3T at most and writes T."""
    n, first = share(chunks, STEPS, BLOCK)
    size = units * UNIT
    factor = weight_of(WEIGHT, CELL, n, weights, True) / (1.0 * samples * size)
    if DLOSS is not None:
        factor *= tl.load(DLOSS)
    total = tl.full([BLOCK], 0.0, tl.float32)
    for step in range(STEPS):
        begin = first + step * BLOCK
        i = begin + tl.arange(0, BLOCK)
        at, there = n * size + i, i < size
        target = target_of(TARGET, X0, NOISE, SEED, TABLE, ROW, columns, n, begin, at, there, KIND, BLOCK)
        d = tl.load(PRED + at, mask=there, other=0.0).to(tl.float32) - target
        if MASK is not None:
            counts = tl.load(MASK + at, mask=there, other=0.0).to(tl.float32)
            d = tl.where(counts != 0.0, d, 0.0)
        error, slope = error_and_slope(tl.where(there, d, 0.0), HUBER, huber_row, n)
        if MASK is not None:
            error *= counts
            slope *= counts
        total += error
        if GRAD is not None:
            tl.store(GRAD + at, (slope * factor).to(GRAD.dtype.element_ty), mask=there)
    if PART is not None:
        tl.store(PART + tl.program_id(0), tl.sum(total, 0))
        tl.debug_barrier()
        if tl.atomic_add(COUNTER, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.store(COUNTER, 0)
            finish(PART, WEIGHT, CELL, PER_SAMPLE, LOSS, weights, samples, chunks, size, SB, CB)


@triton.jit
def finish(
    PART, WEIGHT, CELL, PER_SAMPLE, LOSS, weights, samples, chunks, size, SB: tl.constexpr, CB: tl.constexpr
):  # fmt: skip
    """The losses from PART [samples, chunks], which lies in the cache that all programs share, and not in one's own."""
    total = tl.full([SB], 0.0, tl.float32)
    for n0 in range(0, samples, SB):
        n = n0 + tl.arange(0, SB)
        live = n < samples
        found = tl.full([SB, CB], 0.0, tl.float32)
        for c0 in range(0, chunks, CB):
            c = c0 + tl.arange(0, CB)
            at = n.to(tl.int64)[:, None] * chunks + c[None, :]
            mask = live[:, None] & (c < chunks)[None, :]
            found += tl.load(PART + at, mask=mask, other=0.0, cache_modifier=".cg")
        per_sample = tl.sum(found, 1) / size
        tl.store(PER_SAMPLE + n, per_sample, mask=live)
        total += tl.where(live, weight_of(WEIGHT, CELL, n, weights, live) * per_sample, 0.0)
    tl.store(LOSS, tl.sum(total, 0) / samples)


@triton.jit
def scale_kernel(GRAD, DLOSS, units, STRIDE: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """GRAD *= DLOSS, where that is not 1: a loss that is not scaled costs one number a program."""
    dloss = tl.load(DLOSS)
    if dloss != 1.0:
        size = tl.cast(units, tl.int64) * UNIT
        for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, size, STRIDE):
            at = begin + tl.arange(0, BLOCK)
            grad = tl.load(GRAD + at, mask=at < size, other=0.0).to(tl.float32)
            tl.store(GRAD + at, (grad * dloss).to(GRAD.dtype.element_ty), mask=at < size)


@triton.jit
def totals_kernel(
    TOTALS, BUCKETS, CELL, PER_SAMPLE, buckets, cells, samples, SB: tl.constexpr, KB: tl.constexpr
):  # fmt: skip
    """Add losses, their squares and their number to their buckets' places in TOTALS, [3, buckets]."""
    k = tl.program_id(0) * KB + tl.arange(0, KB)
    wide: tl.constexpr = TOTALS.dtype.element_ty
    total = tl.full([SB, KB], 0.0, wide)
    squares, count = total, total
    for n0 in range(0, samples, SB):
        n = n0 + tl.arange(0, SB)
        cell = tl.load(CELL + n, mask=n < samples, other=-1)
        bucket = tl.load(BUCKETS + cell, mask=(cell >= 0) & (cell < cells), other=-1)
        loss = tl.load(PER_SAMPLE + n, mask=n < samples, other=0.0).to(wide)[:, None]
        mine = bucket[:, None] == k[None, :]
        total += tl.where(mine, loss, 0.0)
        squares += tl.where(mine, loss * loss, 0.0)
        count += tl.where(mine, 1.0, 0.0)
    live = k < buckets
    for place in tl.static_range(3):
        found = tl.sum(total if place == 0 else squares if place == 1 else count, 0)
        at = TOTALS + place * buckets + k
        tl.store(at, tl.load(at, mask=live, other=0.0) + found, mask=live)
