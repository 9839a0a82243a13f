"""The MLP's backward from its hidden layer on, for the third launch and the fourth.

The third does it where one of its jobs has all channels of a sample; else the fourth does, each of its
programs for the channels that it owns, and nothing of the pools' size goes through memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import divide, relu, sum_parts


@triton.jit
def hidden_backward(
    n, hidden_part, b1, dhidden, my_dhidden, hidden, H, blocks, write,
    RUNS: tl.constexpr, KP: tl.constexpr, HB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient before the ReLU [RUNS, H], and for the weights' gradients the hidden layer itself.

    my_dhidden is the program's own copy; None: no other program has this sample, and the shared one serves.
    """
    rk = tl.arange(0, KP)
    used = (rk < RUNS)[:, None]
    QP: tl.constexpr = 2 if RUNS == 1 else (4 if RUNS < 4 else 8)
    rq = tl.arange(0, QP)
    for h in range(0, H, HB):
        rh = h + tl.arange(0, HB)
        hmask = rh < H
        sums = sum_parts(
            hidden_part + n * blocks * (1 + RUNS) * H, blocks, 1 + RUNS, H, rh, QP, HB, ACC
        )  # [QP, HB]
        dh = tl.sum(tl.where((rq == 0)[:, None], sums, 0.0), 0)
        # Row 1 + k of the sums is row k of the layer: there is no slicing of a tile.
        is_row = (rq[None, :] == 1 + rk[:, None])[:, :, None]
        pre = tl.sum(tl.where(is_row, sums[None, :, :], 0.0), 1)  # [KP, HB]
        if b1 is not None:
            pre += tl.load(b1 + rh, mask=hmask, other=0.0).to(ACC)[None, :]  # [HB]
        dpre = tl.where(pre <= 0.0, 0.0, dh[None, :])
        at = rk[:, None] * H + rh[None, :]
        mask = used & hmask[None, :]
        if my_dhidden is not None:
            tl.store(my_dhidden + at, dpre, mask=mask)  # [KP, HB]
        tl.store(dhidden + n * RUNS * H + at, dpre, mask=mask & write)  # [KP, HB]
        units = tl.sum(tl.where(used, relu(pre), 0.0), 0)
        tl.store(hidden + n * H + rh, units, mask=hmask & write)  # [HB]


@triton.jit
def through_layer(
    w, dout, samples, outs, C, rc, cmask,
    SHARED: tl.constexpr, RUNS: tl.constexpr, KP: tl.constexpr, GB: tl.constexpr,
    HB: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """w^T dout at channels rc -> [GB * KP, B], row g * KP + k for run k of the g-th of `samples` samples.

    w [outs, C] is the layer that read the pools, and dout its output's gradient: [samples, RUNS, outs], or
    [samples, outs] with SHARED, for a gate of one layer. A tile of w serves all samples.
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
