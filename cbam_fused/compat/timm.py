"""timm's CbamModule, LightCbamModule and SEModule."""

from .base import dialect_class

CbamModule = dialect_class("timm", __name__)
LightCbamModule = dialect_class("timm_light", __name__)
SEModule = dialect_class("timm_se", __name__)

__all__ = ["CbamModule", "LightCbamModule", "SEModule"]
