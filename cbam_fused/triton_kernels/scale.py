"""Third launch of the forward: the spatial gate from its maps, then x times both gates.

A program owns a tile of positions and a range of channels. Reads x and writes y (2 S bytes); the
maps are read from L1, one load a tap.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import convolve_maps, folded_norm, load_scalar, sigmoid


@triton.jit(do_not_specialize=["c_units", "p_units", "split_tiles", "D", "H", "W"])
def scale_forward_kernel(
    x, y, channel_gate, maps, logits, spatial_gate,
    conv_weight, conv_bias, bn_weight, bn_bias, bn_mean, bn_var,
    c_units, p_units, splits, split_tiles, D, H, W,
    BN_EPS: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SPATIAL: tl.constexpr, FROM_LOGITS: tl.constexpr, RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, CV: tl.constexpr, PV: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y None: only the logits are written. FROM_LOGITS: they are read instead of computed."""
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
        if FROM_LOGITS:
            z = tl.load(logits + n * P + rp, mask=pmask, other=0.0)  # [BP]
        else:
            q = maps + n * 2 * P
            z = convolve_maps(q, conv_weight, rp, pmask, P, D, H, W, KD, KH, KW, SPATIAL == 2, SPATIAL == 3, ACC, BP)
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
        at = n * C * P + rp.to(tl.int64)[None, :] * SP
        for t in range(split * split_tiles, tl.minimum((split + 1) * split_tiles, tl.cdiv(C, BC))):
            rc = t * BC + tl.arange(0, BC)
            cmask = rc < C
            mask = cmask[:, None] & pmask[None, :]
            offsets = at + rc.to(tl.int64)[:, None] * SC
            v = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)  # [BC, BP]
            out = v
            if channel_gate is not None:
                out = out * tl.load(channel_gate + n * C + rc, mask=cmask, other=0.0)[:, None]  # [BC]
            if SPATIAL:
                out = out * s[None, :]
            if RESIDUAL:
                out += v
            tl.store(y + offsets, out.to(y.dtype.element_ty), mask=mask, eviction_policy="evict_first")  # [BC, BP]
