"""The streamed tier's ops, executed on the host by tests/simt: the same signatures on CPU tensors."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import numpy as np
import torch
from oracle import Problem, assert_within
from simt import build
from torch import Tensor

from cbam_fused import _backends, _ops
from cbam_fused import _config as cfg
from cbam_fused._config import Config, Parameters

DRIVER = Path(__file__).with_name("cuda_streamed_driver.cpp")
ELEMENTS = {
    torch.float32: ("float", 0),
    torch.float64: ("double", 1),
    torch.float16: ("cbam::Half", 2),
    torch.bfloat16: ("cbam::BFloat16", 3),
}
OPERATIONS = (
    "cbam_forward",
    "attention_forward",
    "scale_forward",
    "cbam_backward",
    "attention_backward",
    "scale_backward",
)
REPORT = (
    "fits", "scratch", "counters", "grid", "vector", "fold", "units", "unit_samples", "reduce_chunks", "pool_chunks",
    "ring", "conv_items", "stages", "shared", "lag", "tiles", "blocks", "static_shared",
    "gather_tiles", "hidden_blocks", "chained", "ragged", "weight_splits",
)  # fmt: skip
# The order of Scratch in streamed.h.
SCRATCH = (
    "pool_parts", "pool_marks", "hidden", "spatial_parts", "spatial_marks", "spatial_grad", "pooled_grad",
    "cross_parts", "gate_parts", "logit_grad", "hidden_parts", "hidden_grad", "pool_grad", "conv_parts",
    "weight_parts",
)  # fmt: skip
SAVED = ("pooled", "pool_index", "channel_gate", "spatial_pool", "spatial_index", "hidden")


class Norm(NamedTuple):
    """BatchNorm in eval mode; weight and bias may be None."""

    weight: Optional[Tensor]
    bias: Optional[Tensor]
    mean: Optional[Tensor]
    var: Optional[Tensor]
    eps: float = 1e-5


NO_NORM = Norm(None, None, None, None, 0.0)


# The order of tests/cuda_streamed_problem.h.
ORDER = (
    "x", "dy", "y", "dx", "w1", "b1", "w2", "b2", "conv_weight", "conv_bias", "bn_weight", "bn_bias", "bn_mean", "bn_var",
    "pooled", "pool_index", "channel_gate", "spatial_pool", "spatial_index", "hidden", "spatial_gate", "z", "dz", "dz_out",
    "dchannel_gate", "dw1", "db1", "dw2", "db2", "dconv_weight", "dconv_bias", "dbn_weight", "dbn_bias",
)  # fmt: skip


@dataclass
class Machine:
    """A modelled device and how the host schedules it. `offset`: bytes by which x's tensors are displaced,
    `weight_offset`: the MLP's matrices.

    All launches of a machine share its counters, as those on one stream do, and nothing but the launches
    themselves ever clears them.
    """

    multiprocessors: int = 3
    l2: int = 50 << 20
    shared: int = 99 << 10
    seed: int = 0
    resident: int = 6
    launches: int = 1
    offset: int = 0
    weight_offset: int = 0
    flavor: Optional[str] = None
    report: Dict[str, int] = field(default_factory=dict)
    traffic: Dict[str, int] = field(default_factory=dict)
    scratch: Dict[str, int] = field(default_factory=dict)
    counters: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))

    def execute(self, call: "_Call", arrays: List[Optional[build.Array]]) -> None:
        """Runs one op's launch; fills in `report`, `traffic` (bytes asked of each tensor) and `scratch` (of each of its)."""
        lib = library(call.x.dtype, self.flavor)
        report = np.zeros(len(REPORT), np.int64)
        lib.run("plan", call.sizes, report)
        self.report = dict(zip(REPORT, report.tolist()))
        assert self.report["fits"], self.report
        if self.counters.size < self.report["counters"]:
            self.counters = np.zeros(self.report["counters"], np.uint32)
        counters = build.Array(self.counters, "counters")
        scratch = self._scratch(lib, call)
        lib.run(
            "run", call.sizes, float(call.norm.eps), *arrays, counters, scratch, self.launches, seed=self.seed,
            resident=self.resident,
        )  # fmt: skip
        assert not counters.data.any(), "the counters must be zero again"
        self.traffic = {
            name: a.bytes_read + a.bytes_written for name, a in zip(ORDER, arrays) if a is not None
        }
        self.traffic["scratch"] = scratch.bytes_read + scratch.bytes_written
        self.scratch = dict(scratch.moved)

    def _scratch(self, lib, call: "_Call") -> build.Array:
        """Scratch memory, every tensor of it a buffer with bounds of its own."""
        sizes = np.zeros(len(SCRATCH), np.int64)
        lib.run("scratch_sizes", call.sizes, sizes)
        parts, at = {}, 0
        for name, size in zip(SCRATCH, sizes.tolist()):
            if size:
                parts[name] = (at, size)
                at += -(-size // 256) * 256 + 256  # kScratchGap
        assert at == self.report["scratch"], (parts, self.report)
        return build.Array(np.zeros(max(at, 1), np.uint8), "scratch", unwritten=True, parts=parts)


@functools.lru_cache(maxsize=None)
def library(dtype: torch.dtype, flavor: Optional[str] = None):
    return build.load(DRIVER, flavor=flavor, defines=[f"CBAM_ELEMENT={ELEMENTS[dtype][0]}"])


def _numpy(t: Tensor) -> np.ndarray:
    t = t.detach()
    return (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy()


def is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _memory(t: Tensor) -> Tensor:
    """The tensor's elements in the order in which they lie in memory."""
    return t.movedim(1, -1) if is_channels_last(t) else t


class _Call:
    def __init__(self, operation: str, x: Tensor, p: Parameters, c: Config, norm: Norm, machine: Machine):
        self.x, self.p, self.norm, self.machine = x, p, norm, machine
        spatial = (1,) * (3 - (x.dim() - 2)) + tuple(x.shape[2:])
        kernel = (1, 1, 1)
        if p.conv_weight is not None:
            kernel = (1,) * (3 - (p.conv_weight.dim() - 2)) + tuple(p.conv_weight.shape[2:])
        weights = (*p, *norm[:4])
        wide = sum(1 << i for i, t in enumerate(weights) if t is not None and t.dtype != x.dtype)
        hidden = x.shape[1] if p.w1 is None else p.w1.shape[0]
        self.sizes = np.array(
            [
                OPERATIONS.index(operation), ELEMENTS[x.dtype][1], int(is_channels_last(x)), x.shape[0], x.shape[1],
                *spatial, *kernel, hidden, c.pools, c.spatial, c.ties, int(c.residual), int(machine.offset % 16 == 0),
                wide, int(p.w1 is not None), machine.l2, machine.multiprocessors, machine.shared,
            ],
            dtype=np.int64,
        )  # fmt: skip

    def given(self, name: str, t: Optional[Tensor], big: bool = False) -> Optional[build.Array]:
        if t is None or t.numel() == 0:
            return None
        offset = self.machine.offset if big else self.machine.weight_offset if name in ("w1", "w2") else 0
        return build.Array(_numpy(_memory(t) if big else t.contiguous()), name, read_only=True, offset=offset)

    def made(self, name: str, t: Optional[Tensor], big: bool = False) -> Optional[build.Array]:
        if t is None or t.numel() == 0:
            return None
        offset = self.machine.offset if big else 0
        return build.Array(_numpy(_memory(t) if big else t), name, unwritten=True, offset=offset)

    def run(self, **named: Optional[build.Array]) -> None:
        for name, t in zip(Parameters._fields, self.p):
            named[name] = self.given(name, t)
        for name, t in zip(Norm._fields[:4], self.norm):
            named[f"bn_{name}"] = self.given(f"bn_{name}", t)
        named["x"] = self.given("x", self.x, big=True)
        self.machine.execute(self, [named.get(name) for name in ORDER])


def _saved(x: Tensor, p: Parameters, c: Config, save: bool):
    n, ch = x.shape[:2]
    positions = x[0, 0].numel()
    acc = _ops.accumulate_dtype(x.dtype)
    count = bin(c.pools & 15).count("1")

    def empty(*shape, dtype=acc):
        return torch.empty(shape, dtype=dtype)

    none = (0,)
    return {
        "pooled": empty(*((n, count, ch) if c.pools else none)),
        "pool_index": empty(
            *((n, ch) if save and c.pools & cfg.MAX else none), dtype=_ops.index_dtype(positions)
        ),
        "channel_gate": empty(*((n, ch) if c.pools else none)),
        "spatial_pool": empty(*((n, 2, *x.shape[2:]) if c.spatial else none)),
        "spatial_index": empty(
            *((n, *x.shape[2:]) if save and c.spatial else none), dtype=_ops.index_dtype(ch)
        ),
        "hidden": empty(
            *(
                (n, 1 if c.pools & cfg.BLEND else count, p.w1.shape[0])
                if save and c.pools and p.w1 is not None
                else none
            )
        ),
    }


def _map(x: Tensor, present: bool = True) -> Tensor:
    shape = (x.shape[0], 1, *x.shape[2:]) if present else (0,)
    return torch.empty(shape, dtype=_ops.accumulate_dtype(x.dtype))


def cbam_forward(
    x: Tensor,
    p: Parameters,
    c: Config,
    norm: Norm = NO_NORM,
    machine: Optional[Machine] = None,
    save: bool = True,
):
    """y and what is saved, by name."""
    call = _Call("cbam_forward", x, p, c, norm, machine or Machine())
    out = {"y": torch.empty_like(x), **_saved(x, p, c, save), "spatial_gate": _map(x, bool(c.spatial))}
    call.run(**{name: call.made(name, t, big=name == "y") for name, t in out.items()})
    return out


def attention_forward(
    x: Tensor, p: Parameters, c: Config, machine: Optional[Machine] = None, save: bool = True
):
    call = _Call("attention_forward", x, p, c, NO_NORM, machine or Machine())
    out = {**_saved(x, p, c, save), "z": _map(x, bool(c.spatial))}
    call.run(**{name: call.made(name, t) for name, t in out.items()})
    return out


def _scale_config(channel_gate: Tensor, residual: bool) -> Config:
    return Config(
        pools=cfg.AVG if channel_gate.numel() else 0, spatial=cfg.SPATIAL_MAX_MEAN, residual=residual
    )


def scale_forward(
    x: Tensor, channel_gate: Tensor, z: Tensor, residual: bool, machine: Optional[Machine] = None
):
    call = _Call(
        "scale_forward", x, Parameters(), _scale_config(channel_gate, residual), NO_NORM, machine or Machine()
    )
    out = {"y": torch.empty_like(x), "spatial_gate": _map(x)}
    made = {name: call.made(name, t, big=name == "y") for name, t in out.items()}
    call.run(**made, channel_gate=call.given("channel_gate", channel_gate), z=call.given("z", z))
    return out


def scale_backward(
    dy: Tensor, x: Tensor, channel_gate: Tensor, spatial_gate: Tensor, machine: Optional[Machine] = None
):
    call = _Call(
        "scale_backward", x, Parameters(), _scale_config(channel_gate, False), NO_NORM, machine or Machine()
    )
    out = {"dz_out": _map(x), "dchannel_gate": torch.empty_like(channel_gate)}
    made = {name: call.made(name, t) for name, t in out.items()}
    call.run(
        **made,
        dy=call.given("dy", dy, big=True),
        channel_gate=call.given("channel_gate", channel_gate),
        spatial_gate=call.given("spatial_gate", spatial_gate),
    )
    return out


def _backward(operation, dy, x, p, c, norm, saved, extra, machine):
    call = _Call(operation, x, p, c, norm, machine or Machine())
    out = {"dx": torch.empty_like(x)}
    for name, t in (*zip(Parameters._fields, p), ("bn_weight", norm.weight), ("bn_bias", norm.bias)):
        if t is not None:
            out[f"d{name}"] = torch.empty_like(t)
    made = {name: call.made(name, t, big=name == "dx") for name, t in out.items()}
    given = {name: call.given(name, t) for name, t in {**saved, **extra}.items() if name not in ("y", "z")}
    call.run(**made, **given, dy=call.given("dy", dy, big=True))
    return out


def cbam_backward(dy, x, p, c, saved, norm: Norm = NO_NORM, machine: Optional[Machine] = None):
    """dx and every weight's gradient, by name; `saved` is what cbam_forward returned."""
    return _backward("cbam_backward", dy, x, p, c, norm, saved, {}, machine)


def attention_backward(
    dy, x, p, c, saved, spatial_gate, dz, dchannel_gate, machine: Optional[Machine] = None
):
    extra = {"spatial_gate": spatial_gate, "dz": dz, "dchannel_gate": dchannel_gate}
    return _backward("attention_backward", dy, x, p, c, NO_NORM, saved, extra, machine)


def assert_hidden_layer(saved: Dict[str, Tensor], problem: Problem) -> None:
    """What a forward saved is w1 u + b1 of the pools that it saved, or without w1 nothing."""
    p, hidden = problem.p, saved["hidden"]
    if p.w1 is None or not problem.c.pools:
        assert hidden.numel() == 0
        return

    def layer(dtype: torch.dtype, reverse: bool = False) -> Tensor:
        u, w1 = saved["pooled"].to(dtype), p.w1.to(dtype)
        u = u.mean(1, keepdim=True) if problem.c.pools & cfg.BLEND else u
        return torch.nn.functional.linear(
            *((u.flip(2), w1.flip(1)) if reverse else (u, w1)), None if p.b1 is None else p.b1.to(dtype)
        )

    low = [layer(hidden.dtype, reverse) for reverse in (False, True)]
    assert_within("hidden", hidden, layer(torch.float64), low)


class HostOps:
    """The ops of `_ops.py` with their own signatures, each a launch on `machine`.

    `installed(monkeypatch)` puts them in the place of backend "cuda", for tensors on the CPU.
    """

    def __init__(self, machine: Optional[Machine] = None):
        self.machine = machine or Machine()
        self.reports: Dict[str, Dict[str, int]] = {}
        self.traffic: Dict[str, Dict[str, int]] = {}

    def installed(self, monkeypatch) -> "HostOps":
        monkeypatch.setattr(_ops, "get", lambda backend, name: functools.partial(self.call, name))
        monkeypatch.setattr(_backends, "select", lambda name, x, c: name)
        return self

    def call(self, name: str, *arguments):
        if arguments[0].numel() == 0:
            raise AssertionError("the host functions of the real ops return before a launch on nothing")
        result = getattr(self, name)(*arguments)
        self.reports[name], self.traffic[name] = self.machine.report, self.machine.traffic
        return result

    def cbam_inference(self, x, *rest):
        weights, norm, options = rest[:6], rest[6:11], rest[11:]
        return cbam_forward(x, Parameters(*weights), Config(*options), Norm(*norm), self.machine, save=False)[
            "y"
        ]

    def cbam_forward(self, x, *rest):
        weights, norm, options = rest[:6], rest[6:11], rest[11:]
        out = cbam_forward(x, Parameters(*weights), Config(*options), Norm(*norm), self.machine)
        return tuple(out.values())

    def cbam_backward(self, dy, x, *rest):
        weights, norm, saved, options = rest[:6], rest[6:11], rest[11:18], rest[18:]
        out = cbam_backward(
            dy,
            x,
            Parameters(*weights),
            Config(*options),
            dict(zip((*SAVED, "spatial_gate"), saved)),
            Norm(*norm),
            self.machine,
        )
        names = ("dx", *(f"d{n}" for n in (*Parameters._fields, "bn_weight", "bn_bias")))
        return tuple(out.get(name, x.new_empty(0)) for name in names)

    def attention_forward(self, x, *rest):
        weights, (pools, spatial, ties, save) = rest[:6], rest[6:]
        out = attention_forward(x, Parameters(*weights), Config(pools, spatial, ties), self.machine, save)
        return (
            out["z"],
            *(out[n] if save or n == "channel_gate" else out[n].new_empty(0) for n in SAVED),
        )

    def attention_backward(self, dy, x, *rest):
        weights, saved, (gate, dz, dgate), options = rest[:6], rest[6:12], rest[12:15], rest[15:]
        out = attention_backward(
            dy,
            x,
            Parameters(*weights),
            Config(*options),
            dict(zip(SAVED, saved)),
            gate,
            dz,
            dgate,
            self.machine,
        )
        return tuple(out.get(name, x.new_empty(0)) for name in ("dx", *(f"d{n}" for n in Parameters._fields)))

    def scale_forward(self, x, channel_gate, z, residual):
        return tuple(scale_forward(x, channel_gate, z, residual, self.machine).values())

    def scale_backward(self, dy, x, channel_gate, spatial_gate):
        return tuple(scale_backward(dy, x, channel_gate, spatial_gate, self.machine).values())
