"""Fourth launch of the backward: dx, all of whose terms are known by now.

A program owns a tile of positions and a range of channels, of one sample or of a few: the weights are read
once for all of them. Where the third launch left the MLP's backward open, a program finishes it for its
channels, tile by tile. Reads dy and writes dx (2 S bytes); x only where an option needs it (ties shared
evenly, lp, lse).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import channels_and_positions
from .mlp_backward import hidden_backward, pool_gradients, through_layer


@triton.jit
def _position_terms(n, rp, pmask, spatial_gate, spatial_pool, spatial_index, dmaps, P, SPLIT: tl.constexpr):
    """At positions rp, of any shape: s, what each element of a column gets, what its maximum gets, and how to
    tell the maximum: by its channel, or with SPLIT by its value."""
    s = tl.load(spatial_gate + n * P + rp, mask=pmask, other=0.0)  # [*rp]
    dpeak = tl.load(dmaps + n * 2 * P + rp, mask=pmask, other=0.0)  # [*rp]
    dmean = tl.load(dmaps + n * 2 * P + P + rp, mask=pmask, other=0.0)  # [*rp]
    dboth = dmean + dpeak
    if SPLIT:
        # amax multiplies its gradient by a mask, which sends a NaN or an infinity to all elements.
        dmean += dpeak * 0.0
        key = tl.load(spatial_pool + n * 2 * P + rp, mask=pmask, other=0.0)  # [*rp]
    else:
        key = tl.load(spatial_index + n * P + rp, mask=pmask, other=0).to(tl.int32)  # [*rp]
    return s, dmean, dboth, key


@triton.jit
def _load_pool_gradients(dpooled, n, rc, cmask, C, POOLS: tl.constexpr):
    """As `pool_gradients`, from what the third launch has stored, [N, ROWS, C]."""
    AVG: tl.constexpr = POOLS % 2
    MAX: tl.constexpr = (POOLS // 2) % 2
    LP: tl.constexpr = (POOLS // 4) % 2
    LSE: tl.constexpr = (POOLS // 8) % 2
    base = dpooled + n * (AVG + MAX + LP + LSE) * C + rc
    da = tl.load(base, mask=cmask, other=0.0)  # [*rc]
    dm, dn, dlse = da, da, da
    if MAX:
        dm = tl.load(base + AVG * C, mask=cmask, other=0.0)  # [*rc]
    if LP:
        dn = tl.load(base + (AVG + MAX) * C, mask=cmask, other=0.0)  # [*rc]
    if LSE:
        dlse = tl.load(base + (AVG + MAX + LP) * C, mask=cmask, other=0.0)  # [*rc]
    return da, dm, dn, dlse


@triton.jit
def _load_tile(p, at, mask, spread, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr):
    """Elements `at` as a tile [BC, BP]; spread: where in a stretch of memory each of the tile's elements is."""
    v = tl.load(p + at, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)  # [BC, BP] or [BC * BP]
    if spread is None:
        return v
    else:
        return tl.reshape(tl.gather(v, spread, 0), [BC, BP])


@triton.jit
def _input_gradient(
    upstream, v, cmask, n, rc, rp, s, dmean, dboth, key, da, dm, dn, dlse, channel_gate, pooled, pool_index, C,
    POOLS: tl.constexpr, SPATIAL: tl.constexpr, SPLIT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """dx [BC, BP] of channels rc [BC, 1] and positions rp [1, BP], from dy and, where it is read, x."""
    AVG: tl.constexpr = POOLS % 2
    MAX: tl.constexpr = (POOLS // 2) % 2
    LP: tl.constexpr = (POOLS // 4) % 2
    LSE: tl.constexpr = (POOLS // 8) % 2
    ROWS: tl.constexpr = AVG + MAX + LP + LSE
    out = upstream
    if POOLS:
        g = tl.load(channel_gate + n * C + rc, mask=cmask, other=0.0)  # [BC, 1]
    if SPATIAL:
        if SPLIT:
            if POOLS:
                is_peak = v * g == key
            else:
                is_peak = v == key
        else:
            is_peak = rc == key
        out = out * s + tl.where(is_peak, dboth, dmean)
    if POOLS:
        out = out * g
        each = da if AVG else tl.zeros_like(g)
        if MAX:
            both = each + dm
            if SPLIT:
                each += dm * 0.0
                m = tl.load(pooled + (n * ROWS + AVG) * C + rc, mask=cmask, other=0.0)  # [BC, 1]
                is_pooled = v == m
            else:
                where = tl.load(pool_index + n * C + rc, mask=cmask, other=0).to(tl.int32)  # [BC, 1]
                is_pooled = rp == where
            out += tl.where(is_pooled, both, each)
        else:
            out += each
        if LP:
            out += v * dn
        if LSE:
            lse = tl.load(pooled + (n * ROWS + AVG + MAX + LP) * C + rc, mask=cmask, other=0.0)  # [BC, 1]
            out += tl.exp(v - lse) * dlse
    if RESIDUAL:
        out += upstream
    return out


@triton.jit(do_not_specialize=["N", "c_units", "p_units", "blocks", "splits", "split_tiles"])
def input_backward_kernel(
    dy, x, dx, channel_gate, spatial_gate, pooled, pool_index, spatial_pool, spatial_index, dmaps,
    hidden, w1, w2, dlogits, hidden_part, dhidden, my_dhidden, dpooled,
    N, c_units, p_units, HIDDEN, blocks, splits, split_tiles,
    POOLS: tl.constexpr, SPATIAL: tl.constexpr, SPLIT: tl.constexpr, RESIDUAL: tl.constexpr,
    FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr, CV: tl.constexpr, PV: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, HB: tl.constexpr, GB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dpooled (N, ROWS, C) or None: the MLP's backward is done here; my_dhidden (programs, GB, RUNS, H) is then
    each program's own.

    FLAT: one tile of positions, contiguous; elements are taken as they lie in memory, whole channels at a time.
    """
    BLEND: tl.constexpr = POOLS // 16
    ROWS: tl.constexpr = POOLS % 2 + (POOLS // 2) % 2 + (POOLS // 4) % 2 + (POOLS // 8) % 2
    RUNS: tl.constexpr = 1 if BLEND else ROWS
    KP: tl.constexpr = 4 if RUNS == 3 else RUNS
    # Non-zero where x itself is read: by the pools lp and lse, and by maxima that are shared evenly.
    READS_X: tl.constexpr = POOLS // 4 % 4 + SPLIT * (POOLS // 2 % 2 + SPATIAL)
    C = c_units * CV
    P = p_units * PV
    SC = 1 if CHANNELS_LAST else P
    SP = C if CHANNELS_LAST else 1
    tiles = tl.cdiv(P, BP)
    # Backwards through the samples: the first launch read dy forwards, the second left its end in L2.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    split = pid % splits
    tile = (pid // splits) % tiles
    n0 = (pid // (splits * tiles)).to(tl.int64) * GB
    samples = tl.minimum(N - n0, GB).to(tl.int32)
    first = split * split_tiles
    last = tl.minimum(first + split_tiles, tl.cdiv(C, BC))
    if POOLS:
        if dpooled is None:
            if w1 is not None:
                write = (tile == 0) & (split == 0)
                for g in range(samples):
                    hidden_backward(
                        n0 + g, hidden_part, hidden, my_dhidden + (pid.to(tl.int64) * GB + g) * RUNS * HIDDEN,
                        dhidden, HIDDEN, blocks, write, RUNS, KP, HB, ACC,
                    )  # fmt: skip
                tl.debug_barrier()

    if not SPATIAL:
        s, dmean, dboth, key = 0, 0, 0, 0
    if not POOLS:
        da, dm, dn, dlse = 0, 0, 0, 0
    rp = (tile * BP + tl.arange(0, BP))[None, :]
    pmask = rp < P
    if SPATIAL:
        if GB == 1:
            s, dmean, dboth, key = _position_terms(
                n0, rp, pmask, spatial_gate, spatial_pool, spatial_index, dmaps, P, SPLIT
            )
    spread = None
    if FLAT:
        # Loads and stores are then of whole vectors and sectors, where rows of the map would end within them.
        # The terms are those of a tile, so elements change places in between.
        lane = tl.arange(0, BC * BP)
        in_tile, in_map = channels_and_positions(0, lane, P)
        compact = tl.minimum(in_tile * BP + in_map, BC * BP - 1)
        spread = tl.minimum(lane // BP * P + lane % BP, BC * BP - 1)
    row = tl.arange(0, BC)
    for t in range(first, last):
        own = t * BC + row
        if POOLS:
            if dpooled is None:
                if w1 is None:
                    du = through_layer(
                        w2, dlogits + n0 * C, samples, C, C, own, own < C, True, RUNS, KP, GB, HB, BC, ACC
                    )
                else:
                    mine = my_dhidden + pid.to(tl.int64) * GB * RUNS * HIDDEN
                    du = through_layer(
                        w1, mine, samples, HIDDEN, C, own, own < C, False, RUNS, KP, GB, HB, BC, ACC
                    )
        rc = own[:, None]
        cmask = rc < C
        for g in range(samples):
            n = n0 + g
            if FLAT:
                # By elements, not by channels: whole vectors are then seen to be inside or outside.
                at = tl.multiple_of(t * BC * P, BC) + lane  # [BC * BP]
                mask = (lane < BC * P) & (at < C * P)
            else:
                at = rp.to(tl.int64) * SP + row[:, None].to(tl.int64) * SC  # [BC, BP]
                at += tl.cast(tl.multiple_of(t * BC, BC), tl.int64) * SC
                mask = cmask & pmask
            upstream = _load_tile(dy + n * C * P, at, mask, spread, BC, BP, ACC)  # [BC, BP]
            v = upstream
            if READS_X:
                v = _load_tile(x + n * C * P, at, mask, spread, BC, BP, ACC)  # [BC, BP]
            if SPATIAL:
                if GB > 1:
                    s, dmean, dboth, key = _position_terms(
                        n, rp, pmask, spatial_gate, spatial_pool, spatial_index, dmaps, P, SPLIT
                    )
            if POOLS:
                if dpooled is None:
                    da, dm, dn, dlse = pool_gradients(
                        du, g * KP, n, own, own < C, pooled, pool_index, C, P, POOLS, SPLIT, GB * KP
                    )
                    da, dm, dn, dlse = da[:, None], dm[:, None], dn[:, None], dlse[:, None]
                else:
                    da, dm, dn, dlse = _load_pool_gradients(dpooled, n, rc, cmask, C, POOLS)
            out = _input_gradient(
                upstream, v, cmask, n, rc, rp, s, dmean, dboth, key, da, dm, dn, dlse,
                channel_gate, pooled, pool_index, C, POOLS, SPATIAL, SPLIT, RESIDUAL,
            )  # fmt: skip
            if FLAT:
                out = tl.gather(tl.reshape(out, [BC * BP]), compact, 0)
            tl.store(
                dx + n * C * P + at, out.to(dx.dtype.element_ty), mask=mask, eviction_policy="evict_first"
            )  # [BC, BP] or [BC * BP]
