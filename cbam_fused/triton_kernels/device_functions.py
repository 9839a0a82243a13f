"""Device functions that the kernels share: sigmoid, maxima with an index, the tiny convolutions."""

from __future__ import annotations

import triton
import triton.language as tl

# Above every index; extents of positions and channels are below 2**31 (see `covers`).
NO_INDEX = tl.constexpr(2**31 - 1)
# Kernel widths up to this one are unrolled: the bounds checks of a column are then shared by all rows.
UNROLLED_WIDTH = tl.constexpr(7)


@triton.jit
def divide(a, b):
    # `/` of float32 is approximate. Its exact twin is a call, around which registers spill; one step of
    # refinement is not, and leaves an infinite or zero divisor's quotient alone.
    q = a / b
    if b.dtype != tl.float64:
        rest = tl.fma(-q, b + tl.zeros_like(q), a + tl.zeros_like(q))
        q = tl.where(rest == rest, q + rest / b, q)
    return q


@triton.jit
def count_tiles(P, W, BP: tl.constexpr, TW: tl.constexpr):
    """Tiles of a map, as `tile_positions` cuts it."""
    if TW > 0:
        return tl.cdiv(W, TW) * tl.cdiv(P // W, BP // TW)
    else:
        return tl.cdiv(P, BP)


@triton.jit
def tile_positions(tile, P, W, BP: tl.constexpr, TW: tl.constexpr):
    """Positions of a tile [BP], and which of them the map has: a stretch, or with TW > 0 a block of rows TW wide, around
    which a convolution reads less."""
    lane = tl.arange(0, BP)
    if TW > 0:
        across = tl.cdiv(W, TW)
        w = tile % across * TW + lane % TW
        h = tile // across * (BP // TW) + lane // TW
        return h * W + w, (w < W) & (h < P // W)
    else:
        rp = tile * BP + lane
        return rp, rp < P


@triton.jit
def add_long(total, lost, part):
    """Adds one of many parts -> (total, lost): what an addition rounds off comes back with the next part (Kahan), so
    that the error does not grow with their number. Infinities and NaN leave nothing to come back."""
    part += lost
    higher = total + part
    lost = part - (higher - total)
    return higher, tl.where(lost - lost == 0.0, lost, 0.0)


@triton.jit
def sigmoid(x):
    return divide(tl.full([], 1.0, x.dtype), 1.0 + tl.exp(-x))


@triton.jit
def relu(x):
    # Not tl.maximum: a NaN must stay one.
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def track_maximum(v, t, mask, peak, index, SPLIT: tl.constexpr, WITH_INDEX: tl.constexpr):
    """Folds v, the t-th tile, into the running maximum of each lane; mask None: all of v counts.

    `index` holds the tile of the lane's first maximum, or with SPLIT how many elements equal it. A NaN
    is passed by: it shows in the lane's sum, and `replace_nan` then looks for it.
    """
    higher = v > peak
    if SPLIT:
        equal = v == peak
    if mask is not None:
        higher = higher & mask
        if SPLIT:
            equal = equal & mask
    if WITH_INDEX:
        if SPLIT:
            index = tl.where(higher, 1, index + equal.to(tl.int32))
        else:
            index = tl.where(higher, t, index)
    return tl.where(higher, v, peak), index


@triton.jit
def reduce_maximum(peak, index, AXIS: tl.constexpr, SPLIT: tl.constexpr):
    """Maxima of lanes along AXIS and their index or count -> (maximum, its first index or its count)."""
    best = tl.max(peak, AXIS)
    equal = peak == tl.expand_dims(best, AXIS)
    if SPLIT:
        return best, tl.sum(tl.where(equal, index, 0), AXIS)
    else:
        return best, tl.min(tl.where(equal, index, NO_INDEX), AXIS)


@triton.jit
def replace_nan(best, found, first_nan, SPLIT: tl.constexpr):
    """A NaN at index `first_nan` (NO_INDEX for none) is the maximum; nothing equals it, so it counts 0."""
    nan = first_nan < NO_INDEX
    found = tl.where(nan, 0 if SPLIT else first_nan, found)
    return tl.where(nan, float("nan"), best), found


@triton.jit
def merge_maximum(v, at, first: tl.constexpr, peak, index, SPLIT: tl.constexpr):
    """Folds the maximum v of a later part into that of earlier parts; a NaN wins and stays."""
    take = (v > peak) | ((v != v) & (peak == peak))
    if SPLIT:
        index = tl.where(take, at, tl.where(v == peak, index + at, index))
    else:
        index = tl.where(take | first, at, index)
    return tl.where(take, v, peak), index


@triton.jit
def root(x):
    # tl.sqrt of float32 is approximate; its exact twin takes nothing else.
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def finite_or_zero(x):
    # logsumexp subtracts its maximum only where that is finite.
    return tl.where((x == float("inf")) | (x == float("-inf")), 0.0, x)


@triton.jit
def load_scalar(p, default, ACC: tl.constexpr):
    """The one element of p in ACC, or `default` where p is None."""
    if p is None:
        return tl.full([], default, ACC)
    else:
        return tl.load(p).to(ACC)


@triton.jit
def folded_norm(bn_weight, bn_bias, bn_mean, bn_var, BN_EPS: tl.constexpr, ACC: tl.constexpr):
    """(A, B, mean, 1 / std) of a BatchNorm in eval mode, z -> A z + B."""
    if bn_mean is None:
        one = tl.full([], 1.0, ACC)
        return one, one - one, one - one, one
    else:
        mean = tl.load(bn_mean).to(ACC)
        rstd = divide(tl.full([], 1.0, ACC), root(tl.load(bn_var).to(ACC) + tl.full([], BN_EPS, ACC)))
        scale = load_scalar(bn_weight, 1.0, ACC) * rstd
        return scale, load_scalar(bn_bias, 0.0, ACC) - mean * scale, mean, rstd


@triton.jit
def load_maps(q, at, mask, P, BLEND_MAPS: tl.constexpr):
    """q [2, P] (max, mean) at positions `at` -> the two maps, or their mean twice with BLEND_MAPS."""
    peak = tl.load(q + at, mask=mask, other=0.0)  # [*at]
    mean = tl.load(q + P + at, mask=mask, other=0.0)  # [*at]
    if BLEND_MAPS:
        peak = 0.5 * mean + 0.5 * peak
    return peak, mean


@triton.jit
def convolve_maps(
    q, weight, rp, mask, P, D, H, W,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    MEAN_FIRST: tl.constexpr, BLEND_MAPS: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Zero-padded convolution of q [2, P] at positions rp [BP] -> [BP]."""
    TAPS: tl.constexpr = KD * KH * KW
    w = rp % W
    h = (rp // W) % H
    d = rp // (W * H)
    z = tl.zeros([BP], ACC)
    for row in range(KD * KH):
        dd = row // KH - KD // 2
        dh = row % KH - KH // 2
        inside = mask & (d + dd >= 0) & (d + dd < D) & (h + dh >= 0) & (h + dh < H)
        at = rp + (dd * H + dh) * W
        if KW <= UNROLLED_WIDTH:
            for col in tl.static_range(KW):
                z += _tap(
                    q,
                    weight,
                    row * KW + col,
                    at,
                    w,
                    col - KW // 2,
                    inside,
                    P,
                    W,
                    TAPS,
                    MEAN_FIRST,
                    BLEND_MAPS,
                    ACC,
                )
        else:
            for col in range(KW):
                z += _tap(
                    q,
                    weight,
                    row * KW + col,
                    at,
                    w,
                    col - KW // 2,
                    inside,
                    P,
                    W,
                    TAPS,
                    MEAN_FIRST,
                    BLEND_MAPS,
                    ACC,
                )
    return z


@triton.jit
def _tap(
    q, weight, tap, at, w, dw, inside, P, W,
    TAPS: tl.constexpr, MEAN_FIRST: tl.constexpr, BLEND_MAPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    valid = inside & (w + dw >= 0) & (w + dw < W)
    peak, mean = load_maps(q, at + dw, valid, P, BLEND_MAPS)
    if BLEND_MAPS:
        return peak * tl.load(weight + tap).to(ACC)
    elif MEAN_FIRST:
        return peak * tl.load(weight + TAPS + tap).to(ACC) + mean * tl.load(weight + tap).to(ACC)
    else:
        return peak * tl.load(weight + tap).to(ACC) + mean * tl.load(weight + TAPS + tap).to(ACC)


@triton.jit
def convolve_transposed(
    dz, weight, rp, mask, D, H, W,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    MEAN_FIRST: tl.constexpr, BLEND_MAPS: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Gradient of `convolve_maps` to both maps from dz [P] at positions rp -> (max [BP], mean [BP])."""
    TAPS: tl.constexpr = KD * KH * KW
    w = rp % W
    h = (rp // W) % H
    d = rp // (W * H)
    first = tl.zeros([BP], ACC)
    second = tl.zeros([BP], ACC)
    for row in range(KD * KH):
        dd = KD // 2 - row // KH
        dh = KH // 2 - row % KH
        inside = mask & (d + dd >= 0) & (d + dd < D) & (h + dh >= 0) & (h + dh < H)
        at = rp + (dd * H + dh) * W
        if KW <= UNROLLED_WIDTH:
            for col in tl.static_range(KW):
                u = _shifted(dz, at, w, KW // 2 - col, inside, W)
                first += u * tl.load(weight + row * KW + col).to(ACC)
                if not BLEND_MAPS:
                    second += u * tl.load(weight + TAPS + row * KW + col).to(ACC)
        else:
            for col in range(KW):
                u = _shifted(dz, at, w, KW // 2 - col, inside, W)
                first += u * tl.load(weight + row * KW + col).to(ACC)
                if not BLEND_MAPS:
                    second += u * tl.load(weight + TAPS + row * KW + col).to(ACC)
    if BLEND_MAPS:
        return 0.5 * first, 0.5 * first
    elif MEAN_FIRST:
        return second, first
    else:
        return first, second


@triton.jit
def _shifted(dz, at, w, dw, inside, W):
    return tl.load(dz + at + dw, mask=inside & (w + dw >= 0) & (w + dw < W), other=0.0)  # [BP]


@triton.jit
def channels_and_positions(first, lane, P):
    """Elements first + lane [B] of maps of P positions, one after the other -> (map [B], position [B])."""
    c = first // P
    rest = first - c * P + lane
    # In floating point, which is exact for so few, as an integer division takes many instructions: the sum
    # stays below 2**20, the quotient is off by less than 2**-21 of itself and by at least 1 / 2P from whole.
    q = ((rest.to(tl.float32) + 0.5) / P.to(tl.float32)).to(tl.int32)
    return c + q, rest - q * P


@triton.jit
def load_pooled(base, C, rc, cmask, K: tl.constexpr, KP: tl.constexpr, BLEND: tl.constexpr):
    """Rows of pooled [K, C] at channels rc -> what the MLP reads, [KP, len(rc)]; padded rows are 0."""
    if BLEND:
        a = tl.load(base + rc, mask=cmask, other=0.0)  # [MC]
        m = tl.load(base + C + rc, mask=cmask, other=0.0)  # [MC]
        return tl.expand_dims(0.5 * a + 0.5 * m, 0)
    else:
        rk = tl.arange(0, KP)
        mask = (rk < K)[:, None] & cmask[None, :]
        return tl.load(base + rk[:, None] * C + rc[None, :], mask=mask, other=0.0)  # [KP, MC]


@triton.jit
def sum_parts(
    base, parts, rows: tl.constexpr, width, at, RP: tl.constexpr, WB: tl.constexpr, ACC: tl.constexpr
):
    """Partial sums [parts, rows, width], contiguous, at columns `at` [WB] -> [RP, WB], in a fixed order."""
    # Several parts a step: one load's latency is paid for all of them.
    TB: tl.constexpr = 16
    rr = tl.arange(0, RP)
    cell = rr[:, None] * width + at[None, :]
    mask = (rr < rows)[:, None] & (at < width)[None, :]
    acc = tl.zeros([RP, WB], ACC)
    lost = tl.zeros([RP, WB], ACC)
    for first in range(0, parts, TB):
        part = first + tl.arange(0, TB)
        where = (part.to(tl.int64) * rows * width)[:, None, None] + cell[None, :, :]
        inside = (part < parts)[:, None, None] & mask[None, :, :]
        block = tl.load(base + where, mask=inside, other=0.0)  # [TB, RP, WB]
        acc, lost = add_long(acc, lost, tl.sum(block, 0))
    return acc
