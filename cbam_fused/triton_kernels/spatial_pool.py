"""Second launch of the forward: the channel gate and, with it, both spatial pools of the gated x.

A program owns a tile of positions and a range of channels of one sample: all of them, or for small
maps a share, which the third launch merges. It finishes the gate of its channels itself from the
first layer's partial sums: the MLP is tiny beside the tile, and neither a launch of its own nor a
counter that programs wait on is then needed. Where it has to merge the pools of many segments first, it
takes a few tiles of positions with the gate that it then has. Reads x (S bytes); the weights come from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import (
    NO_INDEX,
    add_long,
    divide,
    finite_or_zero,
    load_pooled,
    merge_maximum,
    reduce_maximum,
    relu,
    replace_nan,
    root,
    sigmoid,
    sum_parts,
    track_maximum,
)


@triton.jit
def merge_segments(
    part, part_index, pooled, pool_index, n, rc, C, P, SEGMENTS, write,
    POOLS: tl.constexpr, SPLIT: tl.constexpr, WITH_INDEX: tl.constexpr,
    KP: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Partial pools [SEGMENTS, K, C] at channels rc [B] -> what the MLP reads, [KP, B]; zero beyond C.

    Where `write`, the pools go to the saved tensors too.
    """
    AVG: tl.constexpr = POOLS % 2
    MAX: tl.constexpr = (POOLS // 2) % 2
    LP: tl.constexpr = (POOLS // 4) % 2
    LSE: tl.constexpr = (POOLS // 8) % 2
    BLEND: tl.constexpr = POOLS // 16
    ROWS: tl.constexpr = AVG + MAX + LP + LSE
    saved = pooled + n * ROWS * C + rc
    cmask = rc < C
    total = tl.zeros([B], ACC)
    lost = tl.zeros([B], ACC)
    peak = tl.full([B], float("-inf"), ACC)
    index = tl.zeros([B], tl.int32)
    squares = tl.zeros([B], ACC)
    squares_lost = tl.zeros([B], ACC)
    level = tl.full([B], float("-inf"), ACC)
    exps = tl.zeros([B], ACC)
    for seg in range(SEGMENTS):
        base = part + (n * SEGMENTS + seg) * ROWS * C + rc
        if AVG:
            v = tl.load(base, mask=cmask, other=0.0)  # [B]
            total, lost = add_long(total, lost, v)
        if MAX:
            v = tl.load(base + AVG * C, mask=cmask, other=0.0)  # [B]
            at = index
            if WITH_INDEX:
                p_index = part_index + (n * SEGMENTS + seg) * C + rc
                at = tl.load(p_index, mask=cmask & write, other=0).to(tl.int32)  # [B]
            peak, index = merge_maximum(v, at, seg == 0, peak, index, SPLIT)
        if LP:
            v = tl.load(base + (AVG + MAX) * C, mask=cmask, other=0.0)  # [B]
            squares, squares_lost = add_long(squares, squares_lost, v)
        if LSE:
            v = tl.load(base + (AVG + MAX + LP) * C, mask=cmask, other=0.0)  # [B]
            higher = tl.where(v > level, v, level)
            shift = finite_or_zero(higher)
            kept = tl.where(level == float("-inf"), 0.0, exps * tl.exp(finite_or_zero(level) - shift))
            kept = tl.where(exps == exps, kept, exps)
            exps = kept + tl.exp(v - shift)
            level = higher
    rk = tl.arange(0, KP)[:, None]
    u = tl.zeros([KP, B], ACC)
    if AVG:
        mean = divide(total, P.to(ACC))
        tl.store(saved, mean, mask=cmask & write)  # [B]
        u = tl.where(rk == 0, mean[None, :], u)
    if MAX:
        tl.store(saved + AVG * C, peak, mask=cmask & write)  # [B]
        if WITH_INDEX:
            at = pool_index + n * C + rc
            tl.store(at, index.to(pool_index.dtype.element_ty), mask=cmask & write)  # [B]
        if BLEND:
            u = 0.5 * u + 0.5 * peak[None, :]
        else:
            u = tl.where(rk == AVG, peak[None, :], u)
    if LP:
        norm = root(squares)
        tl.store(saved + (AVG + MAX) * C, norm, mask=cmask & write)  # [B]
        u = tl.where(rk == AVG + MAX, norm[None, :], u)
    if LSE:
        lse = tl.log(exps) + finite_or_zero(level)
        tl.store(saved + (AVG + MAX + LP) * C, lse, mask=cmask & write)  # [B]
        u = tl.where(rk == AVG + MAX + LP, lse[None, :], u)
    return tl.where(cmask[None, :], u, 0.0)


@triton.jit
def _channel_gate(
    n, part, part_index, pooled, pool_index, hidden_part, my_units, my_gates, w1, b1, w2, b2, channel_gate,
    hidden, c0, c1, C, H, P, SEGMENTS, shares, write,
    POOLS: tl.constexpr, SPLIT: tl.constexpr, WITH_INDEX: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, KP: tl.constexpr, BLEND: tl.constexpr,
    SEGMENTED: tl.constexpr, MC: tl.constexpr, HB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gate of channels c0..c1 to my_gates [c1 - c0], and to the saved tensor where `write`.

    my_gates None: no other program has these channels, and the saved tensor serves. hidden [RUNS, H] or None:
    every program has the layer before the ReLU, and that of the first channels saves it.
    """
    for h in range(0, H, HB):
        rh = h + tl.arange(0, HB)
        hmask = rh < H
        if w1 is None:
            if SEGMENTED:
                u = merge_segments(
                    part, part_index, pooled, pool_index, n, rh, C, P, SEGMENTS, write,
                    POOLS, SPLIT, WITH_INDEX, KP, HB, ACC,
                )  # fmt: skip
            else:
                u = load_pooled(part + n * ROWS * C, C, rh, hmask, ROWS, KP, BLEND)  # [KP, HB]
            units = tl.sum(u, 0)
        else:
            if SEGMENTED:
                # Merged anew for each block of units: a copy of the pools a program would be traffic.
                pre = tl.zeros([KP, HB], ACC)
                for c in range(0, C, MC):
                    rc = c + tl.arange(0, MC)
                    u = merge_segments(
                        part, part_index, pooled, pool_index, n, rc, C, P, SEGMENTS, write & (h == 0),
                        POOLS, SPLIT, WITH_INDEX, KP, MC, ACC,
                    )  # fmt: skip
                    at = rh.to(tl.int64)[:, None] * C + rc[None, :]
                    mask = hmask[:, None] & (rc < C)[None, :]
                    w = tl.load(w1 + at, mask=mask, other=0.0).to(ACC)  # [HB, MC]
                    pre += tl.sum(w[None, :, :] * u[:, None, :], 2)
            else:
                pre = sum_parts(hidden_part + n * shares * RUNS * H, shares, RUNS, H, rh, KP, HB, ACC)
            if b1 is not None:
                pre += tl.load(b1 + rh, mask=hmask, other=0.0).to(ACC)[None, :]  # [HB]
            rk = tl.arange(0, KP)[:, None]
            used = rk < RUNS
            if hidden is not None:
                if write & (c0 == 0):
                    saved = hidden + (n * RUNS + rk) * H + rh[None, :]
                    tl.store(saved, pre, mask=used & hmask[None, :])  # [KP, HB]
            units = tl.sum(tl.where(used, relu(pre), 0.0), 0)
        tl.store(my_units + rh, units, mask=hmask)  # [HB]
    tl.debug_barrier()
    for c in range(c0, c1, MC):
        rc = c + tl.arange(0, MC)
        cmask = rc < c1
        logits = tl.zeros([MC], ACC)
        for h in range(0, H, HB):
            rh = h + tl.arange(0, HB)
            hmask = rh < H
            at = rc.to(tl.int64)[:, None] * H + rh[None, :]
            w = tl.load(w2 + at, mask=cmask[:, None] & hmask[None, :], other=0.0).to(ACC)  # [MC, HB]
            logits += tl.sum(w * tl.load(my_units + rh, mask=hmask, other=0.0)[None, :], 1)  # [HB]
        if b2 is not None:
            logits += RUNS * tl.load(b2 + rc, mask=cmask, other=0.0).to(ACC)  # [MC]
        gate = sigmoid(logits)
        if my_gates is not None:
            tl.store(my_gates + rc - c0, gate, mask=cmask)  # [MC]
        tl.store(channel_gate + n * C + rc, gate, mask=cmask & write)  # [MC]
    tl.debug_barrier()


@triton.jit
def _pool_positions(
    x, my_gates, maps, maps_index, n, tile, split, splits, split_tiles, c1, C, P,
    POOLS: tl.constexpr, SPLIT: tl.constexpr, WITH_INDEX: tl.constexpr, EVEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Both pools of the gated x at a tile of positions, over a share of the channels, stored."""
    SC = 1 if CHANNELS_LAST else P
    SP = C if CHANNELS_LAST else 1
    rp = tile * BP + tl.arange(0, BP)
    pmask = rp < P
    row = tl.arange(0, BC)
    rows = x + n * C * P + rp.to(tl.int64)[None, :] * SP + row.to(tl.int64)[:, None] * SC  # [BC, BP]
    total = tl.zeros([BC, BP], ACC)
    peak = tl.full([BC, BP], float("-inf"), ACC)
    index = tl.zeros([BC, BP], tl.int32)
    first = split * split_tiles
    if not SPLIT:
        index += first
    for t in range(first, tl.cdiv(c1, BC)):
        at = tl.cast(tl.multiple_of(t * BC, BC), tl.int64) * SC
        if EVEN:
            mask = None
            v = tl.load(rows + at, mask=pmask[None, :], other=0.0).to(ACC)  # [BC, BP]
            if POOLS:
                v *= tl.load(my_gates + (t - first) * BC + row)[:, None]  # [BC]
        else:
            cmask = t * BC + row < C
            mask = cmask[:, None]
            v = tl.load(rows + at, mask=mask & pmask[None, :], other=0.0).to(ACC)  # [BC, BP]
            if POOLS:
                v *= tl.load(my_gates + (t - first) * BC + row, mask=cmask, other=0.0)[:, None]  # [BC]
        total += v
        peak, index = track_maximum(v, t, mask, peak, index, SPLIT, WITH_INDEX)
    s = tl.sum(total, 0)
    if not SPLIT:
        index = index * BC + row[:, None]
    best, found = reduce_maximum(peak, index, 0, SPLIT)
    if tl.max((s != s).to(tl.int32), 0) > 0:
        first_nan = tl.full([BC, BP], NO_INDEX, tl.int32)
        for t in range(first, tl.cdiv(c1, BC)):
            at = tl.cast(tl.multiple_of(t * BC, BC), tl.int64) * SC
            cmask = t * BC + row < C
            v = tl.load(rows + at, mask=cmask[:, None] & pmask[None, :], other=0.0).to(ACC)  # [BC, BP]
            if POOLS:
                v *= tl.load(my_gates + (t - first) * BC + row, mask=cmask, other=0.0)[:, None]  # [BC]
            first_nan = tl.minimum(first_nan, tl.where(v != v, (t * BC + row)[:, None], NO_INDEX))
        best, found = replace_nan(best, found, tl.min(first_nan, 0), SPLIT)
    out = maps + (n * splits + split) * 2 * P + rp
    tl.store(out, best, mask=pmask)  # [BP]
    tl.store(out + P, divide(s, C.to(ACC)), mask=pmask)  # [BP]
    if WITH_INDEX:
        p_index = maps_index + (n * splits + split) * P + rp
        tl.store(p_index, found.to(maps_index.dtype.element_ty), mask=pmask)  # [BP]


@triton.jit(do_not_specialize=["c_units", "p_units", "splits", "split_tiles", "group_tiles", "shares"])
def spatial_pool_forward_kernel(
    x, part, part_index, pooled, pool_index, hidden_part, units, gates, w1, b1, w2, b2,
    channel_gate, hidden, maps, maps_index, c_units, p_units, H, SEGMENTS, shares, splits, split_tiles, group_tiles,
    POOLS: tl.constexpr, SPATIAL: tl.constexpr, SPLIT: tl.constexpr,
    SEGMENTED: tl.constexpr, WITH_INDEX: tl.constexpr, EVEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, CV: tl.constexpr, PV: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, MC: tl.constexpr, HB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """maps (N, splits, 2, P), maps_index (N, splits, P). gates None: one program has all positions. EVEN: BC divides C.

    With pools in segments a program takes group_tiles tiles, else one.
    """
    BLEND: tl.constexpr = POOLS // 16
    ROWS: tl.constexpr = POOLS % 2 + (POOLS // 2) % 2 + (POOLS // 4) % 2 + (POOLS // 8) % 2
    RUNS: tl.constexpr = 1 if BLEND else ROWS
    KP: tl.constexpr = 4 if RUNS == 3 else RUNS
    C = c_units * CV
    P = p_units * PV
    # Without spatial maps there are no positions to split over.
    groups = tl.cdiv(tl.cdiv(P, BP), group_tiles) if SPATIAL else 1
    # Backwards through the samples: those that the first launch read last are still in L2.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    split = pid % splits
    group = (pid // splits) % groups
    n = (pid // (splits * groups)).to(tl.int64)
    c0 = split * split_tiles * BC
    c1 = tl.minimum(c0 + split_tiles * BC, C)

    my_gates = gates
    if POOLS:
        # Where several programs have these channels, each writes its own copy: a shared one would be
        # written many times over.
        if gates is None:
            my_gates = channel_gate + n * C + c0
        else:
            my_gates = gates + pid.to(tl.int64) * split_tiles * BC
        _channel_gate(
            n, part, part_index, pooled, pool_index, hidden_part, units + pid.to(tl.int64) * H,
            None if gates is None else my_gates, w1, b1, w2, b2, channel_gate,
            hidden, c0, c1, C, H, P, SEGMENTS, shares, group == 0,
            POOLS, SPLIT, WITH_INDEX, ROWS, RUNS, KP, BLEND, SEGMENTED, MC, HB, ACC,
        )  # fmt: skip

    if SPATIAL:
        if SEGMENTED:
            for tile in range(group * group_tiles, tl.minimum((group + 1) * group_tiles, tl.cdiv(P, BP))):
                _pool_positions(
                    x, my_gates, maps, maps_index, n, tile, split, splits, split_tiles, c1, C, P,
                    POOLS, SPLIT, WITH_INDEX, EVEN, CHANNELS_LAST, BC, BP, ACC,
                )  # fmt: skip
        else:
            _pool_positions(
                x, my_gates, maps, maps_index, n, group, split, splits, split_tiles, c1, C, P,
                POOLS, SPLIT, WITH_INDEX, EVEN, CHANNELS_LAST, BC, BP, ACC,
            )  # fmt: skip
