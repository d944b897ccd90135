"""Block-sparse attention, forward: a program takes a tile of queries over the blocks of keys that its row keeps.

Softmax on the way (Milakov & Gimelshein 2018; Dao et al. 2022). Not run on a GPU yet: interpreted and compiled.
"""

import triton
import triton.language as tl

from .block_sparse_attention_tile import add, load, nothing, place, scores, store


@triton.jit
def forward_kernel(
    Q, K, V, OUT, LOG_SUM, START, AT,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    heads, shared, mask_batch, q_len, k_len, scale,
    EVEN: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """o and log_sum. EVEN: every block of keys is whole."""
    tiles = (q_len + TM - 1) // TM
    pid = tl.program_id(0)
    m0, bh = pid % tiles * TM, pid // tiles
    b, h = bh // heads, bh % heads
    Q = place(Q, b, h, q_batch, q_head, UNIT)
    K = place(K, b, h // shared, k_batch, k_head, UNIT)
    V = place(V, b, h // shared, v_batch, v_head, UNIT)
    row = b * mask_batch + h * ((q_len + BLOCK - 1) // BLOCK) + m0 // BLOCK
    low, high = tl.load(START + row), tl.load(START + row + 1)
    q1, q2 = load(Q, m0, q_row, q_len, D, UNIT, TM, D1, D2, UPCAST)
    o1, o2 = nothing(TM, D1, D2)
    most = tl.full([TM], float("-inf"), tl.float32)
    total = tl.full([TM], 0.0, tl.float32)
    n = tl.arange(0, TN)
    for j in range(low * (BLOCK // TN), high * (BLOCK // TN)):
        n0 = tl.load(AT + j // (BLOCK // TN)) * BLOCK + j % (BLOCK // TN) * TN
        k1, k2 = load(K, n0, k_row, k_len, D, UNIT, TN, D1, D2, UPCAST)
        s = scores(q1, q2, k1, k2, D2) * (scale * 1.4426950408889634)
        if not EVEN:
            s = tl.where((n0 + n < k_len)[None, :], s, float("-inf"))
        higher = tl.maximum(most, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        less = tl.exp2(most - higher)
        total = total * less + tl.sum(p, 1)
        most = higher
        o1 *= less[:, None]
        o2 *= less[:, None]
        v1, v2 = load(V, n0, v_row, k_len, DV, UNIT, TN, D1, D2, UPCAST)
        o1, o2 = add(o1, o2, p, v1, v2, D2)
    total = tl.where(total == 0.0, 1.0, total)  # a query without keys gets zeros
    OUT = place(OUT, b, h, o_batch, o_head, UNIT)
    store(OUT, o1 / total[:, None], o2 / total[:, None], m0, o_row, q_len, DV, UNIT, TM, D1, D2)
    m = m0 + tl.arange(0, TM)
    log_sum = (most + tl.log2(total)) * 0.6931471805599453
    tl.store(LOG_SUM + bh.to(tl.int64) * q_len + m, log_sum, mask=m < q_len)
