"""Each dialect's class against its original: numbers, state_dicts, constructors, pickling, seeds."""

import copy
import inspect
import pickle
import re

import dialect_cases
import pytest
import torch
import torch.nn as nn
from dialect_cases import CASES, assert_same_numbers, inputs

from cbam_fused import ChannelGate, FusedCBAM, SpatialGate
from cbam_fused.compat import dialects


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


case_of = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@case_of
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_numbers(case, training, target):
    original, fused = case.pair()
    fused.backend = target.backend
    original, fused = original.to(target.device), fused.to(target.device)
    for x in inputs(case.width).values():
        assert_same_numbers(copy.deepcopy(original), copy.deepcopy(fused), x.to(target.device), training)


@pytest.mark.parametrize("at", range(9))
def test_the_comparison_finds_one_number_that_is_off(at, monkeypatch):
    """By a part in a hundred thousand: in y, dx, and each of the six learnt tensors' gradients and a buffer."""
    original, fused = CASES["official"].pair()
    x = inputs(CASES["official"].width)["dense"]

    def planted(module, *arguments, run=dialect_cases.run):
        found = run(module, *arguments)
        if type(module) is type(fused):
            t = list(found.values())[at]
            t.view(-1)[t.abs().argmax()] *= 1 + 1e-5
        return found

    assert_same_numbers(copy.deepcopy(original), copy.deepcopy(fused), x, True)
    name = list(dialect_cases.run(copy.deepcopy(original), x, torch.ones_like(x)))[at]
    monkeypatch.setattr(dialect_cases, "run", planted)
    with pytest.raises(AssertionError, match=f"^{re.escape(name)} is off by"):
        assert_same_numbers(original, fused, x, True)


@pytest.mark.parametrize(
    "name", ["official", "official-lp-lse", "pytorchcv", "timm", "timm-bias-k3", "timm-light"]
)
def test_batch_norm_weight_of_zero(name, target):
    """The official ResNet starts so: the spatial gate is then a constant, its convolution gets no gradient."""
    original, fused = CASES[name].pair()
    for module in (original, fused):
        norms = [leaf for leaf in module.modules() if isinstance(leaf, nn.BatchNorm2d)]
        assert norms
        for norm in norms:
            nn.init.zeros_(norm.weight)
    fused.backend = target.backend
    original, fused = original.to(target.device), fused.to(target.device)
    for x in inputs(CASES[name].width).values():
        assert_same_numbers(copy.deepcopy(original), copy.deepcopy(fused), x.to(target.device), True)


@case_of
def test_state_dict_is_the_originals(case):
    original, fused = case.pair()
    theirs, ours = original.state_dict(), fused.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key
    back = case.original()(*case.args, **case.kwargs)
    back.load_state_dict(ours)
    for key, value in back.state_dict().items():
        assert torch.equal(value, theirs[key]), key


@case_of
def test_one_seed_gives_the_originals_weights(case):
    torch.manual_seed(3)
    original = case.original()(*case.args, **case.kwargs)
    torch.manual_seed(3)
    fused = case.fused(*case.args, **case.kwargs)
    for (key, a), b in zip(original.state_dict().items(), fused.state_dict().values()):
        assert torch.equal(a, b), key


@case_of
def test_constructor_is_the_originals(case):
    row = dialects.find(case.dialect)
    ours = inspect.signature(case.fused).parameters
    assert {n: p.default for n, p in ours.items()} == dict(row.signature)
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in ours.values())
    if case.real:
        theirs = inspect.signature(case.original()).parameters
        assert [(n, p.default) for n, p in ours.items()] == [(n, p.default) for n, p in theirs.items()]


@case_of
def test_batch_norm_settings_are_the_originals(case):
    def settings(module):
        return [(m.eps, m.momentum) for m in module.modules() if isinstance(m, nn.BatchNorm2d)]

    original, fused = case.pair()
    assert settings(fused) == settings(original)


@case_of
def test_pickles_and_copies(case):
    _, fused = case.pair()
    fused.eval()
    x = inputs(case.width)["dense"]
    assert isinstance(fused, (FusedCBAM, ChannelGate, SpatialGate))
    for twin in (pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused)):
        assert type(twin) is case.fused
        assert torch.equal(twin(x), fused(x))


@pytest.mark.parametrize("channels, hidden", [(8, 1), (24, 2), (40, 3), (64, 4), (7, 1)])
def test_timm_rounds_half_up(channels, hidden):
    from cbam_fused.compat.timm import CbamModule

    assert CbamModule(channels).channel.fc1.out_channels == hidden
    original = pytest.importorskip("timm.layers.cbam", reason="timm is not installed").CbamModule(channels)
    assert original.channel.fc1.out_channels == hidden


def test_luuuyi_ignores_the_ratio():
    from cbam_fused.compat.luuuyi import ChannelAttention

    assert ChannelAttention(48, ratio=4).fc._modules["0"].out_channels == 3


@pytest.mark.parametrize("reduced", [torch.bfloat16, torch.float16])
def test_reduced_precision_keeps_dtype_and_is_close(reduced):
    case = CASES["bubbliiiing"]
    original, fused = case.pair()
    x = inputs(case.width)["dense"]
    exact = copy.deepcopy(original).double()(x.to(reduced).double())
    y = fused(x.to(reduced))
    assert y.dtype == reduced
    # float32 parameters, float32 sums: what is left is the rounding of y itself, half a unit of its last place.
    limit = 0.505 * torch.finfo(reduced).eps * exact.abs() + 1e-6
    assert ((y.double() - exact).abs() <= limit).all()
    plain = copy.deepcopy(original).to(reduced)(x.to(reduced))
    assert ((plain.double() - exact).abs() > limit).any()


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda c: c.timm.CbamModule(), TypeError, r"CbamModule\(\) missing a required argument: 'channels'"),
        (lambda c: c.timm.CbamModule(32, act_layer=nn.SiLU), ValueError, "act_layer must be torch.nn.ReLU"),
        (
            lambda c: c.timm.CbamModule(32, gate_layer="hard_sigmoid"),
            ValueError,
            'gate_layer must be "sigmoid"',
        ),
        (
            lambda c: c.timm.CbamModule(32, spatial_kernel_size=4),
            ValueError,
            "kernel_size must be odd, got 4",
        ),
        (lambda c: c.timm.SEModule(32, norm_layer=nn.BatchNorm2d), ValueError, "norm_layer must be None"),
        (
            lambda c: c.official.CBAM(8),
            ValueError,
            "gate_channels must be at least reduction_ratio = 16, got 8",
        ),
        (lambda c: c.official.CBAM(32, 16, ["mean"]), ValueError, "pool_types must be any of"),
        (lambda c: c.luuuyi.ChannelAttention(8), ValueError, "in_planes must be at least 16, got 8"),
        (lambda c: c.mmyolo.CBAM(32, act_cfg=dict(type="SiLU")), ValueError, "act_cfg must be dict"),
        (lambda c: c.elbuco1.CBAM(32, 4), TypeError, "missing a required argument: 'kernel_size'"),
        (lambda c: c.ultralytics.CBAM(0), ValueError, "channels must be at least 1, got 0"),
        (lambda c: c.ultralytics.CBAM(8)(torch.zeros(1, 9, 4, 4)), ValueError, "x must have 8 channels"),
        (lambda c: setattr(c.ultralytics.CBAM(8), "backend", "gpu"), ValueError, "backend must be one of"),
    ],
)
def test_errors_name_the_argument(make, error, text):
    from cbam_fused import compat

    with pytest.raises(error, match=text):
        make(compat)


def test_light_timm_accepts_any_gate_layer_as_its_source_does():
    case = CASES["timm-light"]
    assert case.fused(32, gate_layer="hard_sigmoid")(inputs(32)["dense"]).shape == (2, 32, 9, 7)


def test_masks_differentiate_twice():
    case = CASES["luuuyi-channel"]
    _, fused = case.pair()
    x = inputs(case.width, torch.float64)["dense"][:1].requires_grad_()
    parameters = tuple(fused.double().parameters())
    assert torch.autograd.gradgradcheck(lambda x, *_: fused(x), (x, *parameters), fast_mode=True)


def test_attention_maps_of_a_dialect():
    case = CASES["timm"]
    _, fused = case.pair()
    fused.eval()
    x = inputs(case.width)["dense"]
    channel, spatial = fused.attention_maps(x)
    torch.testing.assert_close(x * channel[:, :, None, None] * spatial, fused(x).detach())
