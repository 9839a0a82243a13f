"""The CPU kernels of each instruction set that this machine has, in processes of their own."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cbam_fused import backends

HERE = Path(__file__).parent
# Every dtype and option, several tiles, tails of vectors, the lanes that NaN takes, threads, and inference. The
# reference, a parameter that stands first and whose tests are not repeated, has no instruction set.
CASES = (
    "(test_dtypes or test_large or test_ties or test_nan_and_infinity or test_strides_of_x or test_threads"
    " or test_float32_parameters or (test_option_grid and (3x65x7x7 or 1x16x13x57))"
    " or (test_without_gradients and float32)) and not triton and not [reference"
)


def _run(arguments, name):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "CBAM_FUSED_ISA": name},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )


@functools.lru_cache(maxsize=None)
def _refusal() -> str:
    """What a call says to a name that there is not."""
    code = "import torch, cbam_fused; cbam_fused.FusedCBAM(16, backend='cpu')(torch.ones(1, 16, 4, 4))"
    run = _run(["-c", code], "avx1024")
    assert run.returncode != 0
    return run.stderr


@functools.lru_cache(maxsize=None)
def _available() -> list:
    """The names that this build has and this processor can run, the one that it chooses first."""
    return re.search(r"CBAM_FUSED_ISA must be one of (.*) on this processor", _refusal())[1].split(", ")


def _skip_unless_available(name):
    if (reason := backends()["cpu"]) is not True:
        pytest.skip(f"no CPU kernels: {reason}")
    if name not in _available():
        pytest.skip(f"{name} is none of {', '.join(_available())}, which this build has for this processor")


@pytest.mark.parametrize("name", ["avx512", "avx2", "baseline"])
def test_against_the_reference(name):
    _skip_unless_available(name)
    own = _available()[0]
    if name == own:
        pytest.skip("this processor's own, which the other tests run")
    # avx512_bf16 has kernels of its own for bfloat16 alone.
    cases = f"{CASES} and bfloat16" if (name, own) == ("avx512", "avx512_bf16") else CASES
    file = str(HERE / "test_forward_backward.py")
    run = _run(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", cases], name)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    if cases == CASES:
        assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 300
    else:
        assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 50


# The last pass alone, with gates as they are given, on every 16-bit number there is: y is the exact rounding of
# the float32 product, bit by bit, subnormal numbers, infinities and NaN included. Three samples: gates at random,
# and gates whose products are ties (1.5) or are rounded up, to infinity too (1 + 2**-8), under a spatial gate of 1.
ROUNDING = """
import sys, torch, cbam_fused
assert cbam_fused.backends()["cpu"] is True
dtype = getattr(torch, sys.argv[1])
x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 16, 64, 64)
x = x.repeat(3, 1, 1, 1)
torch.manual_seed(0)
gate = torch.stack([torch.rand(16), torch.full((16,), 1.5), torch.full((16,), 1 + 2**-8)])
z = torch.cat([torch.randn(1, 1, 64, 64), torch.full((2, 1, 64, 64), 100.0)])
for x in (x, x.to(memory_format=torch.channels_last)):
    y, s = torch.ops.cbam_fused_cpu.scale_forward(x, gate, z, False)
    assert (s[1:] == 1).all()
    product = x.float() * gate.reshape(3, 16, 1, 1) * s
    expected = product.to(dtype)
    assert (expected.isinf() & product.isfinite()).any() and (expected.float() != product).any()
    wrong = (y.view(torch.int16) != expected.view(torch.int16)) & ~(y.isnan() & expected.isnan())
    assert not wrong.any(), (x[wrong][:4], y[wrong][:4], expected[wrong][:4])
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["avx512_bf16", "avx512", "avx2", "baseline"])
def test_rounding_of_every_16_bit_number(name, dtype):
    _skip_unless_available(name)
    run = _run(["-c", ROUNDING, dtype], name)
    assert run.returncode == 0, run.stderr[-2000:]


def test_an_unknown_name_is_an_error():
    if (reason := backends()["cpu"]) is not True:
        pytest.skip(f"no CPU kernels: {reason}")
    assert re.search(r"CBAM_FUSED_ISA must be one of .*baseline on this processor, got avx1024", _refusal())
