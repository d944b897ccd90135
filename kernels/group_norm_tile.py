"""What the kernels of group normalisation share: tiles [channels, positions] of one sample, in either layout.

A tile is indexed [c, r] whatever lies contiguous in memory; Triton's compiler lays the threads along that. Sizes that
loads have to know multiples of come divided by a constexpr unit, as Triton itself only notices multiples of 16.
d is x + time_bias - mean, computed as x - mean + time_bias, so that a large mean costs no digits.
"""

import triton
import triton.language as tl


@triton.jit
def places(c, r, C, HW, LAST: tl.constexpr):
    """Offsets [CB, RB] of channels c and positions r; LAST: the channels lie contiguous."""
    return r[None, :] * C + c[:, None] if LAST else c[:, None] * HW + r[None, :]


@triton.jit
def per_channel(P, at, live, default: tl.constexpr):
    """float32 [CB]; the default where there is no tensor."""
    if P is None:
        value = tl.full(at.shape, default, tl.float32)
    else:
        value = tl.load(P + at, mask=live, other=default).to(tl.float32)
    return value


@triton.jit
def kept(KEEP, c, live):
    """Which channels are there and not removed."""
    return live if KEEP is None else live & (tl.load(KEEP + c, mask=live, other=0) != 0)


@triton.jit
def affine(n, c, live, WEIGHT, BIAS, SCALE, SHIFT, SCALE_ROW, SHIFT_ROW):
    """weight * (1 + scale) and bias * (1 + scale) + shift of sample n's channels."""
    one_plus = 1.0 + per_channel(SCALE, n * SCALE_ROW + c, live, 0.0)
    shift = per_channel(SHIFT, n * SHIFT_ROW + c, live, 0.0)
    return per_channel(WEIGHT, c, live, 1.0) * one_plus, per_channel(BIAS, c, live, 0.0) * one_plus + shift


@triton.jit
def coefficients(
    n, c, live, MEAN, RSTD, WEIGHT, BIAS, SCALE, SHIFT, TIME, SCALE_ROW, SHIFT_ROW, TIME_ROW, GROUP_OF, G
):  # fmt: skip
    """time, mean, a and b of sample n's channels, z = (x + time - mean) * a + b; rstd, and where the group's lies."""
    group = n * G + tl.load(GROUP_OF + c, mask=live, other=0)
    mean, rstd = tl.load(MEAN + group, mask=live, other=0.0), tl.load(RSTD + group, mask=live, other=0.0)
    w, b = affine(n, c, live, WEIGHT, BIAS, SCALE, SHIFT, SCALE_ROW, SHIFT_ROW)
    return per_channel(TIME, n * TIME_ROW + c, live, 0.0), mean, w * rstd, b, rstd, group


@triton.jit
def centred(x, used, TIME, time, mean):
    """d of a tile, 0 where nothing is used."""
    d = x.to(tl.float32) - mean[:, None]
    if TIME is not None:
        d += time[:, None]
    return tl.where(used, d, 0.0)


@triton.jit
def activate(d, a, b, used, KEEP, SILU: tl.constexpr):
    """y on a tile: silu(d * a + b), 0 in removed channels."""
    z = d * a[:, None] + b[:, None]
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    if KEEP is not None:
        z = tl.where(used, z, 0.0)
    return z


@triton.jit
def gradient_of_z(DY, at, there, used, d, a, b, KEEP, SILU: tl.constexpr):
    """dz = dy * silu'(z) on a tile, 0 where nothing is used."""
    dz = tl.load(DY + at, mask=there, other=0.0).to(tl.float32)
    if SILU:
        z = d * a[:, None] + b[:, None]
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))
    if KEEP is not None:
        dz = tl.where(used, dz, 0.0)
    return dz


@triton.jit
def gradient_of_x(dz, d, a, level, slope, used):
    """a * dz - level - d * slope on a tile: with n = d * rstd and w the affine's slope, a = rstd * w,

    level = rstd * mean(w * dz) and slope = rstd ** 2 * mean(w * dz * n), over the kept of the group.
    """
    return tl.where(used, a[:, None] * dz - level[:, None] - d * slope[:, None], 0.0)


@triton.jit
def store_sums(n, c, live, C, sum_dz, sum_dz_n, WEIGHT, BIAS, DSCALE, DSHIFT, SUM_DZ, SUM_DZ_N):
    """The gradients of scale and shift; for those of weight and bias, which add up samples, the sums themselves."""
    at = n * C + c
    if DSCALE is not None:
        dscale = per_channel(WEIGHT, c, live, 1.0) * sum_dz_n + per_channel(BIAS, c, live, 0.0) * sum_dz
        tl.store(DSCALE + at, dscale.to(DSCALE.dtype.element_ty), mask=live)
    if DSHIFT is not None:
        tl.store(DSHIFT + at, sum_dz.to(DSHIFT.dtype.element_ty), mask=live)
    if SUM_DZ is not None:
        tl.store(SUM_DZ + at, sum_dz, mask=live)
        tl.store(SUM_DZ_N + at, sum_dz_n, mask=live)


@triton.jit
def over_groups(value, member):
    """[CB] -> [GB]: the sum over the channels of each group."""
    return tl.sum(tl.where(member, value[:, None], 0.0), 0)


@triton.jit
def spread(value, member):
    """[GB] -> [CB]: to each channel what its group has; 0 to channels of no group."""
    return tl.sum(tl.where(member, value[None, :], 0.0), 1)
