"""The backward of tiny maps but for the weights: a program takes a sample from dy to dx, and nothing waits for others.

Takes the place of the first four launches. Reads x and dy twice and writes dx (5 S bytes), less what L1 still holds.
What those launches leave for each other stays in registers here; only what the weights' gradients need is stored. The
price is that every sample reads the MLP's weights by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .conv_backward import map_gradients, norm_backward, taps_backward
from .input_gradient import column_gradients, read_gradient, stretch, through_maps, write_gradient
from .mlp_backward import pool_gradients, through_layer


@triton.jit(do_not_specialize=["c_units", "p_units", "D", "H", "W"])
def whole_backward_kernel(
    dy, x, dx, channel_gate, spatial_gate, pooled, pool_index, spatial_pool, spatial_index, hidden, dz, dgate,
    w1, w2, conv_weight, conv_bias, bn_weight, bn_bias, bn_mean, bn_var, dlogits, dhidden, dtaps, dnorm,
    c_units, p_units, HIDDEN, D, H, W,
    BN_EPS: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    POOLS: tl.constexpr, SPATIAL: tl.constexpr, SPLIT: tl.constexpr, RESIDUAL: tl.constexpr, GIVEN: tl.constexpr,
    FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr, CV: tl.constexpr, PV: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, MC: tl.constexpr, MH: tl.constexpr, HB: tl.constexpr, TB: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """GIVEN: dz (N, P) and dgate (N, C) are there; else dz is filled, and dgate None.

    A tile covers all positions, MC all channels and MH all hidden units. Layouts of dlogits, dhidden, dtaps and
    dnorm are those of the weights' launch.
    """
    BLEND: tl.constexpr = POOLS // 16
    ROWS: tl.constexpr = POOLS % 2 + (POOLS // 2) % 2 + (POOLS // 4) % 2 + (POOLS // 8) % 2
    RUNS: tl.constexpr = 1 if BLEND else ROWS
    KP: tl.constexpr = 4 if RUNS == 3 else RUNS
    C = c_units * CV
    P = p_units * PV
    SC = 1 if CHANNELS_LAST else P
    SP = C if CHANNELS_LAST else 1
    # Backwards through the samples: those that a launch before read last are still in L2.
    n = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    tiles = tl.cdiv(C, BC)
    rp = tl.arange(0, BP)
    pmask = rp < P
    row = tl.arange(0, BC)
    corner = n * C * P + rp.to(tl.int64)[None, :] * SP + row.to(tl.int64)[:, None] * SC  # [BC, BP]
    # Sums over positions of all channels, kept from one loop for the next: a row a tile.
    rt = tl.arange(0, MC // BC)
    kept = tl.zeros([MC // BC, BC], ACC)
    if SPATIAL:
        s = tl.load(spatial_gate + n * P + rp, mask=pmask, other=0.0)  # [BP]
        if not GIVEN:
            ds = tl.zeros([BC, BP], ACC)
            for t in range(tiles):
                rc = t * BC + row
                mask = (rc < C)[:, None] & pmask[None, :]
                at = corner + tl.cast(tl.multiple_of(t * BC, BC), tl.int64) * SC
                v = tl.load(x + at, mask=mask, other=0.0).to(ACC)  # [BC, BP]
                v *= tl.load(dy + at, mask=mask, other=0.0).to(ACC)  # [BC, BP]
                if POOLS:
                    g = tl.load(channel_gate + n * C + rc, mask=rc < C, other=0.0)  # [BC]
                    ds += v * g[:, None]
                    kept = tl.where(rt[:, None] == t, tl.sum(v * s[None, :], 1)[None, :], kept)
                else:
                    ds += v
            tl.store(dz + n * P + rp, tl.sum(ds, 0) * s * (1.0 - s), mask=pmask)  # [BP]
            tl.debug_barrier()
        dpeak, dmean, key = map_gradients(
            dz + n * P, n, rp, pmask, spatial_pool, spatial_index, conv_weight, bn_weight, bn_bias, bn_mean, bn_var,
            C, P, D, H, W, BN_EPS, KD, KH, KW, SPATIAL, SPLIT, BP, ACC,
        )  # fmt: skip
        dmean, dboth = column_gradients(dpeak, dmean, SPLIT)
    if POOLS:
        rh = tl.arange(0, MH)
        through = tl.zeros([BC, MH], ACC)
        for i in range(tiles):
            # Backwards: L1 still holds what the loop before read last.
            t = tiles - 1 - i
            rc = t * BC + row
            cmask = rc < C
            mask = cmask[:, None] & pmask[None, :]
            at = corner + tl.cast(tl.multiple_of(t * BC, BC), tl.int64) * SC
            g = tl.load(channel_gate + n * C + rc, mask=cmask, other=0.0)  # [BC]
            dl = tl.zeros([BC], ACC)
            if GIVEN:
                dl = tl.load(dgate + n * C + rc, mask=cmask, other=0.0)  # [BC]
            if SPATIAL:
                v = tl.load(x + at, mask=mask, other=0.0).to(ACC)  # [BC, BP]
                dl += through_maps(v, v * g[:, None], rc, key, dmean, dboth, SPLIT)
                if not GIVEN:
                    dl += tl.sum(tl.where(rt[:, None] == t, kept, 0.0), 0)
            elif not GIVEN:
                v = tl.load(x + at, mask=mask, other=0.0).to(ACC)  # [BC, BP]
                dl = tl.sum(v * tl.load(dy + at, mask=mask, other=0.0).to(ACC), 1)  # [BC, BP]
            # Zero beyond the channels: the sums below are over all lanes.
            dl = tl.where(cmask, dl * (g * (1.0 - g)), 0.0)
            tl.store(dlogits + n * C + rc, dl, mask=cmask)  # [BC]
            if w1 is not None:
                units = rc.to(tl.int64)[:, None] * HIDDEN + rh[None, :]
                wmask = cmask[:, None] & (rh < HIDDEN)[None, :]
                through += tl.load(w2 + units, mask=wmask, other=0.0).to(ACC) * dl[:, None]  # [BC, MH]
        if w1 is not None:
            tl.store(dhidden + n * HIDDEN + rh, tl.sum(through, 0), mask=rh < HIDDEN)  # [MH]
        tl.debug_barrier()
    if not POOLS:
        da, dm, dn, dlse = 0, 0, 0, 0
    if SPATIAL:
        s, dmean, dboth, key = s[None, :], dmean[None, :], dboth[None, :], key[None, :]
    else:
        s, dmean, dboth, key = 0, 0, 0, 0
    lane, spread, compact = stretch(P, FLAT, BC, BP)
    for t in range(tiles):
        rc = t * BC + row
        if POOLS:
            if w1 is None:
                du = through_layer(
                    w2, dlogits + n * C, None, 1, C, C, rc, rc < C, True, RUNS, KP, 1, HB, BC, ACC
                )
            else:
                du = through_layer(
                    w1, dhidden + n * HIDDEN, hidden + n * RUNS * HIDDEN, 1, HIDDEN, C, rc, rc < C,
                    True, RUNS, KP, 1, HB, BC, ACC,
                )  # fmt: skip
            da, dm, dn, dlse = pool_gradients(
                du, 0, n, rc, rc < C, pooled, pool_index, C, P, POOLS, SPLIT, KP
            )
            da, dm, dn, dlse = da[:, None], dm[:, None], dn[:, None], dlse[:, None]
        at, mask, upstream, v = read_gradient(
            dy, x, n, t, rp[None, :], pmask[None, :], lane, spread, C, P,
            POOLS, SPATIAL, SPLIT, FLAT, CHANNELS_LAST, BC, BP, ACC,
        )  # fmt: skip
        write_gradient(
            dx, at, mask, upstream, v, n, t, rp[None, :], compact, s, dmean, dboth, key, da, dm, dn, dlse,
            channel_gate, pooled, pool_index, C, P, POOLS, SPATIAL, SPLIT, RESIDUAL, FLAT, BC, BP,
        )  # fmt: skip
    if SPATIAL:
        # Last, when no sums for other loops take registers.
        TAPS: tl.constexpr = KD * KH * KW
        PLANES: tl.constexpr = 1 if SPATIAL == 3 else 2
        for first in range(0, TAPS, TB):
            taps_backward(
                n, first, 0, P, spatial_pool, dz, dtaps + n * PLANES * TAPS, P, D, H, W,
                KD, KH, KW, SPATIAL, TB, BP, ACC,
            )  # fmt: skip
        norm_backward(
            n, 0, P, spatial_pool, dz, conv_weight, conv_bias, bn_weight, bn_bias, bn_mean, bn_var, dnorm + n * 2,
            P, D, H, W, BN_EPS, KD, KH, KW, SPATIAL, BP, ACC,
        )  # fmt: skip
