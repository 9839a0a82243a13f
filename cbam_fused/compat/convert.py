"""Converts state_dicts between dialects: which one a state_dict is in, and one layout to another.

Converting renames, reshapes between Linear (h, C) and 1x1 convolution (h, C, 1, 1), swaps the
spatial convolution's two inputs where the orders differ, and writes a missing bias as zero.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from .. import _config as cfg
from .._config import Config
from ..module import ChannelGate, FusedCBAM
from . import dialects
from .dialects import Dialect
from .layouts import Components, detect, maps, read, unrecognised

ORDERS = {cfg.SPATIAL_MAX_MEAN: "max_mean", cfg.SPATIAL_MEAN_MAX: "mean_max"}


class Layout(NamedTuple):
    """Where and how a module keeps what it has learnt."""

    kind: str
    paths: Dict[str, str]  # layer -> path
    config: Config
    leaves: Dict[str, nn.Module]
    arrangement: str


def _kind(module: nn.Module) -> str:
    if isinstance(module, FusedCBAM):
        return "block"
    return "channel" if isinstance(module, ChannelGate) else "spatial"


def layout_of(module: nn.Module) -> Layout:
    """Layout of a FusedCBAM, ChannelGate or SpatialGate, dialect classes included."""
    spec = getattr(module, "_cbam", None)
    if spec is not None:
        paths = {n: ".".join(p) for n, p in zip(dialects.LAYERS, spec.paths) if p is not None}
    elif isinstance(module, FusedCBAM):
        paths = dict(dialects.find("cbam_fused").layers)
    else:
        paths = {n: n for n in dialects.LAYERS}
    leaves = {}
    for name, path in paths.items():
        node: Any = module
        for part in path.split("."):
            node = None if node is None else node._modules.get(part)
        if node is not None:
            leaves[name] = node
    arrangement = getattr(module, "arrangement", "channel_first")
    return Layout(_kind(module), {n: paths[n] for n in leaves}, module.config, leaves, arrangement)  # type: ignore[arg-type]


def components_of(layout: Layout) -> Components:
    """The learnt tensors as they act (pruning and parametrisations applied), detached, not copied."""
    found: Components = {}
    for name, leaf in layout.leaves.items():
        entries = dialects.BN_ENTRIES if name == "bn" else ("weight", "bias")
        for entry in entries:
            value = getattr(leaf, entry, None)
            if value is not None:
                found[f"{name}.{entry}"] = value.detach()
    return found


def _dense_shape(t: Tensor) -> Tuple[int, ...]:
    return tuple(t.shape[:2])


def misfit(layout: Layout, c: Components) -> Optional[str]:
    """Why these components cannot be what a module of this layout computes, or None."""
    own = components_of(layout)
    for name, target in own.items():
        weight = name in ("fc1.weight", "fc2.weight")
        if name not in c:
            if name in ("fc1.bias", "fc2.bias", "conv.bias", "bn.num_batches_tracked"):
                continue
            return f"{name} of this module has shape {tuple(target.shape)}, the state_dict has none"
        wanted, got = (_dense_shape(t) if weight else tuple(t.shape) for t in (target, c[name]))
        if wanted != got:
            return f"{name} of this module has shape {wanted}, the state_dict's is {got}"
    for name, value in c.items():
        if name in own or name.endswith("num_batches_tracked"):
            continue
        if name.endswith("bias") and not name.startswith("bn") and not value.is_meta and not value.any():
            continue
        return f"the state_dict has {name} {tuple(value.shape)}, this module has none"
    return None


def _reorder(c: Components, source: Optional[str], target: Optional[str]) -> Components:
    if source is None or target is None or source == target or "conv.weight" not in c:
        return c
    return {**c, "conv.weight": c["conv.weight"].flip(1)}


def _fit(value: Tensor, shape: torch.Size, name: str) -> Tensor:
    return value.reshape(shape) if name in ("fc1.weight", "fc2.weight") else value


def own_state(layout: Layout, c: Components, source: Optional[str], prefix: str) -> Dict[str, Tensor]:
    """The components under this module's own keys."""
    c = _reorder(c, source, ORDERS.get(layout.config.spatial))
    state = {}
    for name, target in components_of(layout).items():
        layer, entry = name.split(".")
        if name in c:
            value = _fit(c[name], target.shape, name)
        elif name.endswith("num_batches_tracked"):
            continue
        else:
            value = torch.zeros_like(
                target, device=c["fc2.weight" if "fc2.weight" in c else "conv.weight"].device
            )
        state[f"{prefix}{layout.paths[layer]}.{entry}"] = value
    return state


def _warn_of_options(row: Dialect, layout: Layout) -> None:
    """Options that a state_dict cannot carry, where the dialect's differ from the module's."""
    differ = []
    residual = row.constant("residual", False)
    if row.name != "cbam_fused" and residual is not None and residual != layout.config.residual:
        differ.append(f"residual={residual}")
    pools = row.constant("pool_types", ("avg", "max"))
    have = tuple(n for n, bit in cfg.POOL_BITS.items() if layout.config.pools & bit)
    if row.name != "cbam_fused" and layout.config.pools and pools is not None and set(pools) != set(have):
        differ.append(f"pool_types={tuple(pools)}")
    if differ:
        warnings.warn(
            f'the state_dict is in the layout of "{row.name}", whose block has {", ".join(differ)}; this module '
            "has not: build it with those options for the same numbers",
            UserWarning,
            stacklevel=6,
        )


def adapt(module: nn.Module, state: Dict[str, Any], prefix: str, errors: List[str]) -> None:
    """Rewrites, in place, another dialect's entries behind `prefix` to the module's own keys.

    What it does not recognise it leaves with a warning: torch lists the missing and unexpected keys,
    and does not tell a submodule whether the load is strict.
    """
    found = {k: v for k, v in state.items() if k.startswith(prefix)}
    if not found:
        return
    layout = layout_of(module)
    own = components_of(layout)
    keys = {f"{prefix}{layout.paths[n.split('.')[0]]}.{n.split('.')[1]}": t for n, t in own.items()}
    shared = [k for k in keys if k in found]
    if shared and all(not isinstance(found[k], Tensor) or found[k].shape == keys[k].shape for k in shared):
        return
    matches = detect(found, layout.kind, prefix)
    if not matches:
        parametrised = {prefix + k for k in module.state_dict()} & set(found)
        if not shared and not parametrised:
            warnings.warn(unrecognised(found, layout.kind), UserWarning, stacklevel=6)
        return
    match = matches[0]
    c = read(match, state)
    reason = misfit(layout, c)
    if reason is None and match.row.name == "cbam_fused" and layout.config.spatial in ORDERS:
        reason = "does not tell its spatial_order: write it with to_dialect(module, name) instead"
    if reason is not None:
        if not shared:
            errors.append(
                f'the state_dict behind "{prefix}" is in the layout of "{match.row.name}", but {reason}'
            )
        return
    _warn_of_options(match.row, layout)
    for key in match.keys.values():
        del state[key]
    state.update(own_state(layout, c, match.row.constant("spatial_order"), prefix))


def locate(module: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a state_dict that is meant for this module, itself the root of the load.

    A state_dict with the module's own keys, or with another dialect's at its root, is returned as it
    is. Otherwise the one CBAM in it that fits (behind `module.`, or inside a whole model) is.
    """
    kind = _kind(module)
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state_dict must be a mapping, got {type(state).__name__}; torch.load reads one from a file"
        )
    if not state or any(k in state for k in module.state_dict()) or detect(state, kind, ""):
        return state
    inner = [
        k
        for k, v in state.items()
        if isinstance(v, Mapping) and any(isinstance(t, Tensor) for t in v.values())
    ]
    if inner:
        raise RuntimeError(
            f"{type(module).__name__}.load_state_dict: state_dict must hold tensors, and this checkpoint has them under "
            f"{' or '.join(map(repr, inner))}: load that entry"
        )
    layout = layout_of(module)
    matches = detect(state, kind)
    if not matches:
        raise RuntimeError(f"{type(module).__name__}.load_state_dict: {unrecognised(state, kind)}")
    reasons = [misfit(layout, read(m, state)) for m in matches]
    fitting = [m for m, reason in zip(matches, reasons) if reason is None]
    if len(fitting) == 1:
        match = fitting[0]
        chosen: "OrderedDict[str, Any]" = OrderedDict(
            (k[len(match.prefix) :], state[k]) for k in match.keys.values()
        )
        return chosen
    if fitting:
        names = "\n    ".join(f'"{m.prefix}" ({m.row.name})' for m in fitting)
        raise RuntimeError(
            f"{type(module).__name__}.load_state_dict: state_dict must hold one CBAM that fits, got {len(fitting)}; "
            f"pass the entries behind one of\n    {names}"
        )
    names = "\n    ".join(f'"{m.prefix}" ({m.row.name}): {reason}' for m, reason in zip(matches, reasons))
    raise RuntimeError(
        f"{type(module).__name__}.load_state_dict: no CBAM of the state_dict fits\n    {names}"
    )


def _cannot(row: Dialect, layout: Layout, c: Components) -> Optional[str]:
    """Why the dialect's block cannot compute what this module does, or None."""
    if row.name == "cbam_fused":
        return None
    if layout.arrangement != "channel_first":
        return f'it runs the channel gate first, this module has arrangement="{layout.arrangement}"'
    spatial = layout.config.spatial != cfg.SPATIAL_NONE
    light = layout.config.spatial == cfg.SPATIAL_BLEND
    if not spatial and "spatial" not in row.optional:
        return "it has a spatial gate, this module has none"
    if spatial and light != (maps(row) == 1):
        return "its spatial convolution reads " + ("two maps" if light else "one map")
    if spatial and ("bn" in row.layers) != ("bn.weight" in c):
        return (
            "it has "
            + ("a" if "bn" in row.layers else "no")
            + " BatchNorm, this module has "
            + ("one" if "bn.weight" in c else "none")
        )
    if ("fc1" in row.layers) != ("fc1.weight" in c):
        return "its MLP has " + ("two layers" if "fc1" in row.layers else "one layer")
    residual = row.constant("residual", False)
    if residual is not None and residual != layout.config.residual:
        return f"it has residual={residual}, this module has residual={layout.config.residual}"
    pools = row.constant("pool_types", ("avg", "max"))
    have = tuple(n for n, bit in cfg.POOL_BITS.items() if layout.config.pools & bit)
    if pools is not None and set(pools) != set(have):
        return f"it has pool_types={tuple(pools)}, this module has pool_types={have}"
    for name in ("fc1.bias", "fc2.bias", "conv.bias"):
        takes = name.startswith("conv") and row.constant("spatial_bias", False)
        takes = takes or (
            not name.startswith("conv") and ("mlp_bias" in row.optional or row.constant("mlp_bias", True))
        )
        if name in c and not takes and bool(c[name].any()):
            return f"it has no {name}, this module's is not zero"
    return None


def _written(module: nn.Module, row: Dialect) -> Dict[str, Tensor]:
    layout = layout_of(module)
    c = components_of(layout)
    reason = _cannot(row, layout, c)
    if reason is not None:
        raise ValueError(f'{type(module).__name__} has no exact form in the layout of "{row.name}": {reason}')
    target = layout.config.spatial if row.name == "cbam_fused" else None
    order = ORDERS.get(target) if target is not None else row.constant("spatial_order")
    c = _reorder(c, ORDERS.get(layout.config.spatial), order)
    optional = "mlp_bias" in row.optional
    bias = ("fc2.bias" in c) if optional else bool(row.constant("mlp_bias", True))
    state = {}
    dims: Any = c["conv.weight"].dim() - 2 if "conv.weight" in c else module.dims
    for name, key in row.entries(bias, layout.config.spatial != cfg.SPATIAL_NONE):
        if row.name == "cbam_fused" and name not in c:
            continue
        if name.endswith("weight") and name.startswith("fc"):
            value = c[name].flatten(1)
            state[key] = value if row.mlp == "linear" else value.reshape(*value.shape, *([1] * dims))
        elif name in c:
            state[key] = c[name]
        else:
            rows = c["fc1.weight"].shape[0] if name == "fc1.bias" else 1 if name == "conv.bias" else None
            state[key] = c["fc2.weight"].new_zeros(rows if rows is not None else c["fc2.weight"].shape[0])
    if row.name == "cbam_fused" and "conv.bias" in c:
        state[f"{row.layers['conv']}.bias"] = c["conv.bias"]
    return state


def to_dialect(module: nn.Module, name: str) -> "OrderedDict[str, Tensor]":
    """The state_dict of `module` with every FusedCBAM in it in the layout of the dialect `name`.

    The tensors share memory with the module's, as those of `state_dict()` do, except a convolution
    whose inputs change places and a bias that is written as zero.

    Raises:
        ValueError: an unknown name; no FusedCBAM in `module`; or a FusedCBAM with something (a
            BatchNorm, a bias that is not zero, a residual) that the dialect has not.
    """
    row = dialects.find(name, "block")
    state = OrderedDict(module.state_dict())
    found = {
        p + "." if p else "": m
        for p, m in module.named_modules(remove_duplicate=False)
        if isinstance(m, FusedCBAM)
    }
    if not found:
        raise ValueError(f"module must be or hold a FusedCBAM, got {type(module).__name__} with none")
    written: "OrderedDict[str, Tensor]" = OrderedDict()
    done: Set[str] = set()
    for key, value in state.items():
        prefix = next((p for p in found if key.startswith(p)), None)
        if prefix is None:
            written[key] = value
        elif prefix not in done:
            done.add(prefix)
            for k, v in _written(found[prefix], row).items():
                written[prefix + k] = v
    return written
