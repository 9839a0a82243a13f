"""Whose counters a launch of the streamed tier gets: by stream and device, and in a CUDA graph. On the runtime of
tests/cuda_host.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import cuda_host
import pytest

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(bool(cuda_host.UNAVAILABLE), reason=cuda_host.UNAVAILABLE)

RUNNER = """
import json, sys, torch
sys.path[:0] = [{tests!r}, {root!r}]
from cuda_host import Device, Host
host = Host()
w1, w2, kernel = torch.ones(2, 8), torch.ones(8, 2), torch.ones(1, 2, 3, 3)
found, kept = [], []
for device, stream, samples in json.loads(sys.stdin.read()):
    host.set(Device(**device))
    host.set_stream(*stream)
    x = torch.ones(samples, 8, 4, 4)
    # Memory that is not zero, of any size that the allocator may hand out next.
    kept.append(torch.ops.cbam_fused_cuda.cbam_forward(
        x, w1, None, w2, None, kernel, None, None, None, None, None, 0.0, 3, 1, 0, False))
    found.append([*host.counters(), host.calls()])
print(json.dumps(found))
"""


class Call(NamedTuple):
    """One forward: on which stream of which device, and whether that stream is being captured."""

    handle: int = 1
    id: int = 1
    capturing: bool = False
    device: int = 0
    samples: int = 3


class Launch(NamedTuple):
    address: int
    words: int
    zero: bool
    runtime: list


@pytest.fixture(scope="module")
def launches():
    def run(*calls: Call):
        device = cuda_host.Device(capability=80, l2=1 << 14)
        steps = [
            (asdict(replace(device, index=c.device)), (c.handle, c.id, int(c.capturing)), c.samples)
            for c in calls
        ]
        cuda_host.compile_host()
        code = RUNNER.format(tests=str(HERE), root=str(HERE.parent))
        out = subprocess.run(
            [sys.executable, "-c", code], input=json.dumps(steps), capture_output=True, text=True
        )
        assert out.returncode == 0, out.stderr
        found = [Launch(*row, [c.strip() for c in calls]) for *row, calls in json.loads(out.stdout)]
        assert all(f.zero for f in found), found
        return found

    return run


def test_launches_on_one_stream_share_counters_without_a_memset(launches):
    first, second, third = launches(Call(), Call(samples=2), Call())
    assert first.address == second.address == third.address
    for found in (second, third):
        assert found.runtime == [*first.runtime[:2], "streamed forward float32"]


def test_counters_that_are_kept_are_not_of_torchs_allocator(launches):
    """It may be filling the private pool of torch.compile's CUDA graphs, which finds what outlives the call and raises.
    A capture of another thread must not forbid the allocation either."""
    (first,) = launches(Call())
    relaxed, usual = 2, 0
    assert first.runtime[2:] == [
        f"capture mode {relaxed}", "malloc 4096", f"capture mode {usual}", "memset 4096", "streamed forward float32"
    ]  # fmt: skip


def test_counters_that_do_not_fit_are_named():
    device = cuda_host.Device(capability=80, malloc_error=2)
    code = RUNNER.format(tests=str(HERE), root=str(HERE.parent))
    steps = json.dumps([(asdict(device), (1, 1, 0), 3)])
    out = subprocess.run([sys.executable, "-c", code], input=steps, capture_output=True, text=True)
    assert out.returncode != 0
    assert "no 4096 bytes for a stream's counters: what CUDA says of error 2" in out.stderr


def test_another_stream_or_device_has_others(launches):
    found = launches(Call(), Call(handle=2, id=2), Call(device=1), Call(handle=2, id=2, device=1), Call())
    assert len({f.address for f in found[:4]}) == 4 and found[4].address == found[0].address


def test_a_new_stream_behind_an_old_handle_has_others(launches):
    old, new = launches(Call(handle=5, id=5), Call(handle=5, id=6))
    assert old.address != new.address


def test_a_stream_outgrows_its_counters_alone(launches):
    first, other, large, again, beside = launches(
        Call(), Call(handle=2, id=2), Call(samples=2000), Call(), Call(handle=2, id=2)
    )
    assert large.words > 1024 > first.words
    assert large.address == again.address not in (first.address, other.address)
    assert beside.address == other.address


def test_a_captured_launch_has_its_own_and_a_memset_in_the_graph(launches):
    eager, captured, after = launches(Call(), Call(capturing=True), Call())
    assert captured.address != eager.address == after.address
    memset = f"memset {4 * captured.words}"
    assert captured.runtime[2:] == [memset, "streamed forward float32"]
    assert after.runtime[2:] == ["streamed forward float32"]
