"""The correctness gate: every candidate against the specification in fp64, before any of them is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import EPS, Candidate, gradients
from benchmarks.shapes import DTYPES, LAYOUTS, Case
from cbam_fused._config import Config, Parameters
from cbam_fused.reference import cbam_reference, channel_gate_reference

# Above this many elements the fp64 graph of the reference no longer fits a small machine.
MAX_ELEMENTS = 2**26
_STATISTICS = ("bn_mean", "bn_var")


class RedGate(Exception):
    """A candidate's numbers are wrong; nothing about its speed may be reported."""


@dataclass(frozen=True)
class Verdict:
    """The output that came nearest to its tolerance. `share` is error / tolerance; above 1 is red."""

    name: str
    error: float
    tolerance: float

    @property
    def share(self) -> float:
        return self.error / self.tolerance if self.tolerance > 0 else float(self.error > 0)

    @property
    def green(self) -> bool:
        return self.share <= 1  # False for NaN

    def __str__(self) -> str:
        return f"{self.name} is off by {self.error:.3g}, tolerance {self.tolerance:.3g}"


def make_inputs(case: Case, weights: Dict[str, Tensor]) -> Tuple[Tensor, Tensor]:
    """Seeded x and dy (N, C, H, W). Which of two almost equal gated values is the maximum depends on
    the last bit of any implementation, and the gradient jumps with it, so such pairs are parted."""
    g = torch.Generator().manual_seed(2)
    shape, dtype = case.full_shape, DTYPES[case.dtype]
    x, dy = (torch.randn(shape, generator=g).to(device=case.device, dtype=dtype) for _ in range(2))
    if case.mode == "train":
        p, c = _parameters(weights, torch.float64), Config()
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        for i in range(case.batch):
            for _ in range(4):
                row = x[i : i + 1].double()
                gated = row * channel_gate_reference(row, p, c)[:, :, None, None]
                if case.shape[0] < 2:
                    break
                top = gated.topk(2, dim=1)  # (1, 2, H, W)
                gap = top.values[:, 0] - top.values[:, 1]
                close = (gap <= 64 * eps * top.values[:, 0].abs()).unsqueeze(1)
                if not close.any():
                    break
                second = top.indices[:, 1:]
                part = torch.zeros_like(close).expand_as(row).clone().scatter_(1, second, close)
                x[i : i + 1] -= (part * (0.25 * row.abs() + 0.25)).to(dtype)
    layout = LAYOUTS[case.layout]
    return x.contiguous(memory_format=layout), dy.contiguous(memory_format=layout)


def _parameters(weights: Dict[str, Tensor], dtype: torch.dtype) -> Parameters:
    return Parameters(*(weights[k].to(dtype) for k in ("w1", "b1", "w2", "b2", "conv")))


def reference(
    case: Case, weights: Dict[str, Tensor], x: Tensor, dy: Tensor, dtype: torch.dtype
) -> Dict[str, Tensor]:
    """y, and in training dx and every parameter gradient, of the specification computed in `dtype`."""
    train = case.mode == "train"
    leaves = {
        k: t.detach().to(dtype).requires_grad_(train and k not in _STATISTICS) for k, t in weights.items()
    }
    x = x.detach().to(dtype).requires_grad_(train)
    norm = None
    if case.norm:

        def norm(z: Tensor) -> Tensor:
            mean, var = leaves["bn_mean"].clone(), leaves["bn_var"].clone()
            return F.batch_norm(z, mean, var, leaves["bn_weight"], leaves["bn_bias"], train, 0.1, EPS)

    with torch.set_grad_enabled(train):
        y = cbam_reference(x, _parameters(leaves, dtype), Config(), norm)
    found = {"y": y.detach()}
    if train:
        y.backward(dy.to(dtype))
        found["dx"] = x.grad
        found.update((f"d{k}", t.grad) for k, t in leaves.items() if t.requires_grad)
    return found


def run_candidate(
    case: Case, candidate: Candidate, weights: Dict[str, Tensor], x: Tensor, dy: Tensor
) -> Dict[str, Tensor]:
    """The same outputs, from a candidate."""
    train = case.mode == "train"
    leaf = x.detach().requires_grad_(train)
    with torch.set_grad_enabled(train):
        y = candidate.module(leaf)
    found = {"y": y.detach()}
    if train:
        y.backward(dy)
        found["dx"] = leaf.grad
        found.update((f"d{k}", t) for k, t in gradients(candidate.provider, candidate.owner, weights).items())
        candidate.owner.zero_grad(set_to_none=True)
    return found


def _reordered(case: Case, weights: Dict[str, Tensor], x: Tensor, dy: Tensor, seed: int) -> Dict[str, Tensor]:
    """`reference` in the case's dtype, its sums taken in another order: samples, channels and hidden
    units permuted, the maps mirrored. The outputs come back in the usual order."""
    g = torch.Generator().manual_seed(seed)
    n, c, h = (
        torch.randperm(size, generator=g).to(x.device) for size in (*x.shape[:2], weights["w1"].shape[0])
    )
    axes = ((2,), (3,), (2, 3))[seed % 3]
    # For each dimension of a tensor that is permuted, by which permutation.
    orders = {"x": (n, c), "dy": (n, c), "w1": (h, c), "b1": (h,), "w2": (c, h), "b2": (c,)}
    mirrored = ("x", "dy", "conv")

    def move(name: str, t: Tensor, back: bool = False) -> Tensor:
        for dim, order in enumerate(orders.get(name, ())):
            t = t.index_select(dim, torch.argsort(order) if back else order)
        return t.flip(axes) if name in mirrored else t

    moved = {k: move(k, t) for k, t in weights.items()}
    found = reference(case, moved, move("x", x), move("dy", dy), DTYPES[case.dtype])
    return {k: move("x" if k == "y" else k[1:], t, back=True) for k, t in found.items()}


class Gate:
    """Both references of a case, held while its candidates are checked.

    The tolerance is derived: twice the error of the reference in the candidates' own dtype, plus one
    eps of that dtype at the largest value; errors are largest absolute differences to fp64. A sum can
    come out ten times more exact in one order than in another, by luck, so that error is the worst
    over `ORDERS` orders of summation. (Not for 16-bit data, which has equal maxima within a map, whose
    first index depends on the order, and whose rounding outweighs any luck.) The parameter gradients
    share the worst relative error among them: they sum the same terms, and in one of a single element
    luck stays likely.

    `rounds_once` holds a candidate with 16-bit data to sums in fp32, each output rounded once. The
    16-bit reference misplaces the gradient of many a maximum, and would allow that to anybody.

    The baselines are asked only whether they compute the same function: half of the digits of their
    dtype have to agree where the derived tolerance asks for more. torch.compile's plain running sums
    are worse than eager's cascaded ones, and that is no reason not to race it.
    """

    ORDERS = 4

    def __init__(
        self, case: Case, weights: Dict[str, Tensor], x: Tensor, dy: Tensor, rounds_once: bool = False
    ):
        _, c, h, w = case.full_shape
        n = max(1, min(case.batch, MAX_ELEMENTS // (c * h * w)))
        self.case, self.weights, self.x, self.dy = case, weights, x[:n], dy[:n]
        dtype = DTYPES[case.dtype]
        eps = torch.finfo(dtype).eps
        self.exact = reference(case, weights, self.x, self.dy, torch.float64)
        size = {k: t.abs().max().item() for k, t in self.exact.items()}

        def errors(own: Dict[str, Tensor]) -> Dict[str, float]:
            return {k: _distance(own[k].to(dtype), t) for k, t in self.exact.items()}

        def tolerance(*found: Dict[str, float]) -> Dict[str, float]:
            share = {k: max(f[k] for f in found) / size[k] if size[k] else 0.0 for k in size}
            shared = max((v for k, v in share.items() if k not in ("y", "dx")), default=0.0)
            return {k: 2 * ((share[k] if k in ("y", "dx") else shared) + eps) * size[k] for k in size}

        orders = [errors(reference(case, weights, self.x, self.dy, dtype))]
        if dtype.itemsize >= 4:
            for seed in range(1, self.ORDERS):
                orders.append(errors(_reordered(case, weights, self.x, self.dy, seed)))
        plain = tolerance(*orders)
        self.half_digits = {k: max(plain[k], eps**0.5 * size[k]) for k in size}
        if dtype.itemsize < 4 and rounds_once:
            plain = tolerance(errors(reference(case, weights, self.x, self.dy, torch.float32)))
        self.tolerance = plain

    def check(self, candidate: Candidate) -> Verdict:
        tolerance = self.tolerance if candidate.provider == "fused" else self.half_digits
        found = run_candidate(self.case, candidate, self.weights, self.x, self.dy)
        worst = Verdict("y", 0.0, 0.0)
        for name, exact in self.exact.items():
            value = found[name]
            if value.shape != exact.shape or not torch.isfinite(value).all():
                return Verdict(name, float("inf"), tolerance[name])
            worst = max(worst, Verdict(name, _distance(value, exact), tolerance[name]), key=lambda v: v.share)
        return worst


def _distance(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item()
