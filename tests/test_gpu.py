"""What a GPU alone has: graphs that are replayed, and streams that run at the same time.

tests/test_cuda_workspace.py and tests/test_triton_capture.py look without one for what would break either.
"""

from __future__ import annotations

import gc
import os

import pytest
import torch
from oracle import FUSED

from cbam_fused import FusedCBAM

TARGETS = [t for t in FUSED if t.device == "cuda"]
pytestmark = pytest.mark.skipif(not TARGETS, reason="no fused backend runs on a GPU here")

# Of one tile and of several; the last fills devices of up to 132 multiprocessors with clusters (CBAM_FUSED_TIER).
SHAPES = [(3, 65, 7, 7), (2, 40, 13, 57), (16, 256, 28, 28)]
FORMS = {"plain": {"spatial_norm": False}, "norm": {}}
COMMON = (
    pytest.mark.parametrize("target", TARGETS or [None], ids=lambda t: t and t.backend),
    pytest.mark.parametrize("shape", SHAPES, ids=str),
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str),
    pytest.mark.parametrize("form", FORMS),
)


def common(test):
    for mark in COMMON:
        test = mark(test)
    return test


def _step(module, x, dy):
    """Output and every gradient."""
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *module.parameters()), dy)]


def _draw(shape, dtype, device="cuda"):
    x, dy = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    return x.requires_grad_(), dy


def _module(target, shape, dtype, form):
    # With BatchNorm in training: its running statistics change with every call, and no result depends on them.
    return FusedCBAM(shape[1], backend=target.backend, device=target.device, dtype=dtype, **FORMS[form])


def _assert_same_bits(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def _capture(module, x, dy):
    """A graph of a step, and what it writes."""
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(2):
            _step(module, x, dy)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = _step(module, x, dy)
    return graph, kept


@common
def test_a_replayed_graph_computes_with_what_its_inputs_hold(target, shape, dtype, form):
    module = _module(target, shape, dtype, form)
    x, dy = _draw(shape, dtype)
    graph, kept = _capture(module, x, dy)
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        dy.copy_(torch.randn_like(dy))
        graph.replay()
        replayed = [t.clone() for t in kept]
        _assert_same_bits(replayed, _step(module, x, dy))


@common
def test_graphs_that_come_and_go(target, shape, dtype, form):
    """What a graph has held serves the next one, and a graph that stays keeps its own."""
    module = _module(target, shape, dtype, form)
    x, dy = _draw(shape, dtype)
    lasting, kept = _capture(module, x, dy)
    wanted = [t.clone() for t in _step(module, x, dy)]
    for _ in range(3):
        graph, passing = _capture(module, x, dy)
        torch.cuda._sleep(20_000_000)
        graph.replay()
        found = [t.clone() for t in passing]
        del graph, passing
        gc.collect()
        lasting.replay()
        _assert_same_bits(found, wanted)
        _assert_same_bits(kept, wanted)


@pytest.mark.parametrize("target", TARGETS or [None], ids=lambda t: t and t.backend)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_graphs_of_torch_compile(target, shape, form):
    """They look after each step for memory in their pool that is none of the step's, and raise where they find some."""
    torch._dynamo.reset()
    module = _module(target, shape, torch.float32, form)
    compiled = torch.compile(module, mode="reduce-overhead")
    for _ in range(5):  # a step to warm up, one to capture, and replays
        x, dy = _draw(shape, torch.float32)
        torch.compiler.cudagraph_mark_step_begin()
        found = [t.clone() for t in _step(compiled, x, dy)]
        for a, b in zip(found, _step(module, x, dy), strict=True):
            # Another BatchNorm's sums, but nothing of another step.
            assert (a - b).abs().max() <= 1e-3 * (1 + b.abs().max())


@common
def test_streams_that_run_at_the_same_time(target, shape, dtype, form):
    module = _module(target, shape, dtype, form)
    drawn = [_draw(shape, dtype) for _ in range(2)]
    wanted = [_step(module, *d) for d in drawn]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in drawn]
    for stream in streams:
        # Until the host has queued all that follows, which takes it longer than the kernels.
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
    found = [[] for _ in drawn]
    for _ in range(10):
        for stream, inputs, results in zip(streams, drawn, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(_step(module, *inputs))
    torch.cuda.synchronize()
    for results, want in zip(found, wanted, strict=True):
        for result in results:
            _assert_same_bits(result, want)


@pytest.mark.parametrize(
    "target", [t for t in TARGETS if t.backend == "cuda"] or [None], ids=lambda t: t and t.backend
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_resident_tier_runs_where_it_is_asked_for(target, layout):
    """Else the other tests under CBAM_FUSED_TIER=resident would be those of the streamed tier once more."""
    if target is None or os.environ.get("CBAM_FUSED_TIER") != "resident":
        pytest.skip("CBAM_FUSED_TIER does not ask backend cuda for it")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this device has no clusters")
    shape = (2, 256, 28, 28)
    module = _module(target, shape, torch.bfloat16, "plain")
    x, dy = _draw(shape, torch.bfloat16)
    x = x.detach().to(memory_format=layout).requires_grad_()
    _step(module, x, dy)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        _step(module, x, dy)
        torch.cuda.synchronize()
    names = " ".join(event.key for event in profiler.key_averages())
    for kernel in ("resident_forward_kernel", "resident_backward_kernel"):
        assert kernel in names, names
