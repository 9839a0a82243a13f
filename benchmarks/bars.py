"""The bars that the CPU kernels have to reach, as data; `bench.py --bars` measures and judges them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from benchmarks.report import Row, by_provider, table
from benchmarks.shapes import Case, Shape

LARGE: Tuple[Shape, ...] = ((256, 56, 56), (512, 28, 28))
SMALL: Tuple[Shape, ...] = ((64, 56, 56), (1024, 14, 14), (2048, 7, 7))
THREADS = 2


@dataclass(frozen=True)
class Metric:
    """A number taken from the rows of one case; None where a row that it needs is missing."""

    text: str
    at_least: bool
    value: Callable[[Sequence[Row]], Optional[float]]


def _ratio(over: str, under: str, field: str = "p50_ms") -> Callable[[Sequence[Row]], Optional[float]]:
    def value(rows: Sequence[Row]) -> Optional[float]:
        found = by_provider(rows)
        if over not in found or under not in found or not found[under][field]:
            return None
        return found[over][field] / found[under][field]

    return value


def _kept(rows: Sequence[Row]) -> Optional[float]:
    fused = by_provider(rows).get("fused")
    return None if fused is None or fused["kept_bytes"] is None else fused["kept_bytes"] / fused["x_bytes"]


def _scaling(rows: Sequence[Row]) -> Optional[float]:
    times = {r["threads"]: r["p50_ms"] for r in rows if r["provider"] == "fused"}
    return times[1] / times[THREADS] if {1, THREADS} <= times.keys() else None


METRICS = {
    "copy": Metric("time / copy", False, _ratio("fused", "copy")),
    "eager": Metric("faster than eager", True, _ratio("eager", "fused")),
    "compile": Metric("faster than compile", True, _ratio("compile", "fused")),
    "kept": Metric("kept for backward / x", False, _kept),
    "peak": Metric("peak extra memory / eager's", False, _ratio("fused", "eager", "peak_bytes")),
    "scaling": Metric("1 thread / 2 threads", True, _scaling),
}


@dataclass(frozen=True)
class Bar:
    """`limit` for `metric` on each of `shapes`."""

    variant: str
    mode: str
    shapes: Tuple[Shape, ...]
    metric: str
    limit: float


# How the cases of a variant differ from batch 8, float32, contiguous, no norm.
VARIANTS: Dict[str, Dict[str, Any]] = {
    "contiguous": {},
    "channels_last": {"layout": "channels_last"},
    "BatchNorm": {"norm": True},
    "bfloat16": {"dtype": "bfloat16"},
    "one sample": {"batch": 1},
}

BARS: Tuple[Bar, ...] = (
    *(
        bar
        for layout in ("contiguous", "channels_last")
        for bar in (
            Bar(layout, "infer", LARGE, "copy", 1.25),
            Bar(layout, "infer", LARGE + SMALL, "eager", 7),
            Bar(layout, "infer", LARGE + SMALL, "compile", 2.5),
            Bar(layout, "train", LARGE, "copy", 1.8),
            Bar(layout, "train", LARGE + SMALL, "eager", 5),
            Bar(layout, "train", LARGE, "compile", 5),
            Bar(layout, "train", SMALL, "compile", 4),
            Bar(layout, "train", LARGE, "kept", 0.03),
            Bar(layout, "train", SMALL, "kept", 0.10),
            Bar(layout, "train", LARGE + SMALL, "peak", 0.4),
        )
    ),
    Bar("BatchNorm", "train", LARGE, "copy", 2.3),
    Bar("BatchNorm", "train", LARGE + SMALL, "eager", 4),
    Bar("bfloat16", "infer", LARGE + SMALL, "eager", 5),
    Bar("bfloat16", "train", LARGE + SMALL, "eager", 5),
    Bar("one sample", "infer", ((256, 56, 56),), "scaling", 1.6),
    # "At most half of eager's time" where the cost of the calls themselves is all there is.
    Bar("one sample", "infer", ((16, 4, 4),), "eager", 2),
)


def _case(bar: Bar, shape: Shape, device: str) -> Case:
    base = Case(bar.variant, 8, shape, bar.mode, threads=THREADS, device=device)
    return replace(base, **VARIANTS[bar.variant])


def plan(device: str) -> List[Tuple[Case, Tuple[str, ...], Tuple[int, ...]]]:
    """Every case that a bar needs, with the providers and the further thread counts that it needs."""
    metrics: Dict[Case, set] = {}
    for bar in BARS:
        for shape in bar.shapes:
            metrics.setdefault(_case(bar, shape, device), set()).add(bar.metric)
    return [
        (
            case,
            ("eager", *(["compile"] if "compile" in needed else []), "fused"),
            (1,) if "scaling" in needed else (),
        )
        for case, needed in metrics.items()
    ]


def judge(groups: Sequence[Tuple[Case, Sequence[Row]]], device: str) -> int:
    """Prints each bar with what was measured; returns how many were not reached or not measured."""
    rows_of = dict(groups)
    lines, missed = [], 0
    for bar in BARS:
        metric = METRICS[bar.metric]
        for shape in bar.shapes:
            case = _case(bar, shape, device)
            value = metric.value(rows_of[case]) if case in rows_of else None
            reached = value is not None and (value >= bar.limit if metric.at_least else value <= bar.limit)
            missed += not reached
            lines.append(
                (
                    f"{bar.variant}, {bar.mode}, {case.full_shape}",
                    metric.text,
                    f"{'>=' if metric.at_least else '<='} {bar.limit:g}",
                    "-" if value is None else f"{value:.3f}",
                    "pass" if reached else "not measured" if value is None else "FAIL",
                )
            )
    print(f"\nBars\n{table(('', 'what', 'bar', 'measured', ''), lines)}")
    print(f"  {len(lines) - missed} of {len(lines)} reached")
    return missed
