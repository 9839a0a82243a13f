"""The models that fuse_model.py measures: timm's networks with CBAM, and a YOLO model built from a YAML."""

from __future__ import annotations

import copy
import os
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

BLOCKS = {"cbam": "CbamModule", "lcbam": "LightCbamModule"}
YAML = os.path.join(os.path.dirname(os.path.abspath(__file__)), "yolov8n-cbam.yaml")
BOXES = 4  # an image

# (model, images (N, 3, size, size)) -> a loss without dimensions, for a batch that is fixed beforehand
Loss = Callable[[nn.Module, Tensor], Tensor]


class Subject(NamedTuple):
    """A model in training mode, the class of its CBAM blocks, and its loss for batches of `batch` images."""

    model: nn.Module
    block: str
    loss: Callable[[int], Loss]


def _classification(batch: int) -> Loss:
    target = torch.randint(1000, (batch,), generator=torch.Generator().manual_seed(1))
    return lambda model, x: F.cross_entropy(model(x), target.to(x.device))


def _timm(name: str, attention: str) -> Subject:
    import timm

    model = timm.create_model(name, num_classes=1000, block_args={"attn_layer": attention})
    for module in model.modules():
        # timm starts some BatchNorms at weight 0, behind which a wrong gradient would not show.
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.constant_(module.weight, 0.5)
    return Subject(model.train(), BLOCKS[attention], _classification)


def _detection(batch: int) -> Loss:
    g = torch.Generator().manual_seed(1)
    count = batch * BOXES
    corner = torch.rand(count, 2, generator=g) * 0.4 + 0.3
    data: Dict[str, Any] = {
        "cls": torch.randint(80, (count, 1), generator=g).float(),
        "bboxes": torch.cat([corner, torch.rand(count, 2, generator=g) * 0.3 + 0.1], 1),
        "batch_idx": torch.arange(batch).repeat_interleave(BOXES).float(),
    }
    return lambda model, x: model({**{k: v.to(x.device) for k, v in data.items()}, "img": x})[0].sum()


def _yolo() -> Subject:
    import yaml
    from ultralytics.nn import tasks
    from ultralytics.nn.modules import CBAM

    deterministic = torch.are_deterministic_algorithms_enabled()
    missing = object()
    before = getattr(tasks, "CBAM", missing)
    tasks.CBAM = CBAM  # the parser looks its layers up there; forks of Ultralytics import theirs
    try:
        with open(YAML) as f:
            model = tasks.DetectionModel(yaml.safe_load(f), ch=3, verbose=False)
    finally:
        if before is missing:
            del tasks.CBAM
        else:
            tasks.CBAM = before
        # Ultralytics turns it on where it initialises weights.
        torch.use_deterministic_algorithms(deterministic)
    model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)
    return Subject(model.train(), "CBAM", _detection)


def make(name: str, attention: str) -> Subject:
    """The subject of this name: "yolo", or a timm model that takes block_args."""
    torch.manual_seed(0)
    return _yolo() if name == "yolo" else _timm(name, attention)


def blocks_of(subject: Subject) -> List[Tuple[str, nn.Module]]:
    return [(n, m) for n, m in subject.model.named_modules() if type(m).__name__ == subject.block]


def without(subject: Subject) -> nn.Module:
    """A copy of the model whose CBAMs are the identity."""
    twin = copy.deepcopy(subject.model)
    for name, block in blocks_of(subject):
        parent, _, child = name.rpartition(".")
        nothing = nn.Identity()
        for key, value in block.__dict__.items():
            # Where an Ultralytics layer takes its input from, and so on.
            if key not in nothing.__dict__:
                setattr(nothing, key, value)
        setattr(twin.get_submodule(parent), child, nothing)
    return twin
