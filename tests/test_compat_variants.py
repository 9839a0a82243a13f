"""1-D and 3-D inputs and the paper's other arrangements, against plain PyTorch written here."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from dialect_cases import assert_same_numbers

from cbam_fused import FusedCBAM, fuse

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SHAPES = {1: (3, 24, 41), 2: (2, 24, 9, 7), 3: (2, 24, 5, 4, 7)}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


class Plain(nn.Module):
    """CBAM in any number of dimensions and any arrangement, with max before mean."""

    def __init__(self, dims, arrangement="channel_first", norm=True, k=3, channels=24, hidden=3):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.conv = CONV[dims](2, 1, k, padding=k // 2, bias=False)
        self.bn = NORM[dims](1, momentum=0.01) if norm else nn.Identity()
        self.arrangement = arrangement

    def channel(self, x):
        mlp = lambda u: self.fc2(F.relu(self.fc1(u)))  # noqa: E731
        rows = x.flatten(2)
        gate = torch.sigmoid(mlp(rows.mean(2)) + mlp(rows.max(2)[0]))
        return gate.reshape(*gate.shape, *[1] * (x.dim() - 2))

    def spatial(self, x):
        q = torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], 1)
        return torch.sigmoid(self.bn(self.conv(q)))

    def forward(self, x):
        if self.arrangement == "parallel":
            return x * self.channel(x) * self.spatial(x)
        first, second = (self.channel, self.spatial)[:: 1 if self.arrangement == "channel_first" else -1]
        x = x * first(x)
        return x * second(x)


def pair(dims, arrangement, norm=True, backend="auto"):
    plain = Plain(dims, arrangement, norm)
    if norm:
        nn.init.constant_(plain.bn.weight, 0.75)
        nn.init.constant_(plain.bn.bias, -0.25)
        plain.bn.running_mean.fill_(0.125)
        plain.bn.running_var.fill_(1.5)
    fused = FusedCBAM(24, 8, 3, dims=dims, spatial_norm=norm, arrangement=arrangement, backend=backend)
    state = {
        ("channel_gate." if k.startswith("fc") else "spatial_gate.") + k: v
        for k, v in plain.state_dict().items()
    }
    fused.load_state_dict(state)
    return plain, fused


CASES = [
    (d, a)
    for d in (1, 2, 3)
    for a in ("channel_first", "spatial_first", "parallel")
    if (d, a) != (2, "channel_first")
]


@pytest.mark.parametrize("dims, arrangement", CASES)
@pytest.mark.parametrize("mode", ["no-norm", "eval", "train"])
def test_numbers(dims, arrangement, mode, target):
    plain, fused = pair(dims, arrangement, mode != "no-norm", target.backend)
    plain, fused = plain.to(target.device), fused.to(target.device)
    g = torch.Generator().manual_seed(dims)
    x = torch.randn(SHAPES[dims], generator=g)
    for x in (x, (x * 2).round().clamp(min=0) / 2):
        assert_same_numbers(copy.deepcopy(plain), copy.deepcopy(fused), x.to(target.device), mode == "train")


@pytest.mark.parametrize("arrangement", ["spatial_first", "parallel"])
def test_residual_maps_and_repr(arrangement):
    plain, fused = pair(2, arrangement)
    fused.eval()
    plain.eval()
    x = torch.randn(SHAPES[2])
    channel, spatial = fused.attention_maps(x)
    torch.testing.assert_close(x * channel[:, :, None, None] * spatial, fused(x).detach())
    torch.testing.assert_close(fused(x), plain(x))
    assert f'arrangement="{arrangement}"' in repr(fused)
    added = FusedCBAM(24, 8, 3, arrangement=arrangement, residual=True).eval()
    added.load_state_dict(fused.state_dict())
    torch.testing.assert_close(added(x), fused(x) + x)


@pytest.mark.parametrize("arrangement", ["spatial_first", "parallel"])
def test_second_derivatives(arrangement):
    fused = FusedCBAM(4, 2, 3, spatial_norm=False, arrangement=arrangement).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fused, x)
    assert torch.autograd.gradgradcheck(fused, x)


def test_errors():
    with pytest.raises(ValueError, match='arrangement must be one of "channel_first"'):
        FusedCBAM(8, arrangement="serial")
    with pytest.raises(ValueError, match='arrangement must be "channel_first" with spatial=False'):
        FusedCBAM(8, arrangement="parallel", spatial=False)


@pytest.mark.parametrize("dims", [1, 3])
def test_fuse_recognises_other_dimensions_but_no_other_arrangement(dims):
    plain = Plain(dims)
    expected = copy.deepcopy(plain).eval()
    x = torch.randn(SHAPES[dims])
    assert len(fuse(plain).swapped) == 1 and plain.dims == dims
    torch.testing.assert_close(plain.eval()(x), expected(x))
    for arrangement in ("spatial_first", "parallel"):
        other = Plain(dims, arrangement)
        assert not fuse(other).swapped and type(other) is Plain
