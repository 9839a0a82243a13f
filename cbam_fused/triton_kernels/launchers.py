"""The ops of this backend and their registration."""

from __future__ import annotations

from typing import Any, Callable, Dict

import torch

from .._ops import SCHEMAS, namespace
from . import configurations
from .launch_backward import attention_backward, cbam_backward, scale_backward
from .launch_forward import attention_forward, cbam_forward, cbam_inference, scale_forward

OPS: Dict[str, Callable[..., Any]] = {
    "cbam_inference": cbam_inference,
    "cbam_forward": cbam_forward,
    "cbam_backward": cbam_backward,
    "attention_forward": attention_forward,
    "attention_backward": attention_backward,
    "scale_forward": scale_forward,
    "scale_backward": scale_backward,
}
assert OPS.keys() == SCHEMAS.keys()


def register() -> None:
    """Implements the ops of this backend's namespace; once a process."""
    keys = ("CUDA", "CPU") if configurations.interpreting() else ("CUDA",)
    for name, implementation in OPS.items():
        for key in keys:
            torch.library.impl(f"{namespace('triton')}::{name}", key, implementation)
