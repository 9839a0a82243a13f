"""FusedCBAM as a module among modules: arguments, parameters, what training tools do to it."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn
from oracle import DTYPES, assert_within
from torch.nn.utils import parametrizations, prune

import cbam_fused
from cbam_fused import ChannelGate, FusedCBAM, SpatialGate, cbam, compat
from cbam_fused import _config as cfg
from cbam_fused._config import Config, Parameters
from cbam_fused.reference import cbam_reference, channel_gate_reference, spatial_logits_reference


class PlainCBAM(nn.Module):
    """The specification over the parameters of a FusedCBAM."""

    def __init__(self, module):
        super().__init__()
        self.inner = module

    def forward(self, x):
        m = self.inner
        gate = m.spatial_gate
        weights = (*m.channel_gate.tensors(), *((None, None) if gate is None else gate.tensors()))
        return cbam_reference(x, Parameters(*weights), m.config, None if gate is None else gate.bn)


def _gradients(module, x, dy):
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.backward(dy)
    return y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())


def _agree(got, want, rtol=1e-4, atol=2e-5):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def _module(target, *args, **options):
    return FusedCBAM(*args, backend=target.backend, device=target.device, **options)


def test_constructor_positions_and_keywords():
    for module in (FusedCBAM(32), FusedCBAM(channels=32), FusedCBAM(32, 16, 7)):
        assert module.channel_gate.fc1.weight.shape == (2, 32)
        assert module.channel_gate.fc2.weight.shape == (32, 2)
        assert module.spatial_gate.conv.weight.shape == (1, 2, 7, 7)
        assert module.spatial_gate.conv.bias is None
        assert type(module.spatial_gate.bn) is nn.BatchNorm2d
    with pytest.raises(TypeError):
        FusedCBAM(32, 16, 7, 4)


def test_hidden_width():
    assert FusedCBAM(40).channel_gate.hidden_channels == 2
    assert FusedCBAM(8).channel_gate.hidden_channels == 1
    assert FusedCBAM(8, hidden_channels=5).channel_gate.fc1.out_features == 5
    single = FusedCBAM(8, hidden_channels=0)
    assert single.channel_gate.fc1 is None and single.channel_gate.fc2.weight.shape == (8, 8)


def _resnet_parameters(block, layers):
    """Parameters of torchvision's ResNet: convolutions without bias, a BatchNorm after each, one Linear."""
    count, inside = 3 * 64 * 49 + 2 * 64, 64
    for stage, repeats in enumerate(layers):
        width = 64 << stage
        out = width if block == "basic" else 4 * width
        for i in range(repeats):
            basic = [(inside, width, 9), (width, width, 9)]
            deep = [(inside, width, 1), (width, width, 9), (width, out, 1)]
            convolutions = basic if block == "basic" else deep
            if i == 0 and (stage > 0 or inside != out):
                convolutions = [*convolutions, (inside, out, 1)]
            count += sum(a * b * taps + 2 * b for a, b, taps in convolutions)
            inside = out
    return count + inside * 1000 + 1000


@pytest.mark.parametrize(
    "block, layers, official",
    [
        ("basic", (2, 2, 2, 2), 11_779_392),
        ("basic", (3, 4, 6, 3), 21_960_468),
        ("deep", (3, 4, 6, 3), 28_089_624),
        ("deep", (3, 4, 23, 3), 49_330_172),
    ],
    ids=["resnet18", "resnet34", "resnet50", "resnet101"],
)
def test_official_parameter_counts(block, layers, official):
    total = _resnet_parameters(block, layers)
    for stage, repeats in enumerate(layers):
        channels = (64 << stage) * (1 if block == "basic" else 4)
        total += repeats * sum(p.numel() for p in FusedCBAM(channels, device="meta").parameters())
    assert total == official


def test_state_dict_keys():
    assert list(FusedCBAM(16).state_dict()) == [
        "channel_gate.fc1.weight",
        "channel_gate.fc1.bias",
        "channel_gate.fc2.weight",
        "channel_gate.fc2.bias",
        "spatial_gate.conv.weight",
        "spatial_gate.bn.weight",
        "spatial_gate.bn.bias",
        "spatial_gate.bn.running_mean",
        "spatial_gate.bn.running_var",
        "spatial_gate.bn.num_batches_tracked",
    ]
    bare = FusedCBAM(16, mlp_bias=False, spatial_bias=True, spatial_norm=False)
    assert list(bare.state_dict()) == [
        "channel_gate.fc1.weight",
        "channel_gate.fc2.weight",
        "spatial_gate.conv.weight",
        "spatial_gate.conv.bias",
    ]
    assert list(FusedCBAM(16, spatial=False, hidden_channels=0).state_dict()) == [
        "channel_gate.fc2.weight",
        "channel_gate.fc2.bias",
    ]


@pytest.mark.parametrize(
    "module, text",
    [
        (lambda: FusedCBAM(64), "64, hidden_channels=4, pool_types=('avg', 'max'), kernel_size=7"),
        (
            lambda: FusedCBAM(8, spatial=False, mlp_bias=False, pool_types=["lse"], backend="reference"),
            "8, hidden_channels=1, pool_types=('lse',), mlp_bias=False, spatial=False, backend=\"reference\"",
        ),
        (
            lambda: FusedCBAM(
                8,
                2,
                3,
                spatial_norm=False,
                spatial_bias=True,
                residual=True,
                spatial_order="mean_max",
                light=True,
                ties="split",
                dims=3,
            ),  # fmt: skip
            "8, hidden_channels=4, pool_types=('avg', 'max'), light=True, kernel_size=3, bias=True, norm=False, "
            'order="mean_max", light=True, residual=True, ties="split", dims=3',
        ),
        (lambda: ChannelGate(8), "8, hidden_channels=1, pool_types=('avg', 'max')"),
        (lambda: SpatialGate(5, norm=False), "kernel_size=5, norm=False"),
    ],
)
def test_extra_repr(module, text):
    assert module().extra_repr() == text
    assert text in repr(module())


@pytest.mark.parametrize("dims, shape", [(1, (2, 8, 9)), (2, (2, 8, 5, 6)), (3, (2, 8, 3, 4, 5))])
def test_dims(target, dims, shape):
    module = _module(target, 8, 2, 3, dims=dims)
    x, dy = (torch.randn(shape, device=target.device) for _ in range(2))
    _agree(_gradients(module, x, dy), _gradients(PlainCBAM(copy.deepcopy(module)), x, dy))


def test_halves_make_the_whole(target):
    whole = _module(target, 16, 4).eval()
    channel = ChannelGate(16, 4, backend=target.backend, device=target.device)
    spatial = SpatialGate(7, backend=target.backend, device=target.device).eval()
    channel.load_state_dict(whole.channel_gate.state_dict())
    spatial.load_state_dict(whole.spatial_gate.state_dict())
    x = torch.randn(2, 16, 9, 9, device=target.device)
    torch.testing.assert_close(spatial(channel(x)), whole(x))


def test_function_and_module_share_one_path(target):
    for training in (True, False):
        module = _module(target, 16, 4).train(training)
        x = torch.randn(2, 16, 9, 9, device=target.device)
        gate = module.spatial_gate
        other = copy.deepcopy(gate.bn)
        y = cbam(x, *module.channel_gate.tensors(), gate.conv.weight, norm=other, backend=target.backend)
        assert torch.equal(module(x), y)
        assert torch.equal(gate.bn.running_var, other.running_var)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_maps(target, dtype, training):
    module = _module(target, 16, 4, dtype=dtype).train(training)
    x = torch.randn(3, 16, 7, 9, device=target.device, dtype=dtype, requires_grad=True)
    before = copy.deepcopy(module.state_dict())
    channel, spatial = module.attention_maps(x)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} changed"
    assert not channel.requires_grad and not spatial.requires_grad
    assert channel.dtype == spatial.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    def gates(dtype):
        m = copy.deepcopy(module).to(dtype)
        p = Parameters(*m.channel_gate.tensors(), *m.spatial_gate.tensors())
        v = x.detach().to(dtype)
        g = channel_gate_reference(v, p, m.config)
        z = m.spatial_gate.bn(spatial_logits_reference(v * g[..., None, None], p, m.config))
        return g.detach(), z.sigmoid().detach()

    # In float32 at the least, whatever the dtype of x.
    for name, got, exact, low in zip(
        ("channel", "spatial"), (channel, spatial), gates(torch.float64), gates(channel.dtype)
    ):
        assert got.shape == exact.shape and got.gt(0).all() and got.lt(1).all()
        if dtype == torch.float64:
            torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-13)
        else:
            assert_within(name, got, exact, [low])


def test_attention_maps_are_the_gates_of_forward(target):
    module = _module(target, 8, 2, spatial_norm=False)
    x = torch.randn(2, 8, 7, 9, device=target.device)
    channel, spatial = module.attention_maps(x)
    torch.testing.assert_close(module(x), x * channel[..., None, None] * spatial)
    channel, spatial = _module(target, 8, spatial=False).attention_maps(x)
    assert channel.shape == (2, 8) and spatial is None


class _Shifted(nn.BatchNorm2d):
    def forward(self, z):
        return super().forward(z) + 0.5


def _hooked(bn):
    bn.register_forward_hook(lambda module, args, z: z + 0.5)
    return bn


def _with_its_own_forward(bn):
    bn.forward = lambda z: nn.functional.batch_norm(z, None, None, bn.weight, bn.bias, True) + 0.5
    return bn


NORMS_THAT_DO_MORE = {
    "hook": lambda: _hooked(nn.BatchNorm2d(1)),
    "own forward": lambda: _with_its_own_forward(nn.BatchNorm2d(1)),
    "subclass": lambda: _Shifted(1),
    "sequence": lambda: nn.Sequential(nn.BatchNorm2d(1), nn.Hardtanh()),
    "no statistics": lambda: nn.BatchNorm2d(1, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(1, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize(
    "norm", [nn.Identity, lambda: nn.GroupNorm(1, 1), lambda: nn.Sequential(nn.BatchNorm2d(1))]
)
def test_attention_maps_are_traced(norm):
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = FusedCBAM(8, 2)
            self.block.spatial_gate.bn = norm()

        def forward(self, x):
            return self.block.attention_maps(x)

    module, x = Maps().eval(), torch.randn(2, 8, 7, 9)
    traced = torch.jit.trace(module, x, check_trace=False)
    for got, want in zip(traced(x), module(x)):
        torch.testing.assert_close(got, want)


def test_attention_maps_with_a_scripted_norm(target):
    """Which keeps its buffers where functional_call does not reach them."""
    module = _module(target, 8, 2)
    module.spatial_gate.bn = torch.jit.script(nn.Sequential(nn.BatchNorm2d(1), nn.Hardtanh())).to(
        target.device
    )
    x = torch.randn(2, 8, 7, 9, device=target.device)
    y = module(x)
    before = copy.deepcopy(module.spatial_gate.bn.state_dict())
    channel, spatial = module.attention_maps(x)
    for key, value in module.spatial_gate.bn.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} changed"
    torch.testing.assert_close(y, x * channel[..., None, None] * spatial)


def test_a_lazy_norm(target):
    module = _module(target, 8, 2)
    module.spatial_gate.bn = nn.LazyBatchNorm2d(device=target.device)
    assert module(torch.randn(2, 8, 5, 5, device=target.device)).shape == (2, 8, 5, 5)
    assert module.spatial_gate.bn.num_features == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS_THAT_DO_MORE)
def test_attention_maps_with_a_norm_that_does_more(target, norm, training):
    module = _module(target, 8, 2)
    module.spatial_gate.bn = NORMS_THAT_DO_MORE[norm]().to(target.device)
    module.train(training)
    x = torch.randn(2, 8, 7, 9, device=target.device)
    y = module(x)  # leaves traces, and a graph that must outlive the maps
    before = copy.deepcopy(module.state_dict())
    channel, spatial = module.attention_maps(x)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} changed"
    y.sum().backward()
    torch.testing.assert_close(y, x * channel[..., None, None] * spatial)


def test_running_statistics(target):
    module = _module(target, 8, 2)
    plain = PlainCBAM(copy.deepcopy(module))
    for momentum in (0.1, None, 0.01):
        for m in (module, plain.inner):
            m.spatial_gate.bn.momentum = momentum
            m.spatial_gate.bn.eps = 1e-3
        x = torch.randn(3, 8, 7, 9, device=target.device)
        module(x), plain(x)
        _agree(module.buffers(), plain.buffers())
    _agree([module.eval()(x)], [plain.eval()(x)])


def test_norm_without_running_statistics_or_affine(target):
    x, dy = (torch.randn(3, 8, 7, 9, device=target.device) for _ in range(2))
    for options in ({"affine": False}, {"track_running_stats": False}, {"affine": False, "eps": 0.1}):
        module = _module(target, 8, 2)
        module.spatial_gate.bn = nn.BatchNorm2d(1, **options, device=target.device)
        for training in (True, False):
            plain = PlainCBAM(copy.deepcopy(module))
            got = _gradients(module.train(training), x, dy)
            _agree(got, _gradients(plain.train(training), x, dy))


def test_gamma_of_zero(target):
    """The official ResNet starts with the norm's weight at 0: the spatial gate is then sigmoid(bias)."""
    x, dy = (torch.randn(3, 8, 7, 9, device=target.device) for _ in range(2))
    module = _module(target, 8, 2)
    nn.init.zeros_(module.spatial_gate.bn.weight)
    for training in (True, False):
        plain = PlainCBAM(copy.deepcopy(module))
        _agree(_gradients(module.train(training), x, dy), _gradients(plain.train(training), x, dy))


def test_hooks_on_the_norm_are_called(target):
    module = _module(target, 8, 2).eval()
    seen = []
    module.spatial_gate.bn.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    module(torch.randn(2, 8, 5, 5, device=target.device))
    assert seen == [(2, 1, 5, 5)]


def test_backward_hooks_and_a_forward_of_the_norms_own_are_called(target):
    x = torch.randn(2, 8, 5, 5, device=target.device, requires_grad=True)
    module, seen = _module(target, 8, 2).eval(), []
    module.spatial_gate.bn.register_full_backward_hook(lambda m, given, got: seen.append(got[0].shape))
    module(x).sum().backward()
    assert seen == [(2, 1, 5, 5)]
    module = _module(target, 8, 2).eval()
    module.spatial_gate.bn.forward = lambda z: torch.full_like(z, 100.0)
    gate = channel_gate_reference(x, Parameters(*module.channel_gate.tensors(), None, None), module.config)
    torch.testing.assert_close(module(x), x * gate[:, :, None, None])


@pytest.mark.parametrize("path", ("channel_gate.fc1", "channel_gate.fc2", "spatial_gate.conv"))
def test_hooks_on_layers_that_are_read(path):
    """Never called, so that one is warned of; a pre-hook runs, and must do without an input."""
    x, name = torch.randn(2, 8, 5, 5), path.split(".")[1]
    module = FusedCBAM(8, 2)
    expected = module.eval()(x)
    cbam_fused.module._warned.clear()
    handle = module.get_submodule(path).register_forward_hook(lambda m, args, out: out)
    with pytest.warns(RuntimeWarning, match=f"^a hook on {name} is not called"):
        assert torch.equal(module(x), expected)
    handle.remove()
    for hook, options in (
        (lambda m, args: args[0].shape, {}),
        (lambda m, args: (0,), {}),
        (lambda m, args, kwargs: kwargs["input"], dict(with_kwargs=True)),
    ):
        handle = module.get_submodule(path).register_forward_pre_hook(hook, **options)
        with pytest.raises(TypeError, match=f"^{name} must have no forward pre-hook that looks at its input"):
            module(x)
        handle.remove()
    calls = []
    module.get_submodule(path).register_forward_pre_hook(lambda m, args: args)
    module.get_submodule(path).register_forward_pre_hook(
        lambda m, args, kwargs: calls.append(m), with_kwargs=True
    )
    assert torch.equal(module(x), expected) and calls == [module.get_submodule(path)]


@pytest.mark.parametrize(
    "change",
    (dict(padding_mode="circular"), dict(padding_mode="reflect"), dict(padding=9, dilation=3), dict(stride=2, padding=3),
     dict(padding=2)),
    ids=str,
)  # fmt: skip
def test_a_convolution_that_is_another_is_refused(change):
    options = {"padding": 3, **change}
    official = compat.official.CBAM(8, 2)
    for module, path in ((FusedCBAM(8, 2), "spatial_gate.conv"), (official, "SpatialGate.spatial.conv")):
        module.set_submodule(path, nn.Conv2d(2, 1, 7, bias=False, **options))
        with pytest.raises(ValueError, match="must have stride 1, dilation 1 and zeros around the map"):
            module(torch.randn(2, 8, 9, 9))
    module = FusedCBAM(8, 2)
    module.spatial_gate.conv = nn.Conv2d(2, 1, 7, padding="same", bias=False)
    module(torch.randn(2, 8, 9, 9))
    module.spatial_gate.conv.padding, module.spatial_gate.conv.stride = 3, [1, 1]
    module(torch.randn(2, 8, 9, 9))
    module.spatial_gate.conv.padding, module.spatial_gate.conv.stride = (3, 3), 1
    module(torch.randn(2, 8, 9, 9))
    module.spatial_gate.conv.padding = (3,)
    with pytest.raises(ValueError, match="must have stride 1, dilation 1 and zeros around the map"):
        module(torch.randn(2, 8, 9, 9))
    module = FusedCBAM(8, 2, 1)
    module.spatial_gate.conv = nn.Conv2d(2, 1, 1, bias=False, padding_mode="circular", dilation=2)
    module(torch.randn(2, 8, 9, 9))


def test_a_backend_that_is_set_later_is_checked():
    module = FusedCBAM(8, 2)
    module.backend = "gpu"
    with pytest.raises(ValueError, match="^backend must be one of 'auto', 'cuda', .*, got 'gpu'$"):
        module(torch.randn(2, 8, 5, 5))


def _weights(device, dtype=torch.float32):
    shapes = ((2, 8), (2,), (8, 2), (8,), (1, 2, 3, 3))
    return [*(torch.randn(s, device=device, dtype=dtype) for s in shapes), None]


def test_a_norm_that_closes_over_what_it_learns(target):
    """Nothing else needs a gradient, and the function does not say what it holds."""
    x, weights = torch.randn(2, 8, 5, 5, device=target.device), _weights(target.device)
    grads = []
    for backend in (target.backend, "reference"):
        bn = nn.BatchNorm2d(1, device=target.device)
        cbam(x, *weights, norm=lambda z: bn(z), backend=backend).pow(2).sum().backward()
        grads.append(bn.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "norm",
    (lambda z: z.transpose(2, 3).contiguous().transpose(2, 3), lambda z: z.mean((2, 3), keepdim=True), lambda z: z.double()),
    ids=("strided", "one-logit-a-sample", "double"),
)  # fmt: skip
def test_whatever_a_norm_returns(target, norm):
    x, weights = torch.randn(2, 8, 4, 6, device=target.device, requires_grad=True), _weights(target.device)
    results = []
    for backend in (target.backend, "reference"):
        y = cbam(x, *weights, norm=norm, backend=backend)
        results.append((y, *torch.autograd.grad(y.pow(2).sum(), x)))
    _agree(*results)


def test_a_norm_of_another_shape_is_refused(fused):
    x, weights = torch.randn(2, 8, 4, 6, device=fused.device), _weights(fused.device)
    with pytest.raises(ValueError, match=r"one logit a position, \(2, 1, 4, 6\), got \(2, 1, 6, 4\)"):
        cbam(x, *weights, norm=lambda z: z.transpose(2, 3), backend=fused.backend)
    with pytest.raises(TypeError, match="^norm must return a Tensor, got tuple"):
        cbam(x, *weights, norm=lambda z: (z, z), backend=fused.backend)


def test_norms_in_other_dtypes(target):
    """A module is called in the dtype of what it holds; one in eval that is folded follows every parameter's rule."""
    x = torch.randn(2, 8, 5, 5, device=target.device, dtype=torch.bfloat16)
    norm = nn.Sequential(nn.BatchNorm2d(1)).to(target.device, torch.bfloat16)
    y = cbam(x, *_weights(target.device, torch.bfloat16), norm=norm, backend=target.backend)
    assert y.dtype == torch.bfloat16
    double = x.double(), *_weights(target.device, torch.float64)
    for norm in (nn.BatchNorm2d(1), nn.GroupNorm(1, 1)):
        assert cbam(*double, norm=norm.to(target.device), backend=target.backend).dtype == torch.float64
    norm = nn.BatchNorm2d(1, device=target.device).eval()
    with pytest.raises(
        TypeError,
        match="^norm.weight .a module's bn.weight. must have the dtype of x, torch.float64, got torch.float32",
    ):
        cbam(*double, norm=norm, backend=target.backend)
    if target.device == "cpu":
        conv = nn.Conv2d(1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            assert cbam(x.float(), *_weights("cpu"), norm=conv, backend=target.backend).isfinite().all()


@pytest.mark.parametrize("norm", (lambda z: z * 2, nn.GroupNorm(1, 1)), ids=("function", "GroupNorm"))
def test_an_empty_batch_with_any_norm(target, norm):
    x = torch.zeros(0, 8, 5, 5, device=target.device, requires_grad=True)
    if isinstance(norm, nn.Module):
        norm = copy.deepcopy(norm).to(target.device)
    y = cbam(x, *_weights(target.device), norm=norm, backend=target.backend)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


def test_in_place_residual_on_the_output(target):
    """What the official blocks do: out = cbam(out); out += residual."""
    for training in (True, False):
        module = _module(target, 8, 2).train(training)
        x, dy = (torch.randn(2, 8, 7, 9, device=target.device) for _ in range(2))
        results = []
        for m in (module, PlainCBAM(copy.deepcopy(module))):
            leaf = x.clone().requires_grad_()
            y = m(leaf)
            y += leaf
            y.relu_()
            y.backward(dy)
            results.append([y.detach(), leaf.grad, *(p.grad for p in m.parameters())])
        _agree(*results)


def test_changing_x_before_backward_is_an_error(target):
    module = _module(target, 8, 2)
    leaf = torch.randn(2, 8, 7, 9, device=target.device, requires_grad=True)
    x = leaf * 1
    y = module(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("arrangement", ["channel_first", "spatial_first", "parallel"])
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(target, training, arrangement):
    module = _module(target, 8, 2, arrangement=arrangement).train(training)
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(0, 8, 7, 9, device=target.device, requires_grad=True)
    y = module(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    y.sum().backward()
    assert x.grad.shape == x.shape
    for name, p in module.named_parameters():
        assert p.grad is not None and p.grad.shape == p.shape and not p.grad.any(), name
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} changed"
    channel, spatial = module.attention_maps(x)
    assert channel.shape == (0, 8) and spatial.shape == (0, 1, 7, 9)
    with torch.no_grad():
        assert module(x).shape == x.shape


@pytest.mark.parametrize("training", [True, False])
def test_frozen_parameters(target, training):
    module = _module(target, 8, 2).train(training)
    x, dy = (torch.randn(2, 8, 7, 9, device=target.device) for _ in range(2))
    want = dict(zip(["y", "x", *(n for n, _ in module.named_parameters())], _gradients(module, x, dy)))
    for frozen in ("channel_gate", "spatial_gate", "spatial_gate.bn", "conv", ""):
        m = copy.deepcopy(module)
        m.zero_grad()
        for name, p in m.named_parameters():
            p.requires_grad_(frozen not in name)
        leaf = x.clone().requires_grad_()
        m(leaf).backward(dy)
        torch.testing.assert_close(leaf.grad, want["x"])
        for name, p in m.named_parameters():
            assert (p.grad is None) == (frozen in name)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, want[name])
        if frozen:
            m.zero_grad()
            m(x).backward(dy)  # x wants no gradient, as behind a frozen backbone
            for name, p in m.named_parameters():
                if frozen not in name:
                    torch.testing.assert_close(p.grad, want[name])


def test_retained_graph_and_accumulation(target):
    module = _module(target, 8, 2)
    x, dy = (torch.randn(2, 8, 7, 9, device=target.device) for _ in range(2))
    _, dx, *once = _gradients(module, x, dy)
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.backward(dy, retain_graph=True)
    y.backward(dy)
    _agree([leaf.grad, *(p.grad for p in module.parameters())], [2 * dx, *(2 * g for g in once)])


def test_output_is_used_twice_and_module_shared(target):
    module = _module(target, 8, 2)
    x, dy = (torch.randn(2, 8, 7, 9, device=target.device) for _ in range(2))

    def block(m):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.m = m

            def forward(self, x):
                y = self.m(x)
                return self.m(y) + y * x

        return Twice()

    _agree(_gradients(block(module), x, dy), _gradients(block(PlainCBAM(copy.deepcopy(module))), x, dy))


def test_checkpointing(target):
    from torch.utils.checkpoint import checkpoint

    module = _module(target, 8, 2)
    x, dy = (torch.randn(2, 8, 7, 9, device=target.device) for _ in range(2))
    want = _gradients(copy.deepcopy(module), x, dy)
    leaf = x.clone().requires_grad_()
    y = checkpoint(module, leaf, use_reentrant=False)
    y.backward(dy)
    _agree([y.detach(), leaf.grad, *(p.grad for p in module.parameters())], want, rtol=0, atol=0)


def test_saves_only_x_and_small_tensors(fused):
    """design.md: nothing else of the size of x, and never y."""
    for training in (True, False):
        module = _module(fused, 64, 16).train(training)
        x = torch.randn(2, 64, 32, 32, device=fused.device, requires_grad=True)
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
        ):
            y = module(x)
        own = {p.untyped_storage().data_ptr() for p in (x, *module.parameters(), *module.buffers())}
        extra = sum(t.untyped_storage().nbytes() for pointer, t in seen.items() if pointer not in own)
        assert x.untyped_storage().data_ptr() in seen
        assert y.untyped_storage().data_ptr() not in seen
        # z, s, the two pools and the norm's own input and output: at most 8 numbers a position.
        assert extra <= 2 * 32 * 32 * 4 * 8 + 2 * 64 * 4 * 4


def test_deterministic_algorithms(target):
    torch.use_deterministic_algorithms(True)
    try:
        for training in (True, False):
            module = _module(target, 8, 2).train(training)
            x, dy = (torch.randn(2, 8, 7, 9, device=target.device) for _ in range(2))
            _gradients(module, x, dy)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(target, training):
    """The block keeps the dtype of x, whatever autocast does around it, and stays near float32."""
    module = _module(target, 16, 4).train(training)
    x = torch.randn(2, 16, 9, 11, device=target.device)
    want = _gradients(module, x, torch.ones_like(x))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(target.device, torch.bfloat16):
            got = _gradients(module, x.to(dtype), torch.ones_like(x, dtype=dtype))
        assert got[0].dtype == got[1].dtype == dtype
        assert all(g.dtype == torch.float32 for g in got[2:])
        for a, b in zip(got, want, strict=True):
            assert a.isfinite().all()
            assert (a.float() - b).norm() <= 0.05 * b.norm() + 0.05


def test_autocast_with_16_bit_parameters(target):
    """A model cast to bfloat16 and a float32 input under autocast: plain PyTorch computes it."""
    module = _module(target, 16, 4, dtype=torch.bfloat16)
    x = torch.randn(2, 16, 9, 11, device=target.device)
    for training in (False, True):
        module.train(training)
        with torch.autocast(target.device, torch.bfloat16):
            y = copy.deepcopy(module)(x)
        want = copy.deepcopy(module).float()(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, want, rtol=0.05, atol=0.05)


def test_pruning(target):
    module = _module(target, 16, 4)
    prune.l1_unstructured(module.channel_gate.fc1, "weight", 0.5)
    prune.random_unstructured(module.spatial_gate.conv, "weight", 0.5)
    x, dy = (torch.randn(2, 16, 7, 9, device=target.device) for _ in range(2))
    # A pruned module cannot be copied, and needs no copy: in training nothing reads the running statistics.
    _agree(_gradients(module, x, dy), _gradients(PlainCBAM(module), x, dy))
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(x).backward(dy)
    optimizer.step()
    module(x)
    mask = module.channel_gate.fc1.weight_mask
    assert torch.equal(module.channel_gate.fc1.weight == 0, mask == 0)
    before = module.eval()(x)
    prune.remove(module.channel_gate.fc1, "weight")
    prune.remove(module.spatial_gate.conv, "weight")
    torch.testing.assert_close(module(x), before)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations(target, wrap):
    module = _module(target, 16, 4).eval()
    wrap(module.channel_gate.fc1)
    wrap(module.spatial_gate.conv)
    x, dy = (torch.randn(2, 16, 7, 9, device=target.device) for _ in range(2))
    _agree(_gradients(module, x, dy), _gradients(PlainCBAM(module), x, dy))
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_older_weight_norm(target):
    module = _module(target, 16, 4).eval()
    torch.nn.utils.weight_norm(module.channel_gate.fc2)
    x, dy = (torch.randn(2, 16, 7, 9, device=target.device) for _ in range(2))
    _agree(_gradients(module, x, dy), _gradients(PlainCBAM(module), x, dy))
    module.channel_gate.fc2.weight_g.data.mul_(2)
    _agree([module(x)], [PlainCBAM(module)(x)])


@pytest.mark.parametrize("training", [True, False])
def test_sync_batch_norm_conversion(target, training):
    module = _module(target, 16, 4)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module)).train(training)
    assert type(converted.spatial_gate.bn) is nn.SyncBatchNorm
    x, dy = (torch.randn(2, 16, 7, 9, device=target.device) for _ in range(2))
    _agree(_gradients(converted, x, dy), _gradients(module.train(training), x, dy))


def test_copies(target):
    module = _module(target, 16, 4).eval()
    x = torch.randn(2, 16, 7, 9, device=target.device)
    y = module(x)
    assert torch.equal(copy.deepcopy(module)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), y)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), y)
    average = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    average.update_parameters(module)
    with torch.no_grad():
        module.channel_gate.fc2.weight.mul_(3)
    average.update_parameters(module)
    torch.testing.assert_close(
        average.module.channel_gate.fc2.weight, module.channel_gate.fc2.weight * (2 / 3)
    )
    average(x)


def test_conversion_of_dtype_and_reset(target):
    module = _module(target, 16, 4)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        module.to(dtype)
        x = torch.randn(2, 16, 7, 9, device=target.device, dtype=dtype)
        assert module(x).dtype == dtype

    def reset(m):
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()

    module.apply(reset)
    assert module.spatial_gate.bn.running_var.eq(1).all()


def test_training_reduces_a_loss(target):
    """A few steps of SGD on the same batch, against the plain module from the same start."""
    torch.manual_seed(3)
    x = torch.randn(8, 16, 7, 7, device=target.device)
    goal = x * torch.rand(8, 16, 1, 1, device=target.device)
    module = _module(target, 16, 4)
    losses = []
    for m in (module, PlainCBAM(copy.deepcopy(module))):
        optimizer = torch.optim.SGD(m.parameters(), 0.5, momentum=0.9)
        curve = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (m(x) - goal).square().mean()
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        losses.append(torch.stack(curve))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-5)
    assert losses[0][-1] < 0.8 * losses[0][0]


def test_version_and_public_names():
    assert cbam_fused.__version__ == "0.1.0"
    assert {"FusedCBAM", "cbam", "backends"} <= set(cbam_fused.__all__)
    assert all(hasattr(cbam_fused, name) for name in cbam_fused.__all__)
    table = cbam_fused.backends()
    assert list(table) == ["cuda", "triton", "cpu", "reference"]
    assert all(ok is True or (isinstance(ok, str) and len(ok) > 10 and not ok) for ok in table.values())


def test_config_is_hashable_and_comparable():
    assert FusedCBAM(8).config == Config(cfg.AVG | cfg.MAX, cfg.SPATIAL_MAX_MEAN, cfg.TIES_FIRST, False)
    assert hash(FusedCBAM(8).config) == hash(FusedCBAM(16).config)
