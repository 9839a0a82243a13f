"""What leaves PyTorch or is taken apart: torch.jit.trace, ONNX, torch.fx, quantized and adapted layers."""

import warnings

import pytest
import torch
import torch.nn as nn

from cbam_fused import ChannelGate, FusedCBAM, SpatialGate, compat

BLOCKS = {
    "official": lambda: FusedCBAM(16, 4),
    "plain": lambda: FusedCBAM(16, 4, spatial_norm=False, mlp_bias=False),
    "pools": lambda: FusedCBAM(16, 4, pool_types=("avg", "max", "lp", "lse"), residual=True),
    "light-split": lambda: FusedCBAM(16, 4, light=True, ties="split"),
    "single-layer": lambda: FusedCBAM(16, hidden_channels=0, pool_types=("avg",)),
    "parallel": lambda: FusedCBAM(16, 4, arrangement="parallel"),
    "channel": lambda: ChannelGate(16, 4),
    "spatial": lambda: SpatialGate(3),
    "timm": lambda: compat.timm.CbamModule(16),
    "ultralytics": lambda: compat.ultralytics.CBAM(16),
}
INPUT, OTHER = (2, 16, 8, 9), (3, 16, 11, 7)


def block(form, device="cpu"):
    module = BLOCKS[form]().to(device).eval()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return module


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", BLOCKS)
def test_trace(form, device, tmp_path):
    """A trace holds operations of PyTorch alone: it is saved, loaded, and run on other sizes, without a warning."""
    module = block(form, device)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, torch.randn(INPUT, device=device))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "prim::PythonOp" not in kinds and {kind.split("::")[0] for kind in kinds} <= {"aten", "prim"}
    traced.save(tmp_path / "block.pt")
    x = torch.randn(OTHER, device=device)
    close(torch.jit.load(tmp_path / "block.pt")(x), module(x))


def test_a_trace_trains(device):
    module = FusedCBAM(16, 4, spatial_norm=False, device=device)
    traced = torch.jit.trace(module, torch.randn(INPUT, device=device))
    x, dy = torch.randn(OTHER, device=device), torch.randn(OTHER, device=device)
    found = torch.autograd.grad(traced(x), list(module.parameters()), dy)
    for a, b in zip(found, torch.autograd.grad(module(x), list(module.parameters()), dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("form", BLOCKS)
def test_onnx(form, dynamo, tmp_path):
    """ONNX Runtime gives the block's numbers, at other sizes than those of the export."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    module, path = block(form), str(tmp_path / "block.onnx")
    axes = {0: "n", 2: "h", 3: "w"}
    sizes = (
        {"dynamic_shapes": ({d: torch.export.Dim(name) for d, name in axes.items()},)}
        if dynamo
        else {"dynamic_axes": {"x": axes}}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one exporter is old, and the other's remarks
        torch.onnx.export(
            module, (torch.randn(INPUT),), path, dynamo=dynamo, input_names=["x"], verbose=False, **sizes
        )
    x = torch.randn(OTHER)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), module(x))


def test_a_backend_by_name_refuses_a_trace(fused):
    module = FusedCBAM(16, 4, backend=fused.backend, device=fused.device).eval()
    message = (
        f'backend="{fused.backend}" cannot run: torch.jit.trace, and ONNX export by way of it, record plain '
        'PyTorch operations alone; use "auto" or "reference"'
    )
    with pytest.raises(RuntimeError) as error:
        torch.jit.trace(module, torch.randn(INPUT, device=fused.device))
    assert str(error.value) == message


@pytest.mark.parametrize("form", BLOCKS)
def test_fx_records_one_call(form):
    network = nn.Sequential(nn.Conv2d(3, 16, 3), block(form)).eval()
    traced = torch.fx.symbolic_trace(network)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1"]
    x = torch.randn(2, 3, 9, 8)
    assert torch.equal(traced(x), network(x))


def test_fx_by_itself_is_refused():
    with pytest.raises(TypeError) as error:
        torch.fx.symbolic_trace(FusedCBAM(16))
    assert str(error.value) == (
        "torch.fx records a FusedCBAM as one call within a model, and it must not be the model itself: "
        "trace nn.Sequential(block)"
    )


def test_feature_extractor():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    network = nn.Sequential(nn.Conv2d(3, 16, 3), FusedCBAM(16, 4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 9, 8)
    features = extraction.create_feature_extractor(network, {"1": "attended"})(x)
    assert torch.equal(features["attended"], network[:2](x))


def test_dynamically_quantized_layers():
    """`quantize_dynamic` puts layers of 8-bit weights in place of every Linear: the weights are read as they are."""
    module = FusedCBAM(64, 4).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.ao moves to torchao
        quantized = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, torch.qint8)
    rounded = FusedCBAM(64, 4).eval()
    rounded.load_state_dict(module.state_dict())
    with torch.no_grad():
        for name in ("fc1", "fc2"):
            layer = getattr(quantized.channel_gate, name)
            assert layer.weight().is_quantized
            getattr(rounded.channel_gate, name).weight.copy_(layer.weight().dequantize())
    x = torch.randn(2, 64, 8, 9)
    assert torch.equal(quantized(x), rounded(x)) and not torch.equal(quantized(x), module(x))


class Adapter(nn.Module):
    """As low-rank adapters do it: the weights of the layer within, and something beside."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.ones(()))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) * self.scale


@pytest.mark.parametrize("path", ["channel_gate.fc1", "channel_gate.fc2", "spatial_gate.conv"])
def test_a_layer_that_does_more_is_refused(path):
    module = FusedCBAM(16, 4)
    module.set_submodule(path, Adapter(module.get_submodule(path)))
    with pytest.raises(TypeError) as error:
        module(torch.randn(INPUT))
    assert str(error.value) == (
        f"{path.split('.')[1]} must have the forward of nn.Linear or of a convolution, got a {__name__}.Adapter "
        "with its own: its weights are read and its forward is not called, so what that adds would be lost. Leave this layer "
        "out of what replaces layers (adapters, quantizers), or `unfuse` the model first"
    )


def test_a_layer_whose_forward_was_replaced_is_refused():
    module = FusedCBAM(16, 4)
    layer = module.channel_gate.fc1
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)
    with pytest.raises(
        TypeError, match=r"^fc1 must have .*, got a torch\.nn\.modules\.linear\.Linear with its own"
    ):
        module(torch.randn(INPUT))


def test_a_layer_that_does_more_is_refused_in_a_dialect():
    module = compat.timm.CbamModule(16)
    module.channel.fc1 = Adapter(module.channel.fc1)
    with pytest.raises(TypeError, match=r"^channel\.fc1 must have the forward of nn\.Linear"):
        module(torch.randn(INPUT))
