"""The CUDA kernels of both tiers under address and undefined-behaviour sanitizers, on a small set of problems."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if shutil.which("g++") is None:
    pytest.skip("there is no g++ to compile the kernels for the host", allow_module_level=True)

from simt import build

HERE = Path(__file__).parent
# Each pass over x of each layout, folded rows, chunks and an MLP that is cut into items; both splits of the
# resident tier. All in float32: an element type is one more library, whose compilation takes longest.
STREAMED = (
    "(test_options and (plain or norm-train)) or (test_shapes and float32 and (folded or chunks or seven))"
    " or (test_large_mlp_is_cut_into_items and 210)"
)
RESIDENT = "(test_shapes and (3-D or fewer)) or (test_options and plain)"
CASES = {"streamed": ("test_cuda_simt.py", STREAMED), "resident": ("test_cuda_resident.py", RESIDENT)}


@pytest.mark.skipif(build.default_flavor() == "asan", reason="starts the sanitized process itself")
@pytest.mark.parametrize("file, names", CASES.values(), ids=CASES)
def test_kernels_under_sanitizers(file, names):
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file), "-k", names],
        env=build.sanitized_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-8000:]
    assert " passed" in out.stdout and "failed" not in out.stdout, out.stdout
