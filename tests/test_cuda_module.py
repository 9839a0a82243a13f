"""The native module `_C_cuda`: what leaves it out, and that it links, loads and registers its ops without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cbam_fused import _ops

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = "cbam_fused: built without the CUDA kernels: "
# What a library on LibTorch's stable ABI may ask of others: its C shims, CUDA's runtime, and the C and C++
# libraries: symbols with their version, or in namespace std.
STABLE = re.compile(
    r"(aoti_torch|torch)_\w+|_ZNK?St\w+|_ITM_\w+|__gmon_start__|.*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+"
)
CUDART = re.compile(r"(__cuda|cuda)\w+(@.*)?")


def _setup(folder: Path, *arguments: str, before: str = "", **environment: str):
    code = f"import runpy, sys; sys.argv = ['setup.py', *{arguments!r}]; {before}\nrunpy.run_path('setup.py')"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={
            **os.environ,
            "PATH": os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])),
            **environment,
        },
        capture_output=True,
        text=True,
    )


LEAVES_OUT = {
    "not wanted": ("", "0", "CBAM_FUSED_CUDA=0"),
    "torch without CUDA": ("import torch; torch.version.cuda = None", "", "is built without CUDA"),
    "another CUDA": (
        "import torch; torch.version.cuda = '9.2'",
        "",
        r"nvcc is \d+\.\d+ and torch is built with CUDA 9\.2|no CUDA toolkit \(bin/nvcc",
    ),
}


@pytest.mark.parametrize("before, wish, reason", LEAVES_OUT.values(), ids=LEAVES_OUT)
def test_what_cannot_be_built_is_left_out_with_one_line(before, wish, reason):
    out = _setup(ROOT, "-q", "--version", before=before, CBAM_FUSED_CUDA=wish, CBAM_FUSED_CPU="0")
    assert out.returncode == 0, out.stderr
    lines = [line for line in out.stderr.splitlines() if line.startswith("cbam_fused: ")]
    assert len(lines) == 1 and lines[0].startswith(LEFT_OUT) and re.search(reason, lines[0]), out.stderr


def test_what_is_asked_for_and_cannot_be_built_is_an_error():
    before = "import torch; torch.version.cuda = None"
    out = _setup(ROOT, "-q", "--version", before=before, CBAM_FUSED_CUDA="1", CBAM_FUSED_CPU="0")
    assert out.returncode != 0 and "CBAM_FUSED_CUDA=1, but torch" in out.stderr


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> Path:
    """`_C_cuda` for sm_90a, in a copy of the package; unoptimised, since it will not be run."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("csrc", "cbam_fused"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    out = _setup(
        folder, "build_ext", "--inplace", CBAM_FUSED_CUDA="", CBAM_FUSED_CPU="0", TORCH_CUDA_ARCH_LIST="9.0a",
        NVCC_APPEND_FLAGS="-Xcicc -O1 -Xptxas -O0",
    )  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr
    left_out = re.search(re.escape(LEFT_OUT) + ".*", out.stderr)
    if left_out:
        pytest.skip(left_out[0])
    (library,) = (folder / "cbam_fused").glob("_C_cuda*.so")
    return library


def test_asks_for_nothing_but_stable_symbols(module):
    out = subprocess.run(["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True)
    symbols = {line.split()[-1] for line in out.stdout.splitlines()}
    assert symbols & {"aoti_torch_get_current_cuda_stream"}
    assert not [s for s in symbols if not STABLE.fullmatch(s) and not CUDART.fullmatch(s)]


def test_loads_and_registers_its_ops(module):
    """With every symbol resolved at once, in a process without a device as in one with."""
    code = f"""
import ctypes, os, torch
library = ctypes.CDLL({str(module)!r}, mode=os.RTLD_NOW | os.RTLD_LOCAL)
library.cbam_fused_cuda_missing_code.restype = ctypes.c_char_p
library.cbam_fused_cuda_missing_code()  # says nothing of a machine without a device
import cbam_fused
assert cbam_fused.__file__.startswith({str(module.parent)!r}), cbam_fused.__file__
found = cbam_fused.backends()["cuda"]
expected = True if torch.cuda.is_available() else "torch finds no CUDA device"
assert found == expected, found
for name in {tuple(_ops.SCHEMAS)!r}:
    op = "cbam_fused_cuda::" + name
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"), op
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU"), op
"""
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=module.parents[1], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(module.parents[1])},
    )  # fmt: skip
    assert out.returncode == 0, out.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_is_there_where_a_gpu_is():
    """A machine with a GPU and the toolkit runs the kernels, or says why not; a test run there must not skip them."""
    from cbam_fused import _backends, backends

    assert backends()["cuda"] is True and _backends._cuda_missing_code(0) is None
