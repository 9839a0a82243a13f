"""xmu's CBAMBlock (External-Attention-pytorch)."""

from .base import dialect_class

CBAMBlock = dialect_class("xmu", __name__)

__all__ = ["CBAMBlock"]
