"""pytorchcv's CbamBlock."""

from .base import dialect_class

CbamBlock = dialect_class("pytorchcv", __name__)

__all__ = ["CbamBlock"]
