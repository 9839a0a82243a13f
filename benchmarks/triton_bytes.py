"""Bytes that the Triton kernels move, counted by running their compiled PTX on the CPU.

    python benchmarks/triton_bytes.py [--quick]

S is the size of x in bytes. "x-sized" is what loads and stores of x, dy, y and dx request from global
memory (at most 4.1 S forward and 5.2 S backward); "DRAM" is what a model of an H100's L2 (50 MB,
132 multiprocessors) leaves for memory in a batch that it holds (at most 2.1 S and 3.3 S), less the
weights and saved tensors, which are counted apart. Nothing here is measured on a GPU. Needs ptxcpu,
an optional sibling directory (../shared/ptxcpu), and g++.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests"), str(Path(__file__).resolve().parents[1])]

import triton_ptx  # noqa: E402
from triton_recording import DEVICES, make_inputs, recording, run_ops  # noqa: E402

from cbam_fused._config import Config  # noqa: E402

L2 = 50 << 20
FORWARD_LAUNCHES = 3
# (C, H, W) of ResNet-50 at 224 and of YOLOv8s at 640, P3 to P5.
SHAPES = {
    "ResNet-50": [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)],
    "YOLOv8s": [(128, 80, 80), (256, 40, 40), (512, 20, 20)],
}


def row(name: str, shape, samples: int, dtype: torch.dtype, channels_last: bool) -> bool:
    x, weights, bn = make_inputs((samples, *shape), dtype, channels_last=channels_last, device="cpu")
    dy = torch.empty_like(x).copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    with recording(DEVICES["sm_90"]) as launches:
        forward, _ = run_ops(x, weights, bn, Config(), dy=dy)
    s = x.numel() * x.element_size()
    machine = triton_ptx.Machine(l2=L2)
    split = [launches[:FORWARD_LAUNCHES], launches[FORWARD_LAUNCHES:]]
    apart = sum(t.numel() * t.element_size() for t in (*weights, *bn, *forward[1:]))
    ok = True
    for part, (kind, some) in enumerate(zip(("forward", "backward"), split)):
        traffic = machine.run(some, large=s)
        large = sum(t.large for t in traffic) / s
        total = sum(t.requested for t in traffic) / s
        dram = sum(t.dram for t in traffic) / s
        net = dram - apart / s
        limits = ((4.1, 2.1), (5.2, 3.3))[part]
        good = large <= limits[0] and net <= limits[1]
        ok &= good
        layout = "channels-last" if channels_last else "contiguous"
        print(
            f"{name:10} {samples}x{shape[0]:<5}{shape[1]:3}x{shape[2]:<4}{str(dtype)[6:]:9}{layout:14}{kind:9}"
            f"{large:9.3f}{total:10.3f}{dram:8.3f}{apart / s:8.3f}{net:9.3f}  {'' if good else 'over the limit'}",
            flush=True,
        )
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape of each network, contiguous")
    options = parser.parse_args()
    reason = triton_ptx.unavailable()
    if reason is not None:
        print(f"cannot count: {reason}", file=sys.stderr)
        return 1
    print(
        "network    samples and shape    dtype    layout        pass      x-sized  all loads  DRAM   apart  DRAM net   (in S)"
    )
    ok = True
    for name, shapes in SHAPES.items():
        for shape in shapes[-1:] if options.quick else shapes:
            for channels_last in (False,) if options.quick else (False, True):
                ok &= row(name, shape, 2, torch.bfloat16, channels_last)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
