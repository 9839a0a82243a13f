"""The candidates: hand-written CBAM, torch.compile of it, timm's, and FusedCBAM, all with the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import DTYPES, LAYOUTS, Case
from cbam_fused import FusedCBAM
from cbam_fused._backends import select

PROVIDERS = ("eager", "compile", "timm", "fused")
REDUCTION, KERNEL, EPS = 16, 7, 1e-5


class EagerCBAM(nn.Module):
    """CBAM as people write it by hand: the official order of operations in plain PyTorch calls."""

    def __init__(
        self,
        channels: int,
        reduction_ratio: int = REDUCTION,
        kernel_size: int = KERNEL,
        spatial_norm: bool = True,
    ):
        super().__init__()
        hidden = max(1, channels // reduction_ratio)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.max_pool = nn.AdaptiveMaxPool2d(1)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01) if spatial_norm else None

    def mlp(self, u: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(u.flatten(1))))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.mlp(self.avg_pool(x)) + self.mlp(self.max_pool(x))
        x = x * torch.sigmoid(logits)[:, :, None, None]
        q = torch.cat([x.max(dim=1, keepdim=True).values, x.mean(dim=1, keepdim=True)], dim=1)
        z = self.conv(q)
        if self.bn is not None:
            z = self.bn(z)
        return x * torch.sigmoid(z)


# Where each implementation keeps the tensor that the others call so.
_EAGER = {
    "w1": "fc1.weight",
    "b1": "fc1.bias",
    "w2": "fc2.weight",
    "b2": "fc2.bias",
    "conv": "conv.weight",
    "bn_weight": "bn.weight",
    "bn_bias": "bn.bias",
    "bn_mean": "bn.running_mean",
    "bn_var": "bn.running_var",
}
_FUSED = {
    k: ("channel_gate." if k in ("w1", "b1", "w2", "b2") else "spatial_gate.") + path
    for k, path in _EAGER.items()
}
_TIMM = {
    k: ("channel." if k in ("w1", "b1", "w2", "b2") else "spatial.conv.") + path for k, path in _EAGER.items()
}
KEYS = {"eager": _EAGER, "compile": _EAGER, "timm": _TIMM, "fused": _FUSED}
# timm's convolution reads the mean before the maximum.
MEAN_FIRST = ("timm",)


def tensor_at(module: nn.Module, path: str) -> Tensor:
    owner, _, leaf = path.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _reorder(provider: str, name: str, t: Tensor) -> Tensor:
    return t.flip(1) if name == "conv" and provider in MEAN_FIRST else t


def load_weights(provider: str, module: nn.Module, weights: Dict[str, Tensor]) -> nn.Module:
    """Copies `weights`, named and shaped as for `EagerCBAM`, into another implementation."""
    with torch.no_grad():
        for name, value in weights.items():
            target = tensor_at(module, KEYS[provider][name])
            target.copy_(_reorder(provider, name, value).reshape(target.shape))
    return module


def gradients(provider: str, module: nn.Module, weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Gradients of the parameters under the names and in the shapes of `weights`."""
    found = {}
    for name, like in weights.items():
        parameter = tensor_at(module, KEYS[provider][name])
        if isinstance(parameter, nn.Parameter):
            assert parameter.grad is not None, f"{provider} gave {name} no gradient"
            found[name] = _reorder(provider, name, parameter.grad.reshape(like.shape))
    return found


def make_weights(case: Case) -> Dict[str, Tensor]:
    """Seeded weights that keep both gates away from their flat ends, in the case's dtype."""
    c = case.shape[0]
    hidden = max(1, c // REDUCTION)
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int, fan: int = 1) -> Tensor:
        return torch.randn(*shape, generator=g) * fan**-0.5

    weights = {
        "w1": normal(hidden, c, fan=c),
        "b1": 0.1 * normal(hidden),
        "w2": normal(c, hidden, fan=hidden),
        "b2": 0.1 * normal(c),
        "conv": normal(1, 2, KERNEL, KERNEL, fan=2 * KERNEL * KERNEL),
    }
    if case.norm:
        weights.update(
            bn_weight=1 + 0.1 * normal(1),
            bn_bias=0.1 * normal(1),
            bn_mean=0.1 * normal(1),
            bn_var=torch.ones(1),
        )
    return {k: t.to(device=case.device, dtype=DTYPES[case.dtype]) for k, t in weights.items()}


@dataclass
class Candidate:
    """A provider made ready for one case. `backend` says what FusedCBAM runs on, else it is empty."""

    provider: str
    module: Callable[[Tensor], Tensor]
    owner: nn.Module
    threads: int
    backend: str = ""
    label: str = ""

    def __post_init__(self) -> None:
        self.label = self.label or self.provider


def _eager(case: Case, weights: Dict[str, Tensor]) -> nn.Module:
    return load_weights("eager", _place(EagerCBAM(case.shape[0], spatial_norm=case.norm), case), weights)


def _place(module: nn.Module, case: Case) -> nn.Module:
    module = module.to(device=case.device, dtype=DTYPES[case.dtype], memory_format=LAYOUTS[case.layout])
    return module.train(case.mode == "train")


def _timm(case: Case, weights: Dict[str, Tensor]) -> nn.Module:
    from timm.layers.cbam import CbamModule

    c = case.shape[0]
    module = CbamModule(c, rd_channels=max(1, c // REDUCTION), spatial_kernel_size=KERNEL, mlp_bias=True)
    if not case.norm:
        # timm has no switch for it; without this it would compute something else than the others.
        module.spatial.conv.bn = nn.Identity()
    return load_weights("timm", _place(module, case), weights)


def build(
    case: Case, names: Sequence[str], weights: Dict[str, Tensor], backend: str = "auto"
) -> Tuple[List[Candidate], Dict[str, str]]:
    """The candidates of a case, and for each provider that cannot take part, why."""
    found: List[Candidate] = []
    absent: Dict[str, str] = {}
    for name in names:
        if name == "timm":
            try:
                module = _timm(case, weights)
            except ImportError:
                absent[name] = "not installed (pip install timm)"
                continue
            found.append(Candidate(name, module, module, case.threads))
        elif name == "compile":
            # Every case is a new size: without a reset the recompile limit would turn it into eager.
            torch._dynamo.reset()
            module = _eager(case, weights)
            found.append(Candidate(name, torch.compile(module, dynamic=False), module, case.threads))
        elif name == "eager":
            module = _eager(case, weights)
            found.append(Candidate(name, module, module, case.threads))
        else:
            found.append(fused_candidate(case, weights, backend))
    return found, absent


def fused_candidate(
    case: Case, weights: Dict[str, Tensor], backend: str, threads: Optional[int] = None, label: str = ""
) -> Candidate:
    module = FusedCBAM(case.shape[0], REDUCTION, KERNEL, spatial_norm=case.norm, backend=backend)
    load_weights("fused", _place(module, case), weights)
    probe = torch.empty(1, *case.shape, device=case.device, dtype=DTYPES[case.dtype])
    runs_on = select(backend, probe, module.config)
    return Candidate("fused", module, module, threads or case.threads, runs_on, label)
