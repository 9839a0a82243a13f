"""What `fuse` does to a whole model: timm's ResNet-50 with CBAM, or a YOLO model, before and after.

Three copies of one model take turns: with the package's CBAM, with the same blocks after `fuse`, and with
the blocks taken out. The first and the last give the share of the time that CBAM takes; the blocks alone,
on the activations that they see in the model, give how much faster they got. Amdahl's law makes of both the
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
from torch import Tensor  # noqa: E402

from benchmarks.fuse_subjects import BLOCKS, Loss, blocks_of, make, without  # noqa: E402
from benchmarks.measure import Step, time_interleaved  # noqa: E402
from benchmarks.report import commit, device_name, table, versions  # noqa: E402
from benchmarks.shapes import Case  # noqa: E402
from cbam_fused import fuse  # noqa: E402

MODES = {"train": "training step", "infer": "inference"}
GATE = 1e-8  # relative, float64; the two paths differ by parts in 1e13
MARGIN = 0.9  # what has to come of the allowed speed-up


def gradients(model: nn.Module, loss_of: Loss, x: Tensor) -> Dict[str, Tensor]:
    """Loss and gradients in training, and what the model says in eval."""
    x = x.clone().requires_grad_()
    loss = loss_of(model, x)
    weights = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [x, *weights], allow_unused=True)
    found = {"loss": loss.detach(), **{str(i): g for i, g in enumerate(grads) if g is not None}}
    with torch.no_grad():
        said = model.eval()(x)
    return {**found, "eval": said[0] if isinstance(said, tuple) else said}


def gate(plain: nn.Module, fused: nn.Module, loss: Callable[[int], Loss]) -> float:
    """Largest relative difference of loss, gradients and inference, in float64 on 64x64 images."""
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    a, b = (gradients(copy.deepcopy(m).cpu().double(), loss(2), x) for m in (plain, fused))
    if list(a) != list(b):
        return float("inf")
    return max(((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-12)).item() for k in a)


def model_step(mode: str, label: str, model: nn.Module, loss_of: Loss, x: Tensor, threads: int) -> Step:
    """Forward, backward and an SGD step; or one inference."""
    if mode == "infer":
        # Batch statistics and the like stay the training copy's.
        model = copy.deepcopy(model).eval()

        def infer() -> None:
            with torch.no_grad():
                model(x)

        return Step(label, infer, threads)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def train() -> None:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()

    return Step(label, train, threads)


def record(model: nn.Module, blocks: Sequence[nn.Module], x: Tensor) -> List[Tensor]:
    """What each block is given in one forward pass."""
    inputs: List[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach())) for m in blocks]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return inputs


def blocks_step(
    mode: str, label: str, blocks: Sequence[nn.Module], inputs: Sequence[Tensor], threads: int
) -> Step:
    """Every block, one after the other, each on its own input: forward and backward, or inference."""
    if mode == "infer":
        ready = [copy.deepcopy(b).eval() for b in blocks]

        def infer() -> None:
            with torch.no_grad():
                for block, x in zip(ready, inputs):
                    block(x)

        return Step(label, infer, threads)
    leaves = [x.clone().requires_grad_() for x in inputs]
    incoming = [torch.randn_like(x) for x in inputs]

    def train() -> None:
        for block, x, dy in zip(blocks, leaves, incoming):
            block(x).backward(dy)
            x.grad = None
            for p in block.parameters():
                p.grad = None

    return Step(label, train, threads)


def measure(args: argparse.Namespace) -> Tuple[Dict[str, List[Step]], Any, float]:
    """The five steps of each mode, timed unless the gate is red; what `fuse` reported; the gate's error."""
    subject = make(args.model, args.attention)
    plain = subject.model.to(args.device)
    if args.channels_last:
        plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fused, bare = copy.deepcopy(plain), without(subject)
    report = fuse(fused, backend=args.backend)
    error = gate(plain, fused, subject.loss)
    x = torch.rand(args.batch, 3, args.size, args.size, device=args.device)
    if args.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    names = [n for n, _ in blocks_of(subject)]
    plain_blocks, fused_blocks = ([m.get_submodule(n) for n in names] for m in (plain, fused))
    inputs = record(plain, plain_blocks, x)
    loss_of = subject.loss(args.batch)
    found = {}
    for mode in args.modes:
        what = MODES[mode]
        steps = [
            model_step(mode, f"{what}, its own CBAM", plain, loss_of, x, args.threads),
            model_step(mode, f"{what}, fused", fused, loss_of, x, args.threads),
            model_step(mode, f"{what} without CBAM", bare, loss_of, x, args.threads),
            blocks_step(mode, "its own blocks alone", plain_blocks, inputs, args.threads),
            blocks_step(mode, "fused blocks alone", fused_blocks, inputs, args.threads),
        ]
        if error <= GATE:
            shape = tuple(inputs[0].shape[1:])
            case = Case(args.model, args.batch, shape, mode=mode, threads=args.threads, device=args.device)
            time_interleaved(case, steps, args.rounds, args.seconds / len(args.modes))
        found[mode] = steps
    return found, report, error


def summary(steps: Sequence[Step], what: str = MODES["train"]) -> Tuple[Dict[str, float], str]:
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
    hoped = before * (1 - 1 / allowed)
    lines = [
        f"CBAM's share of the {what}: {100 * share:.1f} % (the blocks alone take "
        f"{100 * plain / before:.1f} % of its time)",
        f"the blocks alone: {gain:.2f}x faster",
        f"the share allows the model: {allowed:.3f}x (at most {1 / (1 - share):.3f}x, with blocks that cost nothing)",
        f"the model: {before / after:.3f}x faster, {100 * (before / after) / allowed:.0f} % of what the share allows",
        f"saved {before - after:.1f} of the {hoped:.1f} ms that this would save",
    ]
    return found, "\n".join(lines)


def parse(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--model", default="resnet50", help='"yolo", or a timm model that takes block_args')
    p.add_argument("--modes", nargs="+", choices=sorted(MODES), default=["train"])
    p.add_argument("--attention", choices=sorted(BLOCKS), default="cbam", help="of a timm model")
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
    measured, report, error = measure(args)
    name = "yolov8n + Ultralytics' CBAM" if args.model == "yolo" else f"{args.model} + {args.attention}"
    print(
        f"{name}, batch {args.batch}, {args.size}x{args.size}, float32, "
        f"{'channels_last' if args.channels_last else 'contiguous'}; {device_name(args.device)}, "
        f"{args.threads} threads; {versions()}; {commit()}"
    )
    print(f"fused {len(report.swapped)} blocks, left {len(report.left)}")
    if error > GATE:
        print(f"red gate, nothing is reported: loss, gradients or inference differ by {error:.2g} in float64")
        return 1
    print(f"gate: loss, every gradient and inference agree to {error:.1g} in float64")
    percentiles: Callable[[Step], List[str]] = lambda s: [f"{s.percentile(q):.1f}" for q in (0.5, 0.2, 0.8)]  # noqa: E731
    verdicts = []
    for mode, steps in measured.items():
        print()
        print(table(["ms", "p50", "p20", "p80"], [[s.label, *percentiles(s)] for s in steps]))
        found, text = summary(steps, MODES[mode])
        print(text)
        verdicts.append(found["model_speedup"] >= MARGIN * found["allowed_speedup"])
        print(
            "within 10 % of what the share allows"
            if verdicts[-1]
            else "NOT within 10 % of what the share allows"
        )
        if args.out:
            write(args.out, rows_of(args, mode, steps, found))
    return 0 if all(verdicts) else 1


def rows_of(
    args: argparse.Namespace, mode: str, steps: Sequence[Step], found: Dict[str, float]
) -> List[Dict[str, Any]]:
    about = {
        "model": args.model, "mode": mode, "attention": args.attention, "batch": args.batch, "size": args.size,
        "backend": args.backend, "channels_last": args.channels_last, "threads": args.threads,
        **{k: round(v, 4) for k, v in found.items()}, "device": device_name(args.device),
        "versions": versions(), "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    return [
        {
            "step": s.label,
            "p20_ms": round(s.percentile(0.2), 3),
            "p50_ms": round(s.median, 3),
            "p80_ms": round(s.percentile(0.8), 3),
            "samples": len(s.samples),
            **about,
        }
        for s in steps
    ]


if __name__ == "__main__":
    sys.exit(main())
