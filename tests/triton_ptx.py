"""Runs recorded launches as compiled PTX under ptxcpu, an optional sibling directory, and counts bytes."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Set, Tuple

import numpy as np
import torch
from triton_recording import Launch

DIRECTORY = Path(__file__).resolve().parents[2] / "shared" / "ptxcpu"


def unavailable() -> Optional[str]:
    """None if compiled PTX can run here, or why not."""
    if not (DIRECTORY / "ptxcpu.py").exists():
        return "ptxcpu is not beside the project (../shared/ptxcpu)"
    if shutil.which("g++") is None:
        return "ptxcpu needs g++ on the PATH"
    return None


def _ptxcpu():
    if str(DIRECTORY) not in sys.path:
        sys.path.insert(0, str(DIRECTORY))
    return importlib.import_module("ptxcpu")


ARENA = 4 << 30
ALIGNMENT = 512

_ADDRESS = re.compile(r"\[\s*(%rd\d+)")
_REGISTER = re.compile(r"%[a-z]+\d+")


def _without(ptx: str, parameters: Set[int]) -> str:
    """The PTX without global loads and stores through pointers that come from these parameters."""
    lines = ptx.splitlines()
    tainted: Set[str] = set()
    names = {f"param_{i}" for i in parameters}
    grew = True
    while grew:
        grew = False
        for line in lines:
            if " ld.global" in line or " st." in line or "\tst." in line:
                continue
            registers = _REGISTER.findall(line.split("//")[0])
            if not registers:
                continue
            hit = any(r in tainted for r in registers[1:])
            if "ld.param" in line:
                hit = any(re.search(rf"{n}(?!\d)", line) for n in names)
            if hit and registers[0].startswith("%rd") and registers[0] not in tainted:
                tainted.add(registers[0])
                grew = True
    kept = []
    for line in lines:
        access = re.search(r"\b(ld|st)\.global", line)
        address = _ADDRESS.search(line)
        if access and address and address.group(1) in tainted:
            continue
        kept.append(line)
    return "\n".join(kept) + "\n"


def _check_races(name: str, result) -> None:
    """Raises for a shared-memory race, but for one: where a layout holds an element more than once,
    Triton lets every holder store the same value, which ptxcpu reports as a line racing with itself."""
    for earlier, later in result.race_lines:
        if earlier != later:
            raise AssertionError(f"{name}: shared-memory race between PTX lines {earlier} and {later}")


@dataclass
class Traffic:
    """Bytes of one launch: requested from global memory, of these by tensors of x's size; from L1 to L2; DRAM."""

    kernel: str
    requested: int
    large: int
    to_l2: int
    dram: int
    result: object


class Machine:
    """Global memory that keeps its addresses from launch to launch, and the modelled L2 behind it."""

    def __init__(self, l2: int = 50 << 20, multiprocessors: int = 132, target: str = "sm_90"):
        self.options = dict(l2=l2, nsm=multiprocessors)
        self.target = target
        self.memory: Dict[int, Tuple[torch.UntypedStorage, np.ndarray]] = {}
        # One arena, filled from its start: which lines share a set of L2 must not vary from run to run.
        # Its pages come into being as they are touched.
        raw = np.empty(ARENA, np.uint8)
        self.arena = raw[-raw.ctypes.data % ALIGNMENT :]
        self.used = 0
        self.modules: Dict[Tuple, object] = {}

    def _place(self, t: torch.Tensor):
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.memory:
            end = self.used + max(1, storage.nbytes())
            buffer = self.arena[self.used : end]
            # A gap behind each, so that a small step out of one does not land in the next.
            self.used = -(-end // ALIGNMENT) * ALIGNMENT + ALIGNMENT
            view = torch.frombuffer(buffer, dtype=torch.uint8)
            view[: storage.nbytes()] = torch.tensor([], dtype=torch.uint8).set_(storage)
            self.memory[storage.data_ptr()] = (storage, buffer)
        offset = t.storage_offset() * t.element_size()
        return self.memory[storage.data_ptr()][1], offset

    def _module(self, launch: Launch, without: Set[int] = frozenset()):
        key = (launch.key(), tuple(sorted(without)))
        if key not in self.modules:
            compiled = launch.compile(self.target)
            ptx = compiled.asm["ptx"]
            module = _ptxcpu().PtxModule(_without(ptx, without) if without else ptx)
            self.modules[key] = (module, compiled.metadata.shared)
        return self.modules[key]

    def run(
        self, launches: Iterable[Launch], large: Optional[int] = None, keep: bool = False, **options
    ) -> List[Traffic]:
        """Runs them in order. With `large`, tensors of at least that many bytes are counted apart."""
        found = []
        for i, launch in enumerate(launches):
            args = launch.runtime_args()
            placed = [self._place(a) if isinstance(a, torch.Tensor) else np.int32(a) for a in args]
            module, shared = self._module(launch)
            common = dict(grid=(launch.programs,), block=(32 * launch.warps,), smem=shared, **self.options)
            name = launch.name
            small = None
            if large is not None:
                big = {
                    k for k, a in enumerate(args)
                    if isinstance(a, torch.Tensor) and a.numel() * a.element_size() >= large
                }  # fmt: skip
                before = {k: b.copy() for k, (_, b) in self.memory.items()}
                stripped, _ = self._module(launch, big)
                # Untraced: the modelled L2 is the process's, and must not see this launch.
                r = stripped.launch(name, args=placed, trace=False, check=False, **common)
                small = r.stats["ld_bytes"] + r.stats["st_bytes"]
                for k, b in before.items():
                    self.memory[k][1][...] = b
            r = module.launch(name, args=placed, keep_l2=keep or i > 0, check=False, **common, **options)
            _check_races(name, r)
            total = r.stats["ld_bytes"] + r.stats["st_bytes"]
            to_l2 = 32 * (r.stats["l2_hit"] + r.stats["l2_miss"] + r.stats["st_sec"])
            dram = r.stats["dram_read_bytes"] + r.stats["dram_write_bytes"]
            found.append(Traffic(name, total, total - (small or 0), to_l2, dram, r))
        return found

    def read_back(self) -> None:
        """Copies the memory into the tensors that it stands for."""
        for storage, buffer in self.memory.values():
            view = torch.tensor([], dtype=torch.uint8).set_(storage)
            view.copy_(torch.frombuffer(buffer, dtype=torch.uint8)[: storage.nbytes()])
