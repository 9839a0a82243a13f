"""Launch configurations: the pinned table, the user's table over it, and the look-up.

A row is chosen by kernel, device generation, layout, class of the map and bytes an element; `meta` are the kernel's block
sizes, `fill` how many programs a multiprocessor should get where the launcher can split further, and `registers`, where
given, how many a thread may use in variants in which ptxas would spill to fit one more block: pools in segments, of
inference or beside float32 weights, maxima that share on large maps, a backward that is given dz. A row for a device
generation goes before one for its family and that before one for any device, the user's table, which `python -m
cbam_fused.tune` writes, before the pinned one, and either's row for thin maps before one for all large ones.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Tuple

import torch

FORMAT = 2
PINNED = Path(__file__).with_name("launch_table.json")
# Positions up to which a map is "small": a tile of 64 positions then wastes little.
SMALL_MAP = 256
# Positions up to which it is "tiny": one tile of positions, and many channels to fill it with.
TINY_MAP = 64
# Channels up to which a larger map is "thin": a float a position weighs beside the positions of x.
FEW_CHANNELS = 64
MAPS = ("tiny", "small", "large", "thin")
# A chunk of a batch smaller than this costs more in launches than it saves in traffic.
SMALLEST_CHUNK = 16 << 20
# Smallest block sizes that every kernel compiles with (vectors of 16 elements need as many channels).
SMALLEST = {"BC": 16, "BP": 16, "MC": 16}

KERNELS = (
    "channel_pool",
    "spatial_pool",
    "scale_forward",
    "scale_backward",
    "attention_backward",
    "sample_backward",
    "input_backward",
    "weights_backward",
)
# Beside these, on tiny maps alone. First in `kernels`, as its row decides which of the others run.
TINY_KERNELS = ("whole_backward",)


def kernels(size: str) -> Tuple[str, ...]:
    """Those that a map of this class is given to."""
    return (*TINY_KERNELS, *KERNELS) if size == "tiny" else KERNELS


@dataclass(frozen=True)
class Device:
    """What the table and the launchers need to know: generation ("sm_90", "gfx942", "interpreter"),
    multiprocessors, and bytes of L2."""

    generation: str
    multiprocessors: int
    l2_bytes: int


@dataclass(frozen=True)
class Configuration:
    """Block sizes by name, warps a program, programs a multiprocessor; registers a thread that NVIDIA's compiler may
    use, where it is to be told."""

    meta: Mapping[str, int]
    warps: int
    fill: float
    registers: Optional[int] = None

    def limited(self, limit: bool) -> Configuration:
        """With its limit of registers, or without one."""
        return self if limit else replace(self, registers=None)

    def halved(self, block: str) -> Configuration:
        """With half of that block."""
        return replace(self, meta={**self.meta, block: max(1, self.meta[block] // 2)})


def interpreting() -> bool:
    """True where kernels run in Triton's interpreter; to be set before they are imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.lru_cache(maxsize=None)
def _describe(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        generation = p.gcnArchName.split(":")[0]
    else:
        generation = f"sm_{p.major}{p.minor}"
    return Device(generation, p.multi_processor_count, p.L2_cache_size)


def describe(device: torch.device) -> Device:
    """The device that kernels on tensors of `device` run on."""
    if device.type != "cuda" or interpreting():
        return Device("interpreter", 1, 0)
    return _describe(torch.cuda.current_device() if device.index is None else device.index)


def user_table_path() -> Path:
    """Where the tuner writes: $CBAM_FUSED_CACHE, or the platform's cache directory."""
    if override := os.environ.get("CBAM_FUSED_CACHE"):
        return Path(override) / "launch_table.json"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "cbam_fused" / "launch_table.json"


def family(generation: str) -> str:
    """The generation whose rows serve where a device has none of its own: sm_100 for sm_103, gfx942 for other CDNAs."""
    if generation.startswith("gfx9"):
        return "gfx942"
    return generation[:-1] + "0" if generation.startswith("sm_") else generation


def load_table(path: Path) -> dict:
    """A table, checked for its format. Raises ValueError with the path and what is wrong."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"launch table {path} cannot be read: {error}") from error
    if table.get("format") != FORMAT:
        raise ValueError(
            f"launch table {path} must have format {FORMAT}, got {table.get('format')!r}: delete it"
        )
    return table


@functools.lru_cache(maxsize=1)
def _tables() -> Tuple[dict, ...]:
    user = user_table_path()
    found = (load_table(PINNED),)
    return (load_table(user), *found) if user.exists() else found


def forget() -> None:
    """Reads the tables again at the next look-up."""
    _tables.cache_clear()
    _look_up.cache_clear()


def map_class(positions: int, channels: int) -> str:
    """One of MAPS."""
    if positions <= SMALL_MAP:
        return "tiny" if positions <= TINY_MAP else "small"
    return "thin" if channels <= FEW_CHANNELS else "large"


def _matches(row: dict, kernel: str, layout: str, size: str, itemsize: int) -> bool:
    return (
        row["kernel"] == kernel
        and row["layout"] in ("any", layout)
        and size in row["map"]
        and itemsize in row["bytes"]
    )


@functools.lru_cache(maxsize=None)
def _look_up(kernel: str, generation: str, layout: str, size: str, itemsize: int) -> Configuration:
    sizes = ("thin", "large") if size == "thin" else (size,)
    for like, table, wanted in itertools.product(sizes, _tables(), (generation, family(generation), "any")):
        for row in table["rows"]:
            if row.get("device", "any") == wanted and _matches(row, kernel, layout, like, itemsize):
                return Configuration(row["meta"], row["warps"], row["fill"], row.get("registers"))
    raise LookupError(
        f"no launch configuration of {kernel} for {generation}, {layout}, {size}, {itemsize} bytes"
    )


def _block(name: str, size: int, extents: Mapping[str, int]) -> int:
    if name not in extents:
        return size
    covering = 1 << max(0, extents[name] - 1).bit_length()
    return min(size, max(covering, SMALLEST.get(name, 1)))


def configuration(
    kernel: str, device: Device, layout: str, size: str, itemsize: int, extents: Mapping[str, int]
) -> Configuration:
    """The row of a launch, its blocks no larger than what covers `extents` (by block name)."""
    row = _look_up(kernel, device.generation, layout, size, itemsize)
    return replace(row, meta={k: _block(k, v, extents) for k, v in row.meta.items()})


def chunk_samples(device: Device, sample_bytes: int, samples: int, tensors: int) -> int:
    """Samples a chunk, so that `tensors` tensors of x's size stay in L2 between the launches."""
    fraction = 0.0
    for table in reversed(_tables()):
        for name in ("any", family(device.generation), device.generation):
            fraction = table.get("devices", {}).get(name, {}).get("l2_chunk", fraction)
    budget = int(fraction * device.l2_bytes)
    chunk = budget // (tensors * sample_bytes)
    if chunk < 1 or chunk >= samples or chunk * sample_bytes * tensors < SMALLEST_CHUNK:
        return samples
    # Even chunks: a small last one would leave most of the device idle.
    return -(-samples // -(-samples // chunk))


def pinned_rows() -> List[Dict]:
    return load_table(PINNED)["rows"]


def user_row(
    kernel: str, generation: str, layout: str, size: str, itemsize: int, found: Configuration
) -> Dict[str, object]:
    """A row as the tuner writes it."""
    return {
        "device": generation,
        "kernel": kernel,
        "layout": layout,
        "map": [size],
        "bytes": [itemsize],
        "meta": dict(found.meta),
        "warps": found.warps,
        "fill": found.fill,
        **({} if found.registers is None else {"registers": found.registers}),
    }


def reason_unusable() -> Optional[str]:
    """None where kernels can run on this machine, or why not."""
    if not interpreting() and not torch.cuda.is_available():
        return "torch finds no GPU, and TRITON_INTERPRET is not 1"
    try:
        _tables()
    except ValueError as error:
        return str(error)
    return None
