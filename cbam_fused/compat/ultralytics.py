"""Ultralytics' CBAM and its two halves."""

from .base import dialect_class

CBAM = dialect_class("ultralytics", __name__)
ChannelAttention = dialect_class("ultralytics_channel", __name__)
SpatialAttention = dialect_class("ultralytics_spatial", __name__)

__all__ = ["CBAM", "ChannelAttention", "SpatialAttention"]
