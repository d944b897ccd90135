"""Group normalisation where groups are too large for a program: sums over tiles, totals of groups, tiles again.

Forward 3T and backward 5T, with T the bytes of x. Everything is added up in a fixed order. Not run on a GPU yet:
interpreted and compiled.
"""

import triton
import triton.language as tl

from .group_norm_tile import (
    activate,
    affine,
    centred,
    coefficients,
    gradient_of_x,
    gradient_of_z,
    kept,
    per_channel,
    places,
    store_sums,
)


@triton.jit
def tile(C, HW, chunks, LAST: tl.constexpr, CB: tl.constexpr, RB: tl.constexpr):
    """Where a program works: sample, chunk, channels, which are there, positions, and all places in memory."""
    pid = tl.program_id(0)
    blocks = (C + CB - 1) // CB
    first = pid % blocks * CB
    chunk = pid // blocks % chunks
    n = (pid // blocks // chunks).to(tl.int64)
    k, r = tl.arange(0, CB), tl.arange(0, RB)
    skip = chunk.to(tl.int64) * RB * (C if LAST else 1) + first.to(tl.int64) * (1 if LAST else HW)
    at = n * C * HW + skip + places(k, r, C, HW, LAST)
    c = first + k
    there = (c < C)[:, None] & (chunk * RB + r < HW)[None, :]
    return n, chunk, c, c < C, at, there


@triton.jit
def moments_kernel(
    X, PART_MEAN, PART_LEFT, PART_SQUARES, chunks, c_units, hw_units,
    LAST: tl.constexpr, C_UNIT: tl.constexpr, HW_UNIT: tl.constexpr, CB: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """[N, chunks, C]: a channel's mean over a chunk, the sum of d, which rounding has left, and of d * d. Reads T."""
    C, HW = c_units * C_UNIT, hw_units * HW_UNIT
    n, chunk, c, live, at, there = tile(C, HW, chunks, LAST, CB, RB)
    x = tl.load(X + at, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / tl.minimum(HW - chunk * RB, RB)
    d = tl.where(there, x - mean[:, None], 0.0)
    row = (n * chunks + chunk) * C
    tl.store(PART_MEAN + row + c, mean, mask=live)
    tl.store(PART_LEFT + row + c, tl.sum(d, 1), mask=live)
    tl.store(PART_SQUARES + row + c, tl.sum(d * d, 1), mask=live)


@triton.jit
def moments_about(
    centre, PART_MEAN, PART_LEFT, PART_SQUARES, TIME, KEEP, TIME_ROW, n, first, end, C, HW, chunks,
    RB: tl.constexpr, CB: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """Mean and mean square of x + time - centre over a group of a sample (Chan, Golub & LeVeque 1979)."""
    total, squares = tl.full([KB, CB], 0.0, tl.float32), tl.full([KB, CB], 0.0, tl.float32)
    count = total
    for c0 in range(first, end, CB):
        c = c0 + tl.arange(0, CB)
        mine = kept(KEEP, c, c < end)
        time = per_channel(TIME, n * TIME_ROW + c, c < end, 0.0)
        for k0 in range(0, chunks, KB):
            k = k0 + tl.arange(0, KB)
            used = (k < chunks)[:, None] & mine[None, :]
            at = (n * chunks + k[:, None]) * C + c[None, :]
            size = tl.where(used, tl.minimum(HW - k * RB, RB).to(tl.float32)[:, None], 0.0)
            d = tl.load(PART_MEAN + at, mask=used, other=0.0) - centre + time[None, :]
            left = tl.load(PART_LEFT + at, mask=used, other=0.0)
            total += d * size + left
            squares += tl.load(PART_SQUARES + at, mask=used, other=0.0) + d * (d * size + 2.0 * left)
            count += size
    whole = tl.maximum(tl.sum(tl.sum(count, 1), 0), 1.0)
    return tl.sum(tl.sum(total, 1), 0) / whole, tl.sum(tl.sum(squares, 1), 0) / whole


@triton.jit
def combine_kernel(
    PART_MEAN, PART_LEFT, PART_SQUARES, MEAN, RSTD, TIME, KEEP, TIME_ROW, OFFSETS, G, C, HW, chunks,
    EPS: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of a group of a sample from its chunks' moments, in two steps, centred."""
    pid = tl.program_id(0)
    n, g = (pid // G).to(tl.int64), pid % G
    first, end = tl.load(OFFSETS + g), tl.load(OFFSETS + g + 1)
    mean, _ = moments_about(
        0.0, PART_MEAN, PART_LEFT, PART_SQUARES, TIME, KEEP, TIME_ROW, n, first, end, C, HW, chunks, RB, CB, KB
    )
    left, square = moments_about(
        mean, PART_MEAN, PART_LEFT, PART_SQUARES, TIME, KEEP, TIME_ROW, n, first, end, C, HW, chunks, RB, CB, KB
    )
    tl.store(MEAN + pid, mean + left)
    tl.store(RSTD + pid, 1.0 / tl.sqrt(tl.maximum(square - left * left, 0.0) + EPS))


@triton.jit
def apply_kernel(
    X, Y, MEAN, RSTD, WEIGHT, BIAS, SCALE, SHIFT, TIME, KEEP, SCALE_ROW, SHIFT_ROW, TIME_ROW,
    GROUP_OF, G, chunks, c_units, hw_units,
    SILU: tl.constexpr, LAST: tl.constexpr, C_UNIT: tl.constexpr, HW_UNIT: tl.constexpr,
    CB: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """y. Reads T and writes T."""
    C, HW = c_units * C_UNIT, hw_units * HW_UNIT
    n, _, c, live, at, there = tile(C, HW, chunks, LAST, CB, RB)
    time, mean, a, b, _, _ = coefficients(
        n, c, live, MEAN, RSTD, WEIGHT, BIAS, SCALE, SHIFT, TIME, SCALE_ROW, SHIFT_ROW, TIME_ROW, GROUP_OF, G
    )
    used = there & kept(KEEP, c, live)[:, None]
    y = activate(centred(tl.load(X + at, mask=there, other=0.0), used, TIME, time, mean), a, b, used, KEEP, SILU)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=there)


@triton.jit
def sums_kernel(
    DY, X, MEAN, RSTD, WEIGHT, BIAS, SCALE, SHIFT, TIME, KEEP, SCALE_ROW, SHIFT_ROW, TIME_ROW,
    PART_DZ, PART_DZ_D, PART_D, GROUP_OF, G, chunks, c_units, hw_units,
    SILU: tl.constexpr, LAST: tl.constexpr, C_UNIT: tl.constexpr, HW_UNIT: tl.constexpr,
    CB: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """[N, chunks, C]: sums of dz, dz * d and, where a time embedding has a gradient, d over a chunk. Reads 2T."""
    C, HW = c_units * C_UNIT, hw_units * HW_UNIT
    n, chunk, c, live, at, there = tile(C, HW, chunks, LAST, CB, RB)
    time, mean, a, b, _, _ = coefficients(
        n, c, live, MEAN, RSTD, WEIGHT, BIAS, SCALE, SHIFT, TIME, SCALE_ROW, SHIFT_ROW, TIME_ROW, GROUP_OF, G
    )
    used = there & kept(KEEP, c, live)[:, None]
    d = centred(tl.load(X + at, mask=there, other=0.0), used, TIME, time, mean)
    dz = gradient_of_z(DY, at, there, used, d, a, b, KEEP, SILU)
    row = (n * chunks + chunk) * C
    tl.store(PART_DZ + row + c, tl.sum(dz, 1), mask=live)
    tl.store(PART_DZ_D + row + c, tl.sum(dz * d, 1), mask=live)
    if PART_D is not None:
        tl.store(PART_D + row + c, tl.sum(d, 1), mask=live)


@triton.jit
def over_chunks(PART, n, c, live, chunks, C, CB: tl.constexpr, KB: tl.constexpr):
    """[CB]: the sum over all chunks of sample n."""
    total = tl.full([KB, CB], 0.0, tl.float32)
    for k0 in range(0, chunks, KB):
        k = k0 + tl.arange(0, KB)
        at = (n * chunks + k[:, None]) * C + c[None, :]
        total += tl.load(PART + at, mask=(k < chunks)[:, None] & live[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit
def finish_kernel(
    PART_DZ, PART_DZ_D, PART_D, RSTD, WEIGHT, BIAS, SCALE, SHIFT, KEEP, SCALE_ROW, SHIFT_ROW,
    LEVEL, SLOPE, DSCALE, DSHIFT, DTIME, SUM_DZ, SUM_DZ_N, OFFSETS, G, C, HW, chunks,
    CB: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """What dx takes of a group of a sample, and every gradient that is not x's, from the sums of chunks."""
    pid = tl.program_id(0)
    n, g = (pid // G).to(tl.int64), pid % G
    first, end = tl.load(OFFSETS + g), tl.load(OFFSETS + g + 1)
    rstd = tl.load(RSTD + pid)
    level = tl.full([CB], 0.0, tl.float32)
    slope, size = level, level
    for c0 in range(first, end, CB):
        c = c0 + tl.arange(0, CB)
        live = c < end
        sum_dz = over_chunks(PART_DZ, n, c, live, chunks, C, CB, KB)
        sum_dz_d = over_chunks(PART_DZ_D, n, c, live, chunks, C, CB, KB)
        store_sums(n, c, live, C, sum_dz, sum_dz_d * rstd, WEIGHT, BIAS, DSCALE, DSHIFT, SUM_DZ, SUM_DZ_N)
        w, _ = affine(n, c, live, WEIGHT, BIAS, SCALE, SHIFT, SCALE_ROW, SHIFT_ROW)
        mine = kept(KEEP, c, live)
        level += tl.where(mine, w * rstd * sum_dz, 0.0)
        slope += tl.where(mine, w * rstd * sum_dz_d, 0.0)
        size += tl.where(mine, 1.0, 0.0)
    whole = tl.maximum(tl.sum(size, 0) * HW, 1.0)
    group_level, group_slope = tl.sum(level, 0) / whole, tl.sum(slope, 0) / whole * rstd * rstd
    tl.store(LEVEL + pid, group_level)
    tl.store(SLOPE + pid, group_slope)
    if DTIME is not None:
        for c0 in range(first, end, CB):
            c = c0 + tl.arange(0, CB)
            live = c < end
            sum_dz = over_chunks(PART_DZ, n, c, live, chunks, C, CB, KB)
            sum_d = over_chunks(PART_D, n, c, live, chunks, C, CB, KB)
            w, _ = affine(n, c, live, WEIGHT, BIAS, SCALE, SHIFT, SCALE_ROW, SHIFT_ROW)
            dtime = w * rstd * sum_dz - group_level * HW - group_slope * sum_d
            dtime = tl.where(kept(KEEP, c, live), dtime, 0.0)
            tl.store(DTIME + n * C + c, dtime.to(DTIME.dtype.element_ty), mask=live)


@triton.jit
def apply_backward_kernel(
    DY, X, DX, MEAN, RSTD, WEIGHT, BIAS, SCALE, SHIFT, TIME, KEEP, SCALE_ROW, SHIFT_ROW, TIME_ROW,
    LEVEL, SLOPE, GROUP_OF, G, chunks, c_units, hw_units,
    SILU: tl.constexpr, LAST: tl.constexpr, C_UNIT: tl.constexpr, HW_UNIT: tl.constexpr,
    CB: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """dx. Reads 2T and writes T."""
    C, HW = c_units * C_UNIT, hw_units * HW_UNIT
    n, _, c, live, at, there = tile(C, HW, chunks, LAST, CB, RB)
    time, mean, a, b, _, group = coefficients(
        n, c, live, MEAN, RSTD, WEIGHT, BIAS, SCALE, SHIFT, TIME, SCALE_ROW, SHIFT_ROW, TIME_ROW, GROUP_OF, G
    )
    used = there & kept(KEEP, c, live)[:, None]
    level = tl.load(LEVEL + group, mask=live, other=0.0)
    slope = tl.load(SLOPE + group, mask=live, other=0.0)
    d = centred(tl.load(X + at, mask=there, other=0.0), used, TIME, time, mean)
    dz = gradient_of_z(DY, at, there, used, d, a, b, KEEP, SILU)
    dx = gradient_of_x(dz, d, a, level, slope, used)
    tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=there)


@triton.jit
def weights_kernel(
    SUM_DZ, SUM_DZ_N, SCALE, SCALE_ROW, DWEIGHT, DBIAS, N, C, NB: tl.constexpr, CB: tl.constexpr
):  # fmt: skip
    """dweight and dbias: (1 + scale) times the sums of each sample, added up over samples."""
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    total, total_n = tl.full([NB, CB], 0.0, tl.float32), tl.full([NB, CB], 0.0, tl.float32)
    for n0 in range(0, N, NB):
        n = n0 + tl.arange(0, NB).to(tl.int64)[:, None]
        there = (n < N) & (c < C)[None, :]
        one_plus = 1.0 + per_channel(SCALE, n * SCALE_ROW + c[None, :], there, 0.0)
        total += one_plus * tl.load(SUM_DZ + n * C + c[None, :], mask=there, other=0.0)
        total_n += one_plus * tl.load(SUM_DZ_N + n * C + c[None, :], mask=there, other=0.0)
    if DWEIGHT is not None:
        tl.store(DWEIGHT + c, tl.sum(total_n, 0).to(DWEIGHT.dtype.element_ty), mask=c < C)
    if DBIAS is not None:
        tl.store(DBIAS + c, tl.sum(total, 0).to(DBIAS.dtype.element_ty), mask=c < C)
