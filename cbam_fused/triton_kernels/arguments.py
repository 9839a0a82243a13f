"""What the launchers of the forward and of the backward share: arguments, saved tensors, chunks."""

from __future__ import annotations

from typing import List, Optional, Tuple

import torch
from torch import Tensor

from .. import _config as cfg
from .._ops import accumulate_dtype, index_dtype
from . import configurations
from . import problem as pb
from .problem import Problem, cdiv

Norm = Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor], float]
NO_NORM: Norm = (None, None, None, None, 0.0)


def weights_of(*tensors: Optional[Tensor]) -> List[Optional[Tensor]]:
    """Parameters as the kernels index them; a convolution's may be stored channels-last."""
    return [None if t is None else t.contiguous() for t in tensors]


def dense_input(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or pb.is_channels_last(x) else x.contiguous()


def present(t: Tensor) -> Optional[Tensor]:
    """None for the empty tensor that stands for an absent one."""
    return t if t.numel() else None


def chunks(pr: Problem, x: Tensor, tensors: int) -> List[slice]:
    device = configurations.describe(x.device)
    size = configurations.chunk_samples(device, x[0].numel() * x.element_size(), pr.n, tensors)
    return [slice(i, min(i + size, pr.n)) for i in range(0, pr.n, size)]


def part_of(t: Optional[Tensor], rows: slice) -> Optional[Tensor]:
    return None if t is None else t[rows]


class Saved:
    """What a forward leaves behind, allocated as the schemas say; None where the options have none."""

    def __init__(self, x: Tensor, pr: Problem, save: bool):
        n, c, sp = pr.n, pr.c, tuple(x.shape[2:])
        self.save = save

        def acc(*shape: int) -> Tensor:
            return x.new_empty(shape, dtype=pr.acc)

        self.pooled = acc(n, pr.rows, c) if pr.pools else None
        self.channel_gate = acc(n, c) if pr.pools else None
        self.spatial_pool = acc(n, 2, *sp) if pr.spatial else None
        self.pool_index = self.spatial_index = self.hidden = None
        if save and pr.pools & cfg.MAX:
            self.pool_index = x.new_empty((n, c), dtype=index_dtype(pr.p))
        if save and pr.spatial:
            self.spatial_index = x.new_empty((n, *sp), dtype=index_dtype(c))
        if save and pr.pools and pr.layers == 2:
            self.hidden = acc(n, pr.runs, pr.hidden)

    def tensors(self, x: Tensor) -> Tuple[Tensor, ...]:
        """As the schemas order them."""
        found = (
            self.pooled,
            self.pool_index,
            self.channel_gate,
            self.spatial_pool,
            self.spatial_index,
            self.hidden,
        )
        acc, index = accumulate_dtype(x.dtype), torch.int16
        empty = (x.new_empty(0, dtype=dtype) for dtype in (acc, index, acc, acc, index, acc))
        return tuple(t if self.save and t is not None else e for t, e in zip(found, empty))


def map_splits(pr: Problem, found, device, n: int) -> Tuple[int, int, int]:
    """(tiles of positions, shares of the channels, tiles of channels a share) of a pass over maps.

    Only a small map is shared: the next launch then merges all of it in each of its programs.
    """
    tiles, steps = cdiv(pr.p, found.meta["BP"]), cdiv(pr.c, found.meta["BC"])
    fill = found.fill if pr.small() else 0
    return (tiles, *pb.split_loop(n * tiles, steps, fill, device))
