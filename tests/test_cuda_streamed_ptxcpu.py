"""The streamed tier's compiled PTX, forward and backward, run on the CPU by ptxcpu, an optional sibling directory."""

from __future__ import annotations

import shutil

import cuda_ptx
import pytest
import torch

if cuda_ptx.unavailable() is not None:
    pytest.skip(str(cuda_ptx.unavailable()), allow_module_level=True)
if shutil.which("g++") is None:
    pytest.skip("there is no g++ to compile the translated kernels with", allow_module_level=True)

import cuda_streamed as cs  # noqa: E402
from oracle import Options, check, make_problem, run_problem  # noqa: E402

# One instantiation alone: g++ takes a minute and a half over the translation of one backward.
DTYPE = torch.bfloat16


class Watched(cuda_ptx.PtxMachine):
    """Raises, besides what ptxcpu raises by itself, where shared memory was raced for; adds up its traffic."""

    def execute(self, call, arrays) -> None:
        super().execute(call, arrays)
        assert self.result.race_exact and not self.result.races, self.result.race_lines


def machine(**options) -> Watched:
    """A device of few multiprocessors, so that each of its blocks draws many items."""
    return Watched(**{"multiprocessors": 3, "l2": 1 << 15, "shared": 99 << 10, "launches": 2, **options})


def test_outputs_and_every_gradient(monkeypatch):
    """Within the budget of the specification; two launches on one set of counters, several units, two schedules."""
    problem = make_problem(
        (4, 16, 8, 15), Options(norm="eval", residual=True, conv_bias=True), DTYPE, wide=True
    )
    results = []
    for seed in (1, 2):
        ops = cs.HostOps(machine(seed=seed)).installed(monkeypatch)
        results.append(run_problem(problem, "cuda"))
        assert {r["vector"] for r in ops.reports.values()} == {8}
        assert all(r["units"] > 1 for r in ops.reports.values())
        assert ops.reports["cbam_backward"]["ring"]
    assert all(torch.equal(a, b) for a, b in zip(*results))
    check(problem, "cuda")
