"""The resident CUDA kernels, executed on the host: outputs and every gradient against fp64, schedules, bytes."""

from __future__ import annotations

import math
import shutil

import numpy as np
import oracle
import pytest
import torch
from oracle import OPTIONS, Options, check, make_problem, run_problem

if shutil.which("g++") is None:
    pytest.skip("there is no g++ to compile the kernels for the host", allow_module_level=True)

import cuda_ptx
import cuda_resident as cr
import cuda_streamed as cs

from cbam_fused.functional import run

MEMORY = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LAYOUTS = tuple(MEMORY)
# BatchNorm in training needs the whole batch between two launches: the streamed tier's.
CASES = tuple(name for name, o in OPTIONS.items() if o.norm != "train")
# Splits by channels, with accesses of 16 and 8 bytes and of an element, and by positions, in fp32 and bf16.
SPLITS = {
    "channels": ((2, 16, 14, 16), torch.float32, "contiguous", cr.BY_CHANNELS),
    "channels-narrow": ((2, 24, 14, 14), torch.bfloat16, "contiguous", cr.BY_CHANNELS),
    "channels-element": ((2, 24, 7, 7), torch.bfloat16, "contiguous", cr.BY_CHANNELS),
    "positions": ((2, 8, 24, 24), torch.float32, "contiguous", cr.BY_POSITIONS),
    "positions-last": ((2, 24, 15, 16), torch.bfloat16, "channels_last", cr.BY_POSITIONS),
}


def _install(monkeypatch, **options):
    return cs.HostOps(cr.ResidentMachine(**options)).installed(monkeypatch)


def _check(monkeypatch, problem, **options):
    ops = _install(monkeypatch, **options)
    check(problem, "cuda", ties=problem.c.ties == 1)
    return ops


@pytest.mark.parametrize("name", CASES)
def test_options(monkeypatch, name):
    """Every point of the option grid, by channels, of short rows too, by positions and channels-last."""
    for shape, layout in (
        ((2, 16, 14, 14), "contiguous"),
        ((2, 12, 5, 7), "contiguous"),
        ((1, 6, 24, 24), "contiguous"),
        ((2, 8, 14, 15), "channels_last"),
    ):
        ops = _check(monkeypatch, make_problem(shape, OPTIONS[name], layout=layout))
        split, vector = {
            (2, 16, 14, 14): (cr.BY_CHANNELS, 4),
            (2, 12, 5, 7): (cr.BY_CHANNELS, 1),
        }.get(shape, (cr.BY_POSITIONS, 4))
        assert {(r["split"], r["vector"]) for r in ops.reports.values()} == {(split, vector)}


def _check_schedules(monkeypatch, problem):
    results = []
    for seed, resident, launches in ((0, 24, 1), (1, 8, 1), (2, 16, 2)):
        _install(monkeypatch, seed=seed, resident=resident, launches=launches)
        results.append(run_problem(problem, "cuda"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("shape, dtype, layout, split", SPLITS.values(), ids=SPLITS)
def test_bitwise_equal_under_every_schedule(monkeypatch, shape, dtype, layout, split):
    """Order of threads and blocks, how many clusters run together, and a second launch on the same counters."""
    problem = make_problem(
        (3, *shape[1:]), Options(kernel=3, norm="eval"), dtype, layout=layout, wide=dtype != torch.float32
    )
    ops = _check(monkeypatch, problem, seed=3, resident=24)
    assert ops.reports["cbam_backward"]["split"] == split
    _check_schedules(monkeypatch, problem)


# Other pools, shared ties and the halves of the block, each in another split and dtype.
SCHEDULED = {
    "split": ((3, 16, 7, 7), torch.float16, "contiguous"),
    "all-pools-split": ((3, 16, 12, 12), torch.bfloat16, "contiguous"),
    "lse": ((3, 8, 32, 32), torch.float16, "contiguous"),
    "lp": ((3, 8, 9, 9), torch.float16, "channels_last"),
    "channel-only": ((3, 8, 24, 24), torch.float32, "contiguous"),
    "spatial-only": ((3, 16, 14, 14), torch.float16, "contiguous"),
    "light-norm-eval": ((3, 16, 9, 9), torch.float16, "channels_last"),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_options_are_bitwise_equal_under_every_schedule(monkeypatch, name):
    """Of x in steps, so that many maxima are shared, and their gradients are where blocks could add in any order."""
    shape, dtype, layout = SCHEDULED[name]
    problem = make_problem(shape, OPTIONS[name], dtype, layout=layout)
    problem.x = (problem.x * 2).round() / 2
    _check_schedules(monkeypatch, problem)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
def test_dtypes(monkeypatch, dtype):
    for name in ("norm-eval", "all-pools-split"):
        for shape, layout in (
            ((1, 16, 14, 14), "contiguous"),
            ((1, 16, 7, 7), "contiguous"),
            ((1, 8, 32, 32), "contiguous"),
            ((1, 16, 14, 14), "channels_last"),
        ):
            _check(monkeypatch, make_problem(shape, OPTIONS[name], dtype, layout=layout))


# What the option grid has not: rectangular and deep kernels, a norm without weight and bias, a bias of one layer
# alone, parameters of which some are wide.
def _without(problem, *names):
    problem.p = problem.p._replace(**dict.fromkeys(names))
    return problem


def _with_kernel(problem, *size):
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(1, 2, *size, generator=g, dtype=torch.float64) / (2 * math.prod(size)) ** 0.5
    problem.p = problem.p._replace(conv_weight=weight.to(problem.p.conv_weight.dtype))
    return problem


def _without_affine(problem):
    problem.norm.weight = problem.norm.bias = None
    return problem


def _half_wide(problem, names):
    problem.p = problem.p._replace(**{n: getattr(problem.p, n).float() for n in names})
    return problem


RARE = {
    "3x5": ("plain", lambda p: _with_kernel(p, 3, 5)),
    "9x1": ("norm-eval", lambda p: _with_kernel(p, 9, 1)),
    "1x13": ("split", lambda p: _with_kernel(p, 1, 13)),
    "no-affine": ("norm-eval", _without_affine),
    "b1-alone": ("plain", lambda p: _without(p, "b2")),
    "b2-alone": ("all-pools", lambda p: _without(p, "b1")),
    "wide-w1": ("plain", lambda p: _half_wide(p, ("w1", "b2", "conv_weight"))),
    "wide-w2": ("residual-norm-eval", lambda p: _half_wide(p, ("w2", "b1", "conv_bias"))),
}


@pytest.mark.parametrize("name", RARE)
def test_rare_parameters(monkeypatch, name):
    options, change = RARE[name]
    for shape, dtype, layout, split in (
        ((2, 24, 7, 7), torch.bfloat16, "contiguous", cr.BY_CHANNELS),
        ((2, 8, 32, 32), torch.float16, "contiguous", cr.BY_POSITIONS),
        ((2, 24, 15, 16), torch.bfloat16, "channels_last", cr.BY_POSITIONS),
    ):
        problem = change(make_problem(shape, OPTIONS[options], dtype, layout=layout))
        ops = _check(monkeypatch, problem)
        assert {r["split"] for r in ops.reports.values()} == {split}


@pytest.mark.parametrize("pools", (("avg", "max"), ("avg", "max", "lp", "lse")), ids=("two", "four"))
@pytest.mark.parametrize(
    "dtype, wide",
    ((torch.float32, False), (torch.float16, False), (torch.bfloat16, True)),
    ids=("float32", "float16", "bfloat16-wide"),
)
def test_weights_are_read_in_quads_where_they_begin_at_one(monkeypatch, dtype, wide, pools):
    for shape, layout in (((3, 32, 7, 7), "contiguous"), ((2, 32, 7, 9), "channels_last")):
        problem = make_problem(
            shape, Options(pools=pools, hidden=12), dtype, layout=layout, seed=1, wide=wide
        )
        ops = _check(monkeypatch, problem)
        assert all(report["quads"] for report in ops.reports.values())
    # A view that begins elsewhere: the host faults a misaligned access. So do rows that are no multiple of a quad.
    _check(monkeypatch, problem, weight_offset=4 if wide else dtype.itemsize)
    problem = make_problem(shape, Options(pools=pools, hidden=10), dtype, layout=layout, wide=wide)
    assert not any(report["quads"] for report in _check(monkeypatch, problem).reports.values())


SHAPES = {
    "1-D": (2, 8, 512),
    "3-D": (2, 8, 6, 7, 8),
    "fewer-channels-than-blocks": (2, 3, 14, 16),
    "fewer-vectors-than-blocks": (1, 4, 1, 200),
    "wide-rows": (1, 8, 4, 160),
    "one-row": (1, 5, 1, 196),
    "short-rows": (2, 8, 13, 57),
    "fewer-positions-than-blocks": (2, 12, 1, 3),
    "one-position": (2, 8, 1, 1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(monkeypatch, shape):
    _check(monkeypatch, make_problem(shape, Options(kernel=3, norm="eval")))
    _check(monkeypatch, make_problem(shape, Options(kernel=3)), cluster=16)
    # A map of 16 bits that is cut by channels needs whole vectors of them.
    even = (shape[0], -(-shape[1] // 8) * 8, *shape[2:])
    _check(monkeypatch, make_problem(even, Options(kernel=3), torch.bfloat16, wide=True))
    last = (shape[0], 8, *shape[2:])
    _check(monkeypatch, make_problem(last, Options(kernel=3), layout="channels_last"), cluster=16)


@pytest.mark.parametrize("ties", ("first", "split"))
@pytest.mark.parametrize("shape, dtype, layout, split", SPLITS.values(), ids=SPLITS)
def test_ties(monkeypatch, shape, dtype, layout, split, ties):
    problem = make_problem(shape, Options(ties=ties), dtype, layout=layout)
    problem.x = (problem.x * 2).round() / 2
    problem.x[0, :2] = -0.0
    _install(monkeypatch)
    check(problem, "cuda", ties=True)


@pytest.mark.parametrize("ties", ("first", "split"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("pools", (("avg", "max"), None), ids=("both", "spatial-only"))
def test_nan_and_infinity_go_where_the_reference_sends_them(monkeypatch, value, ties, pools):
    _install(monkeypatch)
    for shape, layout in (
        ((3, 8, 14, 16), "contiguous"),
        ((3, 8, 11, 15), "contiguous"),
        ((3, 4, 24, 24), "contiguous"),
        ((3, 8, 14, 16), "channels_last"),
    ):
        problem = make_problem(shape, Options(ties=ties, kernel=3, pools=pools), layout=layout)
        problem.x[0, 3, 2, 5] = value
        problem.x[0, 2, 9, 13] = value
        problem.x[1, 3] = value
        expected, got = run_problem(problem, "reference"), run_problem(problem, "cuda")
        for name, e, g in zip(problem.names(), expected, got):
            assert torch.equal(torch.isnan(e), torch.isnan(g)), name
            torch.testing.assert_close(g, e, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_tensors_are_the_streamed_tiers(monkeypatch, layout):
    """Maxima and where they are, bit by bit, NaN and equal values included; sums within rounding."""
    problem = make_problem((2, 16, 14, 16), Options(), layout=layout)
    problem.x = (problem.x * 4).round() / 4
    problem.x[1, 5, 3, 3] = problem.x[1, 5, 9, 2] = problem.x[1, 7, 9, 2] = float("nan")
    arguments = (problem.x, problem.p, problem.c)
    resident = cs.cbam_forward(*arguments, machine=cr.ResidentMachine())
    streamed = cs.cbam_forward(*arguments, machine=cs.Machine())
    assert torch.equal(resident["pool_index"], streamed["pool_index"])
    assert torch.equal(resident["spatial_index"][1], streamed["spatial_index"][1])
    for name, value in resident.items():
        torch.testing.assert_close(value, streamed[name], equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_average_of_many_equal_numbers(layout):
    """Every addition errs in the same direction: 9e-8 and 5e-8 where each lane added up its elements one by one."""
    problem = make_problem((1, 4, 128, 128), Options(kernel=3), layout=layout)
    problem.x.fill_(0.1)
    exact = problem.x.double().mean((2, 3))[0]
    average = cs.cbam_forward(problem.x, problem.p, problem.c, machine=cr.ResidentMachine())["pooled"][0, 0]
    error, plain = ((t.double() - exact).abs().max() for t in (average, problem.x.mean((2, 3))[0]))
    assert error <= 2 * plain + 0.1 * 2.0**-24, (error, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_over_many_equal_numbers(monkeypatch, layout):
    """Of outputs and gradients too, of the largest maps that fit."""
    problem = make_problem((1, 4, 208, 208), Options(), layout=layout)
    problem.x.fill_(0.1)
    problem.dy.fill_(0.1)
    _install(monkeypatch)
    check(problem, "cuda", ties=True)


def _pools_of(x, backend, pools):
    problem = make_problem(tuple(x.shape), Options(pools=pools, hidden=0, mlp_bias=False, spatial=False))
    saved = cs.cbam_forward(x, problem.p, problem.c, machine=cr.ResidentMachine())
    return saved["pooled"], saved["pool_index"]


@pytest.mark.parametrize("pool", oracle.SUMS)
def test_pools_of_a_large_map(monkeypatch, pool):
    monkeypatch.setattr(oracle, "pools_of", _pools_of)
    oracle.check_sum_over_a_map(pool, 256, "contiguous", "cuda")


@pytest.mark.parametrize("side", [24, 63, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hostile_numbers_in_a_large_map(monkeypatch, layout, side):
    monkeypatch.setattr(oracle, "pools_of", _pools_of)
    oracle.check_hostile_numbers_in_a_map(side, layout, "cuda")


def test_weight_gradients_of_many_samples():
    """Sums over as many rows as 2048 samples leave, by one block alone: so many clusters would take the host minutes."""
    rows = 16384
    values, found = np.full((rows, 40), 0.1, np.float32), [np.zeros(n, np.float32) for n in ((32,), (8, 32))]
    cr.library(torch.float32).run("sums_over_rows", values, rows, *found)
    exact = rows * values[0, 0].astype(np.float64)
    for sums, exact in zip(found, (exact, exact * values[0, 0])):
        assert np.abs(sums / exact - 1).max() <= 4 * 2.0**-24


@pytest.mark.parametrize("shape, dtype, layout, split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize(
    "name",
    ("plain", "all-pools", "light", "no-bias", "single-layer", "spatial-only", "channel-only-residual"),
)
def test_the_hidden_layer_is_saved(name, shape, dtype, layout, split):
    """Without saving, nothing writes it, nor where no tensor of indices tells whether to save."""
    problem = make_problem(shape, OPTIONS[name], dtype, layout=layout, wide=dtype != torch.float32)
    arguments = (problem.x, problem.p, problem.c)
    machine = cr.ResidentMachine()
    saved = cs.cbam_forward(*arguments, machine=machine)
    assert machine.report["split"] == split
    cs.assert_hidden_layer(saved, problem)
    assert torch.equal(cs.cbam_forward(*arguments, machine=machine, save=False)["y"], saved["y"])


@pytest.mark.parametrize("shape, dtype, layout, split", SPLITS.values(), ids=SPLITS)
def test_bytes(monkeypatch, shape, dtype, layout, split):
    """Exactly 2 S forward and 3 S backward; forward without saving writes y and nothing else."""
    if cs.build.default_flavor() != "checked":
        pytest.skip("only the checked flavour counts bytes")
    problem = make_problem(shape, Options(kernel=3), dtype, layout=layout)
    ops = _install(monkeypatch)
    expected = run_problem(problem, "cuda")[0]
    size = problem.x.numel() * problem.x.element_size()
    for op, tensors in (("cbam_forward", ("x", "y")), ("cbam_backward", ("x", "dy", "dx"))):
        assert {name: ops.traffic[op][name] for name in tensors} == dict.fromkeys(tensors, size)
    with torch.no_grad():
        got = run(problem.x, problem.p, problem.c, None, "cuda")
    assert torch.equal(got, expected)
    saved = ("pooled", "channel_gate", "spatial_pool", "spatial_gate", "scratch")
    assert not any(ops.traffic["cbam_inference"].get(name, 0) for name in saved)


# Every shape of the usual networks: ResNet-18 and 50, MobileNetV1, YOLOv8 n, s and l at 640 (v5s is n), Faster R-CNN
# at 800 x 1344; and DeepLab's map of 33 x 33. The cluster that holds a sample, forward and backward, or 0: in 16-bit
# types, and in float32.
FITS = {
    (64, 56, 56): ((8, 8), (8, 8)), (128, 28, 28): ((8, 8), (8, 8)), (256, 14, 14): ((8, 8), (8, 8)),
    (256, 56, 56): ((8, 16), (16, 0)), (512, 28, 28): ((8, 8), (8, 16)), (1024, 14, 14): ((8, 8), (8, 8)),
    (64, 112, 112): ((16, 0), (16, 0)), (128, 56, 56): ((8, 8), (8, 16)), (256, 28, 28): ((8, 8), (8, 8)),
    (512, 14, 14): ((8, 8), (8, 8)),
    (16, 320, 320): ((0, 0), (0, 0)), (32, 160, 160): ((16, 0), (0, 0)), (64, 80, 80): ((8, 16), (8, 16)),
    (128, 40, 40): ((8, 8), (8, 8)), (256, 20, 20): ((8, 8), (8, 8)), (32, 320, 320): ((0, 0), (0, 0)),
    (64, 160, 160): ((0, 0), (0, 0)), (128, 80, 80): ((8, 16), (16, 0)), (256, 40, 40): ((8, 8), (8, 16)),
    (512, 20, 20): ((8, 8), (8, 8)), (64, 320, 320): ((0, 0), (0, 0)), (128, 160, 160): ((0, 0), (0, 0)),
    (256, 80, 80): ((16, 0), (0, 0)), (512, 40, 40): ((8, 0), (16, 0)),
    (256, 200, 336): ((0, 0), (0, 0)), (512, 100, 168): ((0, 0), (0, 0)), (1024, 50, 84): ((0, 0), (0, 0)),
    (2048, 25, 42): ((0, 0), (0, 0)),
    (512, 7, 7): ((8, 8), (8, 8)), (1024, 7, 7): ((8, 8), (8, 8)), (2048, 7, 7): ((8, 8), (8, 8)),
    (256, 33, 33): ((8, 8), (8, 16)),
}  # fmt: skip
# Channels-last where it differs.
FITS_LAST = {
    (512, 40, 40): ((8, 16), (16, 0)),
    (1024, 14, 14): ((8, 8), (8, 16)),
    (128, 80, 80): ((8, 16), (16, 0)),
}
# What of 16 blocks' memory x, or x and dy, can always take; above, maps of many positions need the rest.
SHARE = 0.86


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=lambda t: str(t)[6:])
def test_what_fits(dtype, layout):
    """All maps that 16 blocks hold, each on the fewest blocks; threads as the memory allows."""
    found, expected = {}, {**FITS, **(FITS_LAST if layout == "channels_last" else {})}
    for channels, height, width in FITS:
        problem = make_problem((1, channels, 2, 2), Options(hidden=max(channels // 16, 1)), dtype)
        x = torch.empty((1, channels, height, width), dtype=dtype, memory_format=MEMORY[layout])
        clusters = []
        for tensors, operation in enumerate(("cbam_forward", "cbam_backward"), 1):
            machine = cr.ResidentMachine()
            call = cs._Call(operation, x, problem.p, problem.c, cs.NO_NORM, machine)
            report = cuda_ptx.resident_plan(call)
            fits = bool(report["fits"])
            clusters.append(report["cluster"] if fits else 0)
            share = tensors * x.numel() * dtype.itemsize / (16 * machine.shared)
            assert not fits or share < 1
            assert fits or share >= SHARE, (channels, height, width, operation)
            if fits:
                assert report["shared"] <= machine.shared
                two = 2 * (report["shared"] + 1024) <= machine.shared + 1024
                assert report["threads"] == 256 or (report["threads"] == 512 and not two)
        found[channels, height, width] = tuple(clusters)
    wide = dtype == torch.float32
    assert found == {shape: fits[wide] for shape, fits in expected.items()}


def test_what_is_not_covered():
    """Goes to the streamed tier: other ops, fp64, addresses off 16 bytes, pieces that do not begin at them."""

    def covered(operation, shape, dtype=torch.float32, layout="contiguous", offset=0, shared=227 << 10):
        problem = make_problem(shape, Options(), dtype, layout=layout)
        machine = cr.ResidentMachine(offset=offset, shared=shared)
        call = cs._Call(operation, problem.x, problem.p, problem.c, cs.NO_NORM, machine)
        report = cr.plan(cr.library(torch.float32), call.sizes)
        return bool(report["covered"]), bool(report["fits"])

    assert covered("cbam_forward", (1, 8, 14, 14)) == (True, True)
    assert covered("cbam_forward", (1, 8, 14, 14), shared=2 << 10) == (True, False)
    assert not any(covered("attention_forward", (1, 8, 14, 14)))
    assert not any(covered("scale_backward", (1, 8, 14, 14)))
    assert not any(covered("cbam_forward", (1, 8, 14, 14), torch.float64))
    assert not any(covered("cbam_forward", (1, 8, 14, 14), offset=4))
    assert covered("cbam_forward", (1, 6, 15, 15)) == (True, False)
    assert not any(covered("cbam_forward", (1, 6, 14, 15), layout="channels_last"))
    # 16 bits number the vectors of a backward tile, which short rows fill with elements.
    assert covered("cbam_forward", (1, 8, 257, 257), torch.bfloat16, shared=4 << 20) == (True, True)
    assert covered("cbam_backward", (1, 8, 257, 257), torch.bfloat16, shared=4 << 20) == (True, False)


def test_a_last_wave_that_is_mostly_empty_goes_to_the_streamed_tier():
    lib = cr.library(torch.float32)

    def preferred(samples, active, positions=196, weights=0):
        answer = torch.zeros(1, dtype=torch.int64).numpy()
        lib.run("preferred", samples, active, positions, weights, answer)
        return bool(answer[0])

    assert [preferred(n, 16) for n in (1, 9, 10, 16, 17, 20, 32, 256)] == [
        False, False, True, True, False, True, True, True
    ]  # fmt: skip
    assert not preferred(16, 0)
    # Weights that outweigh a sample are read once a cluster: in one wave, as many samples read them in either tier.
    assert [preferred(n, 16, weights=weights) for n in (16, 32) for weights in (1, 2, 3)] == [
        True, True, True, True, True, False
    ]  # fmt: skip
    # Samples of 16 KiB.
    assert [preferred(n, 16, positions=8) for n in (16, 32)] == [True, False]


# Modelled on an H100 with ptxcpu: DRAM traffic over the floor, without what the weights and the saved tensors
# take, and the estimated time over a copy's that moves 2 S or 3 S.
TRAFFIC = 1.03
# Shared memory's wavefronts over what they are without bank conflicts: less than two-way ones throughout.
CONFLICTS = 2
# "channels-narrow" stands for what leaves by bulk copies.
MODELLED = {
    "positions": ((4, 256, 56, 56), 1.15, 1.1),
    "positions-small": ((4, 256, 40, 40), 1.15, 1.1),
    "channels": ((4, 512, 28, 28), 1.15, 1.1),
    "channels-small": ((4, 256, 28, 28), 1.15, 1.1),
    "channels-narrow": ((4, 1024, 14, 14), None, None),
}
no_ptx = pytest.mark.skipif(cuda_ptx.unavailable() is not None, reason=str(cuda_ptx.unavailable()))


@no_ptx
@pytest.mark.parametrize("shape, forward, backward", MODELLED.values(), ids=MODELLED)
def test_compiled_kernels_as_modelled(monkeypatch, shape, forward, backward):
    """The PTX that nvcc emits: no access that ptxcpu faults, DRAM traffic, time, and bank conflicts."""
    problem = make_problem(shape, Options(hidden=shape[1] // 16), torch.bfloat16)
    machine = cuda_ptx.ResidentPtxMachine()
    cs.HostOps(machine).installed(monkeypatch)
    run_problem(problem, "cuda")
    size = problem.x.numel() * problem.x.element_size()
    for op, floor, limit in (("cbam_forward", 2 * size, forward), ("cbam_backward", 3 * size, backward)):
        stats = machine.results[op].stats
        for kind in ("ld", "st"):
            assert stats[f"sh_{kind}_wf"] < CONFLICTS * stats[f"sh_{kind}_ideal"], (op, kind)
        assert machine.dram(op) - machine.small_bytes[op] <= TRAFFIC * floor, op
        if limit is not None:
            assert machine.time_over_copy(op, shape[0], floor) <= limit, op


@no_ptx
@pytest.mark.parametrize("seed", (0, 5))
@pytest.mark.parametrize(
    "shape",
    ((2, 16, 40, 40), (2, 16, 28, 28), (2, 32, 14, 14)),
    ids=("positions", "channels", "narrow"),
)
def test_compiled_kernels_against_fp64(monkeypatch, shape, seed):
    """Of the same instantiations, under two orders of blocks and warps."""
    problem = make_problem(shape, Options(hidden=4), torch.bfloat16)
    machine = cuda_ptx.ResidentPtxMachine(seed=seed)
    cs.HostOps(machine).installed(monkeypatch)
    check(problem, "cuda")
