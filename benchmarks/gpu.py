"""Everything that only a machine with a GPU can show, in one command; each part's outcome at the end.

    python benchmarks/gpu.py [--skip tests sanitizer bars] [--tools memcheck ...] [--sanitized tests/test_ops.py ...]
                             [--backends cuda triton]

1. the whole test suite, and what launches kernels (`pytest -m gpu`) once more with the CUDA backend's resident tier
wherever it fits, which small batches would leave for the streamed one; 2. the same tests with and without that, under
each of compute-sanitizer's four tools, which takes hours: --sanitized names fewer files; 3. the bars at N = 32, bfloat16,
(256, 56, 56): forward and backward against a copy on the same device, a forward and a training step against plain
PyTorch, eager and compiled with mode="max-autotune", for each of the two backends. A result is judged against float64
before it is timed.
Without a GPU it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Dict, List, Tuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gate import Gate, make_inputs  # noqa: E402
from benchmarks.measure import Step, candidate_step, copy_step, time_interleaved  # noqa: E402
from benchmarks.providers import Candidate, build, fused_candidate, make_weights  # noqa: E402
from benchmarks.shapes import Case  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SHAPE, SAMPLES = (256, 56, 56), 32
ROUNDS = 50
# What is measured, as a ratio, and the least that it has to be, by backend.
BARS = {
    "cuda": {
        "forward: share of the copy's bandwidth": 0.85,
        "backward: share of the copy's bandwidth": 0.75,
        "forward: times as fast as eager": 5.0,
        "forward: times as fast as compiled": 2.0,
        "training step: times as fast as eager": 5.0,
        "training step: times as fast as compiled": 2.0,
    },
    "triton": {
        "forward: share of the copy's bandwidth": 0.6,
        "forward: times as fast as eager": 4.0,
        "forward: times as fast as compiled": 1.5,
    },
}


RESIDENT = {"CBAM_FUSED_TIER": "resident"}


def run(name: str, command: List[str], outcomes: Dict[str, bool], **settings: str) -> None:
    print(f"\n{name}: {' '.join((*(f'{k}={v}' for k, v in settings.items()), *command))}", flush=True)
    outcomes[name] = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}).returncode == 0


def sanitizer() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    return found or "compute-sanitizer"


def candidates(case: Case, backend: str) -> Tuple[List[Candidate], torch.Tensor, torch.Tensor]:
    """Eager, compiled with max-autotune, and fused, each with the same weights; x and dy."""
    weights = make_weights(case)
    x, dy = make_inputs(case, weights)
    eager, plain = build(case, ("eager", "eager"), weights)[0]
    compiled = torch.compile(plain.owner, mode="max-autotune", dynamic=False)
    fused = fused_candidate(case, weights, backend)
    verdict = Gate(case, weights, x, dy, rounds_once=not case.norm).check(fused)
    print(f"gate, {case.mode}: {verdict}", flush=True)
    if not verdict.green:
        raise SystemExit("the fused result is wrong: nothing is timed")
    return [eager, Candidate("compile", compiled, plain.owner, case.threads), fused], x, dy


def times(what: str, case: Case, steps: List[Step]) -> Dict[str, float]:
    """Median milliseconds of each step."""
    time_interleaved(case, steps, ROUNDS, math.inf)
    print(what, ", ".join(f"{s.label} {s.median:.4f} ms" for s in steps), flush=True)
    return {s.label: s.median for s in steps}


def measure(infer: Case, backend: str) -> Dict[str, float]:
    """All ratios that BARS names, for a case and its training twin."""
    found, x, dy = candidates(infer, backend)
    forward = times(
        "forward", infer, [copy_step(infer, x, dy), *(candidate_step(infer, c, x, dy) for c in found)]
    )
    training = replace(infer, mode="train")
    found, x, dy = candidates(training, backend)
    train = times("training step", training, [candidate_step(training, c, x, dy) for c in found])
    fused, leaf = found[-1], x.detach().requires_grad_()
    y, wanted = fused.module(leaf), (leaf, *fused.owner.parameters())

    def backward() -> None:
        torch.autograd.grad(y, wanted, dy, retain_graph=True)

    alone = times("backward", training, [Step(fused.label, backward, training.threads)])
    print(f"copy: {2 * infer.x_bytes / forward['copy'] / 1e6:.0f} GB/s", flush=True)
    return {
        # Forward moves as many bytes as the copy, backward half as many again.
        "forward: share of the copy's bandwidth": forward["copy"] / forward["fused"],
        "backward: share of the copy's bandwidth": 1.5 * forward["copy"] / alone["fused"],
        "forward: times as fast as eager": forward["eager"] / forward["fused"],
        "forward: times as fast as compiled": forward["compile"] / forward["fused"],
        "training step: times as fast as eager": train["eager"] / train["fused"],
        "training step: times as fast as compiled": train["compile"] / train["fused"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--skip", nargs="+", default=[], choices=["tests", "sanitizer", "bars"])
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS)
    parser.add_argument("--sanitized", nargs="+", default=["tests"], help="test files; default: all")
    parser.add_argument("--backends", nargs="+", default=list(BARS), choices=list(BARS), help="whose bars")
    a = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no CUDA device: nothing here can be measured", file=sys.stderr)
        raise SystemExit(2)
    outcomes: Dict[str, bool] = {}
    python = [sys.executable, "-m", "pytest", "-q"]
    if "tests" not in a.skip:
        run("tests", python, outcomes)
        run("tests, resident tier", [*python, "-m", "gpu"], outcomes, **RESIDENT)
    if "sanitizer" not in a.skip:
        for tool in a.tools:
            command = [sanitizer(), "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
            # A profiler and the sanitizers cannot both watch a process.
            command += [*python, *a.sanitized, "-m", "gpu", "-k", "not resident_tier_runs"]
            run(f"compute-sanitizer {tool}", command, outcomes)
            run(f"compute-sanitizer {tool}, resident tier", command, outcomes, **RESIDENT)
    if "bars" not in a.skip:
        for backend in a.backends:
            print(f"\nbars of {backend}", flush=True)
            found = measure(Case("gpu", SAMPLES, SHAPE, "infer", "bfloat16", device="cuda"), backend)
            for name, bar in BARS[backend].items():
                outcomes[f"{backend}, {name}: {found[name]:.2f}, bar {bar:g}"] = found[name] >= bar
    print(f"\n{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    for name, passed in outcomes.items():
        print(f"  {'pass' if passed else 'FAIL'}  {name}")
    raise SystemExit(not all(outcomes.values()))


if __name__ == "__main__":
    main()
