"""`python -m cbam_fused`: what this machine has, and a self-check of every available backend.

Each backend's output and gradients are compared with the reference in float64. The budget is twice
(the error of the reference in the same precision, the largest of three orders of its sums, + eps * the
largest value). Exits with 1 if anything is over its budget, not finite, or raises.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import FusedCBAM, __version__, backends
from ._backends import TABLE

OPTIONS: Tuple[Dict[str, Any], ...] = (
    {},
    {"spatial_norm": False, "residual": True},
    {"spatial": False, "pool_types": ("avg", "max", "lp", "lse")},
    {"mlp_bias": False, "spatial_order": "mean_max", "ties": "split", "kernel_size": 3},
    {"light": True, "spatial_bias": True, "kernel_size": 5},
)
SHAPES = ((2, 24, 7, 7), (3, 16, 13, 18))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _versions() -> Iterator[Tuple[str, str]]:
    yield "cbam_fused", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield (
        "torch",
        f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    )
    try:
        import triton

        yield "triton", triton.__version__
    except ImportError:
        yield "triton", "not installed"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        yield "device", f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, {runtime}"
    else:
        yield "device", "no GPU that torch can use"


def _results(module: FusedCBAM, x: Tensor, dy: Tensor, backend: str) -> Dict[str, Tensor]:
    """Output, gradient of x and of every parameter, from a copy of the module.

    The spatial gate's are one vector: in a single number, such as the norm's bias, the reference's
    error can be nothing by luck.
    """
    module = copy.deepcopy(module)
    module.backend = backend
    x = x.detach().requires_grad_()
    y = module(x)
    named = dict(module.named_parameters())
    dx, *grads = torch.autograd.grad(y, [x, *named.values()], dy)
    found = {"y": y.detach(), "dx": dx}
    found.update((f"d{n}", g) for n, g in zip(named, grads) if n.startswith("channel_gate"))
    spatial = [g.flatten() for n, g in zip(named, grads) if n.startswith("spatial_gate")]
    if spatial:
        found["dspatial_gate"] = torch.cat(spatial)
    return found


def _orders(module: FusedCBAM, x: Tensor, dy: Tensor) -> List[Dict[str, Tensor]]:
    """The reference's results in three orders of its sums: as called, in the other layout, samples reversed.

    The error of a few elements, as a bias's gradient has, is one draw of chance: one order may meet a small one.
    """
    contiguous = x.is_contiguous()
    other = x.to(memory_format=torch.channels_last if contiguous else torch.contiguous_format)
    results = [
        _results(module, v, d, "reference") for v, d in ((x, dy), (other, dy), (x.flip(0), dy.flip(0)))
    ]
    for name in ("y", "dx"):
        results[2][name] = results[2][name].flip(0)
    return results


def _share(got: Tensor, exact: Tensor, references: Sequence[Tensor]) -> float:
    """Error as a share of its budget; infinite where got is not finite."""
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    reference_error = max(float((low.double() - exact).abs().max()) for low in references)
    budget = 2 * (reference_error + torch.finfo(got.dtype).eps * float(exact.abs().max()))
    error = float((got.double() - exact).abs().max())
    return error / budget if budget > 0 else (0.0 if error == 0 else float("inf"))


def self_check(backend: str, device: str) -> Tuple[int, float, List[str]]:
    """Number of comparisons, the worst error as a share of its budget, and what is over it."""
    count, worst, failures = 0, 0.0, []
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for options in OPTIONS:
            for training in (True, False):
                for shape in SHAPES:
                    for dtype in DTYPES:
                        x, dy = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
                        if count % 2:
                            x = x.to(memory_format=torch.channels_last)
                        module = FusedCBAM(shape[1], 4, device=device, dtype=dtype, **options).train(training)
                        exact_module = copy.deepcopy(module).double()
                        where = f"{options} training={training} {shape} {dtype}"
                        try:
                            got = _results(module, x, dy, backend)
                        except Exception as error:
                            failures.append(f"{where}: {type(error).__name__}: {error}")
                            continue
                        exact = _results(exact_module, x.double(), dy.double(), "reference")
                        orders = _orders(module, x, dy)
                        for name in exact:
                            share = _share(got[name], exact[name], [low[name] for low in orders])
                            count, worst = count + 1, max(worst, share)
                            if share > 1:
                                failures.append(f"{where}: {name} is {share:.3g} times its budget off")
    return count, worst, failures


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cbam_fused", description=__doc__)
    parser.add_argument("--no-check", action="store_true", help="only say what this machine has")
    wanted = parser.parse_args(arguments)
    for name, text in _versions():
        print(f"{name:<12}{text}")
    print("\nbackends")
    available = backends()
    for name, state in available.items():
        print(f"  {name:<10}{'available' if state is True else 'no: ' + str(state)}")
    if wanted.no_check:
        return 0
    print("\nself-check against the reference in float64")
    failed = False
    for row in TABLE:
        if available[row.name] is not True:
            continue
        count, worst, failures = self_check(row.name, row.device)
        failed = failed or bool(failures)
        print(
            f"  {row.name:<10}{'FAILED' if failures else 'ok'}: {count} comparisons, worst error {worst:.2f} of its budget"
        )
        for failure in failures[:10]:
            print(f"    {failure}")
        if len(failures) > 10:
            print(f"    and {len(failures) - 10} more")
    if all(available[row.name] is not True for row in TABLE):
        print("  only the reference is available: nothing to compare")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
