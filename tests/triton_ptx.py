"""Runs recorded launches as compiled PTX under ptxcpu, an optional sibling directory, and counts bytes."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import dataclass
from typing import Dict, Iterable, List, Mapping, Optional, Tuple

import numpy as np
import ptxcpu_runtime
import torch
from triton_recording import Launch


def unavailable() -> Optional[str]:
    """None if compiled PTX can run here, or why not."""
    if not (ptxcpu_runtime.DIRECTORY / "ptxcpu.py").exists():
        return "ptxcpu is not beside the project (../shared/ptxcpu)"
    if shutil.which("g++") is None:
        return "ptxcpu needs g++ on the PATH"
    return None


# ptxcpu counts a launch as a whole. Put into its runtime, this counts what passes between L1 and L2 by
# allocation too. And where a layout holds an element more than once, Triton lets every holder store the same
# value: a line of PTX that races with itself, which is left out. In place of each text goes the other.
_TALLY = r"""
extern "C" { u64 owner_base[4096], owner_count, owner_sectors[4096]; }
static void tally(u64 sector) {
  u64 *end = owner_base + owner_count, *at = std::upper_bound(owner_base, end, sector << 5);
  if (at != owner_base) owner_sectors[at - owner_base - 1]++; }
"""
_ANCHORS = (
    ("static void trace_global(Warp *w,", _TALLY + "static void trace_global(Warp *w,"),
    ("if (l1ok) s.l1_miss++;", "if (l1ok) s.l1_miss++; tally(sec[i]);"),
    ("else g->l2.write(sec[i]);", "else { tally(sec[i]); g->l2.write(sec[i]); }"),
    ("    if (bad) {", "    if (bad && ol != line) {"),
)


def _ptxcpu():
    return ptxcpu_runtime.load("by_owner", _ANCHORS)


ARENA = 4 << 30
ALIGNMENT = 512


@dataclass
class Traffic:
    """Bytes of one launch: between L1 and L2 in whole sectors, in all and by owner; and to and from DRAM."""

    kernel: str
    to_l2: int
    by_owner: Dict[str, int]
    dram: int


def _table(library: ctypes.CDLL, name: str) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint64 * 4096).in_dll(library, name))


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

    def _module(self, launch: Launch):
        key = launch.key()
        if key not in self.modules:
            compiled = launch.compile(self.target)
            module = _ptxcpu().PtxModule(compiled.asm["ptx"], opt="-O1")
            self.modules[key] = (module, compiled.metadata.shared)
        return self.modules[key]

    def run(
        self,
        launches: Iterable[Launch],
        owners: Optional[Mapping[int, str]] = None,
        keep: bool = False,
        **options,
    ) -> List[Traffic]:
        """Runs them in order. `owners` names storages by address; all others are "scratch"."""
        found = []
        for i, launch in enumerate(launches):
            args = launch.runtime_args()
            placed = [self._place(a) if isinstance(a, torch.Tensor) else np.int32(a) for a in args]
            module, shared = self._module(launch)
            common = dict(
                grid=(launch.programs,), block=(32 * launch.found.warps,), smem=shared, **self.options
            )
            name = launch.name
            _, library = module.compile(name)
            starts = sorted((b.ctypes.data, key) for key, (_, b) in self.memory.items())
            sectors = _table(library, "owner_sectors")
            _table(library, "owner_base")[: len(starts)] = [at for at, _ in starts]
            sectors[:] = 0
            ctypes.c_uint64.in_dll(library, "owner_count").value = len(starts)
            r = module.launch(name, args=placed, keep_l2=keep or i > 0, **common, **options)
            assert r.race_exact, f"{name}: ptxcpu cannot tell races with what this kernel waits for"
            by_owner: Dict[str, int] = {}
            for (_, key), count in zip(starts, sectors.tolist()):
                owner = (owners or {}).get(key, "scratch")
                by_owner[owner] = by_owner.get(owner, 0) + 32 * count
            to_l2 = 32 * (r.stats["l2_hit"] + r.stats["l2_miss"] + r.stats["st_sec"])
            assert to_l2 == sum(by_owner.values()), f"{name}: traffic that no tensor owns"
            dram = r.stats["dram_read_bytes"] + r.stats["dram_write_bytes"]
            found.append(Traffic(name, to_l2, by_owner, dram))
        return found

    def read_back(self) -> None:
        """Copies the memory into the tensors that it stands for."""
        for storage, buffer in self.memory.values():
            view = torch.tensor([], dtype=torch.uint8).set_(storage)
            view.copy_(torch.frombuffer(buffer, dtype=torch.uint8)[: storage.nbytes()])
