"""cbam_fused: CBAM (Convolutional Block Attention Module) as fused kernels, for training and inference."""

from . import _ops, visualize  # noqa: F401  _ops defines what the backends implement
from ._backends import backends
from .compat import to_dialect
from .functional import cbam
from .fuse import fuse, unfuse
from .module import ChannelGate, FusedCBAM, SpatialGate

__version__ = "0.1.0"
__all__ = ["ChannelGate", "FusedCBAM", "SpatialGate", "backends", "cbam", "fuse", "to_dialect", "unfuse"]
