"""Makes CBAM and FusedCBAM layers of an Ultralytics model YAML, without editing their package.

    from cbam_fused.integrations import ultralytics
    ultralytics.register()

    backbone:
      - [-1, 1, CBAM, []]                        # channels from the layer before, width-scaled
      - [-1, 1, CBAM, [256]]                     # the same, and checked: 256 before width scaling
      - [-1, 1, FusedCBAM, [null, 16, 3]]        # reduction_ratio, kernel_size
      - [-1, 1, FusedCBAM, [null, {spatial_norm: false}]]

Ultralytics' parser hands a layer that it does not know only what the YAML says. A string argument
that names one of the parser's own variables becomes that variable, though; so `register` wraps the
parser and puts `ch`, `f`, `width` and `max_channels` before the arguments of these two layers.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Dict, List, Sequence, Tuple

import torch.nn as nn

from ..compat.ultralytics import CBAM as UltralyticsCBAM
from ..module import FusedCBAM as Module

_PARSER = ("ch", "f", "width", "max_channels")
_ROUND = 8  # to what Ultralytics rounds a scaled width


def _scaled(channels: int, width: float, limit: float) -> int:
    return math.ceil(min(channels, limit) * width / _ROUND) * _ROUND


def _split(args: Sequence[Any]) -> Tuple[Any, List[Any], Dict[str, Any]]:
    """(channels or None, positional, keywords) of a YAML row's arguments."""
    rest = list(args)
    keywords = rest.pop() if rest and isinstance(rest[-1], dict) else {}
    channels = rest.pop(0) if rest else None
    return channels, rest, keywords


def _make(kind: type, ch: Any, f: Any, width: Any, limit: Any, args: Sequence[Any]) -> nn.Module:
    name = kind.__name__
    if not isinstance(ch, list):
        raise RuntimeError(f"{name}: this version of Ultralytics keeps no list `ch` of channels, got {ch!r}")
    channels, rest, keywords = _split(args)
    if channels is not None and channels != ch[f] and _scaled(channels, width, limit) != ch[f]:
        raise ValueError(
            f"{name}: channels must be {ch[f]}, those of layer {f}, or what scales to it by width {width}; "
            f"got {channels} (leave it out, or write null)"
        )
    return kind(ch[f], *rest, **keywords)


class CBAM(nn.Module):
    """The YAML layer CBAM: makes a `cbam_fused.compat.ultralytics.CBAM` of the right channel count."""

    def __new__(cls, ch: Any, f: Any, width: Any, limit: Any, *args: Any) -> nn.Module:  # type: ignore[misc]
        return _make(UltralyticsCBAM, ch, f, width, limit, args)


class FusedCBAM(nn.Module):
    """The YAML layer FusedCBAM: makes a `cbam_fused.FusedCBAM` of the right channel count."""

    def __new__(cls, ch: Any, f: Any, width: Any, limit: Any, *args: Any) -> nn.Module:  # type: ignore[misc]
        return _make(Module, ch, f, width, limit, args)


LAYERS = {"CBAM": CBAM, "FusedCBAM": FusedCBAM}


def _with_parser_variables(row: Sequence[Any]) -> List[Any]:
    row = list(row)
    if len(row) == 4 and row[2] in LAYERS:
        if not isinstance(row[0], int):
            raise ValueError(f"{row[2]}: `from` must be one layer, got {row[0]!r}")
        row[3] = [*_PARSER, *(row[3] or [])]
    return row


def register() -> None:
    """Makes `CBAM` and `FusedCBAM` usable in every model YAML that Ultralytics parses from now on.

    Calling it again changes nothing. Raises ImportError where Ultralytics is not installed.
    """
    from ultralytics.nn import tasks

    if getattr(tasks.parse_model, "_cbam_fused", None) is not None:
        return
    plain = tasks.parse_model

    @functools.wraps(plain)
    def parse_model(d: Dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        parts = {part: [_with_parser_variables(row) for row in d[part]] for part in ("backbone", "head")}
        return plain({**d, **parts}, *args, **kwargs)

    saved = {name: getattr(tasks, name) for name in LAYERS if hasattr(tasks, name)}
    parse_model._cbam_fused = (plain, saved)  # type: ignore[attr-defined]
    tasks.parse_model = parse_model
    for name, layer in LAYERS.items():
        setattr(tasks, name, layer)


def unregister() -> None:
    """Puts Ultralytics' parser back as it was; nothing happens where `register` was not called."""
    from ultralytics.nn import tasks

    state = getattr(tasks.parse_model, "_cbam_fused", None)
    if state is None:
        return
    tasks.parse_model, saved = state
    for name in LAYERS:
        delattr(tasks, name)
        if name in saved:
            setattr(tasks, name, saved[name])
