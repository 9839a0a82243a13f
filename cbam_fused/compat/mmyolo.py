"""mmyolo's CBAM."""

from .base import dialect_class

CBAM = dialect_class("mmyolo", __name__)

__all__ = ["CBAM"]
