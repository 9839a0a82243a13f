"""What a block on the CPU kernels holds at its peak, of the allocator's and of the process's memory."""

import ctypes
import gc
import itertools
import sys
from pathlib import Path

import pytest
import torch
from oracle import FUSED, layout_of

from benchmarks.measure import cpu_allocations
from cbam_fused import FusedCBAM

pytestmark = pytest.mark.skipif(
    not any(t.backend == "cpu" for t in FUSED), reason="the CPU kernels are not built"
)
POOLS = (("avg",), ("max",), ("lp",), ("lse",), ("avg", "max"), ("avg", "max", "lp", "lse"))
MODES = ("inference", "norm in eval", "norm in training")
# Numbers of the accumulator's for each channel and position of a sample: what is saved are up to four pools, an index
# and a gate; two maps, an index and a gate; backward has the gradients of both gates beside, and of a norm.
KEPT = 8


def call_of(mode, x, **options):
    """(a call of a block, the tensors of x's size that it hands out, bytes of all that it hands out): y; in training dx
    and the parameters' gradients, too."""
    block = FusedCBAM(x.shape[1], 16, backend="cpu", **options).to(x.dtype).train(mode == "norm in training")
    parameters = list(block.parameters())
    dy = torch.ones_like(x)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()

    def infer():
        with torch.no_grad():
            block(leaf)

    def train():
        y = block(leaf)
        found = torch.autograd.grad(y, (leaf, *parameters), dy)
        assert y.numel() and len(found) == 1 + len(parameters)

    if mode == "inference":
        return infer, 1, x.nbytes
    return train, 2, 2 * x.nbytes + sum(p.nbytes for p in parameters)


@pytest.mark.parametrize("ties, dtype", [("first", torch.bfloat16), ("split", torch.float32)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pools", POOLS, ids="-".join)
def test_a_block_holds_its_outputs_and_maps_and_vectors(pools, ties, layout, dtype, threads):
    """For any pools, lp and lse too: beyond outputs, a few numbers for each channel and position of a sample, and
    scratch of
    less than one sample's size in float32."""
    threads(2)
    x = layout_of(torch.randn(8, 96, 56, 56), layout).to(dtype)
    n, c = x.shape[:2]
    limit = KEPT * 4 * n * (c + x[0, 0].numel()) + 4 * x[0].numel()
    assert limit < x.nbytes / 2
    for mode in MODES:
        call, large, outputs = call_of(mode, x, pool_types=pools, ties=ties)
        call()
        changes = cpu_allocations(call)
        extra = max(itertools.accumulate(changes)) - outputs
        assert 0 < extra < limit, f"{mode}: {extra} bytes beyond its outputs, x has {x.nbytes}"
        # Nor is there one that is gone again before the peak.
        assert [change for change in changes if change > x.nbytes / 2] == [x.nbytes] * large


def resident(field):
    """Bytes: VmRSS, what this process holds, or VmHWM, the most that it held since `forget_the_peak`."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) << 10


def forget_the_peak():
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.skipif(sys.platform != "linux", reason="it asks Linux for the most memory that was held")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pools", [("lp",), ("lse",), ("avg", "max", "lp", "lse")], ids="-".join)
def test_nor_does_memory_from_elsewhere_grow(pools, layout, threads):
    """As above, of everything that the process holds: not all memory is the allocator's."""
    threads(2)
    x = layout_of(torch.randn(8, 64, 112, 112), layout)
    gc.collect()
    for mode in MODES:
        call, _, outputs = call_of(mode, x, pool_types=pools, ties="split")
        call()
        try:
            forget_the_peak()
        except (AttributeError, OSError) as error:  # another libc, another kernel
            pytest.skip(f"the system does not forget a peak: {error}")
        before = resident("VmRSS")
        call()
        extra = resident("VmHWM") - before - outputs
        assert extra < x.nbytes / 2, f"{mode}: {extra} bytes beyond its outputs, x has {x.nbytes}"
        assert extra > -x.nbytes / 2, "outputs did not show: nothing was measured"
