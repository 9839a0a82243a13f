"""Sizes, layout and options of one call, and the launch of one kernel on it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ContextManager, Dict, Mapping, Optional, Tuple

import torch
import triton.language as tl
from torch import Tensor

from .. import _config as cfg
from .._ops import accumulate_dtype
from . import configurations
from .configurations import Configuration, Device

# Vectors are at most 16 bytes, so no kernel gains from knowing that an extent divides by more.
WIDEST_VECTOR = 16
VECTOR_BYTES = 16
# Bytes that L1 and L2 hand to each other; a part of one costs as much.
SECTOR = 32


def _largest_divisor(extent: int) -> int:
    """The largest power of two up to WIDEST_VECTOR that divides extent."""
    return min(WIDEST_VECTOR, extent & -extent)


def is_channels_last(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


def like_layout(t: Tensor, x: Tensor) -> Tensor:
    """t with the strides of x (contiguous or channels-last), copied only where it has others."""
    if x.is_contiguous():
        return t.contiguous()
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


@dataclass(frozen=True)
class Problem:
    """x (N, C, D, H, W), missing dimensions being 1, in one of two layouts, with a Config's options."""

    n: int
    c: int
    d: int
    h: int
    w: int
    channels_last: bool
    dtype: torch.dtype
    device: torch.device
    pools: int
    spatial: int
    ties: int
    hidden: int  # C with one layer
    layers: int  # of the MLP; 0 without pools
    kernel: Tuple[int, int, int]

    @property
    def p(self) -> int:
        return self.d * self.h * self.w

    @property
    def rows(self) -> int:
        """Pools that are saved."""
        return bin(self.pools & 15).count("1")

    @property
    def runs(self) -> int:
        """Passes through the MLP."""
        return 1 if self.pools & cfg.BLEND else self.rows

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1] * self.kernel[2]

    @property
    def planes(self) -> int:
        return 1 if self.spatial == cfg.SPATIAL_BLEND else 2

    @property
    def acc(self) -> torch.dtype:
        return accumulate_dtype(self.dtype)

    @property
    def units(self) -> Dict[str, int]:
        """Channels and positions as multiples of what loads of x and of the weights can use."""
        cv = _largest_divisor(self.c)
        pv = 1 if self.channels_last else _largest_divisor(self.p)
        return {"c_units": self.c // cv, "p_units": self.p // pv, "CV": cv, "PV": pv}

    def layout(self) -> Dict[str, Any]:
        """constexprs of every kernel that touches x."""
        u = self.units
        return {"CHANNELS_LAST": self.channels_last, "CV": u["CV"], "PV": u["PV"], "ACC": self.acc_type()}

    def acc_type(self) -> tl.dtype:
        return tl.float64 if self.acc == torch.float64 else tl.float32

    def taps_meta(self, used: bool = True) -> Dict[str, int]:
        """constexprs of a kernel that convolves; where it does not, those of any other call."""
        return dict(zip(("KD", "KH", "KW"), self.kernel if used else (1, 1, 1)))

    def reach(self, found: Configuration, width: int) -> int:
        """Positions that a convolution of a tile reads, about: of a stretch, or with a width of a block of rows."""
        bp, (kd, kh, kw) = found.meta["BP"], self.kernel
        if width == 0:
            return bp + ((kd - 1) * self.h + kh - 1) * self.w + kw - 1
        # Its rows begin and end within sectors of floats.
        return kd * (bp // width + kh - 1) * (width + kw - 1 + SECTOR // 4 - 1)

    def tile_width(self, found: Configuration) -> int:
        """How wide the tiles of positions are: as the configuration has them, where a convolution then reads less and
        neither vectors nor much of the tiles are lost; else 0, for stretches."""
        bp, width = found.meta["BP"], found.meta["TW"]
        if not 0 < width < bp or self.reach(found, width) >= self.reach(found, 0):
            return 0
        covered = cdiv(self.w, width) * cdiv(self.p // self.w, bp // width) * bp
        vectors = [min(extent & -extent, VECTOR_BYTES // self.dtype.itemsize) for extent in (self.p, self.w)]
        lost = covered > 1.25 * self.p or not self.channels_last and vectors[0] > vectors[1]
        return 0 if lost else width

    def tiles(self, found: Configuration) -> int:
        """Tiles of positions of the kernels that have a tile width."""
        bp, width = found.meta["BP"], self.tile_width(found)
        return cdiv(self.w, width) * cdiv(self.p // self.w, bp // width) if width else cdiv(self.p, bp)

    def cut(self, found: Configuration) -> Dict[str, int]:
        """constexprs of the configuration, the tile width as it is used, and what the width of a map divides by."""
        width = self.tile_width(found)
        return {**found.meta, "TW": width, "WV": _largest_divisor(self.w) if width else 1}

    def merge_block(self) -> int:
        """Positions, padded, of the maps that programs merge each for itself; only small maps are."""
        return 1 << (self.p - 1).bit_length() if self.small() else 1

    def flat(self, found: Configuration) -> bool:
        """Whether a program writes its maps as one stretch: rows of a tile would end within sectors."""
        row = self.p * self.dtype.itemsize
        covered = self.small() and self.p <= found.meta["BP"] and self.c * self.p < 2**31
        return not self.channels_last and covered and row % SECTOR != 0

    def map_class(self) -> str:
        return configurations.map_class(self.p, self.c)

    def small(self) -> bool:
        return self.p <= configurations.SMALL_MAP

    def split(self) -> bool:
        return self.ties == cfg.TIES_SPLIT

    def configuration(self, kernel: str, **extents: int) -> Tuple[Configuration, Device]:
        device = configurations.describe(self.device)
        layout = "channels_last" if self.channels_last else "contiguous"
        found = configurations.configuration(
            kernel, device, layout, self.map_class(), self.dtype.itemsize, extents
        )
        return found, device

    def tile(self, kernel: str, **extents: int) -> Tuple[Configuration, Device]:
        return self.configuration(kernel, BC=self.c, BP=self.p, **extents)


def describe(
    x: Tensor,
    w1: Optional[Tensor],
    w2: Optional[Tensor],
    conv_weight: Optional[Tensor],
    pools: int,
    spatial: int,
    ties: int = cfg.TIES_FIRST,
) -> Problem:
    d, h, w = (1,) * (5 - x.dim()) + tuple(x.shape[2:])
    kd = kh = kw = 1
    if spatial and conv_weight is not None:
        kd, kh, kw = (1,) * (5 - conv_weight.dim()) + tuple(conv_weight.shape[2:])
    hidden = layers = 0
    if pools and w2 is not None:
        hidden, layers = (x.shape[1], 1) if w1 is None else (w1.shape[0], 2)
    return Problem(
        x.shape[0],
        x.shape[1],
        d,
        h,
        w,
        not x.is_contiguous(),
        x.dtype,
        x.device,
        pools,
        spatial,
        ties,
        hidden,
        layers,
        (kd, kh, kw),
    )


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def split_loop(programs: int, steps: int, fill: float, device: Device) -> Tuple[int, int]:
    """(parts, steps a part) of a loop of `steps`, so that every multiprocessor gets about `fill` programs."""
    programs = max(1, programs)
    # To the nearest: few more than a wave of programs take twice as long as a wave.
    wanted = max(1, min(steps, int(fill * device.multiprocessors / programs + 0.5)))
    each = cdiv(steps, wanted)
    return cdiv(steps, each), each


def compile_options(found: Configuration, amd: bool) -> Dict[str, int]:
    """What Triton's compiler is told. Without a limit of registers, ptxas at times spills to fit one more block."""
    options = {"num_warps": found.warps}
    return options if amd or found.registers is None else {**options, "maxnreg": found.registers}


def launch(kernel: Any, programs: int, tensors: Tuple, meta: Mapping[str, Any], found: Configuration) -> None:
    """Runs `kernel` on a one-dimensional grid. The only place that launches."""
    kernel[(programs,)](*tensors, **meta, **compile_options(found, amd=torch.version.hip is not None))


def on_device(x: Tensor) -> ContextManager:
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
