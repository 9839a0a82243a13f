"""fuse leaves what it is not certain of, and says why."""

import copy
import re
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from dialect_cases import inputs
from plain_cbam import Bubbliiiing, Peachypie98
from whole_models import Renamed

from cbam_fused import fuse, unfuse


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


class Conditional(Peachypie98):
    """Behaves like its parent in eval only."""

    def forward(self, x):
        y = super().forward(x)
        return y * 1.01 if self.training else y


class InPlace(Bubbliiiing):
    def forward(self, x):
        x.mul_(self.channelattention(x))
        return x * self.spatialattention(x)


class DetachedGate(Bubbliiiing):
    """The forward is a CBAM's; the gradient is not."""

    def forward(self, x):
        x = x * self.channelattention(x)
        return x * self.spatialattention(x).detach()


class TwoInputs(Bubbliiiing):
    def forward(self, x, skip=None):
        return super().forward(x)


class OwnCall(Bubbliiiing):
    def __call__(self, x):
        return super().__call__(x) * 2


class Keeps(Bubbliiiing):
    """Its user reads the gate after each forward."""

    def forward(self, x):
        self.seen = self.channelattention(x).detach()
        return super().forward(x)


class Counts(Bubbliiiing):
    def __init__(self, channels):
        super().__init__(channels)
        self.calls = []

    def forward(self, x):
        self.calls.append(x.shape)
        return super().forward(x)


class Stores(Bubbliiiing):
    """As Keeps, in what the module holds already."""

    def __init__(self, channels, held, store):
        super().__init__(channels)
        self.held, self.store = held, store

    def forward(self, x):
        self.store(self.held, self.channelattention(x).detach())
        return super().forward(x)


class After(Bubbliiiing):
    """A CBAM and something that most inputs do not show."""

    def __init__(self, channels, f):
        super().__init__(channels)
        self.f = f

    def forward(self, x):
        return self.f(super().forward(x), x)


class DetachedWhereFrozen(Bubbliiiing):
    def forward(self, x):
        gate = self.channelattention(x)
        if not self.channelattention.fc1.weight.requires_grad:
            gate = gate.detach()
        x = x * gate
        return x * self.spatialattention(x)


class Configured(Bubbliiiing):
    def __init__(self, channels):
        super().__init__(channels)
        self.config = {"ratio": 8}


def compiled():
    module = Bubbliiiing(32)
    module.compile(backend="eager")
    return module


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: OwnCall(32), "OwnCall has its own __call__, which would not run"),
        (lambda: Keeps(32), "its forward sets seen"),
        (lambda: Counts(32), "its forward sets calls"),
        (lambda: Stores(32, {}, lambda held, g: held.update(gate=g)), "its forward sets held"),
        (lambda: Stores(32, [None], lambda held, g: held.__setitem__(0, g)), "its forward sets held"),
        (lambda: Stores(32, torch.zeros(1), lambda held, g: held.add_(1)), "its forward sets held"),
        (
            lambda: After(32, lambda y, x: y.nan_to_num(0.0)),
            "for very large numbers, infinity and NaN differs",
        ),
        (
            lambda: After(32, lambda y, x: y.clamp(-1e3, 1e3)),
            "for very large numbers, infinity and NaN differs",
        ),
        (lambda: DetachedWhereFrozen(32), "its gradient of the input with frozen parameters differs"),
        (lambda: Configured(32), "its attribute config is not FusedCBAM's"),
        (compiled, "it is compiled by itself: fuse before compiling"),
        (lambda: Renamed(act=nn.SiLU), "act is a SiLU"),
        (lambda: Renamed(act=nn.ReLU6), "act is a ReLU6"),
        (lambda: Renamed(act=lambda: F.relu6), "output differs"),
        (lambda: Renamed(gate=F.hardsigmoid), "output differs"),
        (lambda: Conditional(32, 4), "its output in training differs"),
        (lambda: InPlace(32), "changes its input in place"),
        (lambda: DetachedGate(32), "its gradient of .* differs"),
        (lambda: TwoInputs(32), "more than one tensor"),
    ],
)
def test_what_is_not_certain_is_left_and_said(make, reason):
    module = make()
    source = type(module)
    report = fuse(module)
    assert type(module) is source
    (left,) = [r for r in report.left if r.name == ""]
    assert re.search(reason, left.reason), left.reason


def test_what_a_forward_has_stored_before_hides_nothing():
    """The model ran before: the module holds a gate already, and each forward puts another in its place."""
    module = Stores(32, {}, lambda held, g: held.update(gate=g))
    for _ in range(3):
        module(inputs(32)["dense"])
    report = fuse(module)
    (left,) = [r for r in report.left if r.name == ""]
    assert not report.swapped
    assert left.reason.startswith("its forward sets held"), left.reason


def test_new_tensors_by_default_elsewhere():
    torch.set_default_device("meta")
    try:
        with torch.device("cpu"):
            module = Bubbliiiing(32)
        report = fuse(module)
    finally:
        torch.set_default_device(None)
    assert report.swapped and not report.left


def test_the_gates_of_a_block_that_is_left_are_swapped_where_they_are_certain():
    module = Conditional(32, 4)
    expected = copy.deepcopy(module)
    report = fuse(module)
    assert [s.name for s in report.swapped] == ["cam", "sam"] and [r.name for r in report.left] == [""]
    for x in inputs(32)["dense"], inputs(32)["ties"]:
        torch.testing.assert_close(module(x), expected(x))


def test_a_script_module_is_left():
    class CBAM(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return x * torch.sigmoid(self.fc(x.mean((2, 3), True)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that scripting is deprecated
        model = nn.Sequential(torch.jit.script(CBAM()))
    report = fuse(model)
    assert [(r.name, r.reason) for r in report.left] == [("0", "it is a ScriptModule: fuse before scripting")]


def test_layers_that_were_quantised_after_fuse_are_read():
    block, rounded, x = Peachypie98(32, 4).eval(), Peachypie98(32, 4).eval(), inputs(32)["dense"]
    rounded.load_state_dict(block.state_dict())
    fuse(block)
    before = block(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.ao is deprecated
        block = torch.ao.quantization.quantize_dynamic(block, {nn.Linear})
    with torch.no_grad():
        for i in (0, 2):
            rounded.cam.linear[i].weight.copy_(block.cam.linear[i].weight().dequantize())
    fuse(rounded)
    assert torch.equal(block(x), rounded(x)) and not torch.equal(block(x), before)
    unfuse(block)
    assert block(x).shape == (2, 32, 9, 7)


def test_a_layer_that_was_adapted_after_fuse_is_named():
    class Adapted(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    block = Peachypie98(32, 4).eval()
    fuse(block)
    block.cam.linear[2] = Adapted(8, 32)
    with pytest.raises(
        TypeError, match=r"^cam\.linear\.2 must have the forward of nn\.Linear .* or `unfuse` the model"
    ):
        block(inputs(32)["dense"])
    unfuse(block)
    assert block(inputs(32)["dense"]).shape == (2, 32, 9, 7)
