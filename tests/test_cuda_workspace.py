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
for device, stream, samples, destroyed in json.loads(sys.stdin.read()):
    host.set(Device(**device))
    host.destroy(destroyed)
    host.set_stream(*stream)
    x = torch.ones(samples, 8, 4, 4)
    try:
        # Memory that is not zero, of any size that the allocator may hand out next.
        kept.append(torch.ops.cbam_fused_cuda.cbam_forward(
            x, w1, None, w2, None, kernel, None, None, None, None, None, 0.0, 3, 1, 0, False))
        found.append([*host.counters(), host.calls()])
    except RuntimeError as e:
        found.append([str(e), host.last_error(), host.calls()])
print(json.dumps(found))
"""


class Call(NamedTuple):
    """One forward: on which stream of which device, captured into which graph, and which graph is gone before it."""

    handle: int = 1
    id: int = 1
    graph: int = 0
    device: int = 0
    samples: int = 3
    destroyed: int = 0


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
            (asdict(replace(device, index=c.device)), (c.handle, c.id, c.graph), c.samples, c.destroyed)
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
        f"capture mode {relaxed}", "malloc 4096", "memset 4096", f"capture mode {usual}", "streamed forward float32"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "graph, broken, message",
    (
        (0, dict(malloc_error=2), "4096 bytes for counters could not be made: what CUDA says of error 2"),
        (0, dict(memset_error=1), "4096 bytes for counters could not be made: what CUDA says of error 1"),
        (1, dict(malloc_error=2), "65536 bytes for counters could not be made: what CUDA says of error 2"),
        (1, dict(memset_error=1), "65536 bytes for counters could not be made: what CUDA says of error 1"),
        (1, dict(object_error=1), "the CUDA graph does not take its counters: what CUDA says of error 1"),
        (1, dict(retain_error=1), "the CUDA graph does not take its counters: what CUDA says of error 1"),
        (
            1,
            dict(capture_broken=1),
            "an earlier error has ended the capture of this stream into a CUDA graph",
        ),
    ),
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_what_goes_wrong_is_named_and_leaves_nothing_behind(graph, broken, message):
    """No error for torch's next check, the capture mode that was, no memory, and each piece of it is given once."""
    cuda_host.compile_host()
    code = RUNNER.format(tests=str(HERE), root=str(HERE.parent))
    devices = [cuda_host.Device(capability=80, **broken), *[cuda_host.Device(capability=80)] * 4]
    steps = json.dumps([(asdict(device), (1, 1, graph), 3, 0) for device in devices])
    out = subprocess.run([sys.executable, "-c", code], input=steps, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    (error, last_error, calls), *rest = json.loads(out.stdout)
    assert f"cbam_fused: {message}" in error and last_error == 0
    calls = [c.strip() for c in calls]
    modes = [] if "capture_broken" in broken else ["capture mode 2", "capture mode 0"]
    assert [c for c in calls if "capture mode" in c] == modes
    assert ("free" in calls) == ("memset_error" in broken)
    addresses = [address for address, *_ in rest]
    assert len(set(addresses)) == (4 if graph else 1) and all(zero for _, _, zero, _ in rest)


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


def test_a_captured_launch_has_its_own_and_no_memset_in_the_graph(launches):
    eager, captured, another, after = launches(Call(), Call(graph=1), Call(graph=1), Call())
    assert len({eager.address, captured.address, another.address}) == 3 and after.address == eager.address
    relaxed, usual = 2, 0
    assert captured.runtime[2:] == [
        f"capture mode {relaxed}", "malloc 65536", "memset 65536 apart", "synchronize", f"capture mode {usual}",
        "graph 1 holds counters", "streamed forward float32",
    ]  # fmt: skip
    # One allocation serves many launches, each with a part of its own.
    assert abs(another.address - captured.address) >= 4 * captured.words
    assert another.runtime[2:] == ["graph 1 holds counters", "streamed forward float32"]
    assert after.runtime[2:] == ["streamed forward float32"]


def test_counters_of_a_graph_serve_another_once_it_is_gone(launches):
    first, second, third, fourth = launches(
        Call(graph=1), Call(graph=2), Call(graph=3, destroyed=1), Call(graph=4, destroyed=9)
    )
    assert len({first.address, second.address, fourth.address}) == 3
    assert third.address == first.address
    pieces = sorted(f.address for f in (first, second, fourth))
    assert all(b - a >= 4 * first.words for a, b in zip(pieces, pieces[1:]))
    other_device = launches(Call(graph=1), Call(graph=2, destroyed=1, device=1))
    assert other_device[0].address != other_device[1].address


def test_a_graph_that_needs_more_counters_has_its_own_memory(launches):
    small, large, again = launches(Call(graph=1), Call(graph=1, samples=2000), Call(graph=2, samples=2000))
    assert large.words > 1024 > small.words and len({small.address, large.address, again.address}) == 3
    step = 256 * -(-small.words // 64)
    assert (
        abs(large.address - small.address) >= step and abs(again.address - large.address) >= 4 * large.words
    )
