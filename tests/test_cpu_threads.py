"""That a call of the CPU ops has the processor time of more than one thread; test_passes.py has what each of them does."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from oracle import FUSED, OPTIONS, layout_of, make_problem, processors

from cbam_fused import _ops

pytestmark = [
    pytest.mark.skipif(not any(t.backend == "cpu" for t in FUSED), reason="the CPU kernels are not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="Linux's table of threads has their clocks"),
    pytest.mark.skipif(processors() < 2, reason="two threads need two processors"),
]
SECONDS = 0.3


def clocks():
    """Seconds that each thread of this process has had a processor for."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        found[task.name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def share_of_the_others(call):
    """What all other threads have, over what this one has, while it does nothing but this call. Threads spin for a while
    after they had a part, in what came before too."""
    call()
    time.sleep(0.1)
    before, until = clocks(), time.monotonic() + SECONDS
    while time.monotonic() < until:
        call()
    spent = {thread: now - before.get(thread, 0.0) for thread, now in clocks().items()}
    own = spent.pop(str(threading.get_native_id()))
    return sum(spent.values()) / max(own, 0.01)  # a tick, at least


def calls_of(shape, layout):
    """A forward and a backward of the block, and of its halves, on one problem."""
    problem = make_problem(shape, OPTIONS["plain"], layout=layout)
    x, p, c = problem.x, problem.p, problem.c
    dy = layout_of(problem.dy, layout)
    op = {name: _ops.get("cpu", name) for name in _ops.SCHEMAS}
    options, norm = (c.pools, c.spatial, c.ties), (None,) * 4 + (0.0,)
    _, *saved = op["cbam_forward"](x, *p, *norm, *options, False)
    z, *kept = op["attention_forward"](x, *p, *options, True)
    s = saved[-1]
    dz, dgate = op["scale_backward"](dy, x, kept[2], s)
    return {
        "cbam_inference": lambda: op["cbam_inference"](x, *p, *norm, *options, False),
        "cbam_forward": lambda: op["cbam_forward"](x, *p, *norm, *options, False),
        "cbam_backward": lambda: op["cbam_backward"](dy, x, *p, *norm, *saved, *options, False),
        "attention_forward": lambda: op["attention_forward"](x, *p, *options, True),
        "scale_forward": lambda: op["scale_forward"](x, kept[2], z, False),
        "scale_backward": lambda: op["scale_backward"](dy, x, kept[2], s),
        "attention_backward": lambda: op["attention_backward"](dy, x, *p, *kept, s, dz, dgate, *options, False),
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_op_has_two_threads(threads, batch, layout):
    """Where other processes take one of the processors, one of five tries is enough."""
    threads(2)
    calls = calls_of((batch, 96, 56, 56), layout)
    assert calls.keys() == _ops.SCHEMAS.keys()
    for name, call in calls.items():
        tries = []
        while len(tries) < 5 and max(tries, default=0.0) < 0.3:
            tries.append(share_of_the_others(call))
        assert max(tries) >= 0.3, f"{name}: the other thread had {tries} of the first one's time"


def test_one_thread_is_one(threads):
    """The test above is able to fail. A thread of the process that has other business may spoil a try."""
    threads(1)
    for call in calls_of((1, 96, 56, 56), "contiguous").values():
        assert any(share_of_the_others(call) < 0.1 for _ in range(5))


# Prints how many threads a call on x of 240 KiB has, and of 256 KiB.
COUNT = """
import test_cpu_threads as t, torch
torch.set_num_threads(2)
for rows in (30, 32):
    call = t.calls_of((1, 64, rows, 32), "contiguous")["cbam_inference"]
    tries = [0, 0]
    while max(tries) < 2:
        tries[t.share_of_the_others(call) >= 0.2] += 1
    print(1 + tries.index(2))
"""


@pytest.mark.parametrize("grain, found", [(None, ["1", "2"]), ("122880", ["2", "2"]), ("131073", ["1", "1"])])
def test_small_calls_have_one_thread(grain, found):
    """From 128 KiB of x for each thread on; CBAM_FUSED_GRAIN, which all other tests set, is another number of bytes."""
    env = {**os.environ, "CBAM_FUSED_GRAIN": grain or ""}
    if grain is None:
        del env["CBAM_FUSED_GRAIN"]
    run = subprocess.run(
        [sys.executable, "-c", COUNT], env=env, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert run.stdout.split() == found, run.stdout + run.stderr


@pytest.mark.parametrize("grain", ["many", "128k", "0", ""])
def test_a_grain_that_is_no_number(grain):
    code = "import torch, cbam_fused; cbam_fused.FusedCBAM(16, backend='cpu')(torch.ones(1, 16, 4, 4))"
    env = {**os.environ, "CBAM_FUSED_GRAIN": grain}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode != 0
    assert f"CBAM_FUSED_GRAIN must be a number of bytes, got {grain}" in run.stderr, run.stderr
