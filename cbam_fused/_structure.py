"""What holds the learnt tensors of a module, if that is what a CBAM or one of its gates has, and nothing else."""

from __future__ import annotations

import inspect
import itertools
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .compat.base import Path

_DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_NORMS = nn.modules.batchnorm._BatchNorm
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Refusal(Exception):
    """Why a module that looks like a CBAM is left as it is."""


class GateOnly(Refusal):
    """It computes a gate and leaves the product to its caller."""


class Structure(NamedTuple):
    kind: str  # "block", "channel" or "spatial"
    channels: Optional[int]
    paths: Tuple[Optional[Path], Optional[Path], Optional[Path], Optional[Path]]
    dims: Optional[int]  # None where the layers do not tell
    maps: int  # input channels of the spatial convolution


def _plain(leaf: nn.Module, kinds: Tuple[Any, ...]) -> Any:
    """The kind of a layer that computes exactly what torch.nn's does, parametrised or not."""
    for kind in kinds:
        if isinstance(leaf, kind) and type(leaf).forward is kind.forward:  # type: ignore[attr-defined]
            if getattr(type(leaf), "_conv_forward", None) is getattr(kind, "_conv_forward", None):
                return kind
    return None


def _owns(module: nn.Module) -> bool:
    tensors = itertools.chain(module._parameters.values(), module._buffers.values())
    return any(t is not None for t in tensors)


def _leaves(module: nn.Module, limit: int) -> List[Tuple[Path, nn.Module]]:
    """Outermost submodules that hold tensors, at most limit + 1 of them."""
    found: List[Tuple[Path, nn.Module]] = []

    def walk(node: nn.Module, path: Path) -> None:
        if len(found) > limit:
            return
        if path and (_owns(node) or isinstance(node, (*_DENSE, _NORMS))):
            found.append((path, node))
            return
        for name, child in node._modules.items():
            if child is not None:
                walk(child, (*path, name))

    walk(module, ())
    return found


def _is_dense(leaf: Any) -> bool:
    kind = _plain(leaf, _DENSE)
    if kind is None:
        return False
    if kind is nn.Linear:
        return True
    ones = (leaf.kernel_size, leaf.stride, leaf.dilation)
    return all(v == 1 for t in ones for v in t) and not any(leaf.padding) and leaf.groups == 1


def _is_spatial(leaf: Any) -> bool:
    kind = _plain(leaf, tuple(_CONVS))
    if kind is None or leaf.out_channels != 1 or leaf.in_channels not in (1, 2) or leaf.groups != 1:
        return False
    k = leaf.kernel_size
    same = leaf.padding == "same" or leaf.padding == tuple(v // 2 for v in k)
    plain = all(v == 1 for v in (*leaf.stride, *leaf.dilation)) and leaf.padding_mode == "zeros"
    return min(k) > 1 and all(v % 2 for v in k) and same and plain


def _extent(leaf: Any) -> Tuple[int, int]:
    """Inputs and outputs of a dense layer."""
    return (
        (leaf.in_features, leaf.out_features)
        if isinstance(leaf, nn.Linear)
        else (leaf.in_channels, leaf.out_channels)
    )


def structure(module: nn.Module) -> Optional[Structure]:
    """The layers of a CBAM or of one gate, or None where the module holds anything else."""
    if _owns(module) or isinstance(module, (*_DENSE, _NORMS, nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return None
    leaves = _leaves(module, 4)
    if not leaves or len(leaves) > 4:
        return None
    paths = [p for p, _ in leaves]
    dense = [i for i, (_, m) in enumerate(leaves) if _is_dense(m)]
    rest = [i for i in range(len(leaves)) if i not in dense]
    if len(dense) > 2 or dense != list(range(len(dense))):
        return None
    channels = None
    mlp: List[Optional[Path]] = [None, None]
    if dense:
        sizes = [_extent(leaves[i][1]) for i in dense]
        channels = sizes[0][0]
        if sizes[-1][1] != channels or sizes[0][1] != sizes[-1][0]:
            return None
        mlp = [paths[0] if len(dense) == 2 else None, paths[dense[-1]]]
    conv = bn = None
    maps = 0
    dims = {_CONVS[k] for i in dense if (k := _plain(leaves[i][1], tuple(_CONVS)))}
    if rest:
        if len(rest) > 2 or not _is_spatial(leaves[rest[0]][1]):
            return None
        layer: Any = leaves[rest[0]][1]
        conv, maps = paths[rest[0]], layer.in_channels
        dims.add(_CONVS[_plain(layer, tuple(_CONVS))])
        if len(rest) == 2:
            norm = leaves[rest[1]][1]
            if not isinstance(norm, _NORMS) or norm.num_features != 1:
                return None
            bn = paths[rest[1]]
    if len(dims) > 1:
        return None
    kind = "block" if dense and rest else "channel" if dense else "spatial"
    return Structure(kind, channels, (mlp[0], mlp[1], conv, bn), next(iter(dims), None), maps)  # type: ignore[arg-type]


def at(module: nn.Module, path: Path) -> nn.Module:
    for name in path:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def known_prehook(hook: Any) -> bool:
    return isinstance(hook, (prune.BasePruningMethod, WeightNorm, SpectralNorm))


def check_children(module: nn.Module, s: Structure) -> None:
    """Raises Refusal for what the fused path would skip: other activations, dropout, inner hooks."""
    leaves = {id(at(module, p)): p for p in s.paths if p is not None}
    norm = id(at(module, s.paths[3])) if s.paths[3] else None
    if "forward" in module.__dict__ or module._compiled_call_impl is not None:
        raise Refusal("its forward is replaced on the instance")
    if isinstance(module, torch.jit.ScriptModule):
        raise Refusal("it is a ScriptModule")

    def walk(node: nn.Module, path: Path) -> None:
        name = ".".join(path)
        if path and id(node) != norm:
            for table in HOOKS:
                for hook in getattr(node, table).values():
                    if not (table == "_forward_pre_hooks" and id(node) in leaves and known_prehook(hook)):
                        raise Refusal(f"a hook on {name} would not run")
        if id(node) in leaves:
            return
        home = type(node).__module__
        if home.startswith("torch.nn.modules.") and not isinstance(
            node, (nn.ReLU, nn.Sigmoid, nn.Identity, nn.Flatten, nn.Sequential, nn.ModuleList)
        ):
            if home.rsplit(".", 1)[1] not in ("pooling",):
                raise Refusal(f"{name} is a {type(node).__name__}, which the fused path does not have")
        for child_name, child in node._modules.items():
            if child is not None:
                walk(child, (*path, child_name))

    walk(module, ())
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(parameters) != 1 or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):  # fmt: skip
        raise Refusal("its forward takes more than one tensor")
