"""The main job: races CBAM implementations over the shapes that networks use. `--help` lists the options."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Dict, List, Optional, Sequence, Tuple

# Read when torch loads: the memory pass would otherwise log its start and end.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import torch  # noqa: E402

from benchmarks import bars, picture  # noqa: E402
from benchmarks.gate import Gate, RedGate, make_inputs  # noqa: E402
from benchmarks.measure import candidate_step, copy_step, kept_bytes, peak_bytes, time_interleaved  # noqa: E402
from benchmarks.providers import PROVIDERS, Candidate, build, fused_candidate, make_weights  # noqa: E402
from benchmarks.report import CsvLog, Progress, Row, case_table, make_row, summary_table, warnings  # noqa: E402
from benchmarks.shapes import DTYPES, LAYOUTS, MODES, SETS, Case, Shape  # noqa: E402


@dataclass
class Settings:
    """How a case is measured."""

    providers: Sequence[str] = PROVIDERS
    backend: str = "auto"
    rounds: int = 40
    seconds: float = 20.0
    # CPU: evict the last-level cache before each call.
    cold: bool = False
    # FusedCBAM joins once more for each of these thread counts.
    other_threads: Sequence[int] = ()


@dataclass
class Result:
    """Rows of one case, and which providers are missing from it, with the reason."""

    case: Case
    rows: List[Row] = field(default_factory=list)
    missing: Dict[str, str] = field(default_factory=dict)


def admit(
    gate: Gate, candidates: Sequence[Candidate], missing: Dict[str, str]
) -> List[Tuple[Candidate, float]]:
    """The candidates whose numbers are right, each with its error as a share of the tolerance.

    Raises RedGate for FusedCBAM; a baseline that is wrong, or fails, only leaves the race.
    """
    admitted = []
    for candidate in candidates:
        name = candidate.label
        try:
            verdict = gate.check(candidate)
        except Exception as error:
            if candidate.provider == "fused":
                raise
            reason = str(error).strip().splitlines() or [""]
            missing[name] = f"failed: {type(error).__name__}: {reason[0][:200]}"
            continue
        if verdict.green:
            admitted.append((candidate, verdict.share))
        elif candidate.provider == "fused":
            raise RedGate(f"{name}: {verdict}")
        else:
            missing[name] = f"left out, computes something else: {verdict}"
    return admitted


def measure_case(case: Case, settings: Settings, progress: Optional[Progress] = None) -> Result:
    """Gate, then times, then memory."""
    torch.set_num_threads(case.threads)
    result = Result(case)
    weights = make_weights(case)
    x, dy = make_inputs(case, weights)
    candidates, result.missing = build(case, settings.providers, weights, settings.backend)
    for count in settings.other_threads:
        candidates.append(fused_candidate(case, weights, settings.backend, count, f"fused, {count} threads"))
    native = any(c.provider == "fused" and c.backend != "reference" for c in candidates)
    # A 16-bit BatchNorm rounds the spatial logits whatever the kernels around it do.
    gate = Gate(case, weights, x, dy, rounds_once=native and not case.norm)
    admitted = admit(gate, candidates, result.missing)
    del gate
    steps = [copy_step(case, x, dy)] + [candidate_step(case, c, x, dy) for c, _ in admitted]
    time_interleaved(
        case,
        steps,
        settings.rounds,
        settings.seconds,
        progress.update if progress else lambda _: None,
        settings.cold,
    )
    result.rows.append(make_row(case, steps[0], "copy", "", peak_bytes(case.device, steps[0]), None, None))
    for step, (candidate, share) in zip(steps[1:], admitted):
        kept = kept_bytes(candidate, x) if case.mode == "train" else None
        result.rows.append(
            make_row(
                case, step, candidate.provider, candidate.backend, peak_bytes(case.device, step), kept, share
            )
        )
    return result


def _shape(text: str) -> Shape:
    try:
        c, h, w = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"shape must be C,H,W, got {text}") from None
    if min(c, h, w) < 1:
        raise argparse.ArgumentTypeError(f"shape must have sizes of at least 1, got {text}")
    return c, h, w


def parse(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--quick", action="store_true", help="the set `quick`, in about two minutes on two cores")
    p.add_argument("--bars", action="store_true", help="measure what the project promises, and judge it")
    p.add_argument(
        "--set", nargs="+", choices=list(SETS), dest="sets", help="named shape sets (default: resnet50)"
    )
    p.add_argument("--shape", type=_shape, action="append", help="a shape C,H,W of your own; may be repeated")
    p.add_argument("--batch", type=int, help="N (default: the set's own, 8 for a shape of your own)")
    p.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    p.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    p.add_argument("--layout", nargs="+", choices=list(LAYOUTS), default=["contiguous"])
    p.add_argument(
        "--norm", nargs="+", choices=["off", "on"], default=["off"], help="spatial_norm of every candidate"
    )
    p.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--backend", default="auto", help="backend of FusedCBAM")
    p.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    p.add_argument("--rounds", type=int, help="samples of each candidate (default 40, quick 25)")
    p.add_argument(
        "--seconds", type=float, help="limit of a case's timing, after 5 rounds (default 20, quick 4)"
    )
    p.add_argument("--cold", action="store_true", help="CPU: evict the last-level cache before each call")
    p.add_argument("--out", help="CSV to write; the picture gets its name (default: results/bench-TIME.csv)")
    args = p.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch finds no CUDA device")
    for name in ("batch", "rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if min(args.threads) < 1:
        p.error(f"--threads must be at least 1, got {min(args.threads)}")
    return args


def make_cases(args: argparse.Namespace) -> List[Case]:
    names = args.sets or (["quick"] if args.quick else [] if args.shape else ["resnet50"])
    sources = [(name, args.batch or SETS[name].batch, shape) for name in names for shape in SETS[name].shapes]
    sources += [("custom", args.batch or 8, shape) for shape in args.shape or []]
    options = itertools.product(args.mode, args.dtype, args.layout, args.norm, args.threads)
    return [
        Case(name, batch, shape, mode, dtype, layout, threads, norm == "on", args.device)
        for (mode, dtype, layout, norm, threads), (name, batch, shape) in itertools.product(options, sources)
    ]


def run(plan: Sequence[Tuple[Case, Settings]], log: CsvLog) -> Tuple[List[Result], int]:
    """Measures and prints every case; returns the results and how many gates were red."""
    results, red = [], 0
    progress = Progress(len(plan))
    for i, (case, settings) in enumerate(plan):
        progress.begin(i, f"{case.mode} {case.full_shape} {case.dtype} {case.layout}")
        try:
            result = measure_case(case, settings, progress)
        except RedGate as error:
            progress.clear()
            red += 1
            print(f"\n{case.title()}\n  RED GATE, nothing about its speed is reported: {error}", flush=True)
            continue
        log.add(result.rows)
        results.append(result)
        progress.clear()
        print(f"\n{case.title()}\n{case_table(result.rows)}")
        for name, reason in result.missing.items():
            print(f"  {name}: {reason}")
        for warning in warnings(result.rows):
            print(f"  {warning}")
        sys.stdout.flush()
    return results, red


def main(arguments: Optional[Sequence[str]] = None) -> int:
    # It reports a missing CUDA driver, which a CPU benchmark does not need.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    args = parse(arguments)
    rounds, seconds = args.rounds or (25 if args.quick else 40), args.seconds or (4.0 if args.quick else 20.0)
    settings = Settings(args.providers, args.backend, rounds, seconds, args.cold)
    if args.bars:
        plan = [
            (
                case,
                replace(settings, providers=[p for p in needed if p in args.providers], other_threads=others),
            )
            for case, needed, others in bars.plan(args.device)
        ]
    else:
        plan = [(case, settings) for case in make_cases(args)]
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    log = CsvLog(args.out or os.path.join(os.path.dirname(HERE), "results", f"bench-{stamp}.csv"))
    start = time.perf_counter()
    results, red = run(plan, log)
    if results:
        print(f"\nSummary\n{summary_table([r.rows for r in results])}")
    missed = bars.judge([(r.case, r.rows) for r in results], args.device) if args.bars else 0
    if log.rows:
        print(f"\n{log.rows} rows: {os.path.relpath(log.path)}")
        target = os.path.splitext(log.path)[0] + ".png"
        try:
            picture.draw(log.path, target)
            print(f"picture: {os.path.relpath(target)}")
        except ImportError:
            print("no picture: matplotlib is not installed (pip install matplotlib)")
    print(
        f"{time.perf_counter() - start:.0f} s" + (f", {red} RED gate{'s' if red > 1 else ''}" if red else "")
    )
    return 1 if red or missed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
