"""The whole CUDA backend on the CPU: its ops for CPU tensors, on a device of the test's making.

tests/cuda_host.cpp has the host code of csrc/cuda over a runtime of its own, tests/cuda_module_kernels.cpp the .cu
files, which tests/simt executes. What lies between Python and the kernels is then what a GPU would get.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import List
from unittest import mock

import torch
from simt import build

import cbam_fused._ops  # noqa: F401  the schemas, before their implementations
from cbam_fused import _backends

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc" / "cuda"
TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
# Shims of LibTorch that would ask for a device, and are cuda_host.cpp's own.
RENAMED = (
    "aoti_torch_get_device_index",
    "aoti_torch_device_type_cuda",
    "aoti_torch_create_device_guard",
    "aoti_torch_delete_device_guard",
    "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
)
REASONS = {
    "there is no g++": shutil.which(build.CXX) is None,
    "there are no CUDA headers": not (TOOLKIT / "cuda_runtime.h").exists(),
    "torch is built without CUDA": torch.version.cuda is None,
}
# Why none of this compiles here, or nothing.
UNAVAILABLE = next((reason for reason, holds in REASONS.items() if holds), "")
# In the order of the kernels' DType.
DTYPES = ("float32", "float64", "float16", "bfloat16")


@dataclass
class Device:
    """What the runtime says of it: the order of `Fake` in cuda_host.cpp, and an H100.

    The library asks a device of an index once, so that one with other properties needs another index. Negative
    clusters are the error of that number.
    """

    index: int = 0
    capability: int = 90
    multiprocessors: int = 132
    shared: int = 227 << 10
    l2: int = 50 << 20
    clusters_of_8: int = 16
    clusters_of_16: int = 8
    ptx: int = 90
    launch_error: int = 0
    code_error: int = 0
    malloc_error: int = 0
    memset_error: int = 0
    object_error: int = 0
    retain_error: int = 0
    capture_broken: int = 0


def compile_host() -> Path:
    """cuda_host.cpp as a library, whose loading registers the ops of the namespace for CPU tensors."""
    torch_home = Path(torch.__file__).parent
    source = HERE / "cuda_host.cpp"
    flags = ["-std=c++17", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-Bsymbolic", "-DUSE_CUDA"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-D{name}=fake_{name}" for name in RENAMED)]
    flags += [f"-I{p}" for p in (SOURCES, torch_home / "include", TOOLKIT)]
    libraries = [f"-L{torch_home / 'lib'}", "-ltorch_cpu"]
    parts = (
        source,
        SOURCES.parent / "tensors.h",
        *sorted(SOURCES.glob("*.h")),
        *sorted(SOURCES.glob("*.cpp")),
    )
    text = "".join((torch.__version__, *flags, *libraries, *(p.read_text() for p in parts)))
    library = build.CACHE / f"cuda_host-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        build.CACHE.mkdir(parents=True, exist_ok=True)
        temporary = library.with_suffix(f".{os.getpid()}")
        subprocess.run([build.CXX, *flags, "-o", str(temporary), str(source), *libraries], check=True)
        temporary.rename(library)
    return library


def compile_kernels(dtype: str) -> Path:
    """The .cu files of a dtype as a library, unchecked: for numbers."""
    defines = [f"CBAM_DTYPE={dtype}", f"CBAM_HAS_RESIDENT={int(dtype != 'float64')}"]
    return build.build(HERE / "cuda_module_kernels.cpp", flavor="fast", defines=defines)


class Host:
    """The loaded backend: `torch.ops.cbam_fused_cuda` takes CPU tensors from here on, until the process ends."""

    def __init__(self):
        self._path = str(compile_host())
        torch.ops.load_library(self._path)
        self._lib = ctypes.CDLL(self._path)
        self._lib.fake_calls.restype = ctypes.c_char_p

    def set(self, device: Device) -> None:
        """What ops see of the machine from now on; forgets the calls."""
        values = astuple(device)
        self._lib.fake_set((ctypes.c_int * len(values))(*values))

    def calls(self) -> List[str]:
        """What was asked of the runtime since `set`."""
        return self._lib.fake_calls().decode().splitlines()

    def set_stream(self, handle: int, id: int, graph: int) -> None:
        """The current stream from now on, and the number of the graph that a capture of it fills, or 0."""
        self._lib.fake_stream(*map(ctypes.c_int64, (handle, id, graph)))

    def destroy(self, graph: int) -> None:
        """A graph and all of its instances."""
        self._lib.fake_destroy(ctypes.c_int64(graph))

    def counters(self) -> List[int]:
        """Of the last launch of the streamed tier: address, words, and whether they were all zero."""
        out = (ctypes.c_int64 * 3)()
        self._lib.fake_counters(out)
        return list(out)

    def last_error(self) -> int:
        return self._lib.fake_last_error()

    def missing_code(self) -> str:
        """What Python finds when it asks the module whether it has code for the device."""
        no_device = mock.patch.object(torch.cuda, "device", lambda index: contextlib.nullcontext())
        with no_device, mock.patch.object(_backends, "_native_file", lambda module: self._path):
            _backends._missing_code.clear()
            return _backends._cuda_missing_code(0) or ""

    def run_kernels(self, dtype: str, seed: int = 0, resident: int = 6) -> build.Library:
        """Launches of this dtype run from now on, on at most `resident` blocks together."""
        kernels = build.Library(compile_kernels(dtype))
        kernels.reset(seed, resident)
        entries = [kernels.address("launch_streamed")]
        entries.append(kernels.address("launch_resident") if dtype != "float64" else None)
        self._lib.fake_bodies(DTYPES.index(dtype), *map(ctypes.c_void_p, entries))
        return kernels
