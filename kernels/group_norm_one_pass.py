"""Group normalisation where a program holds its groups of one sample: read once, written once.

Forward 2T and backward 3T, with T the bytes of x. With HOLD in registers; without, for groups too large for those, in
steps of RB positions that come from the cache after the first time. Not run on a GPU yet: interpreted and compiled.
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
    over_groups,
    per_channel,
    places,
    spread,
    store_sums,
)


@triton.jit
def slab(SLABS, GROUP_OF, KEEP, slabs, UNIT: tl.constexpr, CB: tl.constexpr, GB: tl.constexpr):
    """Where a program works: sample, channels, which are there, which are kept, groups, and who belongs to whom."""
    pid = tl.program_id(0)
    row = SLABS + 4 * (pid % slabs)
    c = tl.load(row) * UNIT + tl.arange(0, CB)
    live = c < tl.load(row + 1) * UNIT
    g = tl.load(row + 2) + tl.arange(0, GB)
    mine = kept(KEEP, c, live)
    group = tl.load(GROUP_OF + c, mask=live, other=0)
    member = (group[:, None] == g[None, :]) & mine[:, None]
    return (pid // slabs).to(tl.int64), c, live, mine, g, g < tl.load(row + 3), member


@triton.jit
def masks(live, mine, r, HW):
    """[CB, RB]: where there is something, and where it is used."""
    inside = (r < HW)[None, :]
    return live[:, None] & inside, mine[:, None] & inside


@triton.jit
def forward_kernel(
    X, Y, MEAN, RSTD, WEIGHT, BIAS, SCALE, SHIFT, TIME, KEEP, SCALE_ROW, SHIFT_ROW, TIME_ROW,
    SLABS, GROUP_OF, slabs, G, c_units, hw_units,
    EPS: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr, C_UNIT: tl.constexpr, HW_UNIT: tl.constexpr,
    UNIT: tl.constexpr, CB: tl.constexpr, RB: tl.constexpr, GB: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """y, and mean and rstd of each group."""
    C, HW = c_units * C_UNIT, hw_units * HW_UNIT
    n, c, live, mine, g, groups, member = slab(SLABS, GROUP_OF, KEEP, slabs, UNIT, CB, GB)
    X += n * C * HW
    Y += n * C * HW
    r = tl.arange(0, RB)
    time = per_channel(TIME, n * TIME_ROW + c, live, 0.0)
    nothing = tl.full([CB], 0.0, tl.float32)
    size = tl.maximum(over_groups(nothing + 1.0, member) * HW, 1.0)
    there, used = masks(live, mine, r, HW)
    at = places(c, r, C, HW, LAST)
    if HOLD:
        x = tl.load(X + at, mask=there, other=0.0)
        total = centred(x, used, TIME, time, nothing)
    else:
        total = tl.full([CB, RB], 0.0, tl.float32)
        for r0 in range(0, HW, RB):
            there, used = masks(live, mine, r0 + r, HW)
            x = tl.load(X + places(c, r0 + r, C, HW, LAST), mask=there, other=0.0)
            total += centred(x, used, TIME, time, nothing)
    mean = over_groups(tl.sum(total, 1), member) / size
    centre = spread(mean, member)
    if HOLD:
        d = centred(x, used, TIME, time, centre)
        total, squares = d, d * d
    else:
        total = tl.full([CB, RB], 0.0, tl.float32)
        squares = total
        for r0 in range(0, HW, RB):
            there, used = masks(live, mine, r0 + r, HW)
            x = tl.load(X + places(c, r0 + r, C, HW, LAST), mask=there, other=0.0)
            d = centred(x, used, TIME, time, centre)
            total += d
            squares += d * d
    left = over_groups(tl.sum(total, 1), member) / size  # what rounding has left of the mean
    variance = over_groups(tl.sum(squares, 1), member) / size - left * left
    rstd = 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + EPS)
    tl.store(MEAN + n * G + g, mean + left, mask=groups)
    tl.store(RSTD + n * G + g, rstd, mask=groups)
    rest = spread(left, member)
    a = spread(rstd, member)  # before the loads below: a few registers less
    w, b = affine(n, c, live, WEIGHT, BIAS, SCALE, SHIFT, SCALE_ROW, SHIFT_ROW)
    a *= w
    if HOLD:
        y = activate(d - rest[:, None], a, b, used, KEEP, SILU)
        tl.store(Y + at, y.to(Y.dtype.element_ty), mask=there)
    else:
        for r0 in range(0, HW, RB):
            there, used = masks(live, mine, r0 + r, HW)
            at = places(c, r0 + r, C, HW, LAST)
            d = centred(tl.load(X + at, mask=there, other=0.0), used, TIME, time, centre) - rest[:, None]
            y = activate(d, a, b, used, KEEP, SILU)
            tl.store(Y + at, y.to(Y.dtype.element_ty), mask=there)


@triton.jit
def backward_kernel(
    DY, X, MEAN, RSTD, WEIGHT, BIAS, SCALE, SHIFT, TIME, KEEP, SCALE_ROW, SHIFT_ROW, TIME_ROW,
    DX, DSCALE, DSHIFT, DTIME, SUM_DZ, SUM_DZ_N,
    SLABS, GROUP_OF, slabs, G, c_units, hw_units,
    SILU: tl.constexpr, LAST: tl.constexpr, C_UNIT: tl.constexpr, HW_UNIT: tl.constexpr,
    UNIT: tl.constexpr, CB: tl.constexpr, RB: tl.constexpr, GB: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """dx, dscale, dshift, dtime, and for the weights the sums of dz and dz * n over positions, [N, C] each."""
    C, HW = c_units * C_UNIT, hw_units * HW_UNIT
    n, c, live, mine, _, _, member = slab(SLABS, GROUP_OF, KEEP, slabs, UNIT, CB, GB)
    X += n * C * HW
    DY += n * C * HW
    r = tl.arange(0, RB)
    time, mean, a, b, rstd, _ = coefficients(
        n, c, live, MEAN, RSTD, WEIGHT, BIAS, SCALE, SHIFT, TIME, SCALE_ROW, SHIFT_ROW, TIME_ROW, GROUP_OF, G
    )
    there, used = masks(live, mine, r, HW)
    at = places(c, r, C, HW, LAST)
    size = tl.maximum(over_groups(tl.full([CB], 1.0, tl.float32), member) * HW, 1.0)
    if HOLD:
        d = centred(tl.load(X + at, mask=there, other=0.0), used, TIME, time, mean)
        if CB * RB <= 4096:  # it weighs in small groups, and larger tiles leave no registers for it
            left = over_groups(tl.sum(d, 1), member) / size
            d = tl.where(used, d - spread(left, member)[:, None], 0.0)
        dz = gradient_of_z(DY, at, there, used, d, a, b, KEEP, SILU)
        total_dz, total_dz_d, total_d = dz, dz * d, d
    else:
        total_dz = tl.full([CB, RB], 0.0, tl.float32)
        total_dz_d, total_d = total_dz, total_dz
        for r0 in range(0, HW, RB):
            there, used = masks(live, mine, r0 + r, HW)
            at = places(c, r0 + r, C, HW, LAST)
            d = centred(tl.load(X + at, mask=there, other=0.0), used, TIME, time, mean)
            dz = gradient_of_z(DY, at, there, used, d, a, b, KEEP, SILU)
            total_dz += dz
            total_dz_d += dz * d
            if DTIME is not None:
                total_d += d
    sum_dz, sum_dz_d = tl.sum(total_dz, 1), tl.sum(total_dz_d, 1)
    store_sums(n, c, live, C, sum_dz, sum_dz_d * rstd, WEIGHT, BIAS, DSCALE, DSHIFT, SUM_DZ, SUM_DZ_N)
    level = spread(over_groups(a * sum_dz, member) / size, member)
    slope = spread(over_groups(a * sum_dz_d, member) / size, member) * rstd * rstd
    if DTIME is not None:
        dtime = tl.where(mine, a * sum_dz - level * HW - slope * tl.sum(total_d, 1), 0.0)
        tl.store(DTIME + n * C + c, dtime.to(DTIME.dtype.element_ty), mask=live)
    if DX is not None:
        DX += n * C * HW
        if HOLD:
            dx = gradient_of_x(dz, d, a, level, slope, used)
            tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=there)
        else:
            for r0 in range(0, HW, RB):
                there, used = masks(live, mine, r0 + r, HW)
                at = places(c, r0 + r, C, HW, LAST)
                d = centred(tl.load(X + at, mask=there, other=0.0), used, TIME, time, mean)
                dz = gradient_of_z(DY, at, there, used, d, a, b, KEEP, SILU)
                dx = gradient_of_x(dz, d, a, level, slope, used)
                tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=there)
