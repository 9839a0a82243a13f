"""The GPU kernels on the shapes of the benchmark, with the plans that they get there.

Without a GPU, tests/test_cuda_rehearsal.py runs them on a CPU; the other tests' small shapes meet other plans.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import oracle
import pytest
import torch
from oracle import Options, check, make_problem

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes import SETS  # noqa: E402

TARGETS = [t for t in oracle.FUSED if t.backend in ("cuda", "triton")]
pytestmark = pytest.mark.skipif(not TARGETS, reason="no fused backend runs on a GPU here")

# Without the largest maps of detectors, on which the reference in float64 takes long.
SHAPES = sorted({s for name in SETS for s in SETS[name].shapes if math.prod(s) < 2**22})


@pytest.mark.parametrize("target", TARGETS or [None], ids=lambda t: t and t.backend)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_of_networks(target, dtype, layout, shape):
    options = Options(hidden=max(1, shape[0] // 16))
    check(make_problem((2, *shape), options, dtype, target.device, layout), target.backend)
