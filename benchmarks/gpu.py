"""Everything that only a machine with a GPU can show, in one command; each part's outcome at the end.

    python benchmarks/gpu.py [--skip tests sanitizer bars] [--tools memcheck ...]

1. the whole test suite; 2. the tests that launch kernels, under compute-sanitizer's four tools; 3. the bars at
N = 32, bfloat16, (256, 56, 56): forward and backward against a copy on the same device, a forward and a training
step against plain PyTorch, eager and compiled with mode="max-autotune". A result is judged against
float64 before it is timed. Without a GPU it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gate import Gate, make_inputs  # noqa: E402
from benchmarks.providers import Candidate, build, fused_candidate, make_weights  # noqa: E402
from benchmarks.shapes import Case  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Tests whose problems a sanitizer ends with in minutes.
SANITIZED = ("tests/test_forward_backward.py", "tests/test_ops.py")
SHAPE, SAMPLES = (256, 56, 56), 32
ROUNDS, WARM_UP = 50, 5
# What is measured, as a ratio, and the least that it has to be.
BARS = {
    "forward: share of the copy's bandwidth": 0.85,
    "backward: share of the copy's bandwidth": 0.75,
    "forward: times as fast as eager": 5.0,
    "forward: times as fast as compiled": 2.0,
    "training step: times as fast as eager": 5.0,
    "training step: times as fast as compiled": 2.0,
}


def run(name: str, command: List[str], outcomes: Dict[str, bool]) -> None:
    print(f"\n{name}: {' '.join(command)}", flush=True)
    outcomes[name] = subprocess.run(command, cwd=ROOT).returncode == 0


def sanitizer() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    return found or "compute-sanitizer"


def times(jobs: Dict[str, Callable[[], object]]) -> Dict[str, float]:
    """Median milliseconds of each job, interleaved, each with a cache full of other data."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    other = torch.empty(2 * l2, dtype=torch.uint8, device="cuda")
    measured: Dict[str, List[float]] = {name: [] for name in jobs}
    for i in range(WARM_UP + ROUNDS):
        for name, job in jobs.items():
            other.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            job()
            end.record()
            end.synchronize()
            if i >= WARM_UP:
                measured[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in measured.items()}


def candidates(case: Case) -> Tuple[Dict[str, Candidate], torch.Tensor, torch.Tensor]:
    """Eager, compiled with max-autotune, and backend "cuda", each with the same weights."""
    weights = make_weights(case)
    x, dy = make_inputs(case, weights)
    eager = build(case, ("eager",), weights)[0][0]
    plain = build(case, ("eager",), weights)[0][0].owner
    compiled = torch.compile(plain, mode="max-autotune", dynamic=False)
    found = {
        "eager": eager,
        "compiled": Candidate("compile", compiled, plain, case.threads),
        "fused": fused_candidate(case, weights, "cuda"),
    }
    verdict = Gate(case, weights, x, dy).check(found["fused"])
    print(f"gate, {case.mode}: {verdict}", flush=True)
    if not verdict.green:
        raise SystemExit("the fused result is wrong: nothing is timed")
    return found, x, dy


def measure() -> Dict[str, float]:
    found, x, dy = candidates(Case("gpu", SAMPLES, SHAPE, "infer", "bfloat16", device="cuda"))
    copy = torch.empty_like(x)
    with torch.no_grad():
        forward = times(
            {"copy": lambda: copy.copy_(x), **{n: (lambda c=c: c.module(x)) for n, c in found.items()}}
        )
    found, x, dy = candidates(Case("gpu", SAMPLES, SHAPE, "train", "bfloat16", device="cuda"))
    leaf = x.detach().requires_grad_()

    def step(c: Candidate) -> None:
        c.module(leaf).backward(dy)
        leaf.grad = None
        c.owner.zero_grad(set_to_none=True)

    train = times({n: (lambda c=c: step(c)) for n, c in found.items()})
    y = found["fused"].module(leaf)
    wanted = (leaf, *found["fused"].owner.parameters())
    backward = times({"fused": lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)})
    for what, rows in (("forward", forward), ("training step", train), ("backward", backward)):
        print(what, ", ".join(f"{name} {ms:.4f} ms" for name, ms in rows.items()), flush=True)
    moved = x.numel() * x.element_size() * 2
    print(f"copy: {moved / forward['copy'] / 1e6:.0f} GB/s", flush=True)
    return {
        # Forward moves as many bytes as the copy, backward half as many again.
        "forward: share of the copy's bandwidth": forward["copy"] / forward["fused"],
        "backward: share of the copy's bandwidth": 1.5 * forward["copy"] / backward["fused"],
        "forward: times as fast as eager": forward["eager"] / forward["fused"],
        "forward: times as fast as compiled": forward["compiled"] / forward["fused"],
        "training step: times as fast as eager": train["eager"] / train["fused"],
        "training step: times as fast as compiled": train["compiled"] / train["fused"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--skip", nargs="+", default=[], choices=["tests", "sanitizer", "bars"])
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS)
    a = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no CUDA device: nothing here can be measured", file=sys.stderr)
        raise SystemExit(2)
    outcomes: Dict[str, bool] = {}
    python = [sys.executable, "-m", "pytest", "-q"]
    if "tests" not in a.skip:
        run("tests", python, outcomes)
    if "sanitizer" not in a.skip:
        for tool in a.tools:
            command = [sanitizer(), "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
            run(f"compute-sanitizer {tool}", [*command, *python, *SANITIZED, "-k", "cuda"], outcomes)
    if "bars" not in a.skip:
        for name, value in measure().items():
            outcomes[f"{name}: {value:.2f}, bar {BARS[name]:g}"] = value >= BARS[name]
    print(f"\n{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    for name, passed in outcomes.items():
        print(f"  {'pass' if passed else 'FAIL'}  {name}")
    raise SystemExit(not all(outcomes.values()))


if __name__ == "__main__":
    main()
