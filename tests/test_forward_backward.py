"""Output and every gradient of every backend, against the reference in fp64."""

import dataclasses
import math

import pytest
import torch
from oracle import (
    DTYPES,
    FUSED,
    OPTIONS,
    SUMS,
    Options,
    check,
    check_hostile_numbers_in_a_map,
    check_sum_over_a_map,
    layout_of,
    leaves,
    make_problem,
    run_problem,
)

from benchmarks.measure import last_level_cache
from cbam_fused.functional import run

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [
    (1, 1, 1),
    (1, 1, 1, 1),
    (2, 3, 7, 7),
    (1, 16, 1, 49),
    (3, 65, 7, 7),
    (2, 257, 7, 7),
    (1, 16, 13, 57),
    (2, 3, 63, 5),
    (1, 3, 1, 127),
    (2, 16, 127),
    (2, 65, 7),
    (1, 3, 7, 1, 9),
    (2, 16, 3, 7, 5),
    (5, 17, 14, 14),
]
BIG = [
    (2, 3, 127, 63),
    (1, 65, 49, 63),
    (9, 257, 7, 7),
    (1, 1, 127, 127),
    (3, 16, 56, 56),
    (1, 512, 14, 14),
    (1, 300, 47, 61),
    (70, 130, 3, 5),
]


def _id(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


@pytest.mark.parametrize("shape", SHAPES, ids=_id)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_option_grid(target, options, shape):
    for layout in ("contiguous", "channels_last"):
        problem = make_problem(shape, options, device=target.device, layout=layout)
        if options.norm == "train" and shape[0] * math.prod(shape[2:]) == 1:
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                run_problem(problem, target.backend)
        else:
            check(problem, target.backend)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=_id)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_dtypes(target, options, dtype):
    for shape in ((2, 16, 7, 7), (1, 65, 9, 31), (2, 24, 14, 16)):
        for layout in ("contiguous", "channels_last"):
            check(make_problem(shape, options, dtype, target.device, layout), target.backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_id)
@pytest.mark.parametrize("name", ["plain", "norm-train", "norm-eval", "all-pools", "light-norm-train"])
def test_float32_parameters_beside_16_bit_input(target, name, dtype):
    for layout in ("contiguous", "channels_last"):
        problem = make_problem((3, 33, 7, 9), OPTIONS[name], dtype, target.device, layout, wide=True)
        check(problem, target.backend)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("side", [128, 256, 320, 640])
def test_sums_over_many_equal_numbers(fused, side, layout):
    """Every addition errs in the same direction: one running sum would be off by far more than the reference."""
    problem = make_problem((1, 16, side, side), Options(), torch.float32, fused.device, layout)
    problem.x.fill_(0.1)
    check(problem, fused.backend, ties=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pool", SUMS)
def test_pools_of_a_very_large_map(fused, pool, layout):
    check_sum_over_a_map(pool, 2048, layout, fused.backend, fused.device)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_hostile_numbers_in_a_large_map(fused, layout):
    check_hostile_numbers_in_a_map(400, layout, fused.backend, fused.device)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", BIG, ids=_id)
def test_large(fused, shape, layout):
    for dtype in (torch.float32, torch.bfloat16):
        check(make_problem(shape, Options(norm="eval"), dtype, fused.device, layout), fused.backend)
    check(make_problem(shape, Options(norm="train"), torch.float32, fused.device, layout), fused.backend)


@pytest.mark.parametrize("layout", ["sliced", "offset", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
def test_strides_of_x(target, layout, dtype):
    for shape in ((3, 16, 7, 7), (2, 5, 13, 8)):
        for name in ("plain", "norm-train", "residual"):
            check(make_problem(shape, OPTIONS[name], dtype, target.device, layout), target.backend)


def test_output_has_the_layout_of_x(fused):
    for layout in ("contiguous", "channels_last"):
        problem = make_problem((2, 16, 5, 7), Options(), device=fused.device, layout=layout)
        y, dx, *_ = run_problem(problem, fused.backend)
        assert y.stride() == problem.x.stride()
        assert dx.stride() == problem.x.stride()


@pytest.mark.parametrize("name", ["plain", "norm-train", "norm-eval", "residual-norm-train", "channel-only"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_strides_of_dy(target, name, layout):
    problem = make_problem((2, 6, 7, 9), OPTIONS[name], device=target.device, layout=layout)
    ones = problem.x.new_ones(())
    gradients = {
        "expanded scalar": ones.expand(problem.x.shape),
        "expanded over positions": problem.dy[..., :1, :1].expand(problem.x.shape),
        "expanded over the batch": problem.dy[:1].expand(problem.x.shape),
        "sliced": layout_of(problem.dy, "sliced"),
        "offset": layout_of(problem.dy, "offset"),
        "permuted": layout_of(problem.dy, "permuted"),
        "other layout": layout_of(problem.dy, "contiguous" if layout != "contiguous" else "channels_last"),
    }
    for kind, dy in gradients.items():
        try:
            check(problem, target.backend, dy)
        except AssertionError as error:
            raise AssertionError(f"dy {kind}: {error}") from None


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 5, 7])
def test_threads(fused, threads, count, batch):
    threads(count)
    for name in ("plain", "norm-train", "all-pools", "split"):
        for layout in ("contiguous", "channels_last"):
            for shape in ((batch, 19, 14, 14), (batch, 130, 7, 7), (batch, 3, 61, 67)):
                check(make_problem(shape, OPTIONS[name], device=fused.device, layout=layout), fused.backend)


# Channels and positions in several chunks, the last one short; in fewer chunks than threads; a map that ends within
# a vector, and one of several tiles, in backward where samples are few. Batches that go through the MLP in groups, and others; channels for which its
# matrices are taken by strips. Outputs that bypass the caches with one thread, and not with four.
@pytest.mark.parametrize(
    "shape",
    [
        (1, 130, 14, 14),
        (1, 300, 7, 9),
        (1, 19, 30, 31),
        (1, 257, 61, 67),
        (1, 300, 30, 31),
        (3, 300, 30, 31),
        (5, 300, 7, 9),
        (8, 700, 3, 5),
        (9, 1100, 2, 3),
        (9, 512, 14, 14),
    ],
    ids=_id,
)
@pytest.mark.parametrize(
    "name", ["plain", "norm-train", "norm-eval", "all-pools", "split", "channel-only", "light"]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.skipif(all(t.backend != "cpu" for t in FUSED), reason="the CPU kernels are not built")
def test_any_number_of_threads_gives_the_same_bits(threads, layout, name, shape):
    """However many samples go through the MLP together, and whichever thread comes first."""
    check_threads(make_problem(shape, OPTIONS[name], torch.float32, layout=layout), threads)


@pytest.mark.parametrize("shape", [(1, 130, 14, 14), (1, 300, 24, 25), (3, 70, 9, 11)], ids=_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=_id)
@pytest.mark.parametrize("name", ["plain", "norm-train", "split"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.skipif(all(t.backend != "cpu" for t in FUSED), reason="the CPU kernels are not built")
def test_any_number_of_threads_in_other_dtypes(threads, layout, name, dtype, shape):
    """In float64 a product that is rounded on one way and not on the other makes other bits."""
    check_threads(make_problem(shape, OPTIONS[name], dtype, layout=layout), threads)


def check_threads(problem, threads):
    threads(1)
    alone = run_problem(problem, "cpu")
    for count in (2, 3, 4):
        threads(count)
        for got, want in zip(run_problem(problem, "cpu"), alone, strict=True):
            assert got is want is None or torch.equal(got, want)


# Rounds of samples: one and several, and a sample that is left over or none.
@pytest.mark.parametrize("shape", [(9, 2300, 2, 3), (13, 2300, 9, 9), (12, 2300, 7, 7)], ids=_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
@pytest.mark.parametrize("name", ["plain", "norm-train", "light", "single-layer-max", "no-bias", "all-pools"])
@pytest.mark.skipif(all(t.backend != "cpu" for t in FUSED), reason="the CPU kernels are not built")
def test_threads_that_share_the_mlp(threads, name, dtype, shape):
    """Matrices that fill a second-level cache (schedule.h): the same bits as one thread, which are right."""
    options = OPTIONS[name]
    if options.hidden:
        options = dataclasses.replace(options, hidden=480)
    matrices = shape[1] * (2 * options.hidden or shape[1]) * dtype.itemsize
    assert matrices >= 4 << 20  # the largest second-level cache that a core of x86-64 has
    problem = make_problem(shape, options, dtype)
    check_threads(problem, threads)
    if shape[0] == 9:
        check(problem, "cpu")


@pytest.mark.parametrize(
    "shape", [(7, 300, 7, 9), (3, 257, 61, 67), (3, 300, 30, 31), (18, 24, 14, 14), (20, 1100, 2, 3)], ids=_id
)
@pytest.mark.parametrize("name", ["plain", "norm-eval", "all-pools", "split", "light"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.skipif(all(t.backend != "cpu" for t in FUSED), reason="the CPU kernels are not built")
def test_a_sample_does_not_depend_on_its_batch(layout, name, shape):
    """Bit for bit, y and dx; but for a norm in training, which is over the batch."""
    problem = make_problem(shape, OPTIONS[name], torch.float32, layout=layout)
    whole = run_problem(problem, "cpu")[:2]
    for n in range(shape[0]):
        one = dataclasses.replace(problem, x=problem.x[n : n + 1], dy=problem.dy[n : n + 1])
        for got, of_batch in zip(run_problem(one, "cpu")[:2], whole, strict=True):
            assert torch.equal(got[0], of_batch[n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
@pytest.mark.parametrize("shape", [(64, 14, 14), (256, 7, 7), (64, 64, 80)], ids=_id)
@pytest.mark.skipif(all(t.backend != "cpu" for t in FUSED), reason="the CPU kernels are not built")
def test_outputs_that_bypass_the_caches(shape, dtype):
    """A batch too large for the caches takes other stores, to the same bits as its samples."""
    share = min(last_level_cache(), max(32, 4 * torch.get_num_threads()) << 20)  # as caches.h has it
    enough = share // (2 * math.prod(shape) * dtype.itemsize)
    samples = -(-enough // 16) * 16
    if samples * math.prod(shape) * dtype.itemsize > 256 << 20:
        pytest.skip("the last-level cache is too large to be filled in a test")
    for layout in ("contiguous", "channels_last"):
        problem = make_problem((samples, *shape), Options(), dtype, layout=layout)
        whole = run_problem(problem, "cpu")[:2]
        assert problem.x.nbytes > share // 3 > 2 << 20 > problem.x[:1].nbytes
        parts = [
            run_problem(dataclasses.replace(problem, x=x, dy=dy), "cpu")[:2]
            for x, dy in zip(problem.x.split(1), problem.dy.split(1))
        ]
        for got, of_parts in zip(whole, zip(*parts)):
            assert torch.equal(got, torch.cat(of_parts))


OTHER_RULE = {"first": "split", "split": "first"}


@pytest.mark.parametrize("ties", ["first", "split"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_ties(target, ties, layout, dtype):
    """Few distinct values, and one gate for all channels, so that both maxima are attained many times."""
    for norm in (None, "train"):
        problem = make_problem((3, 16, 7, 9), Options(ties=ties, norm=norm), dtype, target.device, layout)
        problem.x.copy_(problem.x.sign() + 1)
        problem.p.w2.copy_(problem.p.w2[:1].expand_as(problem.p.w2))
        problem.p.b2.fill_(0.5)
        assert problem.x.amax((2, 3)).eq(2).all() and (problem.x == 2).sum() > 3 * problem.x.shape[1] * 8
        check(problem, target.backend, ties=True)
        other = dataclasses.replace(problem, c=Options(ties=OTHER_RULE[ties], norm=norm).config())
        # That the budget tells the rules apart: exact results, rounded once, of this one and of the other.
        right, wrong = (
            [t.to(dtype) for t in run_problem(p.to(torch.float64), None)] for p in (problem, other)
        )
        check(problem, "cpu", ties=True, got=right)
        with pytest.raises(AssertionError, match="^d.* is off by"):
            check(problem, "cpu", ties=True, got=wrong)


@pytest.mark.parametrize("ties", ["first", "split"])
def test_constant_input(target, ties):
    """Every element is a maximum: a zero map, as after a dead ReLU."""
    for value in (0.0, -3.0):
        problem = make_problem((2, 8, 5, 7), Options(ties=ties, norm="eval"), device=target.device)
        problem.x.fill_(value)
        check(problem, target.backend, ties=True)


SPECIAL = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


def _kinds(t):
    """0 finite, 1 NaN, 2 +inf, 3 -inf"""
    return t.isnan() * 1 + t.isposinf() * 2 + t.isneginf() * 3


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", SPECIAL.values(), ids=SPECIAL.keys())
@pytest.mark.parametrize(
    "name",
    ["plain", "norm-eval", "norm-train", "channel-only", "spatial-only", "all-pools", "light", "residual"],
)
def test_nan_and_infinity_go_where_the_reference_sends_them(target, name, value, layout):
    seen = set()
    for seed in range(6):
        problem = make_problem((4, 6, 9, 11), OPTIONS[name], device=target.device, layout=layout, seed=seed)
        problem.x[1, seed, 4, 5] = value
        if seed == 5:
            problem.x[1, 2, 0, 10] = -value
        want = run_problem(problem, None)
        got = run_problem(problem, target.backend)
        seen.update(_kinds(want[0]).unique().tolist())
        for what, ours, theirs in zip(problem.names(), got, want, strict=True):
            assert torch.equal(_kinds(ours), _kinds(theirs)), f"{what} differs for seed {seed}"
            finite = theirs.isfinite()
            if finite.any():
                size = theirs[finite].abs().max().item()
                torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-5, atol=1e-5 * size)
    assert seen & {1, 2, 3}, "the special value left no trace: nothing was tested"


def test_nan_stays_in_its_sample(target):
    for name in ("plain", "norm-eval", "all-pools"):
        problem = make_problem((4, 6, 9, 11), OPTIONS[name], device=target.device)
        problem.x[1, 2, 3, 4] = float("nan")
        y, dx, *_ = run_problem(problem, target.backend)
        for t in (y, dx):
            assert t[1].isnan().all()
            assert t[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_bitwise_the_same_from_run_to_run(target, options, layout):
    problem = make_problem((5, 40, 14, 15), options, device=target.device, layout=layout)
    first = run_problem(problem, target.backend)
    for _ in range(3):
        for name, a, b in zip(problem.names(), first, run_problem(problem, target.backend)):
            assert torch.equal(a, b), f"{name} differs between runs"


@pytest.mark.parametrize("name", ["plain", "norm-eval", "channel-only", "all-pools", "residual"])
def test_forward_does_not_depend_on_the_place_in_the_batch(fused, name):
    for layout in ("contiguous", "channels_last"):
        problem = make_problem((6, 40, 14, 15), OPTIONS[name], device=fused.device, layout=layout)
        order = torch.tensor([3, 5, 0, 4, 1, 2], device=fused.device)
        y, dx, *_ = run_problem(problem, fused.backend)
        problem.x, problem.dy = layout_of(problem.x[order], layout), problem.dy[order]
        moved_y, moved_dx, *_ = run_problem(problem, fused.backend)
        assert torch.equal(moved_y, y[order])
        assert torch.equal(moved_dx, dx[order])


@pytest.mark.parametrize("shape", [(3, 24, 11, 9), (1, 40, 28, 24)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_without_gradients_the_output_is_the_same(target, options, dtype, layout, shape):
    """Inference and training take different paths to the same bits."""
    problem = make_problem(shape, options, dtype, target.device, layout)
    y, *_ = run_problem(problem, target.backend)
    x, p, norm = leaves(problem)
    with torch.no_grad():
        again = run(x, p, problem.c, norm, target.backend)
    assert torch.equal(y, again)
    with torch.inference_mode():
        x, p, norm = leaves(problem)
        assert torch.equal(y, run(x, p, problem.c, norm, target.backend))


def test_poison_reaches_fresh_tensors():
    """The fixture above does what it says, also for what C++ allocates through the dispatcher."""
    for dtype in DTYPES:
        assert torch.empty(1000, dtype=dtype).isnan().all()
        assert torch.empty_like(torch.ones(3, 5, dtype=dtype)).isnan().all()
        assert torch.ones(2, dtype=dtype).new_empty(7).isnan().all()
