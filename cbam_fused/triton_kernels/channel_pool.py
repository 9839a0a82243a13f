"""First launch of the forward: every channel pool of x in one read, a share of the channels a program.

Reads x (S bytes), writes pooled (N, SEGMENTS, K, C) and what the share adds to the MLP's first layer,
(N, shares, RUNS, H). With one segment the pools are final; with more (small batches in channels-last,
where a tile of channels must stay a whole sector wide) the second launch merges them in order, and
computes the first layer itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device_functions import (
    NO_INDEX,
    add_long,
    divide,
    finite_or_zero,
    load_pooled,
    reduce_maximum,
    replace_nan,
    root,
    track_maximum,
)

# Tiles that a lane adds up, at most, before their sum joins those before it.
JOINED = tl.constexpr(32)


def is_long(tiles: int, acc: torch.dtype) -> bool:
    """Whether the tiles of a segment are added up in groups."""
    return tiles > JOINED.value and acc == torch.float32


@triton.jit
def _pool_tile(
    first_tile, t, step, cmask, mask, total, squares, peak, index, level, exps, exps_lost,
    POOLS: tl.constexpr, SPLIT: tl.constexpr, WITH_INDEX: tl.constexpr, LONG: tl.constexpr,
    BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Folds the t-th tile [BC, BP], t * BP * step elements behind the first, into the running pools.

    mask [BC, BP], or None where the map has all of its positions: zeros elsewhere, which no maximum counts.
    """
    at = tl.cast(tl.multiple_of(t * BP, BP), tl.int64) * step
    v = tl.load(first_tile + at, mask=cmask[:, None] if mask is None else mask, other=0.0).to(ACC)  # [BC, BP]
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
        empty = level == float("-inf")
        scale = tl.exp(finite_or_zero(level) - shift)
        kept = tl.where(empty, 0.0, exps * scale)
        # A NaN hides from `level`, and must survive in the sum.
        kept = tl.where(exps == exps, kept, exps)
        tile_exps = tl.sum(tl.exp(v - shift[:, None]), 1)
        if LONG:
            # exp(level) is infinite where an infinity follows numbers above 88.
            scaled = exps_lost * scale
            exps_lost = tl.where(empty | (scaled - scaled != 0.0), 0.0, scaled)
            exps, exps_lost = add_long(kept, exps_lost, tile_exps)
        else:
            exps = kept + tile_exps
        level = higher
    return total, squares, peak, index, level, exps, exps_lost


@triton.jit
def _pool_channels(
    x, pooled, pool_index, n, seg, channel_tile, C, P, segment_tiles, SEGMENTS,
    POOLS: tl.constexpr, SPLIT: tl.constexpr, SEGMENTED: tl.constexpr, WITH_INDEX: tl.constexpr,
    LONG: tl.constexpr, CHANNELS_LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Every pool of a tile of channels over a segment of positions, stored."""
    AVG: tl.constexpr = POOLS % 2
    MAX: tl.constexpr = (POOLS // 2) % 2
    LP: tl.constexpr = (POOLS // 4) % 2
    LSE: tl.constexpr = (POOLS // 8) % 2
    ROWS: tl.constexpr = AVG + MAX + LP + LSE
    SC = 1 if CHANNELS_LAST else P
    SP = C if CHANNELS_LAST else 1
    rc = channel_tile * BC + tl.arange(0, BC)
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
    exps_lost = tl.zeros([BC], ACC)
    s = tl.zeros([BC], ACC)
    lost = tl.zeros([BC], ACC)
    norm = tl.zeros([BC], ACC)
    norm_lost = tl.zeros([BC], ACC)
    if LONG:
        for group in range(first, full, JOINED):
            for t in range(group, tl.minimum(group + JOINED, full)):
                total, squares, peak, index, level, exps, exps_lost = _pool_tile(
                    tile, t, SP, cmask, None, total, squares, peak, index, level, exps, exps_lost,
                    POOLS, SPLIT, WITH_INDEX, LONG, BP, ACC,
                )  # fmt: skip
            s, lost = add_long(s, lost, tl.sum(total, 1))
            total = tl.zeros([BC, BP], ACC)
            if LP:
                norm, norm_lost = add_long(norm, norm_lost, tl.sum(squares, 1))
                squares = tl.zeros([BC, BP], ACC)
    else:
        for t in range(first, full):
            total, squares, peak, index, level, exps, exps_lost = _pool_tile(
                tile, t, SP, cmask, None, total, squares, peak, index, level, exps, exps_lost,
                POOLS, SPLIT, WITH_INDEX, LONG, BP, ACC,
            )  # fmt: skip
    for t in range(full, last):
        mask = cmask[:, None] & (t * BP + col < P)[None, :]
        total, squares, peak, index, level, exps, exps_lost = _pool_tile(
            tile, t, SP, cmask, mask, total, squares, peak, index, level, exps, exps_lost,
            POOLS, SPLIT, WITH_INDEX, LONG, BP, ACC,
        )  # fmt: skip

    out = pooled + (n * SEGMENTS + seg) * ROWS * C + rc
    s = tl.sum(total, 1) + lost + s if LONG else tl.sum(total, 1)
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
        norm = tl.sum(squares, 1) + norm_lost + norm if LONG else tl.sum(squares, 1)
        norm = norm if SEGMENTED else root(norm)
        tl.store(out + (AVG + MAX) * C, norm, mask=cmask)  # [BC]
    if LSE:
        lse = tl.log(exps) + finite_or_zero(level)
        tl.store(out + (AVG + MAX + LP) * C, lse, mask=cmask)  # [BC]


@triton.jit(do_not_specialize=["c_units", "p_units", "segment_tiles", "share_tiles"])
def channel_pool_forward_kernel(
    x, pooled, pool_index, w1, hidden_part, c_units, p_units, segment_tiles, SEGMENTS, share_tiles, H,
    POOLS: tl.constexpr, SPLIT: tl.constexpr, SEGMENTED: tl.constexpr, WITH_INDEX: tl.constexpr,
    LONG: tl.constexpr, CHANNELS_LAST: tl.constexpr, CV: tl.constexpr, PV: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, MC: tl.constexpr, HB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    BLEND: tl.constexpr = POOLS // 16
    ROWS: tl.constexpr = POOLS % 2 + (POOLS // 2) % 2 + (POOLS // 4) % 2 + (POOLS // 8) % 2
    RUNS: tl.constexpr = 1 if BLEND else ROWS
    KP: tl.constexpr = 4 if RUNS == 3 else RUNS
    # Written as products, so that the compiler sees by what they divide and loads whole vectors.
    C = c_units * CV
    P = p_units * PV
    channel_tiles = tl.cdiv(C, BC)
    shares = tl.cdiv(channel_tiles, share_tiles)
    pid = tl.program_id(0)
    share = pid % shares
    seg = (pid // shares) % SEGMENTS
    n = (pid // (shares * SEGMENTS)).to(tl.int64)
    first = share * share_tiles
    for tile in range(first, tl.minimum(first + share_tiles, channel_tiles)):
        _pool_channels(
            x, pooled, pool_index, n, seg, tile, C, P, segment_tiles, SEGMENTS,
            POOLS, SPLIT, SEGMENTED, WITH_INDEX, LONG, CHANNELS_LAST, BC, BP, ACC,
        )  # fmt: skip
    if hidden_part is not None:
        # The pools come back from memory, in the shape that the weights' tile wants.
        tl.debug_barrier()
        c1 = tl.minimum((first + share_tiles) * BC, C)
        rk = tl.arange(0, KP)
        for h in range(0, H, HB):
            rh = h + tl.arange(0, HB)
            hmask = rh < H
            pre = tl.zeros([KP, HB], ACC)
            for c in range(first * BC, c1, MC):
                rc = c + tl.arange(0, MC)
                cmask = rc < c1
                u = load_pooled(pooled + n * ROWS * C, C, rc, cmask, ROWS, KP, BLEND)  # [KP, MC]
                at = rh.to(tl.int64)[:, None] * C + rc[None, :]
                w = tl.load(w1 + at, mask=hmask[:, None] & cmask[None, :], other=0.0).to(ACC)  # [HB, MC]
                pre += tl.sum(w[None, :, :] * u[:, None, :], 2)
            at = hidden_part + pid.to(tl.int64) * RUNS * H + rk[:, None] * H + rh[None, :]
            tl.store(at, pre, mask=(rk < RUNS)[:, None] & hmask[None, :])  # [KP, HB]
