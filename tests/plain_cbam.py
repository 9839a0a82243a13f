"""The dialects of CBAM in plain PyTorch, written from their documented facts, as `fuse` would meet them.

They share nothing with cbam_fused: they are what its dialect classes are measured against where the
original is in no package index.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Official(nn.Module):
    """Jongchan/attention-module: Linear MLP with bias, max before mean, BatchNorm with momentum 0.01."""

    class Channel(nn.Module):
        def __init__(self, channels, ratio, pool_types):
            super().__init__()
            hidden = channels // ratio
            self.mlp = nn.Sequential(
                nn.Flatten(), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
            )
            self.pool_types = pool_types

        def forward(self, x):
            size = x.shape[2:]
            logits = 0
            for name in self.pool_types:
                if name == "avg":
                    pooled = F.avg_pool2d(x, size, stride=size)
                elif name == "max":
                    pooled = F.max_pool2d(x, size, stride=size)
                elif name == "lp":
                    pooled = F.lp_pool2d(x, 2, size, stride=size)
                else:
                    pooled = x.flatten(2).logsumexp(2, keepdim=True)
                logits = logits + self.mlp(pooled)
            return x * torch.sigmoid(logits)[:, :, None, None]

    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
            self.bn = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01)

        def forward(self, x):
            return self.bn(self.conv(x))

    class Spatial(nn.Module):
        def __init__(self):
            super().__init__()
            self.spatial = Official.Conv()

        def forward(self, x):
            q = torch.cat([x.max(1)[0].unsqueeze(1), x.mean(1).unsqueeze(1)], 1)
            return x * torch.sigmoid(self.spatial(q))

    def __init__(self, gate_channels, reduction_ratio=16, pool_types=("avg", "max"), no_spatial=False):
        super().__init__()
        self.ChannelGate = Official.Channel(gate_channels, reduction_ratio, pool_types)
        if not no_spatial:
            self.SpatialGate = Official.Spatial()
        self.no_spatial = no_spatial

    def forward(self, x):
        x = self.ChannelGate(x)
        return x if self.no_spatial else self.SpatialGate(x)


def _pools(x):
    return F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)


def _mean_max(x):
    return torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)


class LuuuyiChannel(nn.Module):
    """luuuyi's channel mask; the ratio is ignored."""

    def __init__(self, in_planes, ratio=16):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.max_pool = nn.AdaptiveMaxPool2d(1)
        self.fc = nn.Sequential(
            nn.Conv2d(in_planes, in_planes // 16, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(in_planes // 16, in_planes, 1, bias=False),
        )
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return self.sigmoid(self.fc(self.avg_pool(x)) + self.fc(self.max_pool(x)))


class LuuuyiChannel2018(nn.Module):
    """The 2018 form, with the two convolutions as attributes."""

    def __init__(self, in_planes, ratio=16, hidden=None):
        super().__init__()
        hidden = in_planes // 16 if hidden is None else hidden
        self.fc1 = nn.Conv2d(in_planes, hidden, 1, bias=False)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Conv2d(hidden, in_planes, 1, bias=False)

    def forward(self, x):
        avg, top = _pools(x)
        return torch.sigmoid(self.fc2(self.relu1(self.fc1(avg))) + self.fc2(self.relu1(self.fc1(top))))


class LuuuyiSpatial(nn.Module):
    """luuuyi's spatial mask."""

    def __init__(self, kernel_size=7):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return self.sigmoid(self.conv1(_mean_max(x)))


class Luuuyi(nn.Module):
    """The two masks multiplied in, as its residual blocks do."""

    channel = LuuuyiChannel

    def __init__(self, in_planes, ratio=16, kernel_size=7):
        super().__init__()
        self.ca = self.channel(in_planes, ratio)
        self.sa = LuuuyiSpatial(kernel_size)

    def forward(self, x):
        x = self.ca(x) * x
        return self.sa(x) * x


class Luuuyi2018(Luuuyi):
    channel = LuuuyiChannel2018


class Bubbliiiing(nn.Module):
    """bubbliiiing's cbam_block."""

    def __init__(self, channel, ratio=8, kernel_size=7):
        super().__init__()
        self.channelattention = LuuuyiChannel2018(channel, hidden=channel // ratio)
        self.spatialattention = LuuuyiSpatial(kernel_size)

    def forward(self, x):
        x = x * self.channelattention(x)
        return x * self.spatialattention(x)


class Xmu(nn.Module):
    """xmu's CBAMBlock: max before mean, a bias in the convolution, x added at the end."""

    class Channel(nn.Module):
        def __init__(self, channel, reduction):
            super().__init__()
            self.se = nn.Sequential(
                nn.Conv2d(channel, channel // reduction, 1, bias=False),
                nn.ReLU(),
                nn.Conv2d(channel // reduction, channel, 1, bias=False),
            )

        def forward(self, x):
            avg, top = _pools(x)
            return torch.sigmoid(self.se(top) + self.se(avg))

    class Spatial(nn.Module):
        def __init__(self, kernel_size):
            super().__init__()
            self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2)

        def forward(self, x):
            top, _ = torch.max(x, dim=1, keepdim=True)
            return torch.sigmoid(self.conv(torch.cat([top, x.mean(1, keepdim=True)], 1)))

    def __init__(self, channel=512, reduction=16, kernel_size=49):
        super().__init__()
        self.ca = Xmu.Channel(channel, reduction)
        self.sa = Xmu.Spatial(kernel_size)

    def forward(self, x):
        out = x * self.ca(x)
        out = out * self.sa(out)
        return out + x


class Peachypie98(nn.Module):
    """Peachypie98's CBAM: Linear MLP with bias, max before mean, no BatchNorm, x added at the end."""

    class CAM(nn.Module):
        def __init__(self, channels, r):
            super().__init__()
            self.linear = nn.Sequential(
                nn.Linear(channels, channels // r), nn.ReLU(inplace=True), nn.Linear(channels // r, channels)
            )

        def forward(self, x):
            avg, top = (p.flatten(1) for p in _pools(x))
            return torch.sigmoid(self.linear(top) + self.linear(avg))[:, :, None, None] * x

    class SAM(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

        def forward(self, x):
            q = torch.cat([torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)], 1)
            return torch.sigmoid(self.conv(q)) * x

    def __init__(self, channels, r):
        super().__init__()
        self.cam = Peachypie98.CAM(channels, r)
        self.sam = Peachypie98.SAM()

    def forward(self, x):
        return self.sam(self.cam(x)) + x


class Elbuco1(nn.Module):
    """elbuco1's CBAM: a Linear bottleneck with bias, max before mean, a bias in the convolution."""

    class Channel(nn.Module):
        def __init__(self, channels, ratio):
            super().__init__()
            hidden = int(channels / ratio)
            self.bottleneck = nn.Sequential(
                nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
            )

        def forward(self, x):
            avg, top = (p.reshape(p.shape[0], -1) for p in _pools(x))
            gate = torch.sigmoid(self.bottleneck(avg) + self.bottleneck(top))
            return x * gate[:, :, None, None]

    class Spatial(nn.Module):
        def __init__(self, kernel_size):
            super().__init__()
            self.conv = nn.Conv2d(2, 1, kernel_size, padding=(kernel_size - 1) // 2)

        def forward(self, x):
            q = torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], 1)
            return x * torch.sigmoid(self.conv(q))

    def __init__(self, n_channels_in, reduction_ratio, kernel_size):
        super().__init__()
        self.channel_attention = Elbuco1.Channel(n_channels_in, reduction_ratio)
        self.spatial_attention = Elbuco1.Spatial(kernel_size)

    def forward(self, x):
        return self.spatial_attention(self.channel_attention(x))


class ConvModule(nn.Module):
    """A convolution named `conv` with an optional activation, as mmcv has it."""

    def __init__(self, inputs, outputs, kernel_size, act):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2)
        self.activate = act

    def forward(self, x):
        x = self.conv(x)
        return x if self.activate is None else self.activate(x)


class Mmyolo(nn.Module):
    """mmyolo's CBAM: 1x1 convolutions with bias, mean before max, a bias in the convolution."""

    class Channel(nn.Module):
        def __init__(self, channels, ratio):
            super().__init__()
            hidden = int(channels / ratio)
            self.fc = nn.Sequential(
                ConvModule(channels, hidden, 1, nn.ReLU()), ConvModule(hidden, channels, 1, None)
            )
            self.sigmoid = nn.Sigmoid()

        def forward(self, x):
            avg, top = _pools(x)
            return self.sigmoid(self.fc(avg) + self.fc(top))

    class Spatial(nn.Module):
        def __init__(self, kernel_size):
            super().__init__()
            self.conv = ConvModule(2, 1, kernel_size, nn.Sigmoid())

        def forward(self, x):
            return self.conv(_mean_max(x))

    def __init__(self, in_channels, reduce_ratio=16, kernel_size=7):
        super().__init__()
        self.channel_attention = Mmyolo.Channel(in_channels, reduce_ratio)
        self.spatial_attention = Mmyolo.Spatial(kernel_size)

    def forward(self, x):
        x = self.channel_attention(x) * x
        return self.spatial_attention(x) * x
