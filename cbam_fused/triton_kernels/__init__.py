"""Triton kernels of the ops, forward and backward, for NVIDIA and AMD GPUs.

Importing this package does not import Triton. Files: `configurations` (launch table), `problem` (sizes
and layouts of a call), `launchers` (the ops), and a file a kernel, in the order in which they run.
"""

from __future__ import annotations

import math
from typing import Optional

from torch import Tensor

from .. import _backends
from .._config import Config
from . import configurations

_registered = False


def load() -> Optional[str]:
    """Registers the ops; returns None if they can run on this machine, or the reason why not."""
    global _registered
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import: {error}"
    reason = configurations.reason_unusable()
    if reason is None and not _registered:
        from . import launchers

        launchers.register()
        _registered = True
    return reason


def covers(x: Tensor, config: Config) -> Optional[str]:
    """None if the kernels take this call, or the limit that it breaks."""
    if x.dtype not in _backends.DTYPES:
        return f"x must have dtype float32, float64, bfloat16 or float16, got {x.dtype}"
    if x.dim() not in (3, 4, 5):
        return f"x must have one to three spatial dimensions, got shape {tuple(x.shape)}"
    if math.prod(x.shape[2:]) >= 2**31 or x.shape[1] >= 2**31:
        return f"channels and positions are indexed in 32 bits, got shape {tuple(x.shape)}"
    return None


__all__ = ["covers", "load"]
