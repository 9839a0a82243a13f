"""A pytest plugin: the tests of the GPU targets, on the CPU.

    REHEARSE=cuda PYTHONPATH=tests pytest -p rehearsal tests/test_forward_backward.py tests/test_hypothesis.py
    REHEARSE=triton TRITON_INTERPRET=1 PYTHONPATH=tests pytest -p rehearsal tests/test_forward_backward.py

The only target is then the CUDA backend, from its ops to its kernels, on the runtime of tests/cuda_host.py, the resident
tier wherever it fits (REHEARSE=streamed: nowhere), or the Triton kernels in their interpreter. What a GPU would run of
these files passes or fails here first. REHEARSE_DTYPES="float32 bfloat16" compiles the CUDA kernels of no others;
REHEARSE_MULTIPROCESSORS=132 has the plans of a large device, where 3 give a block many items.
"""

from __future__ import annotations

import dataclasses
import os

import oracle
import pytest

from cbam_fused import _backends

WHAT = os.environ["REHEARSE"]
BACKEND = "triton" if WHAT == "triton" else "cuda"
oracle.TARGETS = oracle.FUSED = (oracle.Target(BACKEND, "cpu"),)

if BACKEND == "cuda":
    import cuda_host

    os.environ["CBAM_FUSED_TIER"] = "resident" if WHAT == "cuda" else "streamed"
    host = cuda_host.Host()
    multiprocessors = int(os.environ.get("REHEARSE_MULTIPROCESSORS", 3))
    host.set(cuda_host.Device(multiprocessors=multiprocessors, shared=(227 if WHAT == "cuda" else 99) << 10))
    dtypes = os.environ.get("REHEARSE_DTYPES", " ".join(cuda_host.DTYPES)).split()
    kernels = [host.run_kernels(dtype) for dtype in dtypes]

    _backends.TABLE = tuple(
        dataclasses.replace(b, device="cpu", load=lambda: None) if b.name == "cuda" else b
        for b in _backends.TABLE
    )
    _backends._state.clear()  # oracle.py has asked

    @pytest.fixture(autouse=True)
    def _schedule(request):
        """Another order of threads and blocks for every test, the same in every run."""
        kernels[0].reset(seed=hash(tuple(request.node.nodeid.encode())), resident=6)
        yield
        assert not kernels[0].error(), kernels[0].error()

    def pytest_terminal_summary(terminalreporter):
        tiers = [line.split()[0] for line in host.calls()]
        launches = ", ".join(f"{tiers.count(tier)} {tier}" for tier in ("resident", "streamed"))
        terminalreporter.write_line(f"launches: {launches}")
