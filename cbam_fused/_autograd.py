"""Autograd for the ops: one Function for the fused block, two where a norm in training cuts it.

Inside `backward`, when grad mode is on (double backward), the reference is differentiated instead,
so that gradients of gradients are right. `once_differentiable` would be silently wrong there.
"""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _ops
from ._config import Config, Parameters
from .reference import cbam_reference, channel_gate_reference, spatial_logits_reference

# weight, bias, running_mean, running_var (each (1) or None) and eps of a BatchNorm in eval mode.
Folded = Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor], float]
NO_NORM: Folded = (None, None, None, None, 0.0)


def is_channels_last(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """x itself if contiguous or channels-last, else a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def _like_layout(t: Tensor, x: Tensor) -> Tensor:
    """t in the layout of x, copied only where it has another one."""
    if x.is_contiguous():
        return t.contiguous()
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _double_backward() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _broadcast(gate: Tensor, x: Tensor) -> Tensor:
    return gate.reshape(x.shape[:2] + (1,) * (x.dim() - 2))


def _vjp(
    f: Callable, inputs: Sequence[Optional[Tensor]], needs: Sequence[bool], grads: Sequence[Tensor]
) -> Tuple[Optional[Tensor], ...]:
    """Differentiable vector-Jacobian product of f, evaluated in the accumulation dtype."""
    with torch.enable_grad():
        # Aliases cut the graph at the inputs: one input may itself depend on another.
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        acc = _ops.accumulate_dtype(inputs[0].dtype)  # type: ignore[union-attr]  # x
        outputs = f(*(None if t is None else t.to(acc) for t in aliases))
        wanted = [a for a, need in zip(aliases, needs) if need and a is not None]
        found = iter(
            torch.autograd.grad(
                outputs,
                wanted,
                [g.to(o.dtype) for g, o in zip(grads, outputs)],
                create_graph=True,
                allow_unused=True,
            )
        )
    return tuple(next(found) if need and a is not None else None for a, need in zip(aliases, needs))


def _grads(values: Sequence[Tensor], inputs: Sequence[Optional[Tensor]]) -> Tuple[Optional[Tensor], ...]:
    return tuple(None if t is None else g for g, t in zip(values, inputs))


class _CBAM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend: str, c: Config, eps: float, x: Tensor, *weights: Optional[Tensor]) -> Tensor:
        y, *saved = _ops.get(backend, "cbam_forward")(
            x, *weights, eps, c.pools, c.spatial, c.ties, c.residual
        )
        ctx.save_for_backward(x, *weights, *saved)
        ctx.backend, ctx.config, ctx.eps = backend, c, eps
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, *rest = ctx.saved_tensors
        weights, saved = rest[:10], rest[10:]
        c, eps = ctx.config, ctx.eps
        if _double_backward():

            def f(x, *weights):
                def normed(z: Tensor) -> Tensor:
                    return F.batch_norm(z, weights[8], weights[9], weights[6], weights[7], False, 0.0, eps)

                norm = None if weights[8] is None else normed
                return (cbam_reference(x, Parameters(*weights[:6]), c, norm),)

            return (None, None, None, *_vjp(f, (x, *weights), ctx.needs_input_grad[3:], (dy,)))
        grads = _ops.get(ctx.backend, "cbam_backward")(
            _like_layout(dy, x), x, *weights, eps, *saved, c.pools, c.spatial, c.ties, c.residual
        )
        return (None, None, None, grads[0], *_grads(grads[1:], weights[:8]), None, None)


class _Attention(torch.autograd.Function):
    """x -> a handle of x's shape, z, channel gate, and a slot of z's shape.

    The block is cut around the norm, and a cut graph would write a gradient of x twice. So two edges
    to `_Scale` carry what this backward needs instead of gradients: that of the handle is dy, that
    of the slot is the spatial gate. Nobody else sees these edges; `_Scale` takes x beside them, for
    what double backward has to say of it.
    """

    @staticmethod
    def forward(ctx, backend: str, c: Config, x: Tensor, *weights: Optional[Tensor]):
        z, *saved = _ops.get(backend, "attention_forward")(x, *weights, c.pools, c.spatial, c.ties, True)
        ctx.save_for_backward(x, *weights, *saved)
        ctx.backend, ctx.config = backend, c
        return x.view_as(x), z, saved[2], torch.empty_like(z)

    @staticmethod
    def backward(ctx, dy: Tensor, dz: Tensor, dgate: Tensor, s: Tensor):
        x, *rest = ctx.saved_tensors
        weights, saved = rest[:6], rest[6:]
        c = ctx.config
        if _double_backward():
            return (None, None, *_attention_vjp(c, (x, *weights), ctx.needs_input_grad[2:], dy, dz, dgate, s))
        grads = _ops.get(ctx.backend, "attention_backward")(
            _like_layout(dy, x), x, *weights, *saved, s, dz.contiguous(), dgate.contiguous(),
            c.pools, c.spatial, c.ties, c.residual,
        )  # fmt: skip
        return (None, None, grads[0], *_grads(grads[1:], weights))


def _attention_vjp(c: Config, inputs, needs, dy: Tensor, dz: Tensor, dgate: Tensor, s: Tensor):
    def gates(x: Tensor, *weights: Optional[Tensor]):
        p = Parameters(*weights)
        if not c.pools:
            return (spatial_logits_reference(x, p, c),)
        gate = channel_gate_reference(x, p, c)
        return gate, spatial_logits_reference(x * _broadcast(gate, x), p, c)

    dx, *dweights = _vjp(gates, inputs, needs, (dgate, dz) if c.pools else (dz,))
    if dx is None:
        return (None, *dweights)
    through = dy.to(s.dtype) * s
    if c.pools:
        acc: List[Any] = [None if t is None else t.to(s.dtype) for t in inputs]
        through = through * _broadcast(channel_gate_reference(acc[0], Parameters(*acc[1:]), c), dy)
    dx = dx + through.to(dx.dtype)
    return (dx + dy if c.residual else dx, *dweights)


class _Scale(torch.autograd.Function):
    """x, handle, channel gate, normed z, slot -> y; see `_Attention` for what its backward hands over."""

    @staticmethod
    def forward(
        ctx, backend: str, residual: bool, x: Tensor, handle: Tensor, gate: Tensor, z: Tensor, slot: Tensor
    ) -> Tensor:
        y, s = _ops.get(backend, "scale_forward")(x, gate, z, residual)
        ctx.save_for_backward(x, gate, z, s)
        ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, gate, z, s = ctx.saved_tensors
        if _double_backward():
            s = torch.sigmoid(z)
            product = dy.to(s.dtype) * x.to(s.dtype)
            gated = product * _broadcast(gate, x) if gate.numel() else product
            dz = gated.sum(1, keepdim=True) * s * (1 - s)
            dgate = (product * s).flatten(2).sum(2) if gate.numel() else torch.zeros_like(gate)
        else:
            dy = _like_layout(dy, x)
            dz, dgate = _ops.get(ctx.backend, "scale_backward")(dy, x, gate, s)
        return None, None, None, dy, dgate, dz, s


def _needs_grad(*tensors: Optional[Tensor]) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def fused_cbam(backend: str, x: Tensor, p: Parameters, c: Config, folded: Folded = NO_NORM) -> Tensor:
    """The whole block in one op; `folded` is a BatchNorm in eval mode, or NO_NORM. x must be dense."""
    *norm, eps = folded
    weights = (*p, *norm)
    if _needs_grad(x, *weights):
        return _CBAM.apply(backend, c, eps, x, *weights)
    inference = _ops.get(backend, "cbam_inference")
    return inference(x, *weights, eps, c.pools, c.spatial, c.ties, c.residual)


def fused_cbam_with_norm(
    backend: str, x: Tensor, p: Parameters, c: Config, norm: Callable[[Tensor], Tensor]
) -> Tensor:
    """The block cut around `norm`, which sees the spatial logits (N, 1, *spatial). x must be dense."""
    if _needs_grad(x, *p):
        handle, z, gate, slot = _Attention.apply(backend, c, x, *p)
        return _Scale.apply(backend, c.residual, x, handle, gate, _normed(norm, z), slot)
    z, gate = attention(backend, x, p, c)
    normed = _normed(norm, z)
    if _needs_grad(normed):  # the norm learns, or closes over what does
        return _Scale.apply(backend, c.residual, x, x.view_as(x), gate, normed, torch.empty_like(z))
    return _ops.get(backend, "scale_forward")(x, gate, normed, c.residual)[0]


def _normed(norm: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """norm(z) as the kernels take it; ValueError where it is no logit a position."""
    normed = norm(z)
    if not isinstance(normed, Tensor):
        raise TypeError(f"norm must return a Tensor, got {type(normed).__name__}")
    if normed.shape != z.shape:
        try:
            normed = normed.expand(z.shape)
        except RuntimeError:
            raise ValueError(
                f"norm must return one logit a position, {tuple(z.shape)}, got {tuple(normed.shape)}"
            ) from None
    return normed.to(z.dtype).contiguous()


def attention(backend: str, x: Tensor, p: Parameters, c: Config) -> Tuple[Tensor, Tensor]:
    """Spatial logits z (N, 1, *spatial) before any norm and channel gate (N, C), without autograd."""
    out = _ops.get(backend, "attention_forward")(x, *p, c.pools, c.spatial, c.ties, False)
    return out[0], out[3]
