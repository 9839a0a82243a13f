"""luuuyi/CBAM.PyTorch: the two masks, whose caller multiplies, and the pair fused into one block."""

from .base import dialect_class

CBAM = dialect_class("luuuyi", __name__)
CBAM2018 = dialect_class("luuuyi2018", __name__)
ChannelAttention = dialect_class("luuuyi_channel", __name__)
ChannelAttention2018 = dialect_class("luuuyi2018_channel", __name__)
SpatialAttention = dialect_class("luuuyi_spatial", __name__)

__all__ = ["CBAM", "CBAM2018", "ChannelAttention", "ChannelAttention2018", "SpatialAttention"]
