"""Every dialect beside its original: the real package's class where there is one, else plain_cbam's."""

import copy
import importlib
from typing import Any, Callable, Dict, NamedTuple, Tuple

import plain_cbam as plain
import pytest
import torch
import torch.nn as nn
from oracle import assert_within

from cbam_fused import compat


class Case(NamedTuple):
    """One constructor call, of the fused class and of its original."""

    dialect: str
    fused: Callable[..., nn.Module]
    original: Callable[[], Any]
    args: Tuple[Any, ...] = ()
    kwargs: Dict[str, Any] = {}
    real: bool = False
    channels: int = 0  # of the input, where the constructor does not say

    def pair(self):
        """(original, fused) with the original's state, randomised so that nothing hides."""
        original = self.original()(*self.args, **self.kwargs)
        # Many have one or two hidden units, which a ReLU leaves dead on all of an input as often as not.
        for _ in range(100):
            randomise(original)
            if all(alive(original, x) for x in inputs(self.width).values()):
                break
        else:
            raise AssertionError(f"{self.dialect}: some weight has no gradient, whatever is drawn")
        fused = self.fused(*self.args, **self.kwargs)
        fused.load_state_dict(original.state_dict())
        return original, fused

    @property
    def width(self) -> int:
        return self.channels or self.args[0]


def package(module: str, name: str) -> Callable[[], Any]:
    """A class of a third-party package; the test skips where the package is missing."""

    def load() -> Any:
        top = module.split(".")[0]
        pytest.importorskip(top, reason=f"{top} is not installed")
        return getattr(importlib.import_module(module), name)

    return load


def written(kind: type) -> Callable[[], type]:
    return lambda: kind


def randomise(module: nn.Module) -> None:
    """Weights that keep the gates away from 0 and 1, and a BatchNorm that is not the identity."""
    with torch.no_grad():
        for leaf in module.modules():
            if isinstance(leaf, (nn.Linear, nn.Conv2d)):
                leaf.weight.normal_(0, leaf.weight[0].numel() ** -0.5)
                if leaf.bias is not None:
                    leaf.bias.normal_(0, 0.3)
            elif isinstance(leaf, nn.BatchNorm2d):
                leaf.weight.fill_(0.75)
                leaf.bias.fill_(-0.25)
                leaf.running_mean.fill_(0.125)
                leaf.running_var.fill_(1.5)


def alive(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether every learnt tensor gets a gradient."""
    twin = copy.deepcopy(module).train()
    twin(x).square().sum().backward()
    return all(p.grad is not None and p.grad.abs().max() > 0 for p in twin.parameters())


_TIMM = "timm.layers.cbam"
_YOLO = "ultralytics.nn.modules.conv"
_TIMM_SE = package("timm.layers.squeeze_excite", "SEModule")

CASES: Dict[str, Case] = {
    "official": Case("official", compat.official.CBAM, written(plain.Official), (32,)),
    "official-lp-lse": Case(
        "official", compat.official.CBAM, written(plain.Official), (32, 8, ["avg", "max", "lp", "lse"])
    ),
    "official-no-spatial": Case("official", compat.official.CBAM, written(plain.Official), (32,), {"no_spatial": True}),
    "pytorchcv": Case(
        "pytorchcv", compat.pytorchcv.CbamBlock, package("pytorchcv.models.cbamresnet", "CbamBlock"), (32,), real=True
    ),
    "timm": Case("timm", compat.timm.CbamModule, package(_TIMM, "CbamModule"), (24,), real=True),
    "timm-bias-k3": Case(
        "timm", compat.timm.CbamModule, package(_TIMM, "CbamModule"), (40, 0.25),
        {"spatial_kernel_size": 3, "mlp_bias": True, "rd_divisor": 8}, real=True,
    ),
    "timm-light": Case("timm_light", compat.timm.LightCbamModule, package(_TIMM, "LightCbamModule"), (32,), real=True),
    "timm-se": Case("timm_se", compat.timm.SEModule, _TIMM_SE, (32,), real=True),
    "timm-se-max": Case(
        "timm_se", compat.timm.SEModule, _TIMM_SE, (32,), {"add_maxpool": True, "bias": False}, real=True
    ),
    "torchvision-se": Case(
        "torchvision_se", compat.torchvision.SqueezeExcitation,
        package("torchvision.ops.misc", "SqueezeExcitation"), (32, 4), real=True,
    ),
    "ultralytics": Case("ultralytics", compat.ultralytics.CBAM, package(_YOLO, "CBAM"), (32,), real=True),
    "ultralytics-k3": Case("ultralytics", compat.ultralytics.CBAM, package(_YOLO, "CBAM"), (17, 3), real=True),
    "ultralytics-channel": Case(
        "ultralytics_channel", compat.ultralytics.ChannelAttention, package(_YOLO, "ChannelAttention"), (17,), real=True
    ),
    "ultralytics-spatial": Case(
        "ultralytics_spatial", compat.ultralytics.SpatialAttention, package(_YOLO, "SpatialAttention"), (3,),
        real=True, channels=17,
    ),
    "luuuyi": Case("luuuyi", compat.luuuyi.CBAM, written(plain.Luuuyi), (48,)),
    "luuuyi2018": Case("luuuyi2018", compat.luuuyi.CBAM2018, written(plain.Luuuyi2018), (48, 4, 3)),
    "luuuyi-channel": Case("luuuyi_channel", compat.luuuyi.ChannelAttention, written(plain.LuuuyiChannel), (48,)),
    "luuuyi2018-channel": Case(
        "luuuyi2018_channel", compat.luuuyi.ChannelAttention2018, written(plain.LuuuyiChannel2018), (48,)
    ),
    "luuuyi-spatial": Case(
        "luuuyi_spatial", compat.luuuyi.SpatialAttention, written(plain.LuuuyiSpatial), (7,), channels=48
    ),
    "bubbliiiing": Case("bubbliiiing", compat.bubbliiiing.cbam_block, written(plain.Bubbliiiing), (32,)),
    "xmu": Case("xmu", compat.xmu.CBAMBlock, written(plain.Xmu), (32, 4, 5)),
    "xmu-k1": Case("xmu", compat.xmu.CBAMBlock, written(plain.Xmu), (32, 4, 1)),
    "xmu-k49": Case("xmu", compat.xmu.CBAMBlock, written(plain.Xmu), (16,)),
    "peachypie98": Case("peachypie98", compat.peachypie98.CBAM, written(plain.Peachypie98), (32, 4)),
    "elbuco1": Case("elbuco1", compat.elbuco1.CBAM, written(plain.Elbuco1), (32, 3, 5)),
    "mmyolo": Case("mmyolo", compat.mmyolo.CBAM, written(plain.Mmyolo), (32,)),
}  # fmt: skip

BLOCKS = {k: c for k, c in CASES.items() if compat.dialects.find(c.dialect).kind == "block"}


def inputs(channels: int, dtype: torch.dtype = torch.float32) -> Dict[str, torch.Tensor]:
    """Dense values; and post-ReLU ones on a coarse grid, with ties in both pools and whole planes of zeros."""
    g = torch.Generator().manual_seed(7)
    dense = torch.randn(2, channels, 9, 7, generator=g)
    ties = (torch.randn(3, channels, 7, 7, generator=g) * 2).round().clamp(min=0) / 2
    ties[0, : channels // 3] = 0
    return {"dense": dense.to(dtype), "ties": ties.to(dtype)}


def run(module, x, dy):
    """Output, input gradient, every parameter gradient, buffers after: name -> tensor."""
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(dy.to(y))
    found = {"y": y.detach(), "dx": x.grad}
    found.update(
        {f"d{n}": torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
    )
    found.update({n: b.clone() for n, b in module.named_buffers() if b.is_floating_point()})
    return found


def neighbour(module, dy, seed):
    """Another problem of the same kind: weights and dy off by a thousandth at random, each its own way."""
    g = torch.Generator().manual_seed(seed)

    def off(t):
        return t * (1 + 1e-3 * torch.randn(t.shape, generator=g).to(t))

    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(off(parameter))
    return twin, off(dy)


def assert_same_numbers(original, fused, x, training):
    """fused is within 2 * (the original's own error + eps * max|value|) of the original in float64.

    Outputs, the input's gradient, the parameters' in order, and the running statistics.

    The original's error is the largest over this problem and sixteen neighbours: in a gradient of few
    numbers, or whose sums cancel, that of one problem may be next to nothing by luck. x stays as it is, or
    the maxima of its ties would move.
    """
    dy = torch.randn(original.eval()(x).shape, device=x.device)
    original.train(training)
    fused.train(training)
    errors = {}
    for module, dys in [(original, dy), *(neighbour(original, dy, seed) for seed in range(16))]:
        exact = run(copy.deepcopy(module).double(), x.double(), dys.double())
        low = run(copy.deepcopy(module), x, dys)
        for name, value in exact.items():
            error = (low[name].double() - value).abs().max().item()
            errors[name] = max(error, errors.get(name, 0.0))
    exact = run(copy.deepcopy(original).double(), x.double(), dy.double())
    got = run(fused, x, dy)
    assert len(got) == len(exact)
    got = dict(zip(exact, got.values()))
    for name, value in exact.items():
        assert_within(name, got[name], value, [(value + errors[name]).float()])
