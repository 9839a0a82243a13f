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
from typing import Any, Dict, List, Optional

import cuda_ptx
import cuda_resident as cr
import cuda_streamed as cs
import numpy as np
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
        flags = [
            "-O3",
            "-std=c++17",
            f"-arch={cuda_ptx.TARGET}",
            f"-I{cuda_ptx.SOURCES}",
            "-DCBAM_USUAL_OPTIONS",
        ]
        compiled = str(path.with_suffix(".ptx"))
        subprocess.run([str(cuda_ptx.nvcc()), *flags, "-ptx", str(path), "-o", compiled], check=True)
        return cuda_ptx._ptxcpu().PtxModule(compiled, opt=TRANSLATE)


@dataclass
class PtxMachine(cr.ResidentMachine):
    """An H100 as ptxcpu models it; `results` holds what it returned, by direction."""

    results: Dict[str, Any] = field(default_factory=dict)
    small_bytes: Dict[str, int] = field(default_factory=dict)  # of all tensors but x, dy, y and dx

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
        self.small_bytes[direction] = sum(
            v.nbytes for k, v in buffers.items() if k not in ("x", "dy", "y", "dx")
        )
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


# ptxcpu's H100: bytes a microsecond, microseconds of a launch, multiprocessors.
_BANDWIDTH, _LAUNCH, _MULTIPROCESSORS = 3350e3, 2.5, 132


def time_over_copy(machine: PtxMachine, direction: str, samples: int, floor: int, batch: int = 16) -> float:
    """ptxcpu's estimate for `batch` samples over that of a copy which moves as many bytes.

    A launch of `samples` was executed, whose blocks all run at once; of a batch, as many as there are
    multiprocessors. What a sample costs is the same in both.
    """
    blocks = int(machine.results[direction].grid[0])
    parallel = min(_MULTIPROCESSORS, blocks), min(_MULTIPROCESSORS, blocks * batch // samples)
    times = {k: v for k, v in machine.estimate(direction).items() if k.startswith("us_")}
    for k, v in times.items():
        shared = k in ("us_dram", "us_l2")  # by all multiprocessors
        times[k] = v * batch / samples * (1.0 if shared else parallel[0] / parallel[1])
    return (max(times.values()) + _LAUNCH) / (floor * batch / samples / _BANDWIDTH + _LAUNCH)


# What the closing note of the tier lists: the usual networks' shapes.
SHAPES = ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (64, 56, 56), (128, 28, 28), (256, 28, 28))


def main() -> None:
    """Prints modelled DRAM traffic over the floor and time over a copy's, bf16, a batch of 16."""
    import oracle
    import pytest
    import torch

    samples = 4
    print("shape, direction, cluster, traffic / floor, time / copy")
    with pytest.MonkeyPatch.context() as patch:
        for shape in SHAPES:
            problem = oracle.make_problem(
                (samples, *shape), oracle.Options(hidden=shape[0] // 16), torch.bfloat16
            )
            machine = PtxMachine()
            cs.HostOps(machine).installed(patch)
            oracle.run_problem(problem, "cuda")
            size = problem.x.numel() * problem.x.element_size()
            for direction, floor in (("forward", 2 * size), ("backward", 3 * size)):
                traffic = (machine.dram(direction) - machine.small_bytes[direction]) / floor
                time = time_over_copy(machine, direction, samples, floor)
                cluster = int(machine.results[direction].grid[0]) // samples
                print(f"{shape}, {direction}, {cluster}, {traffic:.3f}, {time:.3f}", flush=True)


if __name__ == "__main__":
    main()
