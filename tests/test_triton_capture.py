"""What a CUDA graph forbids, looked for without a GPU: the launchers of all ops run as they are, their
launches recorded instead of made, and every torch operator that they call is seen by a dispatch mode.

A capture fails where the host waits for the device or copies from it, and what it replays is wrong where the
next call would launch something else. `test_cuda_graph` in triton_cases.py captures where there is a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Dict, List, Tuple

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

pytest.importorskip("triton")

from triton_recording import (
    ALLOCATIONS,
    DEVICES,
    VIEWS,
    Launch,
    Seen,
    make_inputs,
    recording,
    run_ops,
    run_split_ops,
)

from cbam_fused import _config as cfg
from cbam_fused._config import Config
from cbam_fused.triton_kernels import arguments, launchers, problem

# Copies on the device, of what is not dense: a slice of a larger x, an expanded dy.
COPIES = {"aten::clone", "aten::copy_"}


def refuse(name: str):
    def call(*args, **kwargs):
        raise AssertionError(f"a launcher called {name}")

    return call


@pytest.fixture
def no_waiting(monkeypatch):
    """Ways to wait for the device, or to leave its memory, that no dispatch mode sees."""
    for owner, names in (
        (torch.cuda, ("synchronize", "current_stream", "set_stream", "empty_cache")),
        (torch.cuda.Event, ("record", "synchronize", "query", "wait")),
        (torch.cuda.Stream, ("synchronize", "query", "wait_event", "wait_stream")),
        (torch.Tensor, ("pin_memory", "record_stream", "numpy", "tolist", "resize_")),
        (torch.UntypedStorage, ("resize_", "pin_memory")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, refuse(f"{owner.__name__}.{name}"))


# (shape, channels-last, hidden, config): jobs alone and in groups, shares, segments, large and small maps.
CASES: Dict[str, Tuple[Tuple[int, ...], bool, Any, Config]] = {
    "large map": ((2, 64, 56, 56), False, None, Config()),
    "large map, segments": (
        (1, 64, 56, 56),
        True,
        None,
        Config(pools=15, ties=cfg.TIES_SPLIT, residual=True),
    ),
    "small map": ((4, 512, 14, 14), True, None, Config()),
    "small map, one stretch": ((5, 320, 14, 14), False, None, Config(pools=19, spatial=3)),
    "tiny map, groups": ((6, 2048, 7, 7), False, None, Config()),
    "tiny map, whole samples": ((128, 256, 7, 7), False, None, Config()),
    "one layer": ((3, 160, 7, 7), False, 0, Config(pools=1)),
    "channel gate": ((3, 160, 7, 7), True, None, Config(spatial=0)),
    "spatial gate": ((3, 160, 20, 20), False, None, Config(pools=0)),
}
OPS = {
    "whole": run_ops,
    "cut around a norm in training": run_split_ops,
    "inference": functools.partial(run_ops, save=False, backward=False),
}
RUNS = [(name, ops) for name in CASES for ops in OPS if not ops.startswith("cut") or CASES[name][3].spatial]


def inputs(name: str, kind: str):
    """Inputs of a case whose values differ by kind; "nan" has nothing but NaNs, the rest is random."""
    shape, channels_last, hidden, config = CASES[name]
    x, weights, bn = make_inputs(
        shape, torch.float16, config, hidden, channels_last=channels_last, device="cpu", seed=len(kind)
    )
    dy = torch.randn(shape).half()
    if kind == "nan":
        for t in (x, dy, *weights, *bn):
            if t is not None:
                t.fill_(float("nan"))
    return x, weights, bn, config, dy


def described(launches: List[Launch]) -> List[Tuple]:
    """What a replay repeats: kernel, grid, scalars, and each tensor by its form and by which memory it has."""
    memory: Dict[int, int] = {}

    def form(a):
        if not isinstance(a, torch.Tensor):
            return a
        place = memory.setdefault(a.untyped_storage()._cdata, len(memory))
        return place, a.storage_offset(), tuple(a.shape), a.stride(), a.dtype

    return [
        (made.name, made.programs, tuple(map(form, made.args)), dict(made.meta), made.found)
        for made in launches
    ]


@pytest.mark.parametrize("generation", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name,ops", RUNS)
def test_nothing_that_a_capture_forbids(name, ops, generation, no_waiting, monkeypatch):
    """Fake tensors of a CUDA device have no values at all: whatever asks for one raises."""
    monkeypatch.setattr(problem, "on_device", lambda x: contextlib.nullcontext())
    shape, channels_last, hidden, config = CASES[name]
    with FakeTensorMode():
        made = make_inputs(shape, torch.float16, config, hidden, channels_last=channels_last)
        x, weights, bn = [
            [None if t is None else torch.empty_like(t, device="cuda") for t in part]
            for part in ([made[0]], made[1], made[2])
        ]
        with recording(DEVICES[generation]) as launches, Seen("cuda") as seen:
            OPS[ops](x[0], weights, bn, config)
    assert set(seen.names) <= ALLOCATIONS | VIEWS, sorted({*seen.names} - ALLOCATIONS - VIEWS)
    assert len(launches) >= (2 if ops == "inference" else 5 if "whole samples" in name else 7)


@pytest.mark.parametrize("name,ops", RUNS)
def test_other_values_launch_the_same(name, ops, no_waiting):
    """Launch for launch and operator for operator, and no memory that one launch has is resized for the next."""
    found = []
    for kind in ("random", "other", "nan"):
        x, weights, bn, config, dy = inputs(name, kind)
        with recording(DEVICES["sm_90"]) as launches, Seen("cpu") as seen:
            OPS[ops](x, weights, bn, config, dy=dy)
        found.append((described(launches), seen.names))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("ops", OPS)
def test_chunks_of_a_batch_launch_the_same(ops, no_waiting, monkeypatch):
    monkeypatch.setattr(arguments, "chunks", lambda pr, x, k: [slice(0, 2), slice(2, 4), slice(4, pr.n)])
    found = []
    for kind in ("random", "nan"):
        x, weights, bn, config, dy = inputs("tiny map, groups", kind)
        with recording(DEVICES["sm_120"]) as launches, Seen("cpu"):
            OPS[ops](x, weights, bn, config, dy=dy)
        found.append(described(launches))
    assert found[0] == found[1] and len(found[0]) >= 3 * (3 if ops == "inference" else 7)


def test_what_is_not_dense_is_copied_on_the_device(no_waiting, monkeypatch):
    monkeypatch.setattr(problem, "on_device", lambda x: contextlib.nullcontext())
    with FakeTensorMode():
        x = torch.empty(4, 40, 16, 16, device="cuda")[1:, 2:34, 1:, 1:]
        dy = torch.empty((), device="cuda").expand(x.shape)
        _, weights, bn = make_inputs(tuple(x.shape), torch.float32)
        weights, bn = ([torch.empty_like(t, device="cuda") for t in some] for some in (weights, bn))
        with recording(DEVICES["sm_90"]), Seen("cuda") as seen:
            run_ops(x, weights, bn, Config(), dy=dy)
    assert set(seen.names) <= ALLOCATIONS | VIEWS | COPIES, seen.names
    assert COPIES & set(seen.names)


def test_all_ops_are_looked_at(monkeypatch):
    """The runs above enter each launcher of the backend."""
    entered = set()
    for name in launchers.OPS:
        real = getattr(launchers, name)
        monkeypatch.setattr(
            launchers, name, lambda *a, real=real, name=name: (entered.add(name), real(*a))[1]
        )
    for ops in OPS.values():
        x, weights, bn, config, dy = inputs("small map", "random")
        with recording(DEVICES["sm_90"]):
            ops(x, weights, bn, config, dy=dy)
    assert entered == set(launchers.OPS)


MISTAKES = {
    "item": (lambda t: t.sum().item(), DataDependentOutputException),
    "nonzero": (lambda t: t.nonzero(), DynamicOutputShapeException),
    "cpu": (lambda t: t.cpu(), AssertionError),
    "synchronize": (lambda t: torch.cuda.synchronize(), AssertionError),
    "arithmetic": (lambda t: t + 1, AssertionError),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake, no_waiting, monkeypatch):
    """The checks above are able to fail."""
    wrong, error = MISTAKES[mistake]
    real = problem.like_layout
    monkeypatch.setattr(problem, "like_layout", lambda t, x: (wrong(t), real(t, x))[1])
    with pytest.raises(error):
        test_nothing_that_a_capture_forbids("small map", "whole", "sm_90", None, monkeypatch)
