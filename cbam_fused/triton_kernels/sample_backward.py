"""Third launch of the backward: everything small that one sample needs, each job on its own program.

Job 0 is the MLP's backward; the last job sums dz for the biases and the norm; the jobs between them
correlate dz with the maps for some taps of the convolution each. Nothing here reads a tensor of x's size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import convolve_maps, folded_norm, hidden_layer, load_maps, load_pooled, load_scalar, relu


@triton.jit
def _mlp_backward(
    n, pooled, pool_index, channel_gate, dgate_a, dgate_b, w1, b1, w2,
    dlogits, hidden, dhidden, blended, dpooled, C, H, P, tiles_a, tiles_b,
    POOLS: tl.constexpr, SPLIT: tl.constexpr, MC: tl.constexpr, HB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    AVG: tl.constexpr = POOLS % 2
    MAX: tl.constexpr = (POOLS // 2) % 2
    LP: tl.constexpr = (POOLS // 4) % 2
    LSE: tl.constexpr = (POOLS // 8) % 2
    BLEND: tl.constexpr = POOLS // 16
    ROWS: tl.constexpr = AVG + MAX + LP + LSE
    RUNS: tl.constexpr = 1 if BLEND else ROWS
    KP: tl.constexpr = 4 if RUNS == 3 else RUNS
    # Partials are summed this many tiles at a time, always in the same order.
    TB: tl.constexpr = 16
    u_base = pooled + n * ROWS * C
    my_dlogits = dlogits + n * C
    my_hidden = hidden + n * H
    if w1 is not None:
        my_dhidden = dhidden + n * RUNS * H
    rt = tl.arange(0, TB)
    for c in range(0, C, MC):
        rc = c + tl.arange(0, MC)
        cmask = rc < C
        dg = tl.zeros([MC], ACC)
        for t in range(0, tiles_a, TB):
            at = (n * tiles_a + t + rt.to(tl.int64))[:, None] * C + rc[None, :]
            mask = (t + rt < tiles_a)[:, None] & cmask[None, :]
            dg += tl.sum(tl.load(dgate_a + at, mask=mask, other=0.0), 0)  # [TB, MC]
        if dgate_b is not None:
            for t in range(0, tiles_b, TB):
                at = (n * tiles_b + t + rt.to(tl.int64))[:, None] * C + rc[None, :]
                mask = (t + rt < tiles_b)[:, None] & cmask[None, :]
                dg += tl.sum(tl.load(dgate_b + at, mask=mask, other=0.0), 0)  # [TB, MC]
        g = tl.load(channel_gate + n * C + rc, mask=cmask, other=0.0)  # [MC]
        tl.store(my_dlogits + rc, dg * g * (1.0 - g), mask=cmask)  # [MC]
        if BLEND:
            u = tl.sum(load_pooled(u_base, C, rc, cmask, ROWS, KP, BLEND), 0)
            tl.store(blended + n * C + rc, u, mask=cmask)  # [MC]
    tl.debug_barrier()

    rk = tl.arange(0, KP)
    for h in range(0, H, HB):
        rh = h + tl.arange(0, HB)
        hmask = rh < H
        if w1 is None:
            units = tl.sum(load_pooled(u_base, C, rh, hmask, ROWS, KP, BLEND), 0)  # [HB]
        else:
            pre = hidden_layer(u_base, w1, b1, C, H, rh, ROWS, KP, BLEND, MC, HB, ACC)  # [KP, HB]
            dh = tl.zeros([HB], ACC)
            for c in range(0, C, MC):
                rc = c + tl.arange(0, MC)
                cmask = rc < C
                at = rc.to(tl.int64)[:, None] * H + rh[None, :]
                w = tl.load(w2 + at, mask=cmask[:, None] & hmask[None, :], other=0.0).to(ACC)  # [MC, HB]
                dl = tl.load(my_dlogits + rc, mask=cmask, other=0.0)  # [MC]
                dh += tl.sum(w * dl[:, None], 0)
            used = (rk < RUNS)[:, None]
            units = tl.sum(tl.where(used, relu(pre), 0.0), 0)
            dpre = tl.where(pre <= 0.0, 0.0, dh[None, :])
            at = rk[:, None] * H + rh[None, :]
            tl.store(my_dhidden + at, dpre, mask=used & hmask[None, :])  # [KP, HB]
        tl.store(my_hidden + rh, units, mask=hmask)  # [HB]
    tl.debug_barrier()

    for c in range(0, C, MC):
        rc = c + tl.arange(0, MC)
        cmask = rc < C
        du = tl.zeros([KP, MC], ACC)
        for h in range(0, H, HB):
            rh = h + tl.arange(0, HB)
            hmask = rh < H
            if w1 is None:
                at = rh.to(tl.int64)[:, None] * C + rc[None, :]
                w = tl.load(w2 + at, mask=hmask[:, None] & cmask[None, :], other=0.0).to(ACC)  # [HB, MC]
                dl = tl.load(my_dlogits + rh, mask=hmask, other=0.0)  # [HB]
                du += tl.sum(w * dl[:, None], 0)[None, :]
            else:
                at = rh.to(tl.int64)[:, None] * C + rc[None, :]
                w = tl.load(w1 + at, mask=hmask[:, None] & cmask[None, :], other=0.0).to(ACC)  # [HB, MC]
                at = rk[:, None] * H + rh[None, :]
                mask = (rk < RUNS)[:, None] & hmask[None, :]
                dpre = tl.load(my_dhidden + at, mask=mask, other=0.0)  # [KP, HB]
                du += tl.sum(w[None, :, :] * dpre[:, :, None], 1)
        base = dpooled + n * ROWS * C + rc
        if AVG:
            da = _row(du, 0, KP)
            if BLEND:
                da *= 0.5
            tl.store(base, da / P.to(ACC), mask=cmask)  # [MC]
        if MAX:
            dm = _row(du, 0 if BLEND else AVG, KP)
            if BLEND:
                dm *= 0.5
            if SPLIT:
                dm /= tl.load(pool_index + n * C + rc, mask=cmask, other=1).to(ACC)  # [MC]
            tl.store(base + AVG * C, dm, mask=cmask)  # [MC]
        if LP:
            norm = tl.load(u_base + (AVG + MAX) * C + rc, mask=cmask, other=1.0)  # [MC]
            # The subgradient of a norm at zero is zero, as in torch.
            dn = tl.where(norm == 0.0, 0.0, _row(du, AVG + MAX, KP) / norm)
            tl.store(base + (AVG + MAX) * C, dn, mask=cmask)  # [MC]
        if LSE:
            tl.store(base + (AVG + MAX + LP) * C, _row(du, AVG + MAX + LP, KP), mask=cmask)  # [MC]


@triton.jit
def _row(du, row: tl.constexpr, KP: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, KP) == row)[:, None], du, 0.0), 0)


@triton.jit
def _taps_backward(
    n, first, spatial_pool, dz, out, P, D, H, W,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SPATIAL: tl.constexpr,
    TB: tl.constexpr, BQ: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sum_p dz[p] * map[p + tap] of taps first..first+TB of both maps, out [PLANES, TAPS] of this sample."""
    TAPS: tl.constexpr = KD * KH * KW
    rt = first + tl.arange(0, TB)
    dw = (rt % KW - KW // 2)[:, None]
    dh = ((rt // KW) % KH - KH // 2)[:, None]
    dd = (rt // (KW * KH) - KD // 2)[:, None]
    shift = (dd * H + dh) * W + dw
    acc_peak = tl.zeros([TB, BQ], ACC)
    acc_mean = tl.zeros([TB, BQ], ACC)
    for p in range(0, P, BQ):
        rp = p + tl.arange(0, BQ)
        w = (rp % W)[None, :] + dw
        h = ((rp // W) % H)[None, :] + dh
        d = (rp // (W * H))[None, :] + dd
        mask = (rp < P)[None, :] & (rt < TAPS)[:, None]
        mask = mask & (w >= 0) & (w < W) & (h >= 0) & (h < H) & (d >= 0) & (d < D)
        peak, mean = load_maps(spatial_pool + n * 2 * P, rp[None, :] + shift, mask, P, SPATIAL == 3)  # [TB, BQ]
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
def _norm_backward(
    n, spatial_pool, dz, conv_weight, conv_bias, bn_weight, bn_bias, bn_mean, bn_var, out, P, D, H, W,
    BN_EPS: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SPATIAL: tl.constexpr, BQ: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out [2] of this sample: sum of dz, and sum of dz times the normalised logits."""
    total = tl.zeros([BQ], ACC)
    weighted = tl.zeros([BQ], ACC)
    _, _, mean, rstd = folded_norm(bn_weight, bn_bias, bn_mean, bn_var, BN_EPS, ACC)
    for p in range(0, P, BQ):
        rp = p + tl.arange(0, BQ)
        pmask = rp < P
        u = tl.load(dz + n * P + rp, mask=pmask, other=0.0)  # [BQ]
        total += u
        if bn_mean is not None:
            # The logits are not saved, and their sigmoid loses them where it saturates.
            q = spatial_pool + n * 2 * P
            z = convolve_maps(q, conv_weight, rp, pmask, P, D, H, W, KD, KH, KW, SPATIAL == 2, SPATIAL == 3, ACC, BQ)
            z += load_scalar(conv_bias, 0.0, ACC)
            weighted += tl.where(pmask, u * ((z - mean) * rstd), 0.0)
    tl.store(out, tl.sum(total, 0))
    tl.store(out + 1, tl.sum(weighted, 0))


@triton.jit(do_not_specialize=["P", "D", "H", "W", "jobs", "tiles_a", "tiles_b"])
def sample_backward_kernel(
    pooled, pool_index, channel_gate, spatial_pool, dz, dgate_a, dgate_b,
    w1, b1, w2, conv_weight, conv_bias, bn_weight, bn_bias, bn_mean, bn_var,
    dlogits, hidden, dhidden, blended, dpooled, dtaps, dnorm,
    C, HIDDEN, P, D, H, W, jobs, tiles_a, tiles_b,
    BN_EPS: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    POOLS: tl.constexpr, SPATIAL: tl.constexpr, SPLIT: tl.constexpr,
    MC: tl.constexpr, HB: tl.constexpr, TB: tl.constexpr, BQ: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n = (pid // jobs).to(tl.int64)
    job = pid % jobs
    if POOLS:
        if job == 0:
            _mlp_backward(
                n, pooled, pool_index, channel_gate, dgate_a, dgate_b, w1, b1, w2,
                dlogits, hidden, dhidden, blended, dpooled, C, HIDDEN, P, tiles_a, tiles_b,
                POOLS, SPLIT, MC, HB, ACC,
            )  # fmt: skip
        job -= 1
    if SPATIAL:
        TAPS: tl.constexpr = KD * KH * KW
        PLANES: tl.constexpr = 1 if SPATIAL == 3 else 2
        blocks: tl.constexpr = (TAPS + TB - 1) // TB
        if job == blocks:
            _norm_backward(
                n, spatial_pool, dz, conv_weight, conv_bias, bn_weight, bn_bias, bn_mean, bn_var,
                dnorm + n * 2, P, D, H, W, BN_EPS, KD, KH, KW, SPATIAL, BQ, ACC,
            )  # fmt: skip
        elif job >= 0:
            _taps_backward(
                n, job * TB, spatial_pool, dz, dtaps + n * PLANES * TAPS, P, D, H, W,
                KD, KH, KW, SPATIAL, TB, BQ, ACC,
            )  # fmt: skip
