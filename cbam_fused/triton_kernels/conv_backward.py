"""Device functions of the convolution's backward: to its maps, to its taps, and to the norm behind it."""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import (
    convolve_maps,
    convolve_transposed,
    divide,
    folded_norm,
    load_maps,
    load_scalar,
)


@triton.jit
def map_gradients(
    dz, n, rp, pmask, spatial_pool, spatial_index, conv_weight, bn_weight, bn_bias, bn_mean, bn_var, C, P, D, H, W,
    BN_EPS: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SPATIAL: tl.constexpr, SPLIT: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """From dz [P] of sample n, at positions rp [BP]: what the maximum of a column receives, what each of its elements
    does, and how to tell the maximum: by its channel, or with SPLIT by its value."""
    dpeak, dmean = convolve_transposed(
        dz, conv_weight, rp, pmask, D, H, W, KD, KH, KW, SPATIAL == 2, SPATIAL == 3, ACC, BP
    )
    scale, _, _, _ = folded_norm(bn_weight, bn_bias, bn_mean, bn_var, BN_EPS, ACC)
    # Zero beyond the map, where an infinite weight would otherwise put a NaN into the sums.
    dpeak = tl.where(pmask, dpeak * scale, 0.0)
    dmean = tl.where(pmask, divide(dmean * scale, C.to(ACC)), 0.0)
    key = tl.load(spatial_index + n * P + rp, mask=pmask, other=1).to(tl.int32)  # [BP]
    if SPLIT:
        dpeak = divide(dpeak, key.to(ACC))
        return dpeak, dmean, tl.load(spatial_pool + n * 2 * P + rp, mask=pmask, other=0.0)  # [BP]
    else:
        return dpeak, dmean, key


@triton.jit
def taps_backward(
    n, first, p0, p1, spatial_pool, dz, out, P, D, H, W,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SPATIAL: tl.constexpr,
    TB: tl.constexpr, BQ: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sum_p dz[p] * map[p + tap] of taps first..first+TB of both maps over positions p0..p1, out [PLANES, TAPS]."""
    TAPS: tl.constexpr = KD * KH * KW
    rt = first + tl.arange(0, TB)
    dw = (rt % KW - KW // 2)[:, None]
    dh = ((rt // KW) % KH - KH // 2)[:, None]
    dd = (rt // (KW * KH) - KD // 2)[:, None]
    shift = (dd * H + dh) * W + dw
    acc_peak = tl.zeros([TB, BQ], ACC)
    acc_mean = tl.zeros([TB, BQ], ACC)
    for p in range(p0, p1, BQ):
        rp = p + tl.arange(0, BQ)
        w = (rp % W)[None, :] + dw
        h = ((rp // W) % H)[None, :] + dh
        d = (rp // (W * H))[None, :] + dd
        mask = (rp < P)[None, :] & (rt < TAPS)[:, None]
        mask = mask & (w >= 0) & (w < W)
        if KH > 1:
            mask = mask & (h >= 0) & (h < H)
        if KD > 1:
            mask = mask & (d >= 0) & (d < D)
        peak, mean = load_maps(
            spatial_pool + n * 2 * P, rp[None, :] + shift, mask, P, SPATIAL == 3
        )  # [TB, BQ]
        u = tl.load(dz + n * P + rp, mask=rp < P, other=0.0)[None, :]  # [1, BQ]
        acc_peak += u * peak
        acc_mean += u * mean
    tmask = rt < TAPS
    # Planes are stored in the order of the convolution's input channels.
    if SPATIAL == 3:
        tl.store(out + rt, tl.sum(acc_peak, 1), mask=tmask)  # [TB]
    elif SPATIAL == 2:
        tl.store(out + rt, tl.sum(acc_mean, 1), mask=tmask)  # [TB]
        tl.store(out + TAPS + rt, tl.sum(acc_peak, 1), mask=tmask)  # [TB]
    else:
        tl.store(out + rt, tl.sum(acc_peak, 1), mask=tmask)  # [TB]
        tl.store(out + TAPS + rt, tl.sum(acc_mean, 1), mask=tmask)  # [TB]


@triton.jit
def norm_backward(
    n, p0, p1, spatial_pool, dz, conv_weight, conv_bias, bn_weight, bn_bias, bn_mean, bn_var, out, P, D, H, W,
    BN_EPS: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SPATIAL: tl.constexpr, BQ: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out [2] of positions p0..p1: sum of dz, and sum of dz times the normalised logits."""
    total = tl.zeros([BQ], ACC)
    weighted = tl.zeros([BQ], ACC)
    _, _, mean, rstd = folded_norm(bn_weight, bn_bias, bn_mean, bn_var, BN_EPS, ACC)
    for p in range(p0, p1, BQ):
        rp = p + tl.arange(0, BQ)
        pmask = rp < P
        u = tl.load(dz + n * P + rp, mask=pmask, other=0.0)  # [BQ]
        total += u
        if bn_mean is not None:
            # The logits are not saved, and their sigmoid loses them where it saturates.
            q = spatial_pool + n * 2 * P
            z = convolve_maps(
                q, conv_weight, rp, pmask, P, D, H, W, KD, KH, KW, SPATIAL == 2, SPATIAL == 3, ACC, BQ
            )
            z += load_scalar(conv_bias, 0.0, ACC)
            weighted += tl.where(pmask, u * ((z - mean) * rstd), 0.0)
    tl.store(out, tl.sum(total, 0))
    tl.store(out + 1, tl.sum(weighted, 0))
