"""The dialects as one table: constructor, options and key map of each CBAM implementation in use."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Callable, Dict, FrozenSet, Iterator, Mapping, Optional, Sequence, Tuple

import torch.nn as nn

REQUIRED = inspect.Parameter.empty
Arguments = Mapping[str, Any]

# The learnt layers, in the order in which every implementation registers them.
LAYERS = ("fc1", "fc2", "conv", "bn")
BN_ENTRIES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Check:
    """An argument that these kernels support for some values only."""

    argument: str
    accepts: Callable[[Any], bool]
    expected: str


@dataclass(frozen=True)
class Dialect:
    """One row.

    kind: "block" (x -> x * gates), "channel" and "spatial" (one gate, x -> x * gate), "channel_mask"
        and "spatial_mask" (x -> gate; the caller multiplies).
    signature: the constructor's arguments in order, with their defaults.
    layers: path of each learnt layer in the state_dict.
    mlp: "linear" for weights (h, C), "conv" for (h, C, 1, 1).
    options: what `base.Options` takes; a callable is given the constructor's arguments.
    optional: what a state_dict of this layout may lack: "mlp_bias", "spatial".
    """

    name: str
    class_name: str
    source: str
    signature: Mapping[str, Any]
    layers: Mapping[str, str]
    options: Mapping[str, Any]
    kind: str = "block"
    mlp: str = "conv"
    optional: FrozenSet[str] = frozenset()
    checks: Tuple[Check, ...] = ()

    def bind(self, args: Sequence[Any], kwargs: Arguments) -> Dict[str, Any]:
        """The constructor's arguments by name; TypeError or ValueError where they do not fit."""
        try:
            bound = self.parameters().bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.class_name}() {error}") from None
        bound.apply_defaults()
        for check in self.checks:
            value = bound.arguments[check.argument]
            if not check.accepts(value):
                raise ValueError(f"{check.argument} must be {check.expected}, got {value!r}")
        return bound.arguments

    def parameters(self) -> inspect.Signature:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature([inspect.Parameter(n, kind, default=d) for n, d in self.signature.items()])

    def resolve(self, arguments: Arguments) -> Dict[str, Any]:
        """The options that these constructor arguments mean."""
        return {k: v(arguments) if callable(v) else v for k, v in self.options.items()}

    def constant(self, option: str, default: Any = None) -> Any:
        """An option that no constructor argument changes; None where one does."""
        value = self.options.get(option, default)
        return None if callable(value) else value

    def entries(self, mlp_bias: bool, spatial: bool) -> Iterator[Tuple[str, str]]:
        """(component, key) in state_dict order, such as ("fc1.weight", "channel.fc1.weight")."""
        for layer in LAYERS:
            path = self.layers.get(layer)
            if path is None or (layer in ("conv", "bn") and not spatial):
                continue
            if layer == "bn":
                names: Tuple[str, ...] = BN_ENTRIES
            elif layer == "conv":
                names = ("weight", "bias") if self.constant("spatial_bias", False) else ("weight",)
            else:
                names = ("weight", "bias") if mlp_bias else ("weight",)
            for name in names:
                yield f"{layer}.{name}", f"{path}.{name}"


def argument(name: str) -> Callable[[Arguments], Any]:
    return lambda a: a[name]


def floor_ratio(channels: str, ratio: str) -> Callable[[Arguments], int]:
    """int(C / r), which is C // r for integers."""

    def hidden(a: Arguments) -> int:
        width = int(a[channels] / a[ratio])
        if width < 1:
            raise ValueError(f"{channels} must be at least {ratio} = {a[ratio]}, got {a[channels]}")
        return width

    return hidden


def make_divisible(value: float, divisor: int) -> int:
    """timm's rounding: to the nearest multiple, half up, at least one multiple."""
    return max(divisor, int(value + divisor / 2) // divisor * divisor)


def rounded_ratio(a: Arguments) -> int:
    return a["rd_channels"] or make_divisible(a["channels"] * a["rd_ratio"], a["rd_divisor"])


def fixed_sixteenth(a: Arguments) -> int:
    """C // 16 whatever `ratio` says, as luuuyi's source has it."""
    if a["in_planes"] < 16:
        raise ValueError(f"in_planes must be at least 16, got {a['in_planes']}")
    return a["in_planes"] // 16


def _is_relu(value: Any) -> bool:
    return value is nn.ReLU or value == "relu"


def _is_sigmoid(value: Any) -> bool:
    return value is nn.Sigmoid or value == "sigmoid"


_RELU = Check("act_layer", _is_relu, "torch.nn.ReLU, the activation of these kernels")
_SIGMOID = Check("gate_layer", _is_sigmoid, '"sigmoid", the gate of these kernels')

_TIMM = {
    "channels": REQUIRED, "rd_ratio": 1.0 / 16, "rd_channels": None, "rd_divisor": 1, "spatial_kernel_size": 7,
    "act_layer": nn.ReLU, "gate_layer": "sigmoid", "mlp_bias": False, "device": None, "dtype": None,
}  # fmt: skip
_TIMM_LAYERS = {
    "fc1": "channel.fc1", "fc2": "channel.fc2", "conv": "spatial.conv.conv", "bn": "spatial.conv.bn",
}  # fmt: skip
_TIMM_OPTIONS = {
    "channels": argument("channels"), "hidden_channels": rounded_ratio, "mlp_bias": argument("mlp_bias"),
    "kernel_size": argument("spatial_kernel_size"), "norm": (1e-5, 0.1), "ties": "split",
    "device": argument("device"), "dtype": argument("dtype"),
}  # fmt: skip
_LUUUYI = {"in_planes": REQUIRED, "ratio": 16, "kernel_size": 7}
_LUUUYI_OPTIONS = {
    "channels": argument("in_planes"), "hidden_channels": fixed_sixteenth, "mlp_bias": False,
    "kernel_size": argument("kernel_size"), "spatial_order": "mean_max",
}  # fmt: skip
_LUUUYI_CHANNEL = {"channels": argument("in_planes"), "hidden_channels": fixed_sixteenth, "mlp_bias": False}
_LUUUYI_SPATIAL = {"kernel_size": argument("kernel_size"), "spatial_order": "mean_max"}

TABLE: Tuple[Dialect, ...] = (
    Dialect(
        "cbam_fused", "FusedCBAM", "this package", {},
        layers={"fc1": "channel_gate.fc1", "fc2": "channel_gate.fc2", "conv": "spatial_gate.conv",
                "bn": "spatial_gate.bn"},
        mlp="linear", options={}, optional=frozenset({"mlp_bias", "spatial"}),
    ),
    Dialect(
        "official", "CBAM", "Jongchan/attention-module",
        {"gate_channels": REQUIRED, "reduction_ratio": 16, "pool_types": ["avg", "max"], "no_spatial": False},
        layers={"fc1": "ChannelGate.mlp.1", "fc2": "ChannelGate.mlp.3", "conv": "SpatialGate.spatial.conv",
                "bn": "SpatialGate.spatial.bn"},
        mlp="linear", optional=frozenset({"spatial"}),
        options={"channels": argument("gate_channels"), "mlp_bias": True,
                 "hidden_channels": floor_ratio("gate_channels", "reduction_ratio"),
                 "pool_types": argument("pool_types"), "spatial": lambda a: not a["no_spatial"],
                 "norm": (1e-5, 0.01), "spatial_order": "max_mean"},
    ),
    Dialect(
        "pytorchcv", "CbamBlock", "osmr/pytorchcv", {"channels": REQUIRED, "reduction_ratio": 16},
        layers={"fc1": "ch_gate.mlp.fc1", "fc2": "ch_gate.mlp.fc2", "conv": "sp_gate.conv.conv",
                "bn": "sp_gate.conv.bn"},
        mlp="linear",
        options={"channels": argument("channels"), "mlp_bias": True,
                 "hidden_channels": floor_ratio("channels", "reduction_ratio"), "norm": (1e-5, 0.1),
                 "spatial_order": "max_mean"},
    ),
    Dialect(
        "timm", "CbamModule", "huggingface/pytorch-image-models", _TIMM, layers=_TIMM_LAYERS,
        options={**_TIMM_OPTIONS, "spatial_order": "mean_max"}, optional=frozenset({"mlp_bias"}),
        checks=(_RELU, _SIGMOID),
    ),
    Dialect(
        # Its source makes gate_layer's module but applies a sigmoid: any value is accepted.
        "timm_light", "LightCbamModule", "huggingface/pytorch-image-models", _TIMM, layers=_TIMM_LAYERS,
        options={**_TIMM_OPTIONS, "light": True}, optional=frozenset({"mlp_bias"}), checks=(_RELU,),
    ),
    Dialect(
        "ultralytics", "CBAM", "ultralytics/ultralytics", {"c1": REQUIRED, "kernel_size": 7},
        layers={"fc2": "channel_attention.fc", "conv": "spatial_attention.cv1"},
        options={"channels": argument("c1"), "hidden_channels": 0, "pool_types": ("avg",), "mlp_bias": True,
                 "kernel_size": argument("kernel_size"), "spatial_order": "mean_max"},
    ),
    Dialect(
        "luuuyi", "CBAM", "luuuyi/CBAM.PyTorch", _LUUUYI,
        layers={"fc1": "ca.fc.0", "fc2": "ca.fc.2", "conv": "sa.conv1"}, options=_LUUUYI_OPTIONS,
    ),
    Dialect(
        "luuuyi2018", "CBAM2018", "luuuyi/CBAM.PyTorch as of 2018, in most YOLO forks", _LUUUYI,
        layers={"fc1": "ca.fc1", "fc2": "ca.fc2", "conv": "sa.conv1"}, options=_LUUUYI_OPTIONS,
    ),
    Dialect(
        "bubbliiiing", "cbam_block", "bubbliiiing's YOLO repositories",
        {"channel": REQUIRED, "ratio": 8, "kernel_size": 7},
        layers={"fc1": "channelattention.fc1", "fc2": "channelattention.fc2", "conv": "spatialattention.conv1"},
        options={"channels": argument("channel"), "hidden_channels": floor_ratio("channel", "ratio"),
                 "mlp_bias": False, "kernel_size": argument("kernel_size"), "spatial_order": "mean_max"},
    ),
    Dialect(
        "xmu", "CBAMBlock", "xmu-xiaoma666/External-Attention-pytorch",
        {"channel": 512, "reduction": 16, "kernel_size": 49},
        layers={"fc1": "ca.se.0", "fc2": "ca.se.2", "conv": "sa.conv"},
        options={"channels": argument("channel"), "hidden_channels": floor_ratio("channel", "reduction"),
                 "mlp_bias": False, "kernel_size": argument("kernel_size"), "spatial_bias": True,
                 "spatial_order": "max_mean", "residual": True},
    ),
    Dialect(
        "peachypie98", "CBAM", "Peachypie98/CBAM", {"channels": REQUIRED, "r": REQUIRED},
        layers={"fc1": "cam.linear.0", "fc2": "cam.linear.2", "conv": "sam.conv"}, mlp="linear",
        options={"channels": argument("channels"), "hidden_channels": floor_ratio("channels", "r"),
                 "mlp_bias": True, "spatial_order": "max_mean", "residual": True},
    ),
    Dialect(
        "elbuco1", "CBAM", "elbuco1/CBAM",
        {"n_channels_in": REQUIRED, "reduction_ratio": REQUIRED, "kernel_size": REQUIRED},
        layers={"fc1": "channel_attention.bottleneck.0", "fc2": "channel_attention.bottleneck.2",
                "conv": "spatial_attention.conv"}, mlp="linear",
        options={"channels": argument("n_channels_in"), "mlp_bias": True,
                 "hidden_channels": floor_ratio("n_channels_in", "reduction_ratio"),
                 "kernel_size": argument("kernel_size"), "spatial_bias": True, "spatial_order": "max_mean"},
    ),
    Dialect(
        "mmyolo", "CBAM", "open-mmlab/mmyolo",
        {"in_channels": REQUIRED, "reduce_ratio": 16, "kernel_size": 7, "act_cfg": {"type": "ReLU"},
         "init_cfg": None},
        layers={"fc1": "channel_attention.fc.0.conv", "fc2": "channel_attention.fc.1.conv",
                "conv": "spatial_attention.conv.conv"},
        options={"channels": argument("in_channels"), "hidden_channels": floor_ratio("in_channels", "reduce_ratio"),
                 "mlp_bias": True, "kernel_size": argument("kernel_size"), "spatial_bias": True,
                 "spatial_order": "mean_max"},
        checks=(Check("act_cfg", lambda v: isinstance(v, dict) and v.get("type") == "ReLU",
                      "dict(type='ReLU'), the activation of these kernels"),
                Check("init_cfg", lambda v: v is None, "None: initialise the module after it is built")),
    ),
    Dialect(
        "torchvision_se", "SqueezeExcitation", "pytorch/vision",
        {"input_channels": REQUIRED, "squeeze_channels": REQUIRED, "activation": nn.ReLU,
         "scale_activation": nn.Sigmoid},
        kind="channel", layers={"fc1": "fc1", "fc2": "fc2"},
        options={"channels": argument("input_channels"), "hidden_channels": argument("squeeze_channels"),
                 "pool_types": ("avg",), "mlp_bias": True},
        checks=(Check("activation", _is_relu, "torch.nn.ReLU, the activation of these kernels"),
                Check("scale_activation", _is_sigmoid, "torch.nn.Sigmoid, the gate of these kernels")),
    ),
    Dialect(
        "timm_se", "SEModule", "huggingface/pytorch-image-models",
        {"channels": REQUIRED, "rd_ratio": 1.0 / 16, "rd_channels": None, "rd_divisor": 8, "add_maxpool": False,
         "bias": True, "act_layer": nn.ReLU, "norm_layer": None, "gate_layer": "sigmoid", "device": None,
         "dtype": None},
        kind="channel", layers={"fc1": "fc1", "fc2": "fc2"}, optional=frozenset({"mlp_bias"}),
        options={"channels": argument("channels"), "hidden_channels": rounded_ratio, "mlp_bias": argument("bias"),
                 "pool_types": lambda a: ("avg", "max") if a["add_maxpool"] else ("avg",),
                 "light": argument("add_maxpool"), "ties": "split", "device": argument("device"),
                 "dtype": argument("dtype")},
        checks=(_RELU, _SIGMOID, Check("norm_layer", lambda v: v is None, "None: these kernels have no norm there")),
    ),
    Dialect(
        "ultralytics_channel", "ChannelAttention", "ultralytics/ultralytics", {"channels": REQUIRED},
        kind="channel", layers={"fc2": "fc"},
        options={"channels": argument("channels"), "hidden_channels": 0, "pool_types": ("avg",), "mlp_bias": True},
    ),
    Dialect(
        "ultralytics_spatial", "SpatialAttention", "ultralytics/ultralytics", {"kernel_size": 7},
        kind="spatial", layers={"conv": "cv1"},
        options={"kernel_size": argument("kernel_size"), "spatial_order": "mean_max"},
    ),
    Dialect(
        "luuuyi_channel", "ChannelAttention", "luuuyi/CBAM.PyTorch", {"in_planes": REQUIRED, "ratio": 16},
        kind="channel_mask", layers={"fc1": "fc.0", "fc2": "fc.2"}, options=_LUUUYI_CHANNEL,
    ),
    Dialect(
        "luuuyi2018_channel", "ChannelAttention2018", "luuuyi/CBAM.PyTorch as of 2018, in most YOLO forks",
        {"in_planes": REQUIRED, "ratio": 16}, kind="channel_mask", layers={"fc1": "fc1", "fc2": "fc2"},
        options=_LUUUYI_CHANNEL,
    ),
    Dialect(
        "luuuyi_spatial", "SpatialAttention", "luuuyi/CBAM.PyTorch", {"kernel_size": 7}, kind="spatial_mask",
        layers={"conv": "conv1"}, options=_LUUUYI_SPATIAL,
    ),
)  # fmt: skip

BY_NAME: Dict[str, Dialect] = {row.name: row for row in TABLE}


def find(name: str, kind: Optional[str] = None) -> Dialect:
    """The row of a dialect; ValueError with the names there are."""
    if name not in BY_NAME or (kind is not None and BY_NAME[name].kind != kind):
        names = ", ".join(f'"{r.name}"' for r in TABLE if kind is None or r.kind == kind)
        raise ValueError(f"name must be one of {names}, got {name!r}")
    return BY_NAME[name]
