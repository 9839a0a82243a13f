"""The CPU kernels are valid C++17, without a warning of the front end, to GCC and to Clang alike, on x86-64 and ARM."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cpu"
INCLUDES = Path(torch.__file__).resolve().parent / "include"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{INCLUDES}"]
# A cross compiler stands for a processor without the instructions of the other files.
FILES = {
    "g++": ["isa_baseline.cpp", "isa_avx2.cpp", "isa_avx512.cpp", "isa_avx512_bf16.cpp", "ops.cpp"],
    "clang++": ["isa_baseline.cpp", "isa_avx2.cpp", "isa_avx512.cpp", "isa_avx512_bf16.cpp", "ops.cpp"],
    "aarch64-linux-gnu-g++": ["isa_baseline.cpp", "ops.cpp"],
}


@pytest.mark.parametrize("compiler, file", [(c, f) for c, files in FILES.items() for f in files])
def test_compiles(compiler, file):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not on the PATH")
    command = [compiler, "-std=c++17", "-O3", "-Wall", "-Werror", "-fsyntax-only", *STABLE_ABI, file]
    done = subprocess.run(
        command, cwd=SOURCES, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[:4000]
