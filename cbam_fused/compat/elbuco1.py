"""elbuco1's CBAM."""

from .base import dialect_class

CBAM = dialect_class("elbuco1", __name__)

__all__ = ["CBAM"]
