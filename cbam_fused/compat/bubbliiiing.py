"""bubbliiiing's cbam_block, copied in many YOLO repositories."""

from .base import dialect_class

cbam_block = dialect_class("bubbliiiing", __name__)

__all__ = ["cbam_block"]
