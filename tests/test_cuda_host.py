"""The host side of the CUDA backend, on a runtime that the test controls: what the launcher asks of the device, which
tier and cluster it picks, and what a launch that fails says. tests/cuda_host.cpp has the runtime."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import cuda_host
import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(bool(cuda_host.UNAVAILABLE), reason=cuda_host.UNAVAILABLE)

H100 = cuda_host.Device()
INVALID_ARGUMENT, NO_KERNEL_IMAGE, ILLEGAL_ADDRESS, OUT_OF_RESOURCES, CLUSTER_TOO_LARGE = (
    1,
    209,
    700,
    701,
    912,
)

# In a process of its own: the ops take CPU tensors from then on.
RUNNER = """
import json, sys, torch
sys.path[:0] = [{tests!r}, {root!r}]
from cbam_fused import _ops
from cuda_host import Device, Host
from oracle import Options, make_problem
host = Host()
for line in sys.stdin:
    device, shape, dtype, layout, backward, hidden = json.loads(line)
    host.set(Device(**device))
    problem = make_problem((max(shape[0], 1), *shape[1:]), Options(hidden=max(1, shape[1] // 16)),
                           getattr(torch, dtype), layout=layout)
    x = problem.x[: shape[0]]
    p, c = problem.p, problem.c
    arguments = (*p, None, None, None, None, 0.0)
    options = (c.pools, c.spatial, c.ties, c.residual)
    calls, error = [], ""
    try:
        if backward:
            n, ch, *rest = x.shape
            acc = torch.float32
            saved = (x.new_empty((n, 2, ch), dtype=acc), torch.zeros((n, ch), dtype=_ops.index_dtype(shape[2] * shape[3])),
                     x.new_empty((n, ch), dtype=acc), x.new_empty((n, 2, *rest), dtype=acc),
                     torch.zeros((n, *rest), dtype=_ops.index_dtype(ch)), x.new_empty((n, 2, hidden or p.w1.shape[0]), dtype=acc),
                     x.new_empty((n, 1, *rest), dtype=acc))
            torch.ops.cbam_fused_cuda.cbam_backward(torch.empty_like(x), x, *arguments, *saved, *options)
        else:
            for op in ("cbam_forward", "cbam_inference"):
                out = getattr(torch.ops.cbam_fused_cuda, op)(x, *arguments, *options)
                calls = calls or host.calls()
                fake = _ops.FAKES[op](x, *arguments, *options)
                out, fake = (ts if isinstance(ts, tuple) else (ts,) for ts in (out, fake))
                got, want = ([(tuple(t.shape), t.dtype) for t in ts] for ts in (out, fake))
                if got != want:
                    raise RuntimeError(f"outputs are {{got}}, the fake's {{want}}")
    except RuntimeError as e:
        error = str(e)
    calls = calls or host.calls()
    left = host.last_error()
    print(json.dumps([calls, error, left, host.missing_code(), host.last_error()]), flush=True)
"""


@contextlib.contextmanager
def started(**environment: str):
    """run(shape, dtype, layout, backward, hidden, **device): the runtime's calls, and the error's text.

    A forward's are those of the one that saves. `hidden`: units of the saved layer, where not as many as w1 has.
    `run.last_error`: what CUDA has kept of the call for the next one that asks; `run.missing_code`.
    """
    cuda_host.compile_host()
    code = RUNNER.format(tests=str(Path(__file__).parent), root=str(ROOT))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    indices = iter(range(62))  # each call's own: what a device says is asked once

    def call(shape, dtype="bfloat16", layout="contiguous", backward=False, hidden=0, **device):
        values = {**asdict(H100), "index": next(indices), **device}
        process.stdin.write(json.dumps([values, shape, dtype, layout, backward, hidden]) + "\n")
        process.stdin.flush()
        calls, error, call.last_error, call.missing_code, after = json.loads(process.stdout.readline())
        assert after == 0
        index = str(values["index"])
        assert hidden or calls[:2] == [f"guard {index} ", f"stream of {index} "], calls
        return [c.strip() for c in calls[2:]], error

    yield call
    process.stdin.close()
    assert process.wait() == 0


@pytest.fixture(scope="module")
def run():
    with started() as call:
        yield call


def test_the_launcher_asks_the_device_before_it_launches(run):
    calls, error = run((16, 512, 28, 28))
    assert not error and len(calls) == 4, (calls, error)
    assert calls[:3] == ["shared limit 232448", "asked of 8", "shared limit 232448"]
    assert calls[3].startswith("resident forward bfloat16 grid 128 cluster 8 threads 256 shared ")
    assert int(calls[3].split()[-1]) <= H100.shared


def test_sixteen_blocks_are_allowed_explicitly_and_asked_for_only_where_eight_do_not_hold_a_sample(run):
    calls, _ = run((8, 256, 56, 56), backward=True)
    assert [c for c in calls if c.startswith("asked")] == ["asked of 16"]
    assert calls.count("non-portable 1") == 2
    assert calls[-1].startswith("resident backward bfloat16 grid 128 cluster 16 threads 512 ")


ELSEWHERE = {
    "older than sm_90": ({"capability": 80}, ()),
    "less shared memory": ({"shared": 48 << 10}, ()),
    "refuses the cluster": ({"clusters_of_8": -CLUSTER_TOO_LARGE, "clusters_of_16": -CLUSTER_TOO_LARGE}, ("8", "8", "16", "16")),
    "refuses its settings": ({"clusters_of_8": -INVALID_ARGUMENT, "clusters_of_16": -INVALID_ARGUMENT}, ("8", "8", "16", "16")),
    "runs none at a time": ({"clusters_of_8": 0, "clusters_of_16": 0}, ("8", "8", "16", "16")),
    "knows PTX before clusters alone": ({"ptx": 80}, ()),
    "would be mostly empty": ({"clusters_of_8": 66}, ("8",)),
}  # fmt: skip


@pytest.mark.parametrize("device, asked", ELSEWHERE.values(), ids=ELSEWHERE)
def test_what_the_device_does_not_run_goes_to_the_streamed_tier(run, device, asked):
    calls, error = run((16, 512, 28, 28), **device)
    assert not error
    assert [c.split()[-1] for c in calls if c.startswith("asked")] == list(asked)
    assert calls[-1] == "streamed forward bfloat16" and not any(c.startswith("resident") for c in calls)


def test_a_tier_can_be_asked_for():
    """The resident one for a batch that would leave most of the device idle, and where it fits alone."""
    with started(CBAM_FUSED_TIER="resident") as run:
        for shape, tier in (
            ((1, 512, 28, 28), "resident"),
            ((1, 512, 7, 7), "resident"),
            ((1, 510, 7, 7), "streamed"),
        ):
            calls, error = run(shape)
            assert not error and calls[-1].startswith(f"{tier} forward bfloat16"), calls
    with started(CBAM_FUSED_TIER="streamed") as run:
        calls, error = run((16, 512, 28, 28))
        assert not error and calls[-1] == "streamed forward bfloat16" and "asked of 8" not in calls
    with started(CBAM_FUSED_TIER="persistent") as run:
        calls, error = run((16, 512, 28, 28))
        assert not calls and "CBAM_FUSED_TIER must be streamed or resident, got persistent" in error


def test_weights_that_outweigh_x_are_read_once_a_cluster_in_one_wave_alone(run):
    for shape, tier in (
        ((16, 2048, 7, 7), "resident"),
        ((32, 2048, 7, 7), "streamed"),
        ((32, 1024, 14, 14), "resident"),
    ):
        calls, error = run(shape)
        assert not error and calls[-1].startswith(f"{tier} forward bfloat16"), (shape, calls)


def test_a_device_that_refuses_eight_blocks_is_asked_for_sixteen(run):
    calls, error = run((16, 512, 28, 28), clusters_of_8=0)
    assert not error and calls[-1].startswith("resident forward bfloat16 grid 256 cluster 16 ")


def test_an_error_that_is_no_answer_about_clusters_is_raised(run):
    """Of an earlier kernel, for example: not taken for a device without clusters, now or later."""
    calls, error = run((16, 512, 28, 28), clusters_of_8=-ILLEGAL_ADDRESS, index=62)
    assert calls[-1] == "asked of 8" and run.last_error == 0
    assert (
        "cbam_fused: asking what runs of the resident kernel of cbam_forward failed: "
        f"what CUDA says of error {ILLEGAL_ADDRESS}" in error
    )
    calls, error = run((16, 512, 28, 28), index=62)
    assert not error and calls[-1].startswith("resident forward bfloat16")


def test_what_the_module_says_of_a_device_that_it_was_not_compiled_for(run):
    run((1, 8, 3, 3))
    assert run.missing_code == ""
    run((1, 8, 3, 3), code_error=NO_KERNEL_IMAGE)
    assert run.missing_code == f"what CUDA says of error {NO_KERNEL_IMAGE}"
    # Nothing about the module: the launch tells it.
    run((1, 8, 3, 3), code_error=ILLEGAL_ADDRESS)
    assert run.missing_code == ""


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
def test_a_failed_launch_raises_with_the_kernel_and_cudas_message(run, backward):
    """Of either tier; nothing is launched in its place."""
    op = "cbam_backward" if backward else "cbam_forward"
    for tier, shape in (("resident", (16, 512, 28, 28)), ("streamed", (16, 510, 7, 7))):
        calls, error = run(shape, backward=backward, launch_error=OUT_OF_RESOURCES)
        assert (
            f"cbam_fused: the {tier} kernel of {op} did not launch: what CUDA says of error {OUT_OF_RESOURCES}"
            in error
        )
        assert [c.split()[0] for c in calls if c.startswith(("resident", "streamed"))] == [tier]
        assert run.last_error == 0, "torch's next check would raise it once more"


def test_a_hidden_layer_of_another_size_is_refused(run):
    for hidden in (1, 33):
        calls, error = run((2, 512, 28, 28), backward=True, hidden=hidden)
        assert calls == [] and (
            f"cbam_fused: hidden must be contiguous with 128 elements of the dtype in _ops.py, got {4 * hidden}"
            in error
        )


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
def test_nothing_is_launched_on_an_empty_batch(run, backward):
    assert run((0, 512, 28, 28), backward=backward) == ([], "")
