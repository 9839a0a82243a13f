"""Device functions of dx, a tile [BC, BP] at a time, and of what x itself adds to the channel gate's gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import channels_and_positions


@triton.jit
def column_gradients(dpeak, dmean, SPLIT: tl.constexpr):
    """From the gradients of both maps: what an element of a column gets, and what its maximum gets."""
    dboth = dmean + dpeak
    if SPLIT:
        # amax multiplies its gradient by a mask, which sends a NaN or an infinity to all elements.
        dmean += dpeak * 0.0
    return dmean, dboth


@triton.jit
def through_maps(v, gated, rc, key, dmean, dboth, SPLIT: tl.constexpr):
    """Sums [BC] of v [BC, BP], of channels rc, times what each element gets from the maps; gated, which only SPLIT
    reads, is v times its channel's gate."""
    if SPLIT:
        is_peak = gated == key[None, :]
    else:
        is_peak = rc[:, None] == key[None, :]
    return tl.sum(v * tl.where(is_peak, dboth[None, :], dmean[None, :]), 1)


@triton.jit
def stretch(P, FLAT: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """FLAT: the elements of a tile of whole channels as they lie in memory [BC * BP], where each of the tile's is
    among them, and where each of them is in the tile; else nothing of use.

    Loads and stores are then of whole vectors and sectors, where rows of the map would end within them. The terms
    are those of a tile, so elements change places in between.
    """
    if FLAT:
        lane = tl.arange(0, BC * BP)
        in_tile, in_map = channels_and_positions(0, lane, P)
        compact = tl.minimum(in_tile * BP + in_map, BC * BP - 1)
        spread = tl.minimum(lane // BP * P + lane % BP, BC * BP - 1)
        return lane, spread, compact
    else:
        return 0, 0, 0


@triton.jit
def _load_tile(
    p, at, mask, spread, FLAT: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr
):
    """Elements `at` as a tile [BC, BP]; FLAT: of a stretch of memory, where `spread` says which is whose."""
    v = tl.load(p + at, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)  # [BC, BP] or [BC * BP]
    if FLAT:
        return tl.reshape(tl.gather(v, spread, 0), [BC, BP])
    else:
        return v


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


@triton.jit
def read_gradient(
    dy, x, n, t, rp, pmask, lane, spread, C, P, POOLS: tl.constexpr, SPATIAL: tl.constexpr, SPLIT: tl.constexpr,
    FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The t-th tile of channels of sample n at positions rp [1, BP]: where it is from the sample's start and what of it
    there is, as memory has it; and dy and, where it is read, x, as a tile. lane and spread are those of `stretch`."""
    # Non-zero where x itself is read: by the pools lp and lse, and by maxima that are shared evenly.
    READS_X: tl.constexpr = POOLS // 4 % 4 + SPLIT * (POOLS // 2 % 2 + SPATIAL)
    SC = 1 if CHANNELS_LAST else P
    SP = C if CHANNELS_LAST else 1
    row = tl.arange(0, BC)[:, None]
    if FLAT:
        # By elements, not by channels: whole vectors are then seen to be inside or outside.
        at = tl.multiple_of(t * BC * P, BC) + lane  # [BC * BP]
        mask = (lane < BC * P) & (at < C * P)
    else:
        at = rp.to(tl.int64) * SP + row.to(tl.int64) * SC  # [BC, BP]
        at += tl.cast(tl.multiple_of(t * BC, BC), tl.int64) * SC
        mask = (t * BC + row < C) & pmask
    upstream = _load_tile(dy + n * C * P, at, mask, spread, FLAT, BC, BP, ACC)  # [BC, BP]
    v = upstream
    if READS_X:
        v = _load_tile(x + n * C * P, at, mask, spread, FLAT, BC, BP, ACC)  # [BC, BP]
    return at, mask, upstream, v


@triton.jit
def write_gradient(
    dx, at, mask, upstream, v, n, t, rp, compact, s, dmean, dboth, key, da, dm, dn, dlse,
    channel_gate, pooled, pool_index, C, P,
    POOLS: tl.constexpr, SPATIAL: tl.constexpr, SPLIT: tl.constexpr, RESIDUAL: tl.constexpr,
    FLAT: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """dx of a tile from what `read_gradient` found; da, dm, dn, dlse are [BC, 1], the other terms [1, BP]."""
    rc = t * BC + tl.arange(0, BC)[:, None]
    out = _input_gradient(
        upstream, v, rc < C, n, rc, rp, s, dmean, dboth, key, da, dm, dn, dlse,
        channel_gate, pooled, pool_index, C, POOLS, SPATIAL, SPLIT, RESIDUAL,
    )  # fmt: skip
    if FLAT:
        out = tl.gather(tl.reshape(out, [BC * BP]), compact, 0)
    tl.store(
        dx + n * C * P + at, out.to(dx.dtype.element_ty), mask=mask, eviction_policy="evict_first"
    )  # [BC, BP] or [BC * BP]
