"""The picture of a benchmark run, drawn from its CSV file alone: `python benchmarks/picture.py run.csv`."""

from __future__ import annotations

import csv
import os
import sys
from typing import Dict, List, Tuple

COLOURS = {"copy": "#b8bcc4", "fused": "#0b7285", "compile": "#f2a65a", "eager": "#d1495b", "timm": "#8d6a9f"}
ORDER = ("copy", "fused", "compile", "eager", "timm")
# What tells two cases of a run apart, and how it is written under the bars.
_CASE = ("mode", "shape", "dtype", "layout", "norm", "threads")
_WORDS = {"norm": {"True": "BatchNorm", "False": "no norm"}}


def read_cases(path: str) -> Dict[Tuple[str, ...], Dict[str, Dict[str, str]]]:
    """Case -> provider -> row, in the order of the file."""
    cases: Dict[Tuple[str, ...], Dict[str, Dict[str, str]]] = {}
    with open(path, newline="") as f:
        for row in csv.DictReader(f):
            cases.setdefault(tuple(row[k] for k in _CASE), {})[row["provider"]] = row
    return cases


def _labels(keys: List[Tuple[str, ...]]) -> List[str]:
    varying = [i for i in range(1, len(_CASE)) if i == 1 or len({k[i] for k in keys}) > 1]
    return ["\n".join(_word(_CASE[i], k[i]) for i in varying) for k in keys]


def draw(path: str, target: str) -> None:
    """Time and peak memory of every case. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = {k: v for k, v in read_cases(path).items() if "copy" in v}
    modes = [m for m in ("infer", "train") if any(k[0] == m for k in cases)]
    if not modes:
        raise ValueError(f"path must be a benchmark's CSV with at least one measured case, got {path}")
    widest = max(sum(k[0] == m for k in cases) for m in modes)
    present = [p for p in ORDER if any(p in v for v in cases.values())]
    width = max(5.6, 1.2 + 0.36 * widest * len(present))
    # Few cases: the modes side by side; many: one below the other.
    columns = len(modes) if width * len(modes) <= 18 else 1
    figure, grid = plt.subplots(
        2 * len(modes) // columns,
        columns,
        figsize=(width * columns, 1.2 + 5.8 * len(modes) / columns),
        squeeze=False,
        gridspec_kw={"height_ratios": [1.6, 1] * (len(modes) // columns)},
        layout="constrained",
    )
    axes = grid.T.reshape(len(modes), 2) if columns > 1 else grid.reshape(len(modes), 2)
    for (time_axis, memory_axis), mode in zip(axes, modes):
        keys = [k for k in cases if k[0] == mode]
        name = "Inference" if mode == "infer" else "Training step"
        yardstick = "a copy of x" if mode == "infer" else "a copy of x and an add"
        _bars(time_axis, keys, cases, present, "p50_ms", f"{name}: time / {yardstick} (log scale)")
        memory = [p for p in present if p != "copy"]
        _bars(memory_axis, keys, cases, memory, "peak_bytes", f"{name}: peak extra memory / x")
    row = next(iter(next(iter(cases.values())).values()))
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[p]) for p in present]
    backend = next((v["fused"]["backend"] for v in cases.values() if "fused" in v), "")
    names = [f"fused ({backend})" if p == "fused" else p for p in present]
    title = f"CBAM on {row['device']}{_shared(list(cases))}"
    figure.legend(handles, names, title=title, ncols=len(present), loc="outside upper left", frameon=False,
                  alignment="left", title_fontproperties={"weight": "bold", "size": 12})  # fmt: skip
    figure.supxlabel(
        "Medians, whiskers p20 to p80. Bold: how many times less than eager fused takes.\n"
        f"{row['versions']}; commit {row['commit']}; {row['time']}",
        fontsize=7,
        color="#555555",
    )
    figure.savefig(target, dpi=130)
    plt.close(figure)


def _shared(keys: List[Tuple[str, ...]]) -> str:
    """What all cases have in common, for the title."""
    common = [(name, keys[0][i]) for i, name in enumerate(_CASE) if i > 1 and len({k[i] for k in keys}) == 1]
    return "".join(", " + _word(name, value) for name, value in common)


def _word(name: str, value: str) -> str:
    if name == "threads":
        return f"{value} thread{'s' if value != '1' else ''}"
    return _WORDS.get(name, {}).get(value, value)


def _bars(ax, keys, cases, providers, field: str, title: str) -> None:
    width = 0.84 / len(providers)
    top = 1.0
    for j, provider in enumerate(providers):
        for i, key in enumerate(keys):
            rows = cases[key]
            if provider not in rows or not rows[provider][field]:
                continue
            row = rows[provider]
            unit = float(rows["copy"]["p50_ms"] if field == "p50_ms" else row["x_bytes"])
            value = float(row[field]) / unit
            at = i - 0.42 + width * (j + 0.5)
            ax.bar(at, value, width * 0.92, color=COLOURS[provider], label=provider if i == 0 else None)
            high = value
            if field == "p50_ms":
                low, high = float(row["p20_ms"]) / unit, float(row["p80_ms"]) / unit
                ax.plot([at, at], [low, high], color="#333333", linewidth=0.8)
            text, weight = f"{value:.2f}", "normal"
            if provider == "fused" and rows.get("eager", {}).get(field):
                times = float(rows["eager"][field]) / float(row[field])
                text, weight = f"{value:.2f}\n({times:.1f}x)", "bold"
            ax.annotate(
                text, (at, high), (0, 2), textcoords="offset points", ha="center", va="bottom",
                fontsize=7, fontweight=weight,
            )  # fmt: skip
            top = max(top, high)
    if field == "p50_ms":
        ax.set_yscale("log")
        ax.set_ylim(0.5, top * 2.5)
        ax.yaxis.set_minor_formatter("")
    else:
        ax.set_ylim(0, top * 1.25)
    ax.axhline(1, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
    ax.set_xticks(range(len(keys)), _labels(keys), fontsize=8)
    ax.set_title(title, loc="left", fontsize=10)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(axis="x", length=0)


if __name__ == "__main__":
    for source in sys.argv[1:]:
        draw(source, os.path.splitext(source)[0] + ".png")
