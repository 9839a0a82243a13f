"""Measures launch configurations of the Triton kernels on this GPU: `python -m cbam_fused.tune`.

Opt-in: nothing is tuned while a model runs. For each kind of tensor (layout, class of map, bytes an
element) every kernel's candidates are timed one at a time within the whole forward and backward, each
only after its results agree with the pinned table's. The winners are written to a table of the
user's, which goes before the pinned one from the next process on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor

from ._ops import accumulate_dtype
from .triton_kernels import configurations, load
from .triton_kernels.configurations import Configuration

# A typical tensor of each kind of map: (N, C, H, W).
SHAPES = {
    "large": (16, 256, 56, 56),
    "small": (32, 1024, 14, 14),
    "tiny": (64, 2048, 7, 7),
    "thin": (16, 64, 160, 160),
}
DTYPES = {2: torch.bfloat16, 4: torch.float32}
TILES = (
    (8, 128), (8, 256), (8, 512), (8, 1024), (16, 64), (16, 128), (16, 256), (16, 512), (32, 32), (32, 64), (64, 32),
    (64, 64),
)  # fmt: skip
WIDTHS = (0, 32, 64)
WARPS = (4, 8, 16)
FILLS = (0.5, 1, 2, 4, 8)
REPEATS = 20
# A candidate replaces the best so far only if it is this much faster: less is noise.
MARGIN = 0.98
# How far the order of a sum may move it, in epsilons of what it is added up in.
SUM_EPSILONS = 64


def candidates(kernel: str, now: Configuration) -> Iterator[Configuration]:
    """Variants of `now`: other tiles and warps, then blocks of other widths, then other numbers of programs."""
    for warps in WARPS:
        if "BC" in now.meta:
            for bc, bp in TILES:
                yield replace(now, meta={**now.meta, "BC": bc, "BP": bp}, warps=warps)
        else:
            yield replace(now, warps=warps)
    for width in WIDTHS if "TW" in now.meta else ():
        yield replace(now, meta={**now.meta, "TW": width})
    for fill in FILLS:
        yield replace(now, fill=fill)


def _inputs(
    shape: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tuple[Tensor, List[Tensor], List[Tensor]]:
    g = torch.Generator(device="cuda").manual_seed(0)
    rand = lambda *s: torch.randn(s, device="cuda", generator=g).to(dtype)  # noqa: E731
    c = shape[1]
    x = rand(*shape)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weights = [
        rand(c // 16, c) / c**0.5,
        rand(c // 16),
        rand(c, c // 16) / 4,
        rand(c),
        rand(1, 2, 7, 7) / 4,
        rand(1),
    ]
    return x, weights, [rand(1), rand(1), rand(1), rand(1).abs() + 0.5]


def _step(x: Tensor, weights: List[Tensor], norm: List[Tensor]) -> List[Tensor]:
    from .triton_kernels import launchers

    forward, backward = launchers.OPS["cbam_forward"], launchers.OPS["cbam_backward"]
    y, *saved = forward(x, *weights, *norm, 1e-5, 3, 1, 0, False)
    return [y, *backward(x, x, *weights, *norm, 1e-5, *saved, 3, 1, 0, False)]


def _milliseconds(f: Callable[[], object]) -> float:
    for _ in range(3):
        f()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _agrees(found: List[Tensor], wanted: List[Tensor]) -> bool:
    """Whether both may be the same results: no number is further off than rounding takes it, each tensor's largest
    being the scale.

    Kernels add in float32 at the least and round once, at the end: what another order of a sum moves is a few epsilons
    of float32, and 16 bits may then be rounded to the neighbour, which is one epsilon of theirs away. A maximum that
    moves to its near equal looks like an error: that costs a candidate, not a result.
    """

    def agree(a: Tensor, b: Tensor) -> bool:
        eps, wide = torch.finfo(b.dtype).eps, accumulate_dtype(b.dtype)
        limit = SUM_EPSILONS * torch.finfo(wide).eps + (eps if b.dtype != wide else 0.0)
        a, b = a.to(wide), b.to(wide)
        return bool(torch.isfinite(a).all() and (a - b).abs().max() <= limit * b.abs().max())

    return all(agree(a, b) for a, b in zip(found, wanted, strict=True))


def tune(report: Callable[[str], None] = print) -> List[Dict[str, object]]:
    """Rows that are faster than those in use on the current GPU. Raises RuntimeError without one."""
    reason = load()
    if reason is None and not torch.cuda.is_available():
        reason = "torch finds no GPU"
    if reason is not None:
        raise RuntimeError(f"cannot tune: {reason}")
    device = configurations.describe(torch.device("cuda"))
    rows: List[Dict[str, object]] = []
    pinned = configurations._look_up
    chosen: Dict[Tuple, Configuration] = {}
    configurations._look_up = lambda *key: chosen.get(key) or pinned(*key)  # type: ignore[assignment]
    try:
        for size, shape in SHAPES.items():
            for itemsize, dtype in DTYPES.items():
                for layout in ("contiguous", "channels_last"):
                    x, weights, norm = _inputs(shape, dtype, layout == "channels_last")
                    step = lambda: _step(x, weights, norm)  # noqa: B023, E731
                    wanted = step()
                    best = _milliseconds(step)
                    for kernel in configurations.kernels(size):
                        key = (kernel, device.generation, layout, size, itemsize)
                        first = pinned(*key)
                        for found in candidates(kernel, first):
                            kept = chosen.get(key)
                            chosen[key] = found
                            try:
                                took = _milliseconds(step) if _agrees(step(), wanted) else float("inf")
                            except Exception as error:  # a tile that does not fit this device
                                report(f"{kernel} {dict(found.meta)}: {type(error).__name__}")
                                took = float("inf")
                            if took < MARGIN * best:
                                best = took
                                report(f"{layout} {size} {dtype} {kernel}: {best:.3f} ms with {found}")
                            elif kept is None:
                                del chosen[key]
                            else:
                                chosen[key] = kept
    finally:
        configurations._look_up = pinned  # type: ignore[assignment]
    for key, found in chosen.items():
        rows.append(configurations.user_row(*key, found))
    return rows


def write(rows: List[Dict[str, object]], path: Path) -> None:
    """Writes a user's table, which `configurations` reads before the pinned one. Rows that it has for other devices,
    kernels or tensors stay."""

    def key(row: Dict[str, object]) -> Tuple[str, ...]:
        return tuple(str(row[name]) for name in ("device", "kernel", "layout", "map", "bytes"))

    new = {key(row) for row in rows}
    kept = (
        [row for row in configurations.load_table(path)["rows"] if key(row) not in new]
        if path.exists()
        else []
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": configurations.FORMAT, "rows": [*rows, *kept]}, indent=2) + "\n")
    configurations.forget()


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m cbam_fused.tune", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=configurations.user_table_path(), help="default: %(default)s"
    )
    options = parser.parse_args(list(arguments))
    try:
        if options.output.exists():
            configurations.load_table(
                options.output
            )  # what cannot be added to is said before an hour of tuning
        rows = tune()
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    write(rows, options.output)
    print(f"{len(rows)} configurations faster than those that were in use, in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
