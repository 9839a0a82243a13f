"""First launch of the forward: every channel pool of x in one read, a tile of channels a program.

Reads x (S bytes), writes pooled (N, SEGMENTS, K, C) and the tile's share of the MLP's first layer,
(N, tiles, RUNS, H). With one segment the pools are final; with more (small batches in channels-last,
where a tile of channels must stay a whole sector wide) the second launch merges them in order, and
computes the first layer itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import (
    NO_INDEX,
    divide,
    finite_or_zero,
    reduce_maximum,
    replace_nan,
    root,
    track_maximum,
)


@triton.jit
def _pool_tile(
    v, t, mask, total, squares, peak, index, level, exps,
    POOLS: tl.constexpr, SPLIT: tl.constexpr, WITH_INDEX: tl.constexpr,
):  # fmt: skip
    """Folds the t-th tile v [BC, BP], zero where masked, into the running pools."""
    total += v
    if (POOLS // 2) % 2:
        peak, index = track_maximum(v, t, mask, peak, index, SPLIT, WITH_INDEX)
    if (POOLS // 4) % 2:
        squares += v * v
    if (POOLS // 8) % 2:
        if mask is not None:
            v = tl.where(mask, v, float("-inf"))
        higher = tl.maximum(level, tl.max(tl.where(v == v, v, float("-inf")), 1))
        shift = finite_or_zero(higher)
        # Before the first finite element there is nothing to rescale, and exp(-shift) may overflow.
        kept = tl.where(level == float("-inf"), 0.0, exps * tl.exp(finite_or_zero(level) - shift))
        # A NaN hides from `level`, and must survive in the sum.
        kept = tl.where(exps == exps, kept, exps)
        exps = kept + tl.sum(tl.exp(v - shift[:, None]), 1)
        level = higher
    return total, squares, peak, index, level, exps


@triton.jit(do_not_specialize=["c_units", "p_units", "segment_tiles"])
def channel_pool_forward_kernel(
    x, pooled, pool_index, w1, hidden_part, c_units, p_units, segment_tiles, SEGMENTS, H,
    POOLS: tl.constexpr, SPLIT: tl.constexpr, SEGMENTED: tl.constexpr, WITH_INDEX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, CV: tl.constexpr, PV: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, HB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    AVG: tl.constexpr = POOLS % 2
    MAX: tl.constexpr = (POOLS // 2) % 2
    LP: tl.constexpr = (POOLS // 4) % 2
    LSE: tl.constexpr = (POOLS // 8) % 2
    BLEND: tl.constexpr = POOLS // 16
    ROWS: tl.constexpr = AVG + MAX + LP + LSE
    RUNS: tl.constexpr = 1 if BLEND else ROWS
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
    col = tl.arange(0, BP)
    tile = x + n * C * P + rc.to(tl.int64)[:, None] * SC + col.to(tl.int64)[None, :] * SP  # [BC, BP]

    first = seg * segment_tiles
    full = tl.minimum(first + segment_tiles, P // BP)
    last = tl.minimum(first + segment_tiles, tl.cdiv(P, BP))
    total = tl.zeros([BC, BP], ACC)
    squares = tl.zeros([BC, BP], ACC)
    peak = tl.full([BC, BP], float("-inf"), ACC)
    # A lane that sees nothing above -inf keeps the first tile, which is right where any lane is.
    index = tl.zeros([BC, BP], tl.int32)
    if not SPLIT:
        index += first
    level = tl.full([BC], float("-inf"), ACC)
    exps = tl.zeros([BC], ACC)
    for t in range(first, full):
        at = tl.cast(tl.multiple_of(t * BP, BP), tl.int64) * SP
        v = tl.load(tile + at, mask=cmask[:, None], other=0.0).to(ACC)  # [BC, BP]
        total, squares, peak, index, level, exps = _pool_tile(
            v, t, None, total, squares, peak, index, level, exps, POOLS, SPLIT, WITH_INDEX
        )
    for t in range(full, last):
        at = tl.cast(tl.multiple_of(t * BP, BP), tl.int64) * SP
        mask = cmask[:, None] & (t * BP + col < P)[None, :]
        v = tl.load(tile + at, mask=mask, other=0.0).to(ACC)  # [BC, BP]
        total, squares, peak, index, level, exps = _pool_tile(
            v, t, mask, total, squares, peak, index, level, exps, POOLS, SPLIT, WITH_INDEX
        )

    out = pooled + (n * SEGMENTS + seg) * ROWS * C + rc
    s = tl.sum(total, 1)
    mean = divide(s, P.to(ACC))
    if AVG:
        tl.store(out, s if SEGMENTED else mean, mask=cmask)  # [BC]
    if MAX:
        if not SPLIT:
            index = index * BP + col[None, :]
        best, found = reduce_maximum(peak, index, 1, SPLIT)
        if tl.max((s != s).to(tl.int32), 0) > 0:
            first_nan = tl.full([BC, BP], NO_INDEX, tl.int32)
            for t in range(first, last):
                at = tl.cast(tl.multiple_of(t * BP, BP), tl.int64) * SP
                rp = t * BP + col
                mask = cmask[:, None] & (rp < P)[None, :]
                v = tl.load(tile + at, mask=mask, other=0.0)  # [BC, BP]
                first_nan = tl.minimum(first_nan, tl.where(v != v, rp[None, :], NO_INDEX))
            best, found = replace_nan(best, found, tl.min(first_nan, 1), SPLIT)
        tl.store(out + AVG * C, best, mask=cmask)  # [BC]
        if WITH_INDEX:
            p_index = pool_index + (n * SEGMENTS + seg) * C + rc
            tl.store(p_index, found.to(pool_index.dtype.element_ty), mask=cmask)  # [BC]
    if LP:
        norm = tl.sum(squares, 1)
        norm = norm if SEGMENTED else root(norm)
        tl.store(out + (AVG + MAX) * C, norm, mask=cmask)  # [BC]
    if LSE:
        lse = tl.log(exps) + finite_or_zero(level)
        tl.store(out + (AVG + MAX + LP) * C, lse, mask=cmask)  # [BC]

    if hidden_part is not None:
        part = hidden_part + pid.to(tl.int64) * RUNS * H
        weights = w1 + rc
        for h in range(0, H, HB):
            rh = h + tl.arange(0, HB)
            hmask = rh < H
            cell = rh.to(tl.int64)[:, None] * C
            w = tl.load(weights[None, :] + cell, mask=hmask[:, None] & cmask[None, :], other=0.0).to(
                ACC
            )  # [HB, BC]
            if BLEND:
                tl.store(part + rh, _product(w, 0.5 * mean + 0.5 * best, cmask), mask=hmask)  # [HB]
            else:
                if AVG:
                    tl.store(part + rh, _product(w, mean, cmask), mask=hmask)  # [HB]
                if MAX:
                    tl.store(part + AVG * H + rh, _product(w, best, cmask), mask=hmask)  # [HB]
                if LP:
                    tl.store(part + (AVG + MAX) * H + rh, _product(w, norm, cmask), mask=hmask)  # [HB]
                if LSE:
                    tl.store(part + (AVG + MAX + LP) * H + rh, _product(w, lse, cmask), mask=hmask)  # [HB]


@triton.jit
def _product(w, u, cmask):
    return tl.sum(w * tl.where(cmask, u, 0.0)[None, :], 1)
