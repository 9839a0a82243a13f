"""The ops themselves: schemas, fakes and what a backend returns, with torch.library.opcheck."""

import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import DTYPES, FUSED, OPTIONS, make_problem, poisoned_allocations

from cbam_fused import _ops

NATIVE = tuple(t for t in FUSED if t.backend in ("cpu", "cuda"))
needs_cpu = pytest.mark.skipif(
    not any(t.backend == "cpu" for t in FUSED), reason="the CPU kernels are not built"
)
# Not test_autograd_registration, which looks at nothing unless an input wants a gradient: the Function owns it.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(params=FUSED or [None], ids=lambda t: "none" if t is None else t.backend)
def ops(request):
    """The ops of a backend by name, and its device."""
    if request.param is None:
        pytest.skip("no fused backend is available: see python -m cbam_fused")
    backend, device = request.param
    return {name: _ops.get(backend, name) for name in _ops.SCHEMAS}, device


def _calls(ops, device, name, dtype, layout, save=True, shape=(2, 6, 5, 7)):
    """Arguments of each of the ops for one configuration, the backwards' made by the forwards."""
    problem = make_problem(shape, OPTIONS[name], dtype, device, layout)
    x, dy, p, c, norm = problem.x, problem.dy, problem.p, problem.c, problem.norm
    dy = dy if layout == "contiguous" else dy.to(memory_format=torch.channels_last)
    folded = (None,) * 4 + (0.0,)
    if norm is not None and not norm.training:
        folded = (norm.weight.detach(), norm.bias.detach(), norm.running_mean, norm.running_var, norm.eps)
    options = (c.pools, c.spatial, c.ties)
    if norm is None or not norm.training:
        forward = (x, *p, *folded, *options, c.residual)
        yield "cbam_forward" if save else "cbam_inference", forward
        if save:
            _, *saved = ops["cbam_forward"](*forward)
            yield "cbam_backward", (dy, x, *p, *folded, *saved, *options, c.residual)
    if not c.spatial:
        return
    forward = (x, *p, *options, save)
    yield "attention_forward", forward
    z, *saved = ops["attention_forward"](*forward)
    gate = saved[2]
    yield "scale_forward", (x, gate, z, c.residual)
    if save:
        _, s = ops["scale_forward"](x, gate, z, c.residual)
        yield "scale_backward", (dy, x, gate, s)
        dz, dgate = ops["scale_backward"](dy, x, gate, s)
        yield "attention_backward", (dy, x, *p, *saved, s, dz, dgate, *options, c.residual)


@pytest.mark.parametrize("name", OPTIONS)
def test_opcheck(ops, name):
    table, device = ops
    seen = set()
    for op, arguments in _calls(table, device, name, torch.float32, "contiguous"):
        torch.library.opcheck(table[op], arguments, test_utils=CHECKS)
        seen.add(op)
    assert seen


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_dtypes_and_layouts(ops, dtype, layout):
    table, device = ops
    for name, save in itertools.product(("norm-train", "norm-eval", "all-pools"), (True, False)):
        for op, arguments in _calls(table, device, name, dtype, layout, save):
            torch.library.opcheck(table[op], arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", OPTIONS)
def test_fakes_agree_with_kernels(ops, name, layout):
    """Shape, dtype and strides of every output; opcheck skips the strides of an output of size 1."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    table, device = ops
    calls = (_calls(table, device, name, torch.float32, layout, save) for save in (True, False))
    for op, arguments in itertools.chain(*calls):
        real = table[op](*arguments)
        with FakeTensorMode() as mode:
            fake = table[op](*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        pairs = zip(real, fake) if isinstance(real, (tuple, list)) else [(real, fake)]
        for i, (a, b) in enumerate(pairs):
            got, want = (a.shape, a.dtype, a.stride()), (b.shape, b.dtype, b.stride())
            assert got == want, f"{op} output {i}: the kernel gives {got}, the fake {want}"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_inference_gives_what_forward_gives(ops, name, dtype, layout):
    table, device = ops
    arguments = dict(_calls(table, device, name, dtype, layout, save=False)).get("cbam_inference")
    if arguments is None:  # the block is cut in two
        assert make_problem((2, 6, 5, 7), OPTIONS[name]).norm.training
        return
    assert torch.equal(table["cbam_inference"](*arguments), table["cbam_forward"](*arguments)[0])


def test_outputs_do_not_alias_inputs(ops):
    table, device = ops
    for name in ("plain", "norm-train", "channel-only", "spatial-only"):
        for op, arguments in _calls(table, device, name, torch.float32, "contiguous"):
            out = table[op](*arguments)
            given = {
                a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor) and a.numel()
            }
            for t in out if isinstance(out, (tuple, list)) else (out,):
                assert not t.numel() or t.untyped_storage().data_ptr() not in given, op


@pytest.mark.parametrize("name", ["plain", "all-pools", "light", "no-bias", "single-layer"])
def test_the_hidden_layer_is_kept_or_empty(ops, name):
    table, device = ops
    op, arguments = next(iter(_calls(table, device, name, torch.float64, "contiguous")))
    x, w1, b1, *_ = arguments
    _, pooled, *_, hidden, _ = table[op](*arguments)
    if w1 is None:
        assert hidden.numel() == 0
        return
    pools = pooled.mean(1, keepdim=True) if name == "light" else pooled
    expected = pools @ w1.T if b1 is None else pools @ w1.T + b1
    torch.testing.assert_close(hidden, expected)


def test_schemas_are_alike_in_every_namespace():
    for op in _ops.SCHEMAS:
        texts = {str(_ops.get(b, op)._schema).replace(f"cbam_fused_{b}::", "") for b in _ops.BACKENDS}
        assert len(texts) == 1, texts
        schema = _ops.get("cpu", op)._schema
        assert not schema.is_mutable
        assert all(r.alias_info is None for r in schema.returns)


def test_backprop_through_a_bare_op_is_warned_of(ops):
    """The Function owns the gradient; an op called by itself must not pass for a constant in silence."""
    table, device = ops
    _, arguments = next(iter(_calls(table, device, "plain", torch.float32, "contiguous")))
    x = arguments[0].clone().requires_grad_()
    y = table["cbam_forward"](x, *arguments[1:])[0]
    assert y.requires_grad
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        y.sum().backward()


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "norm-train", "all-pools", "light", "split", "channel-only"])
def test_a_cpu_call_allocates_its_outputs_and_nothing_else(name, dtype, layout):
    """No copy of x in another layout and no temporary of its size, but of 16-bit weights, and of their gradients, a
    float32 copy each. Scratch is a thread's, once it has called; what comes and goes beside an output can make the heap
    grow and shrink."""
    table = {op: _ops.get("cpu", op) for op in _ops.SCHEMAS}
    seen = set()
    for save in (True, False):
        for op, arguments in _calls(table, "cpu", name, dtype, layout, save, shape=(2, 64, 28, 28)):
            table[op](*arguments)
            with torch.profiler.profile(profile_memory=True) as profiler:
                found = table[op](*arguments)
            events = list(profiler.profiler.kineto_results.experimental_event_tree())
            sizes = Counter()
            for event in events:
                events.extend(event.children)
                if event.tag.name == "Allocation" and event.extra_fields.alloc_size > 0:
                    sizes[event.extra_fields.alloc_size] += 1
            sizes.subtract(
                t.nbytes for t in ([found] if isinstance(found, torch.Tensor) else found) if t.numel()
            )
            given = (t for t in arguments if isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16)
            weights = Counter(4 * t.numel() for t in given if t.shape[0] != 2)
            weights += weights if op.endswith("backward") else Counter()
            assert min(sizes.values()) >= 0 and sizes <= weights, (op, sizes, weights)
            seen.add(op)
    assert seen >= ({"attention_backward", "scale_backward"} if name == "norm-train" else {"cbam_backward"})


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["plain", "norm-train", "all-pools", "light", "split", "channel-only", "spatial-only"]
)
def test_what_an_earlier_call_left_in_scratch_does_not_matter(name, dtype, layout):
    """Every op: calls of a new thread, whose scratch is poisoned, and after one on nothing but NaN."""
    table = {op: _ops.get("cpu", op) for op in _ops.SCHEMAS}

    def call(op, arguments):
        found = table[op](*arguments)
        return [found] if isinstance(found, torch.Tensor) else found

    def spoilt(t):
        return (
            torch.full_like(t, float("nan")) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        )

    seen = set()
    for save in (True, False):
        for op, arguments in _calls(table, "cpu", name, dtype, layout, save, shape=(3, 24, 9, 11)):
            kept = call(op, arguments)
            call(op, [spoilt(t) for t in arguments])
            after_nan = call(op, arguments)
            with poisoned_allocations(), ThreadPoolExecutor(1) as new_thread:
                poisoned = new_thread.submit(call, op, arguments).result()
            for other in (after_nan, poisoned):
                assert all(torch.equal(a, b) for a, b in zip(kept, other, strict=True)), op
            seen.add(op)
    assert len(seen) == {"norm-train": 4, "channel-only": 3}.get(name, 7)


@needs_cpu
@pytest.mark.parametrize("spatial", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((2, 401, 28, 28), torch.float32),
        ((3, 513, 27, 27), torch.float32),
        ((6, 400, 28, 28), torch.float32),  # past the caches
        ((2, 200, 28, 28), torch.float64),
        ((2, 701, 28, 28), torch.bfloat16),
    ],
    ids=str,
)
def test_samples_that_a_cache_does_not_hold_beside_their_output(shape, dtype, threads, spatial):
    """y is x times the gates that the op hands out, to the bit, whichever channels are written first."""
    problem = make_problem(shape, OPTIONS["plain" if spatial else "channel-only"], dtype)
    x, c = problem.x, problem.c
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, _, _, gate, *_, s = _ops.get("cpu", "cbam_forward")(
            x, *problem.p, *(None,) * 4, 0.0, c.pools, c.spatial, c.ties, c.residual
        )
    finally:
        torch.set_num_threads(before)
    want = x.to(gate.dtype) * gate[:, :, None, None]
    want = want * s if spatial else want
    assert not c.residual and torch.equal(y, want.to(dtype))
