"""First launch of the forward: every channel pool of x in one read, a tile of channels a program.

Reads x (S bytes), writes (N, SEGMENTS, K, C). With one segment the rows are final; with more (small
batches in channels-last, where a tile of channels must stay a whole sector wide) they are partial,
and the second launch merges them in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import finite_or_zero, reduce_maximum, root, track_maximum


@triton.jit(do_not_specialize=["c_units", "p_units", "segment_tiles"])
def channel_pool_forward_kernel(
    x, pooled, pool_index, c_units, p_units, segment_tiles, SEGMENTS,
    POOLS: tl.constexpr, SPLIT: tl.constexpr, SEGMENTED: tl.constexpr, WITH_INDEX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, CV: tl.constexpr, PV: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    AVG: tl.constexpr = POOLS % 2
    MAX: tl.constexpr = (POOLS // 2) % 2
    LP: tl.constexpr = (POOLS // 4) % 2
    LSE: tl.constexpr = (POOLS // 8) % 2
    # Written as products, so that the compiler sees by what they divide and loads whole vectors.
    C = c_units * CV
    P = p_units * PV
    SC = 1 if CHANNELS_LAST else P
    SP = C if CHANNELS_LAST else 1
    channel_tiles = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    seg = (pid // channel_tiles) % SEGMENTS
    n = (pid // (channel_tiles * SEGMENTS)).to(tl.int64)
    rc = (pid % channel_tiles) * BC + tl.arange(0, BC)
    cmask = rc < C
    rows = x + n * C * P + rc.to(tl.int64)[:, None] * SC  # [BC, 1]

    total = tl.zeros([BC, BP], ACC)
    squares = tl.zeros([BC, BP], ACC)
    peak = tl.full([BC, BP], float("-inf"), ACC)
    index = tl.zeros([BC, BP], tl.int32)
    first = seg * segment_tiles
    if not SPLIT:
        # A lane that only sees -inf keeps its first position, which is valid where any lane is.
        index += (first * BP + tl.arange(0, BP))[None, :]
    level = tl.full([BC], float("-inf"), ACC)
    exps = tl.zeros([BC], ACC)
    for tile in range(first, tl.minimum(first + segment_tiles, tl.cdiv(P, BP))):
        rp = tile * BP + tl.arange(0, BP)
        mask = cmask[:, None] & (rp < P)[None, :]
        v = tl.load(rows + rp.to(tl.int64)[None, :] * SP, mask=mask, other=float("-inf")).to(ACC)  # [BC, BP]
        if AVG:
            total += tl.where(mask, v, 0.0)
        if MAX:
            peak, index = track_maximum(v, rp[None, :], mask, peak, index, SPLIT)
        if LP:
            squares += tl.where(mask, v * v, 0.0)
        if LSE:
            higher = tl.maximum(level, tl.max(tl.where(v == v, v, float("-inf")), 1))
            shift = finite_or_zero(higher)
            # Before the first finite element there is nothing to rescale, and exp(-shift) may overflow.
            kept = tl.where(level == float("-inf"), 0.0, exps * tl.exp(finite_or_zero(level) - shift))
            # A NaN hides from `level`, and must survive in the sum.
            kept = tl.where(exps == exps, kept, exps)
            exps = kept + tl.sum(tl.exp(v - shift[:, None]), 1)
            level = higher

    K: tl.constexpr = AVG + MAX + LP + LSE
    out = pooled + (n * SEGMENTS + seg) * K * C + rc
    if AVG:
        s = tl.sum(total, 1)
        tl.store(out, s if SEGMENTED else s / P.to(ACC), mask=cmask)  # [BC]
    if MAX:
        best, found = reduce_maximum(peak, index, 1, SPLIT)
        tl.store(out + AVG * C, best, mask=cmask)  # [BC]
        if WITH_INDEX:
            at = pool_index + (n * SEGMENTS + seg) * C + rc
            tl.store(at, found.to(pool_index.dtype.element_ty), mask=cmask)  # [BC]
    if LP:
        s = tl.sum(squares, 1)
        tl.store(out + (AVG + MAX) * C, s if SEGMENTED else root(s), mask=cmask)  # [BC]
    if LSE:
        tl.store(out + (AVG + MAX + LP) * C, tl.log(exps) + finite_or_zero(level), mask=cmask)  # [BC]
