"""Properties over drawn shapes, strides, dtypes and options."""

from dataclasses import replace

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import DTYPES, FUSED, TARGETS, Options, check, make_problem, run_problem

from cbam_fused._ops import accumulate_dtype

settings.register_profile(
    "cbam_fused",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("cbam_fused")

LAYOUTS = ("contiguous", "channels_last", "sliced", "offset", "permuted")
POOLS = ("avg", "max", "lp", "lse")


@st.composite
def option_sets(draw) -> Options:
    light = draw(st.booleans())
    pools = st.lists(st.sampled_from(POOLS), min_size=1, max_size=4, unique=True).map(tuple)
    return Options(
        pools=("avg", "max") if light else draw(st.one_of(st.none(), pools)),
        hidden=draw(st.integers(0, 9)),
        mlp_bias=draw(st.booleans()),
        spatial=True if light else draw(st.booleans()),
        kernel=draw(st.sampled_from((1, 3, 5, 7, 9))),
        conv_bias=draw(st.booleans()),
        norm=draw(st.sampled_from((None, "train", "eval"))),
        order=draw(st.sampled_from(("max_mean", "mean_max"))),
        light=light,
        ties=draw(st.sampled_from(("first", "split"))),
        residual=draw(st.booleans()),
    )


@st.composite
def shapes(draw):
    dims = draw(st.integers(1, 3))
    largest = {1: 150, 2: 24, 3: 8}[dims]
    return (
        draw(st.integers(1, 5)),
        draw(st.integers(1, 70)),
        *(draw(st.integers(1, largest)) for _ in range(dims)),
    )


@st.composite
def problems(draw, dtypes=DTYPES):
    options = draw(option_sets())
    if options.pools is None and not options.spatial:
        options = Options(spatial=False)
    shape = draw(shapes())
    if options.norm == "train" and shape[0] * torch.Size(shape[2:]).numel() < 16:
        # The gradient through a variance over a few values is a difference of nearly equal numbers, in
        # which the rounding of the logits shows; test_gradcheck has those shapes in fp64.
        shape = (16, *shape[1:])
    dtype = draw(st.sampled_from(dtypes))
    wide = dtype in (torch.bfloat16, torch.float16) and draw(st.booleans())
    return dict(
        shape=shape,
        options=options,
        dtype=dtype,
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**16)),
        wide=wide,
    )


@given(arguments=problems(), at=st.integers(0, 7))
@settings(max_examples=250)
def test_within_budget(arguments, at):
    target = (FUSED or TARGETS)[at % len(FUSED or TARGETS)]
    check(make_problem(device=target.device, **arguments), target.backend, searched=True)


@given(
    arguments=problems(dtypes=(torch.float32,)), at=st.integers(0, 7), value=st.sampled_from([0.5, 1.0, 3.0])
)
@settings(max_examples=80)
def test_ties_of_drawn_values(arguments, at, value):
    """Values from a set of three, so that most maxima are attained more than once."""
    target = (FUSED or TARGETS)[at % len(FUSED or TARGETS)]
    if arguments["options"].norm == "train":
        # Few distinct logits have a variance near zero, through which rounding is magnified without
        # bound; test_ties of test_forward_backward has ties under a norm in training.
        arguments["options"] = replace(arguments["options"], norm="eval")
    problem = make_problem(device=target.device, **arguments)
    problem.x.copy_((problem.x * value).round().clamp(-1, 1))
    if problem.p.w2 is not None:
        # One gate for every channel, or ties over channels would depend on the last bit of a product.
        problem.p.w2.copy_(problem.p.w2[:1].expand_as(problem.p.w2).clone())
        if problem.p.b2 is not None:
            problem.p.b2.fill_(0.25)
    assume(all(t.isfinite().all() for t in run_problem(problem.to(torch.float64), None)))
    check(problem, target.backend, ties=True, searched=True)


@given(arguments=problems(dtypes=(torch.float32, torch.bfloat16)), at=st.integers(0, 7))
@settings(max_examples=60)
def test_gates_shrink_the_input(arguments, at):
    """|y| <= |x| without the residual, with the sign of x; bitwise the same from run to run."""
    target = (FUSED or TARGETS)[at % len(FUSED or TARGETS)]
    assume(not arguments["options"].residual)
    problem = make_problem(device=target.device, **arguments)
    y, *rest = run_problem(problem, target.backend)
    again, *others = run_problem(problem, target.backend)
    assert torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(rest, others))
    assert (y.abs() <= problem.x.abs()).all()
    assert (y.to(accumulate_dtype(y.dtype)) * problem.x >= 0).all()
