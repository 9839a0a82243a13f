"""How the CUDA streamed tier's items follow each other, and for how long blocks wait: estimated, without a GPU.

    python benchmarks/cuda_timeline.py [--gpu H100 A100 ...] [--shapes 256,56,56 ...] [--samples 32 256]
                                       [--dtype bfloat16] [--layout contiguous] [--overhead 1.2]

Nothing here is measured. `cuda_bytes.py` counts what moves and knows no time; this plays a launch's tickets through,
in their order, with the plan that csrc/cuda/policy.h makes for the device. An item takes an overhead (its ticket, the
poll, barriers, what it stages and releases), and for each 16 KiB that 256 threads have in flight one latency of memory
or, where another item has read the same before, of L2; a convolution and the weight gradients take their
multiplications. It waits for the items whose results it reads. Latencies and the overhead are assumptions of the right
order for GPUs under load, the same for all; what the table is for is comparing plans, which differ by more than any
choice of these numbers explains.

Columns: microseconds; over a copy of as many bytes as the floor has (2 S, 3 S, or 3 S and 5 S with BatchNorm in
training) at nine tenths of the data sheet's bandwidth; the share of the blocks' time that they wait for inputs; and
microseconds of weight gradients behind the last item of x's size. What L2 cannot deliver in that time is not in it.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cuda_streamed as cs  # noqa: E402
from simt import build  # noqa: E402

from cbam_fused._config import Config, Parameters  # noqa: E402

SHAPES = (
    "64,56,56",
    "256,56,56",
    "512,28,28",
    "1024,14,14",
    "2048,7,7",
    "512,7,7",
    "64,160,160",
    "32,320,320",
)
# An op, or the two that a norm in training makes of it, and the floor in S.
CALLS = {
    "forward": (("cbam_forward",), 2),
    "backward": (("cbam_backward",), 3),
    "norm-train forward": (("attention_forward", "scale_forward"), 3),
    "norm-train backward": (("scale_backward", "attention_backward"), 5),
}


@dataclass(frozen=True)
class Gpu:
    """multiprocessors; MB of L2; KiB of shared memory that a block may ask for; GB/s of memory, by the data sheets."""

    multiprocessors: int
    l2: int
    block: int
    bandwidth: int


GPUS = {
    "A100": Gpu(108, 40, 163, 2039), "3090": Gpu(82, 6, 99, 936), "L4": Gpu(58, 48, 99, 300),
    "H100": Gpu(132, 50, 227, 3350), "B200": Gpu(148, 126, 227, 8000), "5090": Gpu(170, 96, 99, 1792),
}  # fmt: skip


def library(folder: str) -> ctypes.CDLL:
    out = str(Path(folder) / "timeline.so")
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{ROOT / 'tests'}"]
    subprocess.run([build.CXX, *flags, str(Path(__file__).with_suffix(".cpp")), "-o", out], check=True)
    return ctypes.CDLL(out)


def sizes(op, samples, shape, dtype, last, gpu) -> np.ndarray:
    """What the plan of a call depends on, without tensors of its size."""
    c, h, w = shape
    x = torch.zeros(1, 8, 2, 2, dtype=dtype)
    p = Parameters(
        torch.zeros(5, 8), torch.zeros(5), torch.zeros(8, 5), torch.zeros(8), torch.zeros(1, 2, 7, 7)
    )
    machine = cs.Machine(multiprocessors=gpu.multiprocessors, l2=gpu.l2 << 20, shared=gpu.block << 10)
    found = cs._Call(op, x, p, Config(), cs.NO_NORM, machine).sizes
    found[2:8], found[11] = (last, samples, c, 1, h, w), max(1, c // 16)
    return found


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", nargs="+", default=["H100", "A100"], choices=list(GPUS))
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--samples", nargs="+", type=int, default=[32])
    parser.add_argument("--dtype", default="bfloat16", choices=[str(d)[6:] for d in cs.ELEMENTS])
    parser.add_argument("--layout", default="contiguous", choices=["contiguous", "channels_last"])
    parser.add_argument("--calls", nargs="+", default=list(CALLS), choices=list(CALLS))
    parser.add_argument("--overhead", type=float, default=1.2, help="microseconds an item")
    parser.add_argument(
        "--latency", nargs=2, type=float, default=[0.7, 0.4], help="of memory and of L2, microseconds"
    )
    parser.add_argument("--clock", type=float, default=1.7, help="GHz")
    a = parser.parse_args(arguments)
    assumed = np.array([*a.latency, a.overhead, 16384, 1000 * a.clock])
    dtype, out = getattr(torch, a.dtype), np.zeros(7)
    with tempfile.TemporaryDirectory() as folder:
        lib = library(folder)
        for name, gpu in ((n, GPUS[n]) for n in a.gpu):
            for n in a.samples:
                for shape in (tuple(map(int, s.split(","))) for s in a.shapes):
                    for call in a.calls:
                        ops, floor = CALLS[call]
                        total = np.zeros(3)
                        for op in ops:
                            given = sizes(op, n, shape, dtype, a.layout == "channels_last", gpu)
                            lib.timeline(*(ctypes.c_void_p(v.ctypes.data) for v in (given, assumed, out)))
                            total += (out[0], out[0] * out[1], out[2])
                        bytes_ = floor * n * np.prod(shape) * dtype.itemsize
                        copy = bytes_ / (0.9e3 * gpu.bandwidth)
                        print(
                            f"{name:5} {','.join(map(str, (n, *shape))):15} {call:19} {total[0]:8.1f} us"
                            f"  {total[0] / copy:6.2f} copies  waiting {total[1] / total[0]:4.2f}"
                            f"  weights {total[2]:6.1f} us   {out[3]:.0f} a unit, {out[4]:.0f} steps, {out[5]:.0f} blocks",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
