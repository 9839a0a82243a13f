"""Which dialect a state_dict is in: every layout found in it, or what is nearest to it."""

from __future__ import annotations

import difflib
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from torch import Tensor

from . import dialects
from .dialects import Dialect

Components = Dict[str, Tensor]  # by layer and entry, such as "fc1.weight"


class Match(NamedTuple):
    """A dialect's keys, complete, behind a prefix of a state_dict."""

    prefix: str
    row: Dialect
    keys: Dict[str, str]  # component -> key, prefix included


def _expected_dims(row: Dialect, component: str) -> Set[int]:
    if component in ("fc1.weight", "fc2.weight"):
        return {2} if row.mlp == "linear" else {3, 4, 5}
    if component == "conv.weight":
        return {3, 4, 5}
    return {0} if component.endswith("num_batches_tracked") else {1}


def maps(row: Dialect) -> Optional[int]:
    """Input channels of the spatial convolution; the native row has either."""
    light = row.constant("light", False)
    return None if row.name == "cbam_fused" or light is None else 1 if light else 2


def match_row(row: Dialect, prefix: str, state: Mapping[str, Any]) -> Optional[Match]:
    """The keys of `row` behind `prefix`, or None where one that it must have is missing."""
    biases = (True, False) if "mlp_bias" in row.optional else (bool(row.constant("mlp_bias", True)),)
    spatials = (True, False) if "spatial" in row.optional else (True,)
    native = row.name == "cbam_fused"
    for bias in biases:
        for spatial in spatials:
            keys = {c: prefix + k for c, k in row.entries(bias, spatial)}
            wanted = {k for c, k in keys.items() if not c.endswith("num_batches_tracked")}
            if native:
                wanted -= {k for c, k in keys.items() if c.startswith(("fc1", "bn"))}
            if not all(k in state for k in wanted):
                continue
            keys = {c: k for c, k in keys.items() if k in state}
            if not all(
                isinstance(state[k], Tensor) and state[k].dim() in _expected_dims(row, c)
                for c, k in keys.items()
            ):
                continue
            conv = keys.get("conv.weight")
            if conv is not None and maps(row) not in (None, state[conv].shape[1]):
                continue
            if native and prefix + row.layers["conv"] + ".bias" in state:
                keys["conv.bias"] = prefix + row.layers["conv"] + ".bias"
            return Match(prefix, row, keys)
    return None


def detect(state: Mapping[str, Any], kind: str = "block", prefix: Optional[str] = None) -> List[Match]:
    """Every CBAM in a state_dict; with a prefix, only what lies exactly behind it."""
    found = []
    for row in dialects.TABLE:
        if row.kind.split("_")[0] != kind:
            continue
        anchor = row.layers["fc2" if "fc2" in row.layers else "conv"] + ".weight"
        if prefix is not None:
            prefixes: Iterable[str] = (prefix,)
        else:
            ends = [k for k in state if k == anchor or k.endswith("." + anchor)]
            prefixes = [k[: len(k) - len(anchor)] for k in ends]
        for p in prefixes:
            match = match_row(row, p, state)
            if match is not None:
                found.append(match)
    best: Dict[str, Match] = {}
    for match in found:
        known = best.get(match.prefix)
        if known is None or len(match.keys) > len(known.keys):
            best[match.prefix] = match
    return list(best.values())


def read(match: Match, state: Mapping[str, Any]) -> Components:
    return {c: state[k] for c, k in match.keys.items()}


def nearest(names: Sequence[str], kind: str = "block") -> Tuple[str, List[str]]:
    """The dialect whose keys are most like these names, and its keys."""

    def score(row: Dialect) -> Tuple[float, float]:
        keys = [k for _, k in row.entries(True, True)]
        tails = {k for k in keys if any(n == k or n.endswith("." + k) for n in names)}
        likeness = difflib.SequenceMatcher(None, " ".join(sorted(names)[:40]), " ".join(keys)).ratio()
        return len(tails) / len(keys), likeness

    rows = [r for r in dialects.TABLE if r.kind.split("_")[0] == kind]
    row = max(rows, key=score)
    return row.name, [k for _, k in row.entries(bool(row.constant("mlp_bias", True)), True)]


def _listing(state: Mapping[str, Any], limit: int = 12) -> str:
    lines = [f"{k} {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}" for k, v in state.items()]
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n    ".join([*lines[:limit], *more])


def unrecognised(state: Mapping[str, Any], kind: str) -> str:
    """The message for a state_dict in no known layout: what was found, and the nearest dialect."""
    name, keys = nearest(list(state), kind)
    known = ", ".join(r.name for r in dialects.TABLE if r.kind.split("_")[0] == kind)
    return (
        f"state_dict must be in a layout of {known}; got\n    {_listing(state)}\n"
        f'  nearest dialect: "{name}", with the keys\n    ' + "\n    ".join(keys)
    )
