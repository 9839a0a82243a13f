"""What is measured: the named shape sets and `Case`, one configuration of one shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Tuple

import torch

Shape = Tuple[int, int, int]

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = ("infer", "train")


@dataclass(frozen=True)
class ShapeSet:
    """The (C, H, W) that CBAM sees in a network, and the batch that fits its usual use."""

    batch: int
    shapes: Tuple[Shape, ...]


SETS: Dict[str, ShapeSet] = {
    # ResNets at 224 x 224, CBAM after every block.
    "resnet18": ShapeSet(8, ((64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7))),
    "resnet50": ShapeSet(8, ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))),
    # MobileNetV1 at 224 x 224.
    "mobilenet": ShapeSet(8, ((64, 112, 112), (128, 56, 56), (256, 28, 28), (512, 14, 14), (1024, 7, 7))),
    # YOLOv8s at 640 x 640, strides 2 to 32.
    "yolov8s": ShapeSet(8, ((32, 320, 320), (64, 160, 160), (128, 80, 80), (256, 40, 40), (512, 20, 20))),
    # Faster R-CNN with ResNet-50 at 800 x 1344, two images a device as detectors are trained.
    "detection": ShapeSet(2, ((256, 200, 336), (512, 100, 168), (1024, 50, 84), (2048, 25, 42))),
    # A large map, a deep one, and one where the cost of the calls themselves shows.
    "quick": ShapeSet(8, ((256, 56, 56), (1024, 14, 14), (64, 28, 28))),
}


@dataclass(frozen=True)
class Case:
    """One configuration: every candidate runs it in the same interleaving."""

    set: str
    batch: int
    shape: Shape
    mode: str = "infer"
    dtype: str = "float32"
    layout: str = "contiguous"
    threads: int = 1
    norm: bool = False
    device: str = "cpu"

    @property
    def full_shape(self) -> Tuple[int, int, int, int]:
        return (self.batch, *self.shape)

    @property
    def x_bytes(self) -> int:
        """S of the counts below: bytes of x."""
        n, c, h, w = self.full_shape
        return n * c * h * w * DTYPES[self.dtype].itemsize

    @property
    def floor_bytes(self) -> int:
        """Bytes that must move between memory and the chip, without the O(N * (C + P)) small tensors.

        Inference reads x and writes y: 2 S. A training step adds a backward that reads x and dy and
        writes dx: 2 S + 3 S. A BatchNorm in training needs statistics of the whole batch before the
        last pass may start, so x is read once more each way, and dy too: 3 S + 5 S.
        """
        if self.mode == "infer":
            return 2 * self.x_bytes
        return (8 if self.norm else 5) * self.x_bytes

    def title(self) -> str:
        norm = "BatchNorm" if self.norm else "no norm"
        return (
            f"{self.set} {self.full_shape} {self.mode}, {self.dtype}, {self.layout}, {norm}, "
            f"{self.device}, {self.threads} thread{'s' if self.threads != 1 else ''}, "
            f"S = {self.x_bytes / 1e6:.2f} MB"
        )
