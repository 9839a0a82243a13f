"""The official implementation's CBAM (Jongchan/attention-module)."""

from .base import dialect_class

CBAM = dialect_class("official", __name__)

__all__ = ["CBAM"]
