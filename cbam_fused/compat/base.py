"""What every dialect's class is made of: its layers under its own names, on the fused path."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, Dict, Optional, Sequence, Tuple, Type

import torch.nn as nn
from torch import Tensor

from .. import _checks, functional, masks
from .. import _config as cfg
from .._config import Config, Parameters
from ..module import (
    _CONV,
    _NORM,
    ChannelGate,
    FusedCBAM,
    SpatialGate,
    _check_geometry,
    _read,
    _readable,
    fx_leaf,
)
from . import dialects

Path = Tuple[str, ...]


@dataclass(frozen=True)
class Options:
    """What a dialect's constructor arguments mean. Names and meanings are FusedCBAM's.

    channels is None and hidden_channels unused without a channel gate; norm is (eps, momentum) of the
    BatchNorm or None.
    """

    channels: Optional[int] = None
    hidden_channels: int = 0
    pool_types: Sequence[str] = ("avg", "max")
    mlp_bias: bool = False
    spatial: bool = True
    kernel_size: int = 7
    spatial_bias: bool = False
    norm: Optional[Tuple[float, float]] = None
    spatial_order: str = "max_mean"
    light: bool = False
    ties: str = "first"
    residual: bool = False
    device: Any = None
    dtype: Any = None


@dataclass(frozen=True)
class Spec:
    """How an instance runs: its options, and where its layers are.

    paths: child names on the way to fc1, fc2, conv and bn, None for a layer that it has not.
    original: the class that `fuse` found it in, to which `unfuse` returns it.
    """

    dialect: Optional[str]
    channels: Optional[int]
    config: Config
    paths: Tuple[Optional[Path], Optional[Path], Optional[Path], Optional[Path]]
    dims: int = 2
    backend: str = "auto"
    original: Optional[type] = None


class Names(nn.Module):
    """A name in a state_dict key; it computes nothing."""


class _Dialect:
    """Reads layers by path, so that a module found in a model can be run as it is."""

    _cbam: Spec
    dialect: Optional[str] = None

    arrangement = "channel_first"
    channels = property(lambda self: self._cbam.channels)
    config = property(lambda self: self._cbam.config)
    dims = property(lambda self: self._cbam.dims)
    ties = property(lambda self: next(n for n, bit in cfg.TIES.items() if bit == self._cbam.config.ties))
    _fixed: Tuple[str, ...] = ()  # what `fuse` found may have attributes of these names

    @property
    def backend(self) -> str:
        return self._cbam.backend

    @backend.setter
    def backend(self, name: str) -> None:
        _checks.check_backend(name)
        self._cbam = replace(self._cbam, backend=name)

    def __getattr__(self, name: str) -> Any:
        """Layers, and what else the class that `fuse` found this in has: its methods, class attributes."""
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            spec = self.__dict__.get("_cbam")
            found = inspect.getattr_static(spec.original, name, None) if spec and spec.original else None
            if found is None:
                raise
            return found.__get__(self, type(self)) if hasattr(found, "__get__") else found

    def _layer(self, path: Optional[Path]) -> Any:
        if path is None:
            return None
        node: Any = self
        for name in path:
            node = node._modules[name]
        return node

    def _mlp(self) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        paths = self._cbam.paths
        if paths[1] is None:
            return None, None, None, None
        w2, b2 = self._dense(paths[1])
        if paths[0] is None:
            return None, None, w2, b2
        return (*self._dense(paths[0]), w2, b2)

    def _dense(self, path: Path) -> Tuple[Tensor, Optional[Tensor]]:
        layer = _readable(self._layer(path), ".".join(path))
        # (C, h), a view of the 1x1 convolution's (C, h, 1, 1)
        return _read(layer, "weight").flatten(1), _read(layer, "bias")

    def _arguments(self, x: Tensor):
        spec = self._cbam
        _checks.check_input(x, spec.channels, spec.dims)
        weight = bias = None
        if spec.paths[2] is not None:
            name = ".".join(spec.paths[2])
            conv = _readable(self._layer(spec.paths[2]), name)
            _check_geometry(conv, name)
            weight, bias = _read(conv, "weight"), _read(conv, "bias")
        return (
            x,
            Parameters(*self._mlp(), weight, bias),
            spec.config,
            self._layer(spec.paths[3]),
            spec.backend,
        )

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        return functional.run(*self._arguments(x))

    def extra_repr(self) -> str:
        spec = self._cbam
        text = [] if spec.channels is None else [str(spec.channels)]
        text.append(describe(spec.config, isinstance(self, FusedCBAM)))
        if spec.dims != 2:
            text.append(f"dims={spec.dims}")
        if spec.backend != "auto":
            text.append(f'backend="{spec.backend}"')
        return ", ".join(text)


class DialectCBAM(_Dialect, FusedCBAM):
    """A CBAM in another implementation's layout, run by the fused kernels."""


class DialectChannelGate(_Dialect, ChannelGate):
    """A channel gate in another implementation's layout, run by the fused kernels."""


class DialectSpatialGate(_Dialect, SpatialGate):
    """A spatial gate in another implementation's layout, run by the fused kernels."""


class DialectChannelMask(_Dialect, ChannelGate):
    """A channel gate that returns the gate (N, C, 1, 1) and leaves the product to its caller."""

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        x, p, c, _, backend = self._arguments(x)
        gate = masks.channel_mask(x, p, c, backend)
        return gate.reshape(x.shape[:2] + (1,) * (x.dim() - 2))


class DialectSpatialMask(_Dialect, SpatialGate):
    """A spatial gate that returns the gate (N, 1, H, W) and leaves the product to its caller."""

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        return masks.spatial_mask(*self._arguments(x))


BASES: Dict[str, Type[nn.Module]] = {
    "block": DialectCBAM,
    "channel": DialectChannelGate,
    "spatial": DialectSpatialGate,
    "channel_mask": DialectChannelMask,
    "spatial_mask": DialectSpatialMask,
}


def describe(c: Config, block: bool = True) -> str:
    """The options of a call in the words of FusedCBAM, or of one gate."""
    text = []
    if c.pools:
        text.append(f"pool_types={tuple(n for n, bit in cfg.POOL_BITS.items() if c.pools & bit)}")
    if not c.spatial and block:
        text.append("spatial=False")
    elif c.spatial in cfg.SPATIAL_ORDERS.values():
        text.append(
            f'{"spatial_order" if block else "order"}="{next(n for n, o in cfg.SPATIAL_ORDERS.items() if o == c.spatial)}"'
        )
    if c.pools & cfg.BLEND or c.spatial == cfg.SPATIAL_BLEND:
        text.append("light=True")
    if c.ties == cfg.TIES_SPLIT:
        text.append('ties="split"')
    if c.residual:
        text.append("residual=True")
    return ", ".join(text)


def make_config(row_kind: str, o: Options) -> Config:
    channel = not row_kind.startswith("spatial")
    spatial = o.spatial and not row_kind.startswith("channel")
    return _checks.make_config(
        tuple(o.pool_types) if channel else None, spatial, o.spatial_order, o.light, o.ties, o.residual
    )


def _attach(root: nn.Module, path: Path, layer: nn.Module) -> None:
    for name in path[:-1]:
        if name not in root._modules:
            root.add_module(name, Names())
        root = root._modules[name]  # type: ignore[assignment]
    root.add_module(path[-1], layer)


def build(module: nn.Module, row: dialects.Dialect, o: Options) -> None:
    """Makes the layers of `row` in the source's own order, so that one seed gives one set of weights."""
    spec_paths: Dict[str, Path] = {}
    factory = {"device": o.device, "dtype": o.dtype}

    def add(layer: str, made: nn.Module) -> None:
        spec_paths[layer] = tuple(row.layers[layer].split("."))
        _attach(module, spec_paths[layer], made)

    if "fc2" in row.layers:
        _checks.check_positive("channels", o.channels)
        assert o.channels is not None

        def dense(inputs: int, outputs: int) -> nn.Module:
            if row.mlp == "linear":
                return nn.Linear(inputs, outputs, bias=o.mlp_bias, **factory)
            return nn.Conv2d(inputs, outputs, 1, bias=o.mlp_bias, **factory)

        if o.hidden_channels:
            _checks.check_positive("hidden_channels", o.hidden_channels)
            add("fc1", dense(o.channels, o.hidden_channels))
        add("fc2", dense(o.hidden_channels or o.channels, o.channels))
    if "conv" in row.layers and o.spatial:
        k = o.kernel_size
        _checks.check_kernel_size(k)
        add("conv", _CONV[2](1 if o.light else 2, 1, k, padding=k // 2, bias=o.spatial_bias, **factory))
        if o.norm is not None:
            add("bn", _NORM[2](1, eps=o.norm[0], momentum=o.norm[1], **factory))
    paths = tuple(spec_paths.get(layer) for layer in dialects.LAYERS)
    module._cbam = Spec(row.name, o.channels, make_config(row.kind, o), paths)  # type: ignore[arg-type,assignment]


# Row name -> class, filled as the modules of `compat` are imported.
CLASSES: Dict[str, type] = {}


def dialect_class(name: str, module: str) -> Any:
    """The class of a row, importable from `module` under the source's class name."""
    row = dialects.find(name)
    parameters = list(row.parameters().parameters.values())

    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        build(self, row, Options(**row.resolve(row.bind(args, kwargs))))

    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    __init__.__signature__ = inspect.Signature([this, *parameters])  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{row.class_name}.__init__"
    __init__.__module__ = module
    body = {
        "__init__": __init__,
        "__module__": module,
        "__qualname__": row.class_name,
        "__doc__": f"`{row.class_name}` of {row.source}: its constructor, state_dict and numbers; fused.",
        "dialect": name,
    }
    CLASSES[name] = type(row.class_name, (BASES[row.kind],), body)
    return CLASSES[name]
