"""First launch of the backward: from dy and x, both gates' gradients through y = x * g * s.

Reads x and dy (2 S bytes). A program owns a tile of positions and walks over all channels, so the
sum over channels, and with it dz, is complete; the sum over positions leaves one partial a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["c_units", "p_units"])
def scale_backward_kernel(
    dy, x, channel_gate, spatial_gate, dz, dgate_part, c_units, p_units,
    CHANNELS_LAST: tl.constexpr, CV: tl.constexpr, PV: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz (N, P) is the gradient of the logits; dgate_part (N, tiles, C). Either may be None."""
    C = c_units * CV
    P = p_units * PV
    SC = 1 if CHANNELS_LAST else P
    SP = C if CHANNELS_LAST else 1
    tiles = tl.cdiv(P, BP)
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64)
    rp = (pid % tiles) * BP + tl.arange(0, BP)
    pmask = rp < P
    at = n * C * P + rp.to(tl.int64)[None, :] * SP
    if spatial_gate is not None:
        s = tl.load(spatial_gate + n * P + rp, mask=pmask, other=0.0)  # [BP]
        ds = tl.zeros([BC, BP], ACC)
    for t in range(tl.cdiv(C, BC)):
        rc = t * BC + tl.arange(0, BC)
        cmask = rc < C
        mask = cmask[:, None] & pmask[None, :]
        offsets = at + rc.to(tl.int64)[:, None] * SC
        v = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)  # [BC, BP]
        v *= tl.load(dy + offsets, mask=mask, other=0.0).to(ACC)  # [BC, BP]
        if spatial_gate is not None:
            if channel_gate is not None:
                g = tl.load(channel_gate + n * C + rc, mask=cmask, other=0.0)  # [BC]
                ds += v * g[:, None]
            else:
                ds += v
            v *= s[None, :]
        if dgate_part is not None:
            tl.store(dgate_part + pid.to(tl.int64) * C + rc, tl.sum(v, 1), mask=cmask)  # [BC]
    if spatial_gate is not None:
        tl.store(dz + n * P + rp, tl.sum(ds, 0) * s * (1.0 - s), mask=pmask)  # [BP]
