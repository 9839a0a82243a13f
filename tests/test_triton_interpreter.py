"""Triton kernels against the reference: on the GPU where there is one, else in Triton's interpreter.

Triton decides at import whether it interprets, for the whole process. So without a GPU, and without
TRITON_INTERPRET=1 from outside, the cases of triton_cases.py run in a session of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

if torch.cuda.is_available():
    pytestmark = pytest.mark.gpu
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    from triton_cases import *  # noqa: F403
else:

    def test_cases_in_interpreter():
        cases = Path(__file__).with_name("triton_cases.py")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(cases)]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=cases.parent.parent
        )
        assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
        assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 450, run.stdout[-2000:]
