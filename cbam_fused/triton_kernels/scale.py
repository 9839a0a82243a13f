"""Third launch of the forward: the spatial gate from its maps, then x times both gates.

A program owns a tile of positions and a range of channels. Reads x and writes y (2 S bytes); the
maps are read from L1, one load a tap. Where the second launch shared the channels of a small map
among programs, it first merges their maps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import (
    channels_and_positions,
    convolve_maps,
    folded_norm,
    load_scalar,
    merge_maximum,
    sigmoid,
)


@triton.jit
def merge_maps(
    part, part_index, out, maps, maps_index, n, P, PARTS, write,
    SPLIT: tl.constexpr, WITH_INDEX: tl.constexpr, MB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Maps of PARTS shares of the channels [PARTS, 2, P] -> out [2, P], and to the saved ones where `write`."""
    rp = tl.arange(0, MB)
    mask = rp < P
    peak = tl.full([MB], float("-inf"), ACC)
    index = tl.zeros([MB], tl.int32)
    mean = tl.zeros([MB], ACC)
    for i in range(PARTS):
        base = part + (n * PARTS + i) * 2 * P + rp
        v = tl.load(base, mask=mask, other=0.0)  # [MB]
        mean += tl.load(base + P, mask=mask, other=0.0)  # [MB]
        at = index
        if WITH_INDEX:
            at = tl.load(part_index + (n * PARTS + i) * P + rp, mask=mask & write, other=0).to(
                tl.int32
            )  # [MB]
        peak, index = merge_maximum(v, at, i == 0, peak, index, SPLIT)
    tl.store(out + rp, peak, mask=mask)  # [MB]
    tl.store(out + P + rp, mean, mask=mask)  # [MB]
    saved = maps + n * 2 * P + rp
    tl.store(saved, peak, mask=mask & write)  # [MB]
    tl.store(saved + P, mean, mask=mask & write)  # [MB]
    if WITH_INDEX:
        at = maps_index + n * P + rp
        tl.store(at, index.to(maps_index.dtype.element_ty), mask=mask & write)  # [MB]


@triton.jit(do_not_specialize=["c_units", "p_units", "parts", "splits", "split_tiles", "D", "H", "W"])
def scale_forward_kernel(
    x, y, channel_gate, maps, maps_index, part, part_index, merged, logits, spatial_gate,
    conv_weight, conv_bias, bn_weight, bn_bias, bn_mean, bn_var,
    c_units, p_units, parts, splits, split_tiles, D, H, W,
    BN_EPS: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SPATIAL: tl.constexpr, SPLIT: tl.constexpr, RESIDUAL: tl.constexpr,
    FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr, CV: tl.constexpr, PV: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, MB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y None: only the logits are written; maps None: they are read. part (N, parts, 2, P) or None: merged first.

    FLAT: one tile of positions, contiguous; elements are taken as they lie in memory, over the ends of rows.
    """
    C = c_units * CV
    P = p_units * PV
    SC = 1 if CHANNELS_LAST else P
    SP = C if CHANNELS_LAST else 1
    tiles = tl.cdiv(P, BP)
    pid = tl.program_id(0)
    split = pid % splits
    tile = (pid // splits) % tiles
    n = (pid // (splits * tiles)).to(tl.int64)
    rp = tile * BP + tl.arange(0, BP)
    pmask = rp < P
    if SPATIAL:
        if maps is None:
            z = tl.load(logits + n * P + rp, mask=pmask, other=0.0)  # [BP]
        else:
            q = maps + n * 2 * P
            if part is not None:
                q = merged + pid.to(tl.int64) * 2 * P
                merge_maps(
                    part, part_index, q, maps, maps_index, n, P, parts, (tile == 0) & (split == 0),
                    SPLIT, maps_index is not None, MB, ACC,
                )  # fmt: skip
                tl.debug_barrier()
            z = convolve_maps(
                q, conv_weight, rp, pmask, P, D, H, W, KD, KH, KW, SPATIAL == 2, SPATIAL == 3, ACC, BP
            )
            z += load_scalar(conv_bias, 0.0, ACC)
            if bn_mean is not None:
                scale, shift, _, _ = folded_norm(bn_weight, bn_bias, bn_mean, bn_var, BN_EPS, ACC)
                z = z * scale + shift
            if y is None:
                tl.store(logits + n * P + rp, z, mask=pmask)  # [BP]
        s = sigmoid(z)
        if spatial_gate is not None:
            tl.store(spatial_gate + n * P + rp, s, mask=pmask & (split == 0))  # [BP]
    if y is not None:
        first = split * split_tiles
        if FLAT:
            # s is complete here. Whole vectors and sectors, where rows of the map would end within them.
            begin = n * C * P + tl.cast(first * BC, tl.int64) * P
            elements = (tl.minimum((first + split_tiles) * BC, C) - first * BC) * P
            lane = tl.arange(0, BC * BP)
            for t in range(tl.cdiv(elements, BC * BP)):
                i = tl.multiple_of(t * BC * BP, BC * BP)
                in_channel, in_map = channels_and_positions(i, lane, P)
                mask = i + lane < elements
                at = begin + i + lane  # [BC * BP]
                v = tl.load(x + at, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)  # [BC * BP]
                out = v
                if channel_gate is not None:
                    g = channel_gate + n * C + first * BC + in_channel
                    out = out * tl.load(g, mask=mask, other=0.0)  # [BC * BP]
                if SPATIAL:
                    out = out * tl.gather(s, in_map, 0)
                if RESIDUAL:
                    out += v
                tl.store(
                    y + at, out.to(y.dtype.element_ty), mask=mask, eviction_policy="evict_first"
                )  # [BC * BP]
        else:
            row = tl.arange(0, BC)
            corner = n * C * P + rp.to(tl.int64)[None, :] * SP + row.to(tl.int64)[:, None] * SC  # [BC, BP]
            for t in range(first, tl.minimum(first + split_tiles, tl.cdiv(C, BC))):
                cmask = t * BC + row < C
                mask = cmask[:, None] & pmask[None, :]
                at = corner + tl.cast(tl.multiple_of(t * BC, BC), tl.int64) * SC
                v = tl.load(x + at, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)  # [BC, BP]
                out = v
                if channel_gate is not None:
                    g = channel_gate + n * C + t * BC + row
                    out = out * tl.load(g, mask=cmask, other=0.0)[:, None]  # [BC]
                if SPATIAL:
                    out = out * s[None, :]
                if RESIDUAL:
                    out += v
                tl.store(
                    y + at, out.to(y.dtype.element_ty), mask=mask, eviction_policy="evict_first"
                )  # [BC, BP]
