"""What nvcc makes of the resident kernels: registers, shared memory, bulk copies and wide accesses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import test_cuda_compile as streamed

pytestmark = pytest.mark.skipif(streamed.NVCC is None, reason="there is no nvcc")

# One or two an architecture, together each split, layout and width; those that need most registers, backward.
CASES = (
    ("forward", "BFloat16, 8, kContiguous, kByPositions", "sm_90a"),
    ("backward", "BFloat16, 8, kContiguous, kByPositions", "sm_90a"),
    ("backward", "BFloat16, 4, kContiguous, kByChannels", "sm_100a"),
    ("forward", "Half, 1, kContiguous, kByChannels", "sm_90a"),
    ("backward", "float, 1, kContiguous, kByChannels", "sm_90a"),
    ("forward", "Half, 8, kChannelsLast, kByPositions", "sm_100a"),
    ("backward", "BFloat16, 8, kContiguous, kByPositions", "sm_120"),
    ("forward", "float, 4, kContiguous, kByChannels", "sm_120"),
)


def _compile(folder: Path, direction: str, traits: str, arch: str):
    return streamed.compile_kernels(
        folder,
        f'#include "resident_{direction}.cuh"\nusing namespace cbam;\nusing namespace cbam::resident;\n'
        f"template __global__ void cbam::resident::resident_{direction}_kernel<Traits<{traits}>>"
        "(const __grid_constant__ Resident);\n",
        arch,
    )


@pytest.mark.parametrize("direction, traits, arch", CASES, ids=lambda v: re.sub(r"\W+", "-", v))
def test_resources_and_copies(tmp_path, direction, traits, arch):
    """No spills, no stack, 512 threads a multiprocessor, no static shared memory that the plan does not count; cluster
    barriers; x and dy come by bulk copies, y and dx leave 128 bits at a time, or by bulk copies of a staged tile."""
    cubin, (kernel,) = _compile(tmp_path, direction, traits, arch)
    assert kernel.fault() == ""
    sass = streamed.machine_code(cubin)
    element, vector = re.match(r"(\w+), (\d)", traits).groups()
    width = int(vector) * (32 if element == "float" else 16)
    staged = width < 128
    copies = re.findall(r"\bUBLKCP(\S*)", sass)
    assert sum(".S.G" in c for c in copies) >= (1 if direction == "forward" else 2)
    assert any(".G.S" in c for c in copies) == staged
    assert re.search(r"\bUCGABAR", sass) and re.search(r"\bSYNCS\b", sass)
    # Streaming stores are those of y and dx.
    assert set(re.findall(r"\bSTG\.E\.EF(\S*)", sass)) == (set() if staged else {".128"})
    # The MLP's weights come 128 bits at a time, too.
    assert re.search(r"\bLDG\.E\.128\.CONSTANT\b", sass)
    if width >= 64:
        assert len(re.findall(rf"\bLDS\.{width}\b", sass)) >= (3 if direction == "forward" else 4)
    assert not re.search(r"\b(LDL|STL)\b", sass)


@pytest.mark.parametrize(
    "direction, arch", (("forward", "sm_80"), ("backward", "sm_86"), ("backward", "sm_89"))
)
def test_older_devices_get_an_empty_kernel(tmp_path, direction, arch):
    """One binary serves all architectures: below sm_90 the kernels compile, to nothing."""
    cubin, _ = _compile(tmp_path, direction, "float, 4, kContiguous, kByPositions", arch)
    sass = streamed.machine_code(cubin)
    assert "EXIT" in sass and not re.search(r"\b(LDG|STG|LDS|STS)\b", sass)
