"""First launch of the backward: from dy and x, both gates' gradients through y = x * g * s.

Reads x and dy (2 S bytes). A program owns a tile of positions and a range of channels: all of them,
so that the sum over channels, and with it dz, is complete; or for small maps a share, which the
second launch sums. The sum over positions leaves one partial a tile. Where a norm in training comes before
the second launch, a small one of its own ends both sums.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["c_units", "p_units", "splits", "split_tiles"])
def scale_backward_kernel(
    dy, x, channel_gate, spatial_gate, dz, ds_part, dgate_part, c_units, p_units, splits, split_tiles,
    CHANNELS_LAST: tl.constexpr, CV: tl.constexpr, PV: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz (N, P) is the gradient of the logits, or ds_part (N, splits, P) of the gate; dgate_part (N, tiles, C)."""
    C = c_units * CV
    P = p_units * PV
    SC = 1 if CHANNELS_LAST else P
    SP = C if CHANNELS_LAST else 1
    tiles = tl.cdiv(P, BP)
    pid = tl.program_id(0)
    split = pid % splits
    tile = (pid // splits) % tiles
    n = (pid // (splits * tiles)).to(tl.int64)
    rp = tile * BP + tl.arange(0, BP)
    pmask = rp < P
    row = tl.arange(0, BC)
    corner = n * C * P + rp.to(tl.int64)[None, :] * SP + row.to(tl.int64)[:, None] * SC  # [BC, BP]
    if spatial_gate is not None:
        s = tl.load(spatial_gate + n * P + rp, mask=pmask, other=0.0)  # [BP]
        ds = tl.zeros([BC, BP], ACC)
    for t in range(split * split_tiles, tl.minimum((split + 1) * split_tiles, tl.cdiv(C, BC))):
        rc = t * BC + row
        cmask = rc < C
        mask = cmask[:, None] & pmask[None, :]
        at = corner + tl.cast(tl.multiple_of(t * BC, BC), tl.int64) * SC
        v = tl.load(x + at, mask=mask, other=0.0).to(ACC)  # [BC, BP]
        v *= tl.load(dy + at, mask=mask, other=0.0).to(ACC)  # [BC, BP]
        if spatial_gate is not None:
            if channel_gate is not None:
                g = tl.load(channel_gate + n * C + rc, mask=cmask, other=0.0)  # [BC]
                ds += v * g[:, None]
            else:
                ds += v
            v *= s[None, :]
        if dgate_part is not None:
            tl.store(dgate_part + (n * tiles + tile) * C + rc, tl.sum(v, 1), mask=cmask)  # [BC]
    if spatial_gate is not None:
        total = tl.sum(ds, 0)
        if ds_part is None:
            tl.store(dz + n * P + rp, total * s * (1.0 - s), mask=pmask)  # [BP]
        else:
            tl.store(ds_part + (n * splits + split) * P + rp, total, mask=pmask)  # [BP]


@triton.jit
def _sum_of_rows(rows, count, width, at, RB: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr):
    """Of rows (count, width), the columns `at`, in an order that depends on nothing else."""
    acc = tl.zeros([RB, B], ACC)
    for first in range(0, count, RB):
        row = first + tl.arange(0, RB)
        mask = (row < count)[:, None] & (at < width)[None, :]
        acc += tl.load(
            rows + row.to(tl.int64)[:, None] * width + at[None, :], mask=mask, other=0.0
        )  # [RB, B]
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["P", "C", "splits", "tiles"])
def scale_backward_sums_kernel(
    ds_part, spatial_gate, dz, dgate_part, dgate, P, C, splits, tiles,
    RB: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz (N, P) from ds_part (N, splits, P), and dgate (N, C) from dgate_part (N, tiles, C), or one of them."""
    maps = 0 if ds_part is None else tl.cdiv(P, B)
    vectors = 0 if dgate_part is None else tl.cdiv(C, B)
    pid = tl.program_id(0)
    n = (pid // (maps + vectors)).to(tl.int64)
    block = pid % (maps + vectors)
    if ds_part is not None:
        if block < maps:
            rp = block * B + tl.arange(0, B)
            total = _sum_of_rows(ds_part + n * splits * P, splits, P, rp, RB, B, ACC)
            s = tl.load(spatial_gate + n * P + rp, mask=rp < P, other=0.0)  # [B]
            tl.store(dz + n * P + rp, total * s * (1.0 - s), mask=rp < P)  # [B]
    if dgate_part is not None:
        if block >= maps:
            rc = (block - maps) * B + tl.arange(0, B)
            total = _sum_of_rows(dgate_part + n * tiles * C, tiles, C, rc, RB, B, ACC)
            tl.store(dgate + n * C + rc, total, mask=rc < C)  # [B]
