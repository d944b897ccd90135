"""Standard normal noise that is not stored: Philox4x32-10 (Salmon et al. 2011), then Box & Muller (1958).

The same integers as Triton's own, of which one draw makes four numbers. Triton's sine and cosine keep numbers on the
stack, to reduce angles that there are none of here.
"""

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four uint32 from a counter of four and a key of two."""
    for _ in tl.static_range(10):
        even, odd = c0, c2
        c0 = tl.umulhi(odd, 0xCD9E8D57) ^ c1 ^ k0
        c2 = tl.umulhi(even, 0xD2511F53) ^ c3 ^ k1
        c1 = odd * 0xCD9E8D57
        c3 = even * 0xD2511F53
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """In [0, 1): the distance of the word, taken as int32, from -1 or 0."""
    signed = word.to(tl.int32, bitcast=True)
    return tl.where(signed < 0, ~signed, signed).to(tl.float32) * 4.6566127342e-10  # 2^-31, a little less


@triton.jit
def pair(first, second):
    """Two normals from two words: sqrt(-2 ln u) times cosine and sine of 2 pi v.

    The quarter turn nearest to v is taken off exactly; within what is left, an eighth of a turn either way, the Taylor
    series below are as exact as float32 is.
    """
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(uniform(first), 1e-7)))
    turns = uniform(second)
    quarters = tl.floor(turns * 4.0 + 0.5)
    angle = (turns - quarters * 0.25) * 6.283185307179586
    t = angle * angle
    sine = angle * (1.0 - t / 6.0 * (1.0 - t / 20.0 * (1.0 - t / 42.0 * (1.0 - t / 72.0))))
    cosine = 1.0 - t / 2.0 * (1.0 - t / 12.0 * (1.0 - t / 30.0 * (1.0 - t / 56.0)))
    quarter = quarters.to(tl.int32)
    swapped = (quarter & 1) != 0
    x, y = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    x = tl.where(((quarter + 1) & 2) != 0, -x, x)
    y = tl.where((quarter & 2) != 0, -y, y)
    return x * radius, y * radius


@triton.jit
def normals(SEED, n, first, BLOCK: tl.constexpr):
    """[BLOCK]: the noise of sample n's elements from `first` on, a multiple of 4. SEED: int64 (key, offset).

    Element i is number i % 4 of the counter (i // 4, n, offset).
    """
    key, offset = tl.load(SEED), tl.load(SEED + 1)
    i = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = i * 0
    r0, r1, r2, r3 = philox(
        i, zero + n.to(tl.uint32), zero + offset.to(tl.uint32), zero + (offset >> 32).to(tl.uint32),
        key.to(tl.uint32), (key >> 32).to(tl.uint32),
    )  # fmt: skip
    n0, n1 = pair(r0, r1)
    n2, n3 = pair(r2, r3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK])
