"""Peachypie98's CBAM."""

from .base import dialect_class

CBAM = dialect_class("peachypie98", __name__)

__all__ = ["CBAM"]
