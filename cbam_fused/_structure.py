"""What holds the learnt tensors of a module, if that is what a CBAM or one of its gates has, and nothing else."""

from __future__ import annotations

import inspect
import itertools
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch.nn as nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .compat.base import Path

_DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_NORMS = nn.modules.batchnorm._BatchNorm
# What nn.Module does that a class may do otherwise: another class in its place would show. Names with
# two underscores that are not here belong to the interpreter, or only print.
_HARMLESS = {"forward", "extra_repr", "_get_name", "_version", "dump_patches", "training", "call_super_init"}
_DUNDERS = {"__call__", "__getattr__", "__setattr__", "__delattr__", "__getstate__", "__setstate__"}
_MACHINERY = {n for n in vars(nn.Module) if not n.startswith("__")} - _HARMLESS | _DUNDERS
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
    return all(v % 2 for v in k) and same and plain


def _extent(leaf: Any) -> Tuple[int, int]:
    """Inputs and outputs of a dense layer."""
    return (
        (leaf.in_features, leaf.out_features)
        if isinstance(leaf, nn.Linear)
        else (leaf.in_channels, leaf.out_channels)
    )


def structure(module: nn.Module) -> Optional[Structure]:
    """The layers of a CBAM or of one gate, or None where the module holds anything else."""
    # Torch's own classes wrap (Sequential, DataParallel, a compiled module): what they wrap may be a CBAM.
    if _owns(module) or type(module).__module__.split(".")[0] == "torch":
        return None
    leaves = _leaves(module, 4)
    if not leaves or len(leaves) > 4:
        return None
    # A 1x1 convolution of two channels to one may be either: as many dense layers as fit together are.
    for dense in (2, 1, 0):
        found = _split(leaves[:dense], leaves[dense:]) if dense <= len(leaves) else None
        if found is not None:
            return found
    return None


def _split(dense: Sequence[Tuple[Path, Any]], rest: Sequence[Tuple[Path, Any]]) -> Optional[Structure]:
    """The structure with these layers as its MLP and the rest as its spatial gate, or None."""
    channels = None
    fc1 = fc2 = conv = bn = None
    if not all(_is_dense(m) for _, m in dense):
        return None
    if dense:
        sizes = [_extent(m) for _, m in dense]
        channels = sizes[0][0]
        if sizes[-1][1] != channels or sizes[0][1] != sizes[-1][0]:
            return None
        fc1 = dense[0][0] if len(dense) == 2 else None
        fc2 = dense[-1][0]
    maps = 0
    convs = [m for _, m in dense]
    if rest:
        if len(rest) > 2 or not _is_spatial(rest[0][1]):
            return None
        conv, maps = rest[0][0], rest[0][1].in_channels
        convs.append(rest[0][1])
        if len(rest) == 2:
            bn, norm = rest[1]
            if not isinstance(norm, _NORMS) or norm.num_features != 1:
                return None
    dims = {_CONVS[k] for m in convs if (k := _plain(m, tuple(_CONVS)))}
    if len(dims) > 1:
        return None
    kind = "block" if dense and rest else "channel" if dense else "spatial"
    return Structure(kind, channels, (fc1, fc2, conv, bn), next(iter(dims), None), maps)


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
    if module._compiled_call_impl is not None:
        raise Refusal("it is compiled by itself: fuse before compiling")
    if "forward" in module.__dict__:
        raise Refusal("its forward is replaced on the instance")
    for kind in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
        own = sorted(_MACHINERY & set(vars(kind)))
        if own:
            raise Refusal(f"{kind.__name__} has its own {own[0]}, which would not run")

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
