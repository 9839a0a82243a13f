"""The table of backends, what each can run, and the one place where a call picks its backend."""

from __future__ import annotations

import ctypes
import glob
import importlib
import math
import os
import warnings
from dataclasses import dataclass
from typing import Callable, Dict, Optional, Tuple, Union

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._config import Config

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _constant(f: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`, which would import the whole compiler: over a second."""
    f._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return f


HERE = os.path.dirname(os.path.abspath(__file__))


def _native_file(module: str) -> Optional[str]:
    found = (p for ending in ("so", "pyd") for p in glob.glob(os.path.join(HERE, f"{module}.*{ending}")))
    return min(found, default=None)


def _load_native(module: str, hint: str) -> Callable[[], Optional[str]]:
    """Loader of the stable-ABI library `module`, whose static initialisers register its kernels."""

    def load() -> Optional[str]:
        found = _native_file(module)
        if found is None:
            reason = f"the native module cbam_fused.{module} is not built: {hint}"
            if os.path.exists(os.path.join(os.path.dirname(HERE), "setup.py")):
                # An installed copy may have it, but Python found this one first.
                reason += (
                    f"; or run `make build` in {os.path.dirname(HERE)}, whose sources Python has imported"
                )
            return reason
        try:
            torch.ops.load_library(found)
        except OSError as error:
            return f"the native module cbam_fused.{module} does not load: {error}"
        return None

    return load


def _load_cuda() -> Optional[str]:
    reason = _load_native("_C_cuda", "reinstall where nvcc and a CUDA build of torch are found")()
    if reason is None and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return reason


@dataclass(frozen=True)
class Limit:
    """A size of x that a backend takes from `least` to `most`; where `dtype` is given, only x of that dtype."""

    what: str
    value: Callable[[Tensor], int]
    least: int
    most: int
    dtype: Optional[torch.dtype] = None


# What the plan of csrc/cuda/policy.h fits into 99 KiB of shared memory a block, the least of all devices;
# 32-bit positions within a sample and 32-bit tickets over the batch.
CUDA_LIMITS: Tuple[Limit, ...] = (
    Limit("spatial dimensions", lambda x: x.dim() - 2, 1, 3),
    Limit("samples", lambda x: x.shape[0], 0, 2**26),
    Limit("channels", lambda x: x.shape[1], 0, 2**14),
    Limit("channels", lambda x: x.shape[1], 0, 2**13, torch.float64),
    Limit("positions", lambda x: math.prod(x.shape[2:]), 0, 2**31 - 2),
)
CUDA_CAPABILITY = (8, 0)


@_constant
def _cuda_capability(index: int) -> Tuple[int, int]:
    return torch.cuda.get_device_capability(index)


_missing_code: Dict[int, Optional[str]] = {}


@_constant
def _cuda_missing_code(index: int) -> Optional[str]:
    """None where `_C_cuda` has code for this device, or what CUDA says. Asked once a device."""
    if index not in _missing_code:
        ask = getattr(ctypes.CDLL(_native_file("_C_cuda")), "cbam_fused_cuda_missing_code", None)
        if ask is None:
            _missing_code[index] = "it is older than this package"
        else:
            ask.restype = ctypes.c_char_p
            with torch.cuda.device(index):
                answer = ask()
            _missing_code[index] = None if answer is None else answer.decode()
    return _missing_code[index]


def _cuda_covers(x: Tensor, c: Config) -> Optional[str]:
    if x.dtype not in DTYPES:
        return f"x must have dtype float32, float64, bfloat16 or float16, got {x.dtype}"
    for limit in CUDA_LIMITS:
        if limit.dtype is None or limit.dtype == x.dtype:
            value = limit.value(x)
            if not limit.least <= value <= limit.most:
                return (
                    f"the kernels take {limit.least} to {limit.most} {limit.what}, got {value} "
                    f"(x has shape {tuple(x.shape)} and dtype {x.dtype})"
                )
    return None


def _cuda_runs_on(device: torch.device) -> Optional[str]:
    if device.type != "cuda":
        return None
    found = _cuda_capability(device.index)
    least, got = (".".join(map(str, v)) for v in (CUDA_CAPABILITY, found))
    if found < CUDA_CAPABILITY:
        return f"the kernels need compute capability {least}, {device} has {got}"
    missing = _cuda_missing_code(device.index)
    if missing is not None:
        return (
            f"cbam_fused._C_cuda was not compiled for {device} of compute capability {got} ({missing}): "
            f'rebuild with TORCH_CUDA_ARCH_LIST="{got}", or without it'
        )
    return None


def _triton_limits(x: Tensor, c: Config) -> Optional[str]:
    return None


def _load_triton() -> Optional[str]:
    try:
        kernels = importlib.import_module("cbam_fused.triton_kernels")
    except ImportError as error:
        return f"Triton does not import: {error}"
    global _triton_limits
    _triton_limits = kernels.covers
    return kernels.load()


def _triton_covers(x: Tensor, c: Config) -> Optional[str]:
    # Loaded by then; an import here would break torch.compile's graph.
    return _triton_limits(x, c)


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    load: makes the ops callable; returns None, or the reason why this machine cannot run them.
    device: the type of device whose tensors it takes.
    covers: None if it can run this call, or the limit that it breaks.
    runs_on: None if it can run on this device of the machine, or the reason why not.
    """

    name: str
    device: str
    load: Callable[[], Optional[str]]
    covers: Optional[Callable[[Tensor, Config], Optional[str]]] = None
    runs_on: Callable[[torch.device], Optional[str]] = lambda device: None


# In the order in which "auto" tries them; the reference is what is left.
TABLE: Tuple[Backend, ...] = (
    Backend("cuda", "cuda", _load_cuda, _cuda_covers, _cuda_runs_on),
    Backend("triton", "cuda", _load_triton, _triton_covers),
    Backend("cpu", "cpu", _load_native("_C", "reinstall with a C++ compiler (g++ or clang++) on the PATH")),
)
NAMES = ("auto", *(b.name for b in TABLE), "reference")

_state: Dict[str, Optional[str]] = {}


@_constant
def unavailable(name: str) -> Optional[str]:
    """None if the backend can run on this machine, or the reason why not. Loads it at first use."""
    if name not in _state:
        _state[name] = next(b for b in TABLE if b.name == name).load()
    return _state[name]


class Unavailable(str):
    """Why a backend cannot run here; false, so that `if backends()["cuda"]` asks what it seems to ask."""

    def __bool__(self) -> bool:
        return False


def backends() -> Dict[str, Union[bool, Unavailable]]:
    """Every backend by name: True if it is available on this machine, or the reason why not.

    The reason is a string, and false.
    """
    table: Dict[str, Union[bool, Unavailable]] = {}
    for b in TABLE:
        reason = unavailable(b.name)
        table[b.name] = True if reason is None else Unavailable(reason)
    table["reference"] = True
    return table


def _missing(b: Backend, device: torch.device) -> Optional[str]:
    """None if the backend runs on this device, or the reason why not."""
    reason = unavailable(b.name)
    return b.runs_on(device) if reason is None else reason


@_constant
def _say_once(device: torch.device) -> None:
    """That a device's backends are all missing, if they are, and why."""
    reasons = [_missing(b, device) for b in TABLE if b.device == device.type]
    if reasons and None not in reasons and not _state.get(f"said {device}"):
        _state[f"said {device}"] = "yes"
        warnings.warn(
            f"cbam_fused runs on the plain PyTorch reference: {'; '.join(map(str, reasons))}",
            RuntimeWarning,
            stacklevel=4,
        )


def _refusal(b: Backend, x: Tensor, c: Config) -> Optional[str]:
    device = x.device.type
    if device != b.device and not (b.name == "triton" and device == "cpu" and _triton_interprets()):
        reason = unavailable(b.name)
        return f"x must be on a {b.device} device, got {x.device}" + (
            "" if reason is None else f"; and {reason}"
        )
    reason = _missing(b, x.device)
    if reason is None and b.covers is not None:
        reason = b.covers(x, c)
    return reason


# Neither this nor forward_ad's level has a public name; where a later PyTorch has others, its own errors say
# what it cannot do.
_in_functorch = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
# What torch.jit.is_tracing calls.
_is_tracing = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)


def _plain_only() -> Optional[str]:
    """Who takes this call for its operations and not for its result, and so can do nothing with a kernel.

    torch.compile and torch.export are not among them: they know the ops by their schemas.
    """
    if _in_functorch():
        return "the transforms of torch.func have rules for plain PyTorch operations alone"
    if torch.compiler.is_compiling():
        if not torch.compiler.is_dynamo_compiling() and torch.onnx.is_in_onnx_export():
            return "ONNX has plain operations alone"
    elif _is_tracing():
        return "torch.jit.trace, and ONNX export by way of it, record plain PyTorch operations alone"
    elif getattr(forward_ad, "_current_level", -1) >= 0:
        return "forward-mode AD has rules for plain PyTorch operations alone"
    return None


def select(name: str, x: Tensor, c: Config) -> str:
    """The backend that runs this call. "auto" never fails; a name that cannot run raises RuntimeError."""
    plain_only = None if name == "reference" else _plain_only()
    if plain_only is not None:
        if name != "auto":
            raise RuntimeError(f'backend="{name}" cannot run: {plain_only}; use "auto" or "reference"')
        return "reference"
    if name == "auto":
        device = x.device.type
        for b in TABLE:
            if b.device == device and _missing(b, x.device) is None:
                if b.covers is None or b.covers(x, c) is None:
                    return b.name
        _say_once(x.device)
        return "reference"
    if name == "reference":
        return name
    for b in TABLE:
        if b.name == name:
            reason = _refusal(b, x, c)
            if reason is not None:
                raise RuntimeError(f'backend="{name}" cannot run: {reason}')
            return name
    raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
