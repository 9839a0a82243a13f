"""Bytes that the CUDA kernels of both tiers move: counted on the host, and modelled behind the caches.

    python benchmarks/cuda_bytes.py [--tier streamed resident] [--shapes 256,56,56 ...] [--samples 8]
                                    [--dtype bfloat16] [--layout contiguous] [--modelled] [--l2 50] [--found 50]

Nothing here runs on a GPU. Counted bytes are what the kernels ask of global memory when tests/simt executes
their sources, a caches' hit as much as a miss; S is the size of x, weights are float32. The streamed tier's plan
depends on how many samples there are for how many multiprocessors: it is counted with one each, 8. With fewer,
several blocks share a sample and hand each other more: with one for eight, up to 0.16 S, on tiny maps 0.5 S. It depends
on the L2 behind a multiprocessor, too, of which this device has much: with an H100's 0.4 MB (`--l2 3`) the backward's
items are half as large, and hand on 0.05 to 0.12 S more (5.18 S become 5.23 at (512, 28, 28), 5.14 become 5.25 at
(128, 28, 28)), which `cuda_timeline.py` has as the faster plan there.

Modelled DRAM traffic is what compiled PTX makes of it in the cache model of the optional ../shared/ptxcpu (H100:
132 multiprocessors, 50 MB of L2; lines read or written with .cs are the first to be replaced, as PTX has it), over
the floor of 2 S or 3 S (3 S and 5 S with BatchNorm in training): as it is, and without the weights, their gradients and
the saved tensors, each of which moves once. `--l2` is what the device says that it has, and `--found` what there is, if
not as much: half of it, where each half of an A100's or H100's L2 keeps a copy. "L1 to L2" is all that passes
between the two, weights and small tensors included, in S. The time over a copy's is
the resident tier's for a batch of 16: ptxcpu's estimate, which counts PTX instructions and traffic and knows no
latency. Instructions an element are PTX's, as warps executed them, waiting included: good for comparing versions of
a kernel, and two to three times what ptxas makes of them.

What misses the backward's 5.2 S: (2048, 7, 7) and (1024, 7, 7), where a float32 vector of a sample's channels is
0.041 S in 16 bits, and blocks hand each other a dozen. A block a sample, as for smaller layers, moves 5.18 S at
(2048, 7, 7), but then samples do not share the MLP's weights: 6.5 S more of them, 3.3 S in 16 bits. And (32, 320,
320), where a float32 map is 0.0625 S: the gradient of the spatial logits, written once and read with a halo by two
passes, is more than 0.2 S. And contiguous (256, 33, 33) and (2048, 25, 42): with ragged rows, tiles of the passes that
reduce overlap by a vector, 0.07 S, and as they are as wide as a warp, more of them share a map. Of these the resident
tier, where a device has it, takes the tiny maps (a batch of one wave) and (256, 33, 33): 3 S of x-sized tensors.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cuda_ptx  # noqa: E402
import cuda_resident as cr  # noqa: E402
import cuda_streamed as cs  # noqa: E402

from cbam_fused._config import Config, Parameters  # noqa: E402

# What ResNet-18 and -50, MobileNet and YOLOv8s have at the places where CBAM is put; and DeepLab's map of a crop of
# 513 x 513 and Faster R-CNN's last of 800 x 1344, in which no row but the first begins where a vector does.
SHAPES = (
    "64,56,56", "128,28,28", "256,14,14", "512,7,7", "256,56,56", "512,28,28", "1024,14,14", "2048,7,7",
    "64,112,112", "128,56,56", "256,28,28", "512,14,14", "1024,7,7",
    "32,320,320", "64,160,160", "128,80,80", "256,40,40", "512,20,20",
    "256,33,33", "2048,25,42",
)  # fmt: skip
MULTIPROCESSORS = 8  # of the device that counted plans are for
WEIGHTS = (
    "w1",
    "b1",
    "w2",
    "b2",
    "conv_weight",
    "conv_bias",
    "dw1",
    "db1",
    "dw2",
    "db2",
    "dconv_weight",
    "dconv_bias",
)

# Bars. Counted: x-sized tensors and scratch memory, in S; for the resident tier x-sized tensors alone.
COUNTED = {
    ("streamed", "forward"): 4.1,
    ("streamed", "backward"): 5.2,
    ("resident", "forward"): 2.0,
    ("resident", "backward"): 3.0,
}
# Modelled: DRAM traffic over the floor, without small tensors.
MODELLED = {
    ("streamed", "forward"): 1.05,
    ("streamed", "backward"): 1.08,
    ("streamed", "norm-train forward"): 1.08,
    ("streamed", "norm-train backward"): 1.08,
    ("resident", "forward"): 1.03,
    ("resident", "backward"): 1.03,
}
# The estimated time over a copy's, where there are so many channels and positions.
TIME = {"forward": 1.15, "backward": 1.1}
TIME_CHANNELS, TIME_POSITIONS = 256, 784


def verdict(value: float, bar: float) -> str:
    return f"{'pass' if value <= bar else 'MISS'} (bar {bar:g})"


def title(name, samples, shape, dtype, last) -> str:
    layout = "last" if last else "contiguous"
    return f"{name:28} {','.join(map(str, (samples, *shape))):14} {str(dtype)[6:]:9} {layout:10}"


def resident_fits(x, p, operation) -> bool:
    call = cs._Call(operation, x[:1], p, Config(), cs.NO_NORM, cr.ResidentMachine())
    report = cr.plan(cr.library(x.dtype), call.sizes)
    return bool(report["covered"] and report["fits"])


def problem(samples, shape, dtype, last):
    c, h, w = shape
    g = torch.Generator().manual_seed(0)

    def draw(*size, scale=1.0):
        return torch.randn(*size, generator=g) * scale

    layout = torch.channels_last if last else torch.contiguous_format
    x, dy = (draw(samples, c, h, w).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    hidden = max(1, c // 16)
    p = Parameters(
        draw(hidden, c, scale=c**-0.5),
        draw(hidden),
        draw(c, hidden, scale=hidden**-0.5),
        draw(c),
        draw(1, 2, 7, 7, scale=0.1),
    )
    return x, dy, p


def counted(tier, samples, shape, dtype, last, l2, by_tensor=False) -> None:
    x, dy, p = problem(samples, shape, dtype, last)
    size = x.numel() * x.element_size()
    streamed = cs.Machine(multiprocessors=MULTIPROCESSORS, resident=MULTIPROCESSORS, l2=l2)
    saved = cs.cbam_forward(x, p, Config(), cs.NO_NORM, streamed)
    for name in ("forward", "backward"):
        if tier == "resident" and not (dtype != torch.float64 and resident_fits(x, p, f"cbam_{name}")):
            print(title(f"{tier} {name}", samples, shape, dtype, last), "goes to the streamed tier")
            continue
        machine = cr.ResidentMachine(resident=16) if tier == "resident" else streamed
        if name == "forward":
            cs.cbam_forward(x, p, Config(), cs.NO_NORM, machine)
        else:
            cs.cbam_backward(dy, x, p, Config(), saved, cs.NO_NORM, machine)
        traffic = machine.traffic
        big = sum(traffic.get(n, 0) for n in cuda_ptx.BIG)
        weights = sum(traffic.get(n, 0) for n in WEIGHTS)
        scratch = traffic["scratch"]
        small = sum(traffic.values()) - big - weights - scratch
        judged = big if tier == "resident" else big + scratch
        print(
            f"{title(f'{tier} {name}', samples, shape, dtype, last)}"
            f" x-sized {big / size:5.3f} S   scratch {scratch / size:5.3f} S   saved and gates {small / size:5.3f} S"
            f"   weights {weights / size:6.3f} S   {verdict(judged / size, COUNTED[tier, name])}",
            flush=True,
        )
        if by_tensor and tier == "streamed":
            print(*(f"    {n} {moved / size:5.3f} S" for n, moved in machine.scratch.items()), flush=True)


def modelled_row(
    tier, name, samples, shape, dtype, last, l2, floor, dram, small, past_l1, work, time=None
) -> None:
    """`floor`, `dram`, `small`, what the small tensors take of it, and `past_l1` in bytes; `work`, in thread instructions."""
    apart = (dram - small) / floor
    text = f" L2 {l2 >> 20} MB   DRAM {dram / floor:5.3f} of the floor"
    text += f", {apart:5.3f} without small tensors {verdict(apart, MODELLED[tier, name])}"
    elements = samples * math.prod(shape)
    text += f"   L1 to L2 {past_l1 / (elements * getattr(torch, str(dtype)[6:]).itemsize):6.3f} S"
    text += f"   {work / elements:5.1f} PTX instructions an element"
    if time is not None:
        text += f"   time / copy at N = 16 {time:5.3f}"
        if shape[0] >= TIME_CHANNELS and shape[1] * shape[2] >= TIME_POSITIONS:
            text += f" {verdict(time, TIME[name])}"
    print(title(f"{tier} {name}", samples, shape, dtype, last) + text, flush=True)


def modelled_resident(samples, shape, dtype, last, l2, found) -> None:
    x, dy, p = problem(samples, shape, dtype, last)
    size = x.numel() * x.element_size()
    machine = cuda_ptx.ResidentPtxMachine(l2=l2, modelled_l2=found)
    saved = None
    for name, floor in (("forward", 2 * size), ("backward", 3 * size)):
        op = f"cbam_{name}"
        if not resident_fits(x, p, op):
            print(title(f"resident {name}", samples, shape, dtype, last), "goes to the streamed tier")
            continue
        if saved is None:
            saved = cs.cbam_forward(x, p, Config(), cs.NO_NORM, machine)
        else:
            cs.cbam_backward(dy, x, p, Config(), saved, cs.NO_NORM, machine)
        time = machine.time_over_copy(op, samples, floor)
        modelled_row(
            "resident", name, samples, shape, dtype, last, found, floor, machine.dram(op), machine.small_bytes[op],
            machine.past_l1(op), machine.instructions(op), time,
        )  # fmt: skip


def modelled_streamed(samples, shape, dtype, last, l2, found) -> None:
    x, dy, p = problem(samples, shape, dtype, last)
    size = x.numel() * x.element_size()
    machine = cuda_ptx.PtxMachine(l2=l2, modelled_l2=found)

    def row(name, floor, *ops):
        counts = (machine.dram, machine.small_bytes.__getitem__, machine.past_l1, machine.instructions)
        totals = (sum(map(of, ops)) for of in counts)
        modelled_row("streamed", name, samples, shape, dtype, last, found, floor * size, *totals)

    saved = cs.cbam_forward(x, p, Config(), cs.NO_NORM, machine)
    row("forward", 2, "cbam_forward")
    cs.cbam_backward(dy, x, p, Config(), saved, cs.NO_NORM, machine)
    row("backward", 3, "cbam_backward")
    out = cs.attention_forward(x, p, Config(), machine)
    scaled = cs.scale_forward(x, out["channel_gate"], out["z"], False, machine)
    row("norm-train forward", 3, "attention_forward", "scale_forward")
    back = cs.scale_backward(dy, x, out["channel_gate"], scaled["spatial_gate"], machine)
    cs.attention_backward(
        dy, x, p, Config(), out, scaled["spatial_gate"], back["dz_out"], back["dchannel_gate"], machine
    )
    row("norm-train backward", 5, "scale_backward", "attention_backward")


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tier", nargs="+", default=["streamed", "resident"], choices=["streamed", "resident"]
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--samples", type=int, help="streamed 8, resident 1; with --modelled 4")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=[str(d)[6:] for d in cs.ELEMENTS])
    parser.add_argument(
        "--layout",
        nargs="+",
        default=["contiguous", "channels_last"],
        choices=["contiguous", "channels_last"],
    )
    parser.add_argument("--by-tensor", action="store_true", help="counted scratch memory, tensor by tensor")
    parser.add_argument(
        "--modelled", action="store_true", help="DRAM traffic by ../shared/ptxcpu instead; takes long"
    )
    parser.add_argument("--l2", nargs="+", type=int, default=[50], help="megabytes of L2 that a plan is for")
    parser.add_argument("--found", type=int, help="megabytes of L2 that the model has, if not as many")
    parser.add_argument("--ignore-hints", action="store_true", help="caches that take no notice of .cs")
    a = parser.parse_args(arguments)
    cuda_ptx.HINTS = not a.ignore_hints
    if a.modelled and cuda_ptx.unavailable():
        parser.error(cuda_ptx.unavailable())
    for shape in (tuple(map(int, s.split(","))) for s in a.shapes):
        for dtype in (getattr(torch, d) for d in a.dtype):
            for last in (layout == "channels_last" for layout in a.layout):
                for tier in a.tier:
                    samples = a.samples or (4 if a.modelled else MULTIPROCESSORS if tier == "streamed" else 1)
                    run = modelled_streamed if tier == "streamed" else modelled_resident
                    for l2 in (megabytes << 20 for megabytes in a.l2):
                        if a.modelled:
                            run(samples, shape, dtype, last, l2, (a.found << 20) if a.found else l2)
                        else:
                            counted(tier, samples, shape, dtype, last, l2, a.by_tensor)


if __name__ == "__main__":
    main()
