"""Checks of what a user passes in. Every message says name, expected, got."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from . import _config as cfg
from ._backends import DTYPES, NAMES
from ._config import Config, Parameters

_SHAPES = {1: "(N, C, L)", 2: "(N, C, H, W)", 3: "(N, C, D, H, W)"}
LOW = (torch.bfloat16, torch.float16)


def _names(options: Iterable[str]) -> str:
    return ", ".join(f'"{o}"' for o in options)


def _shape(t: Tensor) -> Tuple[int, ...]:
    return tuple(t.shape)


def check_choice(name: str, value: object, options: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {_names(options)}, got {value!r}")


def check_backend(backend: str) -> None:
    check_choice("backend", backend, NAMES)


def check_positive(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def check_kernel_size(value: object, even: str = "", several: str = "") -> None:
    """even, several: what to add where it is an even number, or a list."""
    if isinstance(value, (list, tuple)):
        raise TypeError(f"kernel_size must be an int, got {value!r}{several}")
    if check_positive("kernel_size", value) % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {value}{even}")


def pool_names(pool_types: object) -> Tuple[str, ...]:
    """`pool_types` as a tuple; whether the names are known is for `pool_bits` to say."""
    if isinstance(pool_types, str) or not isinstance(pool_types, Iterable):
        got = f"the str {pool_types!r}" if isinstance(pool_types, str) else repr(pool_types)
        raise TypeError(f'pool_types must be a sequence of names such as ("avg", "max"), got {got}')
    return tuple(pool_types)


def pool_bits(pool_types: Sequence[str], light: bool) -> int:
    """The bits of `pool_types`, checked."""
    pool_types = pool_names(pool_types)
    bits = 0
    for name in pool_types:
        if not isinstance(name, str) or name not in cfg.POOL_BITS:
            raise ValueError(f"pool_types must be any of {_names(cfg.POOL_BITS)}, got {name!r}")
        if bits & cfg.POOL_BITS[name]:
            raise ValueError(f"pool_types must name each pool once, got {tuple(pool_types)!r}")
        bits |= cfg.POOL_BITS[name]
    if not bits:
        raise ValueError("pool_types must name at least one pool, got an empty list")
    if light and bits != cfg.AVG | cfg.MAX:
        raise ValueError(f'pool_types must be ("avg", "max") with light=True, got {tuple(pool_types)!r}')
    return bits | cfg.BLEND if light else bits


def make_config(
    pool_types: Optional[Sequence[str]],
    spatial: bool,
    spatial_order: str,
    light: bool,
    ties: str,
    residual: bool,
) -> Config:
    """Config of a call from its public options; pool_types None means no channel gate."""
    check_choice("spatial_order", spatial_order, tuple(cfg.SPATIAL_ORDERS))
    check_choice("ties", ties, tuple(cfg.TIES))
    maps = cfg.SPATIAL_NONE
    if spatial:
        maps = cfg.SPATIAL_BLEND if light else cfg.SPATIAL_ORDERS[spatial_order]
    pools = 0 if pool_types is None else pool_bits(pool_types, light)
    return Config(pools, maps, cfg.TIES[ties], bool(residual))


def check_input(x: object, channels: Optional[int], dims: Optional[int]) -> None:
    """x (N, C, *spatial) with `dims` spatial dimensions and `channels` channels."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    wanted = _SHAPES[dims] if dims is not None else " or ".join(_SHAPES.values())
    if x.dim() != dims + 2 if dims is not None else x.dim() not in (3, 4, 5):
        raise ValueError(f"x must have shape {wanted}, got {_shape(x)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must have dtype float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a strided tensor, got layout {x.layout}")
    shape = x.shape
    if isinstance(shape[1], Tensor):
        return  # torch.jit.trace: a comparison of sizes would be a constant of the trace
    if channels is not None and shape[1] != channels:
        raise ValueError(f"x must have {channels} channels in shape {wanted}, got {shape[1]} in {_shape(x)}")
    if shape[1] < 1:
        raise ValueError(f"x must have at least 1 channel in shape {wanted}, got {_shape(x)}")
    for size in shape[2:]:
        if size == 0:
            raise ValueError(f"x must have spatial sizes of at least 1 in shape {wanted}, got {_shape(x)}")


# What a module calls what a call of `cbam` names.
_LAYERS = {
    "w1": "fc1.weight",
    "b1": "fc1.bias",
    "w2": "fc2.weight",
    "b2": "fc2.bias",
    "conv_weight": "conv.weight",
    "conv_bias": "conv.bias",
    "norm.weight": "bn.weight",
    "norm.bias": "bn.bias",
    "norm.running_mean": "bn.running_mean",
    "norm.running_var": "bn.running_var",
}


def _label(name: str) -> str:
    layer = _LAYERS.get(name)
    return f"{name} (a module's {layer})" if layer else name


_PLACED = (*Parameters._fields, "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")


def check_placement(x: Tensor, tensors: Sequence[Optional[Tensor]]) -> bool:
    """Every parameter on x's device, in x's dtype or in float32 beside a 16-bit x; whether all have x's dtype.

    tensors: the fields of Parameters, and after them those of a folded norm, if any.
    """
    device, dtype = x.device, x.dtype
    for t in tensors:
        if t is not None and (t.dtype != dtype or t.device != device):
            break
    else:
        return True
    for name, t in zip(_PLACED, tensors):
        if t is None:
            continue
        if t.device != device:
            raise ValueError(f"{_label(name)} must be on the device of x, {device}, got {t.device}")
        if t.dtype != dtype and not (
            t.dtype == torch.float32 and dtype in LOW or torch.is_autocast_enabled(device.type)
        ):
            wanted = f"{dtype} or torch.float32" if dtype in LOW else f"{dtype}"
            raise TypeError(f"{_label(name)} must have the dtype of x, {wanted}, got {t.dtype}")
    return False


def check_devices(x: Tensor, norm: nn.Module) -> None:
    """What a norm reads, without its children, is on x's device."""
    for kept in (norm._parameters, norm._buffers):
        for name, t in kept.items():
            if t is not None and t.is_floating_point() and t.device != x.device:
                label = _label(f"norm.{name}")
                raise ValueError(f"{label} must be on the device of x, {x.device}, got {t.device}")


def check_norm(norm: object) -> None:
    """A norm is callable, and one that counts its features has one: the spatial logits have one channel."""
    if not callable(norm):
        raise TypeError(f"norm must be a module or a function, got {type(norm).__name__}")
    features = getattr(norm, "num_features", 1)
    uninitialized = getattr(norm, "has_uninitialized_params", None)  # of lazy modules
    if features != 1 and not (uninitialized and uninitialized()):
        raise ValueError(f"norm must have num_features=1, got {features}")


def _expect(name: str, t: Optional[Tensor], shape: Tuple[int, ...], required: bool = True) -> None:
    if t is None:
        if required:
            raise ValueError(f"{_label(name)} must have shape {shape}, got None")
    elif _shape(t) != shape:
        raise ValueError(f"{_label(name)} must have shape {shape}, got {_shape(t)}")


def check_tensors(p: Parameters) -> None:
    """Each is a Tensor or None."""
    for name, t in zip(Parameters._fields, p):
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")


def _fits(shape: Sequence[int], p: Parameters, c: Config) -> bool:
    """Whether `check_parameters` has nothing to say; a call of a few microseconds cannot wait for its words."""
    w1, b1, w2, b2, conv, conv_bias = p
    if c.pools:
        channels = shape[1]
        hidden = channels
        if w1 is not None:
            hidden = w1.shape[0]
            if hidden < 1 or w1.shape != (hidden, channels) or b1 is not None and b1.shape != (hidden,):
                return False
        elif b1 is not None:
            return False
        if w2 is None or w2.shape != (channels, hidden) or b2 is not None and b2.shape != (channels,):
            return False
    if c.spatial:
        if conv is None or conv_bias is not None and conv_bias.shape != (1,):
            return False
        kernel = conv.shape
        maps = 1 if c.spatial == cfg.SPATIAL_BLEND else 2
        if len(kernel) != len(shape) or kernel[0] != 1 or kernel[1] != maps:
            return False
        for size in kernel[2:]:
            if size % 2 == 0:
                return False
    return True


def check_parameters(x: Tensor, p: Parameters, c: Config) -> None:
    """Shapes of the learnt tensors, which are tensors or None."""
    shape = x.shape
    if isinstance(shape[1], Tensor) or _fits(shape, p, c):
        return  # the first is torch.jit.trace, as in `check_input`
    channels = shape[1]
    if c.pools:
        if p.w1 is None:
            _expect("w2", p.w2, (channels, channels))
            if p.b1 is not None:
                raise ValueError("b1 must be None where w1 is None, got a Tensor")
        else:
            if p.w1.dim() != 2 or p.w1.shape[1] != channels or p.w1.shape[0] < 1:
                raise ValueError(f"{_label('w1')} must have shape (h, {channels}), got {_shape(p.w1)}")
            hidden = p.w1.shape[0]
            _expect("b1", p.b1, (hidden,), required=False)
            _expect("w2", p.w2, (channels, hidden))
        _expect("b2", p.b2, (channels,), required=False)
    if c.spatial:
        maps = 1 if c.spatial == cfg.SPATIAL_BLEND else 2
        dims = len(shape) - 2
        kernel, label = ", ".join(["k"] * dims), _label("conv_weight")
        if p.conv_weight is None:
            raise ValueError(f"{label} must have shape (1, {maps}, {kernel}), got None")
        if p.conv_weight.dim() != dims + 2 or _shape(p.conv_weight)[:2] != (1, maps):
            raise ValueError(f"{label} must have shape (1, {maps}, {kernel}), got {_shape(p.conv_weight)}")
        for size in p.conv_weight.shape[2:]:
            if size % 2 == 0:
                raise ValueError(f"{label} must have odd kernel sizes, got {_shape(p.conv_weight)}")
        _expect("conv_bias", p.conv_bias, (1,), required=False)
