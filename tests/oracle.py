"""What every backend is measured against: the option grid, the fp64 reference, the error budget."""

from __future__ import annotations

import copy
import ctypes
import itertools
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from cbam_fused import _checks, _ops, backends
from cbam_fused._config import TIES_FIRST, Config, Parameters
from cbam_fused.functional import run
from cbam_fused.reference import cbam_reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NORM = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class Target(NamedTuple):
    """A backend and a device that it runs on here."""

    backend: str
    device: str


DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def processors() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_targets() -> Tuple[Target, ...]:
    """Every backend that this machine can run, with its device. Triton's interpreter has its own tests."""
    device = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}
    found = [Target("reference", d) for d in DEVICES]
    return (*found, *(Target(b, device[b]) for b, ok in backends().items() if ok is True and b in device))


TARGETS = available_targets()
FUSED = tuple(t for t in TARGETS if t.backend != "reference")


@dataclass(frozen=True)
class Options:
    """One point of the option grid. hidden 0 is a single layer; norm is None, "train" or "eval"."""

    pools: Optional[Tuple[str, ...]] = ("avg", "max")
    hidden: int = 5
    mlp_bias: bool = True
    spatial: bool = True
    kernel: int = 7
    conv_bias: bool = False
    norm: Optional[str] = None
    order: str = "max_mean"
    light: bool = False
    ties: str = "first"
    residual: bool = False

    def config(self) -> Config:
        return _checks.make_config(self.pools, self.spatial, self.order, self.light, self.ties, self.residual)


OPTIONS: Dict[str, Options] = {
    "plain": Options(),
    "norm-train": Options(norm="train"),
    "norm-eval": Options(norm="eval"),
    "residual": Options(residual=True),
    "residual-norm-train": Options(residual=True, norm="train"),
    "residual-norm-eval": Options(residual=True, norm="eval", conv_bias=True),
    "channel-only": Options(spatial=False),
    "channel-only-residual": Options(spatial=False, residual=True, pools=("avg",)),
    "spatial-only": Options(pools=None),
    "spatial-only-norm-train": Options(pools=None, norm="train", residual=True),
    "avg": Options(pools=("avg",), kernel=3),
    "max": Options(pools=("max",), kernel=3),
    "lp": Options(pools=("lp",), kernel=3),
    "lse": Options(pools=("lse",), kernel=3),
    "all-pools": Options(pools=("avg", "max", "lp", "lse")),
    "all-pools-norm-train": Options(pools=("avg", "max", "lp", "lse"), norm="train", kernel=3),
    "all-pools-split": Options(pools=("lse", "max", "lp", "avg"), ties="split", kernel=5),
    "single-layer": Options(pools=("avg",), hidden=0, order="mean_max"),
    "single-layer-max": Options(hidden=0, mlp_bias=False, kernel=1),
    "no-bias": Options(mlp_bias=False, hidden=1),
    "mean-max": Options(order="mean_max", conv_bias=True, kernel=5),
    "split": Options(ties="split"),
    "timm": Options(mlp_bias=False, order="mean_max", ties="split", norm="train"),
    "light": Options(light=True, kernel=3),
    "light-norm-eval": Options(light=True, ties="split", norm="eval", mlp_bias=False, residual=True),
    "light-norm-train": Options(light=True, norm="train", conv_bias=True),
    "channel-only-light": Options(light=True, spatial=False),
    "kernel-1": Options(kernel=1, conv_bias=True),
    "kernel-11": Options(kernel=11, norm="eval"),
}


def layout_of(x: Tensor, layout: str) -> Tensor:
    """A copy of x with the wanted strides: contiguous, channels_last, sliced or permuted."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        # The middle of a larger tensor: an odd storage offset, and every stride too large.
        big = x.new_full([s + 3 for s in x.shape], float("nan"))
        inner = big[tuple(slice(1, 1 + s) for s in x.shape)]
        return inner.copy_(x)
    if layout == "offset":
        # Contiguous, but one element past an aligned address.
        big = x.new_full((x.numel() + 1,), float("nan"))
        return big[1:].view(x.shape).copy_(x)
    if layout == "permuted":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    raise KeyError(layout)


@dataclass
class Problem:
    """One call: x, the learnt tensors, the options, a norm, and the gradient that comes in."""

    x: Tensor
    p: Parameters
    c: Config
    norm: Optional[nn.Module]
    dy: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        return Problem(
            self.x.to(dtype),
            Parameters(*(None if t is None else t.to(dtype) for t in self.p)),
            self.c,
            None if self.norm is None else copy.deepcopy(self.norm).to(dtype),
            self.dy.to(dtype),
        )

    def flips(self, samples: bool, channels: bool, positions: bool) -> Dict[str, Tuple[int, ...]]:
        """The dimensions of each tensor that run backwards where samples, channels or positions do."""
        dims = self.x.dim()
        c, p = (channels,), (positions,) * (dims - 2)
        rows = {
            "x": (samples, *c, *p),
            "w1": (False, *c),
            "w2": c if self.p.w1 is not None else c + c,
            "b2": c,
            "conv_weight": (False, False, *p),
        }
        return {name: tuple(i for i, flip in enumerate(flags) if flip) for name, flags in rows.items()}

    def reordered(self, flips: Dict[str, Tuple[int, ...]]) -> "Problem":
        """The same problem with some dimensions reversed: other orders of the same sums."""
        p = {n: t.flip(flips.get(n, ())) for n, t in zip(Parameters._fields, self.p) if t is not None}
        return replace(self, x=self.x.flip(flips["x"]), dy=self.dy.flip(flips["x"]), p=Parameters(**p))

    def shuffles(self, samples: Tensor, channels: Tensor) -> Dict[str, Dict[int, Tensor]]:
        """For each tensor, the permutation of each dimension that samples or channels run along."""
        single = self.p.w1 is None
        return {
            "x": {0: samples, 1: channels},
            "w1": {1: channels},
            "w2": {0: channels, 1: channels} if single else {0: channels},
            "b2": {0: channels},
        }

    def shuffled(self, shuffles: Dict[str, Dict[int, Tensor]]) -> "Problem":
        """The same problem with samples and channels permuted."""
        p = {n: permute(t, shuffles.get(n, {})) for n, t in zip(Parameters._fields, self.p) if t is not None}
        x, dy = (permute(t, shuffles["x"]) for t in (self.x, self.dy))
        return replace(self, x=x, dy=dy, p=Parameters(**p))

    def names(self) -> Tuple[str, ...]:
        """What `run` returns, in order."""
        found = ["y", "dx", *(f"d{n}" for n, t in zip(Parameters._fields, self.p) if t is not None)]
        if self.norm is not None:
            found += [f"dnorm.{n}" for n, _ in self.norm.named_parameters()]
            found += ["running_mean", "running_var"]
        return tuple(found)


def permute(t: Tensor, permutations: Dict[int, Tensor]) -> Tensor:
    for dim, order in permutations.items():
        t = t.index_select(dim, order.to(t.device))
    return t


def make_problem(
    shape: Tuple[int, ...],
    options: Options,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "contiguous",
    seed: int = 0,
    wide: bool = False,
) -> Problem:
    """Random values scaled to keep the gates away from 0 and 1. `wide`: float32 parameters."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
        return (torch.randn(*size, generator=g, dtype=torch.float64) * scale).to(dtype).to(device)

    c = options.config()
    weight_dtype = torch.float32 if wide else dtype
    channels, dims = shape[1], len(shape) - 2
    x = layout_of(normal(*shape, dtype=dtype), layout)
    fields: Dict[str, Optional[Tensor]] = dict.fromkeys(Parameters._fields)
    if c.pools:
        h = options.hidden or channels
        if options.hidden:
            fields["w1"] = normal(h, channels, scale=channels**-0.5, dtype=weight_dtype)
            if options.mlp_bias:
                fields["b1"] = normal(h, scale=0.3, dtype=weight_dtype)
        fields["w2"] = normal(channels, h, scale=h**-0.5, dtype=weight_dtype)
        if options.mlp_bias:
            fields["b2"] = normal(channels, scale=0.3, dtype=weight_dtype)
    norm = None
    if c.spatial:
        maps = 1 if options.light else 2
        taps = options.kernel**dims
        fields["conv_weight"] = normal(
            1, maps, *[options.kernel] * dims, scale=(maps * taps) ** -0.5, dtype=weight_dtype
        )
        if options.conv_bias:
            fields["conv_bias"] = normal(1, dtype=weight_dtype)
        if options.norm is not None:
            norm = NORM[len(shape)](1).to(device=device, dtype=weight_dtype)
            with torch.no_grad():
                norm.weight.fill_(0.75)
                norm.bias.fill_(-0.25)
                norm.running_mean.fill_(0.125)
                norm.running_var.fill_(1.5)
            norm.train(options.norm == "train")
    return Problem(x, Parameters(**fields), c, norm, normal(*shape, dtype=dtype))


def leaves(problem: Problem) -> Tuple[Tensor, Parameters, Optional[nn.Module]]:
    """x, parameters and norm as fresh leaves that want gradients; the strides of x are kept."""
    x = problem.x.detach().requires_grad_()
    p = Parameters(*(None if t is None else t.detach().clone().requires_grad_() for t in problem.p))
    return x, p, copy.deepcopy(problem.norm)


def run_problem(problem: Problem, backend: Optional[str]) -> Tuple[Tensor, ...]:
    """Output, every gradient and the running statistics, in the order of `names`.

    backend None is the specification itself, without the package's path around it.
    """
    x, p, norm = leaves(problem)
    y = cbam_reference(x, p, problem.c, norm) if backend is None else run(x, p, problem.c, norm, backend)
    wanted = [x, *(t for t in p if t is not None), *(norm.parameters() if norm is not None else ())]
    grads = torch.autograd.grad(y, wanted, problem.dy, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted)]
    found = [y.detach(), *grads]
    if norm is not None:
        found += [norm.running_mean, norm.running_var]
    return tuple(found)


# Sums over positions of the same dz; the single numbers among them are judged with the others, because
# the reference's error in one number can be nothing by luck, and so can the number (the gradient of a
# bias before a norm in training is zero).
SUMS_OF_DZ = ("dconv_weight", "dconv_bias", "dnorm.weight", "dnorm.bias")
# What the gradient of the channel gate's logits leads to. Its error is the error of all of them, each
# in relation to its size; some have three numbers, in which the reference can be lucky.
FROM_DLOGITS = ("dx", "dw1", "db1", "dw2", "db2")


# Reversals of samples, channels and positions: the reference's error in one order of sums may be luck.
ORDERS = tuple(itertools.product((False, True), repeat=3))[1:]


def first_counts(problem: Problem, ties: bool) -> bool:
    """Whether another order of channels or positions is another problem: the first of equal maxima moves."""
    return ties and problem.c.ties == TIES_FIRST


def reference_in_other_orders(problem: Problem, ties: bool) -> Iterator[Tuple[Tensor, ...]]:
    """Results of the reference with its sums in other orders, where the first maximum counts of samples alone."""
    for order in ((True, False, False),) if first_counts(problem, ties) else ORDERS:
        flips = problem.flips(*order)
        flips["y"] = flips["x"]
        results = zip(problem.names(), run_problem(problem.reordered(flips), "reference"))
        yield tuple(t.flip(flips.get(name.removeprefix("d"), ())) for name, t in results)


def reference_in_shuffled_orders(problem: Problem, ties: bool) -> Iterator[Tuple[Tensor, ...]]:
    """The same with samples and channels in eight random orders, in both layouts: convolutions add differently."""
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(n, generator=g) for n in problem.x.shape[:2]]
        if first_counts(problem, ties):
            orders[1] = torch.arange(problem.x.shape[1])
        back = problem.shuffles(*(torch.argsort(o) for o in orders))
        back["y"] = back["x"]
        shuffled = problem.shuffled(problem.shuffles(*orders))
        if seed % 2:
            other = "channels_last" if problem.x.is_contiguous() else "contiguous"
            shuffled = replace(shuffled, x=layout_of(shuffled.x, other), dy=layout_of(shuffled.dy, other))
        results = run_problem(shuffled, "reference")
        yield tuple(permute(t, back.get(n.removeprefix("d"), {})) for n, t in zip(problem.names(), results))


def reference_of_rounded_inputs(problem: Problem, ties: bool) -> Iterator[Tuple[Tensor, ...]]:
    """fp64 results with every input off by one epsilon of its dtype, up or down at random.

    What a backward stable algorithm may be off where sums cancel (Higham, Accuracy and Stability of
    Numerical Algorithms, 1.5): the exact result of a problem that rounding cannot tell from this one.
    With ties x stays as it is and a weight moves as a whole, up or down, or its maxima would move: over
    channels they are equal where the weights have equal rows.
    """
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)

        def off(t: Tensor, whole: bool = False) -> Tensor:
            signs = torch.randint(0, 2, () if whole else t.shape, generator=g).to(t.device) * 2 - 1
            return t.double() * (1 + torch.finfo(t.dtype).eps * signs)

        moved = replace(
            problem.to(torch.float64),
            x=problem.x.double() if ties else off(problem.x),
            p=Parameters(*(None if t is None else off(t, whole=ties) for t in problem.p)),
            dy=off(problem.dy),
        )
        yield run_problem(moved, None)


def reference_errors_scaled(
    problem: Problem, exact: Sequence[Tensor], ties: bool
) -> Iterator[Tuple[Tensor, ...]]:
    """fp64 results as far off as the reference's in fp32, times the ratio of both epsilons.

    Nothing here computes more precisely than fp64, but the same sums lose the same number of places. One
    order of sums may lose few by luck, and the fp64 values that are compared with are off as well: other
    orders count too.
    """
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    single = problem.to(torch.float32)
    # Rounded inputs are another problem; its own fp64 values are what fp32 is compared with.
    target = run_problem(single.to(torch.float64), None)
    low = run_problem(single, "reference")
    for found in (low, *reference_in_other_orders(single, ties), *reference_in_shuffled_orders(single, ties)):
        yield tuple(e + (f.double() - t) * ratio for e, f, t in zip(exact, found, target))


def budget(exact: Tensor, low: Sequence[Tensor], dtype: torch.dtype) -> float:
    """2 * (error of the reference in this precision + eps * max|ref|): what an honest kernel may be off."""
    # A tensor is a sequence too, of rows, which would broadcast against all of exact.
    assert all(t.shape == exact.shape for t in low), "low holds results of the shape of exact"
    if exact.numel() == 0:
        return 0.0
    error = max((t.double() - exact).abs().max().item() for t in low)
    assert math.isfinite(error), "the reference is not finite in its own precision: nothing would be checked"
    return 2 * (error + torch.finfo(dtype).eps * exact.abs().max().item())


def assert_within(
    name: str, got: Tensor, exact: Tensor, low: Sequence[Tensor], limit: Optional[float] = None
) -> None:
    """got is finite, has the reference's shape and dtype, and lies within the budget of fp64 values."""
    assert got.shape == exact.shape, f"{name} has shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == low[0].dtype, f"{name} has dtype {got.dtype}, expected {low[0].dtype}"
    assert torch.isfinite(exact).all(), f"{name}: the reference is not finite, nothing would be checked"
    assert torch.isfinite(got).all(), f"{name} has {(~torch.isfinite(got)).sum()} values that are not finite"
    if exact.numel():
        error = (got.double() - exact).abs().max().item()
        limit = budget(exact, low, got.dtype) if limit is None else limit
        assert error <= limit, f"{name} is off by {error:.3e}, the budget is {limit:.3e}"


def _limits(rows: Dict[str, List], families: bool) -> Dict[str, float]:
    """The budget of each result: its own, or with `families` that of what it shares its sums with."""
    limits = {name: budget(exact, low, got.dtype) for name, (got, exact, low) in rows.items()}
    sizes = {name: exact.abs().max().item() if exact.numel() else 0.0 for name, (_, exact, _) in rows.items()}
    of_dz = [limits[name] for name in rows if name in SUMS_OF_DZ]
    # Not of those that are noise: where a gate is saturated, fewer than half of the places are left of some, or of
    # 16 bits fewer than all but three.
    trusted = [0.0]
    for name, (got, *_) in rows.items():
        eps = torch.finfo(got.dtype).eps
        half = max(8 * eps, min(eps, torch.finfo(torch.float32).eps) ** 0.5)
        if name in FROM_DLOGITS and 0 < sizes[name] and limits[name] <= half * sizes[name]:
            trusted.append(limits[name] / sizes[name])
    for name, (got, *_) in rows.items():
        if name in SUMS_OF_DZ and (families or got.numel() == 1):
            limits[name] = max(of_dz)
        elif name in FROM_DLOGITS and families:
            limits[name] = max(limits[name], max(trusted) * sizes[name])
    return limits


def _compare(
    problem: Problem, got: Sequence, exact: Sequence, low: Sequence, families: bool, slack: float = 1.0
) -> None:
    rows = {name: values for name, *values in zip(problem.names(), got, exact, zip(*low))}
    limits = _limits(rows, families)
    for name, values in rows.items():
        assert_within(name, *values, slack * limits[name])


def references(problem: Problem, exact: Sequence, ties: bool) -> Iterator[Tuple[Tensor, ...]]:
    """The reference in the dtype of x; and what else an honest computation may find."""
    dtype = problem.x.dtype
    yield run_problem(problem, "reference")
    yield from reference_of_rounded_inputs(problem, ties)
    if dtype.itemsize > 2:
        yield from reference_in_other_orders(problem, ties)
        yield from reference_in_shuffled_orders(problem, ties)
    if dtype == torch.float64:
        yield from reference_errors_scaled(problem, exact, ties)


def single_references(
    problem: Problem, got: Sequence, exact: Sequence, ties: bool
) -> Iterator[Tuple[Tensor, ...]]:
    """What sums in float32 and one rounding at the end make of a problem in 16 bits: what the kernels promise.

    The reference in 16 bits rounds what it takes maxima of: they move, and dx is then off by its own size.
    A norm of 16 bits is torch's, and its running statistics are what the reference has; those of a float32 norm
    are the kernels' sums, as everything else.
    """
    own = run_problem(problem, "reference")
    for results in references(problem.to(torch.float32), exact, ties):
        rows = zip(problem.names(), results, own, got)
        yield tuple(
            o if name.startswith("running") and t.dtype == problem.x.dtype else r.to(t.dtype)
            for name, r, o, t in rows
        )


def check(
    problem: Problem,
    backend: str,
    dy: Optional[Tensor] = None,
    ties: bool = False,
    searched: bool = False,
    got: Optional[Sequence[Tensor]] = None,
) -> None:
    """Runs the backend and checks the output and every gradient against the reference in fp64.

    ties: x has equal maxima: where the first counts, no other order of channels or positions is the same
    problem. In fp64 there is no higher precision to measure the reference's error with: there it is what
    other orders make of it, and what fp32 makes of it in proportion, in each order; and half as much again,
    as the values that it is compared with are off by as much. In 16 bits it is what fp32 makes of it,
    rounded at the end.
    searched: the problem is one of hundreds that were drawn to find the worst; twice the budget.
    got: results that take the place of the backend's.
    """
    if dy is not None:
        problem = replace(problem, dy=dy)
    dtype = problem.x.dtype
    slack = 2.0 if searched else 1.5 if dtype == torch.float64 else 1.0
    exact = run_problem(problem.to(torch.float64), None)
    got = run_problem(problem, backend) if got is None else got
    if dtype.itemsize == 2 and backend != "reference":
        others = single_references(problem, got, exact, ties)
    else:
        others = references(problem, exact, ties)
    low = [next(others)]
    try:
        _compare(problem, got, exact, low, families=False)
    except AssertionError:
        low += others
        _compare(problem, got, exact, low, families=True, slack=slack)


# The pools along the last dimension.
POOLS = {
    "avg": lambda x: x.mean(-1),
    "max": lambda x: x.amax(-1),
    "lp": lambda x: x.norm(dim=-1),
    "lse": lambda x: x.logsumexp(-1),
}
SUMS = ("avg", "lp", "lse")


def pools_of(x: Tensor, backend: str, pools: Tuple[str, ...]) -> Tuple[Tensor, Tensor]:
    """(pooled (N, K, C), index of the maximum (N, C)) as the backend computes them."""
    bits = Options(pools=pools).config().pools
    w2 = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    found = _ops.get(backend, "attention_forward")(x, None, None, w2, None, None, None, bits, 0, 0, True)
    return found[1], found[2]


def check_sum_over_a_map(pool: str, side: int, layout: str, backend: str, device: str = "cpu") -> None:
    """A pool of side x side equal numbers and a larger one: every addition errs in the same direction, so that the
    running sums of old were off by 5e-6 and more from a side of 640 on, before the root of lp and the log of lse."""
    x = torch.full((1, 2, side, side), 0.1)
    x[..., 0, 0] = 1.0
    got = pools_of(layout_of(x, layout).to(device), backend, (pool,))[0][:, 0].double().cpu()
    want = POOLS[pool](x.double().flatten(2))
    if pool == "lse":
        # A sum's relative error is its logarithm's absolute one; half a unit of float32's last place is 5e-7 of it.
        torch.testing.assert_close(got, want, rtol=0, atol=3e-6)
    else:
        torch.testing.assert_close(got, want, rtol=2e-6, atol=0)


def check_hostile_numbers_in_a_map(side: int, layout: str, backend: str, device: str = "cpu") -> None:
    """What is not finite, and equal maxima, in maps whose sums join: all pools, and the first maximum's index."""
    last = side * side - 1
    x = torch.randn(1, 8, side * side)
    x[0, 0] += 100  # exp of it overflows
    x[0, 0, last] = math.inf
    x[0, 1] *= 30
    x[0, 1, last] = math.inf
    x[0, 2, last // 2] = x[0, 2, last] = math.nan
    x[0, 3] = -math.inf
    x[0, 4, last // 3] = x[0, 4, last - 1] = 9.0
    x[0, 5, 5], x[0, 5, last] = math.inf, -math.inf
    x[0, 6] = -1e4
    x[0, 6, last] = -9e3
    x[0, 7, 0] = -math.inf
    got, index = pools_of(layout_of(x.view(1, 8, side, side), layout).to(device), backend, tuple(POOLS))
    want = torch.stack([pool(x.double()) for pool in POOLS.values()], 1)
    torch.testing.assert_close(got.double().cpu(), want, rtol=2e-6, atol=1e-6, equal_nan=True)
    assert index[0].tolist() == [last, last, last // 2, 0, last // 3, 5, last, int(x[0, 7].argmax())]


def _perturb(byte: int) -> None:
    """glibc's malloc fills what it hands out with ~byte; 0 turns that off."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-6, byte)  # M_PERTURB


@contextmanager
def poisoned_allocations(device: str = "cpu"):
    """Memory that nobody wrote holds NaN, or at the least values too large to go unseen.

    ATen fills its own `empty` with NaN in deterministic mode, also when a C++ kernel asks for it.
    Scratch from malloc gets 0xfe bytes (about -1.7e38 in float32, NaN in float16), but for what glibc has in its
    cache of a thread's small blocks. The CPU kernels keep a thread's scratch: test_ops.py has calls of new threads.
    On CUDA the caching allocator is left with freed blocks full of NaN.
    """
    if device != "cpu":
        # All at once, or each would take the block that the one before left.
        held = [
            torch.full((n,), float("nan"), device=device) for n in (1 << 26, *[1 << 17] * 16, *[1 << 8] * 64)
        ]
        del held
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    _perturb(0x01)
    try:
        yield
    finally:
        _perturb(0)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before)
