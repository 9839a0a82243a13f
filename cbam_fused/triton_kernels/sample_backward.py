"""Third launch of the backward: everything small that one sample needs, each job on its own program.

Jobs of the MLP take a block of channels each, of one sample or of a few, for which a tile of the weights is
then read once: the gate's gradient from its partial sums, where there is more than one, and the block's share
of the hidden layer's. A job that has all channels of its samples ends the MLP's backward
itself; else the next launch does. Jobs of the convolution take a segment of positions each: they correlate dz
with the maps for every tap, and sum dz for the biases and the norm. Nothing here reads a tensor of x's size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .conv_backward import norm_backward, taps_backward
from .device_functions import sum_parts
from .mlp_backward import hidden_backward, pool_gradients, through_layer


@triton.jit
def _gate_backward(
    n0, samples, block, blocks, block_tiles, pooled, pool_index, channel_gate, hidden, dgate_a, dgate_b, w1, w2,
    dlogits, hidden_part, my_dhidden, dpooled, C, H, P, tiles_a, tiles_b,
    POOLS: tl.constexpr, SPLIT: tl.constexpr,
    MC: tl.constexpr, HB: tl.constexpr, GB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dlogits of a block of channels, and its share [H] of W2^T dlogits, sample by sample.

    hidden None: the gate has one layer. dpooled None: the block is not the only one, and the rest is left to the
    next launch.
    """
    AVG: tl.constexpr = POOLS % 2
    MAX: tl.constexpr = (POOLS // 2) % 2
    LP: tl.constexpr = (POOLS // 4) % 2
    LSE: tl.constexpr = (POOLS // 8) % 2
    BLEND: tl.constexpr = POOLS // 16
    ROWS: tl.constexpr = AVG + MAX + LP + LSE
    RUNS: tl.constexpr = 1 if BLEND else ROWS
    KP: tl.constexpr = 4 if RUNS == 3 else RUNS
    c0 = block * block_tiles * MC
    c1 = tl.minimum(c0 + block_tiles * MC, C)
    # None: the launch before had every part of these sums in one program, and left dlogits.
    if dgate_a is not None:
        for g in range(samples):
            n = n0 + g
            for c in range(c0, c1, MC):
                rc = c + tl.arange(0, MC)
                cmask = rc < c1
                dg = tl.sum(sum_parts(dgate_a + n * tiles_a * C, tiles_a, 1, C, rc, 1, MC, ACC), 0)  # [MC]
                if dgate_b is not None:
                    dg += tl.sum(
                        sum_parts(dgate_b + n * tiles_b * C, tiles_b, 1, C, rc, 1, MC, ACC), 0
                    )  # [MC]
                gate = tl.load(channel_gate + n * C + rc, mask=cmask, other=0.0)  # [MC]
                tl.store(dlogits + n * C + rc, dg * gate * (1.0 - gate), mask=cmask)  # [MC]
        tl.debug_barrier()
    if hidden is not None:
        rg = tl.arange(0, GB)
        dl_row = dlogits + n0 * C + rg[:, None] * C
        part = hidden_part + ((n0 + rg) * blocks + block) * H
        for h in range(0, H, HB):
            rh = h + tl.arange(0, HB)
            hmask = rh < H
            through = tl.zeros([GB, HB], ACC)
            for c in range(c0, c1, MC):
                rc = c + tl.arange(0, MC)
                cmask = rc < c1
                dl = tl.load(
                    dl_row + rc[None, :], mask=(rg < samples)[:, None] & cmask[None, :], other=0.0
                )  # [GB, MC]
                at = rc.to(tl.int64)[None, :] * H + rh[:, None]
                w = tl.load(w2 + at, mask=hmask[:, None] & cmask[None, :], other=0.0).to(ACC)  # [HB, MC]
                through += tl.sum(w[None, :, :] * dl[:, None, :], 2)
            mask = (rg < samples)[:, None] & hmask[None, :]
            tl.store(part[:, None] + rh[None, :], through, mask=mask)  # [GB, HB]
    if dpooled is not None:
        if hidden is not None:
            tl.debug_barrier()
            for g in range(samples):
                n = n0 + g
                hidden_backward(
                    n, hidden_part, hidden, my_dhidden + n * RUNS * H, None, H, 1, True, RUNS, KP, HB, ACC
                )
        tl.debug_barrier()
        for c in range(0, C, MC):
            rc = c + tl.arange(0, MC)
            cmask = rc < C
            if hidden is None:
                du = through_layer(
                    w2, dlogits + n0 * C, None, samples, C, C, rc, cmask, True, RUNS, KP, GB, HB, MC, ACC
                )
            else:
                du = through_layer(
                    w1, my_dhidden + n0 * RUNS * H, None, samples, H, C, rc, cmask,
                    False, RUNS, KP, GB, HB, MC, ACC,
                )  # fmt: skip
            for g in range(samples):
                da, dm, dn, dlse = pool_gradients(
                    du, g * KP, n0 + g, rc, cmask, pooled, pool_index, C, P, POOLS, SPLIT, GB * KP
                )
                at = dpooled + (n0 + g) * ROWS * C + rc
                if AVG:
                    tl.store(at, da, mask=cmask)  # [MC]
                if MAX:
                    tl.store(at + AVG * C, dm, mask=cmask)  # [MC]
                if LP:
                    tl.store(at + (AVG + MAX) * C, dn, mask=cmask)  # [MC]
                if LSE:
                    tl.store(at + (AVG + MAX + LP) * C, dlse, mask=cmask)  # [MC]


@triton.jit(
    do_not_specialize=[
        "N",
        "P",
        "D",
        "H",
        "W",
        "blocks",
        "segments",
        "segment_tiles",
        "tiles_a",
        "tiles_b",
        "block_tiles",
    ]
)
def sample_backward_kernel(
    pooled, pool_index, channel_gate, spatial_pool, hidden, dz, dgate_a, dgate_b,
    w1, w2, conv_weight, conv_bias, bn_weight, bn_bias, bn_mean, bn_var,
    dlogits, hidden_part, my_dhidden, dpooled, dtaps, dnorm,
    C, HIDDEN, N, P, D, H, W, blocks, segments, segment_tiles, tiles_a, tiles_b, block_tiles,
    BN_EPS: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    POOLS: tl.constexpr, SPATIAL: tl.constexpr, SPLIT: tl.constexpr,
    MC: tl.constexpr, HB: tl.constexpr, GB: tl.constexpr, TB: tl.constexpr, BQ: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dtaps (N, segments, planes * taps), dnorm (N, segments, 2), hidden_part (N, blocks, H).

    The first programs are the jobs of the MLP, by groups of GB samples, and the others those of the convolution.
    """
    job = tl.program_id(0)
    if POOLS:
        jobs = tl.cdiv(N, GB) * blocks
        if job < jobs:
            n0 = (job // blocks).to(tl.int64) * GB
            _gate_backward(
                n0, tl.minimum(N - n0, GB).to(tl.int32), job % blocks, blocks, block_tiles,
                pooled, pool_index, channel_gate, hidden, dgate_a, dgate_b, w1, w2, dlogits,
                hidden_part, my_dhidden, dpooled, C, HIDDEN, P, tiles_a, tiles_b, POOLS, SPLIT, MC, HB, GB, ACC,
            )  # fmt: skip
        job -= jobs
    if SPATIAL:
        TAPS: tl.constexpr = KD * KH * KW
        PLANES: tl.constexpr = 1 if SPATIAL == 3 else 2
        if job >= 0:
            # One job has all taps of its segment: the maps and dz then come from L1 but for the first time.
            n = (job // segments).to(tl.int64)
            segment = job % segments
            p0 = segment * segment_tiles * BQ
            p1 = tl.minimum(p0 + segment_tiles * BQ, P)
            row = n * segments + segment
            for first in range(0, TAPS, TB):
                taps_backward(
                    n, first, p0, p1, spatial_pool, dz, dtaps + row * PLANES * TAPS, P, D, H, W,
                    KD, KH, KW, SPATIAL, TB, BQ, ACC,
                )  # fmt: skip
            norm_backward(
                n, p0, p1, spatial_pool, dz, conv_weight, conv_bias, bn_weight, bn_bias, bn_mean, bn_var,
                dnorm + row * 2, P, D, H, W, BN_EPS, KD, KH, KW, SPATIAL, BQ, ACC,
            )  # fmt: skip
