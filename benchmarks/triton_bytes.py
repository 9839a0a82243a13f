"""Bytes that the Triton kernels move, counted by running their compiled PTX on the CPU.

    python benchmarks/triton_bytes.py [--shapes 256,56,56 ...] [--batch N] [--dtype bfloat16 float32]
        [--layout contiguous channels_last] [--norm-training] [--launches]

Nothing here is measured on a GPU. Needs ptxcpu, an optional sibling directory (../shared/ptxcpu), and g++.
In units of S, the size of x in bytes:
- global: what passes between L1 and L2 in whole sectors, loads that L1 does not hold and all stores, of
  x, dy, y and dx ("x-sized") and of "scratch", which is whatever one launch leaves for a later one and no op
  returns. Both together at most 4.1 forward, 5.2 backward.
- saved, weights: the same traffic of the tensors that a forward returns for the backward, and of weights and
  their gradients; every time that a program reads them counts.
- DRAM: what a model of an H100's L2 (50 MB, 132 multiprocessors, kept from launch to launch, empty before
  each pass) leaves for memory, less "once". At most 2.1 forward, 3.3 backward.
- once: the bytes of weights, their gradients and saved tensors; what DRAM traffic they cause beyond that
  stays in the column before.
The batch is the largest power of two whose x, dy and dx fill at most 4/5 of L2: it holds what the bars on
DRAM speak of, and a larger one streams more or is cut into chunks. A small map then has many samples, as
in training: one sample's weights and gates are shared among few positions.

At (2048, 7, 7) in 16 bits the backward's bar leaves 0.2 S beside x, dy and dx, and a float32 vector of a sample's
channels takes 4 / (49 * 2) = 0.041 S each time that it is written or read. Launches that share a sample hand several
of them on: 0.48 S of scratch, and 5.48 S in all. With a program a sample (`whole_backward`) only the gradient of the
logits is left, for the weights' launch, and the end of x is still in the L1 (160 KB of it, as modelled) of the program
that reads it again. The price is in another column: each sample reads the MLP's weights, 5.3 S for 2.0 S.

With few channels it is maps that weigh: a float32 one takes 4 / (2 C) of S in 16 bits, 0.031 S with 64 channels and
0.0625 S with 32. On such thin maps the second and the fourth launch both convolve the gradient of the spatial logits,
which is less than the two maps that one would hand on, and take tiles of several rows, of which the convolution reads
1.6 times as much and not, as of stretches of 512 positions, 2.8 times. At (32, 320, 320) that is not enough: the gradient
alone, written once and read for the pass over x and for that over dy, is 0.19 S without any halo and 0.27 S with that of
the tiles, even if the convolution's weights took it from one of the two.
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
NETWORKS = {"ResNet-50": SETS["resnet50"].shapes, "YOLOv8s": SETS["yolov8s"].shapes}


class Bars(NamedTuple):
    """The most that a pass may move, in S."""

    traffic: float
    dram: float


PASSES = {"forward": Bars(4.1, 2.1), "backward": Bars(5.2, 3.3)}


class Row(NamedTuple):
    """One pass over one shape, in S."""

    x_sized: float
    scratch: float
    saved: float
    weights: float
    dram: float
    once: float

    def passes(self, bars: Bars) -> bool:
        return self.x_sized + self.scratch <= bars.traffic and self.dram <= bars.dram

    def text(self, bars: Bars) -> str:
        both = f"{self.x_sized + self.scratch:8.3f}"
        verdict = "pass" if self.passes(bars) else "MISS"
        return f"{both}{''.join(f'{value:8.3f}' for value in self)}  {verdict}"


HEAD = (
    "".join(f"{name:>8}" for name in ("global", "x-sized", "scratch", "saved", "weights", "DRAM", "once"))
    + "  bars"
)
OWNERS = ("x-sized", "scratch", "saved", "weights")


def batch_for(shape: Tuple[int, ...], dtype: torch.dtype) -> int:
    """The largest power of two whose x, dy and dx fill at most 4/5 of L2; at least 1."""
    sample = torch.Size(shape).numel() * dtype.itemsize
    fitting = max(1, L2 * 4 // 5 // (3 * sample))
    return 1 << (fitting.bit_length() - 1)


def measure(
    samples: int,
    shape: Tuple[int, ...],
    dtype: torch.dtype,
    channels_last: bool,
    training: bool = False,
    each: bool = False,
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

    owners = {}
    for owner, tensors in (
        ("x-sized", (x, dy, forward[0], gradients[0])),
        ("saved", forward[1:]),
        ("weights", (*weights, *bn, *gradients[1:])),
    ):
        owners.update({t.untyped_storage().data_ptr(): owner for t in tensors if t is not None and t.numel()})
    s = size(x)
    machine = triton_ptx.Machine(l2=L2)
    kept = size(*weights, *bn, *forward[1:])
    once = (kept, kept + size(*gradients[1:]))
    rows = []
    for part, some in enumerate((launches[:first], launches[first:])):
        traffic = machine.run(some, owners)
        if each:
            for t in traffic:
                moved = "".join(f"{t.by_owner.get(owner, 0) / s:8.3f}" for owner in OWNERS)
                print(f"  {t.kernel:34}{moved}{t.dram / s:8.3f} DRAM with all")
        moved = [sum(t.by_owner.get(owner, 0) for t in traffic) / s for owner in OWNERS]
        rows.append(Row(*moved, (sum(t.dram for t in traffic) - once[part]) / s, once[part] / s))
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
    parser.add_argument("--launches", action="store_true", help="each launch's traffic too")
    options = parser.parse_args()
    reason = triton_ptx.unavailable()
    if reason is not None:
        print(f"cannot count: {reason}", file=sys.stderr)
        return 1
    start = time.perf_counter()
    where = f"{'network':10} {'x':18} {'dtype':9} {'layout':14}"
    for_each = (f"{name} (<= {bars.traffic} global, {bars.dram} DRAM)" for name, bars in PASSES.items())
    print(" " * len(where) + "  ".join(f"{text:>{len(HEAD)}}" for text in for_each))
    print(f"{where}{HEAD}  {HEAD}", flush=True)
    failed: List[str] = []
    count = 0
    for dtype in options.dtype:
        for layout in options.layout:
            for name, shape in cases(options):
                samples = options.batch or batch_for(shape, DTYPES[dtype])
                found = measure(
                    samples,
                    shape,
                    DTYPES[dtype],
                    layout == "channels_last",
                    options.norm_training,
                    options.launches,
                )
                what = f"{name:10} {'x'.join(map(str, (samples, *shape))):18} {dtype:9} {layout:14}"
                print(what + "  ".join(map(Row.text, found, PASSES.values())), flush=True)
                count += 1
                if not all(map(Row.passes, found, PASSES.values())):
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
