"""The options of one call as small integers, shared by the ops, the reference and every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional

from torch import Tensor

# Channel pools, a bit each, in the order in which the rows of `pooled` are stored.
AVG, MAX, LP, LSE = 1, 2, 4, 8
POOL_BITS = {"avg": AVG, "max": MAX, "lp": LP, "lse": LSE}
# Added to AVG | MAX: one MLP pass on 0.5 * avg + 0.5 * max (timm's LightChannelAttn).
BLEND = 16

# What the spatial gate's convolution reads: nothing, two maps in one of two orders, or their mean.
SPATIAL_NONE, SPATIAL_MAX_MEAN, SPATIAL_MEAN_MAX, SPATIAL_BLEND = 0, 1, 2, 3
SPATIAL_ORDERS = {"max_mean": SPATIAL_MAX_MEAN, "mean_max": SPATIAL_MEAN_MAX}

# Where the gradient of a maximum goes: to the first index, or shared evenly among equals.
TIES_FIRST, TIES_SPLIT = 0, 1
TIES = {"first": TIES_FIRST, "split": TIES_SPLIT}


class Parameters(NamedTuple):
    """The learnt tensors of a CBAM without its norm; every field may be None.

    w1 (h, C), b1 (h), w2 (C, h), b2 (C); without w1 the gate is one layer and w2 is (C, C).
    conv_weight (1, 2, *k), or (1, 1, *k) for SPATIAL_BLEND; conv_bias (1).
    """

    w1: Optional[Tensor] = None
    b1: Optional[Tensor] = None
    w2: Optional[Tensor] = None
    b2: Optional[Tensor] = None
    conv_weight: Optional[Tensor] = None
    conv_bias: Optional[Tensor] = None


@dataclass(frozen=True)
class Config:
    """pools: bits above, 0 for no channel gate; spatial: SPATIAL_*; ties: TIES_*."""

    pools: int = AVG | MAX
    spatial: int = SPATIAL_MAX_MEAN
    ties: int = TIES_FIRST
    residual: bool = False
