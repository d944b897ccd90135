"""What the kernels of block-sparse attention share: tiles of tokens, products of them, and where a program works.

A head_dim is padded to one power of two, or to a larger and a smaller one: D1, and D2 or 0. A tile of tokens is then
two, [ROWS, D1] and [ROWS, D2]; where D2 is 0 the second is the first, and never looked at.
"""

import triton
import triton.language as tl


@triton.jit
def place(P, b, h, batch, head, UNIT: tl.constexpr):
    """Where sample b's head h begins."""
    return P + (b.to(tl.int64) * batch + h.to(tl.int64) * head) * UNIT


@triton.jit
def half(first, row, length, D, UNIT: tl.constexpr, ROWS: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets from a head's begin, and what of it is there: tokens from `first` on, channels from FROM on."""
    r, d = tl.arange(0, ROWS), FROM + tl.arange(0, WIDTH)
    at = first.to(tl.int64) * row * UNIT + (r[:, None] * row * UNIT + d[None, :])
    return at, (first + r < length)[:, None] & (d < D)[None, :]


@triton.jit
def load_half(
    P, first, row, length, D: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, FROM: tl.constexpr,
    WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    at, there = half(first, row, length, D, UNIT, ROWS, FROM, WIDTH)
    x = tl.load(P + at, mask=there, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def load(
    P, first, row, length, D: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Both halves of a tile, 0 where there is nothing. UPCAST: for the interpreter, which cannot multiply bfloat16."""
    x1 = load_half(P, first, row, length, D, UNIT, ROWS, 0, D1, UPCAST)
    x2 = x1
    if D2 > 0:
        x2 = load_half(P, first, row, length, D, UNIT, ROWS, D1, D2, UPCAST)
    return x1, x2


@triton.jit
def store(
    P, x1, x2, first, row, length, D: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr,
):  # fmt: skip
    at, there = half(first, row, length, D, UNIT, ROWS, 0, D1)
    tl.store(P + at, x1.to(P.dtype.element_ty), mask=there)
    if D2 > 0:
        at, there = half(first, row, length, D, UNIT, ROWS, D1, D2)
        tl.store(P + at, x2.to(P.dtype.element_ty), mask=there)


@triton.jit
def nothing(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Sums to add to."""
    x1 = tl.full([ROWS, D1], 0.0, tl.float32)
    x2 = x1
    if D2 > 0:
        x2 = tl.full([ROWS, D2], 0.0, tl.float32)
    return x1, x2


@triton.jit
def scores(a1, a2, b1, b2, D2: tl.constexpr):
    """a b', over all channels."""
    s = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if D2 > 0:
        s = tl.dot(a2, tl.trans(b2), s, input_precision="ieee")
    return s


@triton.jit
def add(sum1, sum2, p, x1, x2, D2: tl.constexpr):
    """sum + p x, for every channel."""
    p = p.to(x1.dtype)
    sum1 = tl.dot(p, x1, sum1, input_precision="ieee")
    if D2 > 0:
        sum2 = tl.dot(p, x2, sum2, input_precision="ieee")
    return sum1, sum2
