"""Bytes that the Triton kernels move, counted by running their compiled PTX on the CPU.

    python benchmarks/triton_bytes.py [--shapes 256,56,56 ...] [--batch N] [--dtype bfloat16 float32]
        [--layout contiguous channels_last] [--norm-training]

Nothing here is measured on a GPU. Needs ptxcpu, an optional sibling directory (../shared/ptxcpu), and g++.
In units of S, the size of x in bytes:
- x-sized: what loads and stores of x, dy, y and dx ask of global memory. At most 4.1 forward, 5.2 backward.
- to L2: all that passes between L1 and L2, in whole sectors, with weights, saved tensors and scratch.
- DRAM: what a model of an H100's L2 (50 MB, 132 multiprocessors, kept from launch to launch, empty before
  each pass) leaves for memory, less what is counted apart. At most 2.1 forward, 3.3 backward.
- apart: weights, their gradients and the saved tensors, each once.
The batch is one whose x, dy and dx L2 holds together; a larger one streams more or is cut into chunks.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Iterator, List, NamedTuple, Tuple

import torch
from shapes import DTYPES, LAYOUTS, SETS

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import triton_ptx  # noqa: E402
from triton_recording import DEVICES, make_inputs, recording, run_ops, run_split_ops  # noqa: E402

from cbam_fused._config import Config  # noqa: E402

L2 = 50 << 20
NETWORKS = {"ResNet-50": SETS["resnet50"].shapes, "YOLOv8s": SETS["yolov8s"].shapes[2:]}


class Bars(NamedTuple):
    """The most that a pass may move, in S."""

    x_sized: float
    dram: float


FORWARD, BACKWARD = Bars(4.1, 2.1), Bars(5.2, 3.3)


class Row(NamedTuple):
    """One pass over one shape, in S."""

    x_sized: float
    to_l2: float
    dram: float
    apart: float

    def passes(self, bars: Bars) -> bool:
        return self.x_sized <= bars.x_sized and self.dram <= bars.dram

    def text(self, bars: Bars) -> str:
        verdict = "pass" if self.passes(bars) else "MISS"
        return f"{self.x_sized:8.3f}{self.to_l2:8.3f}{self.dram:8.3f}{self.apart:8.3f}  {verdict}"


HEAD = f"{'x-sized':>8}{'to L2':>8}{'DRAM':>8}{'apart':>8}  bars"


def batch_for(shape: Tuple[int, ...], dtype: torch.dtype) -> int:
    """The largest power of two whose x, dy and dx fill at most 4/5 of L2; at least 1."""
    sample = torch.Size(shape).numel() * dtype.itemsize
    fitting = max(1, L2 * 4 // 5 // (3 * sample))
    return 1 << (fitting.bit_length() - 1)


def measure(
    samples: int, shape: Tuple[int, ...], dtype: torch.dtype, channels_last: bool, training: bool
) -> Tuple[Row, Row]:
    x, weights, bn = make_inputs(
        (samples, *shape), dtype, channels_last=channels_last, norm=not training, device="cpu"
    )
    dy = torch.empty_like(x).copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    with recording(DEVICES["sm_90"]) as launches:
        ops = run_split_ops if training else run_ops
        forward, _ = ops(x, weights, bn, Config(), backward=False)
        first = len(launches)
        forward, gradients = ops(x, weights, bn, Config(), dy=dy)
        del launches[:first]

    def size(*tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    s = size(x)
    machine = triton_ptx.Machine(l2=L2)
    kept = size(*weights, *bn, *forward[1:])
    apart = (kept, kept + size(*gradients[1:]))
    rows = []
    for part, some in enumerate((launches[:first], launches[first:])):
        traffic = machine.run(some, large=s)
        total = {k: sum(getattr(t, k) for t in traffic) for k in ("large", "to_l2", "dram")}
        rows.append(
            Row(total["large"] / s, total["to_l2"] / s, (total["dram"] - apart[part]) / s, apart[part] / s)
        )
    return rows[0], rows[1]


def cases(options: argparse.Namespace) -> Iterator[Tuple[str, Tuple[int, ...]]]:
    if options.shapes:
        yield from (("", tuple(int(n) for n in s.split(","))) for s in options.shapes)
    else:
        yield from ((name, shape) for name, shapes in NETWORKS.items() for shape in shapes)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", metavar="C,H,W", help="instead of ResNet-50's and YOLOv8s's")
    parser.add_argument("--batch", type=int, help="default: what L2 holds, by shape")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bfloat16"])
    parser.add_argument("--layout", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument(
        "--norm-training", action="store_true", help="cut around a BatchNorm in training; the norm left out"
    )
    options = parser.parse_args()
    reason = triton_ptx.unavailable()
    if reason is not None:
        print(f"cannot count: {reason}", file=sys.stderr)
        return 1
    start = time.perf_counter()
    where = f"{'network':10} {'x':18} {'dtype':9} {'layout':14}"
    print(f"{'':{len(where)}}{f'forward (<= {FORWARD.x_sized} x-sized, {FORWARD.dram} DRAM)':>38}", end="")
    print(f"{f'backward (<= {BACKWARD.x_sized} x-sized, {BACKWARD.dram} DRAM)':>40}")
    print(f"{where}{HEAD}  {HEAD}", flush=True)
    failed: List[str] = []
    count = 0
    for dtype in options.dtype:
        for layout in options.layout:
            for name, shape in cases(options):
                samples = options.batch or batch_for(shape, DTYPES[dtype])
                found = measure(
                    samples, shape, DTYPES[dtype], layout == "channels_last", options.norm_training
                )
                what = f"{name:10} {'x'.join(map(str, (samples, *shape))):18} {dtype:9} {layout:14}"
                print(f"{what}{found[0].text(FORWARD)}  {found[1].text(BACKWARD)}", flush=True)
                count += 1
                if not (found[0].passes(FORWARD) and found[1].passes(BACKWARD)):
                    failed.append(" ".join(what.split()))
    print(
        f"\nIn units of S, the bytes of x; modelled and counted, not measured on a GPU; "
        f"{time.perf_counter() - start:.0f} s."
    )
    print(
        f"{count - len(failed)} of {count} rows are within the bars{''.join(f'{chr(10)}  not: {f}' for f in failed)}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
