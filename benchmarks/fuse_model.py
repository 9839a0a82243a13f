"""What `fuse` does to the training step of a whole model: timm's ResNet-50 with CBAM, before and after.

Three copies of one model take turns: with timm's CBAM, with the same blocks after `fuse`, and with the
blocks taken out. The first and the last give the share of the step that CBAM takes; the blocks alone, on
the activations that they see in the model, give how much faster they got. Amdahl's law makes of both the
speed-up that the share allows, and the second copy shows what came of it.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import sys
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.measure import Step, time_interleaved  # noqa: E402
from benchmarks.report import commit, device_name, table, versions  # noqa: E402
from benchmarks.shapes import Case  # noqa: E402
from cbam_fused import fuse  # noqa: E402

BLOCKS = {"cbam": "CbamModule", "lcbam": "LightCbamModule"}
GATE = 1e-8  # relative, float64; the two paths differ by parts in 1e13
MARGIN = 0.9  # what has to come of the allowed speed-up


def make_model(name: str, attention: str) -> nn.Module:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000, block_args={"attn_layer": attention})
    for module in model.modules():
        # timm starts some BatchNorms at weight 0, behind which a wrong gradient would not show.
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.constant_(module.weight, 0.5)
    return model.train()


def blocks_of(model: nn.Module, attention: str) -> List[Tuple[str, nn.Module]]:
    return [(n, m) for n, m in model.named_modules() if type(m).__name__ == BLOCKS[attention]]


def without(model: nn.Module, attention: str) -> nn.Module:
    """A copy whose CBAMs are the identity."""
    twin = copy.deepcopy(model)
    for name, _ in blocks_of(twin, attention):
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, nn.Identity())
    return twin


def gradients(model: nn.Module, x: Tensor, target: Tensor) -> Dict[str, Tensor]:
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), target)
    grads = torch.autograd.grad(loss, [x, *model.parameters()])
    return {"loss": loss.detach(), **{str(i): g for i, g in enumerate(grads)}}


def gate(plain: nn.Module, fused: nn.Module) -> float:
    """Largest relative difference of loss and gradients between the two models, in float64 on 64x64 images."""
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    target = torch.tensor([3, 500])
    a, b = (gradients(copy.deepcopy(m).cpu().double(), x, target) for m in (plain, fused))
    return max(((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-12)).item() for k in a)


def training_step(label: str, model: nn.Module, x: Tensor, target: Tensor, threads: int) -> Step:
    """Forward, backward and an SGD step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def call() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    return Step(label, call, threads)


def record(model: nn.Module, blocks: Sequence[nn.Module], x: Tensor) -> List[Tensor]:
    """What each block is given in one forward pass."""
    inputs: List[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach())) for m in blocks]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return inputs


def blocks_step(label: str, blocks: Sequence[nn.Module], inputs: Sequence[Tensor], threads: int) -> Step:
    """Forward and backward of every block, one after the other, each on its own input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    incoming = [torch.randn_like(x) for x in inputs]

    def call() -> None:
        for block, x, dy in zip(blocks, leaves, incoming):
            block(x).backward(dy)
            x.grad = None
            for p in block.parameters():
                p.grad = None

    return Step(label, call, threads)


def measure(args: argparse.Namespace) -> Tuple[List[Step], Any, float]:
    plain = make_model(args.model, args.attention).to(args.device)
    if args.channels_last:
        plain = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fused, bare = copy.deepcopy(plain), without(plain, args.attention)
    report = fuse(fused, backend=args.backend)
    error = gate(plain, fused)
    x = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    if args.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    target = torch.randint(1000, (args.batch,), device=args.device)
    names = [n for n, _ in blocks_of(plain, args.attention)]
    plain_blocks, fused_blocks = ([m.get_submodule(n) for n in names] for m in (plain, fused))
    inputs = record(plain, plain_blocks, x)
    steps = [
        training_step("model, timm's CBAM", plain, x, target, args.threads),
        training_step("model, fused", fused, x, target, args.threads),
        training_step("model without CBAM", bare, x, target, args.threads),
        blocks_step("blocks alone, timm", plain_blocks, inputs, args.threads),
        blocks_step("blocks alone, fused", fused_blocks, inputs, args.threads),
    ]
    if error <= GATE:
        shape = tuple(inputs[0].shape[1:])
        case = Case(args.model, args.batch, shape, mode="train", threads=args.threads, device=args.device)
        time_interleaved(case, steps, args.rounds, args.seconds)
    return steps, report, error


def summary(steps: Sequence[Step]) -> Tuple[Dict[str, float], str]:
    """The derived numbers, and the lines that say them."""
    before, after, bare, plain, fused = (s.median for s in steps)
    share = 1 - bare / before
    gain = plain / fused
    allowed = 1 / (1 - share + share / gain)
    found = {
        "share": share,
        "blocks_speedup": gain,
        "allowed_speedup": allowed,
        "model_speedup": before / after,
    }
    lines = [
        f"CBAM's share of the training step: {100 * share:.1f} % (the blocks alone take "
        f"{100 * plain / before:.1f} % of its time)",
        f"the blocks alone: {gain:.2f}x faster",
        f"the share allows the model: {allowed:.3f}x (at most {1 / (1 - share):.3f}x, with blocks that cost nothing)",
        f"the model: {before / after:.3f}x faster, {100 * (before / after) / allowed:.0f} % of what the share allows",
    ]
    return found, "\n".join(lines)


def parse(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--model", default="resnet50", help="a timm model that takes block_args")
    p.add_argument("--attention", choices=sorted(BLOCKS), default="cbam")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--backend", default="auto", help="backend of the fused blocks")
    p.add_argument("--channels-last", action="store_true")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--seconds", type=float, default=300.0, help="stop after these (5 rounds at the least)")
    p.add_argument("--out", help="CSV to append the rows to")
    return p.parse_args(arguments)


def write(path: str, rows: Sequence[Dict[str, Any]]) -> None:
    fresh = not os.path.exists(path)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    steps, report, error = measure(args)
    print(
        f"{args.model} + {args.attention}, batch {args.batch}, {args.size}x{args.size}, float32, "
        f"{'channels_last' if args.channels_last else 'contiguous'}; {device_name(args.device)}, "
        f"{args.threads} threads; {versions()}; {commit()}"
    )
    print(f"fused {len(report.swapped)} blocks, left {len(report.left)}")
    if error > GATE:
        print(f"red gate, nothing is reported: loss or gradients differ by {error:.2g} in float64")
        return 1
    print(f"gate: loss and every gradient agree to {error:.1g} in float64")
    percentiles: Callable[[Step], List[str]] = lambda s: [f"{s.percentile(q):.1f}" for q in (0.5, 0.2, 0.8)]  # noqa: E731
    print(table(["training step, ms", "p50", "p20", "p80"], [[s.label, *percentiles(s)] for s in steps]))
    found, text = summary(steps)
    print(text)
    good = found["model_speedup"] >= MARGIN * found["allowed_speedup"]
    print("within 10 % of what the share allows" if good else "NOT within 10 % of what the share allows")
    if args.out:
        about = {
            "model": args.model, "attention": args.attention, "batch": args.batch, "size": args.size,
            "backend": args.backend, "channels_last": args.channels_last, "threads": args.threads,
            **{k: round(v, 4) for k, v in found.items()}, "device": device_name(args.device),
            "versions": versions(), "commit": commit(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }  # fmt: skip
        write(
            args.out,
            [
                {
                    "step": s.label,
                    "p20_ms": round(s.percentile(0.2), 3),
                    "p50_ms": round(s.median, 3),
                    "p80_ms": round(s.percentile(0.8), 3),
                    "samples": len(s.samples),
                    **about,
                }
                for s in steps
            ],
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
