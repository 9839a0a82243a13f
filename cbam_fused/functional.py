"""The functional form of CBAM, and the path that it shares with the modules."""

from __future__ import annotations

from typing import Any, Callable, Iterable, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import _autograd, _backends, _checks, _ops
from ._autograd import NO_NORM, Folded
from ._config import Config, Parameters
from .reference import cbam_reference, channel_gate_reference, spatial_logits_reference

Norm = Callable[[Tensor], Tensor]
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)

# Exactly these: a subclass may do more than normalise.
_FOLDABLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# timm's, which applies an activation and a drop layer; its CBAM builds it with the identity for both.
_FOLDABLE_WITHOUT_CHILDREN = ("timm.layers.norm_act", "BatchNormAct2d")


def _only_normalises(norm: object) -> bool:
    kind = type(norm)
    if kind in _FOLDABLE:
        return True
    if (kind.__module__, kind.__name__) != _FOLDABLE_WITHOUT_CHILDREN:
        return False
    return all(type(child) is nn.Identity for child in norm.children())  # type: ignore[attr-defined]


def _nothing_beside(norm: nn.Module) -> bool:
    """Whether a call of norm is its own forward alone."""
    hooks = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    return not hooks and "forward" not in norm.__dict__


def _fold(norm: Any) -> Optional[Folded]:
    """The tensors of a norm that the fused op can apply itself, or None if it must be called."""
    if norm is None:
        return NO_NORM
    if _only_normalises(norm) and not norm.training and norm.running_mean is not None:
        if _nothing_beside(norm):
            return norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps
    return None


def check_call(
    x: Tensor, p: Parameters, c: Config, norm: Optional[Norm] = None, folded: Optional[Folded] = None
) -> bool:
    """All that a checked x is computed with, before anything is computed; whether all of it has x's dtype.

    folded: the tensors of norm, where a kernel reads them.
    """
    _checks.check_parameters(x, p, c)
    if norm is None:
        return _checks.check_placement(x, p)
    _checks.check_norm(norm)
    if folded is not None:
        return _checks.check_placement(x, (*p, *folded[:4]))
    alike = _checks.check_placement(x, p)
    if isinstance(norm, _NORMS) and _nothing_beside(norm):
        # Its own tensors; what a hook brings from elsewhere is the hook's affair.
        _checks.check_devices(x, norm)
    return alike


def _upcast(x: Tensor, p: Parameters) -> Tuple[Tensor, Parameters]:
    """float32 for a 16-bit x beside float32 parameters, which plain PyTorch would refuse to mix."""
    if any(t is not None and t.dtype != x.dtype for t in p) and not torch.is_autocast_enabled(x.device.type):
        return x.float(), Parameters(*(None if t is None else t.float() for t in p))
    return x, p


def _beside(t: Optional[Tensor], x: Tensor) -> Optional[Tensor]:
    """t in a dtype that the kernels take beside x; only autocast lets other ones come this far."""
    if t is None or t.dtype == x.dtype or t.dtype == torch.float32 and x.dtype in _checks.LOW:
        return t
    return t.to(x.dtype)


def beside(x: Tensor, p: Parameters, alike: bool) -> Parameters:
    """p in dtypes that the kernels take beside x."""
    if alike or not torch.is_autocast_enabled(x.device.type):
        return p
    return Parameters(*(_beside(t, x) for t in p))


def _empty(x: Tensor, tensors: Iterable[Optional[Tensor]]) -> Tensor:
    """The empty x as an output that keeps it and the parameters in the graph, so that they get zeros."""
    anchors = [t.sum() * 0 for t in tensors if t is not None]
    total: Any = sum(anchors)
    return x * 1 + total.to(x.dtype) if anchors else x * 1


def _learnt(norm: Optional[Norm]) -> Iterable[Tensor]:
    return norm.parameters() if isinstance(norm, nn.Module) else ()


def _run_reference(x: Tensor, p: Parameters, c: Config, norm: Optional[Norm]) -> Tensor:
    if not torch.jit.is_tracing() and x.numel() == 0:
        return _empty(x, (*p, *_learnt(norm)))  # nothing to pool
    xs, ps = _upcast(x, p)
    return cbam_reference(xs, ps, c, None if norm is None else _cast(norm, xs.dtype, xs)).to(x.dtype)


def _cast(norm: Norm, wanted: torch.dtype, x: Tensor, call: Optional[Norm] = None) -> Norm:
    """norm, called on logits in the dtype of its own tensors where it has any, and else in `wanted`.

    call: how to call it, if not by itself.
    """
    call = norm if call is None else call
    if torch.is_autocast_enabled(x.device.type) and not isinstance(norm, _NORMS):
        return call  # autocast casts the layers in it itself
    if isinstance(norm, nn.Module):
        for t in (*norm.parameters(), *norm.buffers()):
            if t.is_floating_point():
                wanted = t.dtype
                break

    def cast(z: Tensor) -> Tensor:
        normed = call(z if z.dtype == wanted else z.to(wanted))
        return normed.to(z.dtype) if isinstance(normed, Tensor) else normed

    return cast


def run(x: Tensor, p: Parameters, c: Config, norm: Optional[Norm], backend: str) -> Tensor:
    """CBAM of a checked x."""
    folded = _fold(norm)
    alike = check_call(x, p, c, norm, folded)
    name = _backends.select(backend, x, c)
    if name == "reference":
        return _run_reference(x, p, c, norm)
    x = _autograd.dense(x)
    if folded is None and x.shape[0] == 0:
        # No statistics to take from an empty batch; what the norm learns still gets zeros.
        return _run_reference(x, p, c, norm)
    p = beside(x, p, alike)
    if folded is not None:
        if not alike and torch.is_autocast_enabled(x.device.type):
            weight, bias, mean, var, eps = folded
            folded = (_beside(weight, x), _beside(bias, x), _beside(mean, x), _beside(var, x), eps)
        return _autograd.fused_cbam(name, x, p, c, folded)
    assert norm is not None  # which would have been folded
    return _autograd.fused_cbam_with_norm(name, x, p, c, _cast(norm, _ops.accumulate_dtype(x.dtype), x))


def maps(
    x: Tensor, p: Parameters, c: Config, norm: Optional[Norm], backend: str
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Channel gate (N, C) and spatial gate (N, 1, *spatial), None where the block has none."""
    weights = beside(x, p, check_call(x, p, c, norm, _fold(norm)))
    name = _backends.select(backend, x, c)
    # As in the kernels, gates are not rounded to a 16-bit dtype, whatever autocast would do.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if name == "reference" or x.shape[0] == 0:
            acc = _ops.accumulate_dtype(x.dtype)
            xs, ps = x.to(acc), Parameters(*(None if t is None else t.to(acc) for t in p))
            gate = channel_gate_reference(xs, ps, c) if c.pools else None
            gated = xs if gate is None else xs * _autograd._broadcast(gate, xs)
            z = spatial_logits_reference(gated, ps, c) if c.spatial else None
        else:
            z, gate = _autograd.attention(name, _autograd.dense(x), weights, c)
        if not c.spatial:
            return gate, None
        assert z is not None
        if norm is not None:
            z = _without_traces(z, norm)
        return (gate if c.pools else None), torch.sigmoid(z)


def normed(z: Tensor, norm: Norm, call: Optional[Norm] = None) -> Tensor:
    """norm of the spatial logits, in their dtype; none of an empty batch, which has no statistics."""
    cast = _cast(norm, z.dtype, z, call)
    if torch.jit.is_tracing():
        return cast(z)  # a comparison of sizes would be a constant of the trace
    if z.shape[0] == 0 and not (isinstance(norm, nn.SyncBatchNorm) and norm.training):
        return _empty(z, _learnt(norm))  # but the other ranks of a SyncBatchNorm wait for this one
    return _autograd._normed(cast, z)


def _without_traces(z: Tensor, norm: Norm) -> Tensor:
    """norm(z), hooks and all, that leaves its buffers, such as running statistics, as they are.

    A SyncBatchNorm takes the statistics of this rank's batch: one rank may look at its maps alone.
    """
    if not isinstance(norm, nn.Module):
        return normed(z, norm)
    if _only_normalises(norm) and _nothing_beside(norm):
        own: Any = norm
        batch = own.training or own.running_mean is None
        mean, var = (None, None) if batch else (own.running_mean, own.running_var)
        cast = [None if t is None else t.to(z.dtype) for t in (mean, var, own.weight, own.bias)]
        return F.batch_norm(z, cast[0], cast[1], cast[2], cast[3], training=batch, eps=own.eps)
    kept = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    if not kept or not any(m.training for m in norm.modules()):
        return normed(z, norm)
    if torch.jit.is_tracing() or any(isinstance(m, torch.jit.ScriptModule) for m in norm.modules()):
        try:
            return normed(z, norm)
        finally:
            for name, buffer in norm.named_buffers():
                buffer.data.copy_(kept[name])  # no new version of what a graph may have saved
    return normed(z, norm, lambda logits: torch.func.functional_call(norm, kept, (logits,)))


def cbam(
    x: Tensor,
    w1: Optional[Tensor],
    b1: Optional[Tensor],
    w2: Tensor,
    b2: Optional[Tensor],
    conv_weight: Optional[Tensor] = None,
    conv_bias: Optional[Tensor] = None,
    *,
    norm: Optional[Norm] = None,
    pool_types: Sequence[str] = ("avg", "max"),
    spatial_order: str = "max_mean",
    light: bool = False,
    ties: str = "first",
    residual: bool = False,
    backend: str = "auto",
) -> Tensor:
    """CBAM of x: a channel gate, then a spatial gate, fused.

    Args:
        x: (N, C, *spatial) with one to three spatial dimensions; float32, float64, bfloat16 or
            float16; contiguous and channels-last are read as they are, other strides are copied.
        w1, b1: (h, C) and (h), the first layer of the shared MLP. w1=None makes it one layer.
        w2, b2: (C, h) and (C), the second layer; (C, C) without w1. Biases may be None.
        conv_weight, conv_bias: (1, 2, *k) with odd k, and (1); None for no spatial gate.
        norm: what the spatial logits (N, 1, *spatial) pass before the sigmoid, such as an
            `nn.BatchNorm2d(1)`; in eval mode its running statistics are folded into the kernel.
        pool_types: the channel pools whose MLP outputs are summed: any of "avg", "max",
            "lp" (the 2-norm over positions) and "lse" (log of the sum of exponentials).
        spatial_order: "max_mean" or "mean_max", the order of the convolution's input channels.
        light: one MLP pass on 0.5 * avg + 0.5 * max, and a convolution (1, 1, *k) of
            0.5 * mean + 0.5 * max.
        ties: where the gradient of a maximum goes, "first" index or "split" among equals.
        residual: adds x to the result.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Parameters have the dtype of x, or float32 beside a 16-bit x. Sums are accumulated in float32
    (float64 for float64) and each output is rounded once.

    Returns:
        (N, C, *spatial), dtype and layout of x.

    Raises:
        TypeError, ValueError: an argument that cannot be computed; nothing is computed.
        RuntimeError: a backend asked for by name that cannot run this call.

    Source: Woo et al., "CBAM: Convolutional Block Attention Module", arXiv:1807.06521.
    """
    _checks.check_backend(backend)
    _checks.check_input(x, None, None)
    p = Parameters(w1, b1, w2, b2, conv_weight, conv_bias)
    _checks.check_tensors(p)
    pool_types = _checks.pool_names(pool_types)
    c = _checks.make_config(pool_types, conv_weight is not None, spatial_order, light, ties, residual)
    if not c.spatial:
        for name, beside in (("conv_bias", conv_bias), ("norm", norm)):
            if beside is not None:
                raise ValueError(
                    f"{name} must be None where conv_weight is None, got {type(beside).__name__}"
                )
    return run(x, p, c, norm, backend)
