"""Launchers of the forward: three launches for each chunk of samples that L2 holds."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor

from .. import _config as cfg
from . import arguments as given
from . import problem as pb
from .arguments import NO_NORM, Norm, Saved, dense_input, map_splits, part_of, present, weights_of
from .channel_pool import channel_pool_forward_kernel, is_long
from .problem import Problem, cdiv
from .scale import scale_forward_kernel
from .spatial_pool import spatial_pool_forward_kernel


def _pools_forward(x: Tensor, weights, pr: Problem, saved: Saved, rows: slice):
    """First and second launch, for these samples -> partial maps and their indices, or None twice."""
    w1, b1, w2, b2 = weights
    n = rows.stop - rows.start
    u = pr.units
    pooled, pool_index = part_of(saved.pooled, rows), part_of(saved.pool_index, rows)
    maps, maps_index = part_of(saved.spatial_pool, rows), part_of(saved.spatial_index, rows)

    def acc(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=pr.acc)

    part, part_index, hidden_part, segments, shares = pooled, pool_index, None, 1, 1
    if pr.pools:
        found, device = pr.tile("channel_pool", MC=pr.c, HB=max(1, pr.hidden))
        wide = w1 is not None and w1.element_size() > x.element_size()
        if wide:
            found = found.halved("HB")  # as many bytes of weights at a time: more would spill on tiny maps
        channel_tiles, steps = cdiv(pr.c, found.meta["BC"]), cdiv(pr.p, found.meta["BP"])
        shares, share_tiles = pb.split_loop(n, channel_tiles, found.fill, device)
        each = steps
        if pr.channels_last and not pr.small():
            segments, each = pb.split_loop(n * shares, steps, found.fill, device)
        if segments > 1:
            part = acc(n, segments, pr.rows, pr.c)
            part_index = (
                None if pool_index is None else x.new_empty((n, segments, pr.c), dtype=pool_index.dtype)
            )
        elif w1 is not None:
            hidden_part = acc(n, shares, pr.runs, pr.hidden)
        pb.launch(
            channel_pool_forward_kernel,
            n * segments * shares,
            (x, part, part_index, w1, hidden_part, u["c_units"], u["p_units"], each, segments, share_tiles, pr.hidden),
            dict(POOLS=pr.pools, SPLIT=pr.split(), SEGMENTED=segments > 1, WITH_INDEX=saved.save,
                 LONG=is_long(each, pr.acc), **pr.layout(), **found.meta),
            found.limited(segments > 1 or not saved.save or wide),
        )  # fmt: skip
    found, device = pr.tile("spatial_pool", MC=pr.c, HB=max(1, pr.hidden))
    tiles, splits, each = map_splits(pr, found, device, n)
    group = 1
    if not pr.spatial:
        tiles = 1
    elif segments > 1:
        # As many tiles as leave the device no second wave of programs.
        room = int(found.fill * device.multiprocessors)
        group = min(tiles, cdiv(n * splits * tiles, room)) if room else tiles
        tiles = cdiv(tiles, group)
    programs = n * tiles * splits
    own = each * found.meta["BC"]
    part_maps, part_maps_index = None, None
    if pr.spatial and splits > 1:
        part_maps = acc(n, splits, 2, pr.p)
        part_maps_index = (
            None if maps_index is None else x.new_empty((n, splits, pr.p), dtype=maps_index.dtype)
        )
    pb.launch(
        spatial_pool_forward_kernel,
        programs,
        (x, part, part_index, pooled, pool_index, hidden_part,
         acc(programs, pr.hidden) if pr.pools else None, acc(programs, own) if pr.pools and tiles > 1 else None,
         w1, b1, w2, b2, part_of(saved.channel_gate, rows), part_of(saved.hidden, rows),
         maps if part_maps is None else part_maps,
         maps_index if part_maps is None else part_maps_index,
         u["c_units"], u["p_units"], pr.hidden, segments, shares, splits, each, group),
        dict(POOLS=pr.pools, SPATIAL=pr.spatial, SPLIT=pr.split(), SEGMENTED=segments > 1,
             WITH_INDEX=saved.save, EVEN=pr.c % found.meta["BC"] == 0, **pr.layout(), **found.meta),
        found.limited(segments > 1 or not saved.save or pr.split() and not pr.small()),
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
        dict(BN_EPS=eps, SPATIAL=pr.spatial, SPLIT=pr.split(), RESIDUAL=residual, FLAT=pr.flat(found),
             MB=1 if merged is None else pr.merge_block(), **pr.taps_meta(), **pr.layout(), **found.meta),
        found,
    )  # fmt: skip


def _cbam(
    save, x, w1, b1, w2, b2, conv_weight, conv_bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps,
    pools, spatial, ties, residual,
):  # fmt: skip
    """y, the saved tensors and the spatial gate, None where it is not saved."""
    x = dense_input(x)
    pr = pb.describe(x, w1, w2, conv_weight, pools, spatial, ties)
    y = torch.empty_like(x)
    saved = Saved(x, pr, save)
    gate = x.new_empty((pr.n, 1, *x.shape[2:]) if spatial else (0,), dtype=pr.acc) if save else None
    mlp = weights_of(w1, b1, w2, b2)
    conv = weights_of(conv_weight, conv_bias)
    norm = (*weights_of(bn_weight, bn_bias, bn_mean, bn_var), bn_eps)
    if x.numel():
        with pb.on_device(x):
            for rows in given.chunks(pr, x, 2):
                parts = (None, None)
                if pools or spatial:
                    parts = _pools_forward(x[rows], mlp, pr, saved, rows)
                _scale_launch(
                    x[rows], y[rows], part_of(saved.channel_gate, rows), part_of(saved.spatial_pool, rows),
                    part_of(saved.spatial_index, rows), parts, None, None if gate is None else part_of(present(gate), rows), conv, norm, pr,
                    residual,
                )  # fmt: skip
    return x, y, saved, gate


def cbam_inference(*arguments):
    return _cbam(False, *arguments)[1]


def cbam_forward(*arguments):
    x, y, saved, gate = _cbam(True, *arguments)
    return (y, *saved.tensors(x), gate)


def attention_forward(x, w1, b1, w2, b2, conv_weight, conv_bias, pools, spatial, ties, save):
    x = dense_input(x)
    pr = pb.describe(x, w1, w2, conv_weight, pools, spatial, ties)
    saved = Saved(x, pr, save)
    z = x.new_empty((pr.n, 1, *x.shape[2:]) if spatial else (0,), dtype=pr.acc)
    mlp = weights_of(w1, b1, w2, b2)
    conv = weights_of(conv_weight, conv_bias)
    if x.numel():
        with pb.on_device(x):
            for rows in given.chunks(pr, x, 1):
                parts = (None, None)
                if pools or spatial:
                    parts = _pools_forward(x[rows], mlp, pr, saved, rows)
                if spatial:
                    _scale_launch(
                        x[rows], None, None, part_of(saved.spatial_pool, rows), part_of(saved.spatial_index, rows), parts,
                        z[rows], None, conv, NO_NORM, pr, False,
                    )  # fmt: skip
    pooled, pool_index, gate, *rest = saved.tensors(x)
    if saved.channel_gate is not None:
        gate = saved.channel_gate
    return (z, pooled, pool_index, gate, *rest)


def scale_forward(x, channel_gate, z, residual):
    x, z = dense_input(x), z.contiguous()
    pr = pb.describe(x, None, None, None, 0, cfg.SPATIAL_MAX_MEAN if z.numel() else 0)
    y, s = torch.empty_like(x), torch.empty_like(z)
    if x.numel():
        with pb.on_device(x):
            gate = present(channel_gate.contiguous())
            none = (None, None)
            _scale_launch(x, y, gate, None, None, none, present(z), present(s), none, NO_NORM, pr, residual)
    return y, s
