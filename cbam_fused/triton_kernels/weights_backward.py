"""Fifth launch of the backward: every weight gradient, summed over the batch in a fixed order.

Two roles by program: a tile of dW1 or dW2, as a sum of outer products; or the small sums over samples
that `sample_backward` prepared for the convolution and the norm.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import folded_norm

# The number of a program that has already done its work.
NO_TILE = tl.constexpr(-1)


@triton.jit
def _outer_products(
    tile, left, right, out, bias, rows, outs, ins, RUNS: tl.constexpr,
    IB: tl.constexpr, JB: tl.constexpr, RB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of out [outs, ins] = sum_r left[r, i] * right[r, j], and bias [outs] = RUNS * sum_r left[r, i]."""
    columns = tl.cdiv(ins, JB)
    ri = (tile // columns) * IB + tl.arange(0, IB)
    rj = (tile % columns) * JB + tl.arange(0, JB)
    imask = ri < outs
    jmask = rj < ins
    acc = tl.zeros([IB, JB], ACC)
    total = tl.zeros([IB], ACC)
    for r in range(0, rows, RB):
        rr = r + tl.arange(0, RB)
        rmask = rr < rows
        at = rr.to(tl.int64)[:, None] * outs + ri[None, :]
        a = tl.load(left + at, mask=rmask[:, None] & imask[None, :], other=0.0)  # [RB, IB]
        at = rr.to(tl.int64)[:, None] * ins + rj[None, :]
        b = tl.load(right + at, mask=rmask[:, None] & jmask[None, :], other=0.0)  # [RB, JB]
        acc += tl.sum(a[:, :, None] * b[:, None, :], 0)
        total += tl.sum(a, 0)
    at = ri.to(tl.int64)[:, None] * ins + rj[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=imask[:, None] & jmask[None, :])  # [IB, JB]
    if bias is not None:
        mask = imask & (tile % columns == 0)
        tl.store(bias + ri, (RUNS * total).to(bias.dtype.element_ty), mask=mask)  # [IB]


@triton.jit(do_not_specialize=["N", "tap_rows", "C", "H"])
def weights_backward_kernel(
    dlogits, hidden, dhidden, u, dtaps, dnorm, bn_weight, bn_bias, bn_mean, bn_var,
    dw1, db1, dw2, db2, dconv_weight, dconv_bias, dbn_weight, dbn_bias, N, tap_rows, C, H, TAPS,
    BN_EPS: tl.constexpr, RUNS: tl.constexpr,
    IB: tl.constexpr, JB: tl.constexpr, RB: tl.constexpr, TB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """u (N * RUNS, C) is what the MLP read; dtaps (tap_rows, TAPS) and dnorm (tap_rows, 2) are partial sums."""
    tile = tl.program_id(0)
    if dw1 is not None:
        tiles = tl.cdiv(H, IB) * tl.cdiv(C, JB)
        if tile < tiles:
            _outer_products(tile, dhidden, u, dw1, db1, N * RUNS, H, C, 1, IB, JB, RB, ACC)
        tile = tl.where(tile < tiles, NO_TILE, tile - tiles)
    if dw2 is not None:
        tiles = tl.cdiv(C, IB) * tl.cdiv(H, JB)
        if (tile >= 0) & (tile < tiles):
            _outer_products(tile, dlogits, hidden, dw2, db2, N, C, H, RUNS, IB, JB, RB, ACC)
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
