"""What the kernels of the timestep loss share: a program's part of a sample, its noise, its target, its error."""

import triton
import triton.language as tl

from .timestep_loss_noise import normals


@triton.jit
def share(chunks, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Which sample a program works on, and its first element there."""
    pid = tl.program_id(0)
    return (pid // chunks).to(tl.int64), pid % chunks * (STEPS * BLOCK)


@triton.jit
def looked_up(TABLE, at, size):
    """TABLE[at]; NaN where there is nothing, for nobody else looks at timesteps on the device."""
    return tl.load(TABLE + at, mask=(at >= 0) & (at < size), other=float("nan")).to(tl.float32)


@triton.jit
def scales(TABLE, ROW, n, columns):
    """alpha and sigma of sample n. TABLE: [2, columns]."""
    row = tl.load(ROW + n)
    return looked_up(TABLE, row, columns), looked_up(TABLE + columns, row, columns)


@triton.jit
def weight_of(WEIGHT, CELL, n, weights, mask):
    """That of sample n; with CELL, WEIGHT is a table of so many."""
    at = n if CELL is None else tl.load(CELL + n, mask=mask, other=0)
    return looked_up(WEIGHT, at, weights)


@triton.jit
def noise_of(NOISE, SEED, n, first, at, there, BLOCK: tl.constexpr):
    """[BLOCK]: read, or drawn where there is a seed."""
    if SEED is not None:
        noise = normals(SEED, n, first, BLOCK)
    else:
        noise = tl.load(NOISE + at, mask=there, other=0.0).to(tl.float32)
    return noise


@triton.jit
def target_of(
    TARGET, X0, NOISE, SEED, TABLE, ROW, columns, n, first, at, there, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """[BLOCK]: what is to be predicted. KIND, where it is made of x0 and noise: 0 noise, 1 v, 2 x0, 3 flow."""
    if TARGET is not None:
        target = tl.load(TARGET + at, mask=there, other=0.0).to(tl.float32)
    elif KIND == 2:
        target = tl.load(X0 + at, mask=there, other=0.0).to(tl.float32)
    else:
        target = noise_of(NOISE, SEED, n, first, at, there, BLOCK)
        if KIND == 1:
            alpha, sigma = scales(TABLE, ROW, n, columns)
            target = alpha * target - sigma * tl.load(X0 + at, mask=there, other=0.0).to(tl.float32)
        elif KIND == 3:
            target -= tl.load(X0 + at, mask=there, other=0.0).to(tl.float32)
    return target


@triton.jit
def error_and_slope(d, HUBER, huber_row, n):
    """[BLOCK]: d^2 and 2 d, or with Huber's c 2 d^2 / (1 + root) and 2 d / root, root = sqrt(1 + (d / c)^2)."""
    error, slope = d * d, 2.0 * d
    if HUBER is not None:
        ratio = d / tl.load(HUBER + n * huber_row).to(tl.float32)
        root = tl.minimum(tl.sqrt(1.0 + ratio * ratio), 1.0 + tl.abs(ratio))  # the latter where the square is too large
        error = 2.0 * error / (1.0 + root)
        slope /= root
    return error, slope
