"""Second launch of the backward: the convolution's backward and what x adds to the channel gate's gradient.

Reads x (S bytes). A program owns a tile of positions: it gathers the gradient of both maps there
from dz, keeps it for the last launch, and walks over the channels with it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import convolve_transposed, folded_norm


@triton.jit(do_not_specialize=["c_units", "p_units", "D", "H", "W"])
def attention_backward_kernel(
    x, channel_gate, spatial_pool, spatial_index, dz, dmaps, dgate_part,
    conv_weight, bn_weight, bn_bias, bn_mean, bn_var, c_units, p_units, D, H, W,
    BN_EPS: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SPATIAL: tl.constexpr, SPLIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, CV: tl.constexpr, PV: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dmaps (N, 2, P): what each maximum and each element of a column receives. dgate_part (N, tiles, C)."""
    C = c_units * CV
    P = p_units * PV
    SC = 1 if CHANNELS_LAST else P
    SP = C if CHANNELS_LAST else 1
    tiles = tl.cdiv(P, BP)
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64)
    rp = (pid % tiles) * BP + tl.arange(0, BP)
    pmask = rp < P
    dpeak, dmean = convolve_transposed(
        dz + n * P, conv_weight, rp, pmask, D, H, W, KD, KH, KW, SPATIAL == 2, SPATIAL == 3, ACC, BP
    )
    scale, _, _, _ = folded_norm(bn_weight, bn_bias, bn_mean, bn_var, BN_EPS, ACC)
    dpeak *= scale
    dmean *= scale / C.to(ACC)
    found = tl.load(spatial_index + n * P + rp, mask=pmask, other=1).to(tl.int32)  # [BP]
    if SPLIT:
        dpeak = dpeak / found.to(ACC)
        peak = tl.load(spatial_pool + n * 2 * P + rp, mask=pmask, other=0.0)  # [BP]
    tl.store(dmaps + n * 2 * P + rp, dpeak, mask=pmask)  # [BP]
    tl.store(dmaps + n * 2 * P + P + rp, dmean, mask=pmask)  # [BP]
    if dgate_part is not None:
        columns = x + n * C * P + rp.to(tl.int64)[None, :] * SP  # [1, BP]
        for t in range(tl.cdiv(C, BC)):
            rc = t * BC + tl.arange(0, BC)
            cmask = rc < C
            mask = cmask[:, None] & pmask[None, :]
            v = tl.load(columns + rc.to(tl.int64)[:, None] * SC, mask=mask, other=0.0).to(ACC)  # [BC, BP]
            if SPLIT:
                g = tl.load(channel_gate + n * C + rc, mask=cmask, other=0.0)  # [BC]
                is_peak = v * g[:, None] == peak[None, :]
            else:
                is_peak = rc[:, None] == found[None, :]
            through = v * (dmean[None, :] + tl.where(is_peak, dpeak[None, :], 0.0))
            # Padded columns hold 0 * whatever dmean is there: keep an infinity out of the sum.
            through = tl.where(mask, through, 0.0)
            tl.store(dgate_part + pid.to(tl.int64) * C + rc, tl.sum(through, 1), mask=cmask)  # [BC]
