"""The CPU kernels of the instruction sets that this machine would not choose, in processes of their own."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cbam_fused import backends

HERE = Path(__file__).parent
# Every dtype and option, several tiles, tails of vectors, and the lanes that NaN takes.
CASES = "test_dtypes or test_large or test_ties or test_nan_and_infinity or test_strides_of_x"


AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


def _flags() -> set:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(line.partition(":")[2].split())


@pytest.mark.parametrize("name, needs", [("avx2", {"avx2", "fma", "f16c"}), ("baseline", set())])
def test_against_the_reference(name, needs):
    if (reason := backends()["cpu"]) is not True:
        pytest.skip(f"no CPU kernels: {reason}")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{platform.machine()} has one set of kernels, which the other tests run")
    if name == "avx2" and needs <= _flags() and not AVX512 <= _flags():
        pytest.skip(
            "this processor's own, which the other tests run; it has no AVX-512, whose kernels none run"
        )
    if missing := needs - _flags():
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        + [str(HERE / "test_forward_backward.py"), "-k", f"({CASES}) and not triton"],
        env={**os.environ, "CBAM_FUSED_ISA": name},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout


def test_an_unknown_name_is_an_error():
    if (reason := backends()["cpu"]) is not True:
        pytest.skip(f"no CPU kernels: {reason}")
    code = "import torch, cbam_fused; cbam_fused.FusedCBAM(16, backend='cpu')(torch.ones(1, 16, 4, 4))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CBAM_FUSED_ISA": "avx1024"},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert run.returncode != 0
    assert re.search(r"CBAM_FUSED_ISA must be one of .*baseline on this processor, got avx1024", run.stderr)
