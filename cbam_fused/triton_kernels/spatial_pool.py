"""Second launch of the forward: the channel gate and, with it, both spatial pools of the gated x.

A program owns a tile of positions of one sample and walks over the channels. It computes the gate
itself from the pools: the MLP is tiny beside the tile, and neither a launch of its own nor a counter
that programs wait on is then needed. Reads x (S bytes); the MLP's weights come from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import (
    finite_or_zero,
    hidden_layer,
    load_pooled,
    reduce_maximum,
    relu,
    root,
    sigmoid,
    track_maximum,
)


@triton.jit
def merge_segments(
    part, part_index, out, pooled, pool_index, n, C, P, SEGMENTS, write,
    POOLS: tl.constexpr, SPLIT: tl.constexpr, WITH_INDEX: tl.constexpr, MC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Partial pools [SEGMENTS, K, C] -> out [K, C], and to the saved tensors where `write`."""
    AVG: tl.constexpr = POOLS % 2
    MAX: tl.constexpr = (POOLS // 2) % 2
    LP: tl.constexpr = (POOLS // 4) % 2
    LSE: tl.constexpr = (POOLS // 8) % 2
    K: tl.constexpr = AVG + MAX + LP + LSE
    saved = pooled + n * K * C
    for c in range(0, C, MC):
        rc = c + tl.arange(0, MC)
        cmask = rc < C
        total = tl.zeros([MC], ACC)
        peak = tl.full([MC], float("-inf"), ACC)
        index = tl.zeros([MC], tl.int32)
        squares = tl.zeros([MC], ACC)
        level = tl.full([MC], float("-inf"), ACC)
        exps = tl.zeros([MC], ACC)
        for seg in range(SEGMENTS):
            base = part + (n * SEGMENTS + seg) * K * C + rc
            if AVG:
                total += tl.load(base, mask=cmask, other=0.0)  # [MC]
            if MAX:
                v = tl.load(base + AVG * C, mask=cmask, other=0.0)  # [MC]
                take = (v > peak) | ((v != v) & (peak == peak))
                if WITH_INDEX:
                    at = tl.load(part_index + (n * SEGMENTS + seg) * C + rc, mask=cmask, other=0).to(tl.int32)  # [MC]
                    if SPLIT:
                        index = tl.where(take, at, tl.where(v == peak, index + at, index))
                    else:
                        index = tl.where(take | (seg == 0), at, index)
                peak = tl.where(take, v, peak)
            if LP:
                squares += tl.load(base + (AVG + MAX) * C, mask=cmask, other=0.0)  # [MC]
            if LSE:
                v = tl.load(base + (AVG + MAX + LP) * C, mask=cmask, other=0.0)  # [MC]
                higher = tl.where(v > level, v, level)
                shift = finite_or_zero(higher)
                kept = tl.where(level == float("-inf"), 0.0, exps * tl.exp(finite_or_zero(level) - shift))
                kept = tl.where(exps == exps, kept, exps)
                exps = kept + tl.exp(v - shift)
                level = higher
        if AVG:
            mean = total / P.to(ACC)
            tl.store(out + rc, mean, mask=cmask)  # [MC]
            tl.store(saved + rc, mean, mask=cmask & write)  # [MC]
        if MAX:
            tl.store(out + AVG * C + rc, peak, mask=cmask)  # [MC]
            tl.store(saved + AVG * C + rc, peak, mask=cmask & write)  # [MC]
            if WITH_INDEX:
                at = pool_index + n * C + rc
                tl.store(at, index.to(pool_index.dtype.element_ty), mask=cmask & write)  # [MC]
        if LP:
            norm = root(squares)
            tl.store(out + (AVG + MAX) * C + rc, norm, mask=cmask)  # [MC]
            tl.store(saved + (AVG + MAX) * C + rc, norm, mask=cmask & write)  # [MC]
        if LSE:
            lse = tl.log(exps) + finite_or_zero(level)
            tl.store(out + (AVG + MAX + LP) * C + rc, lse, mask=cmask)  # [MC]
            tl.store(saved + (AVG + MAX + LP) * C + rc, lse, mask=cmask & write)  # [MC]


@triton.jit
def channel_gate_tile(
    hidden, w2, b2, C, H, rc, RUNS: tl.constexpr,
    HB: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sigmoid(W2 hidden + RUNS * b2) of channels rc -> [BC]."""
    cmask = rc < C
    logits = tl.zeros([BC], ACC)
    for h in range(0, H, HB):
        rh = h + tl.arange(0, HB)
        hmask = rh < H
        at = rc.to(tl.int64)[:, None] * H + rh[None, :]
        w = tl.load(w2 + at, mask=cmask[:, None] & hmask[None, :], other=0.0).to(ACC)  # [BC, HB]
        logits += tl.sum(w * tl.load(hidden + rh, mask=hmask, other=0.0)[None, :], 1)  # [HB]
    if b2 is not None:
        logits += RUNS * tl.load(b2 + rc, mask=cmask, other=0.0).to(ACC)  # [BC]
    return sigmoid(logits)


@triton.jit(do_not_specialize=["c_units", "p_units"])
def spatial_pool_forward_kernel(
    x, part, part_index, merged, pooled, pool_index, hidden, w1, b1, w2, b2,
    channel_gate, spatial_pool, spatial_index, c_units, p_units, H, SEGMENTS,
    POOLS: tl.constexpr, SPATIAL: tl.constexpr, SPLIT: tl.constexpr,
    SEGMENTED: tl.constexpr, WITH_INDEX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, CV: tl.constexpr, PV: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, MC: tl.constexpr, HB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    BLEND: tl.constexpr = POOLS // 16
    ROWS: tl.constexpr = POOLS % 2 + (POOLS // 2) % 2 + (POOLS // 4) % 2 + (POOLS // 8) % 2
    RUNS: tl.constexpr = 1 if BLEND else ROWS
    KP: tl.constexpr = 4 if RUNS == 3 else RUNS
    C = c_units * CV
    P = p_units * PV
    SC = 1 if CHANNELS_LAST else P
    SP = C if CHANNELS_LAST else 1
    # Without spatial maps there are no positions to split over.
    tiles = tl.cdiv(P, BP) if SPATIAL else 1
    pid = tl.program_id(0)
    tile = pid % tiles
    n = (pid // tiles).to(tl.int64)

    if POOLS:
        u_base = part + n * ROWS * C
        if SEGMENTED:
            u_base = merged + pid.to(tl.int64) * ROWS * C
            merge_segments(
                part, part_index, u_base, pooled, pool_index, n, C, P, SEGMENTS, tile == 0,
                POOLS, SPLIT, WITH_INDEX, MC, ACC,
            )  # fmt: skip
            tl.debug_barrier()
        # Every program writes its own copy: a shared one would be written many times over.
        my_hidden = hidden + pid.to(tl.int64) * H
        for h in range(0, H, HB):
            rh = h + tl.arange(0, HB)
            if w1 is None:
                units = tl.sum(load_pooled(u_base, C, rh, rh < H, ROWS, KP, BLEND), 0)  # [HB]
            else:
                pre = hidden_layer(u_base, w1, b1, C, H, rh, ROWS, KP, BLEND, MC, HB, ACC)  # [KP, HB]
                used = (tl.arange(0, KP) < RUNS)[:, None]
                units = tl.sum(tl.where(used, relu(pre), 0.0), 0)
            tl.store(my_hidden + rh, units, mask=rh < H)  # [HB]
        tl.debug_barrier()

    rp = tile * BP + tl.arange(0, BP)
    pmask = rp < P
    columns = x + n * C * P + rp.to(tl.int64)[None, :] * SP  # [1, BP]
    total = tl.zeros([BC, BP], ACC)
    peak = tl.full([BC, BP], float("-inf"), ACC)
    index = tl.zeros([BC, BP], tl.int32)
    if not SPLIT:
        index += tl.arange(0, BC)[:, None]
    for t in range(tl.cdiv(C, BC)):
        rc = t * BC + tl.arange(0, BC)
        cmask = rc < C
        if SPATIAL:
            mask = cmask[:, None] & pmask[None, :]
            v = tl.load(columns + rc.to(tl.int64)[:, None] * SC, mask=mask, other=0.0).to(ACC)  # [BC, BP]
        if POOLS:
            gate = channel_gate_tile(my_hidden, w2, b2, C, H, rc, RUNS, HB, BC, ACC)
            tl.store(channel_gate + n * C + rc, gate, mask=cmask & (tile == 0))  # [BC]
            if SPATIAL:
                v = v * gate[:, None]
        if SPATIAL:
            total += tl.where(mask, v, 0.0)
            peak, index = track_maximum(
                tl.where(mask, v, float("-inf")), rc[:, None], mask, peak, index, SPLIT
            )
    if SPATIAL:
        best, found = reduce_maximum(peak, index, 0, SPLIT)
        tl.store(spatial_pool + n * 2 * P + rp, best, mask=pmask)  # [BP]
        tl.store(spatial_pool + n * 2 * P + P + rp, tl.sum(total, 0) / C.to(ACC), mask=pmask)  # [BP]
        if WITH_INDEX:
            at = spatial_index + n * P + rp
            tl.store(at, found.to(spatial_index.dtype.element_ty), mask=pmask)  # [BP]
