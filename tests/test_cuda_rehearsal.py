"""The CUDA backend from the ops to the kernels, on a CPU: common tests with tests/rehearsal.py as their only target.

Here the arguments of ops.cpp, the plan, the choice of the tier and of the variant, the scratch memory and the kernels
meet each other. What single kernels do wrong, the checked flavour of tests/simt finds elsewhere.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_host
import pytest

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(bool(cuda_host.UNAVAILABLE), reason=cuda_host.UNAVAILABLE)

DTYPES = ("float32", "bfloat16")
# Every option in both layouts, slices and other layouts of x and dy, weights wider than x; and the ops one by one.
TESTS = (
    "(test_dtypes and bfloat16) or (test_option_grid and 5x17x14x14) or test_strides "
    "or (test_float32_parameters and bfloat16) or (test_opcheck and cuda and (plain or norm-train))"
)


def test_common_tests():
    for dtype in DTYPES:
        cuda_host.compile_kernels(dtype)
    files = [str(HERE / name) for name in ("test_forward_backward.py", "test_ops.py")]
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "rehearsal", "-p", "no:cacheprovider", *files, "-k", TESTS],
        env={**os.environ, "REHEARSE": "cuda", "REHEARSE_DTYPES": " ".join(DTYPES), "PYTHONPATH": str(HERE)},
        cwd=HERE.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr
    assert int(re.search(r"(\d+) passed", out.stdout)[1]) > 80 and "skipped" not in out.stdout, out.stdout
    resident, streamed = map(int, re.search(r"launches: (\d+) resident, (\d+) streamed", out.stdout).groups())
    # The resident tier has no small or misaligned x, and none of the split ops.
    assert resident > 100 and streamed > 500, out.stdout
