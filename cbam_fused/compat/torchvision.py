"""torchvision's SqueezeExcitation."""

from .base import dialect_class

SqueezeExcitation = dialect_class("torchvision_se", __name__)

__all__ = ["SqueezeExcitation"]
