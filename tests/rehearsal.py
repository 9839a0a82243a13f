"""A pytest plugin: the tests of the GPU targets, on the CPU, as far as they go through `_ops.get`.

    REHEARSE=cuda PYTHONPATH=tests pytest -p rehearsal tests/test_forward_backward.py tests/test_hypothesis.py
    REHEARSE=triton TRITON_INTERPRET=1 PYTHONPATH=tests pytest -p rehearsal tests/test_forward_backward.py

The only target is then the CUDA kernels under tests/simt, the resident tier wherever it fits (REHEARSE=streamed: nowhere),
or the Triton kernels in their interpreter. What a GPU would run of these files passes or fails here first.
"""

from __future__ import annotations

import functools
import os

import oracle
import torch

from cbam_fused import _backends, _ops

WHAT = os.environ["REHEARSE"]
BACKEND = "triton" if WHAT == "triton" else "cuda"
oracle.TARGETS = oracle.FUSED = (oracle.Target(BACKEND, "cpu"),)

if BACKEND == "cuda":
    import cuda_resident as cr
    import cuda_streamed as cs

    class Tiers(cr.ResidentMachine):
        """The resident tier where it covers a call and fits, else the streamed one."""

        streamed = cs.Machine()

        def execute(self, call, arrays):
            if WHAT == "cuda" and call.x.dtype != torch.float64:
                plan = cr.plan(cr.library(call.x.dtype, self.flavor), call.sizes, self.cluster)
                if plan["covered"] and plan["fits"]:
                    return super().execute(call, arrays)
            self.streamed.execute(call, arrays)
            self.report, self.traffic = self.streamed.report, self.streamed.traffic

    host = cs.HostOps(Tiers())
    get, select = _ops.get, _backends.select

    def dense(x: torch.Tensor) -> torch.Tensor:
        return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()

    def call(name: str, *arguments):
        """What csrc/cuda/ops.cpp does before a launch: an empty return, and copies of what is not dense."""
        if arguments[0].numel() == 0:
            return get("cpu", name)(*arguments)
        if not name.endswith("backward"):
            x, *rest = arguments
            return host.call(name, dense(x), *rest)
        dy, x, *rest = arguments
        x = dense(x)
        dy = dy.contiguous() if x.is_contiguous() else dy.movedim(1, -1).contiguous().movedim(-1, 1)
        return host.call(name, dy, x, *rest)

    _ops.get = lambda backend, name: (
        functools.partial(call, name) if backend == "cuda" else get(backend, name)
    )
    _backends.select = lambda name, x, c: name if name == "cuda" else select(name, x, c)
