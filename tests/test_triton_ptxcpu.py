"""Compiled PTX of whole forwards and backwards, run on the CPU by ptxcpu, an optional sibling directory."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves no PTX in this process", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import triton_bytes
import triton_ptx
from triton_recording import DEVICES, make_inputs, recording, run_ops

from cbam_fused import _config as cfg
from cbam_fused._config import Config, Parameters
from cbam_fused.reference import cbam_reference
from cbam_fused.triton_kernels import launchers

pytestmark = pytest.mark.skipif(triton_ptx.unavailable() is not None, reason=str(triton_ptx.unavailable()))

CASES = {
    "large map": ((1, 72, 20, 20), torch.bfloat16, False, Config()),
    "thin map, blocks of rows": ((1, 24, 32, 160), torch.bfloat16, False, Config()),
    "small map, shares": ((1, 257, 7, 7), torch.float32, False, Config()),
    "channels-last, segments": (
        (2, 8, 26, 40),
        torch.float32,
        True,
        Config(ties=cfg.TIES_SPLIT, residual=True),
    ),
    "tiny map, whole samples": ((54, 72, 7, 7), torch.bfloat16, False, Config()),
    "tiny map, whole samples, channels-last": (
        (54, 72, 5, 5),
        torch.float32,
        True,
        Config(pools=15, ties=cfg.TIES_SPLIT, residual=True),
    ),
}
# On four multiprocessors: programs of the forward's second launch take several tiles.
FEW = ("channels-last, segments",)


def reference(x, weights, bn, config, dy, dtype):
    inputs = [None if t is None else t.to(dtype).requires_grad_() for t in (x, *weights, *bn[:2])]
    mean, var = bn[2].to(dtype), bn[3].to(dtype)
    sizes = [0.0] * 10

    def norm(z):
        out = F.batch_norm(z, mean, var, inputs[7], inputs[8], False, 0.0, 1e-5)

        def note(g):
            # Gradients of one element are sums that cancel: their scale is the size of all terms.
            normed, size = (z - mean) / (var + 1e-5).sqrt(), g.abs().sum().item()
            sizes[7] = size * (inputs[7].abs() / (var + 1e-5).sqrt()).item()
            sizes[8], sizes[9] = (g * normed).abs().sum().item(), size

        out.register_hook(note)
        return out

    y = cbam_reference(inputs[0], Parameters(*inputs[1:7]), config, norm)
    y.backward(dy.to(dtype))
    return [y.detach(), *(t.grad for t in inputs)], sizes


def test_long_sums_stay_precise_when_compiled():
    """The average of many equal numbers: no compiler may have simplified what an addition rounds off to zero."""
    x = torch.full((1, 2, 640, 640), 0.1)
    w2 = torch.eye(2)
    with recording(DEVICES["sm_90"]) as launches:
        pooled = launchers.attention_forward(x, None, None, w2, None, None, None, 1, 0, 0, True)[1]
    assert launches[0].meta["LONG"]
    machine = triton_ptx.Machine()
    machine.run(launches[:1])
    machine.read_back()
    torch.testing.assert_close(pooled[:, 0].double(), x.double().mean((2, 3)), rtol=5e-7, atol=0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels(name):
    shape, dtype, channels_last, config = CASES[name]
    x, weights, bn = make_inputs(shape, dtype, config, 4, channels_last=channels_last, device="cpu")
    dy = torch.empty_like(x).copy_(torch.randn(shape, generator=torch.Generator().manual_seed(9)))
    device = replace(DEVICES["sm_90"], multiprocessors=4) if name in FEW else DEVICES["sm_90"]
    results = []
    for seed in (1, 2):
        with recording(device) as launches:
            forward, backward = run_ops(x, weights, bn, config, dy=dy)
        second = launches[1]
        assert (second.args[second.kernel.arg_names.index("group_tiles")] > 1) == (name in FEW)
        machine = triton_ptx.Machine()
        machine.run(launches, seed=seed, noise=1.0)
        machine.read_back()
        results.append([forward[0], *backward])
    exact, sizes = reference(x, weights, bn, config, dy, torch.float64)
    same, _ = reference(x, weights, bn, config, dy, dtype)
    for i, (once, again, want, low, size) in enumerate(zip(*results, exact, same, sizes)):
        assert torch.equal(once, again), f"output {i} depends on the order of programs"
        assert torch.isfinite(once).all(), f"output {i} is not finite"
        error = (once.double() - want).abs().max().item()
        scale = max(want.abs().max().item(), size)
        budget = 2 * ((low.double() - want).abs().max().item() + torch.finfo(dtype).eps * scale)
        assert error <= budget, f"output {i}: error {error:.3e}, budget {budget:.3e}"


# Batches that the modelled L2 holds, as in the table that benchmarks/triton_bytes.py prints.
BYTES = {
    "ResNet-50's second stage": ((8, 256, 56, 56), False),
    "ResNet-50's fourth stage": ((32, 1024, 14, 14), False),
    "ResNet-50's last stage": ((64, 2048, 7, 7), True),
    "YOLOv8s's second map": ((4, 64, 160, 160), True),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_of_a_forward_and_a_backward(name):
    """Rows of that table: an H100's L2, kept from launch to launch, and traffic by tensor, in units of x."""
    (samples, *shape), channels_last = BYTES[name]
    found = triton_bytes.measure(samples, tuple(shape), torch.bfloat16, channels_last)
    for row, (direction, bars) in zip(found, triton_bytes.PASSES.items(), strict=True):
        assert row.x_sized + row.scratch <= bars.traffic, f"{direction}: {row}"
        assert row.dram <= bars.dram, f"{direction}: {row}"


def test_what_is_counted():
    """Of one launch, whose traffic is known: each tensor is read or written once, in whole sectors."""
    x, _, _ = make_inputs((2, 16, 32, 8), torch.bfloat16, device="cpu")
    gate, z = torch.rand(2, 16), torch.rand(2, 1, 32, 8)
    with recording(DEVICES["sm_90"]) as launches:
        y, s = launchers.scale_forward(x, gate, z, False)
    names = {"x": x, "y": y, "gate": gate, "z": z}
    owners = {t.untyped_storage().data_ptr(): name for name, t in names.items()}
    (traffic,) = triton_ptx.Machine().run(launches, owners)
    size = x.numel() * x.element_size()
    assert traffic.by_owner["x"] == traffic.by_owner["y"] == size
    # Every program that a multiprocessor runs finds the gate in L1 after the first; s has no name here.
    assert traffic.by_owner["z"] >= z.nbytes and traffic.by_owner["scratch"] == s.nbytes
    assert traffic.by_owner["gate"] >= gate.nbytes
    assert traffic.dram == 2 * size + gate.nbytes + z.nbytes + s.nbytes
