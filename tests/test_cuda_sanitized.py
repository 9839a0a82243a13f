"""The CUDA kernels of both tiers under address and undefined-behaviour sanitizers, on a small set of problems."""

from __future__ import annotations

import re
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
# What the names of cases have, each line at least one case.
STREAMED = (
    ("test_options", "plain"),
    ("test_options", "norm-train"),
    ("test_shapes", "float32", "folded"),
    ("test_shapes", "float32", "chunks"),
    ("test_shapes", "float32", "seven"),
    ("test_large_mlp_is_cut_into_items", "210"),
)
RESIDENT = (("test_shapes", "3-D"), ("test_shapes", "fewer"), ("test_options", "plain"))
CASES = {"streamed": ("test_cuda_simt.py", STREAMED, 25), "resident": ("test_cuda_resident.py", RESIDENT, 5)}


@pytest.mark.skipif(build.default_flavor() == "asan", reason="starts the sanitized process itself")
@pytest.mark.parametrize("file, names, least", CASES.values(), ids=CASES)
def test_kernels_under_sanitizers(file, names, least):
    chosen = " or ".join(f"({' and '.join(words)})" for words in names)
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", str(HERE / file), "-k", chosen],
        env=build.sanitized_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-8000:]
    passed = re.findall(r"^PASSED .*::(\S.*)$", out.stdout, re.MULTILINE)
    assert len(passed) >= least, out.stdout
    for words in names:
        assert any(all(word in name for word in words) for name in passed), f"no case of {words} passed"
