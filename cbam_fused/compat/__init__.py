"""Drop-in classes for the CBAM implementations in use, one module a dialect.

Each class has its source's constructor and state_dict and runs on the fused kernels:
`from cbam_fused.compat.timm import CbamModule`. The table of dialects is `compat.dialects`.
"""

from . import (
    bubbliiiing,
    elbuco1,
    luuuyi,
    mmyolo,
    official,
    peachypie98,
    pytorchcv,
    timm,
    torchvision,
    ultralytics,
    xmu,
)
from .convert import to_dialect

__all__ = [
    "bubbliiiing",
    "elbuco1",
    "luuuyi",
    "mmyolo",
    "official",
    "peachypie98",
    "pytorchcv",
    "timm",
    "to_dialect",
    "torchvision",
    "ultralytics",
    "xmu",
]
