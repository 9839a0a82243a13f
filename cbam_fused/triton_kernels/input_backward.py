"""Fourth launch of the backward: dx, all of whose terms are known by now.

Reads dy and writes dx (2 S bytes); x only where an option needs it (ties shared evenly, lp, lse).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["c_units", "p_units", "split_tiles"])
def input_backward_kernel(
    dy, x, dx, channel_gate, spatial_gate, pooled, pool_index, dpooled, spatial_pool, spatial_index, dmaps,
    c_units, p_units, splits, split_tiles,
    POOLS: tl.constexpr, SPATIAL: tl.constexpr, SPLIT: tl.constexpr, RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, CV: tl.constexpr, PV: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    AVG: tl.constexpr = POOLS % 2
    MAX: tl.constexpr = (POOLS // 2) % 2
    LP: tl.constexpr = (POOLS // 4) % 2
    LSE: tl.constexpr = (POOLS // 8) % 2
    K: tl.constexpr = AVG + MAX + LP + LSE
    # constexpr arithmetic of flags: non-zero where x itself is read.
    READS_X: tl.constexpr = LP + LSE + SPLIT * (MAX + SPATIAL)
    C = c_units * CV
    P = p_units * PV
    SC = 1 if CHANNELS_LAST else P
    SP = C if CHANNELS_LAST else 1
    tiles = tl.cdiv(P, BP)
    pid = tl.program_id(0)
    split = pid % splits
    n = (pid // (splits * tiles)).to(tl.int64)
    rp = ((pid // splits) % tiles) * BP + tl.arange(0, BP)
    pmask = rp < P
    if SPATIAL:
        s = tl.load(spatial_gate + n * P + rp, mask=pmask, other=0.0)  # [BP]
        dpeak = tl.load(dmaps + n * 2 * P + rp, mask=pmask, other=0.0)  # [BP]
        dmean = tl.load(dmaps + n * 2 * P + P + rp, mask=pmask, other=0.0)  # [BP]
        if SPLIT:
            peak = tl.load(spatial_pool + n * 2 * P + rp, mask=pmask, other=0.0)  # [BP]
        else:
            found = tl.load(spatial_index + n * P + rp, mask=pmask, other=0).to(tl.int32)  # [BP]
    at = n * C * P + rp.to(tl.int64)[None, :] * SP
    for t in range(split * split_tiles, tl.minimum((split + 1) * split_tiles, tl.cdiv(C, BC))):
        rc = t * BC + tl.arange(0, BC)
        cmask = rc < C
        mask = cmask[:, None] & pmask[None, :]
        offsets = at + rc.to(tl.int64)[:, None] * SC
        upstream = tl.load(dy + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)  # [BC, BP]
        if READS_X:
            v = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)  # [BC, BP]
        out = upstream
        if POOLS:
            g = tl.load(channel_gate + n * C + rc, mask=cmask, other=0.0)[:, None]  # [BC, 1]
        if SPATIAL:
            if SPLIT:
                if POOLS:
                    is_peak = v * g == peak[None, :]
                else:
                    is_peak = v == peak[None, :]
            else:
                is_peak = rc[:, None] == found[None, :]
            out = out * s[None, :] + (dmean[None, :] + tl.where(is_peak, dpeak[None, :], 0.0))
        if POOLS:
            out = out * g
            du = dpooled + n * K * C + rc
            if AVG:
                out += tl.load(du, mask=cmask, other=0.0)[:, None]  # [BC, 1]
            if MAX:
                dm = tl.load(du + AVG * C, mask=cmask, other=0.0)[:, None]  # [BC, 1]
                if SPLIT:
                    m = tl.load(pooled + (n * K + AVG) * C + rc, mask=cmask, other=0.0)[:, None]  # [BC, 1]
                    out += tl.where(v == m, dm, 0.0)
                else:
                    first = tl.load(pool_index + n * C + rc, mask=cmask, other=0).to(tl.int32)[:, None]  # [BC, 1]
                    out += tl.where(rp[None, :] == first, dm, 0.0)
            if LP:
                out += v * tl.load(du + (AVG + MAX) * C, mask=cmask, other=0.0)[:, None]  # [BC, 1]
            if LSE:
                lse = tl.load(pooled + (n * K + AVG + MAX + LP) * C + rc, mask=cmask, other=0.0)[:, None]  # [BC, 1]
                out += tl.exp(v - lse) * tl.load(du + (AVG + MAX + LP) * C, mask=cmask, other=0.0)[:, None]  # [BC, 1]
        if RESIDUAL:
            out += upstream
        tl.store(dx + offsets, out.to(dx.dtype.element_ty), mask=mask, eviction_policy="evict_first")  # [BC, BP]
