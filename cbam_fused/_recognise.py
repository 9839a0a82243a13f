"""Decides, for certain, whether a module is a CBAM or one of its gates, and with which options.

Structure first: the layers that hold what the module has learnt must be those of a CBAM and nothing
else. Then numbers: in float64, with weights drawn anew (a BatchNorm weight of 0 would hide the
spatial gate), the module and the fused path must agree on outputs, on every gradient and on the
running statistics, in eval and in training. Everything runs on a copy on the CPU.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from . import _config as cfg
from ._config import Config
from ._structure import HOOKS, GateOnly, Refusal, Structure, at, check_children, known_prehook
from .compat import base, dialects
from .compat.base import Spec

# An architecture that differs does so by parts in ten; float64 sums of C * P terms by parts in 1e12.
TOLERANCE = 1e-9
_POOLS = (("avg", "max"), ("avg",), ("max",))


def _copy(module: nn.Module, memo: Optional[Dict[int, Any]] = None) -> nn.Module:
    memo = {} if memo is None else memo
    for node in module.modules():
        for value in node.__dict__.values():
            # Pruning leaves such a product of parameter and mask, which cannot be copied; its hook makes it anew.
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def _bare_copy(module: nn.Module) -> nn.Module:
    """A float64 copy on the CPU without hooks, which may hold on to anything."""
    memo: Dict[int, Any] = {}
    for node in module.modules():
        for table in HOOKS:
            hooks = getattr(node, table)
            if not any(known_prehook(h) for h in hooks.values()):
                memo[id(hooks)] = OrderedDict()
    try:
        twin = _copy(module, memo)
    except RuntimeError as error:
        raise Refusal(f"it cannot be copied for the check: {str(error).splitlines()[0]}") from None
    if any(t.is_meta for t in itertools.chain(twin.parameters(), twin.buffers())):
        twin = twin.to_empty(device="cpu")
    twin = twin.to(device="cpu", dtype=torch.float64)
    for p in twin.parameters():
        p.requires_grad_(True)
        p.grad = None
    return twin


# Hidden values well past 6 and logits of a few units: a ReLU6, a hard sigmoid or a missing gate shows.
_SCALES = (3.0, 0.15, 0.5)


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    # Where new tensors go by default is the caller's affair.
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _randomise(twin: nn.Module, s: Structure, generator: torch.Generator) -> None:
    def normal(t: Tensor, scale: float) -> None:
        t.copy_(_normal(t.shape, generator) * scale)

    with torch.no_grad():
        for path, scale in zip(s.paths[:3], _SCALES):
            if path is not None:
                for p in at(twin, path).parameters():
                    fan = max(1, p[0].numel()) if p.dim() > 1 else 1
                    normal(p, scale * (fan**-0.5 if p.dim() > 1 else 0.3))
        if s.paths[3] is not None:
            norm: Any = at(twin, s.paths[3])
            for p in norm.parameters():
                normal(p, 1.0)
            if norm.running_mean is not None:
                normal(norm.running_mean, 0.5)
                norm.running_var.copy_(0.5 + _normal(norm.running_var.shape, generator).square())


def _probes(s: Structure, dims: int, generator: torch.Generator) -> List[Tensor]:
    """A dense input, a post-ReLU one on a coarse grid (ties in both pools), and a large one."""
    c = s.channels or 5
    shapes = [(2, c, *(5, 6, 3)[:dims]), (3, c, *(4, 7, 2)[:dims]), (2, c, *(3, 3, 3)[:dims])]
    dense, grid, large = (_normal(sh, generator) for sh in shapes)
    return [dense, (grid * 2).round().clamp(min=0) / 2, large * 8]


def _extremes(dense: Tensor) -> List[Tensor]:
    """What a clamp or a `nan_to_num` on the way would change: a very large input, and one that is not finite."""
    broken = dense.clone()
    broken[0, 0].flatten()[1] = float("nan")
    broken[1, -1].flatten()[2] = float("inf")
    return [dense * 1e4, broken]


def _variants(module: nn.Module, s: Structure) -> Iterator[Config]:
    """Options that this structure may have, the likeliest first."""
    named: List[Any] = [getattr(m, "pool_types", None) for m in module.modules()]
    given = [tuple(names) for names in named if isinstance(names, (list, tuple))]
    pools: List[int] = []
    if s.channels is not None:
        for names in (*given, *_POOLS):
            if all(n in cfg.POOL_BITS for n in names):
                pools.append(sum(cfg.POOL_BITS[n] for n in set(names)))
        light = cfg.AVG | cfg.MAX | cfg.BLEND
        pools = [light, *pools] if s.maps == 1 else [*pools, light]
    orders: Tuple[int, ...] = (cfg.SPATIAL_NONE,)
    if s.maps:
        orders = (cfg.SPATIAL_BLEND,) if s.maps == 1 else (cfg.SPATIAL_MEAN_MAX, cfg.SPATIAL_MAX_MEAN)
    for residual in (False, True):
        for bits in dict.fromkeys(pools or [0]):
            for order in orders:
                yield Config(bits, order, cfg.TIES_FIRST, residual)


def _spec(s: Structure, c: Config, dims: int, row: Optional[str], backend: str, original: type) -> Spec:
    return Spec(row, s.channels, c, s.paths, dims, backend, original)


def _difference(a: Optional[Tensor], b: Optional[Tensor]) -> float:
    """Largest difference relative to the largest magnitude; infinity where the shapes differ."""
    if a is None or b is None:
        missing = a if b is None else b
        return 0.0 if missing is None or not missing.any() else float("inf")
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    gap = (a - b).abs().max().item() / max(1e-3, b.abs().max().item())
    return gap if gap == gap else float("inf")


# What every module's __dict__ has; `training` is ours to set.
_MACHINERY = frozenset(nn.Module().__dict__)


class _Held:
    """A value and what it contains, by identity; tensors also by how often they were written to."""

    def __init__(self, value: Any):
        self.values: List[Any] = []
        self._visit(value, 3)

    def _visit(self, value: Any, depth: int) -> None:
        self.values.append(value)
        if isinstance(value, Tensor):
            self.values.append(value._version)
        elif depth and isinstance(value, (list, tuple, set, dict)):
            for item in [*value, *value.values()] if isinstance(value, dict) else value:
                self._visit(item, depth - 1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Held):
            return False
        pairs = itertools.zip_longest(self.values, other.values, fillvalue=self)
        return all(a is b or type(a) is int and a == b for a, b in pairs)


def _notes(module: nn.Module) -> Dict[str, _Held]:
    """What the module's parts hold besides layers and parameters."""
    return {
        f"{name}.{key}".lstrip("."): _Held(value)
        for name, node in module.named_modules()
        for key, value in node.__dict__.items()
        if key not in _MACHINERY and not (isinstance(value, Tensor) and node._forward_pre_hooks)
    }


def _call(module: nn.Module, x: Tensor) -> Tensor:
    given, before = x.clone(), _notes(module)
    try:
        y = type(module).forward(module, x)  # type: ignore[attr-defined]
    except Exception as error:  # whatever the unknown code raises, it is no CBAM of such an input
        raise Refusal(
            f"it fails on an input of shape {tuple(x.shape)}: {type(error).__name__}: {error}"
        ) from None
    if not isinstance(y, Tensor):
        raise Refusal(f"it returns a {type(y).__name__}")
    kept = (x == given) | (x != x) & (given != given)
    if not bool(kept.all()):
        raise Refusal("it changes its input in place")
    after = _notes(module)
    if after != before:
        changed = sorted(n for n in {**before, **after} if before.get(n) != after.get(n))
        raise Refusal(f"its forward sets {changed[0]}, which the fused path would not")
    return y


def _gradients(module: nn.Module, x: Tensor) -> Tuple[Tensor, List[Optional[Tensor]]]:
    """Output, and the gradients of input and parameters for a fixed cotangent."""
    x = x.clone().requires_grad_()
    y = _call(module, x * 1.0)
    weights = torch.linspace(-1.0, 1.3, y.numel(), dtype=y.dtype, device="cpu").reshape(y.shape)
    inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
    if not y.requires_grad:
        raise Refusal("its output has no gradient")
    return y.detach(), list(torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True))


def _agree(twin: nn.Module, other: nn.Module, x: Tensor) -> Optional[str]:
    """What differs between two modules with equal state on x, or None."""
    ya, ga = _gradients(twin, x)
    yb, gb = _gradients(other, x)
    if _difference(ya, yb) > TOLERANCE:
        return "output"
    learnt = (n for n, p in twin.named_parameters() if p.requires_grad)
    names = ["gradient of the input", *(f"gradient of {n}" for n in learnt)]
    for name, a, b in zip(names, ga, gb):
        if _difference(a, b) > TOLERANCE:
            return name
    for (name, a), (_, b) in zip(twin.named_buffers(), other.named_buffers()):
        if _difference(a.double(), b.double()) > TOLERANCE:
            return name
    return None


def _row(module: nn.Module, s: Structure, c: Config) -> Optional[str]:
    """The dialect with these paths, preferring the one with these options; None for a layout of its own."""
    found = {n: ".".join(p) for n, p in zip(dialects.LAYERS, s.paths) if p is not None}

    def has(r: dialects.Dialect) -> bool:
        if r.kind == s.kind and dict(r.layers) == found:
            return True
        without = {k: v for k, v in r.layers.items() if k.startswith("fc")}
        return s.kind == "channel" and "spatial" in r.optional and without == found

    rows = [r for r in dialects.TABLE if r.name != "cbam_fused" and has(r)]
    linear = isinstance(at(module, s.paths[1]), nn.Linear) if s.paths[1] else None
    rows = [r for r in rows if linear is None or (r.mlp == "linear") == linear]
    ties = cfg.TIES_SPLIT if c.ties == cfg.TIES_SPLIT else cfg.TIES_FIRST
    home = type(module).__module__.split(".")[0]

    def fit(r: dialects.Dialect) -> Tuple[bool, bool, bool]:
        light = c.spatial == cfg.SPATIAL_BLEND
        return (
            r.constant("light", False) in (None, light),
            r.name.startswith(home),
            cfg.TIES[r.constant("ties", "first")] == ties,
        )

    return max(rows, key=fit).name if rows else None


def swap_class(row: Optional[str], kind: str) -> type:
    """The importable class that a recognised module becomes."""
    if row is None:
        return base.BASES[kind]
    return base.CLASSES[row]


def _hidden(module: nn.Module, spec: Spec, kind: str) -> Optional[str]:
    """An attribute of the module that means something else to its new class, or None."""
    own = {**module.__dict__, **module._modules}
    meant: Dict[str, Any] = {}
    for k in reversed(base.BASES[kind].__mro__):
        if k not in nn.Module.__mro__:
            meant.update(vars(k))
    meant.update(channels=spec.channels, dims=spec.dims)
    for name in sorted(meant.keys() & own.keys()):
        if type(meant[name]) is not type(own[name]) or meant[name] != own[name]:
            return name
    return None


def become(module: nn.Module, spec: Spec, kind: str) -> None:
    """Makes a module of another class run as `spec` says, itself and its layers staying where they are."""
    module.__class__ = swap_class(spec.dialect, kind)
    module._cbam = spec  # type: ignore[assignment]


@contextmanager
def _aside() -> Iterator[None]:
    """Gradients on, the caller's random state untouched, one thread (the probes are too small for two)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def recognise(module: nn.Module, s: Structure, backend: str) -> Spec:
    """The spec with which `module` runs fused; raises Refusal unless every check agrees."""
    check_children(module, s)
    with _aside():
        twin = _bare_copy(module)
        generator = torch.Generator().manual_seed(20180717)
        _randomise(twin, s, generator)
        twin.eval()
        dims, probes = 0, []
        trial = (s.dims,) if s.dims is not None else (2, 1, 3)
        for dims in trial:
            probes = _probes(s, dims, generator)
            try:
                y = _call(twin, probes[0]).detach()
                break
            except Refusal:
                if dims == trial[-1]:
                    raise
        original = type(module)
        if y.shape != probes[0].shape:
            _refuse_shape(y, probes[0])
        config = _matching(twin, s, probes[0], y, dims)
        candidates = [config]
        if config.pools & cfg.MAX or config.spatial:
            candidates.append(Config(config.pools, config.spatial, cfg.TIES_SPLIT, config.residual))
        failures = []
        for c in candidates:
            spec = _spec(s, c, dims, None, "auto", original)
            hidden = _hidden(module, spec, s.kind)
            if hidden is not None:
                raise Refusal(f"its attribute {hidden} is not FusedCBAM's")
            failure = _verify(twin, spec, s.kind, probes)
            if failure is None:
                return _spec(s, c, dims, _row(module, s, c), backend, original)
            failures.append(failure)
    # The options that agreed for longest are the ones that it has.
    raise Refusal(f"its {max(failures)[1]} differs from FusedCBAM's")


def _refuse_shape(y: Tensor, x: Tensor) -> None:
    gates = (x.shape[:2] + (1,) * (x.dim() - 2), x.shape[:1] + (1,) + x.shape[2:])
    if y.shape in gates and bool(((y >= 0) & (y <= 1)).all()):
        raise GateOnly(
            "it returns its gate alone and its caller multiplies: cbam_fused.compat.luuuyi.CBAM, or CBAM2018 with layers "
            "fc1 and fc2, is the pair as one fused block (docs/compat.md shows the change)"
        )
    raise Refusal(f"it returns shape {tuple(y.shape)} for {tuple(x.shape)}")


def _matching(twin: nn.Module, s: Structure, x: Tensor, y: Tensor, dims: int) -> Config:
    """The options whose output is y."""
    runner = _copy(twin)
    best = float("inf")
    for c in _variants(twin, s):
        spec = _spec(s, c, dims, None, "reference", type(twin))
        runner.__class__ = base.BASES[s.kind]
        runner._cbam = spec  # type: ignore[assignment]
        with torch.no_grad():
            gap = _difference(runner(x), y)
        if gap <= TOLERANCE:
            return c
        best = min(best, gap)
    raise Refusal(
        f"its output differs from FusedCBAM's by {best:.1g} of the largest value, whatever the options"
    )


def _verify(twin: nn.Module, spec: Spec, kind: str, probes: List[Tensor]) -> Optional[Tuple[int, str]]:
    """How many probes agreed and what then differs between the module and the fused path, or None."""
    agreed = 0
    for training in (False, True):
        left, right = _copy(twin), _copy(twin)
        become(right, spec, kind)
        left.train(training)
        right.train(training)
        for x in probes:
            difference = _agree(left, right, x)
            if difference is not None:
                return agreed, difference + (" in training" if training else "")
            agreed += 1
    left, right = (_copy(twin).requires_grad_(False).eval() for _ in range(2))
    become(right, spec, kind)
    difference = _agree(left, right, probes[0])
    if difference is not None:
        return agreed, difference + " with frozen parameters"
    with torch.no_grad():
        for x in _extremes(probes[0]):
            a, b = _call(left, x), _call(right, x)
            same = torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
            if not same or _difference(*(t.nan_to_num(0.0, 0.0, 0.0) for t in (a, b))) > TOLERANCE:
                return agreed, "output for very large numbers, infinity and NaN"
    return None
