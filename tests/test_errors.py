"""Bad input: the exact message, for the module, the function and every backend; nothing is computed."""

import re

import pytest
import torch
import torch.nn as nn

from cbam_fused import FusedCBAM, SpatialGate, backends, cbam

POOLS = '"avg", "max", "lp", "lse"'
BACKENDS = '"auto", "cuda", "triton", "cpu", "reference"'
SHAPES = "(N, C, L) or (N, C, H, W) or (N, C, D, H, W)"

CONSTRUCTORS = [
    (dict(channels=0), ValueError, "channels must be at least 1, got 0"),
    (dict(channels=-3), ValueError, "channels must be at least 1, got -3"),
    (dict(channels=16.0), TypeError, "channels must be an int, got float"),
    (dict(channels="16"), TypeError, "channels must be an int, got str"),
    (dict(channels=True), TypeError, "channels must be an int, got bool"),
    (dict(reduction_ratio=0), ValueError, "reduction_ratio must be at least 1, got 0"),
    (dict(reduction_ratio=0.5), TypeError, "reduction_ratio must be an int, got float"),
    (dict(hidden_channels=-1), ValueError, "hidden_channels must be at least 1, got -1"),
    (dict(hidden_channels=2.0), TypeError, "hidden_channels must be an int, got float"),
    (dict(kernel_size=4), ValueError, "kernel_size must be odd, got 4"),
    (dict(kernel_size=0), ValueError, "kernel_size must be at least 1, got 0"),
    (
        dict(kernel_size=(7, 7)),
        TypeError,
        "kernel_size must be an int, got (7, 7); pools are given as pool_types=",
    ),
    (dict(pool_types=()), ValueError, "pool_types must name at least one pool, got an empty list"),
    (dict(pool_types=("avg", "min")), ValueError, f"pool_types must be any of {POOLS}, got 'min'"),
    (dict(pool_types=(["avg"],)), ValueError, f"pool_types must be any of {POOLS}, got ['avg']"),
    (dict(pool_types=("avg", "avg")), ValueError, "pool_types must name each pool once, got ('avg', 'avg')"),
    (
        dict(pool_types="avg"),
        TypeError,
        'pool_types must be a sequence of names such as ("avg", "max"), got the str \'avg\'',
    ),
    (
        dict(pool_types=None),
        TypeError,
        'pool_types must be a sequence of names such as ("avg", "max"), got None',
    ),
    (
        dict(pool_types=("avg",), light=True),
        ValueError,
        'pool_types must be ("avg", "max") with light=True, got (\'avg\',)',
    ),
    (
        dict(spatial_order="max"),
        ValueError,
        'spatial_order must be one of "max_mean", "mean_max", got \'max\'',
    ),
    (dict(ties="last"), ValueError, 'ties must be one of "first", "split", got \'last\''),
    (dict(dims=4), ValueError, "dims must be 1, 2 or 3, got 4"),
    (dict(backend="gpu"), ValueError, f"backend must be one of {BACKENDS}, got 'gpu'"),
    (dict(backend=None), ValueError, f"backend must be one of {BACKENDS}, got None"),
]


def _raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize("options, kind, message", CONSTRUCTORS, ids=[str(c[0]) for c in CONSTRUCTORS])
def test_constructor(options, kind, message):
    with _raises(kind, message):
        FusedCBAM(**{"channels": 16, **options})


INPUTS = [
    ([[1.0]], TypeError, "x must be a Tensor, got list"),
    (torch.zeros(2, 3), ValueError, "x must have shape (N, C, H, W), got (2, 3)"),
    (torch.zeros(()), ValueError, "x must have shape (N, C, H, W), got ()"),
    (torch.zeros(2, 16, 5), ValueError, "x must have shape (N, C, H, W), got (2, 16, 5)"),
    (torch.zeros(1, 2, 16, 5, 5), ValueError, "x must have shape (N, C, H, W), got (1, 2, 16, 5, 5)"),
    (
        torch.zeros(2, 15, 5, 5),
        ValueError,
        "x must have 16 channels in shape (N, C, H, W), got 15 in (2, 15, 5, 5)",
    ),
    (
        torch.zeros(2, 16, 0, 5),
        ValueError,
        "x must have spatial sizes of at least 1 in shape (N, C, H, W), got (2, 16, 0, 5)",
    ),
    (
        torch.zeros(0, 16, 5, 0),
        ValueError,
        "x must have spatial sizes of at least 1 in shape (N, C, H, W), got (0, 16, 5, 0)",
    ),
    (
        torch.zeros(2, 16, 5, 5, dtype=torch.int64),
        TypeError,
        "x must have dtype float32, float64, bfloat16 or float16, got torch.int64",
    ),
    (
        torch.zeros(2, 16, 5, 5, dtype=torch.complex64),
        TypeError,
        "x must have dtype float32, float64, bfloat16 or float16, got torch.complex64",
    ),
    (
        torch.zeros(2, 16, 5, 5).to_sparse(),
        TypeError,
        "x must be a strided tensor, got layout torch.sparse_coo",
    ),
    (
        torch.zeros(2, 16, 5, 5, dtype=torch.float64),
        TypeError,
        "w1 (a module's fc1.weight) must have the dtype of x, torch.float64, got torch.float32",
    ),
    (
        torch.zeros(2, 16, 5, 5, device="meta"),
        ValueError,
        "w1 (a module's fc1.weight) must be on the device of x, meta, got cpu",
    ),
]


@pytest.mark.parametrize("x, kind, message", INPUTS, ids=[c[2] for c in INPUTS])
@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "cuda", "triton"])
def test_input_of_the_module(backend, x, kind, message):
    module = FusedCBAM(16, 4, backend=backend)
    before = module.spatial_gate.bn.num_batches_tracked.clone()
    with _raises(kind, message):
        module(x)
    with _raises(kind, message):
        module.attention_maps(x)
    assert torch.equal(module.spatial_gate.bn.num_batches_tracked, before)


def test_other_dims_name_their_shape():
    with _raises(ValueError, "x must have shape (N, C, L), got (2, 8, 5, 5)"):
        FusedCBAM(8, dims=1)(torch.zeros(2, 8, 5, 5))
    with _raises(ValueError, "x must have shape (N, C, D, H, W), got (2, 8, 5, 5)"):
        FusedCBAM(8, dims=3)(torch.zeros(2, 8, 5, 5))
    with _raises(ValueError, "x must have at least 1 channel in shape (N, C, H, W), got (2, 0, 5, 5)"):
        SpatialGate()(torch.zeros(2, 0, 5, 5))


def test_parameters_in_16_bits_beside_float32():
    module = FusedCBAM(16, 4, dtype=torch.bfloat16)
    with _raises(
        TypeError, "w1 (a module's fc1.weight) must have the dtype of x, torch.float32, got torch.bfloat16"
    ):
        module(torch.zeros(2, 16, 5, 5))
    with _raises(
        TypeError,
        "w1 (a module's fc1.weight) must have the dtype of x, torch.float16 or torch.float32, got torch.bfloat16",
    ):
        module(torch.zeros(2, 16, 5, 5, dtype=torch.float16))
    module = FusedCBAM(16, 4).eval()
    module.spatial_gate.double()
    with _raises(
        TypeError,
        "conv_weight (a module's conv.weight) must have the dtype of x, torch.float32, got torch.float64",
    ):
        module(torch.zeros(2, 16, 5, 5))
    module.spatial_gate.conv.float()
    with _raises(
        TypeError,
        "norm.weight (a module's bn.weight) must have the dtype of x, torch.float32, got torch.float64",
    ):
        module(torch.zeros(2, 16, 5, 5))


def _replaced(name, layer):
    def change(module):
        gate, child = name.split(".")
        setattr(getattr(module, gate), child, layer())

    return change


# A layer that was replaced after the module was made, and what a call then says.
REPLACED = [
    (
        _replaced("channel_gate.fc1", lambda: nn.Linear(8, 4)),
        ValueError,
        "w1 (a module's fc1.weight) must have shape (h, 16), got (4, 8)",
    ),
    (
        _replaced("channel_gate.fc2", lambda: nn.Linear(16, 4, bias=False)),
        ValueError,
        "w2 (a module's fc2.weight) must have shape (16, 4), got (4, 16)",
    ),
    (
        _replaced("spatial_gate.conv", lambda: nn.Conv2d(2, 1, 4, padding=2)),
        ValueError,
        "conv_weight (a module's conv.weight) must have odd kernel sizes, got (1, 2, 4, 4)",
    ),
    (
        _replaced("spatial_gate.conv", lambda: nn.Conv2d(2, 3, 3, padding=1)),
        ValueError,
        "conv_weight (a module's conv.weight) must have shape (1, 2, k, k), got (3, 2, 3, 3)",
    ),
    (
        _replaced("spatial_gate.bn", lambda: nn.BatchNorm2d(6)),
        ValueError,
        "norm must have num_features=1, got 6",
    ),
    (
        _replaced("spatial_gate.bn", lambda: nn.BatchNorm2d(1, device="meta")),
        ValueError,
        "norm.weight (a module's bn.weight) must be on the device of x, cpu, got meta",
    ),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("arrangement", ["channel_first", "spatial_first", "parallel"])
@pytest.mark.parametrize("change, kind, message", REPLACED, ids=[c[2] for c in REPLACED])
@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "cuda", "triton"])
def test_a_replaced_layer(backend, change, kind, message, arrangement, training):
    module = FusedCBAM(16, 4, arrangement=arrangement, backend=backend).train(training)
    change(module)
    before = module.spatial_gate.bn.num_batches_tracked.clone()
    x = torch.zeros(2, 16, 5, 5)
    for call in (module, module.attention_maps):
        with _raises(kind, message):
            call(x)
    if before.device == x.device:
        assert torch.equal(module.spatial_gate.bn.num_batches_tracked, before)


def test_the_gates_name_their_own_arguments():
    with _raises(ValueError, 'order must be one of "max_mean", "mean_max", got \'max\''):
        SpatialGate(order="max")
    with _raises(TypeError, "kernel_size must be an int, got [7, 7]"):
        SpatialGate(kernel_size=[7, 7])


FIXED = {
    "FusedCBAM": {
        "pool_types": ("lp",),
        "spatial_order": "mean_max",
        "light": True,
        "ties": "split",
        "residual": True,
    },
    "ChannelGate": {"pool_types": ("lp",), "light": True, "ties": "split", "residual": True},
    "SpatialGate": {"order": "mean_max", "light": True, "ties": "split", "residual": True},
}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in FIXED.items() for name in names])
def test_options_are_fixed(kind, name):
    block = FusedCBAM(8)
    module = {"FusedCBAM": block, "ChannelGate": block.channel_gate, "SpatialGate": block.spatial_gate}[kind]
    message = f"{name} is fixed when a {kind} is made: make another one and load this one's state_dict"
    with _raises(AttributeError, message):
        setattr(module, name, FIXED[kind][name])
    block.order = module.note = 1  # no option of FusedCBAM
    block.order, block.ties = 2, "first"  # as it is


def _arguments(**changes):
    good = dict(
        x=torch.zeros(2, 6, 5, 5),
        w1=torch.zeros(3, 6),
        b1=torch.zeros(3),
        w2=torch.zeros(6, 3),
        b2=torch.zeros(6),
        conv_weight=torch.zeros(1, 2, 7, 7),
        conv_bias=None,
    )
    return {**good, **changes}


CALLS = [
    (dict(x=torch.zeros(6, 5)), ValueError, f"x must have shape {SHAPES}, got (6, 5)"),
    (dict(x=None), TypeError, "x must be a Tensor, got NoneType"),
    (dict(w1=torch.zeros(3, 5)), ValueError, "w1 (a module's fc1.weight) must have shape (h, 6), got (3, 5)"),
    (
        dict(w1=torch.zeros(3, 6, 1, 1)),
        ValueError,
        "w1 (a module's fc1.weight) must have shape (h, 6), got (3, 6, 1, 1)",
    ),
    (dict(w1=torch.zeros(0, 6)), ValueError, "w1 (a module's fc1.weight) must have shape (h, 6), got (0, 6)"),
    (dict(w1=[1.0]), TypeError, "w1 must be a Tensor, got list"),
    (dict(b1=torch.zeros(6)), ValueError, "b1 (a module's fc1.bias) must have shape (3,), got (6,)"),
    (dict(w2=torch.zeros(3, 6)), ValueError, "w2 (a module's fc2.weight) must have shape (6, 3), got (3, 6)"),
    (dict(w2=None), ValueError, "w2 (a module's fc2.weight) must have shape (6, 3), got None"),
    (dict(w1=None, b1=None), ValueError, "w2 (a module's fc2.weight) must have shape (6, 6), got (6, 3)"),
    (
        dict(w1=None, w2=torch.zeros(6, 6)),
        ValueError,
        "b1 must be None where w1 is None, got a Tensor",
    ),
    (dict(b2=torch.zeros(3)), ValueError, "b2 (a module's fc2.bias) must have shape (6,), got (3,)"),
    (dict(b2=1.0), TypeError, "b2 must be a Tensor, got float"),
    (
        dict(conv_weight=torch.zeros(1, 1, 7, 7)),
        ValueError,
        "conv_weight (a module's conv.weight) must have shape (1, 2, k, k), got (1, 1, 7, 7)",
    ),
    (
        dict(conv_weight=torch.zeros(1, 2, 7)),
        ValueError,
        "conv_weight (a module's conv.weight) must have shape (1, 2, k, k), got (1, 2, 7)",
    ),
    (
        dict(light=True),
        ValueError,
        "conv_weight (a module's conv.weight) must have shape (1, 1, k, k), got (1, 2, 7, 7)",
    ),
    (
        dict(conv_weight=torch.zeros(1, 2, 7, 6)),
        ValueError,
        "conv_weight (a module's conv.weight) must have odd kernel sizes, got (1, 2, 7, 6)",
    ),
    (dict(conv_weight=3), TypeError, "conv_weight must be a Tensor, got int"),
    (
        dict(conv_bias=torch.zeros(2)),
        ValueError,
        "conv_bias (a module's conv.bias) must have shape (1,), got (2,)",
    ),
    (
        dict(conv_weight=None, norm=nn.BatchNorm2d(1)),
        ValueError,
        "norm must be None where conv_weight is None, got BatchNorm2d",
    ),
    (
        dict(conv_weight=None, conv_bias=torch.zeros(1)),
        ValueError,
        "conv_bias must be None where conv_weight is None, got Tensor",
    ),
    (
        dict(norm=nn.BatchNorm2d(1, device="meta")),
        ValueError,
        "norm.weight (a module's bn.weight) must be on the device of x, cpu, got meta",
    ),
    (dict(norm=nn.BatchNorm2d(6)), ValueError, "norm must have num_features=1, got 6"),
    (dict(norm=nn.BatchNorm2d(6).eval()), ValueError, "norm must have num_features=1, got 6"),
    (dict(norm=1e-5), TypeError, "norm must be a module or a function, got float"),
    (dict(pool_types=[]), ValueError, "pool_types must name at least one pool, got an empty list"),
    (
        dict(pool_types=None),
        TypeError,
        'pool_types must be a sequence of names such as ("avg", "max"), got None',
    ),
    (dict(backend="tpu"), ValueError, f"backend must be one of {BACKENDS}, got 'tpu'"),
    (
        dict(w2=torch.zeros(6, 3, dtype=torch.float64)),
        TypeError,
        "w2 (a module's fc2.weight) must have the dtype of x, torch.float32, got torch.float64",
    ),
    (
        dict(conv_weight=torch.zeros(1, 2, 7, 7, device="meta")),
        ValueError,
        "conv_weight (a module's conv.weight) must be on the device of x, cpu, got meta",
    ),
]


@pytest.mark.parametrize("changes, kind, message", CALLS, ids=[c[2] for c in CALLS])
def test_function(changes, kind, message):
    with _raises(kind, message):
        cbam(**_arguments(**changes))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_backend_for_another_device(device):
    """A name that cannot run raises, and says why: wrong device first, since no build would help."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    name = "cpu" if device == "cuda" else "cuda"
    module = FusedCBAM(8, backend=name, device=device)
    x = torch.zeros(1, 8, 3, 3, device=device)
    reason = backends()[name]
    more = "" if reason is True else f"; and {reason}"
    with _raises(
        RuntimeError, f'backend="{name}" cannot run: x must be on a {name} device, got {x.device}{more}'
    ):
        module(x)


@pytest.mark.parametrize("name", ["cuda", "triton", "cpu"])
def test_an_unavailable_backend_says_why(name):
    reason = backends()[name]
    if reason is True:
        pytest.skip(f"{name} is available here")
    device = "cpu" if name == "cpu" else "cuda"
    x = torch.zeros(1, 8, 3, 3, device=device if device == "cpu" or torch.cuda.is_available() else "cpu")
    with pytest.raises(RuntimeError, match=f'^backend="{name}" cannot run: .*{re.escape(str(reason))}$'):
        FusedCBAM(8, backend=name, device=x.device)(x)


def test_auto_never_fails(device):
    x = torch.zeros(1, 8, 3, 3, device=device)
    for options in ({}, {"pool_types": ("lp", "lse")}, {"kernel_size": 31}, {"spatial": False}):
        FusedCBAM(8, device=device, **options)(x)
