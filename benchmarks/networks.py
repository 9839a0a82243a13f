"""The networks that train.py trains, and the twin of each with FusedCBAM in place of the plain one."""

from __future__ import annotations

import copy

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import KEYS, EagerCBAM, load_weights, tensor_at
from cbam_fused import FusedCBAM


class SmallCNN(nn.Module):
    """conv(3 -> 16), CBAM, fc, as CBAM tutorials show it; (N, 3, size, size) -> (N, classes)."""

    def __init__(self, size: int, classes: int = 10):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.attention = EagerCBAM(16)
        self.fc = nn.Linear(16 * size * size, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(F.relu(self.conv(x))).flatten(1))


class Block(nn.Module):
    """ResNet's basic block with CBAM after the last BatchNorm; the residual is added in place."""

    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.attention = EagerCBAM(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.attention(self.bn2(self.conv2(y)))
        y += self.shortcut(x)
        return F.relu(y)


class ResNet18(nn.Module):
    """ResNet-18 for small images (3x3 stem, no pooling before the stages); (N, 3, H, W) -> (N, classes)."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        blocks, inputs = [], 64
        for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [Block(inputs, channels, stride), Block(channels, channels, 1)]
            inputs = channels
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class PatchNet(nn.Module):
    """Tells photographs apart by crops of any size; CBAM works on a quarter of the resolution."""

    def __init__(self, classes: int, backend: str = "auto"):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        )  # fmt: skip
        self.attention = FusedCBAM(64, backend=backend)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(self.features(x)).mean((2, 3)))


def fused_twin(model: nn.Module, backend: str = "auto") -> nn.Module:
    """A copy of `model`, equal weights, with FusedCBAM wherever it has EagerCBAM."""
    twin = copy.deepcopy(model)
    for name, plain in list(twin.named_modules()):
        if not isinstance(plain, EagerCBAM):
            continue
        fused = FusedCBAM(plain.fc1.in_features, spatial_norm=plain.bn is not None, backend=backend)
        fused.to(device=plain.fc1.weight.device, dtype=plain.fc1.weight.dtype)
        kept = {k: v for k, v in KEYS["eager"].items() if plain.bn is not None or not k.startswith("bn_")}
        load_weights("fused", fused, {k: tensor_at(plain, path) for k, path in kept.items()})
        owner, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, fused)
    return twin
