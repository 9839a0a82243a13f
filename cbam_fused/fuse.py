"""fuse and unfuse: run every CBAM of an existing model on the fused kernels, and back."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import List, NamedTuple, Tuple, Union

import torch
import torch.nn as nn

from . import _checks
from ._recognise import become, recognise
from ._structure import GateOnly, Refusal, structure
from .compat.base import BASES, describe
from .module import ChannelGate, FusedCBAM, SpatialGate

# Names of classes whose owners would ask why they were left.
_LIKELY = re.compile(
    r"cbam|(channel|spatial)_?(att|gate)|squeeze_?ex|se_?module|^se(block|layer|attention)?$", re.I
)


class Swapped(NamedTuple):
    """A module that changed: where, from which class, to which, and how it runs."""

    name: str
    source: str
    target: str
    options: str


class Left(NamedTuple):
    """A module that stayed as it was, and why."""

    name: str
    source: str
    reason: str


@dataclass
class Report:
    """What `fuse` or `unfuse` did; prints as a table."""

    verb: str = "fused"
    swapped: List[Swapped] = field(default_factory=list)
    left: List[Left] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.verb} {len(self.swapped)}, left {len(self.left)}"]
        if not self.swapped and not self.left:
            lines[0] += ": " + (
                "nothing in it looks like a CBAM" if self.verb == "fused" else "nothing in it is fused"
            )
        rows = [(s.name or "(model)", f"{s.source} -> {s.target}", s.options) for s in self.swapped]
        rows += [(r.name or "(model)", f"{r.source} left", r.reason) for r in self.left]
        widths = [max((len(r[i]) for r in rows), default=0) for i in (0, 1)]
        lines += [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        return "\n".join(lines)


def _class_name(kind: type) -> str:
    """Package and class, such as timm.CbamModule; of a layout that has no class of its own, what it is."""
    if kind in BASES.values():
        kind = next(k for k in kind.__mro__ if k in (FusedCBAM, ChannelGate, SpatialGate))
        return f"cbam_fused.{kind.__name__}"
    package = kind.__module__.split(".")
    short = ".".join(package[:3]) if package[0] == "cbam_fused" else package[0]
    return f"{short}.{kind.__qualname__.split('.')[-1]}"


def fuse(model: nn.Module, *, backend: str = "auto") -> Report:
    """Makes every CBAM, squeeze-and-excitation and spatial gate that it recognises in `model` run fused.

    In place: a recognised module changes its class and nothing else. It is the same object with the
    same layers and the same parameters under the same names, so an optimiser made before, hooks,
    device, dtype, mode, requires_grad and state_dicts stay as they are. A module is recognised by its
    structure, whatever its names, and changes only after a copy of it, with random weights in
    float64, gave the same outputs, gradients and running statistics as FusedCBAM in eval and in
    training.

    Args:
        model: any module; it may itself be a CBAM.
        backend: what the fused modules run on, "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A `Report`, which prints as a table: `swapped`, a list of (name, source, target, options), and `left`, what looks
        like a CBAM but stayed, a list of (name, source, reason).

    Raises:
        TypeError: `model` is no nn.Module. ValueError: an unknown backend.
    """
    _check_model(model)
    _checks.check_backend(backend)
    report = Report()
    seen = set()

    def walk(node: nn.Module, name: str) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        done, reason = _try(node, name, backend, report)
        if done:
            return
        if isinstance(reason, Refusal):
            report.left.append(Left(name, _class_name(type(node)), str(reason)))
        before = len(report.swapped) + len(report.left)
        for child_name, child in list(node._modules.items()):
            if child is not None:
                walk(child, f"{name}.{child_name}" if name else child_name)
        if isinstance(reason, str) and len(report.swapped) + len(report.left) == before:
            report.left.append(Left(name, _class_name(type(node)), reason))

    walk(model, "")
    return report


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _try(node: nn.Module, name: str, backend: str, report: Report) -> Tuple[bool, Union[None, str, Refusal]]:
    """(swapped or fused already, why it was left if its owner would ask).

    A string gives way to what is said about the module's children, a Refusal does not.
    """
    source = type(node)
    if isinstance(node, torch.jit.ScriptModule):
        scripted = bool(_LIKELY.search(getattr(node, "original_name", "")))
        return False, "it is a ScriptModule: fuse before scripting" if scripted else None
    if isinstance(node, (FusedCBAM, ChannelGate, SpatialGate)):
        own = f', with backend="{node.backend}"' if node.backend != backend else ""
        report.left.append(Left(name, _class_name(source), f"it runs fused already{own}"))
        return True, None
    likely = bool(_LIKELY.search(source.__name__))
    found = structure(node)
    if found is None:
        return False, "its layers are not those of a CBAM" if likely else None
    try:
        spec = recognise(node, found, backend)
    except Refusal as refusal:
        told = likely or found.kind == "block" or isinstance(refusal, GateOnly)
        return False, refusal if told else None
    become(node, spec, found.kind)
    report.swapped.append(
        Swapped(
            name,
            _class_name(source),
            _class_name(type(node)),
            describe(spec.config, isinstance(node, FusedCBAM)),
        )
    )
    return True, None


def unfuse(model: nn.Module) -> Report:
    """Gives every module that `fuse` changed its class back, in place, with its state as it is now.

    Raises TypeError where `model` is no nn.Module. The report names what was built as a fused module
    and so has no class to go back to.
    """
    _check_model(model)
    report = Report("unfused")
    for name, module in model.named_modules():
        if not isinstance(module, (FusedCBAM, ChannelGate, SpatialGate)):
            continue
        spec = getattr(module, "_cbam", None)
        if spec is None or spec.original is None:
            if not any(name.startswith(r.name + ".") for r in report.left):
                report.left.append(Left(name, _class_name(type(module)), "it was built as a fused module"))
            continue
        fused = type(module)
        del module._cbam
        module.__class__ = spec.original
        report.swapped.append(Swapped(name, _class_name(fused), _class_name(spec.original), ""))
    return report
