"""The resident tier's compiled PTX, executed by the optional sibling ../shared/ptxcpu, with its cache model."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

import cuda_ptx
import cuda_resident as cr
import cuda_streamed as cs
from simt import build

SPLITS = ("cbam::resident::kByPositions", "cbam::resident::kByChannels")
# At -O2, g++ takes minutes over one translated kernel.
TRANSLATE = "-O0"


@functools.lru_cache(maxsize=None)
def _planner() -> ctypes.CDLL:
    build.CACHE.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("cuda_resident_plan.cpp")
    headers = (*source.parent.glob("cuda_*_problem.h"), *cuda_ptx.SOURCES.glob("*.h"))
    text = "".join(p.read_text() for p in (source, *sorted(headers)))
    library = build.CACHE / f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        temporary = library.with_suffix(f".{os.getpid()}")
        command = [build.CXX, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{cuda_ptx.SOURCES}"]
        subprocess.run([*command, "-o", str(temporary), str(source)], check=True)
        temporary.rename(library)
    lib = ctypes.CDLL(str(library))
    lib.parameter_bytes.restype = ctypes.c_int64
    return lib


@functools.lru_cache(maxsize=None)
def _module(direction: str, traits: str) -> Any:
    """The compiled kernel, without the rarer options: they make it several times as long to translate."""
    kernel = f"cbam::resident::resident_{direction}_kernel<cbam::resident::Traits<{traits}>>"
    source = (
        f'#include "resident_{direction}.cuh"\n'
        f"template __global__ void {kernel}(const __grid_constant__ cbam::resident::Resident);\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source)
        flags = ["-O3", "-std=c++17", f"-arch={cuda_ptx.TARGET}", f"-I{cuda_ptx.SOURCES}", "-DCBAM_USUAL_OPTIONS"]
        compiled = str(path.with_suffix(".ptx"))
        subprocess.run([str(cuda_ptx.nvcc()), *flags, "-ptx", str(path), "-o", compiled], check=True)
        return cuda_ptx._ptxcpu().PtxModule(compiled, opt=TRANSLATE)


@dataclass
class PtxMachine(cr.ResidentMachine):
    """An H100 as ptxcpu models it; `results` holds what it returned, by direction."""

    results: Dict[str, Any] = field(default_factory=dict)

    def execute(self, call: cs._Call, arrays: List[Optional[build.Array]]) -> None:
        assert call.usual, "compiled without the rarer options"
        lib, ptxcpu = _planner(), cuda_ptx._ptxcpu()
        sizes = call.sizes.ctypes.data_as(ctypes.c_void_p)
        report = np.zeros(len(cr.REPORT), np.int64)
        lib.plan(sizes, ctypes.c_int64(self.cluster), report.ctypes.data_as(ctypes.c_void_p))
        self.report = dict(zip(cr.REPORT, report.tolist()))
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
            sizes, ctypes.c_double(call.norm.eps), pointers, ctypes.c_void_p(counters.ctypes.data),
            ctypes.c_void_p(scratch.ctypes.data), ctypes.c_int64(self.cluster), parameters,
        )  # fmt: skip
        direction = "backward" if call.sizes[0] >= 3 else "forward"
        module = _module(direction, self.traits(call))
        (kernel,) = module.mod.funcs
        cluster = self.report["cluster"]
        self.results[direction] = module.launch(
            kernel, (call.x.shape[0] * cluster,), (self.report["threads"],), [bytes(parameters)],
            smem=self.report["shared"], cluster=(cluster,), coop=True, maxres=call.x.shape[0] * cluster, seed=self.seed,
            l2=self.l2, nsm=self.multiprocessors, extra=[*buffers.values(), counters, scratch],
        )  # fmt: skip
        assert not counters.any(), "the counters must be zero again"
        for name, a in zip(cs.ORDER, arrays):
            if a is not None and a.unwritten:
                a.data[...] = buffers[name]

    def traits(self, call: cs._Call) -> str:
        """Template arguments of the instantiation that the launcher picks."""
        element, _ = cs.ELEMENTS[call.x.dtype]
        layout = "cbam::kChannelsLast" if cs.is_channels_last(call.x) else "cbam::kContiguous"
        return f"{element}, {self.report['vector']}, {layout}, {SPLITS[self.report['split']]}"

    def dram(self, direction: str) -> int:
        stats = self.results[direction].stats
        return int(stats["dram_read_bytes"] + stats["dram_write_bytes"])

    def estimate(self, direction: str) -> Dict[str, Any]:
        return dict(cuda_ptx._ptxcpu().estimate(self.results[direction], "H100", regs=128))


def copy_seconds(call_bytes: int, bandwidth: Tuple[float, float] = (3350e9, 2.5e-6)) -> float:
    """What ptxcpu's estimate gives for a copy on an H100 that moves so many bytes: bandwidth and launch."""
    return call_bytes / bandwidth[0] + bandwidth[1]
