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
from typing import Tuple

import cuda_host
import pytest

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(bool(cuda_host.UNAVAILABLE), reason=cuda_host.UNAVAILABLE)

DTYPES = ("float32", "bfloat16")
# Every option in both layouts, slices and other layouts of x and dy, weights wider than x; and the ops one by one.
COMMON = (
    "(test_dtypes and bfloat16) or (test_option_grid and 5x17x14x14) or test_strides "
    "or (test_float32_parameters and bfloat16) or (test_opcheck and cuda and (plain or norm-train))"
)
# The rest of test_networks.py takes six minutes more.
NETWORKS = "bfloat16 and (256x56x56 or 512x28x28 or 1024x14x14 or 2048x7x7)"


def _rehearse(files, which, what, **settings) -> Tuple[int, int, int]:
    """Tests passed, launches of the resident tier, launches of the streamed one."""
    for dtype in DTYPES:
        cuda_host.compile_kernels(dtype)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "rehearsal", "-p", "no:cacheprovider"]
    out = subprocess.run(
        [*command, *(str(HERE / name) for name in files), "-k", which],
        env={**os.environ, "REHEARSE": what, "REHEARSE_DTYPES": " ".join(DTYPES), "PYTHONPATH": str(HERE), **settings},
        cwd=HERE.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr
    assert "skipped" not in out.stdout, out.stdout
    (passed,) = re.findall(r"(\d+) passed", out.stdout)
    ((resident, streamed),) = re.findall(r"launches: (\d+) resident, (\d+) streamed", out.stdout)
    return int(passed), int(resident), int(streamed)


def test_common_tests():
    passed, resident, streamed = _rehearse(("test_forward_backward.py", "test_ops.py"), COMMON, "cuda")
    # The resident tier has no misaligned x, no channels that bulk copies cannot share, and none of the split ops.
    assert passed > 80 and resident > 100 and streamed > 500


@pytest.mark.parametrize("tier", ["streamed", "resident"])
def test_networks(tier):
    what = "cuda" if tier == "resident" else tier
    passed, resident, streamed = _rehearse(
        ("test_networks.py",), NETWORKS, what, REHEARSE_MULTIPROCESSORS="132"
    )
    # A forward and a backward each.
    assert (passed, resident, streamed) == (8, *((16, 0) if tier == "resident" else (0, 16)))
