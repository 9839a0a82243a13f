"""What nvcc makes of the CUDA kernels: resources on every architecture, and the accesses of the hot loops."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import cuda_resources  # noqa: E402

SOURCES = cuda_resources.SOURCES
NVCC = cuda_resources.find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")

# For every architecture that setup.py builds for, some of its kernels: on Hopper all 16-bit ones with vectors, which are
# short of registers, and together each element type, layout and kind of rows in both directions. A kernel takes four
# seconds to eighteen; benchmarks/cuda_resources.py compiles all of them.
BF16 = tuple(
    f"BFloat16, 8, {t}"
    for t in ("kContiguous, kWhole", "kContiguous, kFolded", "kChannelsLast, kWhole", "kContiguous, kRagged")
)
CASES = {
    "sm_80": {"forward": BF16[:1], "backward": ("double, 2, kChannelsLast, kWhole", BF16[2])},
    "sm_86": {
        "forward": ("float, 4, kChannelsLast, kWhole",),
        "backward": ("Half, 8, kContiguous, kFolded",),
    },
    "sm_89": {
        "forward": ("Half, 8, kContiguous, kFolded",),
        "backward": ("float, 4, kContiguous, kFolded", "Half, 8, kChannelsLast, kWhole"),
    },
    "sm_90a": {"forward": BF16, "backward": BF16},
    "sm_100a": {"forward": ("double, 2, kContiguous, kWhole",), "backward": BF16[1:3]},
    "sm_120": {"forward": (BF16[2],), "backward": (BF16[3], "float, 4, kContiguous, kWhole")},
}


RAGGED = r"_?4RowsE2E"  # in a mangled name


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


def compile_kernels(folder: Path, text: str, arch: str):
    """The cubin of these instantiations, and what ptxas reports of each."""
    source, cubin = folder / "kernels.cu", folder / "kernels.cubin"
    source.write_text(text)
    assert NVCC is not None
    try:
        report = cuda_resources.compile_report(NVCC, source, arch, cubin)
    except subprocess.CalledProcessError as error:
        if "Unsupported gpu architecture" in error.stderr or "not defined for option" in error.stderr:
            pytest.skip(f"this nvcc does not know {arch}")
        raise AssertionError(error.stderr) from error
    assert "warning" not in report, report
    return cubin, cuda_resources.read_report(report)


def machine_code(cubin: Path) -> str:
    tool = _tool("nvdisasm")
    if tool is None:
        pytest.skip("there is no nvdisasm to look at the machine code with")
    return subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout


def test_every_architecture_of_the_default_build_is_here():
    assert cuda_resources.default_architectures() == list(CASES)


@pytest.mark.parametrize("arch", CASES)
def test_resources_and_vector_accesses(tmp_path, arch):
    """No spills, no stack, the blocks a multiprocessor that the traits want, 128-bit accesses of x, dy, y and dx."""
    text = "".join(f'#include "streamed_{direction}.cuh"\n' for direction in CASES[arch])
    text += "using namespace cbam;\n" + "".join(
        f"template __global__ void cbam::streamed_{direction}_kernel<StreamedTraits<{t}>>(const Streamed);\n"
        for direction, traits in CASES[arch].items()
        for t in traits
    )
    cubin, kernels = compile_kernels(tmp_path, text, arch)
    for direction, traits in CASES[arch].items():
        assert sum(k.direction == direction for k in kernels) == len(traits)
    assert [str(k) for k in kernels if k.fault()] == []
    sass = machine_code(cubin)
    assert not re.search(r"\b(LDL|STL)\b", sass)
    functions = re.split(r"^\s*\.section\s+\.text\.", sass, flags=re.MULTILINE)[1:]
    assert len(functions) == len(kernels)
    for text in functions:
        header = text.splitlines()[0]
        # What is read for the last time, and what is written: dy, x and y or dx, and nothing else, carry EF. Ragged
        # rows have elements at both ends beside their vectors.
        loads, stores = (re.findall(rf"\b{op}\.E\.EF\S*", text) for op in ("LDG", "STG"))
        ragged = bool(re.search(RAGGED, header))
        ends = {f"{op}.E.EF.U16" for op in ("LDG", "STG") if ragged}
        assert {*loads, *stores} - ends == {"LDG.E.EF.128", "STG.E.EF.128"}, header
        # Each pass unrolls a load and its remainder.
        last_use = loads.count("LDG.E.EF.128")
        first_use = len(re.findall(r"\bLDG\.E\.128\.CONSTANT", text))
        forward = "streamed_forward_kernel" in header
        assert last_use >= (4 if forward else 10) and first_use >= 10, (header, last_use, first_use)


REPORT = """ptxas info    : Compiling entry function '{name}' for 'sm_90a'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {stack} bytes spill stores, 4 bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, {smem} bytes smem, 1632 bytes cmem[0]
"""
STREAMED = "_ZN4cbam24streamed_backward_kernelINS_14StreamedTraitsINS_8BFloat16ELi8ELNS_6LayoutE0ELb1EEEEEvNS_8StreamedE"
RESIDENT = "_ZN4cbam8resident23resident_forward_kernelINS0_6TraitsIfLi4ELNS_6LayoutE1ELNS0_5SplitE0EEEEEvNS0_8ResidentE"


def test_a_report_is_read_and_judged():
    text = REPORT.format(name=STREAMED, stack=8, registers=128, smem=1408)
    text += REPORT.format(name=RESIDENT, stack=0, registers=129, smem=0).replace(
        "4 bytes spill", "0 bytes spill"
    )
    spilled, wide = cuda_resources.read_report(text)
    assert spilled[:5] == ("streamed", "backward", "BFloat16, 8, contiguous, folded", 128, 8)
    assert spilled.fault() == "8 bytes of stack, 8 + 4 spilled"
    assert wide[:3] == ("resident", "forward", "float, 4, channels_last, by positions")
    assert wide.fault() == "129 registers, 128 leave the blocks that are wanted"
    clean = wide._replace(registers=128)
    assert clean.fault() == ""
    assert clean._replace(static_shared=16).fault() == "16 bytes of static shared memory, at most 0"
    assert spilled._replace(stack=0, spill_stores=0, spill_loads=0).fault() == ""
    with pytest.raises(ValueError, match="nothing about a kernel"):
        cuda_resources.read_report("ptxas info : 0 bytes gmem")
    with pytest.raises(ValueError, match="ptxas does not say .*stack frame"):
        cuda_resources.read_report(text.replace("stack frame", "of stack"))


def test_the_table_of_resources(monkeypatch, capsys):
    """A row for each file on each architecture, and the exit status of what misses."""
    reports = {"streamed_backward_bfloat16": REPORT.format(name=STREAMED, stack=8, registers=128, smem=1408)}
    reports["resident_forward_float32"] = REPORT.format(
        name=RESIDENT, stack=0, registers=100, smem=0
    ).replace("4 bytes spill", "0 bytes spill")
    monkeypatch.setattr(cuda_resources, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(
        cuda_resources, "compile_report", lambda nvcc, source, arch, cubin: reports[source.stem]
    )
    assert cuda_resources.main(["--arch", "sm_90a", "sm_120", "--files", "resident_forward_float32"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split() for row in rows[1:3]] == [
        [arch, "resident_forward_float32", "1", "100", "0", "0", "0"] for arch in ("sm_90a", "sm_120")
    ]
    assert rows[3].startswith("2 kernels in ") and rows[3].endswith("0 miss")
    assert cuda_resources.main(["--arch", "sm_90a", "--files", *reports, "--each"]) == 1
    assert "8 bytes of stack, 8 + 4 spilled" in capsys.readouterr().out
