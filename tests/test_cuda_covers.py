"""What backend "cuda" takes: the table of limits against the kernels' own plan, and the choice of a backend."""

from __future__ import annotations

import ctypes
import re
import shutil
from dataclasses import replace

import pytest
import torch

from cbam_fused import _backends
from cbam_fused._config import Config


def _meta(shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


BEYOND = {
    "no spatial dimension": (_meta((2, 8)), "1 to 3 spatial dimensions, got 0"),
    "four spatial dimensions": (_meta((2, 8, 1, 2, 3, 4)), "1 to 3 spatial dimensions, got 4"),
    "samples": (_meta((2**26 + 1, 1, 1, 1)), "0 to 67108864 samples, got 67108865"),
    "channels": (_meta((1, 2**14 + 1, 1, 1)), "0 to 16384 channels, got 16385"),
    "fp64 channels": (_meta((1, 2**13 + 1, 1, 1), torch.float64), "0 to 8192 channels, got 8193"),
    "positions": (_meta((1, 1, 2**16, 2**15)), "positions, got 2147483648"),
    "dtype": (_meta((1, 8, 3, 3), torch.int32), "x must have dtype .*, got torch.int32"),
}


@pytest.mark.parametrize("x, message", BEYOND.values(), ids=BEYOND)
def test_what_is_beyond_goes_to_the_next_backend_and_raises_under_its_name(monkeypatch, x, message):
    """On a machine where the backend is built and another one comes after it in the table."""
    table = tuple(replace(b, device="meta", load=lambda: None) for b in _backends.TABLE)
    cuda, triton, _ = table
    monkeypatch.setattr(_backends, "TABLE", (cuda, replace(triton, covers=None)))
    monkeypatch.setattr(_backends, "_state", {})
    assert _backends.select("auto", x, Config()) == "triton"
    with pytest.raises(RuntimeError, match=f'^backend="cuda" cannot run: .*{message}'):
        _backends.select("cuda", x, Config())


def test_auto_picks_cuda_before_triton_where_it_is_built(monkeypatch):
    assert [b.name for b in _backends.TABLE][:2] == ["cuda", "triton"]
    table = tuple(replace(b, device="meta", load=lambda: None) for b in _backends.TABLE)
    monkeypatch.setattr(_backends, "TABLE", table)
    monkeypatch.setattr(_backends, "_state", {})
    for dtype in _backends.DTYPES:
        for shape in ((0, 8, 3, 3), (2, 8, 7), (32, 256, 56, 56), (1, 2048, 7, 7), (1, 8192, 1, 1, 1)):
            assert _backends.select("auto", _meta(shape, dtype), Config()) == "cuda"
    not_built = replace(table[0], load=lambda: "not built")
    monkeypatch.setattr(_backends, "TABLE", (not_built, *table[1:]))
    monkeypatch.setattr(_backends, "_state", {})
    assert _backends.select("auto", _meta((2, 8, 7, 7)), Config()) == "triton"


class OnGPU:
    """What is asked of an x before a call, without a GPU to have it on."""

    def __init__(self):
        self.dtype, self.device, self.shape = torch.float32, torch.device("cuda", 0), torch.Size((1, 8, 3, 3))

    def dim(self):
        return len(self.shape)


def test_an_old_device_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "compute capability 8.0, cuda:0 has 7.5" in str(_backends._cuda_runs_on(OnGPU().device))


def test_a_device_that_the_module_was_not_compiled_for_goes_to_the_next_backend(monkeypatch):
    """An A100, and a module built with TORCH_CUDA_ARCH_LIST=9.0a: auto takes Triton, and "cuda" says what to do."""
    x = OnGPU()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(_backends, "_missing_code", {0: "no kernel image is available", 1: None})
    table = tuple(replace(b, load=lambda: None) for b in _backends.TABLE)
    cuda, triton, _ = table
    monkeypatch.setattr(_backends, "TABLE", (cuda, replace(triton, covers=None)))
    monkeypatch.setattr(_backends, "_state", {})
    assert _backends.select("auto", x, Config()) == "triton"
    message = (
        "was not compiled for cuda:0 of compute capability 8.0 (no kernel image is available): "
        'rebuild with TORCH_CUDA_ARCH_LIST="8.0", or without it'
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        _backends.select("cuda", x, Config())
    # Without Triton it is the reference, which is said once.
    monkeypatch.setattr(_backends, "TABLE", (cuda, replace(triton, load=lambda: "no triton here")))
    monkeypatch.setattr(_backends, "_state", {})
    with pytest.warns(
        RuntimeWarning, match=f"plain PyTorch reference: .*{re.escape(message)}; no triton here"
    ) as said:
        assert [_backends.select("auto", x, Config()) for _ in range(2)] == ["reference"] * 2
    assert len(said) == 1
    x.device = torch.device("cuda", 1)
    assert _backends.select("auto", x, Config()) == _backends.select("cuda", x, Config()) == "cuda"


LAYOUTS = ("contiguous", "channels_last")
OPERATIONS = ("cbam_forward", "attention_forward", "scale_forward", "cbam_backward", "attention_backward",
              "scale_backward")  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the plan with")
@pytest.mark.parametrize("dtype", _backends.DTYPES, ids=str)
def test_the_plan_fits_at_the_limits(dtype):
    """The most channels with few and with many positions, aligned and not, on the device with least memory."""
    import cuda_ptx
    import cuda_streamed as cs
    import numpy as np
    from oracle import Options, make_problem

    lib = cuda_ptx._planner()
    channels = min(m.most for m in _backends.CUDA_LIMITS if m.what == "channels" and m.dtype in (None, dtype))

    def fits(operation, shape, layout, offset):
        n, c, h, w = shape
        small = make_problem((1, 8, 2, 2), Options(hidden=5), dtype)
        machine = cs.Machine(multiprocessors=84, l2=6 << 20, shared=99 << 10, offset=offset)
        call = cs._Call(operation, small.x, small.p, small.c, cs.NO_NORM, machine)
        call.sizes[2:8] = (layout == "channels_last", n, c, 1, h, w)
        call.sizes[11] = max(1, c // 16)
        report = np.zeros(len(cs.REPORT), np.int64)
        lib.plan(*(a.ctypes.data_as(ctypes.c_void_p) for a in (call.sizes, report)))
        return bool(report[0])

    for operation in OPERATIONS:
        for layout in LAYOUTS:
            for offset in (0, 2 if dtype.itemsize == 2 else dtype.itemsize):
                for h, w in ((1, 1), (7, 7), (8, 8), (127, 1), (512, 512)):
                    case = (operation, (3, channels, h, w), layout, offset)
                    assert fits(*case), case
                assert fits(operation, (2**26, 1, 1, 1), layout, offset)
                assert fits(operation, (1, 1, 2**15, 2**16 - 1), layout, offset)
    assert not fits("cbam_forward", (3, 8 * channels, 7, 7), "channels_last", 0)
