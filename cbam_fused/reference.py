"""The specification: CBAM in plain PyTorch, against which every backend is checked.

Source of the method: Woo, Park, Lee and Kweon, "CBAM: Convolutional Block Attention Module",
ECCV 2018, arXiv:1807.06521.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _config as cfg
from ._config import Config, Parameters

CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def maximum_reference(x: Tensor, dim: int, ties: int) -> Tensor:
    """Maximum over `dim`; its gradient goes to the first index, or evenly to all equals."""
    return x.amax(dim) if ties == cfg.TIES_SPLIT else x.max(dim).values


def channel_gate_reference(x: Tensor, p: Parameters, c: Config) -> Tensor:
    """x (N, C, *spatial) -> channel gate (N, C)."""
    rows = x.flatten(2)  # (N, C, P)
    pooled = []
    if c.pools & cfg.AVG:
        pooled.append(rows.mean(2))
    if c.pools & cfg.MAX:
        pooled.append(maximum_reference(rows, 2, c.ties))
    if c.pools & cfg.LP:
        pooled.append(torch.linalg.vector_norm(rows, 2, dim=2))
    if c.pools & cfg.LSE:
        pooled.append(torch.logsumexp(rows, 2))
    if c.pools & cfg.BLEND:
        pooled = [0.5 * pooled[0] + 0.5 * pooled[1]]
    assert p.w2 is not None
    logits: Any = 0
    for u in pooled:
        hidden = u if p.w1 is None else torch.relu(F.linear(u, p.w1, p.b1))
        logits = logits + F.linear(hidden, p.w2, p.b2)
    return torch.sigmoid(logits)


def spatial_logits_reference(gated: Tensor, p: Parameters, c: Config) -> Tensor:
    """Gated x (N, C, *spatial) -> spatial logits before the norm (N, 1, *spatial)."""
    q_max = maximum_reference(gated, 1, c.ties)
    q_mean = gated.mean(1)
    if c.spatial == cfg.SPATIAL_BLEND:
        q = (0.5 * q_mean + 0.5 * q_max).unsqueeze(1)
    else:
        q = torch.stack([q_max, q_mean] if c.spatial == cfg.SPATIAL_MAX_MEAN else [q_mean, q_max], 1)
    assert p.conv_weight is not None
    padding = [k // 2 for k in p.conv_weight.shape[2:]]
    return CONV[gated.dim()](q, p.conv_weight, p.conv_bias, padding=padding)


def cbam_reference(x: Tensor, p: Parameters, c: Config, norm: Optional[Callable] = None) -> Tensor:
    """x (N, C, *spatial) -> y of the same shape; `norm` is applied to the spatial logits."""
    y = x
    if c.pools:
        y = x * channel_gate_reference(x, p, c).reshape(x.shape[:2] + (1,) * (x.dim() - 2))
    if c.spatial:
        z = spatial_logits_reference(y, p, c)
        y = y * torch.sigmoid(z if norm is None else norm(z))
    return y + x if c.residual else y
