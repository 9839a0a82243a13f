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

# For every architecture that setup.py builds for, a forward and a backward: all of them together cover each
# element type, layout and folded rows in both directions. Each pair takes 15 seconds.
CASES = {
    "sm_80": ("BFloat16, 8, kContiguous, false", "double, 2, kChannelsLast, false"),
    "sm_86": ("float, 4, kChannelsLast, false", "Half, 8, kContiguous, true"),
    "sm_89": ("Half, 8, kContiguous, true", "float, 4, kContiguous, true"),
    "sm_90a": ("BFloat16, 8, kChannelsLast, false", "BFloat16, 8, kContiguous, false"),
    "sm_100a": ("double, 2, kContiguous, false", "BFloat16, 8, kChannelsLast, false"),
    "sm_120": ("Half, 8, kContiguous, false", "float, 4, kContiguous, false"),
}
DIRECTIONS = ("forward", "backward")


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


def _compile(tmp_path: Path, traits, arch: str):
    source = tmp_path / "kernels.cu"
    source.write_text(
        "".join(f'#include "streamed_{d}.cuh"\n' for d in DIRECTIONS)
        + "using namespace cbam;\n"
        + "".join(
            f"template __global__ void cbam::streamed_{d}_kernel<StreamedTraits<{t}>>(const Streamed);\n"
            for d, t in zip(DIRECTIONS, traits)
        )
    )
    cubin = tmp_path / "kernels.cubin"
    run = subprocess.run(
        [
            NVCC, "-std=c++17", "-O3", f"-arch={arch}", f"-I{SOURCES}", "--ptxas-options=-v", "-cubin", "-o", cubin,
            source,
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    if "Unsupported gpu architecture" in run.stderr or "not defined for option" in run.stderr:
        pytest.skip(f"this nvcc does not know {arch}")
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr
    return cubin, run.stderr


def test_every_architecture_of_the_default_build_is_here():
    newest = re.search(r'"([\d.;a]+)\+PTX"', (SOURCES.parents[1] / "setup.py").read_text())[1]
    assert [f"sm_{a.replace('.', '')}" for a in newest.split(";")] == list(CASES)


@pytest.mark.parametrize("arch", CASES)
def test_resources_and_vector_accesses(tmp_path, arch):
    """No spills, no stack, the blocks a multiprocessor that the traits want, 128-bit accesses of x, dy, y and dx."""
    cubin, report = _compile(tmp_path, CASES[arch], arch)
    kernels = re.split(r"Compiling entry function", report)[1:]
    assert len(kernels) == len(DIRECTIONS), report
    limit = int(re.search(r"kStaticShared = (\d+) << 10", (SOURCES / "streamed.h").read_text())[1]) << 10
    for direction, traits in zip(DIRECTIONS, CASES[arch]):
        (text,) = (k for k in kernels if f"streamed_{direction}_kernel" in k)
        numbers = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
        )
        assert [int(n) for n in numbers.groups()] == [0, 0, 0], text
        blocks = 1 if traits.startswith("double") else 2
        assert int(re.search(r"Used (\d+) registers", text)[1]) <= 65536 // (blocks * 256), text
        assert int(re.search(r"(\d+) bytes smem", text)[1]) <= limit, text
    tool = _tool("nvdisasm")
    if tool is None:
        pytest.skip("there is no nvdisasm to look at the machine code with")
    sass = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(LDL|STL)\b", sass)
    functions = re.split(r"^\s*\.section\s+\.text\.", sass, flags=re.MULTILINE)[1:]
    for direction in DIRECTIONS:
        (text,) = (f for f in functions if f"streamed_{direction}_kernel" in f.splitlines()[0])
        # Each pass over x unrolls a load of 16 bytes and its remainder; an output is stored in no other way.
        loads, stores = (re.findall(rf"\b{op}\.E(\S*)", text) for op in ("LDG", "STG"))
        assert sum("128" in m for m in loads) >= (6 if direction == "forward" else 4)
        assert any("128" in m for m in stores)
