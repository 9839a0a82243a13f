"""Last launch of the backward: every weight gradient, summed over the batch in a fixed order.

Two roles by program: a tile of dW1 or dW2, as a sum of outer products; or the small sums over samples
that a launch before prepared for the convolution and the norm.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import folded_norm, relu

# The number of a program that has already done its work.
NO_TILE = tl.constexpr(-1)


@triton.jit
def _mlp_inputs(pooled, rn, run, rc, mask, C, ROWS: tl.constexpr, BLEND: tl.constexpr):
    """What the MLP reads in one of its runs: channels rc of samples rn."""
    at = pooled + rn.to(tl.int64)[:, None] * ROWS * C + rc[None, :]
    if BLEND:
        first = tl.load(at, mask=mask, other=0.0)  # [RB, B]
        return 0.5 * first + 0.5 * tl.load(at + C, mask=mask, other=0.0)  # [RB, B]
    else:
        return tl.load(at + run * C, mask=mask, other=0.0)  # [RB, B]


@triton.jit
def _first_layer(
    tile, dhidden, hidden, pooled, out, bias, N, H, C, ROWS: tl.constexpr, RUNS: tl.constexpr, BLEND: tl.constexpr,
    IB: tl.constexpr, JB: tl.constexpr, RB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of dW1 [H, C], and of db1 [H]: sums over samples and runs of the gradient before the ReLU."""
    columns = tl.cdiv(C, JB)
    ri = (tile // columns) * IB + tl.arange(0, IB)
    rj = (tile % columns) * JB + tl.arange(0, JB)
    imask = ri < H
    jmask = rj < C
    acc = tl.zeros([IB, JB], ACC)
    total = tl.zeros([IB], ACC)
    for n in range(0, N, RB):
        rn = n + tl.arange(0, RB)
        mask = (rn < N)[:, None] & imask[None, :]
        row = rn.to(tl.int64)[:, None] * H + ri[None, :]
        behind = tl.load(dhidden + row, mask=mask, other=0.0)  # [RB, IB]
        for run in tl.static_range(RUNS):
            at = (rn.to(tl.int64) * RUNS + run)[:, None] * H + ri[None, :]
            a = tl.where(tl.load(hidden + at, mask=mask, other=0.0) <= 0.0, 0.0, behind)  # [RB, IB]
            b = _mlp_inputs(
                pooled, rn, run, rj, (rn < N)[:, None] & jmask[None, :], C, ROWS, BLEND
            )  # [RB, JB]
            acc += tl.sum(a[:, :, None] * b[:, None, :], 0)
            total += tl.sum(a, 0)
    at = ri.to(tl.int64)[:, None] * C + rj[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=imask[:, None] & jmask[None, :])  # [IB, JB]
    if bias is not None:
        tl.store(bias + ri, total.to(bias.dtype.element_ty), mask=imask & (tile % columns == 0))  # [IB]


@triton.jit
def _second_layer(
    tile, dlogits, hidden, pooled, out, bias, N, C, H, ROWS: tl.constexpr, RUNS: tl.constexpr, BLEND: tl.constexpr,
    IB: tl.constexpr, JB: tl.constexpr, RB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of dW2 [C, H], and of db2 [C]. hidden None: it is the only layer, and reads the pools."""
    columns = tl.cdiv(H, JB)
    ri = (tile // columns) * IB + tl.arange(0, IB)
    rj = (tile % columns) * JB + tl.arange(0, JB)
    imask = ri < C
    jmask = rj < H
    acc = tl.zeros([IB, JB], ACC)
    total = tl.zeros([IB], ACC)
    for n in range(0, N, RB):
        rn = n + tl.arange(0, RB)
        at = rn.to(tl.int64)[:, None] * C + ri[None, :]
        a = tl.load(dlogits + at, mask=(rn < N)[:, None] & imask[None, :], other=0.0)  # [RB, IB]
        mask = (rn < N)[:, None] & jmask[None, :]
        b = tl.zeros([RB, JB], ACC)
        for run in tl.static_range(RUNS):
            if hidden is None:
                b += _mlp_inputs(pooled, rn, run, rj, mask, C, ROWS, BLEND)
            else:
                at = (rn.to(tl.int64) * RUNS + run)[:, None] * H + rj[None, :]
                b += relu(tl.load(hidden + at, mask=mask, other=0.0))  # [RB, JB]
        acc += tl.sum(a[:, :, None] * b[:, None, :], 0)
        total += tl.sum(a, 0)
    at = ri.to(tl.int64)[:, None] * H + rj[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=imask[:, None] & jmask[None, :])  # [IB, JB]
    if bias is not None:
        mask = imask & (tile % columns == 0)
        tl.store(bias + ri, (RUNS * total).to(bias.dtype.element_ty), mask=mask)  # [IB]


@triton.jit(do_not_specialize=["N", "tap_rows", "C", "H"])
def weights_backward_kernel(
    dlogits, dhidden, hidden, pooled, dtaps, dnorm, bn_weight, bn_bias, bn_mean, bn_var,
    dw1, db1, dw2, db2, dconv_weight, dconv_bias, dbn_weight, dbn_bias, N, tap_rows, C, H, TAPS,
    BN_EPS: tl.constexpr, POOLS: tl.constexpr,
    IB: tl.constexpr, JB: tl.constexpr, RB: tl.constexpr, TB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dhidden (N, H) is the gradient behind the ReLU; dtaps (tap_rows, TAPS) and dnorm (tap_rows, 2) partial sums."""
    BLEND: tl.constexpr = POOLS // 16
    ROWS: tl.constexpr = POOLS % 2 + (POOLS // 2) % 2 + (POOLS // 4) % 2 + (POOLS // 8) % 2
    RUNS: tl.constexpr = 1 if BLEND else ROWS
    tile = tl.program_id(0)
    if dw1 is not None:
        tiles = tl.cdiv(H, IB) * tl.cdiv(C, JB)
        if tile < tiles:
            _first_layer(tile, dhidden, hidden, pooled, dw1, db1, N, H, C, ROWS, RUNS, BLEND, IB, JB, RB, ACC)
        tile = tl.where(tile < tiles, NO_TILE, tile - tiles)
    if dw2 is not None:
        tiles = tl.cdiv(C, IB) * tl.cdiv(H, JB)
        if (tile >= 0) & (tile < tiles):
            _second_layer(
                tile, dlogits, hidden, pooled, dw2, db2, N, C, H, ROWS, RUNS, BLEND, IB, JB, RB, ACC
            )
        tile = tl.where(tile < tiles, NO_TILE, tile - tiles)
    if dconv_weight is not None:
        if tile >= 0:
            scale, _, _, _ = folded_norm(bn_weight, bn_bias, bn_mean, bn_var, BN_EPS, ACC)
            rt = tile * TB + tl.arange(0, TB)
            tmask = rt < TAPS
            rn = tl.arange(0, RB)
            taps = tl.zeros([TB], ACC)
            total = tl.zeros([RB], ACC)
            weighted = tl.zeros([RB], ACC)
            for n in range(0, tap_rows, RB):
                nmask = n + rn < tap_rows
                at = (n + rn.to(tl.int64))[:, None] * TAPS + rt[None, :]
                taps += tl.sum(
                    tl.load(dtaps + at, mask=nmask[:, None] & tmask[None, :], other=0.0), 0
                )  # [RB, TB]
                total += tl.load(dnorm + (n + rn) * 2, mask=nmask, other=0.0)  # [RB]
                weighted += tl.load(dnorm + (n + rn) * 2 + 1, mask=nmask, other=0.0)  # [RB]
            tl.store(dconv_weight + rt, (taps * scale).to(dconv_weight.dtype.element_ty), mask=tmask)  # [TB]
            if tile == 0:
                if dconv_bias is not None:
                    tl.store(dconv_bias, (tl.sum(total, 0) * scale).to(dconv_bias.dtype.element_ty))
                if dbn_weight is not None:
                    tl.store(dbn_weight, tl.sum(weighted, 0).to(dbn_weight.dtype.element_ty))
                if dbn_bias is not None:
                    tl.store(dbn_bias, tl.sum(total, 0).to(dbn_bias.dtype.element_ty))
