"""The MLP's backward from its hidden layer on, for the third launch and the fourth, or the one that takes their place.

The third does it where one of its jobs has all channels of a sample; else the fourth does, each of its
programs for the channels that it owns, and nothing of the pools' size goes through memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import divide, sum_parts


@triton.jit
def hidden_backward(
    n, hidden_part, hidden, my_dhidden, dhidden, H, blocks, write,
    RUNS: tl.constexpr, KP: tl.constexpr, HB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """From the sums of each block of channels: the gradient before the ReLU [RUNS, H] to the program's own copy, and
    where `write` that behind it [H], which all runs share, to what the weights' gradients read (None: the only
    block has left it there)."""
    rk = tl.arange(0, KP)[:, None]
    for h in range(0, H, HB):
        rh = h + tl.arange(0, HB)
        hmask = rh < H
        dh = tl.sum(sum_parts(hidden_part + n * blocks * H, blocks, 1, H, rh, 1, HB, ACC), 0)  # [HB]
        if dhidden is not None:
            tl.store(dhidden + n * H + rh, dh, mask=hmask & write)  # [HB]
        at = rk * H + rh[None, :]
        mask = (rk < RUNS) & hmask[None, :]
        before = tl.load(hidden + n * RUNS * H + at, mask=mask, other=0.0)  # [KP, HB]
        tl.store(my_dhidden + at, tl.where(before <= 0.0, 0.0, dh[None, :]), mask=mask)  # [KP, HB]


@triton.jit
def through_layer(
    w, dout, before, samples, outs, C, rc, cmask,
    SHARED: tl.constexpr, RUNS: tl.constexpr, KP: tl.constexpr, GB: tl.constexpr,
    HB: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """w^T dout at channels rc -> [GB * KP, B], row g * KP + k for run k of the g-th of `samples` samples.

    w [outs, C] is the layer that read the pools, and dout its output's gradient: [samples, RUNS, outs], or
    [samples, outs] with SHARED, where all runs have the same. before [samples, RUNS, outs], or None: what the ReLU
    behind the layer saw, where dout is the gradient behind it. A tile of w serves all samples.
    """
    row = tl.arange(0, GB * KP)
    rows = (row < samples * KP) & (row % KP < RUNS)
    start = row // KP * outs if SHARED else (row // KP * RUNS + row % KP) * outs
    du = tl.zeros([GB * KP, B], ACC)
    for i in range(0, outs, HB):
        ri = i + tl.arange(0, HB)
        imask = ri < outs
        at = ri.to(tl.int64)[:, None] * C + rc[None, :]
        tile = tl.load(w + at, mask=imask[:, None] & cmask[None, :], other=0.0).to(ACC)  # [HB, B]
        at = start[:, None] + ri[None, :]
        d = tl.load(dout + at, mask=rows[:, None] & imask[None, :], other=0.0)  # [GB * KP, HB]
        if before is not None:
            at = ((row // KP * RUNS + row % KP) * outs)[:, None] + ri[None, :]
            seen = tl.load(before + at, mask=rows[:, None] & imask[None, :], other=0.0)  # [GB * KP, HB]
            d = tl.where(seen <= 0.0, 0.0, d)
        du += tl.sum(tile[None, :, :] * d[:, :, None], 1)
    return du


@triton.jit
def _row(du, row, ROWS: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, ROWS) == row)[:, None], du, 0.0), 0)


@triton.jit
def pool_gradients(
    du, first, n, rc, cmask, pooled, pool_index, C, P,
    POOLS: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What each pool hands to its elements, (avg, max, lp, lse), each [B], from the rows of du [ROWS, B] that
    begin with `first`; what an absent pool would hand on means nothing."""
    AVG: tl.constexpr = POOLS % 2
    MAX: tl.constexpr = (POOLS // 2) % 2
    LP: tl.constexpr = (POOLS // 4) % 2
    LSE: tl.constexpr = (POOLS // 8) % 2
    BLEND: tl.constexpr = POOLS // 16
    SAVED: tl.constexpr = AVG + MAX + LP + LSE
    da = _row(du, first, ROWS)
    dm, dn, dlse = da, da, da
    if MAX:
        dm = _row(du, first + (0 if BLEND else AVG), ROWS)
        if BLEND:
            dm *= 0.5
        if SPLIT:
            dm = divide(dm, tl.load(pool_index + n * C + rc, mask=cmask, other=1).to(du.dtype))  # [B]
    if LP:
        norm = tl.load(pooled + (n * SAVED + AVG + MAX) * C + rc, mask=cmask, other=1.0)  # [B]
        # The subgradient of a norm at zero is zero, as in torch.
        dn = tl.where(norm == 0.0, 0.0, divide(_row(du, first + AVG + MAX, ROWS), norm))
    if LSE:
        dlse = _row(du, first + AVG + MAX + LP, ROWS)
    if AVG:
        if BLEND:
            da *= 0.5
        da = divide(da, P.to(du.dtype))
    return da, dm, dn, dlse
