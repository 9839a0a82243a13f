"""Fixtures that every test shares: targets, devices, seeds, thread counts, poisoned memory."""

import os

# Test processes share the processors. OpenMP's threads that spin while they wait, as they do by default, would keep
# those of another process from working for whole time slices: tests took seven times as long. Read as torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Small problems with several threads too, which calls share out from 128 KiB of x a thread on.
os.environ.setdefault("CBAM_FUSED_GRAIN", "16384")

import pytest  # noqa: E402
import torch  # noqa: E402
from oracle import DEVICES, FUSED, TARGETS, poisoned_allocations  # noqa: E402


def runs_on_gpu(params):
    """Whether a test's parameters name a CUDA device, by itself or as a target's."""
    return any(getattr(v, "device", v) == "cuda" for v in params.values())


# Files that take minutes, the longest first: `make test` deals whole files to processes in this order, and one that
# came last would have the others wait.
LONG = (
    "test_triton_compile",
    "test_triton_ptxcpu",
    "test_cuda_streamed_ptxcpu",
    "test_triton_interpreter",
    "test_cuda_resident",
    "test_forward_backward",
    "test_cuda_compile",
    "test_cuda_simt",
)


def pytest_addoption(parser):
    parser.addoption(
        "--every-device", action="store_true", help="compile all that is compiled for all five devices"
    )


def pytest_collection_modifyitems(config, items):
    """The long files first, and a mark on what launches kernels on a GPU.

    `pytest -m gpu` are the tests that benchmarks/gpu.py runs under the sanitizers.
    """
    if not config.getoption("--every-device", default=False):
        left_out = [item for item in items if item.get_closest_marker("every_device")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]
    rank = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))
    for item in items:
        if hasattr(item, "callspec") and runs_on_gpu(item.callspec.params):
            item.add_marker("gpu")


def _name(target):
    return f"{target.backend}@{target.device}"


@pytest.fixture(params=TARGETS, ids=_name)
def target(request):
    """Every backend that runs on this machine, the reference too."""
    return request.param


@pytest.fixture(params=FUSED or [None], ids=lambda t: "none" if t is None else _name(t))
def fused(request):
    """Every backend but the reference."""
    if request.param is None:
        pytest.skip("no fused backend is available: see python -m cbam_fused")
    return request.param


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets the number of CPU threads, and puts it back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def poisoned(request):
    target = next(
        (request.getfixturevalue(n) for n in ("target", "fused") if n in request.fixturenames), None
    )
    with poisoned_allocations(target.device if target else "cpu"):
        yield
