"""Block-sparse attention, backward: dq over the rows of blocks, dk and dv over the columns, without atomics.

With s = scale q k' and p = exp(s - log_sum): dv = p' do, ds = p (do v' - delta), delta = rowsum(o do),
dq = scale ds k, dk = scale ds' q (Dao et al. 2022, algorithm 4). Not run on a GPU yet: interpreted and compiled.
"""

import triton
import triton.language as tl

from .block_sparse_attention_tile import add, load, nothing, place, scores, store


@triton.jit
def delta_kernel(
    OUT, DO, DELTA, o_batch, o_head, o_row, do_batch, do_head, do_row, heads, q_len,
    UNIT: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, TM: tl.constexpr,
):  # fmt: skip
    """float32 [B, H, Sq]: rowsum(o do)."""
    tiles = (q_len + TM - 1) // TM
    pid = tl.program_id(0)
    m0, bh = pid % tiles * TM, pid // tiles
    b, h = bh // heads, bh % heads
    o1, o2 = load(place(OUT, b, h, o_batch, o_head, UNIT), m0, o_row, q_len, DV, UNIT, TM, D1, D2, True)
    g1, g2 = load(place(DO, b, h, do_batch, do_head, UNIT), m0, do_row, q_len, DV, UNIT, TM, D1, D2, True)
    delta = tl.sum(o1 * g1, 1)
    if D2 > 0:
        delta += tl.sum(o2 * g2, 1)
    m = m0 + tl.arange(0, TM)
    tl.store(DELTA + bh.to(tl.int64) * q_len + m, delta, mask=m < q_len)


@triton.jit
def dq_kernel(
    Q, K, V, DO, LOG_SUM, DELTA, DQ, START, AT,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    dq_batch, dq_head, dq_row, heads, shared, mask_batch, q_len, k_len, scale,
    EVEN: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program takes a tile of queries. EVEN: every block of keys is whole."""
    tiles = (q_len + TM - 1) // TM
    pid = tl.program_id(0)
    m0, bh = pid % tiles * TM, pid // tiles
    b, h = bh // heads, bh % heads
    K = place(K, b, h // shared, k_batch, k_head, UNIT)
    V = place(V, b, h // shared, v_batch, v_head, UNIT)
    row = b * mask_batch + h * ((q_len + BLOCK - 1) // BLOCK) + m0 // BLOCK
    low, high = tl.load(START + row), tl.load(START + row + 1)
    q1, q2 = load(place(Q, b, h, q_batch, q_head, UNIT), m0, q_row, q_len, D, UNIT, TM, D1, D2, UPCAST)
    g1, g2 = load(place(DO, b, h, do_batch, do_head, UNIT), m0, do_row, q_len, DV, UNIT, TM, D1, D2, UPCAST)
    m = m0 + tl.arange(0, TM)
    numbers = bh.to(tl.int64) * q_len + m
    log_sum = tl.load(LOG_SUM + numbers, mask=m < q_len, other=0.0) * 1.4426950408889634
    delta = tl.load(DELTA + numbers, mask=m < q_len, other=0.0)
    dq1, dq2 = nothing(TM, D1, D2)
    n = tl.arange(0, TN)
    for j in range(low * (BLOCK // TN), high * (BLOCK // TN)):
        n0 = tl.load(AT + j // (BLOCK // TN)) * BLOCK + j % (BLOCK // TN) * TN
        k1, k2 = load(K, n0, k_row, k_len, D, UNIT, TN, D1, D2, UPCAST)
        v1, v2 = load(V, n0, v_row, k_len, DV, UNIT, TN, D1, D2, UPCAST)
        p = tl.exp2(scores(q1, q2, k1, k2, D2) * (scale * 1.4426950408889634) - log_sum[:, None])
        if not EVEN:
            p = tl.where((n0 + n < k_len)[None, :], p, 0.0)
        ds = p * (scores(g1, g2, v1, v2, D2) - delta[:, None])
        dq1, dq2 = add(dq1, dq2, ds, k1, k2, D2)
    DQ = place(DQ, b, h, dq_batch, dq_head, UNIT)
    store(DQ, dq1 * scale, dq2 * scale, m0, dq_row, q_len, D, UNIT, TM, D1, D2)


@triton.jit
def dkdv_kernel(
    Q, K, V, DO, LOG_SUM, DELTA, DK, DV_, START, AT,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, heads, shared, mask_batch, q_len, k_len, scale,
    UNIT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program takes a tile of keys, over all heads of queries that share them. heads: of keys."""
    tiles = (k_len + TN - 1) // TN
    pid = tl.program_id(0)
    n0, bh = pid % tiles * TN, pid // tiles
    b, h = bh // heads, bh % heads
    k1, k2 = load(place(K, b, h, k_batch, k_head, UNIT), n0, k_row, k_len, D, UNIT, TN, D1, D2, UPCAST)
    v1, v2 = load(place(V, b, h, v_batch, v_head, UNIT), n0, v_row, k_len, DV, UNIT, TN, D1, D2, UPCAST)
    dk1, dk2 = nothing(TN, D1, D2)
    dv1, dv2 = nothing(TN, D1, D2)
    for i in range(shared):
        g = h * shared + i
        column = b * mask_batch + g * ((k_len + BLOCK - 1) // BLOCK) + n0 // BLOCK
        low, high = tl.load(START + column), tl.load(START + column + 1)
        Q_ = place(Q, b, g, q_batch, q_head, UNIT)
        DO_ = place(DO, b, g, do_batch, do_head, UNIT)
        numbers = (b * heads * shared + g).to(tl.int64) * q_len
        for j in range(low * (BLOCK // TM), high * (BLOCK // TM)):
            m0 = tl.load(AT + j // (BLOCK // TM)) * BLOCK + j % (BLOCK // TM) * TM
            q1, q2 = load(Q_, m0, q_row, q_len, D, UNIT, TM, D1, D2, UPCAST)
            g1, g2 = load(DO_, m0, do_row, q_len, DV, UNIT, TM, D1, D2, UPCAST)
            m = m0 + tl.arange(0, TM)
            log_sum = tl.load(LOG_SUM + numbers + m, mask=m < q_len, other=0.0) * 1.4426950408889634
            delta = tl.load(DELTA + numbers + m, mask=m < q_len, other=0.0)
            p = tl.exp2(scores(k1, k2, q1, q2, D2) * (scale * 1.4426950408889634) - log_sum[None, :])
            dv1, dv2 = add(dv1, dv2, p, g1, g2, D2)
            ds = p * (scores(v1, v2, g1, g2, D2) - delta[None, :])
            dk1, dk2 = add(dk1, dk2, ds, q1, q2, D2)
    DK = place(DK, b, h, dk_batch, dk_head, UNIT)
    DV_ = place(DV_, b, h, dv_batch, dv_head, UNIT)
    store(DK, dk1 * scale, dk2 * scale, n0, dk_row, k_len, D, UNIT, TN, D1, D2)
    store(DV_, dv1, dv2, n0, dv_row, k_len, DV, UNIT, TN, D1, D2)
