"""Owner of every op schema and fake. Backends implement these ops and define none.

Each backend `b` has its own namespace `cbam_fused_<b>` with the same seven ops:

- `cbam_inference`: the whole block, for callers that need no gradient; `cbam_forward`, `cbam_backward`: the
  same with what backward needs. BatchNorm, if any, is in eval mode and its running statistics are folded
  into the spatial logits.
- `attention_forward`, `scale_forward` and their backwards: the block cut where BatchNorm in
  training needs statistics of the whole batch. `attention` goes from x to the channel gate and
  the spatial logits z; then the caller's norm runs on z; `scale` multiplies x by both gates.

Letters (A is the accumulation dtype: float64 for float64 x, else float32; P positions):
    x, dy, y, dx    (N, C, *spatial)   x.dtype, contiguous or channels-last, all in x's layout
    w1 (h, C)  b1 (h)  w2 (C, h)  b2 (C)  conv_weight (1, 2 or 1, *k)  conv_bias, bn_* (1)
                                       x.dtype, or float32 where x is float16 or bfloat16
    pooled          (N, K, C)          A; one row for each of the K pools, in bit order
    pool_index      (N, C)             first position of the maximum, or with TIES_SPLIT the
                                       number of positions that equal it; int16 if P < 2**15,
                                       else int32; empty (0) and int16 without MAX or `save`, so that
                                       a graph of any size has no condition on P
    channel_gate    (N, C)             A
    spatial_pool    (N, 2, *spatial)   A; always [max, mean], whatever the convolution's order
    spatial_index   (N, *spatial)      as pool_index, over C
    hidden          (N, M, h)          A; the MLP's hidden layer before ReLU in its M passes, one for each pool or
                                       one for all with BLEND; empty without w1
    spatial_gate    (N, 1, *spatial)   A
    z, dz           (N, 1, *spatial)   A; spatial logits before (attention) or after (scale) norm
    dchannel_gate   (N, C)             A; the part sum_p dy * x * spatial_gate of its gradient
Weight gradients have their weight's shape and dtype and are contiguous. What a configuration does
not have is an empty tensor (0); with `save=False`, so is what only backward would need.
`pools`, `spatial`, `ties` are the integers of `_config`.
"""

from __future__ import annotations

from typing import Callable, Dict, Optional, Tuple

import torch
from torch import Tensor

from . import _config as cfg

BACKENDS = ("cpu", "cuda", "triton")

_MLP = "Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2"
_CONV = "Tensor? conv_weight, Tensor? conv_bias"
_NORM = "Tensor? bn_weight, Tensor? bn_bias, Tensor? bn_mean, Tensor? bn_var, float bn_eps"
_SAVED = (
    "Tensor pooled, Tensor pool_index, Tensor channel_gate, Tensor spatial_pool, Tensor spatial_index,"
    " Tensor hidden"
)
_OPTIONS = "int pools, int spatial, int ties"

SCHEMAS = {
    "cbam_inference": f"(Tensor x, {_MLP}, {_CONV}, {_NORM}, {_OPTIONS}, bool residual) -> Tensor y",
    "cbam_forward": f"(Tensor x, {_MLP}, {_CONV}, {_NORM}, {_OPTIONS}, bool residual)"
    " -> (Tensor y, Tensor pooled, Tensor pool_index, Tensor channel_gate, Tensor spatial_pool,"
    " Tensor spatial_index, Tensor hidden, Tensor spatial_gate)",
    "cbam_backward": f"(Tensor dy, Tensor x, {_MLP}, {_CONV}, {_NORM}, {_SAVED}, Tensor spatial_gate,"
    f" {_OPTIONS}, bool residual)"
    " -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dconv_weight,"
    " Tensor dconv_bias, Tensor dbn_weight, Tensor dbn_bias)",
    "attention_forward": f"(Tensor x, {_MLP}, {_CONV}, {_OPTIONS}, bool save)"
    " -> (Tensor z, Tensor pooled, Tensor pool_index, Tensor channel_gate, Tensor spatial_pool,"
    " Tensor spatial_index, Tensor hidden)",
    "attention_backward": f"(Tensor dy, Tensor x, {_MLP}, {_CONV}, {_SAVED}, Tensor spatial_gate,"
    f" Tensor dz, Tensor dchannel_gate, {_OPTIONS}, bool residual)"
    " -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dconv_weight,"
    " Tensor dconv_bias)",
    "scale_forward": "(Tensor x, Tensor channel_gate, Tensor z, bool residual)"
    " -> (Tensor y, Tensor spatial_gate)",
    "scale_backward": "(Tensor dy, Tensor x, Tensor channel_gate, Tensor spatial_gate)"
    " -> (Tensor dz, Tensor dchannel_gate)",
}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def index_dtype(extent: int) -> torch.dtype:
    """The dtype of an argmax (or a count of ties) over `extent` elements."""
    return torch.int16 if extent < 2**15 else torch.int32


def _acc(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=accumulate_dtype(x.dtype))


def _fake_saved(x: Tensor, w1: Optional[Tensor], pools: int, spatial: int, save: bool):
    n, c, sp = x.shape[0], x.shape[1], x.shape[2:]
    count = 0 if not save else bin(pools & 15).count("1")
    pooled = _acc(x, n, count, c) if count else _acc(x, 0)
    positions = 1
    for s in sp:
        positions = positions * s
    pool_index, spatial_index = (x.new_empty((0,), dtype=torch.int16) for _ in range(2))
    if save and pools & cfg.MAX:
        pool_index = x.new_empty((n, c), dtype=index_dtype(positions))
    spatial_pool = _acc(x, n, 2, *sp) if spatial and save else _acc(x, 0)
    if spatial and save:
        spatial_index = x.new_empty((n, *sp), dtype=index_dtype(c))
    hidden = _acc(x, 0)
    if save and pools and w1 is not None:
        hidden = _acc(x, n, 1 if pools & cfg.BLEND else count, w1.shape[0])
    return pooled, pool_index, spatial_pool, spatial_index, hidden


def _cbam_inference_fake(x, *rest):
    return torch.empty_like(x)


def _cbam_forward_fake(
    x, w1, b1, w2, b2, conv_weight, conv_bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps,
    pools, spatial, ties, residual,
):  # fmt: skip
    n, c, sp = x.shape[0], x.shape[1], x.shape[2:]
    pooled, pool_index, spatial_pool, spatial_index, hidden = _fake_saved(x, w1, pools, spatial, True)
    gate = _acc(x, n, c) if pools else _acc(x, 0)
    s = _acc(x, n, 1, *sp) if spatial else _acc(x, 0)
    return torch.empty_like(x), pooled, pool_index, gate, spatial_pool, spatial_index, hidden, s


def _like(t: Optional[Tensor], x: Tensor) -> Tensor:
    return x.new_empty((0,)) if t is None else t.new_empty(t.shape)


def _cbam_backward_fake(
    dy, x, w1, b1, w2, b2, conv_weight, conv_bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps,
    pooled, pool_index, channel_gate, spatial_pool, spatial_index, hidden, spatial_gate,
    pools, spatial, ties, residual,
):  # fmt: skip
    weights = (w1, b1, w2, b2, conv_weight, conv_bias, bn_weight, bn_bias)
    return (torch.empty_like(x), *(_like(t, x) for t in weights))


def _attention_forward_fake(x, w1, b1, w2, b2, conv_weight, conv_bias, pools, spatial, ties, save):
    n, c, sp = x.shape[0], x.shape[1], x.shape[2:]
    pooled, pool_index, spatial_pool, spatial_index, hidden = _fake_saved(x, w1, pools, spatial, save)
    gate = _acc(x, n, c) if pools else _acc(x, 0)
    z = _acc(x, n, 1, *sp) if spatial else _acc(x, 0)
    return z, pooled, pool_index, gate, spatial_pool, spatial_index, hidden


def _attention_backward_fake(
    dy, x, w1, b1, w2, b2, conv_weight, conv_bias,
    pooled, pool_index, channel_gate, spatial_pool, spatial_index, hidden, spatial_gate, dz, dchannel_gate,
    pools, spatial, ties, residual,
):  # fmt: skip
    weights = (w1, b1, w2, b2, conv_weight, conv_bias)
    return (torch.empty_like(x), *(_like(t, x) for t in weights))


def _scale_forward_fake(x, channel_gate, z, residual):
    return torch.empty_like(x), z.new_empty(z.shape)


def _scale_backward_fake(dy, x, channel_gate, spatial_gate):
    return spatial_gate.new_empty(spatial_gate.shape), channel_gate.new_empty(channel_gate.shape)


FAKES: Dict[str, Callable] = {
    "cbam_inference": _cbam_inference_fake,
    "cbam_forward": _cbam_forward_fake,
    "cbam_backward": _cbam_backward_fake,
    "attention_forward": _attention_forward_fake,
    "attention_backward": _attention_backward_fake,
    "scale_forward": _scale_forward_fake,
    "scale_backward": _scale_backward_fake,
}


def namespace(backend: str) -> str:
    return f"cbam_fused_{backend}"


_OVERLOADS: Dict[Tuple[str, str], Callable] = {}


def get(backend: str, op: str) -> Callable:
    """The overload `cbam_fused_<backend>::<op>`."""
    return _OVERLOADS[backend, op]


for _backend in BACKENDS:
    for _name, _schema in SCHEMAS.items():
        torch.library.define(f"{namespace(_backend)}::{_name}", _schema)
        torch.library.register_fake(f"{namespace(_backend)}::{_name}", FAKES[_name])
        _OVERLOADS[_backend, _name] = getattr(getattr(torch.ops, namespace(_backend)), _name).default
