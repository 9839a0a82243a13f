"""Fourth launch of the backward: dx, all of whose terms are known by now.

A program owns a tile of positions and a range of channels. It finishes the MLP's backward for its
channels from the third launch's partial sums, as the second launch of the forward does with the gate.
Reads dy and writes dx (2 S bytes); x only where an option needs it (ties shared evenly, lp, lse).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import channels_and_positions, divide, load_pooled, relu, sum_parts


@triton.jit
def _hidden_backward(
    n, pooled, hidden_part, b1, dhidden, my_dhidden, hidden, C, H, blocks, write,
    ROWS: tl.constexpr, RUNS: tl.constexpr, KP: tl.constexpr, HB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient before the ReLU [RUNS, H], and for the weights' gradients the hidden layer itself."""
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
        tl.store(my_dhidden + at, dpre, mask=mask)  # [KP, HB]
        tl.store(dhidden + n * RUNS * H + at, dpre, mask=mask & write)  # [KP, HB]
        units = tl.sum(tl.where(used, relu(pre), 0.0), 0)
        tl.store(hidden + n * H + rh, units, mask=hmask & write)  # [HB]


@triton.jit
def _row(du, row: tl.constexpr, KP: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, KP) == row)[:, None], du, 0.0), 0)


@triton.jit
def _pools_backward(
    n, w, dout, pooled, pool_index, out, c0, c1, width, C, outs, P,
    POOLS: tl.constexpr, SPLIT: tl.constexpr, SHARED: tl.constexpr,
    MC: tl.constexpr, HB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What each pool hands to its elements, out [ROWS, width], for channels c0..c1.

    w [outs, C] is the layer that read the pools, and dout its output's gradient: [RUNS, outs], or [outs] with
    SHARED, for a gate of one layer.
    """
    AVG: tl.constexpr = POOLS % 2
    MAX: tl.constexpr = (POOLS // 2) % 2
    LP: tl.constexpr = (POOLS // 4) % 2
    LSE: tl.constexpr = (POOLS // 8) % 2
    BLEND: tl.constexpr = POOLS // 16
    ROWS: tl.constexpr = AVG + MAX + LP + LSE
    RUNS: tl.constexpr = 1 if BLEND else ROWS
    KP: tl.constexpr = 4 if RUNS == 3 else RUNS
    rk = tl.arange(0, KP)
    for c in range(c0, c1, MC):
        rc = c + tl.arange(0, MC)
        cmask = rc < c1
        du = tl.zeros([KP, MC], ACC)
        for i in range(0, outs, HB):
            ri = i + tl.arange(0, HB)
            imask = ri < outs
            at = ri.to(tl.int64)[:, None] * C + rc[None, :]
            tile = tl.load(w + at, mask=imask[:, None] & cmask[None, :], other=0.0).to(ACC)  # [HB, MC]
            at = rk[:, None] * (0 if SHARED else outs) + ri[None, :]
            d = tl.load(dout + at, mask=(rk < RUNS)[:, None] & imask[None, :], other=0.0)  # [KP, HB]
            du += tl.sum(tile[None, :, :] * d[:, :, None], 1)
        at = out + rc - c0
        if AVG:
            da = _row(du, 0, KP)
            if BLEND:
                da *= 0.5
            tl.store(at, divide(da, P.to(ACC)), mask=cmask)  # [MC]
        if MAX:
            dm = _row(du, 0 if BLEND else AVG, KP)
            if BLEND:
                dm *= 0.5
            if SPLIT:
                dm = divide(dm, tl.load(pool_index + n * C + rc, mask=cmask, other=1).to(ACC))  # [MC]
            tl.store(at + AVG * width, dm, mask=cmask)  # [MC]
        if LP:
            norm = tl.load(pooled + (n * ROWS + AVG + MAX) * C + rc, mask=cmask, other=1.0)  # [MC]
            # The subgradient of a norm at zero is zero, as in torch.
            dn = tl.where(norm == 0.0, 0.0, divide(_row(du, AVG + MAX, KP), norm))
            tl.store(at + (AVG + MAX) * width, dn, mask=cmask)  # [MC]
        if LSE:
            tl.store(at + (AVG + MAX + LP) * width, _row(du, AVG + MAX + LP, KP), mask=cmask)  # [MC]


@triton.jit
def _position_terms(n, rp, pmask, spatial_gate, spatial_pool, spatial_index, dmaps, P, SPLIT: tl.constexpr):
    """At positions rp, of any shape: s, what each element of a column gets, what its maximum gets, and how to
    tell the maximum: by its channel, or with SPLIT by its value."""
    s = tl.load(spatial_gate + n * P + rp, mask=pmask, other=0.0)  # [*rp]
    dpeak = tl.load(dmaps + n * 2 * P + rp, mask=pmask, other=0.0)  # [*rp]
    dmean = tl.load(dmaps + n * 2 * P + P + rp, mask=pmask, other=0.0)  # [*rp]
    dboth = dmean + dpeak
    if SPLIT:
        # amax multiplies its gradient by a mask, which sends a NaN or an infinity to all elements.
        dmean += dpeak * 0.0
        key = tl.load(spatial_pool + n * 2 * P + rp, mask=pmask, other=0.0)  # [*rp]
    else:
        key = tl.load(spatial_index + n * P + rp, mask=pmask, other=0).to(tl.int32)  # [*rp]
    return s, dmean, dboth, key


@triton.jit
def _input_gradient(
    dy, x, dx, at, mask, cmask, n, rc, rp, own, s, dmean, dboth, key,
    channel_gate, pooled, pool_index, dpooled, width, C,
    POOLS: tl.constexpr, SPATIAL: tl.constexpr, SPLIT: tl.constexpr, RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dx at `at`, for channels rc (own: counted from the program's first) and positions rp, which broadcast."""
    AVG: tl.constexpr = POOLS % 2
    MAX: tl.constexpr = (POOLS // 2) % 2
    LP: tl.constexpr = (POOLS // 4) % 2
    LSE: tl.constexpr = (POOLS // 8) % 2
    ROWS: tl.constexpr = AVG + MAX + LP + LSE
    # Non-zero where x itself is read.
    READS_X: tl.constexpr = LP + LSE + SPLIT * (MAX + SPATIAL)
    upstream = tl.load(dy + at, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)  # [*at]
    if READS_X:
        v = tl.load(x + at, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)  # [*at]
    out = upstream
    if POOLS:
        g = tl.load(channel_gate + n * C + rc, mask=cmask, other=0.0)  # [*rc]
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
        du = dpooled + own
        if AVG:
            each = tl.load(du, mask=cmask, other=0.0)  # [*rc]
        else:
            each = tl.zeros_like(g)
        if MAX:
            dm = tl.load(du + AVG * width, mask=cmask, other=0.0)  # [*rc]
            both = each + dm
            if SPLIT:
                each += dm * 0.0
                m = tl.load(pooled + (n * ROWS + AVG) * C + rc, mask=cmask, other=0.0)  # [*rc]
                is_pooled = v == m
            else:
                where = tl.load(pool_index + n * C + rc, mask=cmask, other=0).to(tl.int32)  # [*rc]
                is_pooled = rp == where
            out += tl.where(is_pooled, both, each)
        else:
            out += each
        if LP:
            out += v * tl.load(du + (AVG + MAX) * width, mask=cmask, other=0.0)  # [*rc]
        if LSE:
            lse = tl.load(pooled + (n * ROWS + AVG + MAX + LP) * C + rc, mask=cmask, other=0.0)  # [*rc]
            dlse = tl.load(du + (AVG + MAX + LP) * width, mask=cmask, other=0.0)  # [*rc]
            out += tl.exp(v - lse) * dlse
    if RESIDUAL:
        out += upstream
    tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask, eviction_policy="evict_first")  # [*at]


@triton.jit(do_not_specialize=["c_units", "p_units", "blocks", "splits", "split_tiles"])
def input_backward_kernel(
    dy, x, dx, channel_gate, spatial_gate, pooled, pool_index, spatial_pool, spatial_index, dmaps,
    w1, b1, w2, dlogits, hidden_part, dhidden, hidden, my_dhidden, dpooled,
    c_units, p_units, HIDDEN, blocks, splits, split_tiles,
    POOLS: tl.constexpr, SPATIAL: tl.constexpr, SPLIT: tl.constexpr, RESIDUAL: tl.constexpr,
    FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr, CV: tl.constexpr, PV: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, MC: tl.constexpr, HB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """my_dhidden (programs, RUNS, H) and dpooled (programs, ROWS, split_tiles * BC) are each program's own.

    FLAT: one tile of positions, contiguous; elements are taken as they lie in memory, over the ends of rows.
    """
    BLEND: tl.constexpr = POOLS // 16
    ROWS: tl.constexpr = POOLS % 2 + (POOLS // 2) % 2 + (POOLS // 4) % 2 + (POOLS // 8) % 2
    RUNS: tl.constexpr = 1 if BLEND else ROWS
    KP: tl.constexpr = 4 if RUNS == 3 else RUNS
    C = c_units * CV
    P = p_units * PV
    SC = 1 if CHANNELS_LAST else P
    SP = C if CHANNELS_LAST else 1
    tiles = tl.cdiv(P, BP)
    # Backwards through the samples: the first launch read dy forwards, the second left its end in L2.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    split = pid % splits
    tile = (pid // splits) % tiles
    n = (pid // (splits * tiles)).to(tl.int64)
    first = split * split_tiles
    last = tl.minimum(first + split_tiles, tl.cdiv(C, BC))
    width = split_tiles * BC
    if POOLS:
        write = (tile == 0) & (split == 0)
        my_dpooled = dpooled + pid.to(tl.int64) * ROWS * width
        c1 = tl.minimum(first * BC + width, C)
        if w1 is None:
            for c in range(0, C, MC):
                rc = c + tl.arange(0, MC)
                u = tl.sum(load_pooled(pooled + n * ROWS * C, C, rc, rc < C, ROWS, KP, BLEND), 0)  # [MC]
                tl.store(hidden + n * C + rc, u, mask=(rc < C) & write)  # [MC]
            _pools_backward(
                n, w2, dlogits + n * C, pooled, pool_index, my_dpooled, first * BC, c1, width, C, C, P,
                POOLS, SPLIT, True, MC, HB, ACC,
            )  # fmt: skip
        else:
            own = my_dhidden + pid.to(tl.int64) * RUNS * HIDDEN
            _hidden_backward(
                n, pooled, hidden_part, b1, dhidden, own, hidden, C, HIDDEN, blocks, write,
                ROWS, RUNS, KP, HB, ACC,
            )  # fmt: skip
            tl.debug_barrier()
            _pools_backward(
                n, w1, own, pooled, pool_index, my_dpooled, first * BC, c1, width, C, HIDDEN, P,
                POOLS, SPLIT, False, MC, HB, ACC,
            )  # fmt: skip
        tl.debug_barrier()

    if not POOLS:
        my_dpooled = dpooled
    if not SPATIAL:
        s, dmean, dboth, key = 0, 0, 0, 0
    if FLAT:
        # Whole vectors and sectors, where rows of the map would end within them.
        begin = n * C * P + tl.cast(first * BC, tl.int64) * P
        elements = (tl.minimum(first * BC + width, C) - first * BC) * P
        lane = tl.arange(0, BC * BP)
        for t in range(tl.cdiv(elements, BC * BP)):
            i = tl.multiple_of(t * BC * BP, BC * BP)
            rc, rp = channels_and_positions(i, lane, P)
            mask = i + lane < elements
            if SPATIAL:
                s, dmean, dboth, key = _position_terms(
                    n, rp, mask, spatial_gate, spatial_pool, spatial_index, dmaps, P, SPLIT
                )
            _input_gradient(
                dy, x, dx, begin + i + lane, mask, mask, n, first * BC + rc, rp, rc, s, dmean, dboth, key,
                channel_gate, pooled, pool_index, my_dpooled, width, C,
                POOLS, SPATIAL, SPLIT, RESIDUAL, ACC,
            )  # fmt: skip
    else:
        rp = (tile * BP + tl.arange(0, BP))[None, :]
        pmask = rp < P
        row = tl.arange(0, BC)[:, None]
        if SPATIAL:
            s, dmean, dboth, key = _position_terms(
                n, rp, pmask, spatial_gate, spatial_pool, spatial_index, dmaps, P, SPLIT
            )
        corner = n * C * P + rp.to(tl.int64) * SP + row.to(tl.int64) * SC  # [BC, BP]
        for t in range(first, last):
            rc = t * BC + row
            at = corner + tl.cast(tl.multiple_of(t * BC, BC), tl.int64) * SC
            _input_gradient(
                dy, x, dx, at, (rc < C) & pmask, rc < C, n, rc, rp, rc - first * BC, s, dmean, dboth, key,
                channel_gate, pooled, pool_index, my_dpooled, width, C,
                POOLS, SPATIAL, SPLIT, RESIDUAL, ACC,
            )  # fmt: skip
