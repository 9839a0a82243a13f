"""The streamed CUDA kernels, executed on the host: outputs and every gradient against fp64, schedules, bytes."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from oracle import (
    OPTIONS,
    SUMS,
    Options,
    assert_within,
    check,
    check_hostile_numbers_in_a_map,
    check_sum_over_a_map,
    leaves,
    make_problem,
    run_problem,
)

if shutil.which("g++") is None:
    pytest.skip("there is no g++ to compile the kernels for the host", allow_module_level=True)

import cuda_streamed as cs  # noqa: E402

from cbam_fused import masks  # noqa: E402
from cbam_fused.functional import run  # noqa: E402

LAYOUTS = ("contiguous", "channels_last")
# A device so small that a batch makes several units and takes over its scratch, and one that holds it all.
SMALL_L2, LARGE_L2 = 1 << 14, 50 << 20


def _check(monkeypatch, problem, **options):
    ops = cs.HostOps(cs.Machine(**options)).installed(monkeypatch)
    check(problem, "cuda")
    return ops


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(monkeypatch, name, layout):
    """Every point of the option grid; 8 x 10 positions are aligned for float, 7 x 7 are folded."""
    for shape, l2 in (((3, 8, 8, 10), LARGE_L2), ((4, 8, 7, 7), SMALL_L2)):
        _check(monkeypatch, make_problem(shape, OPTIONS[name], layout=layout), l2=l2)


SHAPES = {
    "one": (1, 1, 1, 1),
    "one-channel": (3, 1, 1, 7),
    "one-position": (2, 63, 1, 1),
    "seven": (2, 7, 7, 7),
    "127": (2, 5, 127, 1),
    "1-D": (2, 16, 49),
    "3-D": (2, 8, 3, 4, 5),
    "folded": (2, 24, 7, 7),
    "folded-chunks": (2, 512, 7, 7),
    "folded-twice": (2, 32, 14, 14),
    "ragged": (3, 24, 13, 57),
    "ragged-channels-in-chunks": (2, 264, 19, 27),
    "partial-pools": (2, 8, 33, 17),
    "wide": (1, 264, 4, 8),
    "channels-in-chunks": (2, 520, 8, 9),
    "channels-in-chunks-of-one-position": (1, 1100, 1, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(monkeypatch, shape, dtype, layout):
    problem = make_problem(
        shape, Options(kernel=3, norm="eval"), dtype, layout=layout, wide=dtype != torch.float32
    )
    if _check(monkeypatch, problem).reports["cbam_backward"]["chained"]:
        # With more multiprocessors than twice the samples, blocks share them.
        ops = _check(monkeypatch, problem, multiprocessors=9)
        assert not ops.reports["cbam_backward"]["chained"]


# In fp64 nothing says how far off the reference is where four pools drive the gate to 1 - 1e-5, whose
# distance from 1 is rounded: all pools are for float16 alone.
DTYPES = (
    (torch.float64, "plain"), (torch.float64, "split"), (torch.float16, "plain"), (torch.float16, "all-pools-split"),
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, options", DTYPES, ids=lambda v: str(v).removeprefix("torch."))
def test_dtypes(monkeypatch, dtype, options, layout):
    for shape in ((3, 8, 8, 8), (3, 8, 7, 7), (2, 7, 5, 5)):
        _check(monkeypatch, make_problem(shape, OPTIONS[options], dtype, layout=layout), l2=SMALL_L2)


# No number of 21 channels, but all of them, is whole vectors of any of these maps.
RAGGED = {
    "one-tile": ((3, 21, 7, 9), 1),
    "even": ((3, 21, 11, 14), 1),
    "several-units": ((5, 21, 19, 17), 2),
    "odd": ((2, 21, 25, 25), 3),
}


@pytest.mark.parametrize(
    "name",
    ("plain", "max", "split", "all-pools-split", "norm-train", "channel-only", "spatial-only", "residual"),
)
@pytest.mark.parametrize("shape", RAGGED)
def test_ragged_rows(monkeypatch, shape, name):
    """Rows that begin and end within vectors, by vectors: tiles that overlap, and outputs cut where a row's do."""
    size, tiles = RAGGED[shape]
    for dtype, l2 in ((torch.bfloat16, LARGE_L2), (torch.float32, SMALL_L2)):
        ops = _check(monkeypatch, make_problem(size, OPTIONS[name], dtype, wide=True), l2=l2)
        assert all(r["ragged"] and r["vector"] > 1 for r in ops.reports.values())
        if dtype == torch.bfloat16:
            assert max(r["tiles"] for r in ops.reports.values()) == tiles


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "options", (Options(spatial=False), Options(pools=None, kernel=3)), ids=("channel", "spatial")
)
def test_what_is_not_finite_stays_in_its_ragged_row(monkeypatch, options, dtype, value):
    """Vectors at the ends of a row and of a tile hold elements that are another's: none of them counts."""
    problem = make_problem((2, 20, 25, 25), options, dtype, wide=True)
    flat = problem.x.view(2, 20, 625)
    for c, position in ((3, 0), (5, 624), (9, 248), (11, 247), (13, 256), (14, 123), (19, 624)):
        flat[1, c, position] = value
    problem.dy.view(2, 20, 625)[0, 7, ::624] = value
    ops = cs.HostOps(cs.Machine()).installed(monkeypatch)
    expected, got = run_problem(problem, "reference"), run_problem(problem, "cuda")
    assert all(r["ragged"] for r in ops.reports.values())
    for name, e, g in zip(problem.names(), expected, got):
        assert torch.equal(torch.isnan(e), torch.isnan(g)), name
        assert torch.equal(torch.isinf(e), torch.isinf(g)), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_address_that_is_not_aligned(monkeypatch, layout):
    ops = _check(monkeypatch, make_problem((3, 8, 8, 8), Options(), torch.bfloat16, layout=layout), offset=2)
    assert {r["vector"] for r in ops.reports.values()} == {1}


# A map that is one tile, whose gate pass leaves dl itself; several tiles, and a unit of one sample, whose hidden
# layer is a tail's work in the backward; no map, no hidden layer.
# Blocks of channels in the backward; stages forward and backward.
LARGE_MLPS = (
    ((11, 160, 4, 4), Options(hidden=210, kernel=3), 2, (6, 6)),
    ((1, 160, 16, 20), Options(hidden=210, kernel=3), 2, (6, 5)),
    ((11, 160, 4, 4), Options(hidden=140, kernel=3, pools=("avg", "max", "lp")), 2, (6, 6)),
    ((5, 160, 4, 4), Options(hidden=220, spatial=False), 2, (4, 5)),
    ((3, 400, 4, 4), Options(hidden=0, kernel=3), 0, (6, 4)),
)


@pytest.mark.parametrize("shape, options, blocks, stages", LARGE_MLPS, ids=str)
def test_large_mlp_is_cut_into_items(monkeypatch, shape, options, blocks, stages):
    """Several items a unit for each of the MLP's stages, forward and backward, and a last unit that is short."""
    ops = _check(monkeypatch, make_problem(shape, options), multiprocessors=2, l2=2 << 20)
    forward, backward = ops.reports["cbam_forward"], ops.reports["cbam_backward"]
    assert backward["hidden_blocks"] == blocks
    assert (forward["stages"], backward["stages"]) == stages


@pytest.mark.parametrize("name", ("plain", "norm-train"))
def test_a_ring_of_units_of_which_one_is_short(monkeypatch, name):
    """Samples are taken from the last on, or after another operation's from the first: either may end with the unit that
    is not full, and a slot of scratch memory waits for as many items as the unit before it has."""
    problem = make_problem((203, 4, 9, 9), replace(OPTIONS[name], hidden=2, kernel=3))
    ops = _check(monkeypatch, problem, l2=SMALL_L2)
    (report,) = (r for op, r in ops.reports.items() if op in ("cbam_backward", "attention_backward"))
    assert 0 < report["ring"] < report["units"] and 203 % report["unit_samples"] and not report["chained"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ("plain", "norm-train", "all-pools-split"))
def test_passes_that_gather_the_maps_gradients(monkeypatch, name, layout):
    """Few channels: items of several tiles that convolve for themselves, the last ones short; folded rows too."""
    for shape, tiles in (((2, 56, 24, 25), 3), ((4, 56, 9, 9), 1)):
        problem = make_problem(shape, OPTIONS[name], layout=layout)
        ops = _check(monkeypatch, problem)
        results = run_problem(problem, "cuda")
        for report in (r for op, r in ops.reports.items() if op in ("cbam_backward", "attention_backward")):
            assert report["gather_tiles"] == tiles and (report["conv_items"] > 1) == (tiles > 1), report
        cs.HostOps(cs.Machine(seed=1, resident=1)).installed(monkeypatch)
        assert all(torch.equal(a, b) for a, b in zip(results, run_problem(problem, "cuda")))


# Without one of the gates, or with a single layer, samples are not chained.
CHAINED = [name for name, o in OPTIONS.items() if o.pools is not None and o.spatial and o.hidden]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_chained_samples(monkeypatch, name, layout):
    """A block a sample, folded rows and rows of one tile; bitwise the same in another order and on used counters."""
    shapes = ((3, 24, 7, 7), (2, 24, 8, 8))
    for shape in shapes if layout == "contiguous" and name in CHAINED else shapes[:1]:
        problem = make_problem(shape, OPTIONS[name], layout=layout)
        ops = cs.HostOps(cs.Machine()).installed(monkeypatch)
        results = run_problem(problem, "cuda")
        found = [
            r["chained"] for op, r in ops.reports.items() if op in ("cbam_backward", "attention_backward")
        ]
        assert found == [name in CHAINED]
        if name in CHAINED:
            _check(monkeypatch, problem, seed=1, resident=1, launches=2)
            assert all(torch.equal(a, b) for a, b in zip(results, run_problem(problem, "cuda")))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", cs.ELEMENTS, ids=str)
def test_chained_samples_of_many_channels(monkeypatch, dtype, layout):
    """Terms of the channels in two turns."""
    problem = make_problem(
        (2, 1032, 4, 8),
        Options(hidden=5, kernel=3, norm="eval"),
        dtype,
        layout=layout,
        wide=dtype.itemsize == 2,
    )
    ops = _check(monkeypatch, problem, multiprocessors=2)
    report = ops.reports["cbam_backward"]
    assert report["chained"] and report["gather_tiles"] == (2 if layout == "contiguous" else 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", ("norm-train", "all-pools-split"))
def test_channels_cut_into_chunks(monkeypatch, options, layout):
    """Backward items that take a part of the channels, the last one short: ds is summed over them later."""
    problem = make_problem((2, 520, 8, 9), OPTIONS[options], layout=layout)
    ops = _check(monkeypatch, problem)
    backward = "scale_backward" if options == "norm-train" else "cbam_backward"
    assert ops.reports[backward]["reduce_chunks"] > 1


def test_kernel_and_maps_beyond_shared_memory(monkeypatch):
    """A map whose window does not fit, and a kernel of 49 x 49: both are read from global memory."""
    _check(monkeypatch, make_problem((1, 2, 3, 70, 70), Options(kernel=3)))
    _check(monkeypatch, make_problem((1, 4, 7, 7), Options(kernel=49)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", ("plain", "norm-train", "all-pools-split"))
def test_bitwise_equal_under_every_schedule(monkeypatch, options, layout):
    """Order of threads and blocks, number of blocks, and a second launch on the counters of the first."""
    problem = make_problem((5, 16, 7, 7), OPTIONS[options], layout=layout)
    results = []
    for seed, resident, launches in ((0, 6, 1), (1, 1, 1), (2, 3, 2), (3, 6, 1)):
        cs.HostOps(cs.Machine(l2=SMALL_L2, seed=seed, resident=resident, launches=launches)).installed(
            monkeypatch
        )
        results.append(run_problem(problem, "cuda"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


class Gpu(NamedTuple):
    multiprocessors: int
    l2: int  # MiB
    block: int  # KiB of shared memory that a block may ask for
    shared: int  # KiB of a multiprocessor


# CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"; L2 from the data sheets.
GPUS = {
    "A100 sm_80": Gpu(108, 40, 163, 164), "RTX 3090 sm_86": Gpu(82, 6, 99, 100), "L4 sm_89": Gpu(58, 48, 99, 100),
    "H100 sm_90": Gpu(132, 50, 227, 228), "B200 sm_100": Gpu(148, 126, 227, 228), "RTX 5090 sm_120": Gpu(170, 96, 99, 100),
}  # fmt: skip
# What networks have, as compat.md of the project's design lists it, and the smallest.
SEEN = (
    (64, 112, 112), (64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7), (512, 7, 7), (32, 160, 160),
    (16, 320, 320), (512, 20, 20), (256, 200, 336), (2048, 25, 42), (1, 1, 1), (7, 7, 7), (127, 1, 1),
    (1023, 1, 17), (2, 3, 7), (8001, 111, 111),
)  # fmt: skip


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_plans(gpu):
    """On every device: all blocks of a launch are resident, no item waits for one of a later ticket, and whatever L2
    holds, with several units a quarter of the blocks has an item between the last that is waited for and the first that
    waits."""
    lib = cs.library(torch.float32)
    report, order, plans = np.zeros(len(cs.REPORT), np.int64), np.zeros(2, np.int64), 0
    for dtype, operation, layout in itertools.product(cs.ELEMENTS, cs.OPERATIONS, LAYOUTS):
        small = make_problem((1, 8, 2, 2), Options(hidden=5), dtype)
        machine = cs.Machine(multiprocessors=gpu.multiprocessors, l2=gpu.l2 << 20, shared=gpu.block << 10)
        call = cs._Call(operation, small.x, small.p, small.c, cs.NO_NORM, machine)
        for (c, h, w), n in itertools.product(SEEN, (1, 3, 48, 1024)):
            call.sizes[2:8] = (layout == "channels_last", n, c, 1, h, w)
            call.sizes[11] = max(1, c // 16)
            lib.run("plan", call.sizes, report)
            lib.run("waits_backwards", call.sizes, order)
            plan = dict(zip(cs.REPORT, report.tolist()))
            case = (dtype, operation, layout, n, c, h, w, order, plan)
            assert plan["fits"] and order[0], case
            assert plan["units"] == 1 or order[1] >= plan["blocks"] * gpu.multiprocessors // 4, case
            assert plan["grid"] <= plan["blocks"] * gpu.multiprocessors and plan["blocks"] <= 2, case
            # A KiB of each block is CUDA's own.
            assert plan["blocks"] * (plan["shared"] + plan["static_shared"] + 1024) <= gpu.shared << 10, case
            plans += 1
    assert plans == 4 * 6 * 2 * len(SEEN) * 4


def _plan(gpu, operation, shape, hidden, dtype=torch.bfloat16):
    """The plan of a call on a device, and the least number of tickets between its stages."""
    small = make_problem((1, 8, 2, 2), Options(hidden=5), dtype)
    machine = cs.Machine(multiprocessors=gpu.multiprocessors, l2=gpu.l2 << 20, shared=gpu.block << 10)
    call = cs._Call(operation, small.x, small.p, small.c, cs.NO_NORM, machine)
    call.sizes[3:8], call.sizes[11] = (*shape[:2], 1, *shape[2:]), hidden
    report, order = np.zeros(len(cs.REPORT), np.int64), np.zeros(2, np.int64)
    lib = cs.library(torch.float32)
    lib.run("plan", call.sizes, report)
    lib.run("waits_backwards", call.sizes, order)
    return dict(zip(cs.REPORT, report.tolist())), int(order[1])


@pytest.mark.parametrize(
    "operation, shape, least, most",
    (
        ("cbam_forward", (256, 256, 56, 56), 396, 527),  # L2 has room for the x of nearly twice 264 blocks
        ("cbam_backward", (256, 256, 56, 56), 198, 330),  # for the x and dy of fewer
        ("cbam_backward", (256, 512, 56, 56), 66, 197),  # or as few as may be
        ("attention_backward", (256, 256, 56, 56), 528, 660),  # that reads nothing twice
        ("cbam_backward", (3, 256, 56, 56), 528, 660),  # a batch that it has room for
    ),
)
def test_stages_are_as_far_apart_as_l2_allows(operation, shape, least, most):
    plan, distance = _plan(GPUS["H100 sm_90"], operation, shape, 16)
    assert plan["blocks"] == 2 and least <= distance <= most, (plan, distance)


def test_ragged_rows_that_need_too_much_memory_go_by_elements():
    lib, report = cs.library(torch.float32), np.zeros(len(cs.REPORT), np.int64)
    small = make_problem((1, 8, 2, 2), Options(hidden=5), torch.bfloat16)
    for channels, ragged in ((16001, 1), (18001, 0)):
        machine = cs.Machine(multiprocessors=82, l2=6 << 20, shared=99 << 10)
        call = cs._Call("cbam_forward", small.x, small.p, small.c, cs.NO_NORM, machine)
        call.sizes[2:8] = (0, 1, channels, 1, 111, 111)
        call.sizes[11] = channels // 16
        lib.run("plan", call.sizes, report)
        plan = dict(zip(cs.REPORT, report.tolist()))
        assert plan["fits"] and plan["ragged"] == ragged and plan["vector"] == (8 if ragged else 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    (
        "plain", "light-norm-eval", "mean-max", "norm-eval", "norm-train", "single-layer", "no-bias", "channel-only",
        "spatial-only",
    ),
)  # fmt: skip
def test_weight_gradients_in_shares_of_the_batch(monkeypatch, name, layout):
    """Several items a tile, each with some of the samples, and others that add them up: in the same order always."""
    problem = make_problem((43, 12, 3, 4), OPTIONS[name], layout=layout)
    ops = _check(monkeypatch, problem, multiprocessors=24)
    (report,) = (r for op, r in ops.reports.items() if op in ("cbam_backward", "attention_backward"))
    assert report["weight_splits"] > 2, report
    results = run_problem(problem, "cuda")
    cs.HostOps(cs.Machine(multiprocessors=24, seed=1, resident=1)).installed(monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(results, run_problem(problem, "cuda")))


def test_weight_gradients_of_many_samples(monkeypatch):
    """Sums of 2048 terms stay within the budget of the other tests: they are taken a stage of samples at a time."""
    _check(monkeypatch, make_problem((1024, 8, 1, 2), Options(kernel=1)))


# Positions, channels, hidden units, samples, bytes of weights: what a table of an H100 (132 multiprocessors) chains.
CHAINS = {
    (49, 512, 32, 66, 4): True, (49, 512, 32, 65, 4): False, (64, 256, 16, 66, 4): True, (65, 256, 16, 66, 4): False,
    (49, 1024, 64, 132, 2): True, (49, 1024, 64, 131, 2): False, (49, 1024, 64, 132, 4): False,
    (49, 2048, 128, 66, 2): False, (49, 512, 32, 348, 2): True, (49, 512, 32, 349, 2): False,
}  # fmt: skip


@pytest.mark.parametrize("call", CHAINS, ids=str)
def test_which_samples_are_chained(call):
    """Enough of them for the device, no more than L2 holds, and weights of at most three times a sample."""
    positions, channels, hidden, samples, weight = call
    gpu = GPUS["H100 sm_90"]
    small = make_problem((1, 8, 2, 2), Options(hidden=5), torch.bfloat16, wide=weight == 4)
    machine = cs.Machine(multiprocessors=gpu.multiprocessors, l2=gpu.l2 << 20, shared=gpu.block << 10)
    for operation in ("cbam_backward", "attention_backward"):
        sizes = cs._Call(operation, small.x, small.p, small.c, cs.NO_NORM, machine).sizes
        sizes[3:8], sizes[11] = (samples, channels, 1, 1, positions), hidden
        report = np.zeros(len(cs.REPORT), np.int64)
        cs.library(torch.float32).run("plan", sizes, report)
        assert dict(zip(cs.REPORT, report.tolist()))["chained"] == CHAINS[call]


@pytest.mark.parametrize("n, share", ((2, 2), (16, 4), (256, 4)))
def test_units_share_the_weights(n, share):
    """A unit of a large MLP has as many samples as share a read of its weights."""
    plan, _ = _plan(GPUS["H100 sm_90"], "cbam_backward", (n, 2048, 7, 7), 128)
    assert plan["unit_samples"] == share


def _on_streams(first, second, seed, resident):
    """y of two forwards that run at the same time, as launches on the streams of these ids."""
    shape = (3, 8, 8, 8)
    problem = make_problem((2 * shape[0], *shape[1:]), Options(mlp_bias=False, kernel=3))
    n, c, h, w = shape
    machine = cs.Machine(l2=SMALL_L2)
    call = cs._Call("cbam_forward", problem.x[:n], problem.p, problem.c, cs.NO_NORM, machine)
    lib = cs.library(torch.float32)
    report = np.zeros(len(cs.REPORT), np.int64)
    lib.run("plan", call.sizes, report)
    numbers = dict(zip(cs.REPORT, report.tolist()))
    assert numbers["vector"] == 4 and numbers["units"] > 1
    scratch, room = -(-numbers["scratch"] // 256) * 256, 4096

    def made(name, *size):
        return cs.build.Array(np.zeros((2 * n, *size), np.float32), name, unwritten=True)

    y, pool = made("y", c, h, w), cs.build.Array(np.zeros(room, np.uint32), "counters")
    lib.run(
        "run_on_streams", call.sizes, problem.x.numpy(), y, made("pooled", 2, c), made("channel_gate", c),
        made("spatial_pool", 2, h, w), made("spatial_gate", h, w), problem.p.w1.numpy(), problem.p.w2.numpy(),
        problem.p.conv_weight.numpy(), pool, room,
        cs.build.Array(np.zeros(2 * scratch, np.uint8), "scratch", unwritten=True), scratch, first, second,
        seed=seed, resident=resident,
    )  # fmt: skip
    assert not pool.data.any(), "the counters must be zero again"
    return problem, torch.from_numpy(y.data)


@pytest.mark.parametrize("resident", (2, 5))
def test_two_streams_at_once(resident):
    """Launches interleaved block by block, on the counters that the library gives their streams."""
    for seed in range(4):
        problem, y = _on_streams(7, 8, seed, resident)
        machine = cs.Machine(l2=SMALL_L2)
        halves = [
            cs.cbam_forward(x.contiguous(), problem.p, problem.c, machine=machine)["y"]
            for x in problem.x.split(3)
        ]
        assert torch.equal(y, torch.cat(halves))


def test_two_launches_on_the_counters_of_one_stream_are_noticed():
    """What the test above would see if two streams were given one set: a hang, a race or wrong numbers."""
    for seed in range(4):
        with pytest.raises(cs.build.SimtError):
            _on_streams(7, 7, seed, 5)


def test_counters_of_streams_and_devices():
    """One set a device and stream, kept; a launch that needs more gets a new one, for that stream alone."""
    calls = (
        (0, 0, 48),
        (0, 5, 48),
        (1, 0, 48),
        (0, 0, 1024),
        (0, 0, 1025),
        (0, 5, 1024),
        (0, 0, 48),
        (0, 0, 2048),
    )
    devices, streams, words = (np.array(column, np.int64) for column in zip(*calls))
    out = np.zeros(len(calls), np.int64)
    cs.library(torch.float32).run("counter_sets", devices, streams, words, len(calls), out)
    assert out.tolist() == [0, 1, 2, 0, 3, 1, 3, 3]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ("first", "split"))
@pytest.mark.parametrize("shape", ((3, 8, 8, 8), (3, 8, 7, 7)))
def test_ties(monkeypatch, shape, ties, layout):
    problem = make_problem(shape, Options(ties=ties), layout=layout)
    problem.x = (problem.x * 2).round() / 2
    cs.HostOps(cs.Machine()).installed(monkeypatch)
    check(problem, "cuda", ties=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ("first", "split"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_nan_and_infinity_go_where_the_reference_sends_them(monkeypatch, value, ties, layout):
    problem = make_problem((3, 8, 7, 8), Options(ties=ties, kernel=3), layout=layout)
    problem.x[0, 3, 2, 5] = value
    problem.x[1, 4] = value
    cs.HostOps(cs.Machine()).installed(monkeypatch)
    expected, got = run_problem(problem, "reference"), run_problem(problem, "cuda")
    for name, e, g in zip(problem.names(), expected, got):
        assert torch.equal(torch.isnan(e), torch.isnan(g)), name
        torch.testing.assert_close(g, e, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hw", ((8, 10), (24, 20), (7, 7), (25, 25)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_first_nan_is_the_maximum(dtype, hw, layout):
    """Of a channel's positions, and of a position's channels where no channel gate has spread it."""
    problem = make_problem((2, 80, *hw), OPTIONS["max"], dtype, layout=layout)
    x = problem.x
    for c, positions in {3: (21, 40), 17: (48,), 70: (5, 21)}.items():
        for position in positions:
            x[1, c, position // hw[1], position % hw[1]] = float("nan")
    flat = x.flatten(2).float()
    saved = cs.cbam_forward(x, problem.p, problem.c)
    assert torch.equal(saved["pool_index"].long().view(2, 80), flat.max(2).indices)
    weights = problem.p._replace(w1=None, b1=None, w2=None, b2=None)
    saved = cs.cbam_forward(x, weights, replace(problem.c, pools=0))
    assert torch.equal(saved["spatial_index"].long().view(2, -1), flat.max(1).indices)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_average_of_many_equal_numbers(layout):
    """Every addition errs in the same direction: 5.2e-7 where each lane added up its elements one by one."""
    problem = make_problem((1, 2, 128, 128), Options(kernel=3), layout=layout)
    problem.x.fill_(0.1)
    exact = problem.x.double().mean((2, 3))[0]
    average = cs.cbam_forward(problem.x, problem.p, problem.c)["pooled"][0, 0]
    error, plain = ((t.double() - exact).abs().max() for t in (average, problem.x.mean((2, 3))[0]))
    assert error <= 2 * plain + 0.1 * 2.0**-24, (error, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", SUMS)
def test_pools_of_a_very_large_map(monkeypatch, pool, layout):
    cs.HostOps(cs.Machine(l2=LARGE_L2)).installed(monkeypatch)
    check_sum_over_a_map(pool, 1024, layout, "cuda")


@pytest.mark.parametrize("side", [24, 400, 401])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hostile_numbers_in_a_large_map(monkeypatch, layout, side):
    cs.HostOps(cs.Machine(l2=LARGE_L2)).installed(monkeypatch)
    check_hostile_numbers_in_a_map(side, layout, "cuda")


def test_sums_over_many_equal_numbers(monkeypatch):
    """Of outputs and gradients too; contiguous and on Triton, four minutes more, is left to tests/rehearsal.py."""
    problem = make_problem((1, 4, 640, 640), Options(), layout="channels_last")
    problem.x.fill_(0.1)
    cs.HostOps(cs.Machine(l2=LARGE_L2)).installed(monkeypatch)
    check(problem, "cuda", ties=True)


def test_without_saving(monkeypatch):
    cs.HostOps(cs.Machine()).installed(monkeypatch)
    for options in (Options(), OPTIONS["norm-train"], OPTIONS["all-pools-split"]):
        problem = make_problem((3, 8, 7, 7), options)
        expected = run_problem(problem, "cuda")[0]
        with torch.no_grad():
            got = run(problem.x, problem.p, problem.c, problem.norm, "cuda")
        assert torch.equal(expected, got)


# Small layers, which one block computes in a tail, and one that is cut into items.
HIDDEN = (
    *(((3, 16, 7, 7), OPTIONS[name]) for name in ("plain", "all-pools", "light", "no-bias", "single-layer", "spatial-only")),
    ((11, 160, 4, 4), Options(hidden=130, kernel=3)),
)  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("shape, options", HIDDEN, ids=str)
def test_the_hidden_layer_is_saved(shape, options, dtype):
    """Of both forwards; without saving, neither writes it."""
    problem = make_problem(shape, options, dtype, wide=dtype != torch.float32)
    arguments = (problem.x, problem.p, problem.c)
    machine = cs.Machine(multiprocessors=2, l2=1 << 20)
    for forward in (cs.cbam_forward, cs.attention_forward):
        saved = forward(*arguments, machine=machine)
        cs.assert_hidden_layer(saved, problem)
        assert torch.equal(
            forward(*arguments, machine=machine, save=False)["channel_gate"], saved["channel_gate"]
        )


# Shapes, and the most that the backward may ask for, in S. At 7 x 7 a vector of channels in fp32 is 0.041 S. Nine
# hand-ons of one are the least: a part of dg (written, read), dl (written, read for dl w2 and for dw2), and two
# pools' gradients (written, read). The rest are sums over blocks of channels, and what tiles of dw1 and dw2 share.
BYTES = (
    ((1, 256, 32, 32), torch.float32, 5.2), ((1, 256, 56, 56), torch.bfloat16, 5.2),
    ((1, 512, 28, 28), torch.float32, 5.2), ((1, 512, 28, 28), torch.bfloat16, 5.2),
    ((1, 256, 28, 28), torch.bfloat16, 5.2), ((1, 256, 40, 40), torch.bfloat16, 5.2),
    ((1, 1024, 14, 14), torch.float32, 5.2), ((1, 64, 56, 56), torch.bfloat16, 5.2),
    ((1, 1024, 14, 14), torch.bfloat16, 5.2), ((1, 2048, 7, 7), torch.bfloat16, 5.67),
    ((3, 1024, 7, 7), torch.bfloat16, 5.2), ((3, 128, 28, 28), torch.bfloat16, 5.2),
    ((3, 512, 20, 20), torch.bfloat16, 5.2), ((3, 64, 80, 80), torch.bfloat16, 5.2),
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, dtype, bar", BYTES, ids=str)
def test_bytes(monkeypatch, shape, dtype, bar, layout):
    """x, y, dy and dx move exactly 4 S and 5 S; with scratch memory at most 4.1 S, and 5.2 S or what is above.

    But the plain pool of unfolded rows reads one vector a channel again, to see where in it the maximum is.
    """
    if cs.build.default_flavor() != "checked":
        pytest.skip("only the checked flavour counts bytes")
    problem = make_problem(shape, Options(hidden=shape[1] // 16), dtype, layout=layout)
    ops = cs.HostOps(cs.Machine()).installed(monkeypatch)
    run_problem(problem, "cuda")
    size = problem.x.numel() * problem.x.element_size()
    forward, backward = ops.traffic["cbam_forward"], ops.traffic["cbam_backward"]
    report = ops.reports["cbam_forward"]
    searched = layout == "contiguous" and report["vector"] > 1 and report["fold"] == 1
    again = 16 * shape[0] * shape[1] if searched else 0
    assert forward["x"] == 3 * size + again and forward["y"] == size
    assert backward["x"] == 2 * size and backward["dy"] == 2 * size and backward["dx"] == size
    assert 4 * size + again + forward["scratch"] <= 4.1 * size
    assert 5 * size + backward["scratch"] <= bar * size


# The gates alone, as `masks` differentiates them: dy is zero, and one half of the block is missing.
MASK_OPTIONS = ("plain", "all-pools-split", "single-layer", "light", "mean-max")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MASK_OPTIONS)
@pytest.mark.parametrize("mask", ("channel", "spatial"))
def test_masks(monkeypatch, mask, name, layout):
    """A gate and every gradient of it against fp64; the reference's error is the larger of two orders of sums."""
    cs.HostOps(cs.Machine(l2=SMALL_L2)).installed(monkeypatch)
    for shape in ((3, 8, 8, 10), (4, 8, 7, 7)):
        problem = make_problem(shape, OPTIONS[name], layout=layout)
        got = _mask(mask, problem, "cuda")
        low = [_mask(mask, problem, "reference", reverse) for reverse in (False, True)]
        for what, exact in _mask(mask, problem.to(torch.float64), "reference").items():
            assert_within(f"{mask} {what}", got[what], exact, [results[what] for results in low])


def _mask(mask, problem, backend, reverse=False):
    """The gate, and its gradients by name; with `reverse` computed with all positions in reverse order."""
    flips = problem.flips(False, False, reverse)
    x, p, _ = leaves(problem.reordered(flips))
    if mask == "channel":
        gate, names = masks.channel_mask(x, p, problem.c, backend), ("w1", "b1", "w2", "b2")
    else:
        gate, names = masks.spatial_mask(x, p, problem.c, None, backend), ("conv_weight", "conv_bias")
        flips["gate"] = flips["x"]
    weights = torch.linspace(-1, 1, gate.numel(), dtype=torch.float64).reshape(gate.shape).to(gate.dtype)
    wanted = {"x": x, **{n: getattr(p, n) for n in names if getattr(p, n) is not None}}
    grads = torch.autograd.grad(gate, list(wanted.values()), weights.flip(flips.get("gate", ())))
    found = {"gate": gate.detach(), **dict(zip(wanted, grads))}
    return {name: t.flip(flips.get(name, ())) for name, t in found.items()}
