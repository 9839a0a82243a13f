"""fuse and unfuse: what is swapped, what is kept, what is left and why."""

import copy
import io

import pytest
import torch
import torch.nn as nn
from dialect_cases import CASES, inputs, randomise
from plain_cbam import Bubbliiiing, Luuuyi, Official, Xmu
from whole_models import Renamed

from cbam_fused import ChannelGate, FusedCBAM, SpatialGate, fuse, unfuse

FUSABLE = {n: c for n, c in CASES.items() if "mask" not in c.fused.__mro__[1].__name__.lower()}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def fingerprint(module):
    """All that fuse must not touch."""
    return {
        "parameters": [(n, id(p), p.requires_grad, p.device, p.dtype) for n, p in module.named_parameters()],
        "buffers": [(n, id(b)) for n, b in module.named_buffers()],
        "modules": [(n, id(m), m.training) for n, m in module.named_modules()],
        "keys": list(module.state_dict()),
        "values": {k: v.clone() for k, v in module.state_dict().items()},
    }


def assert_same(a, b):
    values = zip(a.pop("values").items(), b.pop("values").items())
    assert a == b
    for (key, x), (other, y) in values:
        assert key == other and torch.equal(x, y), key


@pytest.mark.parametrize("case", FUSABLE.values(), ids=FUSABLE.keys())
def test_every_dialect_is_recognised_and_nothing_else_changes(case):
    original, _ = case.pair()
    original.double()
    model = nn.Sequential(nn.Conv2d(3, case.width, 1).double(), original, nn.ReLU())
    source = type(original)
    state = torch.get_rng_state()
    before = fingerprint(model)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    torch.set_rng_state(state)
    expected = copy.deepcopy(model)
    torch.set_rng_state(state)

    report = fuse(model)

    assert torch.equal(torch.get_rng_state(), state)
    assert [(s.name, s.source.split(".")[-1]) for s in report.swapped] == [
        ("1", source.__name__)
    ] and not report.left
    assert type(original) is case.fused or case.dialect.startswith(
        ("luuuyi_spatial", "timm_se", "torchvision_se")
    )
    assert isinstance(original, (FusedCBAM, ChannelGate, SpatialGate))
    assert_same(before, fingerprint(model))
    for training in (True, False):
        model.train(training)
        expected.train(training)
        a, b = model(x), expected(x)
        torch.testing.assert_close(a, b)
        ga = torch.autograd.grad(a.square().sum(), list(model.parameters()), allow_unused=True)
        gb = torch.autograd.grad(b.square().sum(), list(expected.parameters()), allow_unused=True)
        for u, v in zip(ga, gb):
            assert (u is None) == (v is None) or not (u if v is None else v).any()
            if u is not None and v is not None:
                torch.testing.assert_close(u, v)
    after = fingerprint(model)
    assert [s.name for s in unfuse(model).swapped] == ["1"]
    assert type(original) is source and "_cbam" not in original.__dict__
    assert_same(after, fingerprint(model))
    torch.testing.assert_close(model(x), expected(x))


@pytest.mark.parametrize(
    "options", [{}, {"residual": True}, {"reverse": True}, {"split": True, "reverse": True}]
)
def test_names_do_not_matter_and_options_are_found(options):
    module = Renamed(**options)
    randomise(module)
    expected = copy.deepcopy(module)
    report = fuse(module)
    assert len(report.swapped) == 1 and isinstance(module, FusedCBAM)
    assert module.config.residual == options.get("residual", False)
    assert module.ties == ("split" if options.get("split") else "first")
    assert ('spatial_order="mean_max"' in report.swapped[0].options) == options.get("reverse", False)
    for x in inputs(24, torch.float64).values():
        torch.testing.assert_close(module.double()(x), expected.double()(x))


class Extra(Bubbliiiing):
    def __init__(self, channels):
        super().__init__(channels)
        self.scale = nn.Parameter(torch.ones(1))


def test_modules_with_more_in_them_are_none_of_its_business():
    module = Extra(32)
    report = fuse(module)
    assert type(module) is Extra and not report.swapped
    feed_forward = nn.TransformerEncoderLayer(16, 2, 16, activation="relu")
    assert not fuse(feed_forward).swapped
    assert not fuse(nn.Sequential(nn.Conv2d(2, 1, 7, padding=3), nn.Linear(4, 4))).left


def test_masks_are_left_with_advice_and_their_block_is_fused():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(32, 32, 3, padding=1)
            pair = Luuuyi(32)
            self.ca, self.sa = pair.ca, pair.sa

        def forward(self, x):
            x = self.conv1(x)
            x = self.ca(x) * x
            return self.sa(x) * x

    report = fuse(Residual())
    assert not report.swapped
    assert [r.name for r in report.left] == ["ca", "sa"]
    assert all("cbam_fused.compat.luuuyi" in r.reason for r in report.left)
    assert fuse(Luuuyi(32)).swapped


def test_hooks_on_the_block_stay_and_hooks_inside_keep_it_as_it_is():
    module, seen = Bubbliiiing(32), []
    module.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    module.register_forward_hook(lambda m, args, y: seen.append("post"))
    module.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    module.register_state_dict_post_hook(lambda *_: seen.append("state"))
    assert fuse(module).swapped and not seen
    module(inputs(32)["dense"].requires_grad_()).sum().backward()
    module.state_dict()
    assert seen == ["pre", "post", "backward", "state"]

    inner = Bubbliiiing(32)
    inner.channelattention.fc1.register_forward_hook(lambda *_: None)
    report = fuse(inner)
    assert type(inner) is Bubbliiiing
    assert report.left[0].reason == "a hook on channelattention.fc1 would not run"

    patched = Bubbliiiing(32)
    patched.forward = lambda x: x
    assert fuse(patched).left[0].reason == "its forward is replaced on the instance"


def test_hooks_on_the_batch_norm_still_run():
    module, seen = Official(32), []
    module.SpatialGate.spatial.bn.register_forward_hook(lambda *_: seen.append(1))
    assert fuse(module).swapped
    for training in (True, False):
        module.train(training)(inputs(32)["dense"])
    assert len(seen) == 2


def test_pruned_and_parametrised_layers_keep_working():
    from torch.nn.utils import prune
    from torch.nn.utils.parametrizations import weight_norm

    def make():
        torch.manual_seed(1)
        made = Bubbliiiing(32)
        prune.l1_unstructured(made.channelattention.fc1, "weight", 0.5)
        weight_norm(made.spatialattention.conv1)
        return made

    module, expected = make(), make()
    assert fuse(module).swapped
    x = inputs(32)["dense"]
    with torch.no_grad():
        for m in (module, expected):
            m.channelattention.fc1.weight_orig.mul_(1.5)
    torch.testing.assert_close(module(x), expected(x))


def test_an_optimiser_made_before_still_steps():
    module = Official(32)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    module.ChannelGate.mlp[1].bias.requires_grad_(False)
    fuse(module)
    before = [p.clone() for p in module.parameters()]
    module(inputs(32)["dense"]).square().sum().backward()
    optimiser.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, module.parameters())]
    assert moved == [n != "ChannelGate.mlp.1.bias" for n, _ in module.named_parameters()]


def test_options_and_other_pools_of_the_official_block():
    module = Official(32, 8, ["lse", "lp"])
    report = fuse(module)
    assert "pool_types=('lp', 'lse')" in report.swapped[0].options


def test_a_kernel_of_one_is_no_dense_layer():
    class Smallest(Renamed):
        def __init__(self):
            super().__init__(2)
            self.squeeze, self.excite = nn.Conv2d(2, 1, 1), nn.Conv2d(1, 2, 1)
            self.where = nn.Conv2d(2, 1, 1)

    module = Smallest()
    randomise(module)
    expected = copy.deepcopy(module)
    assert fuse(module).swapped and module.channels == 2
    x = torch.randn(2, 2, 5, 4)
    torch.testing.assert_close(module(x), expected(x))


def test_methods_and_class_attributes_of_the_class_before_stay():
    class Extended(Bubbliiiing):
        stage = 3

        def gate(self, x):
            return self.channelattention(x)

        @property
        def width(self):
            return self.channelattention.fc1.in_channels

    module = Extended(32)
    assert fuse(module).swapped
    x = inputs(32)["dense"]
    assert torch.equal(module.gate(x), module.channelattention(x))
    assert (module.stage, module.width) == (3, 32)
    with pytest.raises(AttributeError, match="no attribute 'depth'"):
        module.depth


def wrapped_in_average(block):
    return torch.optim.swa_utils.AveragedModel(block)


@pytest.mark.parametrize(
    "wrap, name",
    [
        (nn.DataParallel, "module"),
        (wrapped_in_average, "module"),
        (lambda block: torch.compile(block, backend="eager"), "_orig_mod"),
    ],
)
def test_what_torch_wraps_around_a_block_stays(wrap, name):
    block = Official(32).eval()
    expected = copy.deepcopy(block)
    model = wrap(block)
    kind = type(model)
    report = fuse(model)
    assert type(model) is kind and [s.name for s in report.swapped] == [name] and not report.left
    x = inputs(32)["dense"]
    torch.testing.assert_close(model(x), expected(x))


def test_a_fused_block_compiles_in_one_graph():
    block = Official(32).eval()
    expected = copy.deepcopy(block)
    fuse(block)
    x = inputs(32)["dense"]
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected(x))


def test_shared_modules_change_once_and_dtype_and_mode_stay():
    block = Xmu(32, 4, 5).half().eval()
    model = nn.ModuleList([block, block, nn.Identity()])
    report = fuse(model)
    assert [s.name for s in report.swapped] == ["0"] and model[1] is model[0]
    assert not block.training and block.ca.se[0].weight.dtype == torch.float16
    assert block(inputs(32, torch.float16)["dense"]).dtype == torch.float16


def test_a_model_on_meta_is_checked_too():
    with torch.device("meta"):
        module = Bubbliiiing(32)
    assert fuse(module).swapped
    assert module.channelattention.fc1.weight.is_meta


def test_fused_modules_are_not_fused_again_and_backend_is_kept():
    model = nn.Sequential(Bubbliiiing(32), FusedCBAM(32))
    report = fuse(model, backend="reference")
    assert model[0].backend == "reference" and [r.reason for r in report.left] == [
        'it runs fused already, with backend="auto"'
    ]
    again = fuse(model)
    assert not again.swapped and [r.name for r in again.left] == ["0", "1"]
    back = unfuse(model)
    assert [s.name for s in back.swapped] == ["0"] and [r.name for r in back.left] == ["1"]


def test_report_prints_a_table():
    model = nn.Sequential(Bubbliiiing(32), Renamed(act=nn.SiLU))
    text = str(fuse(model)).splitlines()
    assert text[0] == "fused 1, left 1"
    assert text[1].split() == [
        "0", "plain_cbam.Bubbliiiing", "->", "cbam_fused.compat.bubbliiiing.cbam_block",
        "pool_types=('avg',", "'max'),", 'spatial_order="mean_max"',
    ]  # fmt: skip
    assert text[2].startswith("  1  whole_models.Renamed left") and text[2].endswith("does not have")


def test_pickles_copies_and_sync_batch_norm():
    module = Official(32)
    randomise(module)
    fuse(module)
    module.eval()
    x = inputs(32)["dense"]
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for twin in (torch.load(stream, weights_only=False), copy.deepcopy(module)):
        assert torch.equal(twin(x), module(x))
        unfuse(twin)
        assert type(twin) is Official
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))
    assert torch.equal(converted(x), module(x))
    unfuse(converted)
    assert isinstance(converted.SpatialGate.spatial.bn, nn.SyncBatchNorm)


def test_fuse_and_unfuse_refuse_what_is_no_model():
    for f in (fuse, unfuse):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
            f(3)
    with pytest.raises(ValueError, match="backend must be one of"):
        fuse(nn.Identity(), backend="gpu")


def test_a_report_of_nothing_says_so():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    assert str(fuse(model)) == "fused 0, left 0: nothing in it looks like a CBAM"
    assert str(unfuse(model)) == "unfused 0, left 0: nothing in it is fused"


def test_a_layout_of_its_own_becomes_what_it_is():
    model = nn.Sequential(Renamed())
    (swapped,) = fuse(model).swapped
    assert swapped.target == "cbam_fused.FusedCBAM"
