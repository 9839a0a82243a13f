"""The resident tier's ops, executed on the host by tests/simt: cuda_streamed's functions with another machine."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional

import cuda_streamed as cs
import numpy as np
import torch
from simt import build

DRIVER = Path(__file__).with_name("cuda_resident_driver.cpp")
REPORT = (
    "covered",
    "fits",
    "cluster",
    "split",
    "vector",
    "threads",
    "shared",
    "scratch",
    "counters",
    "quads",
)
BY_POSITIONS, BY_CHANNELS = 0, 1


@dataclass
class ResidentMachine(cs.Machine):
    """A modelled device with clusters. `cluster` 0: the policy's choice."""

    multiprocessors: int = 132
    shared: int = 227 << 10
    cluster: int = 0

    def execute(self, call: cs._Call, arrays: List[Optional[build.Array]]) -> None:
        lib = library(call.x.dtype, self.flavor)
        self.report = plan(lib, call.sizes, self.cluster)
        assert self.report["fits"], self.report
        counters = build.Array(np.zeros(self.report["counters"], np.uint32), "counters")
        scratch = build.Array(np.zeros(max(self.report["scratch"], 1), np.uint8), "scratch", unwritten=True)
        lib.run(
            "run", call.sizes, float(call.norm.eps), *arrays, counters, scratch, self.launches, self.cluster,
            seed=self.seed, resident=self.resident,
        )  # fmt: skip
        assert not counters.data.any(), "the counters must be zero again"
        self.traffic = {n: a.bytes_read + a.bytes_written for n, a in zip(cs.ORDER, arrays) if a is not None}
        self.traffic["scratch"] = scratch.bytes_read + scratch.bytes_written


def plan(lib: build.Library, sizes: np.ndarray, cluster: int = 0) -> Dict[str, int]:
    """The policy's choices by name."""
    report = np.zeros(len(REPORT), np.int64)
    lib.run("plan", sizes, cluster, report)
    return dict(zip(REPORT, report.tolist()))


@functools.lru_cache(maxsize=None)
def library(dtype: torch.dtype, flavor: Optional[str] = None) -> build.Library:
    """The driver of one dtype."""
    return build.load(DRIVER, flavor=flavor, defines=[f"CBAM_ELEMENT={cs.ELEMENTS[dtype][0]}"])
