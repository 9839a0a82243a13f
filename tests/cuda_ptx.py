"""The streamed tier's compiled PTX, executed by the optional sibling ../shared/ptxcpu, with its cache model."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

import cuda_streamed as cs
import numpy as np
from simt import build

ROOT = Path(__file__).resolve().parents[1]
PTXCPU = ROOT.parent / "shared" / "ptxcpu"
SOURCES = ROOT / "csrc" / "cuda"
TARGET = "sm_90"
# The translated kernel is one function of some 100,000 lines, over which an optimising g++ takes an hour.
TRANSLATE = "-O0"


def unavailable() -> Optional[str]:
    """None, or why compiled PTX cannot run on this machine."""
    if not (PTXCPU / "ptxcpu.py").exists():
        return "there is no ../shared/ptxcpu"
    if not nvcc():
        return "there is no nvcc"
    return None


def nvcc() -> Optional[str]:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidate = os.path.join(home, "bin", "nvcc")
    return candidate if os.path.exists(candidate) else shutil.which("nvcc")


def _ptxcpu():
    if str(PTXCPU) not in sys.path:
        sys.path.insert(0, str(PTXCPU))
    import ptxcpu

    return ptxcpu


@functools.lru_cache(maxsize=None)
def _planner():
    folder = build.CACHE
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("cuda_plan.cpp")
    text = "".join(
        p.read_text()
        for p in (source, source.with_name("cuda_streamed_problem.h"), *sorted(SOURCES.glob("*.h")))
    )
    library = folder / f"cuda_plan-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        temporary = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [
                build.CXX,
                "-std=c++17",
                "-O1",
                "-shared",
                "-fPIC",
                f"-I{SOURCES}",
                "-o",
                str(temporary),
                str(source),
            ],
            check=True,
        )
        temporary.rename(library)
    lib = ctypes.CDLL(str(library))
    lib.parameter_bytes.restype = ctypes.c_int64
    return lib


@functools.lru_cache(maxsize=None)
def _module(direction: str, traits: str):
    source = (
        f'#include "streamed_{direction}.cuh"\n'
        f"template __global__ void cbam::streamed_{direction}_kernel<cbam::StreamedTraits<{traits}>>(const cbam::Streamed);\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source)
        subprocess.run(
            [
                nvcc(),
                "-O3",
                "-std=c++17",
                f"-arch={TARGET}",
                f"-I{SOURCES}",
                "-DCBAM_USUAL_OPTIONS",
                "-ptx",
                str(path),
                "-o",
                str(path.with_suffix(".ptx")),
            ],
            check=True,
        )
        return _ptxcpu().PtxModule(str(path.with_suffix(".ptx")), opt=TRANSLATE)


@dataclass
class PtxMachine(cs.Machine):
    """Runs `blocks` blocks at a time, interleaved from `seed`; `result` is what ptxcpu returned, by op."""

    multiprocessors: int = 132
    shared: int = 227 << 10
    trace: bool = True
    result: Any = None
    log: List[Any] = field(default_factory=list)

    def execute(self, call, arrays) -> None:
        lib, ptxcpu = _planner(), _ptxcpu()
        report = np.zeros(len(cs.REPORT), np.int64)
        lib.plan(call.sizes.ctypes.data_as(ctypes.c_void_p), report.ctypes.data_as(ctypes.c_void_p))
        self.report = dict(zip(cs.REPORT, report.tolist()))
        assert self.report["fits"], self.report
        buffers: Dict[str, np.ndarray] = {}
        pointers = (ctypes.c_void_p * len(cs.ORDER))()
        for i, (name, a) in enumerate(zip(cs.ORDER, arrays)):
            if a is None:
                continue
            buffers[name] = ptxcpu.dempty(a.data.shape, a.data.dtype)
            if a.unwritten:
                buffers[name].view(np.uint8).fill(0xFF)
            else:
                buffers[name][...] = a.data
            pointers[i] = buffers[name].ctypes.data
        counters = ptxcpu.dempty((self.report["counters"],), np.uint32)
        counters.fill(0)
        scratch = ptxcpu.dempty((max(self.report["scratch"], 1),), np.uint8)
        scratch.fill(0xFF)
        parameters = ctypes.create_string_buffer(lib.parameter_bytes())
        lib.fill(
            call.sizes.ctypes.data_as(ctypes.c_void_p), ctypes.c_double(call.norm.eps), pointers,
            ctypes.c_void_p(counters.ctypes.data), ctypes.c_void_p(scratch.ctypes.data), parameters,
        )  # fmt: skip
        assert call.usual, "compiled without the rarer options, to be quicker to translate"
        element, _ = cs.ELEMENTS[call.x.dtype]
        layout = "cbam::kChannelsLast" if cs.is_channels_last(call.x) else "cbam::kContiguous"
        traits = f"{element}, {self.report['vector']}, {layout}, {str(self.report['fold'] > 1).lower()}"
        direction = "backward" if call.sizes[0] >= 3 else "forward"
        module = _module(direction, traits)
        (kernel,) = module.mod.funcs
        for _ in range(self.launches):
            self.result = module.launch(
                kernel, (self.report["grid"],), (256,), [bytes(parameters)], smem=self.report["shared"], coop=True,
                maxres=self.report["grid"], seed=self.seed, l2=self.l2, nsm=self.multiprocessors, trace=self.trace,
                extra=[*buffers.values(), counters, scratch],
            )  # fmt: skip
        self.log.append(self.result)
        assert not counters.any(), "the counters must be zero again"
        for name, a in zip(cs.ORDER, arrays):
            if a is not None and a.unwritten:
                a.data[...] = buffers[name]

    @property
    def dram_bytes(self) -> int:
        return self.result.stats["dram_read_bytes"] + self.result.stats["dram_write_bytes"]
