"""What nvcc makes of the resident kernels: registers, shared memory, bulk copies and wide accesses."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import test_cuda_compile as streamed

pytestmark = pytest.mark.skipif(streamed.NVCC is None, reason="there is no nvcc")

# One or two an architecture, together each split, layout and width; those that need most registers, backward.
CASES = (
    ("forward", "BFloat16, 8, kContiguous, kByPositions", "sm_90a"),
    ("backward", "BFloat16, 8, kContiguous, kByPositions", "sm_90a"),
    ("backward", "BFloat16, 4, kContiguous, kByChannels", "sm_100a"),
    ("forward", "Half, 8, kChannelsLast, kByPositions", "sm_100a"),
    ("backward", "BFloat16, 8, kContiguous, kByPositions", "sm_120"),
    ("forward", "float, 4, kContiguous, kByChannels", "sm_120"),
)


def _compile(folder: Path, direction: str, traits: str, arch: str):
    source = folder / "kernel.cu"
    source.write_text(
        f'#include "resident_{direction}.cuh"\nusing namespace cbam;\nusing namespace cbam::resident;\n'
        f"template __global__ void cbam::resident::resident_{direction}_kernel<Traits<{traits}>>"
        "(const __grid_constant__ Resident);\n"
    )
    cubin = folder / "kernel.cubin"
    command = [
        streamed.NVCC,
        "-std=c++17",
        "-O3",
        f"-arch={arch}",
        f"-I{streamed.SOURCES}",
        "--ptxas-options=-v",
        "-cubin",
    ]
    run = subprocess.run([*command, "-o", cubin, source], capture_output=True, text=True)
    if "Unsupported gpu architecture" in run.stderr or "not defined for option" in run.stderr:
        pytest.skip(f"this nvcc does not know {arch}")
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr
    return cubin, run.stderr


@pytest.mark.parametrize("direction, traits, arch", CASES, ids=lambda v: re.sub(r"\W+", "-", v))
def test_resources_and_copies(tmp_path, direction, traits, arch):
    """No spills, no stack, 512 threads a multiprocessor, no static shared memory that the plan does not count;
    bulk copies and cluster barriers; x, dy, y and dx are touched in no other width than the traits'."""
    cubin, report = _compile(tmp_path, direction, traits, arch)
    numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert [int(n) for n in numbers.groups()] == [0, 0, 0], report
    assert int(re.search(r"Used (\d+) registers", report)[1]) <= 65536 // 512
    assert "bytes smem" not in report, report
    tool = streamed._tool("nvdisasm")
    if tool is None:
        pytest.skip("there is no nvdisasm to look at the machine code with")
    sass = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"\bUBLKCP\b", sass)) >= (1 if direction == "forward" else 2)
    assert re.search(r"\bUCGABAR", sass) and re.search(r"\bSYNCS\b", sass)
    width = "64" if ", 4, kContiguous, kByChannels" in traits and "BFloat16" in traits else "128"
    # y and dx leave by streaming stores alone, x and dy come by bulk copies alone: no load is as wide.
    assert set(re.findall(r"\bSTG\.E\.EF(\S*)", sass)) == {f".{width}"}
    assert not re.findall(r"\bLDG\S*\.(?:64|128)\b", sass)
    assert len(re.findall(rf"\bLDS\.{width}\b", sass)) >= (3 if direction == "forward" else 4)
    assert not re.search(r"\b(LDL|STL)\b", sass)


@pytest.mark.parametrize(
    "direction, arch", (("forward", "sm_80"), ("backward", "sm_86"), ("backward", "sm_89"))
)
def test_older_devices_get_an_empty_kernel(tmp_path, direction, arch):
    """One binary serves all architectures: below sm_90 the kernels compile, to nothing."""
    cubin, _ = _compile(tmp_path, direction, "float, 4, kContiguous, kByPositions", arch)
    tool = streamed._tool("nvdisasm")
    if tool is None:
        pytest.skip("there is no nvdisasm to look at the machine code with")
    sass = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    assert "EXIT" in sass and not re.search(r"\b(LDG|STG|LDS|STS)\b", sass)
