"""state_dicts between dialects: recognised, converted, written back exactly; errors that help."""

import copy
import warnings

import pytest
import torch
import torch.nn as nn
from dialect_cases import BLOCKS, CASES, inputs
from plain_cbam import Bubbliiiing, Official, Xmu

from cbam_fused import ChannelGate, FusedCBAM, SpatialGate, to_dialect
from cbam_fused.compat import dialects, layouts

block_of = pytest.mark.parametrize("case", BLOCKS.values(), ids=BLOCKS.keys())


def native(case):
    """A FusedCBAM with the options of a case's original, and random weights."""
    row = dialects.find(case.dialect)
    options = row.resolve(row.bind(case.args, case.kwargs))
    norm = options.pop("norm", None) is not None
    return FusedCBAM(options.pop("channels"), spatial_norm=norm, **options)


def equal(a, b):
    assert list(a) == list(b)
    for key, value in a.items():
        assert value.dtype == b[key].dtype and torch.equal(value, b[key]), key


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@block_of
@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone.layer3.1.cbam."])
def test_a_fused_cbam_loads_it_and_gives_it_back(case, prefix):
    original, _ = case.pair()
    state = {prefix + k: v for k, v in original.state_dict().items()}
    if prefix.startswith("model"):
        state["model.backbone.layer3.1.conv1.weight"] = torch.zeros(4, 4, 1, 1)
        state["model.head.fc.bias"] = torch.zeros(4)
    module = native(case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.load_state_dict(state)
    original.eval()
    module.eval()
    x = inputs(case.width)["dense"]
    # The gates of this class and the dialect's own differ by the order of float32 sums only.
    torch.testing.assert_close(module.double()(x.double()), copy.deepcopy(original).double()(x.double()))
    module.float()
    equal(to_dialect(module, case.dialect), original.state_dict())


@block_of
def test_a_model_loads_it_where_the_block_sits(case):
    original, _ = case.pair()
    before = nn.Sequential(nn.Conv2d(3, case.width, 1), original)
    after = nn.Sequential(nn.Conv2d(3, case.width, 1), native(case))
    result = after.load_state_dict(before.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    before.eval()
    after.eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(after.double()(x), before.double()(x))
    equal(to_dialect(after.float(), case.dialect), before.float().state_dict())


@pytest.mark.parametrize("other", ["pytorchcv", "official"])
def test_a_dialects_class_loads_another_dialect(other):
    from cbam_fused.compat import pytorchcv

    original = Official(32)
    module = pytorchcv.CbamBlock(32)
    module.load_state_dict(original.state_dict())
    equal(to_dialect(module, "official"), original.state_dict())
    timm = CASES["timm"].fused(32, mlp_bias=True, rd_channels=2)
    timm.load_state_dict(to_dialect(module, other))
    x = inputs(32)["dense"].double()
    torch.testing.assert_close(timm.double().eval()(x), original.double().eval()(x))
    equal(to_dialect(timm.float(), "official"), original.float().state_dict())


def test_missing_biases_become_zero():
    plain = Bubbliiiing(32)
    module = FusedCBAM(32, 8, spatial_norm=False, spatial_bias=True)
    module.load_state_dict(plain.state_dict())
    assert not module.channel_gate.fc1.bias.any() and not module.channel_gate.fc2.bias.any()
    assert not module.spatial_gate.conv.bias.any()
    x = inputs(32)["dense"].double()
    torch.testing.assert_close(module.double()(x), plain.double()(x))
    equal(to_dialect(module.float(), "bubbliiiing"), plain.float().state_dict())
    module.channel_gate.fc1.bias.data[0] = 1
    with pytest.raises(
        ValueError, match='layout of "bubbliiiing": it has no fc1.bias, this module\'s is not zero'
    ):
        to_dialect(module, "bubbliiiing")


def test_the_convolutions_inputs_change_places():
    plain = Bubbliiiing(32)
    module = FusedCBAM(32, 8, spatial_norm=False, mlp_bias=False)
    module.load_state_dict(plain.state_dict())
    assert torch.equal(module.spatial_gate.conv.weight, plain.spatialattention.conv1.weight.flip(1))
    same = FusedCBAM(32, 8, spatial_norm=False, mlp_bias=False, spatial_order="mean_max")
    same.load_state_dict(plain.state_dict())
    assert torch.equal(same.spatial_gate.conv.weight, plain.spatialattention.conv1.weight)


def test_its_own_state_dict_passes_unchanged_and_behind_module():
    module = FusedCBAM(32, spatial_order="mean_max")
    state = module.state_dict()
    for prefix in ("", "module."):
        twin = FusedCBAM(32, spatial_order="mean_max")
        twin.load_state_dict({prefix + k: v for k, v in state.items()})
        equal(twin.state_dict(), state)


def test_pruned_modules_load_their_own_and_are_written_as_they_act():
    from torch.nn.utils import prune

    module = FusedCBAM(32)
    prune.l1_unstructured(module.channel_gate.fc1, "weight", 0.5)
    twin = FusedCBAM(32)
    prune.identity(twin.channel_gate.fc1, "weight")
    twin.load_state_dict(module.state_dict())
    x = inputs(32)["dense"]
    assert torch.equal(twin.eval()(x), module.eval()(x))
    written = to_dialect(module, "official")
    assert (written["ChannelGate.mlp.1.weight"] == 0).sum() >= 32
    plain = Official(32).eval()
    plain.load_state_dict(written)
    torch.testing.assert_close(plain(x), module(x))


def test_to_dialect_shares_memory_and_does_not_change_the_module():
    module = FusedCBAM(32, spatial_order="max_mean")
    before = copy.deepcopy(module.state_dict())
    written = to_dialect(module, "official")
    assert written["ChannelGate.mlp.1.weight"].data_ptr() == module.channel_gate.fc1.weight.data_ptr()
    equal(module.state_dict(), before)


def test_an_unknown_layout_lists_what_was_found_and_the_nearest_dialect():
    state = {k.replace("mlp.1", "mlp.fc_one"): v for k, v in Official(32).state_dict().items()}
    text = r'(?s)state_dict must be in a layout of .*official.*ChannelGate.mlp.fc_one.weight \(2, 32\).*nearest dialect: "official"'
    with pytest.raises(RuntimeError, match=text):
        FusedCBAM(32).load_state_dict(state)
    model = nn.Sequential(nn.Identity(), FusedCBAM(32))
    nested = {f"1.{k}": v for k, v in state.items()}
    with (
        pytest.warns(UserWarning, match=text),
        pytest.raises(RuntimeError, match="1.ChannelGate.mlp.fc_one.weight"),
    ):
        model.load_state_dict(nested)
    with pytest.warns(UserWarning, match=text):
        assert len(model.load_state_dict(nested, strict=False).unexpected_keys) == len(nested)


@pytest.mark.parametrize("name", [r.name for r in dialects.TABLE if r.kind == "block"])
def test_the_nearest_dialect_survives_a_typo(name):
    row = dialects.find(name)
    keys = [k for _, k in row.entries(bool(row.constant("mlp_bias", True)), True)]
    nearest, _ = layouts.nearest(["x." + k if i else "x.lost" for i, k in enumerate(keys)])
    assert dict(dialects.find(nearest).layers) == dict(row.layers)


@pytest.mark.parametrize(
    "module, text",
    [
        (
            lambda: FusedCBAM(64),
            r"fc1.weight of this module has shape \(4, 64\), the state_dict's is \(2, 32\)",
        ),
        (lambda: FusedCBAM(32, kernel_size=3), r"conv.weight of this module has shape \(1, 2, 3, 3\)"),
        (
            lambda: FusedCBAM(32, spatial_norm=False),
            r"the state_dict has bn.weight \(1,\), this module has none",
        ),
        (lambda: FusedCBAM(32, mlp_bias=False), r"the state_dict has fc1.bias \(2,\), this module has none"),
        (lambda: FusedCBAM(32, spatial=False), r"the state_dict has conv.weight"),
    ],
)
def test_a_misfit_says_what_does_not_fit(module, text):
    state = Official(32).state_dict()
    for prefix in ("", "module."):
        with pytest.raises(RuntimeError, match=text):
            module().load_state_dict({prefix + k: v for k, v in state.items()})


def test_two_that_fit_are_ambiguous():
    state = nn.ModuleList([Official(32), Official(32)]).state_dict()
    with pytest.raises(
        RuntimeError, match=r'(?s)must hold one CBAM that fits, got 2; .*"0." \(official\).*"1." \(official\)'
    ):
        FusedCBAM(32).load_state_dict(state)
    both = nn.ModuleList([Official(32), Official(64)])
    module = FusedCBAM(64)
    module.load_state_dict(both.state_dict())
    equal(to_dialect(module, "official"), both[1].state_dict())


def test_options_that_a_state_dict_cannot_carry_are_warned_of():
    state = Xmu(32, 4, 5).state_dict()
    with pytest.warns(UserWarning, match='layout of "xmu", whose block has residual=True'):
        FusedCBAM(32, 4, 5, mlp_bias=False, spatial_bias=True, spatial_norm=False).load_state_dict(state)


@pytest.mark.parametrize(
    "module, name, text",
    [
        (lambda: FusedCBAM(32), "bubbliiiing", "it has no BatchNorm, this module has one"),
        (lambda: FusedCBAM(32, spatial_norm=False), "timm", "it has a BatchNorm, this module has none"),
        (lambda: FusedCBAM(32, spatial=False), "timm", "it has a spatial gate"),
        (
            lambda: FusedCBAM(32, residual=True),
            "official",
            "it has residual=False, this module has residual=True",
        ),
        (lambda: FusedCBAM(32, light=True), "timm", "its spatial convolution reads two maps"),
        (lambda: FusedCBAM(32, spatial_norm=False), "ultralytics", "its MLP has one layer"),
        (lambda: FusedCBAM(32, pool_types=("avg",)), "timm", "pool_types"),
        (lambda: FusedCBAM(32, arrangement="parallel"), "official", "arrangement"),
        (lambda: nn.Linear(3, 3), "timm", "module must be or hold a FusedCBAM, got Linear"),
        (lambda: FusedCBAM(32), "tim", 'name must be one of .*"timm"'),
    ],
)
def test_what_a_dialect_cannot_say_is_refused(module, name, text):
    with pytest.raises(ValueError, match=text):
        to_dialect(module(), name)


def test_a_native_state_dict_does_not_tell_its_order():
    timm = CASES["timm"].fused(32, mlp_bias=True, rd_channels=2)
    with pytest.raises(RuntimeError, match="to_dialect"):
        timm.load_state_dict(FusedCBAM(32).state_dict())


def test_one_and_three_dimensional_modules_round_trip():
    for dims in (1, 3):
        module = FusedCBAM(32, dims=dims, mlp_bias=False, spatial_order="mean_max")
        written = to_dialect(module, "timm")
        assert written["channel.fc1.weight"].shape == (2, 32, *[1] * dims)
        twin = FusedCBAM(32, dims=dims, mlp_bias=False, spatial_order="mean_max")
        twin.load_state_dict(written)
        equal(twin.state_dict(), module.state_dict())


def test_gates_load_squeeze_and_excitation():
    original, _ = CASES["torchvision-se"].pair()
    gate = ChannelGate(32, hidden_channels=4, pool_types=("avg",))
    gate.load_state_dict(original.state_dict())
    x = inputs(32)["dense"].double()
    torch.testing.assert_close(gate.double()(x), original.double()(x))
    spatial, _ = CASES["ultralytics-spatial"].pair()
    module = SpatialGate(3, norm=False, order="mean_max")
    module.load_state_dict({"module." + k: v for k, v in spatial.state_dict().items()})
    torch.testing.assert_close(module.double()(x), spatial.double()(x))


def test_checkpoints_older_than_num_batches_tracked():
    state = Official(32).state_dict()
    del state["SpatialGate.spatial.bn.num_batches_tracked"]
    module = FusedCBAM(32)
    module.load_state_dict(dict(state))
    assert module.spatial_gate.bn.num_batches_tracked == 0


def test_what_is_no_state_dict_says_what_to_load():
    module = FusedCBAM(32, spatial_norm=False)
    with pytest.raises(
        TypeError, match="^state_dict must be a mapping, got str; torch.load reads one from a file$"
    ):
        module.load_state_dict("cbam.pt")
    checkpoint = {
        "epoch": 3,
        "state_dict": FusedCBAM(32, spatial_norm=False).state_dict(),
        "optimizer": {"state": {}},
    }
    with pytest.raises(RuntimeError, match="this checkpoint has them under 'state_dict': load that entry$"):
        module.load_state_dict(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])


def test_a_block_in_two_places_is_written_twice():
    model = nn.Module()
    model.a = model.b = FusedCBAM(32, spatial_norm=False, mlp_bias=False)
    state = to_dialect(model, "bubbliiiing")
    first, second = ([k[2:] for k in state if k.startswith(p)] for p in ("a.", "b."))
    assert first and first == second
