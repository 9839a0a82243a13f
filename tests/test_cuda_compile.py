"""What nvcc makes of the CUDA kernels: resources on every architecture, and the accesses of the hot loops."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
NVCC = next(
    (
        p
        for p in (
            os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc"),
            shutil.which("nvcc"),
        )
        if p and os.path.exists(p)
    ),
    None,
)
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")

# One instantiation an architecture: each takes half a minute. All of them together cover each kind.
CASES = (
    ("forward", "BFloat16, 8, kContiguous, false", "sm_80"),
    ("backward", "BFloat16, 8, kContiguous, false", "sm_90a"),
    ("forward", "float, 4, kChannelsLast, false", "sm_86"),
    ("backward", "BFloat16, 8, kChannelsLast, false", "sm_100a"),
    ("forward", "Half, 8, kContiguous, true", "sm_89"),
    ("backward", "float, 4, kContiguous, true", "sm_120"),
)


def _tool(name: str):
    found = shutil.which(name) or (shutil.which(name, path=os.path.dirname(NVCC)) if NVCC else None)
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else None


def _compile(tmp_path: Path, direction: str, traits: str, arch: str):
    source = tmp_path / "kernel.cu"
    source.write_text(
        f'#include "streamed_{direction}.cuh"\nusing namespace cbam;\n'
        f"template __global__ void cbam::streamed_{direction}_kernel<StreamedTraits<{traits}>>(const Streamed);\n"
    )
    cubin = tmp_path / "kernel.cubin"
    run = subprocess.run(
        [
            NVCC,
            "-std=c++17",
            "-O3",
            f"-arch={arch}",
            f"-I{SOURCES}",
            "--ptxas-options=-v",
            "-cubin",
            "-o",
            cubin,
            source,
        ],
        capture_output=True,
        text=True,
    )
    if "Unsupported gpu architecture" in run.stderr or "not defined for option" in run.stderr:
        pytest.skip(f"this nvcc does not know {arch}")
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr
    return cubin, run.stderr


@pytest.mark.parametrize("direction, traits, arch", CASES, ids=lambda v: re.sub(r"\W+", "-", v))
def test_resources_and_vector_accesses(tmp_path, direction, traits, arch):
    """No spills, no stack, two blocks of 256 threads a multiprocessor, 128-bit accesses of x, dy, y and dx."""
    cubin, report = _compile(tmp_path, direction, traits, arch)
    numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert [int(n) for n in numbers.groups()] == [0, 0, 0], report
    assert int(re.search(r"Used (\d+) registers", report)[1]) <= 65536 // (2 * 256)
    tool = _tool("nvdisasm")
    if tool is None:
        pytest.skip("there is no nvdisasm to look at the machine code with")
    sass = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    loads = re.findall(r"\bLDG\.E(\S*)", sass)
    stores = re.findall(r"\bSTG\.E(\S*)", sass)
    # Each pass over x unrolls a load of 16 bytes and its remainder; an output is stored in no other way.
    assert sum("128" in m for m in loads) >= (6 if direction == "forward" else 4)
    assert any("128" in m for m in stores)
    assert not re.search(r"\b(LDL|STL)\b", sass)
