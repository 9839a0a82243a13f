"""The gates themselves, with gradients, for callers that multiply; and the paper's other arrangements.

A gate alone is the `attention` op with one half of the block switched off. In its backward the
product's part of the gradient is zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Callable, Optional, Tuple

import torch
from torch import Tensor

from . import _autograd, _backends, _checks, _ops, functional
from . import _config as cfg
from ._config import Config, Parameters
from .reference import channel_gate_reference, spatial_logits_reference

ARRANGEMENTS = ("channel_first", "spatial_first", "parallel")


def _gate_reference(x: Tensor, p: Parameters, c: Config) -> Tensor:
    return channel_gate_reference(x, p, c) if c.pools else spatial_logits_reference(x, p, c)


class _Attention(torch.autograd.Function):
    """x -> channel gate (N, C), or spatial logits (N, 1, *spatial), in the accumulation dtype."""

    @staticmethod
    def forward(ctx, backend: str, c: Config, x: Tensor, *weights: Optional[Tensor]) -> Tensor:
        z, *saved = _ops.get(backend, "attention_forward")(x, *weights, c.pools, c.spatial, c.ties, True)
        out = saved[2] if c.pools else z
        ctx.save_for_backward(x, *weights, *saved)
        ctx.backend, ctx.config = backend, c
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, *rest = ctx.saved_tensors
        weights, saved = rest[:6], rest[6:]
        c = ctx.config
        if _autograd._double_backward():

            def f(x: Tensor, *weights: Optional[Tensor]):
                return (_gate_reference(x, Parameters(*weights), c),)

            return (None, None, *_autograd._vjp(f, (x, *weights), ctx.needs_input_grad[2:], (grad,)))
        none = grad.new_empty(0)
        grad = grad.contiguous()
        dz, dgate = (none, grad) if c.pools else (grad, none)
        gate = torch.zeros_like(grad) if c.spatial else none
        grads = _ops.get(ctx.backend, "attention_backward")(
            torch.zeros_like(x), x, *weights, *saved, gate, dz, dgate, c.pools, c.spatial, c.ties, False
        )
        return (None, None, grads[0], *_autograd._grads(grads[1:], weights))


def _attention(x: Tensor, p: Parameters, c: Config, backend: str) -> Tensor:
    """Channel gate or spatial logits, in the accumulation dtype of x."""
    p = functional.beside(x, p, functional.check_call(x, p, c))
    name = _backends.select(backend, x, c)
    if name == "reference" or x.shape[0] == 0:
        xs, ps = functional._upcast(x, p)
        return _gate_reference(xs, ps, c)
    return _Attention.apply(name, c, _autograd.dense(x), *p)


def channel_mask(x: Tensor, p: Parameters, c: Config, backend: str = "auto") -> Tensor:
    """The channel gate (N, C) of a checked x, in x's dtype."""
    return _attention(x, p, replace(c, spatial=cfg.SPATIAL_NONE, residual=False), backend).to(x.dtype)


def spatial_mask(
    x: Tensor, p: Parameters, c: Config, norm: Optional[Callable], backend: str = "auto"
) -> Tensor:
    """The spatial gate (N, 1, *spatial) of a checked x, which no channel gate has multiplied, in x's dtype."""
    conv, spatial = _halves(p, c)[1]
    functional.check_call(x, conv, spatial, norm)
    z = _attention(x, conv, spatial, backend)
    if norm is not None:
        z = functional.normed(z, norm)
    return torch.sigmoid(z).to(x.dtype)


def check_arrangement(arrangement: str, spatial: bool) -> None:
    _checks.check_choice("arrangement", arrangement, ARRANGEMENTS)
    if arrangement != "channel_first" and not spatial:
        raise ValueError(f'arrangement must be "channel_first" with spatial=False, got "{arrangement}"')


def _halves(p: Parameters, c: Config) -> Tuple[Tuple[Parameters, Config], Tuple[Parameters, Config]]:
    """What the channel gate and the spatial gate need, each alone."""
    return (
        (p._replace(conv_weight=None, conv_bias=None), replace(c, spatial=cfg.SPATIAL_NONE, residual=False)),
        (Parameters(None, None, None, None, p.conv_weight, p.conv_bias), replace(c, pools=0, residual=False)),
    )


def arranged(
    arrangement: str, x: Tensor, p: Parameters, c: Config, norm: Optional[Callable], backend: str
) -> Tensor:
    """CBAM in another of the paper's arrangements, one op a gate.

    "spatial_first": the channel gate reads what the spatial gate has multiplied. "parallel": both
    gates read x, and y = x * channel gate * spatial gate. Woo et al., arXiv:1807.06521, table 3.
    """
    functional.check_call(
        x, p, c, norm, functional._fold(norm)
    )  # all of it before the first gate is computed
    (mlp, channel), (conv, spatial) = _halves(p, c)
    if arrangement == "spatial_first":
        y = functional.run(functional.run(x, conv, spatial, norm, backend), mlp, channel, None, backend)
    else:
        y = functional.run(x, mlp, channel, None, backend) * spatial_mask(x, p, c, norm, backend)
    return y + x if c.residual else y


def arranged_maps(
    arrangement: str, x: Tensor, p: Parameters, c: Config, norm: Optional[Callable], backend: str
) -> Tuple[Tensor, Tensor]:
    """The gates of `arranged`: channel (N, C) and spatial (N, 1, *spatial), without gradients."""
    functional.check_call(
        x, p, c, norm, functional._fold(norm)
    )  # all of it before the first gate is computed
    (mlp, channel), (conv, spatial) = _halves(p, c)
    s = functional.maps(x, conv, spatial, norm, backend)[1]
    assert s is not None
    gated = x if arrangement == "parallel" else (x * s).to(x.dtype)
    g = functional.maps(gated.detach(), mlp, channel, None, backend)[0]
    assert g is not None
    return g, s
