"""Real images, end to end: the same network with plain CBAM and with FusedCBAM, trained side by side.

From equal weights, on equal batches, in turns within one process: the losses have to lie on each
other, the time and the memory are what differs. A control, plain CBAM that gets each batch in reverse
order, shows how far mere rounding drives two trainings apart. Digits come with scikit-learn, the photographs of
the attention picture with scikit-image; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

# Read when torch loads: the memory pass would otherwise log its start and end.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.attention import attention_picture  # noqa: E402
from benchmarks.measure import Step, peak_bytes  # noqa: E402
from benchmarks.networks import ResNet18, SmallCNN, fused_twin  # noqa: E402
from benchmarks.report import Progress, commit, device_name, table, versions  # noqa: E402

SEED = 0
# The first steps fill caches and pools; their losses count, their times do not.
WARM_UP = 3


@dataclass(frozen=True)
class Plan:
    """How long a network is trained: `steps`, or fewer if `seconds` are over (at least 6)."""

    network: str
    size: int
    batch: int
    steps: int
    rate: float
    seconds: float


# The digits are 8 x 8 and are enlarged to `size`; 32 is the size of CIFAR's images.
PLANS = {
    False: (Plan("small CNN", 32, 64, 200, 0.01, 60), Plan("ResNet-18", 32, 64, 40, 0.01, 180)),
    True: (Plan("small CNN", 32, 32, 80, 0.01, 8), Plan("ResNet-18", 16, 32, 24, 0.01, 20)),
}
PATCH_STEPS = {False: 250, True: 60}


def digits(size: int) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits: training images (1437, 3, size, size) and labels, then 360 for the test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 16
    x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    x = ((x - x.mean()) / x.std()).expand(-1, 3, -1, -1).contiguous()
    y = torch.from_numpy(data.target).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SEED))
    train, test = order[:1437], order[1437:]
    return x[train], y[train], x[test], y[test]


def build(plan: Plan, device: str, backend: str) -> Dict[str, nn.Module]:
    torch.manual_seed(SEED)
    plain = (SmallCNN(plan.size) if plan.network == "small CNN" else ResNet18()).to(device)
    return {"plain": plain, "fused": fused_twin(plain, backend), "control": copy.deepcopy(plain)}


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = sum((model(a).argmax(1) == b).sum().item() for a, b in zip(x.split(120), y.split(120)))
    model.train()
    return right / len(y)


def train(plan: Plan, device: str, backend: str) -> List[Dict[str, Any]]:
    """One row a step and variant."""
    x, y, x_test, y_test = (t.to(device) for t in digits(plan.size))
    models = build(plan, device, backend)
    optimizers = {
        name: torch.optim.SGD(m.parameters(), lr=plan.rate, momentum=0.9, weight_decay=5e-4)
        for name, m in models.items()
    }
    g = torch.Generator().manual_seed(SEED)
    rows: List[Dict[str, Any]] = []
    progress = Progress(plan.steps)
    start = time.perf_counter()
    for step in range(plan.steps):
        pick = torch.randint(len(y), (plan.batch,), generator=g).to(device)
        batch, backward = (x[pick], y[pick]), (x[pick.flip(0)], y[pick.flip(0)])
        # Who goes first changes every step, so that neither always finds the other's data in cache.
        for name in ("plain", "fused", "control") if step % 2 else ("fused", "plain", "control"):
            _synchronize(device)
            begin = time.perf_counter()
            loss = step_once(models[name], optimizers[name], *(backward if name == "control" else batch))
            _synchronize(device)
            ms = (time.perf_counter() - begin) * 1e3
            rows.append(
                {"network": plan.network, "variant": name, "step": step, "loss": loss.item(), "ms": ms}
            )
        progress.begin(step + 1, f"{plan.network}, loss {rows[-1]['loss']:.3f}")
        if time.perf_counter() - start > plan.seconds and step >= 5:
            break
    progress.clear()
    for name, model in models.items():
        right = accuracy(model, x_test, y_test)

        def whole_step() -> None:
            step_once(model, optimizers[name], *batch)
            optimizers[name].zero_grad(set_to_none=True)

        peak = peak_bytes(device, Step(name, whole_step, torch.get_num_threads()))
        for row in rows:
            if row["variant"] == name:
                row.update(test_accuracy=right, peak_bytes=peak, batch=plan.batch, size=plan.size)
    return rows


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def of(rows: Sequence[Dict[str, Any]], network: str, variant: str) -> List[Dict[str, Any]]:
    return [r for r in rows if r["network"] == network and r["variant"] == variant]


def median_ms(rows: Sequence[Dict[str, Any]]) -> float:
    return statistics.median(float(r["ms"]) for r in rows if int(r["step"]) >= WARM_UP)


def summary(rows: Sequence[Dict[str, Any]]) -> str:
    lines = []
    for network in dict.fromkeys(r["network"] for r in rows):
        plain = of(rows, network, "plain")
        for name in ("plain", "fused", "control"):
            r = of(rows, network, name)
            first, timed = r[0], name != "control"
            apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(plain, r))
            lines.append(
                (
                    f"{network} at {first['size']} x {first['size']}, {name}",
                    str(len(r)),
                    f"{median_ms(r):.1f}" if timed else "",
                    f"{median_ms(plain) / median_ms(r):.2f}x" if name == "fused" else "",
                    f"{first['peak_bytes'] / 1e6:.1f} MB" if timed else "",
                    f"{first['peak_bytes'] / plain[0]['peak_bytes']:.2f}" if name == "fused" else "",
                    f"{first['loss']:.4f} -> {r[-1]['loss']:.4f}",
                    "" if name == "plain" else f"{apart:.1e}",
                    f"{100 * first['test_accuracy']:.1f} %",
                )
            )
    header = (
        "",
        "steps",
        "ms/step",
        "faster",
        "peak",
        "of plain's",
        "loss",
        "apart by at most",
        "test accuracy",
    )
    return table(header, lines)


def draw(path: str, target: str) -> None:
    """Losses, times and memory, from the rows of the CSV file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    networks = list(dict.fromkeys(r["network"] for r in rows))
    colours = {"plain": "#d1495b", "fused": "#0b7285"}
    figure, axes = plt.subplots(
        len(networks), 3, figsize=(12, 3.4 * len(networks)), squeeze=False, layout="constrained",
        gridspec_kw={"width_ratios": [2.4, 1, 1]},
    )  # fmt: skip
    for (curve, times, memory), network in zip(axes, networks):
        groups = {name: of(rows, network, name) for name in ("plain", "fused")}
        # The wide pale line lies under the thin dark one: apart, both would show.
        for name, style in (("plain", {"linewidth": 5, "alpha": 0.4}), ("fused", {"linewidth": 1.3})):
            r = groups[name]
            curve.plot([int(q["step"]) for q in r], [float(q["loss"]) for q in r], color=colours[name],
                       label=f"{name} CBAM", **style)  # fmt: skip
        first = groups["plain"][0]
        curve.set_title(
            f"{network}, digits at {first['size']} x {first['size']}, batch {first['batch']}: loss",
            loc="left",
        )
        curve.set_xlabel("step")
        curve.set_ylim(bottom=0)
        curve.legend(frameon=False)
        values = {
            times: ("ms a step", {k: median_ms(r) for k, r in groups.items()}),
            memory: (
                "peak extra memory, MB",
                {k: float(r[0]["peak_bytes"]) / 1e6 for k, r in groups.items()},
            ),
        }
        for ax, (title, value) in values.items():
            for i, (name, v) in enumerate(value.items()):
                ax.bar(i, v, 0.6, color=colours[name])
                text = f"{v:.1f}" if name == "plain" else f"{v:.1f}\n({value['plain'] / v:.2f}x)"
                ax.annotate(text, (i, v), (0, 2), textcoords="offset points", ha="center", fontsize=9)
            ax.set_xticks([0, 1], list(value))
            ax.set_ylim(0, max(value.values()) * 1.25)
            ax.set_title(title, loc="left")
        for ax in (curve, times, memory):
            ax.spines[["top", "right"]].set_visible(False)
    r = rows[0]
    figure.supxlabel(
        f"{r['device']}; {r['versions']}; commit {r['commit']}; {r['time']}", fontsize=7, color="#555555"
    )
    figure.savefig(target, dpi=130)
    plt.close(figure)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--quick", action="store_true", help="fewer steps, under a minute on two cores")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--backend", default="auto", help="backend of FusedCBAM")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--out", help="CSV to write; pictures are put beside it (default: results/train-TIME.csv)")
    args = p.parse_args(arguments)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    path = args.out or os.path.join(ROOT, "results", f"train-{stamp}.csv")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    rows: List[Dict[str, Any]] = []
    for plan in PLANS[args.quick]:
        rows += train(plan, args.device, args.backend)
    about = {
        "threads": args.threads,
        "device": device_name(args.device),
        "versions": versions(),
        "commit": commit(),
    }
    about["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, [*rows[0], *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
    print(
        f"Plain and fused CBAM from equal weights on equal batches, {about['device']}, {args.threads} threads"
    )
    print(summary(rows))
    print("  control: plain CBAM, each batch in reverse order, so that only rounding differs from plain")
    print(f"\n{len(rows)} rows: {os.path.relpath(path)}")
    base = os.path.splitext(path)[0]
    try:
        draw(path, base + ".png")
        print(f"picture: {os.path.relpath(base + '.png')}")
        right = attention_picture(base + "-attention.png", PATCH_STEPS[args.quick], args.device, args.backend)
        print(
            f"picture: {os.path.relpath(base + '-attention.png')} (photographs told apart: {100 * right:.0f} %)"
        )
    except ImportError as error:
        print(
            f"no further picture, {error.name or error} is not installed: pip install matplotlib scikit-image"
        )
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
