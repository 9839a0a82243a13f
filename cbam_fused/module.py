"""The modules: FusedCBAM, and its two halves ChannelGate and SpatialGate."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple

import torch.nn as nn
from torch import Tensor
from torch.fx import Proxy

from . import _backends, _checks, functional, masks
from . import _config as cfg
from ._config import Config, Parameters

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _read(module: nn.Module, name: str) -> Any:
    """`module.name`, for a parameter most often: found where it is kept, which spares a tenth of a small call.

    Parametrized, pruned and sharded modules keep it elsewhere, and are asked; dynamically quantized ones
    hand it out by a method.
    """
    kept = module._parameters
    if name in kept:
        return kept[name]
    found = getattr(module, name)
    if callable(found) and not isinstance(found, Tensor):
        found = found()
    return found.dequantize() if found is not None and found.is_quantized else found


# Where torch keeps the layers that `quantize_dynamic` puts in a Linear's place.
_DYNAMICALLY_QUANTIZED = "torch.ao.nn.quantized.dynamic."
# Those of layers that are read and not called, so that whatever a forward of their own adds would be lost.
_FORWARDS = tuple(kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))


_warned: Set[str] = set()


@_backends._constant  # torch.compile calls it while it compiles, and has no break in the graph
def _warn_of_hooks(name: str) -> None:
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"a hook on {name} is not called: the fused block reads this layer's weights and does not call the layer. "
            "Put the hook on the block, or `unfuse` the model while you need it",
            RuntimeWarning,
            stacklevel=5,
        )


def _run_prehook(layer: nn.Module, name: str, key: int, hook: Callable) -> None:
    """A pre-hook that recomputes what the layer holds has no use for an input; any other one is refused."""
    arguments: Tuple[Any, ...] = ((), {}) if key in layer._forward_pre_hooks_with_kwargs else ((),)
    problem: Optional[BaseException] = None
    try:
        if hook(layer, *arguments) in (None, (), ((), {})):
            return
    except Exception as error:  # whatever it makes of having no input
        problem = error
    raise TypeError(
        f"{name} must have no forward pre-hook that looks at its input or changes it: the fused block reads this layer's "
        "weights and does not call the layer. Put the hook on the block, or `unfuse` the model while you need it"
    ) from problem


def _readable(layer: Any, name: str) -> nn.Module:
    """layer, its pre-hooks run; TypeError where its forward does more than its weight and bias say.

    Pruning and the older weight and spectral norms recompute `weight` in such a hook.
    """
    kind = type(layer)
    own = "forward" in layer.__dict__ or kind.forward not in _FORWARDS
    if own and not kind.__module__.startswith(_DYNAMICALLY_QUANTIZED):
        raise TypeError(
            f"{name} must have the forward of nn.Linear or of a convolution, got a {kind.__module__}."
            f"{kind.__name__} with its own: its weights are read and its forward is not called, so what that adds would be "
            "lost. Leave this layer out of what replaces layers (adapters, quantizers), or `unfuse` the model first"
        )
    if layer._forward_pre_hooks:
        for key, hook in layer._forward_pre_hooks.items():
            _run_prehook(layer, name, key, hook)
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        _warn_of_hooks(name)
    return layer


def _check_geometry(conv: Any, name: str) -> None:
    """What the kernels compute: stride 1, zeros around the map, as many as keep its size."""
    kernel = conv.kernel_size
    ones = (1,) * len(kernel)
    halves = tuple([k // 2 for k in kernel])
    if conv.padding == halves and conv.padding_mode == "zeros" and conv.stride == conv.dilation == ones:
        return  # as torch.nn's convolutions keep it

    def each(value: Any) -> Tuple[int, ...]:
        return (value,) * len(kernel) if isinstance(value, int) else tuple(value)

    same = conv.padding == "same" or each(conv.padding) == halves
    beside = kernel == ones or each(conv.dilation) == ones and conv.padding_mode == "zeros"
    if not same or not beside or each(conv.stride) != ones:
        raise ValueError(
            f"{name} must have stride 1, dilation 1 and zeros around the map that keep its size, got {conv}"
        )


def fx_leaf(forward: Callable) -> Callable:
    """A module's forward(x) which torch.fx records as one call: its proxies have no shape to check or to choose by."""

    @functools.wraps(forward)
    def leaf(self: nn.Module, x: Any) -> Any:
        if not isinstance(x, Proxy):
            return forward(self, x)
        tracer: Any = x.tracer
        path = tracer.path_of_module(self)
        if not path:
            raise TypeError(
                f"torch.fx records a {type(self).__name__} as one call within a model, and it must not be the "
                "model itself: trace nn.Sequential(block)"
            )
        return tracer.create_proxy("call_module", path, (x,), {})

    return leaf


def _check_dims(dims: object) -> None:
    if dims not in (1, 2, 3):
        raise ValueError(f"dims must be 1, 2 or 3, got {dims!r}")


class _Gates(nn.Module):
    """Loads the state_dict of any dialect of CBAM; `compat.convert` says how.

    Options that `config` holds are fixed when a module is made.
    """

    config: Config
    _fixed: Tuple[str, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        own = self.__dict__
        if name in self._fixed and "config" in own and (name not in own or own[name] != value):
            raise AttributeError(
                f"{name} is fixed when a {type(self).__name__} is made: make another one and load this one's state_dict"
            )
        super().__setattr__(name, value)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `nn.Module.load_state_dict`, and takes the layout of any implementation in `compat.dialects`.

        Also behind a prefix such as `module.`, or the one CBAM that fits inside a whole model's
        state_dict. Raises RuntimeError with what was found and the nearest dialect otherwise.
        """
        from .compat import convert

        return super().load_state_dict(convert.locate(self, state_dict), strict, assign)

    def _load_from_state_dict(
        self, state_dict: Dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: List[str]
    ) -> None:
        from .compat import convert

        convert.adapt(self, state_dict, prefix, lists[-1])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)


class ChannelGate(_Gates):
    """Channel gate: x * sigmoid(sum over pools of MLP(pool(x))), fused.

    With pool_types=("avg",) this is squeeze-and-excitation (Hu et al., arXiv:1709.01507).

    Args:
        channels: C of the input.
        reduction_ratio: the MLP's hidden width is channels // reduction_ratio, at least 1.
        hidden_channels: overrides that width; 0 makes the MLP a single layer (C, C).
        pool_types: any of "avg", "max", "lp", "lse".
        mlp_bias: biases in the MLP.
        light: one MLP pass on 0.5 * avg + 0.5 * max.
        ties: where the gradient of a maximum goes, "first" or "split".
        residual: adds the input to the result.
        dims: number of spatial dimensions, 1 to 3.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Shape: (N, channels, *spatial) -> the same.
    """

    _fixed: Tuple[str, ...] = ("pool_types", "light", "ties", "residual")

    def __init__(
        self,
        channels: int,
        reduction_ratio: int = 16,
        *,
        hidden_channels: Optional[int] = None,
        pool_types: Sequence[str] = ("avg", "max"),
        mlp_bias: bool = True,
        light: bool = False,
        ties: str = "first",
        residual: bool = False,
        dims: int = 2,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _checks.check_positive("channels", channels)
        _checks.check_backend(backend)
        _check_dims(dims)
        if hidden_channels is None:
            _checks.check_positive("reduction_ratio", reduction_ratio)
            hidden_channels = max(1, channels // reduction_ratio)
        elif hidden_channels != 0:
            _checks.check_positive("hidden_channels", hidden_channels)
        self.channels = channels
        self.hidden_channels = hidden_channels
        self.pool_types = _checks.pool_names(pool_types)
        self.light = bool(light)
        self.ties = ties
        self.dims = dims
        self.backend = backend
        self.config = _checks.make_config(self.pool_types, False, "max_mean", self.light, ties, residual)
        factory = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(channels, hidden_channels, bias=mlp_bias, **factory) if hidden_channels else None
        self.fc2 = nn.Linear(hidden_channels or channels, channels, bias=mlp_bias, **factory)

    def tensors(self) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        """w1, b1, w2, b2."""
        layers = self._modules
        fc1, fc2 = layers.get("fc1"), _readable(layers["fc2"], "fc2")
        second = _read(fc2, "weight"), _read(fc2, "bias")
        if fc1 is None:
            return (None, None, *second)
        _readable(fc1, "fc1")
        return (_read(fc1, "weight"), _read(fc1, "bias"), *second)

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """x (N, channels, *spatial) -> the same, in its dtype and layout; raises as `FusedCBAM.forward` does."""
        _checks.check_input(x, self.channels, self.dims)
        return functional.run(x, Parameters(*self.tensors()), self.config, None, self.backend)

    def options(self) -> str:
        """The options that `extra_repr` prints, without the channel count."""
        text = f"hidden_channels={self.hidden_channels}, pool_types={self.pool_types}"
        if self.fc2.bias is None:
            text += ", mlp_bias=False"
        if self.light:
            text += ", light=True"
        return text

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.options()}{_shared_repr(self, self.config)}"


class SpatialGate(_Gates):
    """Spatial gate: x * sigmoid(norm(conv([max over C, mean over C]))), fused.

    Args:
        kernel_size: odd size of the convolution in every spatial dimension.
        bias: bias of the convolution.
        norm: BatchNorm after the convolution.
        order: "max_mean" or "mean_max", the order of the convolution's input channels.
        light: the convolution reads one map, 0.5 * mean + 0.5 * max.
        ties: where the gradient of a maximum goes, "first" or "split".
        residual: adds the input to the result.
        dims: number of spatial dimensions, 1 to 3.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Shape: (N, C, *spatial) -> the same, for any C.
    """

    _fixed: Tuple[str, ...] = ("order", "light", "ties", "residual")

    def __init__(
        self,
        kernel_size: int = 7,
        *,
        bias: bool = False,
        norm: bool = True,
        order: str = "max_mean",
        light: bool = False,
        ties: str = "first",
        residual: bool = False,
        dims: int = 2,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        told_none = "; a SpatialGate takes any number of channels and is told none"
        _checks.check_kernel_size(kernel_size, even=told_none)
        _checks.check_backend(backend)
        _check_dims(dims)
        _checks.check_choice("order", order, tuple(cfg.SPATIAL_ORDERS))
        self.kernel_size = kernel_size
        self.order = order
        self.light = bool(light)
        self.ties = ties
        self.dims = dims
        self.backend = backend
        self.config = _checks.make_config(None, True, order, self.light, ties, residual)
        factory = {"device": device, "dtype": dtype}
        maps = 1 if self.light else 2
        self.conv = _CONV[dims](maps, 1, kernel_size, padding=kernel_size // 2, bias=bias, **factory)
        self.bn = _NORM[dims](1, momentum=0.01, **factory) if norm else None

    def tensors(self) -> Tuple[Tensor, Optional[Tensor]]:
        """conv_weight, conv_bias."""
        conv = _readable(self._modules["conv"], "conv")
        _check_geometry(conv, "conv")
        return _read(conv, "weight"), _read(conv, "bias")

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, *spatial) -> the same, in its dtype and layout; raises as `FusedCBAM.forward` does."""
        _checks.check_input(x, None, self.dims)
        p = Parameters(None, None, None, None, *self.tensors())
        return functional.run(x, p, self.config, self.bn, self.backend)

    def options(self) -> str:
        """The options that `extra_repr` prints."""
        text = f"kernel_size={self.kernel_size}"
        if self.conv.bias is not None:
            text += ", bias=True"
        if self.bn is None:
            text += ", norm=False"
        if self.order != "max_mean":
            text += f', order="{self.order}"'
        if self.light:
            text += ", light=True"
        return text

    def extra_repr(self) -> str:
        return self.options() + _shared_repr(self, self.config)


def _shared_repr(module: nn.Module, config: Config) -> str:
    text = ""
    if config.residual:
        text += ", residual=True"
    if module.ties != "first":
        text += f', ties="{module.ties}"'
    if module.dims != 2:
        text += f", dims={module.dims}"
    if module.backend != "auto":
        text += f', backend="{module.backend}"'
    return text


class FusedCBAM(_Gates):
    """CBAM as one fused operation each way, with the official implementation's defaults.

    Args:
        channels: C of the input.
        reduction_ratio: the MLP's hidden width is channels // reduction_ratio, at least 1.
        kernel_size: odd size of the spatial gate's convolution.
        hidden_channels: overrides the hidden width; 0 makes the MLP a single layer (C, C).
        pool_types: the channel pools whose MLP outputs are summed: any of "avg", "max",
            "lp" (the 2-norm over positions) and "lse" (log of the sum of exponentials).
        mlp_bias: biases in the MLP.
        spatial: False leaves the spatial gate out.
        spatial_bias: bias of the convolution.
        spatial_norm: BatchNorm after the convolution.
        residual: adds x itself at the end, as some copies of CBAM do.
        spatial_order: "max_mean" (official) or "mean_max", the convolution's input channels.
        light: timm's light variant: one MLP pass on 0.5 * avg + 0.5 * max, one spatial map.
        ties: where the gradient of a maximum goes: "first" index, or "split" evenly (timm).
        arrangement: "channel_first"; or "spatial_first" or "parallel", the paper's other two, as one op a gate.
        dims: 1 for (N, C, L), 2 for (N, C, H, W), 3 for (N, C, D, H, W).
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Shape: (N, channels, *spatial) -> the same, in the dtype and layout of the input.

    Parameters live in `channel_gate.fc1`, `channel_gate.fc2` (nn.Linear), `spatial_gate.conv`
    (nn.Conv) and `spatial_gate.bn` (nn.BatchNorm).

    Source: Woo et al., "CBAM: Convolutional Block Attention Module", arXiv:1807.06521.
    """

    _fixed: Tuple[str, ...] = ("pool_types", "spatial_order", "light", "ties", "residual")

    def __init__(
        self,
        channels: int,
        reduction_ratio: int = 16,
        kernel_size: int = 7,
        *,
        hidden_channels: Optional[int] = None,
        pool_types: Sequence[str] = ("avg", "max"),
        mlp_bias: bool = True,
        spatial: bool = True,
        spatial_bias: bool = False,
        spatial_norm: bool = True,
        residual: bool = False,
        spatial_order: str = "max_mean",
        light: bool = False,
        ties: str = "first",
        arrangement: str = "channel_first",
        dims: int = 2,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        masks.check_arrangement(arrangement, bool(spatial))
        shared: Dict[str, Any] = dict(
            light=light, ties=ties, dims=dims, backend=backend, device=device, dtype=dtype
        )
        self.channel_gate = ChannelGate(
            channels,
            reduction_ratio,
            hidden_channels=hidden_channels,
            pool_types=pool_types,
            mlp_bias=mlp_bias,
            **shared,
        )
        _checks.check_kernel_size(kernel_size, several="; pools are given as pool_types=")
        self.ties = ties
        self.config = _checks.make_config(
            self.channel_gate.pool_types, spatial, spatial_order, bool(light), ties, residual
        )
        self.spatial_gate = (
            SpatialGate(kernel_size, bias=spatial_bias, norm=spatial_norm, order=spatial_order, **shared)
            if spatial
            else None
        )
        self.channels = channels
        self.arrangement = arrangement
        self.dims = dims
        self.backend = backend

    def _arguments(self, x: Tensor):
        _checks.check_input(x, self.channels, self.dims)
        gates: Dict[str, Any] = self._modules
        mlp, gate = gates["channel_gate"].tensors(), gates.get("spatial_gate")
        if gate is None:
            return x, Parameters(*mlp), self.config, None, self.backend
        norm = gate._modules.get("bn")
        return x, Parameters(*mlp, *gate.tensors()), self.config, norm, self.backend

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """x (N, channels, *spatial) -> the same, in its dtype and layout.

        x is float32, float64, bfloat16 or float16; contiguous and channels-last are read as they are, other strides
        are copied. Parameters have x's dtype, or float32 beside a 16-bit x.

        Raises:
            TypeError, ValueError: an x or parameters that cannot be computed; nothing is computed.
            RuntimeError: a backend asked for by name that cannot run this call, and why.
        """
        if self.arrangement != "channel_first":
            return masks.arranged(self.arrangement, *self._arguments(x))
        return functional.run(*self._arguments(x))

    def attention_maps(self, x: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """Channel gate (N, C) and spatial gate (N, 1, *spatial), in (0, 1), without gradients.

        Same x as `forward`; the gates are float32 (float64 for float64). The spatial gate is None
        with `spatial=False`. The norm is called as in `forward`, hooks and all; a BatchNorm in training
        uses the batch's statistics (a SyncBatchNorm those of this rank's batch), but running statistics
        and other buffers stay as they are.
        """
        if self.arrangement != "channel_first":
            return masks.arranged_maps(self.arrangement, *self._arguments(x))
        channel, spatial = functional.maps(*self._arguments(x))
        assert channel is not None
        return channel, spatial

    def extra_repr(self) -> str:
        text = f"{self.channels}, {self.channel_gate.options()}"
        text += ", spatial=False" if self.spatial_gate is None else f", {self.spatial_gate.options()}"
        if self.arrangement != "channel_first":
            text += f', arrangement="{self.arrangement}"'
        return text + _shared_repr(self, self.config)
