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


def _run(arguments, name):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "CBAM_FUSED_ISA": name},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )


@pytest.mark.parametrize(
    "name, needs, cases",
    [
        # Beside avx512_bf16, which the other tests run, it has its own bfloat16 alone.
        ("avx512", AVX512, f"({CASES}) and bfloat16"),
        ("avx2", {"avx2", "fma", "f16c"}, f"({CASES})"),
        ("baseline", set(), f"({CASES})"),
    ],
)
def test_against_the_reference(name, needs, cases):
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
    if name == "avx512" and "avx512_bf16" not in _flags():
        pytest.skip("this processor's own, which the other tests run")
    run = _run(
        ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        + [str(HERE / "test_forward_backward.py"), "-k", f"{cases} and not triton"],
        name,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout


# The last pass alone, with gates as they are given, on every 16-bit number there is: y is the exact rounding of
# the float32 product, subnormal numbers, infinities and NaN included.
ROUNDING = """
import sys, torch, cbam_fused
assert cbam_fused.backends()["cpu"] is True
dtype = getattr(torch, sys.argv[1])
x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 16, 64, 64)
torch.manual_seed(0)
gate, z = torch.rand(1, 16), torch.randn(1, 1, 64, 64)
for x in (x, x.to(memory_format=torch.channels_last)):
    y, s = torch.ops.cbam_fused_cpu.scale_forward(x, gate, z, False)
    expected = (x.float() * gate.reshape(1, 16, 1, 1) * s).to(dtype)
    wrong = (y != expected) & ~(y.isnan() & expected.isnan())
    assert not wrong.any(), (x[wrong][:4], y[wrong][:4], expected[wrong][:4])
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name, needs",
    [("avx512_bf16", {"avx512_bf16"}), ("avx512", AVX512), ("avx2", {"avx2", "fma"}), ("baseline", set())],
)
def test_rounding_of_every_16_bit_number(name, needs, dtype):
    if (reason := backends()["cpu"]) is not True:
        pytest.skip(f"no CPU kernels: {reason}")
    if missing := needs - _flags():
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
    run = _run(["-c", ROUNDING, dtype], name)
    assert run.returncode == 0, run.stderr[-2000:]


def test_an_unknown_name_is_an_error():
    if (reason := backends()["cpu"]) is not True:
        pytest.skip(f"no CPU kernels: {reason}")
    code = "import torch, cbam_fused; cbam_fused.FusedCBAM(16, backend='cpu')(torch.ones(1, 16, 4, 4))"
    run = _run(["-c", code], "avx1024")
    assert run.returncode != 0
    assert re.search(r"CBAM_FUSED_ISA must be one of .*baseline on this processor, got avx1024", run.stderr)
