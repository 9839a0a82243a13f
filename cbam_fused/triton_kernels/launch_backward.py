"""Launchers of the backward: four launches for each chunk of samples that L2 holds, and one for the batch.

Without a spatial gate there is one launch less for each chunk, and without a channel gate where the last of them
convolves for itself. Where a program can take a whole sample, and there are samples enough for the device, one launch
takes the place of all four.

A norm in training cuts the backward after the first launch; where that has left sums in parts, one launch more ends
them. No operator of torch adds up anything: it would be a launch for each step.
"""

from __future__ import annotations

from typing import List, Optional, Tuple

import torch
from torch import Tensor

from . import arguments as given
from . import problem as pb
from .arguments import NO_NORM, Norm, dense_input, map_splits, part_of, present, weights_of
from .attention_backward import attention_backward_kernel
from .configurations import Configuration
from .input_backward import input_backward_kernel
from .problem import Problem, cdiv
from .sample_backward import sample_backward_kernel
from .scale_backward import scale_backward_kernel, scale_backward_sums_kernel
from .weights_backward import weights_backward_kernel
from .whole_backward import whole_backward_kernel

# Of the third launch's programs: the convolution's jobs run beside the MLP's.
MLP_FILL = 0.5
# Of L2, what the samples take that are in flight where each has a program.
L2_FILL = 0.8
# Rows of a group's tiles, one for each pass of each of its samples: registers hold no more.
GROUP_ROWS = 8
# Of the launch that ends the sums before a norm in training; it moves too little for a row in the table.
SUMS = Configuration({"RB": 16, "B": 64}, 2, 0)


def _scale_backward_launch(
    dy: Tensor, x: Tensor, gate: Optional[Tensor], spatial_gate: Optional[Tensor], pr: Problem
) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """First launch of the backward -> dz (N, 1, *spatial), partial ds (N, splits, P), partial dgate (N, tiles, C).

    dz is filled where there is no partial ds.
    """
    found, device = pr.tile("scale_backward")
    n = x.shape[0]
    tiles, splits, each = map_splits(pr, found, device, n)
    dz = None if spatial_gate is None else torch.empty_like(spatial_gate)
    ds = None if splits == 1 or dz is None else x.new_empty((n, splits, pr.p), dtype=pr.acc)
    part = None if gate is None else x.new_empty((n, tiles, pr.c), dtype=pr.acc)
    u = pr.units
    pb.launch(
        scale_backward_kernel,
        n * tiles * splits,
        (dy, x, gate, spatial_gate, dz, ds, part, u["c_units"], u["p_units"], splits, each),
        dict(**pr.layout(), **found.meta),
        found,
    )
    return dz, ds, part


def _scale_sums_launch(pr: Problem, ds, spatial_gate, dz, part, dgate) -> None:
    """Where a norm in training follows: ends the sums that the first launch left in parts; None of a pair is done."""
    block = SUMS.meta["B"]
    programs = (0 if ds is None else cdiv(pr.p, block)) + (0 if part is None else cdiv(pr.c, block))
    if programs:
        splits, tiles = (1 if t is None else t.shape[1] for t in (ds, part))
        pb.launch(
            scale_backward_sums_kernel,
            pr.n * programs,
            (ds, spatial_gate, dz, part, dgate, pr.p, pr.c, splits, tiles),
            dict(ACC=pr.acc_type(), **SUMS.meta),
            SUMS,
        )


def scale_backward(dy, x, channel_gate, spatial_gate):
    x = dense_input(x)
    dy, spatial_gate = pb.like_layout(dy, x), spatial_gate.contiguous()
    pr = pb.describe(x, None, None, None, 0, 0)
    gate, s = present(channel_gate.contiguous()), present(spatial_gate)
    if not x.numel():
        return torch.zeros_like(spatial_gate), torch.zeros_like(channel_gate)
    with pb.on_device(x):
        dz, ds, part = _scale_backward_launch(dy, x, gate, s, pr)
        # One tile's sum is all of it.
        whole = part is None or part.shape[1] == 1
        dgate = None if part is None else part.view(pr.n, pr.c) if whole else part.new_empty((pr.n, pr.c))
        _scale_sums_launch(pr, ds, s, dz, None if whole else part, dgate)
    return tuple(
        t.new_empty(t.shape) if d is None else d for d, t in ((dz, spatial_gate), (dgate, channel_gate))
    )


def _whole_samples(pr: Problem, x: Tensor) -> Optional[Configuration]:
    """With which a program takes a sample through the backward by itself; None where that is left to several.

    A tile must cover the map, and registers all channels and hidden units: of a larger layer, each sample would
    read more by itself than launches cost. And with few samples most of the device would be idle. Where a batch is
    cut into chunks for L2's sake, L2 must also hold x and dy of as many samples as there are programs at a time.
    """
    if pr.map_class() != "tiny":
        return None
    found, device = pr.tile("whole_backward", MC=pr.c, MH=max(1, pr.hidden))
    extents = {"BP": pr.p, "MC": pr.c, "MH": pr.hidden}
    covered = all(found.meta[name] >= extent for name, extent in extents.items())
    if not covered or pr.n < max(1, found.fill * device.multiprocessors):
        return None
    at_once = min(pr.n, device.multiprocessors) * 2 * pr.c * pr.p * x.element_size()
    cut = len(given.chunks(pr, x, 3)) > 1
    return None if cut and at_once > L2_FILL * device.l2_bytes else found


def _convolves_twice(pr: Problem, n: int) -> bool:
    """Whether the fourth launch, too, computes the gradients of the maps from dz, for n samples.

    Each share of the channels of a tile then reads dz as far as the kernel reaches, where it would have read two maps
    that the second launch wrote.
    """
    if not pr.spatial or pr.map_class() != "thin":
        return False
    found, device = pr.tile("input_backward")
    tiles, width = n * pr.tiles(found), pr.tile_width(found)
    shares, _ = pb.split_loop(tiles, cdiv(pr.c, found.meta["BC"]), found.fill, device)
    return shares * pr.reach(found, width) < 2 * (1 + shares) * found.meta["BP"]


class _Gradients:
    """Weight gradients, their inputs for the last launch, and which samples filled them."""

    def __init__(self, x: Tensor, pr: Problem, mlp, conv, norm: Norm):
        self.pr, self.mlp, self.conv, self.norm = pr, mlp, conv, norm
        self.whole = _whole_samples(pr, x)

        def like(t: Optional[Tensor], used: int) -> Optional[Tensor]:
            # A gate that is switched off may have its weights all the same, and no launch fills theirs.
            return None if t is None else torch.empty_like(t) if used else torch.zeros_like(t)

        self.dw1, self.db1, self.dw2, self.db2 = (like(t, pr.pools) for t in mlp)
        self.dconv = [like(t, pr.spatial) for t in conv]
        self.dnorm = [like(t, pr.spatial) for t in norm[:2]]

        def acc(*shape: int) -> Tensor:
            return x.new_empty(shape, dtype=pr.acc)

        self.dlogits = acc(pr.n, pr.c) if pr.pools else None
        self.dhidden = acc(pr.n, pr.hidden) if pr.layers == 2 else None
        self.dtaps = self.sums = None
        if pr.spatial:
            found, device = self.small_jobs(pr.n)
            steps = cdiv(pr.p, found.meta["BQ"])
            fill = 0 if self.whole is not None else found.fill
            self.segments, self.segment_tiles = pb.split_loop(pr.n, steps, fill, device)
            self.dtaps = acc(pr.n, self.segments, pr.planes * pr.taps)
            self.sums = acc(pr.n, self.segments, 2)

    def small_jobs(self, n: int):
        pr = self.pr
        group = min(n, max(1, GROUP_ROWS // max(1, pr.runs)))
        return pr.configuration(
            "sample_backward", MC=pr.c, HB=max(1, pr.hidden), GB=group, TB=pr.taps, BQ=pr.p
        )

    def chunks(self, x: Tensor) -> List[slice]:
        """Samples that launches share; none where each has a program."""
        return [] if self.whole is not None else given.chunks(self.pr, x, 3)

    def zero(self) -> None:
        for t in (self.dw1, self.db1, self.dw2, self.db2, *self.dconv, *self.dnorm):
            if t is not None:
                t.zero_()

    def reduce(self, pooled: Optional[Tensor], hidden: Optional[Tensor]) -> None:
        """Last launch of the backward."""
        pr = self.pr
        channels, units, taps = pr.c, max(1, pr.hidden), pr.planes * pr.taps
        found, _ = pr.configuration("weights_backward", TB=taps)
        ib, jb, tb = found.meta["IB"], found.meta["JB"], found.meta["TB"]
        programs = 0
        if self.dw1 is not None and pr.pools:
            programs += cdiv(units, ib) * cdiv(channels, jb)
        if self.dw2 is not None and pr.pools:
            programs += cdiv(channels, ib) * cdiv(units, jb)
        if pr.spatial:
            programs += cdiv(taps, tb)
        if not programs:
            return
        dw = [self.dw1, self.db1, self.dw2, self.db2] if pr.pools else [None] * 4
        pb.launch(
            weights_backward_kernel,
            programs,
            (self.dlogits, self.dhidden, hidden, pooled, self.dtaps, self.sums, *self.norm[:4], *dw,
             *(self.dconv if pr.spatial else (None, None)), *self.dnorm, pr.n,
             pr.n * self.segments if pr.spatial else 0, channels, pr.hidden, taps),
            dict(BN_EPS=self.norm[4], POOLS=pr.pools, ACC=pr.acc_type(), **found.meta),
            found,
        )  # fmt: skip

    def outputs(self, x: Tensor, count: int) -> Tuple[Tensor, ...]:
        found = (self.dw1, self.db1, self.dw2, self.db2, *self.dconv, *self.dnorm)[:count]
        return tuple(x.new_empty(0) if t is None else t for t in found)


def _whole_backward_launch(
    dy: Tensor, x: Tensor, dx: Tensor, grads: _Gradients, found: Configuration, saved, spatial_gate: Optional[Tensor],
    dz: Optional[Tensor], dgate: Optional[Tensor], residual: bool,
) -> None:  # fmt: skip
    """All but the weights' launch, of the whole batch; dz and dgate are given, or both None and found here."""
    pr, u = grads.pr, grads.pr.units
    pooled, pool_index, gate, spatial_pool, spatial_index, hidden = saved
    w1, _, w2, _ = grads.mlp
    *bn, eps = grads.norm
    known = dz is not None or dgate is not None
    if pr.spatial and not known:
        assert spatial_gate is not None
        dz = torch.empty_like(spatial_gate)
    pb.launch(
        whole_backward_kernel,
        pr.n,
        (dy, x, dx, gate, spatial_gate, pooled, pool_index, spatial_pool, spatial_index, hidden, dz, dgate, w1, w2,
         *grads.conv, *bn, grads.dlogits, grads.dhidden, grads.dtaps, grads.sums, u["c_units"], u["p_units"], pr.hidden,
         pr.d, pr.h, pr.w),
        dict(BN_EPS=eps, POOLS=pr.pools, SPATIAL=pr.spatial, SPLIT=pr.split(), RESIDUAL=residual, GIVEN=known,
             FLAT=pr.flat(found), **pr.taps_meta(), **pr.layout(), **found.meta),
        found.limited(known),
    )  # fmt: skip


def _attention_backward_chunk(
    dy: Tensor, x: Tensor, dx: Tensor, grads: _Gradients, saved, spatial_gate: Optional[Tensor],
    dz: Optional[Tensor], ds: Optional[Tensor], dgate: Optional[Tensor], rows: slice, residual: bool,
) -> None:  # fmt: skip
    """Second to fourth launch; every tensor is already that of these samples, but those in grads."""
    pr = grads.pr
    pooled, pool_index, gate, spatial_pool, spatial_index, hidden = saved
    w1, _, w2, _ = grads.mlp
    *bn, eps = grads.norm
    n, u = x.shape[0], pr.units

    def acc(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=pr.acc)

    dmaps, dgate_b, tiles_b, whole = None, None, 0, False
    dlogits = part_of(grads.dlogits, rows)
    twice = _convolves_twice(pr, n)
    # Without pools these maps are all that the second launch is for.
    if pr.spatial and (pr.pools or not twice):
        found, device = pr.tile("attention_backward")
        cut = pr.cut(found)
        tiles_b, steps = pr.tiles(found), cdiv(pr.c, found.meta["BC"])
        splits, each = pb.split_loop(n * tiles_b, steps, found.fill, device) if pr.pools else (1, steps)
        dmaps = None if twice else acc(n, 2, pr.p)
        # With all positions in one program each, the gate's gradient is complete there.
        whole = pr.pools != 0 and tiles_b == 1 and dgate is not None and dgate.shape[1] == 1
        dgate_b = dlogits if whole else acc(n, tiles_b, pr.c) if pr.pools else None
        pb.launch(
            attention_backward_kernel,
            n * tiles_b * splits,
            (x, gate, spatial_gate, spatial_pool, spatial_index, ds,
             None if ds is None else acc(n * tiles_b * splits, pr.p), dz, dmaps,
             dgate if whole else None, dgate_b, grads.conv[0], *bn,
             u["c_units"], u["p_units"], 1 if ds is None else ds.shape[1], splits, each, pr.d, pr.h,
             pr.w // cut["WV"]),
            dict(BN_EPS=eps, SPATIAL=pr.spatial, SPLIT=pr.split(), MB=1 if ds is None else pr.merge_block(),
                 **pr.taps_meta(), **pr.layout(), **cut),
            found,
        )  # fmt: skip
    blocks, block_tiles, hidden_part, my_dhidden, dpooled = 0, 1, None, None, None
    dhidden = part_of(grads.dhidden, rows)
    if pr.pools or pr.spatial:
        found, device = grads.small_jobs(n)
        jobs = 0
        if pr.pools:
            groups = cdiv(n, found.meta["GB"])
            blocks, block_tiles = pb.split_loop(groups, cdiv(pr.c, found.meta["MC"]), MLP_FILL, device)
            jobs = groups * blocks
            # Where there is one block, its sums are the hidden layer's gradient.
            hidden_part = dhidden if blocks == 1 or dhidden is None else acc(n, blocks, pr.hidden)
            my_dhidden = acc(n, pr.runs, pr.hidden) if blocks == 1 and dhidden is not None else None
            # A job that has all channels has all that the pools' gradients need.
            dpooled = acc(n, pr.rows, pr.c) if blocks == 1 else None
        if pr.spatial:
            jobs += n * grads.segments
        pb.launch(
            sample_backward_kernel,
            jobs,
            (pooled, pool_index, gate, spatial_pool, hidden, dz, *((None, None) if whole else (dgate, dgate_b)), w1, w2,
             *grads.conv, *bn, dlogits, hidden_part, my_dhidden, dpooled, part_of(grads.dtaps, rows),
             part_of(grads.sums, rows), pr.c, pr.hidden, n, pr.p, pr.d, pr.h, pr.w, blocks,
             grads.segments if pr.spatial else 0, grads.segment_tiles if pr.spatial else 0,
             0 if dgate is None else dgate.shape[1], tiles_b, block_tiles),
            dict(BN_EPS=eps, POOLS=pr.pools, SPATIAL=pr.spatial, SPLIT=pr.split(), ACC=pr.acc_type(),
                 **pr.taps_meta(), **found.meta),
            found,
        )  # fmt: skip
    found, device = pr.tile("input_backward", HB=max(1, pr.hidden), GB=1 if blocks < 2 or twice else n)
    open_mlp = (hidden, w1, w2, dlogits, hidden_part, dhidden) if blocks > 1 else (None,) * 6
    cut = pr.cut(found)
    programs = cdiv(n, found.meta["GB"]) * pr.tiles(found)
    splits, each = pb.split_loop(programs, cdiv(pr.c, found.meta["BC"]), found.fill, device)
    programs *= splits
    pb.launch(
        input_backward_kernel,
        programs,
        (dy, x, dx, gate, spatial_gate, pooled, pool_index, spatial_pool, spatial_index, dmaps,
         *((dz, grads.conv[0], *bn) if twice else (None,) * 6), *open_mlp,
         acc(programs, found.meta["GB"], pr.runs, pr.hidden) if blocks > 1 and w1 is not None else None, dpooled,
         n, u["c_units"], u["p_units"], pr.hidden, blocks, splits, each, pr.d, pr.h, pr.w // cut["WV"]),
        dict(BN_EPS=eps if twice else 0.0, POOLS=pr.pools, SPATIAL=pr.spatial, SPLIT=pr.split(), RESIDUAL=residual,
             FLAT=pr.flat(found), **pr.taps_meta(twice), **pr.layout(), **cut),
        found,
    )  # fmt: skip


def cbam_backward(
    dy, x, w1, b1, w2, b2, conv_weight, conv_bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps,
    pooled, pool_index, channel_gate, spatial_pool, spatial_index, hidden, spatial_gate,
    pools, spatial, ties, residual,
):  # fmt: skip
    x = dense_input(x)
    dy = pb.like_layout(dy, x)
    pr = pb.describe(x, w1, w2, conv_weight, pools, spatial, ties)
    dx = torch.empty_like(x)
    norm = (*weights_of(bn_weight, bn_bias, bn_mean, bn_var), bn_eps)
    grads = _Gradients(x, pr, weights_of(w1, b1, w2, b2), weights_of(conv_weight, conv_bias), norm)
    saved = [present(t) for t in (pooled, pool_index, channel_gate, spatial_pool, spatial_index, hidden)]
    gate = present(spatial_gate)
    if not x.numel():
        grads.zero()
        return (dx, *grads.outputs(x, 8))
    with pb.on_device(x):
        if grads.whole is not None:
            _whole_backward_launch(dy, x, dx, grads, grads.whole, saved, gate, None, None, residual)
        for rows in grads.chunks(x):
            own = [part_of(t, rows) for t in saved]
            dz = ds = part = None
            if pools or spatial:
                dz, ds, part = _scale_backward_launch(dy[rows], x[rows], own[2], part_of(gate, rows), pr)
            _attention_backward_chunk(
                dy[rows], x[rows], dx[rows], grads, own, part_of(gate, rows), dz, ds, part, rows, residual
            )
        grads.reduce(saved[0], saved[5])
    return (dx, *grads.outputs(x, 8))


def attention_backward(
    dy, x, w1, b1, w2, b2, conv_weight, conv_bias,
    pooled, pool_index, channel_gate, spatial_pool, spatial_index, hidden, spatial_gate, dz, dchannel_gate,
    pools, spatial, ties, residual,
):  # fmt: skip
    x = dense_input(x)
    dy = pb.like_layout(dy, x)
    pr = pb.describe(x, w1, w2, conv_weight, pools, spatial, ties)
    dx = torch.empty_like(x)
    grads = _Gradients(x, pr, weights_of(w1, b1, w2, b2), weights_of(conv_weight, conv_bias), NO_NORM)
    saved = [present(t) for t in (pooled, pool_index, channel_gate, spatial_pool, spatial_index, hidden)]
    gate, dz, dgate = present(spatial_gate), present(dz.contiguous()), present(dchannel_gate.contiguous())
    if not x.numel():
        grads.zero()
        return (dx, *grads.outputs(x, 6))
    with pb.on_device(x):
        if grads.whole is not None:
            _whole_backward_launch(dy, x, dx, grads, grads.whole, saved, gate, dz, dgate, residual)
        dgate = None if dgate is None else dgate.unsqueeze(1)  # (N, 1, C): a single, complete part
        for rows in grads.chunks(x):
            _attention_backward_chunk(
                dy[rows], x[rows], dx[rows], grads, [part_of(t, rows) for t in saved], part_of(gate, rows),
                part_of(dz, rows), None, part_of(dgate, rows), rows, residual,
            )  # fmt: skip
        grads.reduce(saved[0], saved[5])
    return (dx, *grads.outputs(x, 6))
