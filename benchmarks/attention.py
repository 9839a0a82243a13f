"""The attention picture: where a FusedCBAM opens its spatial gate on scikit-image's photographs."""

from __future__ import annotations

import statistics
from typing import List

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.networks import PatchNet
from benchmarks.report import Progress
from cbam_fused.visualize import overlay

SEED = 0
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def square(image: Tensor) -> Tensor:
    """The middle of image (3, H, W), as high as wide."""
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, top : top + side, left : left + side]


def attention_picture(target: str, steps: int, device: str, backend: str) -> float:
    """Trains a small network to tell which photograph a 64 x 64 crop is from, then draws where its
    spatial gate opens on the whole photographs. Returns the accuracy over the last crops."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from skimage import data

    photographs = [square(torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)) for name in PHOTOGRAPHS]
    scaled = [(p.float() / 255 - 0.45) / 0.25 for p in photographs]  # (3, H, W) each
    torch.manual_seed(SEED)
    g = torch.Generator().manual_seed(SEED)
    model = PatchNet(len(PHOTOGRAPHS), backend).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    right: List[float] = []
    progress = Progress(steps)
    for step in range(steps):
        labels = torch.randint(len(scaled), (32,), generator=g)
        crops = []
        for label in labels.tolist():
            top, left = (int(torch.randint(s - 63, (1,), generator=g)) for s in scaled[label].shape[1:])
            crops.append(scaled[label][:, top : top + 64, left : left + 64])
        x, y = torch.stack(crops).to(device), labels.to(device)
        optimizer.zero_grad(set_to_none=True)
        logits = model(x)
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        right.append((logits.argmax(1) == y).float().mean().item())
        progress.begin(step + 1, "photographs")
    progress.clear()
    model.eval()
    figure, axes = plt.subplots(
        2, len(photographs), figsize=(3.4 * len(photographs), 6), layout="constrained"
    )
    for (above, below), photograph, x, name in zip(axes.T, photographs, scaled, PHOTOGRAPHS):
        with torch.no_grad():
            _, spatial = model.attention.attention_maps(model.features(x[None].to(device)))
        above.imshow(photograph.permute(1, 2, 0).numpy())
        above.set_axis_off()
        above.set_title(name)
        overlay(photograph, spatial, ax=below, alpha=0.6, colorbar=True)
    figure.supxlabel(
        f"Spatial gate of a FusedCBAM after {steps} steps of telling these photographs apart by 64 x 64 crops",
        fontsize=9,
    )
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return statistics.mean(right[-10:])
