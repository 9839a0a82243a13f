"""torch.compile and torch.export: one graph, the same numbers."""

import copy
import warnings

import pytest
import torch
import torch.nn.utils.prune

from cbam_fused import FusedCBAM, cbam

FORMS = {
    "plain": {"spatial_norm": False},
    "norm": {},
    "channel-only": {"spatial": False},
    "residual": {"residual": True},
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def _step(module, x, dy):
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.backward(dy)
    return y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())


def _compare(target, compiler, form, training, shapes=((2, 16, 7, 9),), dynamic=None):
    eager = FusedCBAM(16, 4, backend=target.backend, device=target.device, **FORMS[form]).train(training)
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, backend=compiler, dynamic=dynamic)
    for shape in shapes:
        x, dy = (torch.randn(shape, device=target.device) for _ in range(2))
        for layout in (torch.contiguous_format, torch.channels_last):
            x = x.to(memory_format=layout)
            for a, b in zip(_step(compiled, x, dy), _step(eager, x, dy), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)
        for a, b in zip(compiled.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_one_graph(target, form, training):
    _compare(target, "aot_eager", form, training)


@pytest.mark.parametrize("training", [True, False])
def test_dynamic_shapes(target, training):
    _compare(
        target, "aot_eager", "norm", training, ((2, 16, 7, 9), (3, 16, 8, 10), (5, 16, 12, 11)), dynamic=True
    )


def test_inductor(fused):
    _compare(fused, "inductor", "norm", True)


def test_auto_compiles_too(device):
    """The choice of a backend must not break the graph, nor its warning where nothing is built."""
    module = FusedCBAM(8, 2, device=device).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 5, 7, device=device)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("training", [True, False])
def test_no_graph_break_inside_a_network(target, training):
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3),
        FusedCBAM(16, 4, backend=target.backend),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 2, 1),
    ).to(target.device)
    network.train(training)
    x = torch.randn(2, 3, 9, 9, device=target.device)
    report = torch._dynamo.explain(network)(x)
    assert report.graph_break_count == 0 and report.graph_count == 1


def test_export(target):
    module = FusedCBAM(16, 4, backend=target.backend, device=target.device).eval()
    x = torch.randn(2, 16, 7, 9, device=target.device)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))
    if target.backend != "reference":
        assert f"cbam_fused_{target.backend}.cbam_forward" in str(program.graph)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    more = torch.randn(5, 16, 7, 9, device=target.device)
    torch.testing.assert_close(program.module()(more), module(more))


def test_export_of_any_size(target):
    """No condition on H * W is planted: 300 x 300 positions are more than a 16-bit index counts."""
    module = FusedCBAM(4, 2, backend=target.backend, device=target.device).eval()
    sizes = {0: torch.export.Dim("n", max=64), 2: torch.export.Dim("h", min=2, max=4096),
             3: torch.export.Dim("w", min=2, max=4096)}  # fmt: skip
    with torch.no_grad():
        program = torch.export.export(
            module, (torch.randn(2, 4, 8, 9, device=target.device),), dynamic_shapes=(sizes,)
        )
        x = torch.randn(1, 4, 300, 300, device=target.device)
        torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("what", ("pruned", "hooked", "function", "closure"))
def test_one_graph_of(target, what):
    """What is read or called beside the op leaves one graph: pruning's hook, a hook's warning, any norm."""
    x, dy = (torch.randn(2, 16, 7, 9, device=target.device) for _ in range(2))
    module = FusedCBAM(16, 4, 3, backend=target.backend, device=target.device)
    bn = torch.nn.BatchNorm2d(1, device=target.device)
    if what == "pruned":
        torch.nn.utils.prune.l1_unstructured(module.channel_gate.fc1, "weight", 0.3)
    if what == "hooked":
        module.channel_gate.fc1.register_forward_hook(lambda *_: None)
    weights = [*module.channel_gate.tensors(), *module.spatial_gate.tensors()]
    norms = {"function": lambda z: z * 2, "closure": lambda z: bn(z)}
    if what in norms:
        weights = [None if w is None else w.detach() for w in weights]

        def run(x):
            return cbam(x, *weights, norm=norms[what], backend=target.backend)
    else:
        run = module
    grads = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
            bn.reset_running_stats(), bn.zero_grad(), module.zero_grad()
            z = x.clone().requires_grad_()
            y = f(z)
            y.backward(dy)
            grads.append(
                (y, z.grad, *(p.grad for p in (*module.parameters(), *bn.parameters()) if p.grad is not None))
            )
    assert len(grads[0]) == len(grads[1])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
