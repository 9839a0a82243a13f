"""The six ops in order of launches: checks of nothing (the caller's), allocations, chunks, launches.

A forward is three launches and a backward five, four without one of the gates' halves, for each chunk
of samples that L2 holds; the weight gradients are one launch for the whole batch.
"""

from __future__ import annotations

from typing import List, Optional, Tuple

import torch
from torch import Tensor

from .. import _config as cfg
from .._ops import SCHEMAS, index_dtype, namespace
from . import configurations
from . import problem as pb
from .attention_backward import attention_backward_kernel
from .channel_pool import channel_pool_forward_kernel
from .input_backward import input_backward_kernel
from .problem import Problem, cdiv
from .sample_backward import sample_backward_kernel
from .scale import scale_forward_kernel
from .scale_backward import scale_backward_kernel
from .spatial_pool import spatial_pool_forward_kernel
from .weights_backward import weights_backward_kernel

Norm = Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor], float]
NO_NORM: Norm = (None, None, None, None, 0.0)


def _dense(t: Optional[Tensor]) -> Optional[Tensor]:
    return None if t is None else t.contiguous()


def _weights(*tensors: Optional[Tensor]) -> List[Optional[Tensor]]:
    """Parameters as the kernels index them; a convolution's may be stored channels-last."""
    return [_dense(t) for t in tensors]


def _x(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or pb.is_channels_last(x) else x.contiguous()


def _some(t: Tensor) -> Optional[Tensor]:
    """None for the empty tensor that stands for an absent one."""
    return t if t.numel() else None


def _chunks(pr: Problem, x: Tensor, tensors: int) -> List[slice]:
    device = configurations.describe(x.device)
    size = configurations.chunk_samples(device, x[0].numel() * x.element_size(), pr.n, tensors)
    return [slice(i, min(i + size, pr.n)) for i in range(0, pr.n, size)]


def _part(t: Optional[Tensor], rows: slice) -> Optional[Tensor]:
    return None if t is None else t[rows]


class _Saved:
    """What a forward leaves behind, allocated as the schemas say; None where the options have none."""

    def __init__(self, x: Tensor, pr: Problem, with_index: bool):
        n, c, sp = pr.n, pr.c, tuple(x.shape[2:])
        self.with_index = with_index

        def acc(*shape: int) -> Tensor:
            return x.new_empty(shape, dtype=pr.acc)

        self.pooled = acc(n, pr.rows, c) if pr.pools else None
        self.channel_gate = acc(n, c) if pr.pools else None
        self.spatial_pool = acc(n, 2, *sp) if pr.spatial else None
        self.pool_index = self.spatial_index = None
        if with_index and pr.pools & cfg.MAX:
            self.pool_index = x.new_empty((n, c), dtype=index_dtype(pr.p))
        if with_index and pr.spatial:
            self.spatial_index = x.new_empty((n, *sp), dtype=index_dtype(c))

    def tensors(self, x: Tensor, save: bool) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        found = (self.pooled, self.pool_index, self.channel_gate, self.spatial_pool, self.spatial_index)
        empty = (x.new_empty(0, dtype=pr_dtype) for pr_dtype in self._dtypes(x))
        return tuple(t if save and t is not None else e for t, e in zip(found, empty))

    def _dtypes(self, x: Tensor):
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        positions = x.shape[2:].numel()
        return acc, index_dtype(positions), acc, acc, index_dtype(x.shape[1])


def _map_splits(pr: Problem, found, device, n: int) -> Tuple[int, int, int]:
    """(tiles of positions, shares of the channels, tiles of channels a share) of a pass over maps.

    Only a small map is shared: the next launch then merges all of it in each of its programs.
    """
    tiles, steps = cdiv(pr.p, found.meta["BP"]), cdiv(pr.c, found.meta["BC"])
    fill = found.fill if pr.small() else 0
    return (tiles, *pb.split_loop(n * tiles, steps, fill, device))


def _pools_forward(x: Tensor, weights, pr: Problem, saved: _Saved, rows: slice):
    """First and second launch, for these samples -> partial maps and their indices, or None twice."""
    w1, b1, w2, b2 = weights
    n = rows.stop - rows.start
    u = pr.units
    pooled, pool_index = _part(saved.pooled, rows), _part(saved.pool_index, rows)
    maps, maps_index = _part(saved.spatial_pool, rows), _part(saved.spatial_index, rows)

    def acc(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=pr.acc)

    part, part_index, hidden_part, segments, channel_tiles = pooled, pool_index, None, 1, 1
    if pr.pools:
        found, device = pr.tile("channel_pool", HB=max(1, pr.hidden))
        channel_tiles, steps = cdiv(pr.c, found.meta["BC"]), cdiv(pr.p, found.meta["BP"])
        each = steps
        if pr.channels_last and not pr.small():
            segments, each = pb.split_loop(n * channel_tiles, steps, found.fill, device)
        if segments > 1:
            part = acc(n, segments, pr.rows, pr.c)
            part_index = None if pool_index is None else x.new_empty((n, segments, pr.c), dtype=pool_index.dtype)
        elif w1 is not None:
            hidden_part = acc(n, channel_tiles, pr.runs, pr.hidden)
        pb.launch(
            channel_pool_forward_kernel,
            n * segments * channel_tiles,
            (x, part, part_index, w1, hidden_part, u["c_units"], u["p_units"], each, segments, pr.hidden),
            dict(POOLS=pr.pools, SPLIT=pr.split(), SEGMENTED=segments > 1, WITH_INDEX=saved.with_index,
                 **pr.layout(), **found.meta),
            found.warps,
        )  # fmt: skip
    found, device = pr.tile("spatial_pool", MC=pr.c, HB=max(1, pr.hidden))
    tiles, splits, each = _map_splits(pr, found, device, n)
    if not pr.spatial:
        tiles = 1
    programs = n * tiles * splits
    own = each * found.meta["BC"]
    part_maps, part_maps_index = None, None
    if pr.spatial and splits > 1:
        part_maps = acc(n, splits, 2, pr.p)
        part_maps_index = None if maps_index is None else x.new_empty((n, splits, pr.p), dtype=maps_index.dtype)
    pb.launch(
        spatial_pool_forward_kernel,
        programs,
        (x, part, part_index, acc(programs, pr.rows, pr.c) if segments > 1 else None, pooled, pool_index,
         hidden_part, acc(programs, pr.hidden) if pr.pools else None, acc(programs, own) if pr.pools else None,
         w1, b1, w2, b2, _part(saved.channel_gate, rows), maps if part_maps is None else part_maps,
         maps_index if part_maps is None else part_maps_index,
         u["c_units"], u["p_units"], pr.hidden, segments, channel_tiles, splits, each),
        dict(POOLS=pr.pools, SPATIAL=pr.spatial, SPLIT=pr.split(), SEGMENTED=segments > 1,
             WITH_INDEX=saved.with_index, EVEN=pr.c % found.meta["BC"] == 0, **pr.layout(), **found.meta),
        found.warps,
    )  # fmt: skip
    return part_maps, part_maps_index


def _scale_launch(
    x: Tensor, y: Optional[Tensor], gate: Optional[Tensor], maps: Optional[Tensor], maps_index: Optional[Tensor],
    parts: Tuple[Optional[Tensor], Optional[Tensor]], logits: Optional[Tensor], spatial_gate: Optional[Tensor],
    conv, norm: Norm, pr: Problem, residual: bool,
) -> None:  # fmt: skip
    """Third launch: y from gates; with y None, the logits; with maps None, from logits. All of the same samples."""
    found, device = pr.tile("scale_forward")
    programs, steps = x.shape[0] * cdiv(pr.p, found.meta["BP"]), cdiv(pr.c, found.meta["BC"])
    splits, each = pb.split_loop(programs, steps, found.fill, device) if y is not None else (1, steps)
    *bn, eps = norm
    u = pr.units
    merged = None if parts[0] is None else x.new_empty((programs * splits, 2, pr.p), dtype=pr.acc)
    pb.launch(
        scale_forward_kernel,
        programs * splits,
        (x, y, gate, maps, maps_index, *parts, merged, logits, spatial_gate, *conv, *bn,
         u["c_units"], u["p_units"], 1 if parts[0] is None else parts[0].shape[1], splits, each, pr.d, pr.h, pr.w),
        dict(BN_EPS=eps, SPATIAL=pr.spatial, SPLIT=pr.split(), RESIDUAL=residual,
             MB=1 if merged is None else pr.merge_block(), **pr.taps_meta(), **pr.layout(), **found.meta),
        found.warps,
    )  # fmt: skip


def cbam_forward(
    x, w1, b1, w2, b2, conv_weight, conv_bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps,
    pools, spatial, ties, residual, save,
):  # fmt: skip
    x = _x(x)
    pr = pb.describe(x, w1, w2, conv_weight, pools, spatial, ties)
    y = torch.empty_like(x)
    saved = _Saved(x, pr, save)
    gate = x.new_empty((pr.n, 1, *x.shape[2:]) if spatial and save else (0,), dtype=pr.acc)
    mlp = _weights(w1, b1, w2, b2)
    conv = _weights(conv_weight, conv_bias)
    norm = (*_weights(bn_weight, bn_bias, bn_mean, bn_var), bn_eps)
    if x.numel():
        with pb.on_device(x):
            for rows in _chunks(pr, x, 2):
                parts = (None, None)
                if pools or spatial:
                    parts = _pools_forward(x[rows], mlp, pr, saved, rows)
                _scale_launch(
                    x[rows], y[rows], _part(saved.channel_gate, rows), _part(saved.spatial_pool, rows),
                    _part(saved.spatial_index, rows), parts, None, _part(_some(gate), rows), conv, norm, pr, residual,
                )  # fmt: skip
    return (y, *saved.tensors(x, save), gate)


def attention_forward(x, w1, b1, w2, b2, conv_weight, conv_bias, pools, spatial, ties, save):
    x = _x(x)
    pr = pb.describe(x, w1, w2, conv_weight, pools, spatial, ties)
    saved = _Saved(x, pr, save)
    z = x.new_empty((pr.n, 1, *x.shape[2:]) if spatial else (0,), dtype=pr.acc)
    mlp = _weights(w1, b1, w2, b2)
    conv = _weights(conv_weight, conv_bias)
    if x.numel():
        with pb.on_device(x):
            for rows in _chunks(pr, x, 1):
                parts = (None, None)
                if pools or spatial:
                    parts = _pools_forward(x[rows], mlp, pr, saved, rows)
                if spatial:
                    _scale_launch(
                        x[rows], None, None, _part(saved.spatial_pool, rows), _part(saved.spatial_index, rows), parts,
                        z[rows], None, conv, NO_NORM, pr, False,
                    )  # fmt: skip
    pooled, pool_index, gate, spatial_pool, spatial_index = saved.tensors(x, save)
    if saved.channel_gate is not None:
        gate = saved.channel_gate
    return z, pooled, pool_index, gate, spatial_pool, spatial_index


def scale_forward(x, channel_gate, z, residual):
    x, z = _x(x), z.contiguous()
    pr = pb.describe(x, None, None, None, 0, cfg.SPATIAL_MAX_MEAN if z.numel() else 0)
    y, s = torch.empty_like(x), torch.empty_like(z)
    if x.numel():
        with pb.on_device(x):
            gate = _some(channel_gate.contiguous())
            none = (None, None)
            _scale_launch(x, y, gate, None, None, none, _some(z), _some(s), none, NO_NORM, pr, residual)
    return y, s


def _scale_backward_launch(
    dy: Tensor, x: Tensor, gate: Optional[Tensor], spatial_gate: Optional[Tensor], pr: Problem
) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """First launch of the backward -> dz (N, 1, *spatial), partial ds (N, splits, P), partial dgate (N, tiles, C).

    dz is filled where there is no partial ds.
    """
    found, device = pr.tile("scale_backward")
    n = x.shape[0]
    tiles, splits, each = _map_splits(pr, found, device, n)
    dz = None if spatial_gate is None else torch.empty_like(spatial_gate)
    ds = None if splits == 1 or dz is None else x.new_empty((n, splits, pr.p), dtype=pr.acc)
    part = None if gate is None else x.new_empty((n, tiles, pr.c), dtype=pr.acc)
    u = pr.units
    pb.launch(
        scale_backward_kernel,
        n * tiles * splits,
        (dy, x, gate, spatial_gate, dz, ds, part, u["c_units"], u["p_units"], splits, each),
        dict(**pr.layout(), **found.meta),
        found.warps,
    )
    return dz, ds, part


def scale_backward(dy, x, channel_gate, spatial_gate):
    x = _x(x)
    dy, spatial_gate = pb.like_layout(dy, x), spatial_gate.contiguous()
    pr = pb.describe(x, None, None, None, 0, 0)
    dz = ds = part = None
    if x.numel():
        with pb.on_device(x):
            dz, ds, part = _scale_backward_launch(
                dy, x, _some(channel_gate.contiguous()), _some(spatial_gate), pr
            )
    if ds is not None:
        dz = ds.sum(1).view_as(spatial_gate) * (spatial_gate * (1.0 - spatial_gate))
    elif dz is None:
        dz = torch.zeros_like(spatial_gate)
    return dz, torch.zeros_like(channel_gate) if part is None else part.sum(1)


class _Gradients:
    """Weight gradients, their inputs for the last launch, and which samples filled them."""

    def __init__(self, x: Tensor, pr: Problem, mlp, conv, norm: Norm):
        self.pr, self.mlp, self.conv, self.norm = pr, mlp, conv, norm
        like = lambda t: None if t is None else torch.empty_like(t)  # noqa: E731
        w1, b1, w2, b2 = mlp
        self.dw1, self.db1, self.dw2, self.db2 = (like(t) for t in mlp)
        self.dconv = [like(t) for t in conv]
        self.dnorm = [like(t) for t in norm[:2]]

        def acc(*shape: int) -> Tensor:
            return x.new_empty(shape, dtype=pr.acc)

        self.dlogits = self.hidden = self.dhidden = self.blended = None
        if pr.pools:
            self.dlogits, self.hidden = acc(pr.n, pr.c), acc(pr.n, pr.hidden)
            self.dhidden = acc(pr.n, pr.runs, pr.hidden) if w1 is not None else None
            self.blended = acc(pr.n, 1, pr.c) if pr.pools & cfg.BLEND else None
        self.dtaps = self.sums = None
        if pr.spatial:
            found, device = self.small_jobs()
            steps = cdiv(pr.p, found.meta["BQ"])
            self.tap_blocks = cdiv(pr.taps, found.meta["TB"])
            self.segments, self.segment_tiles = pb.split_loop(
                pr.n * (self.tap_blocks + 1), steps, found.fill, device
            )
            self.dtaps = acc(pr.n, self.segments, pr.planes * pr.taps)
            self.sums = acc(pr.n, self.segments, 2)

    def small_jobs(self):
        pr = self.pr
        return pr.configuration("sample_backward", MC=pr.c, HB=max(1, pr.hidden), TB=pr.taps, BQ=pr.p)

    def zero(self) -> None:
        for t in (self.dw1, self.db1, self.dw2, self.db2, *self.dconv, *self.dnorm):
            if t is not None:
                t.zero_()

    def reduce(self, pooled: Optional[Tensor]) -> None:
        """Last launch of the backward."""
        pr = self.pr
        channels, hidden, taps = pr.c, max(1, pr.hidden), pr.planes * pr.taps
        found, _ = pr.configuration("weights_backward", TB=taps)
        ib, jb, tb = found.meta["IB"], found.meta["JB"], found.meta["TB"]
        programs = 0
        if self.dw1 is not None and pr.pools:
            programs += cdiv(hidden, ib) * cdiv(channels, jb)
        if self.dw2 is not None and pr.pools:
            programs += cdiv(channels, ib) * cdiv(hidden, jb)
        if pr.spatial:
            programs += cdiv(taps, tb)
        if not programs:
            return
        u = pooled if self.blended is None else self.blended
        dw = [self.dw1, self.db1, self.dw2, self.db2] if pr.pools else [None] * 4
        pb.launch(
            weights_backward_kernel,
            programs,
            (self.dlogits, self.hidden, self.dhidden, u, self.dtaps, self.sums, *self.norm[:4], *dw,
             *(self.dconv if pr.spatial else (None, None)), *self.dnorm, pr.n,
             pr.n * self.segments if pr.spatial else 0, channels, pr.hidden, taps),
            dict(BN_EPS=self.norm[4], RUNS=pr.runs, ACC=pr.acc_type(), **found.meta),
            found.warps,
        )  # fmt: skip

    def outputs(self, x: Tensor, count: int) -> Tuple[Tensor, ...]:
        found = (self.dw1, self.db1, self.dw2, self.db2, *self.dconv, *self.dnorm)[:count]
        return tuple(x.new_empty(0) if t is None else t for t in found)


def _attention_backward_chunk(
    dy: Tensor, x: Tensor, dx: Tensor, grads: _Gradients, saved, spatial_gate: Optional[Tensor],
    dz: Optional[Tensor], ds: Optional[Tensor], dgate: Optional[Tensor], rows: slice, residual: bool,
) -> None:  # fmt: skip
    """Second to fourth launch; every tensor is already that of these samples, but those in grads."""
    pr = grads.pr
    pooled, pool_index, gate, spatial_pool, spatial_index = saved
    w1, b1, w2, _ = grads.mlp
    *bn, eps = grads.norm
    n, u = x.shape[0], pr.units

    def acc(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=pr.acc)

    dmaps, dgate_b, tiles_b = None, None, 0
    if pr.spatial:
        found, device = pr.tile("attention_backward")
        tiles_b, steps = cdiv(pr.p, found.meta["BP"]), cdiv(pr.c, found.meta["BC"])
        splits, each = pb.split_loop(n * tiles_b, steps, found.fill, device) if pr.pools else (1, steps)
        dmaps = acc(n, 2, pr.p)
        dgate_b = acc(n, tiles_b, pr.c) if pr.pools else None
        pb.launch(
            attention_backward_kernel,
            n * tiles_b * splits,
            (x, gate, spatial_gate, spatial_pool, spatial_index, ds,
             None if ds is None else acc(n * tiles_b * splits, pr.p), dz, dmaps, dgate_b, grads.conv[0], *bn,
             u["c_units"], u["p_units"], 1 if ds is None else ds.shape[1], splits, each, pr.d, pr.h, pr.w),
            dict(BN_EPS=eps, SPATIAL=pr.spatial, SPLIT=pr.split(), MB=1 if ds is None else pr.merge_block(),
                 **pr.taps_meta(), **pr.layout(), **found.meta),
            found.warps,
        )  # fmt: skip
    blocks, hidden_part = 0, None
    if pr.pools or pr.spatial:
        found, _ = grads.small_jobs()
        jobs = 0
        if pr.pools:
            jobs = blocks = cdiv(pr.c, found.meta["MC"])
            hidden_part = None if w1 is None else acc(n, blocks, 1 + pr.runs, pr.hidden)
        if pr.spatial:
            jobs += (grads.tap_blocks + 1) * grads.segments
        pb.launch(
            sample_backward_kernel,
            n * jobs,
            (pooled, gate, spatial_pool, dz, dgate, dgate_b, w1, w2, *grads.conv, *bn,
             _part(grads.dlogits, rows), _part(grads.blended, rows), hidden_part, _part(grads.dtaps, rows),
             _part(grads.sums, rows), pr.c, pr.hidden, pr.p, pr.d, pr.h, pr.w, jobs,
             grads.segments if pr.spatial else 0, grads.segment_tiles if pr.spatial else 0,
             0 if dgate is None else dgate.shape[1], tiles_b),
            dict(BN_EPS=eps, POOLS=pr.pools, SPATIAL=pr.spatial, ACC=pr.acc_type(), **pr.taps_meta(), **found.meta),
            found.warps,
        )  # fmt: skip
    found, device = pr.tile("input_backward", MC=pr.c, HB=max(1, pr.hidden))
    programs, steps = n * cdiv(pr.p, found.meta["BP"]), cdiv(pr.c, found.meta["BC"])
    splits, each = pb.split_loop(programs, steps, found.fill, device)
    programs *= splits
    pb.launch(
        input_backward_kernel,
        programs,
        (dy, x, dx, gate, spatial_gate, pooled, pool_index, spatial_pool, spatial_index, dmaps, w1, b1, w2,
         _part(grads.dlogits, rows), hidden_part, _part(grads.dhidden, rows), _part(grads.hidden, rows),
         None if hidden_part is None else acc(programs, pr.runs, pr.hidden),
         acc(programs, pr.rows, each * found.meta["BC"]) if pr.pools else None,
         u["c_units"], u["p_units"], pr.hidden, blocks, splits, each),
        dict(POOLS=pr.pools, SPATIAL=pr.spatial, SPLIT=pr.split(), RESIDUAL=residual, **pr.layout(), **found.meta),
        found.warps,
    )  # fmt: skip


def cbam_backward(
    dy, x, w1, b1, w2, b2, conv_weight, conv_bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps,
    pooled, pool_index, channel_gate, spatial_pool, spatial_index, spatial_gate,
    pools, spatial, ties, residual,
):  # fmt: skip
    x = _x(x)
    dy = pb.like_layout(dy, x)
    pr = pb.describe(x, w1, w2, conv_weight, pools, spatial, ties)
    dx = torch.empty_like(x)
    norm = (*_weights(bn_weight, bn_bias, bn_mean, bn_var), bn_eps)
    grads = _Gradients(x, pr, _weights(w1, b1, w2, b2), _weights(conv_weight, conv_bias), norm)
    saved = [_some(t) for t in (pooled, pool_index, channel_gate, spatial_pool, spatial_index)]
    gate = _some(spatial_gate)
    if not x.numel():
        grads.zero()
        return (dx, *grads.outputs(x, 8))
    with pb.on_device(x):
        for rows in _chunks(pr, x, 3):
            own = [_part(t, rows) for t in saved]
            dz = ds = part = None
            if pools or spatial:
                dz, ds, part = _scale_backward_launch(dy[rows], x[rows], own[2], _part(gate, rows), pr)
            _attention_backward_chunk(
                dy[rows], x[rows], dx[rows], grads, own, _part(gate, rows), dz, ds, part, rows, residual
            )
        grads.reduce(saved[0])
    return (dx, *grads.outputs(x, 8))


def attention_backward(
    dy, x, w1, b1, w2, b2, conv_weight, conv_bias,
    pooled, pool_index, channel_gate, spatial_pool, spatial_index, spatial_gate, dz, dchannel_gate,
    pools, spatial, ties, residual,
):  # fmt: skip
    x = _x(x)
    dy = pb.like_layout(dy, x)
    pr = pb.describe(x, w1, w2, conv_weight, pools, spatial, ties)
    dx = torch.empty_like(x)
    grads = _Gradients(x, pr, _weights(w1, b1, w2, b2), _weights(conv_weight, conv_bias), NO_NORM)
    saved = [_some(t) for t in (pooled, pool_index, channel_gate, spatial_pool, spatial_index)]
    gate, dz, dgate = _some(spatial_gate), _some(dz.contiguous()), _some(dchannel_gate.contiguous())
    if not x.numel():
        grads.zero()
        return (dx, *grads.outputs(x, 6))
    dgate = None if dgate is None else dgate.unsqueeze(1)  # (N, 1, C): a single, complete part
    with pb.on_device(x):
        for rows in _chunks(pr, x, 3):
            _attention_backward_chunk(
                dy[rows], x[rows], dx[rows], grads, [_part(t, rows) for t in saved], _part(gate, rows),
                _part(dz, rows), None, _part(dgate, rows), rows, residual,
            )  # fmt: skip
        grads.reduce(saved[0])
    return (dx, *grads.outputs(x, 6))


OPS = {
    "cbam_forward": cbam_forward,
    "cbam_backward": cbam_backward,
    "attention_forward": attention_forward,
    "attention_backward": attention_backward,
    "scale_forward": scale_forward,
    "scale_backward": scale_backward,
}
assert OPS.keys() == SCHEMAS.keys()


def register() -> None:
    """Implements the ops of this backend's namespace; once a process."""
    keys = ("CUDA", "CPU") if configurations.interpreting() else ("CUDA",)
    for name, implementation in OPS.items():
        for key in keys:
            torch.library.impl(f"{namespace('triton')}::{name}", key, implementation)
