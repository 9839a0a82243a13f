"""Compiled PTX of both tiers' kernels, executed by the optional sibling ../shared/ptxcpu with its cache model.

    machine = cuda_ptx.PtxMachine(seed=1)               # the streamed tier; ResidentPtxMachine the resident one
    cuda_streamed.HostOps(machine).installed(monkeypatch)  # backend "cuda" runs on it, or: cbam_forward(..., machine)
    machine.results["cbam_forward"].stats               # what ptxcpu counted in the last launch of an op
    machine.dram("cbam_forward")                        # bytes that DRAM read and wrote
    machine.small_bytes["cbam_forward"]                 # of them, at most what is not of x's size: weights, saved

`log` lists all results in order and `result` is the last. A launch raises ptxcpu's KernelError on a race in
shared memory (in the streamed tier: through mbarriers, for which the resident one waits, ptxcpu does not look),
an access that is out of bounds or misaligned, and a barrier that not all reach; counters that are not zero again
fail here. Where `unavailable()` is not None, tests skip with what it says.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

import cuda_resident as cr
import cuda_streamed as cs
import numpy as np
import ptxcpu_runtime
from simt import build

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
TARGET = "sm_90"
TRANSLATE = "-O2"  # a few seconds, since it is threaded code
BIG = ("x", "dy", "y", "dx")
SPLITS = ("cbam::resident::kByPositions", "cbam::resident::kByChannels")
LAYOUTS = ("cbam::kContiguous", "cbam::kChannelsLast")
# A kernel's name and parameter, by tier.
STREAMED = "cbam::streamed_{}_kernel<cbam::StreamedTraits<{}>>(const cbam::Streamed)"
RESIDENT = (
    "cbam::resident::resident_{}_kernel<cbam::resident::Traits<{}>>"
    "(const __grid_constant__ cbam::resident::Resident)"
)


def unavailable() -> Optional[str]:
    """None, or why compiled PTX cannot run on this machine."""
    if not (ptxcpu_runtime.DIRECTORY / "ptxcpu.py").exists():
        return "there is no ../shared/ptxcpu"
    if not nvcc():
        return "there is no nvcc"
    return None


def nvcc() -> Optional[str]:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidate = os.path.join(home, "bin", "nvcc")
    return candidate if os.path.exists(candidate) else shutil.which("nvcc")


HINTS = True  # whether the modelled caches honor .cs
COUNTING = False  # whether each instruction is counted, and PTX says of which line of source it is


def _ptxcpu() -> Any:
    if COUNTING:
        return ptxcpu_runtime.load("counting", (), counting=True)
    if not HINTS:
        return ptxcpu_runtime.load("no_hints", ())
    return ptxcpu_runtime.load("evict_first", ptxcpu_runtime.EVICT_FIRST)


@functools.lru_cache(maxsize=None)
def _planner() -> ctypes.CDLL:
    """The library of cuda_plan.cpp."""
    build.CACHE.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("cuda_plan.cpp")
    headers = (*source.parent.glob("cuda_*_problem.h"), *SOURCES.glob("*.h"))
    text = "".join(p.read_text() for p in (source, *sorted(headers)))
    library = build.CACHE / f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        temporary = library.with_suffix(f".{os.getpid()}")
        command = [build.CXX, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{SOURCES}"]
        subprocess.run([*command, "-o", str(temporary), str(source)], check=True)
        temporary.rename(library)
    lib = ctypes.CDLL(str(library))
    lib.parameter_bytes.restype = lib.resident_parameter_bytes.restype = ctypes.c_int64
    return lib


@functools.lru_cache(maxsize=None)
def _module(header: str, kernel: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(f'#include "{header}"\ntemplate __global__ void {kernel};\n')
        flags = ["-O3", "-std=c++17", f"-arch={TARGET}", f"-I{SOURCES}"] + ["-lineinfo"] * COUNTING
        compiled = str(path.with_suffix(".ptx"))
        subprocess.run([str(nvcc()), *flags, "-ptx", str(path), "-o", compiled], check=True)
        return _ptxcpu().PtxModule(compiled, opt=TRANSLATE)


def _pointer(a: np.ndarray) -> ctypes.c_void_p:
    return a.ctypes.data_as(ctypes.c_void_p)


@dataclass
class PtxMachine(cs.Machine):
    """The streamed tier on an H100 as ptxcpu models it: all of its blocks at a time, interleaved from `seed`."""

    multiprocessors: int = 132
    shared: int = 227 << 10
    trace: bool = True  # the cache model; without it, only what the kernel writes is of use
    modelled_l2: Optional[int] = None  # where it is not the one that plans are for
    keep: bool = False  # L2's contents from launch to launch, and tensors of x's size where they are
    results: Dict[str, Any] = field(default_factory=dict)  # by op
    small_bytes: Dict[str, int] = field(default_factory=dict)  # of all tensors but BIG, by op
    log: List[Any] = field(default_factory=list)
    placed: Dict[int, Any] = field(default_factory=dict)

    def _buffer(self, name: str, a: build.Array) -> np.ndarray:
        key = a.data.ctypes.data
        if self.keep and name in BIG and key in self.placed:
            return self.placed[key][0]
        buffer = _ptxcpu().dempty(a.data.shape, a.data.dtype)
        if self.keep and name in BIG:
            self.placed[key] = buffer, a.data  # which keeps its address from being another's
        return buffer

    def execute(self, call: cs._Call, arrays: List[Optional[build.Array]]) -> None:
        operation, ptxcpu = cs.OPERATIONS[call.sizes[0]], _ptxcpu()
        self.report = self._plan(call)
        assert self.report["fits"], self.report
        buffers: Dict[str, np.ndarray] = {}
        pointers = (ctypes.c_void_p * len(cs.ORDER))()
        for i, (name, a) in enumerate(zip(cs.ORDER, arrays)):
            if a is None:
                continue
            buffers[name] = self._buffer(name, a)
            if a.unwritten:
                buffers[name].view(np.uint8).fill(0xFF)
            else:
                buffers[name][...] = a.data
            pointers[i] = buffers[name].ctypes.data
        counters = ptxcpu.dempty((self.report["counters"],), np.uint32)
        counters.fill(0)
        scratch = ptxcpu.dempty((max(self.report["scratch"], 1),), np.uint8)
        scratch.fill(0xFF)
        parameters = self._fill(call, pointers, counters, scratch)
        module = self._kernel(call, "backward" if "backward" in operation else "forward")
        (kernel,) = module.mod.funcs
        shape = self._launch(call)
        for _ in range(self.launches):
            result = module.launch(
                kernel, args=[bytes(parameters)], smem=self.report["shared"], coop=True, maxres=shape["grid"][0],
                seed=self.seed, l2=self.modelled_l2 or self.l2, nsm=self.multiprocessors, trace=self.trace,
                keep_l2=self.keep and bool(self.log), extra=[*buffers.values(), counters, scratch], **shape,
            )  # fmt: skip
        self.results[operation] = result
        self.log.append(result)
        self.small_bytes[operation] = sum(b.nbytes for name, b in buffers.items() if name not in BIG)
        assert not counters.any(), "the counters must be zero again"
        for name, a in zip(cs.ORDER, arrays):
            if a is not None and a.unwritten:
                a.data[...] = buffers[name]

    def _plan(self, call: cs._Call) -> Dict[str, int]:
        report = np.zeros(len(cs.REPORT), np.int64)
        _planner().plan(_pointer(call.sizes), _pointer(report))
        return dict(zip(cs.REPORT, report.tolist()))

    def _fill(self, call: cs._Call, pointers: Any, counters: np.ndarray, scratch: np.ndarray) -> Any:
        """The kernel's parameter."""
        out = ctypes.create_string_buffer(_planner().parameter_bytes())
        eps = ctypes.c_double(call.norm.eps)
        _planner().fill(_pointer(call.sizes), eps, pointers, _pointer(counters), _pointer(scratch), out)
        return out

    def _kernel(self, call: cs._Call, direction: str) -> Any:
        """The instantiation that the launcher picks."""
        element, _ = cs.ELEMENTS[call.x.dtype]
        layout = LAYOUTS[cs.is_channels_last(call.x)]
        rows = "kFolded" if self.report["fold"] > 1 else "kRagged" if self.report["ragged"] else "kWhole"
        traits = f"{element}, {self.report['vector']}, {layout}, cbam::{rows}"
        return _module(f"streamed_{direction}.cuh", STREAMED.format(direction, traits))

    def _launch(self, call: cs._Call) -> Dict[str, Any]:
        return {"grid": (self.report["grid"],), "block": (256,)}

    @property
    def result(self) -> Any:
        return self.log[-1]

    @property
    def dram_bytes(self) -> int:
        """Of the last launch."""
        return _dram(self.result)

    def dram(self, operation: str) -> int:
        return _dram(self.results[operation])

    def past_l1(self, operation: str) -> int:
        """Bytes between L1 and L2, of all tensors, in whole sectors."""
        stats = self.results[operation].stats
        return 32 * int(stats["ld_sec"] - stats["l1_hit"] + stats["st_sec"])

    def instructions(self, operation: str) -> int:
        """Of PTX, executed, over all threads: a warp's count as 32 whatever its mask is."""
        return 32 * int(self.results[operation].stats["warp_insts"])


def _dram(result: Any) -> int:
    return int(result.stats["dram_read_bytes"] + result.stats["dram_write_bytes"])


def resident_plan(call: cs._Call, cluster: int = 0) -> Dict[str, int]:
    """The resident tier's choices for a call, by name; nothing is executed."""
    report = np.zeros(len(cr.REPORT), np.int64)
    _planner().resident_plan(_pointer(call.sizes), ctypes.c_int64(cluster), _pointer(report))
    return dict(zip(cr.REPORT, report.tolist()))


@dataclass
class ResidentPtxMachine(PtxMachine):
    """The resident tier on the same. `cluster` 0: the policy's choice."""

    cluster: int = 0

    def _plan(self, call: cs._Call) -> Dict[str, int]:
        return resident_plan(call, self.cluster)

    def _fill(self, call: cs._Call, pointers: Any, counters: np.ndarray, scratch: np.ndarray) -> Any:
        out = ctypes.create_string_buffer(_planner().resident_parameter_bytes())
        _planner().resident_fill(
            _pointer(call.sizes), ctypes.c_double(call.norm.eps), pointers, _pointer(counters), _pointer(scratch),
            ctypes.c_int64(self.cluster), out,
        )  # fmt: skip
        return out

    def _kernel(self, call: cs._Call, direction: str) -> Any:
        element, _ = cs.ELEMENTS[call.x.dtype]
        layout, split = LAYOUTS[cs.is_channels_last(call.x)], SPLITS[self.report["split"]]
        traits = f"{element}, {self.report['vector']}, {layout}, {split}"
        return _module(f"resident_{direction}.cuh", RESIDENT.format(direction, traits))

    def _launch(self, call: cs._Call) -> Dict[str, Any]:
        cluster = self.report["cluster"]
        return {
            "grid": (call.x.shape[0] * cluster,),
            "block": (self.report["threads"],),
            "cluster": (cluster,),
        }

    def estimate(self, operation: str) -> Dict[str, Any]:
        """ptxcpu's lower bounds of the time, by resource: `us_issue`, `us_dram` and so on."""
        return dict(_ptxcpu().estimate(self.results[operation], "H100", regs=128))

    def time_over_copy(self, operation: str, samples: int, floor: int, batch: int = 16) -> float:
        """ptxcpu's estimate for `batch` samples over that of a copy which moves as many bytes as `floor`.

        A launch of `samples` was executed whose blocks all run at once, each on a multiprocessor of its own. A
        batch's clusters run in whole waves of as many as the multiprocessors hold.
        """
        times = {k: v for k, v in self.estimate(operation).items() if k.startswith("us_")}
        blocks = int(self.results[operation].grid[0])
        cluster = blocks // samples
        assert blocks <= _MULTIPROCESSORS
        waves = -(-batch // (_MULTIPROCESSORS // cluster))
        for k, v in times.items():
            # DRAM and L2 are shared by all multiprocessors; the rest is time of the busiest one.
            times[k] = v * (batch / samples if k in ("us_dram", "us_l2") else waves)
        return (max(times.values()) + _LAUNCH) / (floor * batch / samples / _BANDWIDTH + _LAUNCH)


# ptxcpu's H100: bytes a microsecond, microseconds of a launch, multiprocessors.
_BANDWIDTH, _LAUNCH, _MULTIPROCESSORS = 3350e3, 2.5, 132
