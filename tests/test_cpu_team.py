"""The phases in which the CPU backend's threads share work, under the thread sanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("cpu_team.cpp")


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_every_part_once_and_phase_by_phase(tmp_path, sanitizer):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "team"
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Werror", f"-fsanitize={sanitizer}", "-pthread"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(program)], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stdout == "ok\n", run.stdout + run.stderr[-4000:]
