"""Fourth launch of the backward: dx, all of whose terms are known by now.

A program owns a tile of positions and a range of channels, of one sample or of a few: the weights are read
once for all of them. Where the third launch left the MLP's backward open, a program finishes it for its
channels, tile by tile. Reads dy and writes dx (2 S bytes); x only where an option needs it (ties shared
evenly, lp, lse). With few channels the gradients of the maps weigh beside x: a program then computes them from
dz, as the second launch has, which reads less than it would have been handed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .conv_backward import map_gradients
from .device_functions import count_tiles, tile_positions
from .input_gradient import column_gradients, read_gradient, stretch, write_gradient
from .mlp_backward import hidden_backward, pool_gradients, through_layer


@triton.jit
def _position_terms(n, rp, pmask, spatial_gate, spatial_pool, spatial_index, dmaps, P, SPLIT: tl.constexpr):
    """At positions rp, of any shape: s, what each element of a column gets, what its maximum gets, and how to
    tell the maximum: by its channel, or with SPLIT by its value."""
    s = tl.load(spatial_gate + n * P + rp, mask=pmask, other=0.0)  # [*rp]
    dpeak = tl.load(dmaps + n * 2 * P + rp, mask=pmask, other=0.0)  # [*rp]
    dmean = tl.load(dmaps + n * 2 * P + P + rp, mask=pmask, other=0.0)  # [*rp]
    dmean, dboth = column_gradients(dpeak, dmean, SPLIT)
    if SPLIT:
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
def _convolved_terms(
    n, rp, pmask, spatial_gate, spatial_pool, spatial_index, dz, conv_weight, bn_weight, bn_bias, bn_mean, bn_var,
    C, P, D, H, W, BN_EPS: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SPATIAL: tl.constexpr, SPLIT: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """As `_position_terms` at positions rp [BP], from dz."""
    dpeak, dmean, key = map_gradients(
        dz + n * P, n, rp, pmask, spatial_pool, spatial_index, conv_weight, bn_weight, bn_bias, bn_mean, bn_var,
        C, P, D, H, W, BN_EPS, KD, KH, KW, SPATIAL, SPLIT, BP, ACC,
    )  # fmt: skip
    s = tl.load(spatial_gate + n * P + rp, mask=pmask, other=0.0)  # [BP]
    dmean, dboth = column_gradients(dpeak, dmean, SPLIT)
    return s[None, :], dmean[None, :], dboth[None, :], key[None, :]


@triton.jit(
    do_not_specialize=["N", "c_units", "p_units", "blocks", "splits", "split_tiles", "D", "H", "w_units"]
)
def input_backward_kernel(
    dy, x, dx, channel_gate, spatial_gate, pooled, pool_index, spatial_pool, spatial_index, dmaps,
    dz, conv_weight, bn_weight, bn_bias, bn_mean, bn_var,
    hidden, w1, w2, dlogits, hidden_part, dhidden, my_dhidden, dpooled,
    N, c_units, p_units, HIDDEN, blocks, splits, split_tiles, D, H, w_units,
    BN_EPS: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    POOLS: tl.constexpr, SPATIAL: tl.constexpr, SPLIT: tl.constexpr, RESIDUAL: tl.constexpr,
    FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr, CV: tl.constexpr, PV: tl.constexpr, WV: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, TW: tl.constexpr, HB: tl.constexpr, GB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dpooled (N, ROWS, C) or None: the MLP's backward is done here; my_dhidden (programs, GB, RUNS, H) is then
    each program's own. dmaps (N, 2, P), or None: a program convolves dz for its positions, of one sample (GB is 1).

    FLAT: one tile of positions, contiguous; elements are taken as they lie in memory, whole channels at a time.
    """
    BLEND: tl.constexpr = POOLS // 16
    ROWS: tl.constexpr = POOLS % 2 + (POOLS // 2) % 2 + (POOLS // 4) % 2 + (POOLS // 8) % 2
    RUNS: tl.constexpr = 1 if BLEND else ROWS
    KP: tl.constexpr = 4 if RUNS == 3 else RUNS
    C = c_units * CV
    P = p_units * PV
    W = w_units * WV
    tiles = count_tiles(P, W, BP, TW)
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
    rq, inside = tile_positions(tile, P, W, BP, TW)
    rp, pmask = rq[None, :], inside[None, :]
    if SPATIAL:
        if dmaps is None:
            s, dmean, dboth, key = _convolved_terms(
                n0, rq, inside, spatial_gate, spatial_pool, spatial_index, dz, conv_weight, bn_weight, bn_bias, bn_mean,
                bn_var, C, P, D, H, W, BN_EPS, KD, KH, KW, SPATIAL, SPLIT, BP, ACC,
            )  # fmt: skip
            # What warps still convolve lies in L1, which dy would push out.
            tl.debug_barrier()
        elif GB == 1:
            s, dmean, dboth, key = _position_terms(
                n0, rp, pmask, spatial_gate, spatial_pool, spatial_index, dmaps, P, SPLIT
            )
    lane, spread, compact = stretch(P, FLAT, BC, BP)
    row = tl.arange(0, BC)
    for t in range(first, last):
        own = t * BC + row
        if POOLS:
            if dpooled is None:
                if w1 is None:
                    du = through_layer(
                        w2, dlogits + n0 * C, None, samples, C, C, own, own < C,
                        True, RUNS, KP, GB, HB, BC, ACC,
                    )  # fmt: skip
                else:
                    mine = my_dhidden + pid.to(tl.int64) * GB * RUNS * HIDDEN
                    du = through_layer(
                        w1, mine, None, samples, HIDDEN, C, own, own < C, False, RUNS, KP, GB, HB, BC, ACC
                    )
        rc = own[:, None]
        cmask = rc < C
        for g in range(samples):
            n = n0 + g
            at, mask, upstream, v = read_gradient(
                dy, x, n, t, rp, pmask, lane, spread, C, P, POOLS, SPATIAL, SPLIT, FLAT, CHANNELS_LAST, BC, BP, ACC
            )  # fmt: skip
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
            write_gradient(
                dx, at, mask, upstream, v, n, t, rp, compact, s, dmean, dboth, key, da, dm, dn, dlse,
                channel_gate, pooled, pool_index, C, P, POOLS, SPATIAL, SPLIT, RESIDUAL, FLAT, BC, BP,
            )  # fmt: skip
