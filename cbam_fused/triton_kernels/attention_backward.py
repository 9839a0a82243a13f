"""Second launch of the backward: the convolution's backward and what x adds to the channel gate's gradient.

Reads x (S bytes). A program owns a tile of positions and a range of channels: it gathers the gradient
of both maps there from dz, keeps it for the fourth launch where that does not do the same, and walks over the
channels with it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .conv_backward import map_gradients
from .device_functions import count_tiles, sum_parts, tile_positions
from .input_gradient import column_gradients, through_maps


@triton.jit(do_not_specialize=["c_units", "p_units", "parts", "splits", "split_tiles", "D", "H", "w_units"])
def attention_backward_kernel(
    x, channel_gate, spatial_gate, spatial_pool, spatial_index, ds_part, merged, dz, dmaps, dgate_a, dgate_part,
    conv_weight, bn_weight, bn_bias, bn_mean, bn_var, c_units, p_units, parts, splits, split_tiles, D, H, w_units,
    BN_EPS: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SPATIAL: tl.constexpr, SPLIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, CV: tl.constexpr, PV: tl.constexpr, WV: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, TW: tl.constexpr, MB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dmaps (N, 2, P) or None: what each maximum and each element of a column receives. dgate_part (N, tiles, C).

    ds_part (N, parts, P) or None: dz is computed from it, in every program for itself.
    dgate_a (N, C) or None: the first launch's sums, which make dgate_part the gradient of the gate's logits.
    """
    C = c_units * CV
    P = p_units * PV
    W = w_units * WV
    SC = 1 if CHANNELS_LAST else P
    SP = C if CHANNELS_LAST else 1
    tiles = count_tiles(P, W, BP, TW)
    # Backwards through the samples: those that the first launch read last are still in L2.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    split = pid % splits
    tile = (pid // splits) % tiles
    n = (pid // (splits * tiles)).to(tl.int64)
    rp, pmask = tile_positions(tile, P, W, BP, TW)
    my_dz = dz + n * P
    if ds_part is not None:
        rm = tl.arange(0, MB)
        ds = tl.sum(sum_parts(ds_part + n * parts * P, parts, 1, P, rm, 1, MB, ACC), 0)  # [MB]
        s = tl.load(spatial_gate + n * P + rm, mask=rm < P, other=0.0)  # [MB]
        ds *= s * (1.0 - s)
        tl.store(my_dz + rm, ds, mask=(rm < P) & (tile == 0) & (split == 0))  # [MB]
        my_dz = merged + pid.to(tl.int64) * P
        tl.store(my_dz + rm, ds, mask=rm < P)  # [MB]
        tl.debug_barrier()
    dpeak, dmean, key = map_gradients(
        my_dz, n, rp, pmask, spatial_pool, spatial_index, conv_weight, bn_weight, bn_bias, bn_mean, bn_var,
        C, P, D, H, W, BN_EPS, KD, KH, KW, SPATIAL, SPLIT, BP, ACC,
    )  # fmt: skip
    if dmaps is not None:
        write = pmask & (split == 0)
        tl.store(dmaps + n * 2 * P + rp, dpeak, mask=write)  # [BP]
        tl.store(dmaps + n * 2 * P + P + rp, dmean, mask=write)  # [BP]
    if dgate_part is not None:
        # What warps still convolve lies in L1, which x would push out.
        tl.debug_barrier()
        row = tl.arange(0, BC)
        dmean, dboth = column_gradients(dpeak, dmean, SPLIT)
        columns = x + n * C * P + rp.to(tl.int64)[None, :] * SP + row.to(tl.int64)[:, None] * SC  # [BC, BP]
        for t in range(split * split_tiles, tl.minimum((split + 1) * split_tiles, tl.cdiv(C, BC))):
            rc = t * BC + row
            cmask = rc < C
            mask = cmask[:, None] & pmask[None, :]
            at = tl.cast(tl.multiple_of(t * BC, BC), tl.int64) * SC
            v = tl.load(columns + at, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)  # [BC, BP]
            gated = v
            if SPLIT:
                gated *= tl.load(channel_gate + n * C + rc, mask=cmask, other=0.0)[:, None]  # [BC]
            dgate = through_maps(v, gated, rc, key, dmean, dboth, SPLIT)
            if dgate_a is not None:
                dgate += tl.load(dgate_a + n * C + rc, mask=cmask, other=0.0)  # [BC]
                g = tl.load(channel_gate + n * C + rc, mask=cmask, other=0.0)  # [BC]
                dgate *= g * (1.0 - g)
            tl.store(dgate_part + (n * tiles + tile) * C + rc, dgate, mask=cmask)  # [BC]
