"""What a run leaves behind: aligned tables, tidy CSV rows, and the picture drawn from those rows."""

from __future__ import annotations

import csv
import functools
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Any, Dict, Iterable, List, Optional, Sequence, TextIO

import torch

import cbam_fused
from benchmarks.measure import Step
from benchmarks.shapes import Case

FIELDS = (
    "op", "provider", "backend", "mode", "set", "shape", "dtype", "layout", "norm", "threads",
    "p20_ms", "p50_ms", "p80_ms", "samples", "faults", "x_bytes", "floor_bytes", "peak_bytes", "kept_bytes",
    "gate", "device", "versions", "commit", "time",
)  # fmt: skip
Row = Dict[str, Any]


@functools.lru_cache(None)
def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            found = next((line for line in f if line.startswith("model name")), "")
        name = found.partition(":")[2].strip() or name
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"


def versions() -> str:
    parts = [
        f"cbam_fused {cbam_fused.__version__}",
        f"torch {torch.__version__}",
        f"python {platform.python_version()}",
    ]
    timm = sys.modules.get("timm")
    return "; ".join(parts + ([f"timm {timm.__version__}"] if timm else []))


@functools.lru_cache(None)
def commit() -> str:
    here = os.path.dirname(os.path.abspath(__file__))

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", here, *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "-dirty" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def make_row(
    case: Case,
    step: Step,
    provider: str,
    backend: str,
    peak: Optional[int],
    kept: Optional[int],
    gate: Optional[float],
) -> Row:
    """One measurement. `gate` is the largest error as a share of its tolerance; None for the copy."""
    return {
        "op": "cbam",
        "provider": provider,
        "backend": backend,
        "mode": case.mode,
        "set": case.set,
        "shape": "x".join(map(str, case.full_shape)),
        "dtype": case.dtype,
        "layout": case.layout,
        "norm": case.norm,
        "threads": step.threads,
        "p20_ms": round(step.percentile(0.2), 6),
        "p50_ms": round(step.percentile(0.5), 6),
        "p80_ms": round(step.percentile(0.8), 6),
        "samples": len(step.samples),
        "faults": round(statistics.median(step.faults), 1) if step.faults else None,
        "x_bytes": case.x_bytes,
        "floor_bytes": case.floor_bytes,
        "peak_bytes": peak,
        "kept_bytes": kept,
        "gate": None if gate is None else float(f"{gate:.3g}"),
        "device": device_name(case.device),
        "versions": versions(),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


class CsvLog:
    """Appends rows as they come, so that an interrupted run keeps what it has measured.

    Raises SystemExit where the file is there and has other columns."""

    def __init__(self, path: str):
        if os.path.exists(path):
            with open(path, newline="") as f:
                if next(csv.reader(f), None) != list(FIELDS):
                    raise SystemExit(
                        f"{path} has other columns than are written now: move it away, or name another"
                    )
        self.path = path
        self.rows = 0

    def add(self, rows: Iterable[Row]) -> None:
        fresh = not os.path.exists(self.path)
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        with open(self.path, "a", newline="") as f:
            writer = csv.DictWriter(f, FIELDS)
            if fresh:
                writer.writeheader()
            for row in rows:
                writer.writerow(row)
                self.rows += 1


def table(header: Sequence[str], rows: Sequence[Sequence[str]], mark: Optional[int] = None) -> str:
    """Aligned columns, the first to the left; row `mark` is emphasised on a terminal."""
    widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]
    lines = []
    for index, cells in enumerate((header, *rows)):
        line = "  " + "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))
        )
        lines.append(
            f"\033[1m{line}\033[0m"
            if mark is not None and index == mark + 1 and sys.stdout.isatty()
            else line
        )
    return "\n".join(lines)


def by_provider(rows: Sequence[Row]) -> Dict[str, Row]:
    """The rows of a case at its own number of threads."""
    return {r["provider"]: r for r in rows if r["threads"] == rows[0]["threads"]}


def _bytes(n: Any, s: int) -> str:
    return "-" if n is None else f"{n / 1e6:.2f} MB = {n / s:.2f} S"


def case_table(rows: Sequence[Row]) -> str:
    """One line a candidate. GB/s is the floor's bytes over the time, so it is comparable between rows."""
    copy, fused = by_provider(rows)["copy"], by_provider(rows).get("fused")
    header = (
        "",
        "p50 ms",
        "p20 .. p80",
        "x copy",
        "floor GB/s",
        "fused speed-up",
        "peak extra",
        "kept for backward",
    )
    lines = []
    for r in rows:
        name = r["provider"] + (f" ({r['backend']})" if r["backend"] else "")
        if r["threads"] != copy["threads"]:
            name += f", {r['threads']} thread{'s' if r['threads'] > 1 else ''}"
        rival = fused is not None and r["provider"] not in ("copy", "fused")
        lines.append(
            (
                name,
                f"{r['p50_ms']:.3f}",
                f"{r['p20_ms']:.3f} .. {r['p80_ms']:.3f}",
                f"{r['p50_ms'] / copy['p50_ms']:.2f}",
                "-" if r["provider"] == "copy" else f"{r['floor_bytes'] / r['p50_ms'] / 1e6:.1f}",
                f"{r['p50_ms'] / fused['p50_ms']:.2f}x" if rival else "",
                _bytes(r["peak_bytes"], r["x_bytes"]),
                _bytes(r["kept_bytes"], r["x_bytes"]),
            )
        )
    return table(header, lines, None if fused is None else rows.index(fused))


def warnings(rows: Sequence[Row]) -> List[str]:
    """What in a case's rows is not the candidates' own doing: samples that spread because something else was
    running, and calls whose memory the system had to find anew (4 KiB a fault)."""
    lines = []
    worst = max(rows, key=lambda r: r["p80_ms"] / r["p20_ms"])
    spread = worst["p80_ms"] / worst["p20_ms"]
    if spread >= 1.5:
        lines.append(
            f"unrest: p80 of {worst['provider']} is {spread:.1f} times its p20; was something else running?"
        )
    faults = [f"{r['provider']} {r['faults']:,.0f}" for r in rows if (r["faults"] or 0) >= 256]
    if faults:
        lines.append(f"page faults a call, of memory that malloc had given back: {', '.join(faults)}")
    return lines


def summary_table(groups: Sequence[Sequence[Row]]) -> str:
    """One line a case: what fused reaches, and the geometric means."""
    rivals = [p for p in ("eager", "compile", "timm") if any(r["provider"] == p for g in groups for r in g)]
    header = ("", "fused ms", "x copy", *(f"vs {p}" for p in rivals), "peak vs eager", "kept / x")
    lines: List[Sequence[str]] = []
    speedups: Dict[str, List[float]] = {p: [] for p in rivals}
    for group in groups:
        by = by_provider(group)
        if "fused" not in by:
            continue
        f = by["fused"]
        for p in rivals:
            if p in by:
                speedups[p].append(by[p]["p50_ms"] / f["p50_ms"])
        eager = by.get("eager")
        lines.append(
            (
                f"{f['mode']} {f['shape']} {f['dtype']} {f['layout']}{' +BN' if f['norm'] else ''} t{f['threads']}",
                f"{f['p50_ms']:.3f}",
                f"{f['p50_ms'] / by['copy']['p50_ms']:.2f}",
                *(f"{by[p]['p50_ms'] / f['p50_ms']:.2f}x" if p in by else "-" for p in rivals),
                f"{f['peak_bytes'] / eager['peak_bytes']:.2f}" if eager and eager["peak_bytes"] else "-",
                "-" if f["kept_bytes"] is None else f"{f['kept_bytes'] / f['x_bytes']:.3f}",
            )
        )
    means = [
        f"{math.exp(sum(map(math.log, speedups[p])) / len(speedups[p])):.2f}x" if speedups[p] else "-"
        for p in rivals
    ]
    lines.append(("geometric mean", "", "", *means, "", ""))
    text = table(header, lines, len(lines) - 1)
    plain = [r for g in groups for r in g if r["provider"] == "fused" and r["backend"] == "reference"]
    if plain:
        text += f"\n{len(plain)} of these are plain PyTorch under the name of fused: its backend was the reference."
        text += "".join(
            f"\n  {name}: {reason}" for name, reason in cbam_fused.backends().items() if reason is not True
        )
    return text


class Progress:
    """A one-line bar on a terminal; nothing where the output goes to a file."""

    def __init__(self, total: int, out: TextIO = sys.stderr):
        self.total, self.out = total, out
        self.show = out.isatty()
        self.start = time.perf_counter()
        self.label = ""
        self.done = 0

    def begin(self, done: int, label: str) -> None:
        self.done, self.label = done, label
        self.update(0.0)

    def update(self, share: float) -> None:
        if not self.show:
            return
        part = (self.done + share) / max(1, self.total)
        filled = int(part * 24)
        spent = int(time.perf_counter() - self.start)
        line = f"[{'#' * filled}{'.' * (24 - filled)}] {self.done}/{self.total} {spent // 60}:{spent % 60:02d} {self.label}"
        self.out.write("\r\033[K" + line[:118])
        self.out.flush()

    def clear(self) -> None:
        if self.show:
            self.out.write("\r\033[K")
            self.out.flush()
