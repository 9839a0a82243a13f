"""What `test_triton_interpreter` runs: every option, hostile shapes, forward and every gradient.

An error is at most 2 * (error of the reference in the same precision + eps * max|ref|), against the
reference in float64. Where that is not kept in float32, because the reference's order of sums was lucky, the error may
be what inputs that rounding cannot tell apart make of the exact result, if that is more. A gradient of one element
is a sum whose terms cancel: its scale is the sum of their sizes, not the little that is left. For float64 itself,
whose reference has no error to compare with, the bound is that of a sum: eps for each of its terms.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Dict, List, Optional, Sequence, Tuple

import interpreter_patch
import oracle
import pytest
import torch
import torch.nn as nn
import triton
import triton.language as tl
from triton_recording import (
    ALLOCATIONS,
    DEVICES,
    VIEWS,
    Seen,
    make_inputs,
    recording,
    run_ops,
    run_split_ops,
)

from cbam_fused import FusedCBAM, _autograd, cbam, masks, tune
from cbam_fused import _config as cfg
from cbam_fused._config import Config, Parameters
from cbam_fused.triton_kernels import (
    arguments,
    configurations,
    covers,
    launch_backward,
    launchers,
    load,
    problem,
)
from cbam_fused.triton_kernels.configurations import Device

DEVICE = "cuda" if torch.cuda.is_available() and not configurations.interpreting() else "cpu"
if configurations.interpreting():
    interpreter_patch.install()
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
NAMES = ("w1", "b1", "w2", "b2", "conv_weight", "conv_bias")


@pytest.fixture(autouse=True)
def poisoned():
    """Every buffer starts as NaN, every index as the largest integer, and nothing non-deterministic may run."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def checked_integers():
    """Sums, differences and products of integers that overflow raise; takes twice the time."""
    if configurations.interpreting():
        interpreter_patch.check_integers(True)
        yield
        interpreter_patch.check_integers(False)
    else:
        yield


@pytest.fixture(params=["a program a sample", "launches that share samples"])
def each_backward(request, monkeypatch):
    """Tiny maps have a backward of their own, where there are samples enough; one multiprocessor always has."""
    if request.param != "a program a sample":
        monkeypatch.setattr(launch_backward, "_whole_samples", lambda pr, x: None)


def layout_of(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


class Case:
    """Inputs of one call, in the dtype under test; every run works on copies."""

    def __init__(
        self, shape: Tuple[int, ...], dtype=torch.float64, *, channels_last=False, kernel=7, hidden=None,
        bias=True, norm: Optional[str] = "eval", spatial=True, pools=("avg", "max"), one_layer=False,
        parameter_dtype=None, seed=0, x: Optional[torch.Tensor] = None, **options,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        dims = len(shape) - 2
        c = shape[1]
        h = hidden or max(1, c // 4)
        kernel = (kernel,) * dims if isinstance(kernel, int) else kernel
        rand = lambda *s, scale=1.0: torch.randn(s, generator=g, dtype=torch.float64) * scale  # noqa: E731
        self.drawn = x is None
        x = rand(*shape) if x is None else x
        self.dy = layout_of(rand(*shape).to(dtype), channels_last)
        self.x = layout_of(x.to(dtype), channels_last)
        planes = 1 if options.get("light") else 2
        weights: Dict[str, Optional[torch.Tensor]] = dict.fromkeys(NAMES)
        if pools is not None:
            weights["w2"] = rand(c, c if one_layer else h, scale=h**-0.5)
            weights["b2"] = rand(c)
            if not one_layer:
                weights["w1"], weights["b1"] = rand(h, c, scale=c**-0.5), rand(h)
        if spatial:
            weights["conv_weight"] = rand(1, planes, *kernel, scale=0.3)
            weights["conv_bias"] = rand(1)
        if not bias:
            weights["b1"] = weights["b2"] = weights["conv_bias"] = None
        self.sizes: Dict[str, float] = {}
        self.dtype, self.parameter_dtype = dtype, parameter_dtype or dtype
        self.weights = {k: None if t is None else t.to(self.parameter_dtype) for k, t in weights.items()}
        self.norm = None
        if norm and spatial:
            self.norm = NORMS[dims](1).to(self.parameter_dtype)
            with torch.no_grad():
                self.norm.weight.copy_(rand(1)), self.norm.bias.copy_(rand(1))
                self.norm.running_mean.copy_(rand(1)), self.norm.running_var.copy_(rand(1).abs() + 0.5)
            self.norm.train(norm == "train")
        self.options = dict(pool_types=pools, **options)
        self.terms = shape[0] * (self.x[0, 0].numel() + c) + 2 * (
            1 if not spatial else int(torch.tensor(kernel).prod())
        )

    def run(
        self, backend: str, dtype: torch.dtype, parameter_dtype: torch.dtype, device: str,
        rounded: Optional[int] = None,
    ):  # fmt: skip
        """`rounded`, a seed: with every input off by one epsilon of its dtype, but an x that was given keeps its ties."""
        signs = torch.Generator().manual_seed(rounded or 0)

        def move(t: torch.Tensor, d: torch.dtype) -> torch.Tensor:
            moved = t.detach().to(device, d).clone(memory_format=torch.preserve_format)
            if rounded is not None and (self.drawn or t is not self.x):
                sign = torch.randint(0, 2, t.shape, generator=signs) * 2 - 1
                moved *= 1 + torch.finfo(t.dtype).eps * sign
            return moved

        x = move(self.x, dtype).requires_grad_()
        weights = {
            k: None if t is None else move(t, parameter_dtype).requires_grad_()
            for k, t in self.weights.items()
        }
        norm = None if self.norm is None else copy.deepcopy(self.norm).to(device, parameter_dtype)
        if backend == "reference" and dtype == torch.float64 and weights["conv_weight"] is not None:
            norm = self.watch(norm or nn.Identity())
        y = run_public(x, weights, norm, backend, self.options)
        y.backward(move(self.dy, dtype))
        found = {"y": y.detach(), "x": x.grad}
        found.update({k: t.grad for k, t in weights.items() if t is not None})
        if self.norm is not None:
            found.update({"norm.weight": norm.weight.grad, "norm.bias": norm.bias.grad})
        return {k: t.cpu().double() for k, t in found.items()}

    def watch(self, norm: nn.Module) -> nn.Module:
        """Notes the sizes of the terms of the gradients that are single sums over positions."""

        def seen(module, inputs, out):
            def gradient(g):
                size = g.abs().sum().item()
                self.sizes = {"conv_bias": size}
                if self.norm is not None:
                    normed = (out - module.bias) / module.weight
                    gain = (out.std() / inputs[0].std()).item() if out.numel() > 1 else 1.0
                    self.sizes["conv_bias"] *= gain
                    self.sizes.update({"norm.bias": size, "norm.weight": (g * normed).abs().sum().item()})

                if self.weights["conv_weight"][0, 0].numel() == 1:
                    # One tap: its gradient is such a sum too, of dz times maps no larger than x.
                    self.sizes["conv_weight"] = self.sizes["conv_bias"] * self.x.abs().max().item()

            out.register_hook(gradient)

        norm.register_forward_hook(seen)
        return norm

    def check(self) -> None:
        exact = self.run("reference", torch.float64, torch.float64, "cpu")
        low = [self.run("reference", self.dtype, self.parameter_dtype, "cpu")]
        found = self.run("triton", self.dtype, self.parameter_dtype, DEVICE)
        if self.dtype == self.parameter_dtype == torch.float32 and self.over(exact, low, found):
            sizes = self.sizes
            low += [self.run("reference", torch.float64, torch.float64, "cpu", rounded=s) for s in range(4)]
            self.sizes = sizes
        assert not self.over(exact, low, found)

    def over(self, exact: Dict, low: Sequence[Dict], found: Dict) -> List[str]:
        """What is further off than its budget."""
        assert found.keys() == exact.keys()
        over = []
        for name, ref in exact.items():
            got = found[name]
            assert torch.isfinite(got).all(), f"{name} is not finite"
            # The coarser of both dtypes rounds: x's in the outputs, the parameters' in their gradients.
            eps = torch.finfo(self.dtype if name in ("y", "x") else self.parameter_dtype).eps
            error = (got - ref).abs().max().item()
            scale = max(ref.abs().max().item(), self.sizes.get(name, 0.0))
            budget = 2 * (max((run[name] - ref).abs().max().item() for run in low) + eps * scale)
            if self.dtype == torch.float64:
                budget = 2 * eps * self.terms * max(1.0, scale)
            assert math.isfinite(budget), f"{name}: the reference is not finite in its own precision"
            if error > budget:
                over.append(f"{name}: error {error:.3e}, budget {budget:.3e}")
        return over


def run_public(x, weights, norm, backend, options):
    """`cbam`, but with pool_types None for no channel gate, which only the modules offer."""
    if options["pool_types"] is not None:
        return cbam(x, *weights.values(), norm=norm, backend=backend, **options)
    from cbam_fused import functional

    config = Config(
        0, cfg.SPATIAL_MAX_MEAN, cfg.TIES[options.get("ties", "first")], options.get("residual", False)
    )
    return functional.run(x, Parameters(**weights), config, norm, backend)


@triton.jit
def _double_kernel(p):
    tl.store(p, tl.load(p) * 2)


@pytest.mark.skipif(not configurations.interpreting(), reason="what the interpreter checks")
def test_integers_that_overflow_raise(checked_integers):
    for value, fits in ((2**30 - 1, True), (2**30, False)):
        number = torch.tensor([value], dtype=torch.int32)
        with nullcontext() if fits else pytest.raises(Exception, match="int32 overflow detected"):
            _double_kernel[(1,)](number)
        assert number.item() == value * (2 if fits else 1)


def test_loads():
    assert load() is None


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 16, 7, 7), (2, 3, 1, 1), (1, 1, 13, 57), (2, 65, 9, 5), (1, 257, 7, 7), (3, 16, 17, 16)],
    ids=str,
)
def test_shapes(shape, dtype, channels_last):
    Case(shape, dtype, channels_last=channels_last).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_parameters(dtype):
    Case((2, 16, 9, 11), dtype, parameter_dtype=torch.float32).check()


OPTIONS = {
    "no norm": dict(norm=None),
    "norm in training": dict(norm="train"),
    "norm in training, no gate": dict(norm="train", pools=None),
    "no biases": dict(norm=None, bias=False),
    "mean first": dict(spatial_order="mean_max"),
    "light": dict(light=True, ties="split", norm=None),
    "light, norm in training": dict(light=True, norm="train"),
    "residual": dict(residual=True),
    "residual, norm in training": dict(residual=True, norm="train"),
    "avg": dict(pools=("avg",)),
    "max": dict(pools=("max",)),
    "lp": dict(pools=("lp",)),
    "lse": dict(pools=("lse",)),
    "three pools": dict(pools=("avg", "lp", "lse")),
    "all pools": dict(pools=("avg", "max", "lp", "lse")),
    "one layer": dict(one_layer=True, pools=("avg",), norm=None),
    "one layer, two pools": dict(one_layer=True),
    "no spatial gate": dict(spatial=False),
    "no spatial gate, split": dict(spatial=False, ties="split", pools=("max", "lse")),
    "no channel gate": dict(pools=None),
    "no channel gate, split": dict(pools=None, ties="split", residual=True),
    "split": dict(ties="split"),
    "kernel 1": dict(kernel=1),
    "kernel 9": dict(kernel=9),
    "kernel 3 x 5": dict(kernel=(3, 5)),
}


@pytest.mark.usefixtures("checked_integers")
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    Case((2, 12, 9, 11), torch.float32, **OPTIONS[name]).check()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_with_a_program_a_sample(name, channels_last):
    """Two tiles of channels, the last of which ends within it."""
    with recording(run=True) as launches:
        Case((2, 70, 7, 6), torch.float32, channels_last=channels_last, **OPTIONS[name]).check()
    assert "whole_backward_kernel" in {launch.name for launch in launches}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_tiny_maps_of_few_samples(dtype, channels_last, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(configurations, "describe", lambda _: DEVICES["sm_90"])
    with recording(run=True) as launches:
        Case((2, 65, 9, 5), dtype, channels_last=channels_last).check()
    assert "whole_backward_kernel" not in {launch.name for launch in launches}


# What a table row holds at least, and one more of each: positions, channels, hidden units, one layer, samples.
LIMITS = {
    (53, 2048, 8, 8): (128, True),
    (53, 2048, 5, 13): (128, False),
    (53, 2049, 8, 8): (128, False),
    (53, 2048, 8, 7): (129, False),
    (53, 128, 8, 7): (0, True),
    (53, 129, 8, 8): (0, False),
    (52, 2048, 8, 8): (128, False),
}


@pytest.mark.parametrize("shape", LIMITS, ids=str)
def test_which_samples_have_a_program_each(shape):
    hidden, whole = LIMITS[shape]
    x, weights, bn = make_inputs(shape, torch.bfloat16, hidden=hidden)
    with recording(DEVICES["sm_90"]) as launches:
        run_ops(x, weights, bn, Config())
    assert (launches[3].name == "whole_backward_kernel") == whole
    assert len(launches) == (5 if whole else 8)


@pytest.mark.parametrize(
    "generation,dtype,whole",
    [("sm_120", torch.bfloat16, True), ("sm_120", torch.float32, False), ("sm_90", torch.float32, True)],
    ids=str,
)
def test_samples_in_flight_fit_l2_where_batches_are_cut(generation, dtype, whole):
    """170 samples of 2 x 200 KB are less than 0.8 x 96 MB, of 2 x 400 KB more; sm_90 never cuts a batch."""
    x, weights, bn = make_inputs((200, 2048, 7, 7), dtype, hidden=128)
    with recording(DEVICES[generation]) as launches:
        run_ops(x, weights, bn, Config())
    assert ("whole_backward_kernel" in {launch.name for launch in launches}) == whole


@pytest.mark.usefixtures("each_backward")
@pytest.mark.parametrize(
    "shape,kernel", [((2, 6, 37), 7), ((2, 6, 3, 5, 4), 3), ((1, 5, 4, 3, 5), (1, 3, 5))], ids=str
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_and_three_dimensions(shape, kernel, channels_last):
    Case(shape, torch.float32, kernel=kernel, channels_last=channels_last, hidden=2).check()


# Sizes at which the launchers share small maps, cut positions into segments and split channels.
SPLITS = {
    "small map, shares": ((1, 257, 7, 7), False, {}),
    "small map, shares, channels-last": ((1, 130, 7, 7), True, dict(ties="split")),
    "small map, one stretch": ((2, 40, 14, 14), False, dict(residual=True)),
    "small map, one stretch, split": (
        (2, 33, 7, 7),
        False,
        dict(ties="split", pools=("avg", "max", "lp", "lse")),
    ),
    "large map": ((1, 67, 17, 16), False, {}),
    "large map, segments": ((1, 68, 17, 16), True, dict(pools=("avg", "max", "lp", "lse"))),
    "large map, segments, split": ((1, 66, 17, 16), True, dict(ties="split", one_layer=True)),
    "thin map": ((1, 35, 17, 16), False, {}),
    "thin map, segments": ((1, 20, 17, 16), True, dict(pools=("avg", "max", "lp", "lse"))),
    "training": ((1, 130, 7, 7), False, dict(norm="train")),
    "groups of samples": ((5, 150, 7, 7), False, {}),
    "groups of samples, channels-last": (
        (6, 150, 7, 7),
        True,
        dict(pools=("avg", "max", "lp"), ties="split"),
    ),
    "groups, all pools, split": (
        (3, 140, 5, 5),
        False,
        dict(pools=("avg", "max", "lp", "lse"), ties="split"),
    ),
    "groups, blended": ((3, 140, 6, 6), False, dict(light=True)),
    "groups, one layer": ((3, 140, 4, 4), False, dict(one_layer=True)),
    "groups, no spatial gate": ((3, 140, 9, 9), True, dict(spatial=False)),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [16, 65])
def test_tiles_that_end_beyond_the_map(channels, dtype, channels_last, monkeypatch):
    """Several tiles a map, the last of which ends beyond it, in the configurations of a GPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr(configurations, "describe", lambda _: DEVICES["sm_90"])
    shape = (1, channels, 13, 57)
    with recording(run=True) as launches:
        Case(shape, dtype, channels_last=channels_last, kernel=3).check()
    sizes = {launch.meta["BP"] for launch in launches if "BP" in launch.meta}
    assert all(13 * 57 % size for size in sizes) and min(sizes) < 13 * 57 // 2


@pytest.mark.parametrize("name", SPLITS)
def test_splits_of_a_large_device(name, monkeypatch):
    shape, channels_last, options = SPLITS[name]
    if DEVICE == "cpu":
        monkeypatch.setattr(configurations, "describe", lambda _: DEVICES["sm_90"])
    Case(shape, torch.float32, channels_last=channels_last, kernel=3, **options).check()


# Thin maps whose tiles are blocks of rows, and whether the fourth launch, too, convolves dz.
BLOCKS = {
    "contiguous": ((2, 6, 31, 77), False, True, {}),
    "channels-last": ((1, 20, 30, 77), True, True, dict(ties="split", residual=True)),
    "blended maps, channels-last": ((1, 3, 16, 80), True, True, dict(light=True)),
    "spatial gate": ((2, 5, 16, 80), False, True, dict(pools=None, ties="split")),
    "every pool": ((1, 8, 30, 80), False, True, dict(pools=("avg", "max", "lp", "lse"))),
    "three dimensions": ((1, 4, 4, 8, 80), False, False, dict(kernel=3)),
    "training": ((2, 6, 16, 80), False, True, dict(norm="train")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_a_thin_map(name, dtype, monkeypatch):
    shape, channels_last, twice, options = BLOCKS[name]
    look_up = configurations._look_up

    def smaller(kernel, *key):
        found = look_up(kernel, *key)
        if "TW" not in found.meta:
            return found
        return replace(found, meta={**found.meta, "BC": 16, "BP": 256, "TW": 16}, fill=1)

    monkeypatch.setattr(configurations, "_look_up", smaller)
    if DEVICE == "cpu":
        # As many multiprocessors as tiles, or twice as many: then each of two programs has a share of 20 channels.
        monkeypatch.setattr(configurations, "describe", lambda _: Device("interpreter", 20, 0))
    with recording(run=True) as launches:
        Case(shape, dtype, channels_last=channels_last, **options).check()
    found = {launch.name: launch for launch in launches}
    last, second = found["input_backward_kernel"], found.get("attention_backward_kernel")
    assert (second is None) == (options.get("pools", ()) is None)
    tiles = math.ceil(shape[-1] / 16) * math.ceil(math.prod(shape[2:-1]) / 16)
    for launch in filter(None, (last, second)):
        assert launch.meta["TW"] == 16 and launch.programs % (shape[0] * tiles) == 0
        if DEVICE == "cpu":
            assert launch.programs == shape[0] * tiles * (2 if shape[1] > 16 else 1)
    names = last.kernel.arg_names
    given = {name: last.args[names.index(name)] is not None for name in ("dmaps", "dz")}
    assert given == {"dmaps": not twice, "dz": twice}


@pytest.mark.parametrize(
    "options", [{}, dict(ties="split", pools=("avg", "max", "lp", "lse")), dict(light=True)], ids=str
)
def test_with_pools_in_segments_a_program_takes_several_tiles(options, monkeypatch):
    look_up = configurations._look_up

    def fewer(kernel, *key):
        found = look_up(kernel, *key)
        if kernel == "spatial_pool":
            found = replace(found, meta={**found.meta, "BP": 64}, fill=0.03)
        return found

    monkeypatch.setattr(configurations, "_look_up", fewer)
    if DEVICE == "cpu":
        monkeypatch.setattr(configurations, "describe", lambda _: DEVICES["sm_90"])
    with recording(run=True) as launches:
        Case((2, 20, 17, 33), torch.float32, channels_last=True, **options).check()
    launch = next(launch for launch in launches if launch.name == "spatial_pool_forward_kernel")
    assert launch.meta["SEGMENTED"] and launch.args[launch.kernel.arg_names.index("group_tiles")] > 1
    if DEVICE == "cpu":
        assert launch.programs == 4


# (shape, bytes an element, kernel) -> how wide tiles of positions are, and whether dz is convolved twice.
WIDTHS = {
    ((64, 64, 160, 160), 2, (7, 7)): (32, True),
    ((64, 64, 112, 112), 2, (7, 7)): (0, True),  # a stretch of rows this short reads no more
    ((64, 64, 56, 56), 2, (7, 7)): (0, True),
    ((64, 64, 160, 162), 2, (7, 7)): (0, True),  # rows that end within vectors
    ((64, 64, 16, 256), 2, (7, 7)): (0, True),  # half of every block would be beside the map
    ((2, 64, 16, 256), 2, (7, 7)): (0, False),  # each of eight shares of the channels would convolve
    ((64, 64, 16, 640), 2, (7, 7)): (0, False),
    ((64, 64, 160, 160), 8, (7, 7)): (0, False),
    ((64, 65, 160, 160), 2, (7, 7)): (0, False),
    ((64, 32, 25600), 2, (1, 7)): (0, True),
    ((64, 16, 8, 32, 32), 2, (7, 7, 7)): (0, False),
}


@pytest.mark.parametrize("case", WIDTHS, ids=str)
def test_how_maps_are_cut(case):
    shape, itemsize, kernel = case
    dtype = {2: torch.bfloat16, 8: torch.float64}[itemsize]
    x, weights, bn = make_inputs(shape, dtype, kernel=kernel[-len(shape) + 2 :])
    with recording(DEVICES["sm_90"]) as launches:
        run_ops(x, weights, bn, Config())
    last = next(launch for launch in launches if launch.name == "input_backward_kernel")
    dmaps = last.args[last.kernel.arg_names.index("dmaps")]
    assert (last.meta["TW"], dmaps is None) == WIDTHS[case]
    elements = last.meta["WV"] * last.args[last.kernel.arg_names.index("w_units")]
    assert elements == shape[-1]


@pytest.mark.usefixtures("each_backward")
def test_chunks_equal_the_whole_batch(monkeypatch):
    """Results do not depend on how a batch is cut, and the weights' gradients cover all of it."""
    x, weights, bn = make_inputs((5, 8, 6, 5), torch.float32, hidden=3, kernel=(3, 3), device="cpu")
    x, weights, bn = x.to(DEVICE), [t.to(DEVICE) for t in weights], [t.to(DEVICE) for t in bn]
    whole = run_ops(x, weights, bn, Config(), dy=x.clone())
    monkeypatch.setattr(arguments, "chunks", lambda pr, x, k: [slice(0, 2), slice(2, 4), slice(4, 5)])
    cut = run_ops(x, weights, bn, Config(), dy=x.clone())
    for a, b in zip(itertools.chain(*whole), itertools.chain(*cut)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_chunk_sizes():
    device = Device("sm_89", 128, 72 << 20)
    sample = 8 << 20
    assert configurations.chunk_samples(device, sample, 32, 1) == 3
    assert configurations.chunk_samples(device, sample, 2, 1) == 2
    assert configurations.chunk_samples(DEVICES["sm_90"], sample, 32, 1) == 32


def hostile(kind: str) -> torch.Tensor:
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if kind == "nan":
        x[0, 2, 3, 4] = x[0, 2, 4, 1] = float("nan")
    elif kind == "inf":
        x[0, 2, 3, 4] = float("inf")
    elif kind == "-inf":
        x[0, 2, 3, 4] = x[0, 1, 0, 0] = float("-inf")
    elif kind == "both infinities":
        x[0, 2, 3, 4], x[0, 2, 1, 1] = float("inf"), float("-inf")
    elif kind == "a channel of -inf":
        x[0, 2] = float("-inf")
    return x


def kinds(t: torch.Tensor) -> torch.Tensor:
    """0 finite, 1 NaN, 2 inf, 3 -inf"""
    return t.isnan() * 1 + t.isposinf() * 2 + t.isneginf() * 3


HOSTILE = [
    *((torch.float64, None, pools) for pools in (("avg", "max"), ("max",), ("max", "lp", "lse"), None)),
    *((torch.float32, "eval", pools) for pools in (("avg", "max", "lp", "lse"), None)),
]


@pytest.mark.usefixtures("each_backward")
@pytest.mark.parametrize("dtype, norm, pools", HOSTILE, ids=str)
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "both infinities", "a channel of -inf"])
@pytest.mark.parametrize("ties", ["first", "split"])
def test_nan_and_infinity_go_where_the_reference_sends_them(dtype, norm, kind, pools, ties):
    """In every result: y, dx, and the gradients of all parameters."""
    case = Case((3, 6, 5, 7), dtype, norm=norm, kernel=3, pools=pools, ties=ties, x=hostile(kind))
    want = case.run("reference", dtype, dtype, "cpu")
    got = case.run("triton", dtype, dtype, DEVICE)
    assert want.keys() == got.keys() >= {"y", "x", "conv_weight", *(["norm.weight"] if norm else [])}
    for name, theirs in want.items():
        finite = theirs.isfinite()
        assert torch.equal(kinds(got[name]), kinds(theirs)), name
        size = theirs[finite].abs().max().item() if finite.any() else 0.0
        close = 1e-9 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(got[name][finite], theirs[finite], rtol=close, atol=close * size)
    assert kinds(want["y"]).any(), "the special value left no trace: nothing was tested"


@pytest.mark.usefixtures("each_backward")
@pytest.mark.parametrize("ties", ["first", "split"])
@pytest.mark.parametrize("pools", [("avg", "max"), None], ids=str)
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_ties(ties, pools, value):
    x = torch.full((2, 5, 4, 6), value, dtype=torch.float64)
    x[1, 2:4, 1:3] = 1.5
    Case((2, 5, 4, 6), kernel=3, ties=ties, pools=pools, x=x).check()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pool", oracle.SUMS)
def test_pools_of_a_very_large_map(pool, layout):
    oracle.check_sum_over_a_map(pool, 1024, layout, "triton", DEVICE)


@pytest.mark.parametrize("device", ["interpreter", "sm_90"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_hostile_numbers_in_a_large_map(layout, device, monkeypatch):
    """As one program of a channel sees them, and where channels-last has segments."""
    if DEVICE == "cpu" and device in DEVICES:
        monkeypatch.setattr(configurations, "describe", lambda _: DEVICES[device])
    oracle.check_hostile_numbers_in_a_map(160, layout, "triton", DEVICE)


def test_first_nan_is_the_index():
    x, weights, bn = make_inputs(
        (1, 3, 4, 5), torch.float32, hidden=2, kernel=(3, 3), device="cpu", norm=False
    )
    x.flatten(2)[0, 1, 7] = x.flatten(2)[0, 1, 11] = float("nan")
    forward, _ = run_ops(x.to(DEVICE), [t.to(DEVICE) for t in weights], bn, Config(), backward=False)
    assert forward[2][0, 1].item() == 7
    # The gate of a sample with a NaN is NaN everywhere, so every column's first NaN is channel 0.
    assert (forward[5] == 0).all()


@pytest.mark.parametrize("shape", [(2, 33, 9, 13), (2, 70, 7, 7)], ids=str)
@pytest.mark.parametrize("config", [Config(), Config(ties=cfg.TIES_SPLIT, pools=15)], ids=str)
def test_the_same_bits_twice(config, shape):
    x, weights, bn = make_inputs(shape, torch.float32, config, hidden=5, device="cpu")
    x, weights, bn = x.to(DEVICE), [t.to(DEVICE) for t in weights], [t.to(DEVICE) for t in bn]
    once, again = (run_ops(x, weights, bn, config, dy=x * 0.5) for _ in range(2))
    for a, b in zip(itertools.chain(*once), itertools.chain(*again)):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("each_backward")
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(norm="train"),
        dict(pools=("avg", "max", "lp", "lse"), ties="split", residual=True),
        dict(light=True, norm=None),
        dict(one_layer=True, spatial=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(options, channels_last):
    case = Case((2, 3, 4, 3), kernel=3, hidden=2, channels_last=channels_last, **options)
    names = [k for k, t in case.weights.items() if t is not None]
    affine = [] if case.norm is None else [case.norm.weight, case.norm.bias]

    def f(x, *weights):
        given = {**dict.fromkeys(NAMES), **dict(zip(names, weights))}
        norm = None if case.norm is None else copy.deepcopy(case.norm).to(DEVICE)
        if norm is not None:
            del norm.weight, norm.bias
            norm.weight, norm.bias = weights[len(names) :]
        return run_public(x, given, norm, "triton", case.options)

    tensors = (case.x, *(case.weights[k] for k in names), *affine)
    inputs = [t.detach().to(DEVICE).requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


@pytest.mark.usefixtures("each_backward")
def test_slices_expanded_gradients_and_strange_strides():
    base = Case((2, 9, 6, 8))
    big = torch.randn(3, 12, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for view in (big[1:, 2:11, 1:, 1:], big.permute(0, 1, 3, 2)[:2, :9, :6, :7]):
        base.x = view
        base.dy = torch.ones((), dtype=torch.float64).expand(view.shape)
        x = view.to(DEVICE) if DEVICE == "cpu" else view.to(DEVICE, copy=True)
        grads = []
        for backend in ("reference", "triton"):
            leaf = x.detach().requires_grad_()
            weights = {k: t.to(DEVICE) for k, t in base.weights.items()}
            run_public(
                leaf, weights, copy.deepcopy(base.norm).to(DEVICE), backend, base.options
            ).sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("each_backward")
def test_unaligned_storage():
    """A contiguous x that starts one element into its storage must not be read in whole vectors."""
    x, weights, bn = make_inputs((2, 8, 4, 8), torch.float16, hidden=2, kernel=(3, 3), device="cpu")
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].view(x.shape)
    shifted.copy_(x)
    weights, bn = [t.to(DEVICE) for t in weights], [t.to(DEVICE) for t in bn]
    want = run_ops(x.to(DEVICE), weights, bn, Config(), dy=x.to(DEVICE))
    got = run_ops(shifted, weights, bn, Config(), dy=x.to(DEVICE))
    for a, b in zip(itertools.chain(*want), itertools.chain(*got)):
        assert torch.equal(a, b)


def test_channels_last_weights():
    case = Case((2, 8, 5, 5), kernel=3)
    case.weights["conv_weight"] = case.weights["conv_weight"].to(memory_format=torch.channels_last)
    case.check()


@pytest.mark.usefixtures("each_backward")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pools", [3, 19], ids=["avg, max", "light"])
def test_a_channel_gate_alone(pools, channels_last):
    """attention_backward without dz: `masks` hands it a zero dy and the gate's gradient."""
    check_mask(lambda x, p, backend: masks.channel_mask(x, p, Config(pools=pools), backend), channels_last)


@pytest.mark.usefixtures("each_backward")
@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d(1).double()], ids=["no norm", "norm in training"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_spatial_gate_alone(norm, channels_last):
    """attention_backward without a channel gate's gradient."""
    norm = None if norm is None else copy.deepcopy(norm).to(DEVICE)
    check_mask(lambda x, p, backend: masks.spatial_mask(x, p, Config(), norm, backend), channels_last)


@pytest.mark.parametrize("arrangement", ["spatial_first", "parallel"])
def test_arrangements(arrangement):
    config = Config(residual=True)
    check_mask(lambda x, p, backend: masks.arranged(arrangement, x, p, config, None, backend), False)


def check_mask(f, channels_last: bool) -> None:
    """A function of x and the parameters: the same in fp64 as on the reference, with every gradient."""
    case = Case((2, 6, 5, 7), kernel=3, hidden=2, channels_last=channels_last)
    found = []
    for backend in ("reference", "triton"):
        x = case.x.to(DEVICE).detach().clone(memory_format=torch.preserve_format).requires_grad_()
        p = Parameters(**{k: t.to(DEVICE).detach().clone().requires_grad_() for k, t in case.weights.items()})
        out = f(x, p, backend)
        dy = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5)).to(DEVICE)
        grads = torch.autograd.grad(out, (x, *p), dy, allow_unused=True)
        assert out.abs().max() > 0 and grads[0].abs().max() > 0
        found.append((out, *grads))
    for want, got in zip(*found, strict=True):
        if want is None:
            # A weight that this gate does not use: no gradient, or none to speak of.
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_configurations_agree_as_the_tuner_sees_it(dtype, monkeypatch):
    x, weights, bn = make_inputs((1, 130, 7, 7), dtype, device="cpu")
    step = functools.partial(tune._step, x.to(DEVICE), *([t.to(DEVICE) for t in ts] for ts in (weights, bn)))
    results = []
    for multiprocessors in (1, 100):
        device = Device("sm_80", multiprocessors, 40 << 20)
        monkeypatch.setattr(configurations, "describe", lambda _: device)  # noqa: B023
        results.append(step())
    wanted, found = results
    assert tune._agrees(found, wanted)
    # In 16 bits rounding hides that the sums differ.
    assert dtype != torch.float32 or not all(map(torch.equal, found, wanted))
    assert not tune._agrees([t * 1.1 for t in found], wanted)


def test_empty_batch():
    x, weights, bn = make_inputs((0, 8, 5, 5), torch.float32, kernel=(3, 3), device="cpu")
    weights = [t.to(DEVICE).requires_grad_() for t in weights]
    x = x.to(DEVICE).requires_grad_()
    y = cbam(x, *weights, backend="triton")
    y.sum().backward()
    assert y.shape == x.shape
    assert all((t.grad == 0).all() for t in weights)


LAUNCHES = {
    "both gates": (Config(), 3, 5),
    "channel gate": (Config(spatial=0), 3, 4),
    "spatial gate": (Config(pools=0), 2, 5),
    "every pool": (Config(pools=15, ties=1, residual=True), 3, 5),
}


@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (64, 16, 8, 8), (2, 16, 40, 40)], ids=str)
@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name, shape):
    config, forward, backward = LAUNCHES[name]
    if shape[0] == 64:
        backward = 2  # a program takes a whole sample
    elif shape[-1] == 40 and not config.pools:
        backward -= 1  # the last pass over a thin map convolves for itself
    x, weights, bn = make_inputs(shape, torch.float32, config)
    with recording(DEVICES["sm_90"]) as launches, Seen("meta") as seen:
        run_ops(x, weights, bn, config, backward=False)
        assert len(launches) == forward
        run_ops(x, weights, bn, config)
    assert len(launches) == 2 * forward + backward
    assert set(seen.names) <= ALLOCATIONS | VIEWS


# Shape -> launches of the backward before the norm's and after it, with both gates and with a spatial gate alone. The
# first leaves sums in parts where positions are several tiles (those of the channel gate) or, on a small map, channels
# are shared (those of the other): one more ends them. The last pass over a thin map convolves for itself.
CUT_LAUNCHES = {
    (2, 16, 8, 8): ((1, 4), (1, 4)),
    (64, 16, 8, 8): ((1, 2), (1, 2)),
    (2, 512, 8, 8): ((2, 4), (2, 4)),
    (2, 512, 14, 14): ((2, 4), (2, 4)),
    (2, 16, 40, 40): ((2, 4), (1, 3)),
}


@pytest.mark.parametrize("gates", [Config(), Config(pools=0)], ids=["both gates", "spatial gate"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", CUT_LAUNCHES, ids=str)
def test_launches_of_a_norm_in_training(shape, channels_last, gates):
    """The kernels' launches are all that there are: no operator of torch has one."""
    first, second = CUT_LAUNCHES[shape][gates.pools == 0]
    forward = 3 if gates.pools else 2
    x, weights, _ = make_inputs(shape, torch.float32, gates, channels_last=channels_last)
    options = (gates.pools, gates.spatial, gates.ties)
    counts = []
    with recording(DEVICES["sm_90"]) as launches, Seen("meta") as seen:
        z, *saved = launchers.attention_forward(x, *weights, *options, True)
        counts.append(len(launches))
        _, s = launchers.scale_forward(x, saved[2], z, False)
        counts.append(len(launches))
        dz, dgate = launchers.scale_backward(x, x, saved[2], s)
        counts.append(len(launches))
        launchers.attention_backward(x, x, *weights, *saved, s, dz, dgate, *options, False)
        counts.append(len(launches))
    assert set(seen.names) <= ALLOCATIONS | VIEWS
    assert counts == [*itertools.accumulate((forward, 1, first, second))]


def test_nothing_is_saved_for_inference():
    x, weights, bn = make_inputs((2, 8, 5, 5), torch.float32, kernel=(3, 3), device="cpu")
    _, *saved = launchers.attention_forward(x.to(DEVICE), *(t.to(DEVICE) for t in weights), 3, 1, 0, False)
    pooled, pool_index, gate, *maps = saved
    assert gate.numel() and all(t.numel() == 0 for t in (pooled, pool_index, *maps))


@pytest.mark.parametrize("config", [Config(), Config(pools=0), Config(spatial=0), Config(pools=15)], ids=str)
def test_inference_gives_what_training_gives(config):
    x, *parameters = make_inputs((2, 8, 5, 7), torch.float32, config, kernel=(3, 3), device="cpu")
    x, (weights, bn) = x.to(DEVICE), ([None if t is None else t.to(DEVICE) for t in ts] for ts in parameters)
    (y,), _ = run_ops(x, weights, bn, config, save=False, backward=False)
    assert torch.equal(y, run_ops(x, weights, bn, config, backward=False)[0][0])


@pytest.mark.parametrize("op", launchers.OPS)
@pytest.mark.parametrize("config", [Config(), Config(pools=15, ties=1, residual=True)], ids=str)
def test_opcheck(op, config):
    """Schema, fake and dynamic shapes. The ops have no autograd of their own: that of `_autograd` is checked above."""
    x, weights, bn = make_inputs((2, 8, 5, 5), torch.float32, config, kernel=(3, 3), device="cpu")
    x, weights, bn = x.to(DEVICE), [t.to(DEVICE) for t in weights], [t.to(DEVICE) for t in bn]
    options = (config.pools, config.spatial, config.ties)
    (_, *saved), _ = run_ops(x, weights, bn, config, backward=False)
    (_, z, *_), _ = run_split_ops(x, weights, bn, config, backward=False)
    *kept, s = saved
    arguments = {
        "cbam_inference": (x, *weights, *bn, 1e-5, *options, config.residual),
        "cbam_forward": (x, *weights, *bn, 1e-5, *options, config.residual),
        "cbam_backward": (x, x, *weights, *bn, 1e-5, *saved, *options, config.residual),
        "attention_forward": (x, *weights, *options, True),
        "attention_backward": (x, x, *weights, *kept, s, z, kept[2] * 0.5, *options, config.residual),
        "scale_forward": (x, kept[2], z, config.residual),
        "scale_backward": (x, x, kept[2], s),
    }[op]
    torch.library.opcheck(getattr(torch.ops.cbam_fused_triton, op).default, arguments)


@pytest.mark.parametrize("mode", ["norm in eval", "norm in training", "inference"])
def test_compiles_without_a_graph_break(mode):
    block = FusedCBAM(8, 4, 3, backend="triton").to(DEVICE).train(mode == "norm in training")
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    found = []
    for f in (block, compiled):
        leaf = x.clone().requires_grad_(mode != "inference")
        with torch.set_grad_enabled(mode != "inference"):
            y = f(leaf)
        if mode != "inference":
            (y * y).sum().backward()
        found.append((y, leaf.grad, *(p.grad for p in f.parameters())))
    for plain, other in zip(*found, strict=True):
        assert plain is None and other is None or torch.equal(plain, other)


def test_covers_says_why_not():
    config = Config()
    assert covers(torch.empty(1, 2, 3, 3, device="meta"), config) is None
    assert "dtype" in covers(torch.empty(1, 2, 3, 3, dtype=torch.int32, device="meta"), config)
    assert "dimensions" in covers(torch.empty(1, 2, device="meta"), config)
    assert "32 bits" in covers(torch.empty(1, 1, 2**16, 2**16, device="meta"), config)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_cuda_graph():
    x, weights, bn = make_inputs((4, 64, 14, 14), torch.float16, device="cpu")
    x, weights, bn = x.cuda(), [t.cuda() for t in weights], [t.cuda() for t in bn]
    want = run_ops(x, weights, bn, Config(), dy=x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run_ops(x, weights, bn, Config(), dy=x)
    for _ in range(3):
        graph.replay()
    for a, b in zip(itertools.chain(*want), itertools.chain(*got)):
        assert torch.equal(a, b)


def test_problem_counts_rows():
    x = torch.empty(1, 8, 4, 4, device="meta")
    w = torch.empty(8, 8, device="meta")
    found = problem.describe(x, None, w, None, 19, 0)
    assert (found.rows, found.runs, found.hidden) == (2, 1, 8)
    assert _autograd.is_channels_last(x.to(memory_format=torch.channels_last))
