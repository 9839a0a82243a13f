"""Compile a driver that includes kernel sources for the host, and call it with numpy arrays.

Flavours:
    checked  every load and store is checked (bounds, alignment, unwritten values, races) and counted
    asan     AddressSanitizer and UBSan; must run in a process that `sanitized_environment` describes
    fast     neither: for comparing numbers over many shapes
    portable as fast, with the stack switch of machines other than x86-64
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = Path(os.environ.get("SIMT_CACHE", ROOT / "build" / "simt"))
CXX = os.environ.get("SIMT_CXX", "g++")

_COMMON = tuple(
    "-std=c++20 -fPIC -g1 -fvisibility=hidden -ffp-contract=off -Wall -Wno-unknown-pragmas".split()
)
_ASAN = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# Only compiled with -fsanitize=thread, never linked: the hooks it calls are the runtime's.
_HOOKS = (
    "-fsanitize=thread,alignment,bounds",
    "--param=tsan-instrument-func-entry-exit=0",
    "--param=tsan-distinguish-volatile=1",
)
FLAGS = {
    "checked": {"driver": ("-O1", *_HOOKS), "runtime": ("-O2",), "link": ()},
    "asan": {"driver": ("-O1", *_ASAN), "runtime": ("-O1", "-fsanitize=address"), "link": _ASAN},
    "fast": {"driver": ("-O2",), "runtime": ("-O2",), "link": ()},
    "portable": {"driver": ("-O0",), "runtime": ("-O0", "-DSIMT_UCONTEXT"), "link": ()},
}
READ_ONLY, UNWRITTEN = 1, 2


class SimtError(RuntimeError):
    """A kernel did something wrong: the message names the kernel, block, thread, line and reason."""


def default_flavor() -> str:
    """The flavour that `SIMT_FLAVOR` asks for, else "checked"."""
    return os.environ.get("SIMT_FLAVOR", "checked")


@functools.cache
def _compiler_version() -> str:
    return _output(CXX, "--version").splitlines()[0]


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _content(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _dependencies(sources: Sequence[Path], flags: Sequence[str]) -> dict[str, str]:
    # System headers are left out: the compiler's version stands for them.
    out = subprocess.run([CXX, *flags, "-MM", *map(str, sources)], capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"{sources[0].name} does not compile for the host:\n{out.stderr}")
    words = out.stdout.replace("\\\n", " ").split()
    return {w: _content(w) for w in sorted(set(words)) if not w.endswith(":")}


def _compile(sources: Sequence[Path], output_stem: str, flags: Sequence[str], link: Sequence[str]) -> Path:
    """Builds one shared library, unless one of the same content is there."""
    folder = CACHE / f"{output_stem}-{_digest(_compiler_version(), *map(str, sources), *flags, *link)}"
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "stamp.json"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists():
            known = json.loads(stamp.read_text())
            if Path(known["library"]).exists() and all(
                Path(p).exists() and _content(p) == d for p, d in known["dependencies"].items()
            ):
                return Path(known["library"])
        dependencies = _dependencies(sources, flags)
        # The name carries the content: a process that has loaded an older build can load this one beside it.
        library = folder / f"lib{output_stem}-{_digest(*dependencies.values())}.so"
        command = [CXX, *flags, "-shared", "-o", str(library), *map(str, sources), *link]
        hooks = [f for f in flags if f.startswith("-fsanitize=thread")]
        if hooks:  # two steps, so that linking does not bring in ThreadSanitizer
            objects = []
            for source in sources:
                objects.append(str(folder / (source.name + ".o")))
                _run([CXX, *flags, "-c", "-o", objects[-1], str(source)])
            command = [CXX, "-shared", "-o", str(library), *objects, *link]
        _run(command)
        stamp.write_text(json.dumps({"library": str(library), "dependencies": dependencies}))
        return library


def _run(command: Sequence[str]) -> None:
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{out.stderr}")
    if out.stderr:
        print(out.stderr)


def build_runtime(flavor: str) -> Path:
    """Path of the runtime library of this flavour, compiled if need be."""
    flags = FLAGS[flavor]
    sources = sorted((HERE / "runtime").glob("*.cpp"))
    include = (f"-I{HERE / 'include'}", f"-I{HERE / 'runtime'}")
    kind = flavor if flavor in ("asan", "portable") else "plain"
    return _compile(
        sources,
        f"simt_{kind}",
        (*_COMMON, *flags["runtime"], *include),
        (*flags["link"], "-Wl,-Bsymbolic", "-ldl"),
    )


def build(
    source: str | Path,
    *,
    flavor: str | None = None,
    defines: Sequence[str] = (),
    include: Sequence[str | Path] = (),
) -> Path:
    """Compiles `source`, a C++ file with `extern "C" SIMT_API` entry points, to a shared library.

    Args:
        source: the driver; `tests/simt/include` and `csrc/cuda` are on its include path.
        flavor: one of the above; by default `default_flavor()`.
        defines: preprocessor definitions, `NAME` or `NAME=VALUE`.
        include: further include directories.

    Raises:
        RuntimeError: the source does not compile; the message is the compiler's.
    """
    flavor = flavor or default_flavor()
    runtime = build_runtime(flavor)
    source = Path(source).resolve()
    flags = (
        *_COMMON,
        *FLAGS[flavor]["driver"],
        "-DCBAM_SIMT=1",
        "-include",  # as nvcc includes cuda_runtime.h
        "simt.h",
        *(f"-D{d}" for d in defines),
        f"-I{HERE / 'include'}",
        f"-I{ROOT / 'csrc' / 'cuda'}",
        *(f"-I{Path(i)}" for i in include),
    )
    link = (*FLAGS[flavor]["link"], str(runtime), f"-Wl,-rpath,{runtime.parent}")
    return _compile([source], re.sub(r"\W", "_", source.stem), flags, link)


@dataclass
class Array:
    """An argument in global memory: `data` is copied in before the call and back after it.

    Args:
        data: any numpy array; a copy in C order is passed.
        name: for messages.
        read_only: a store into it is an error.
        unwritten: starts without values, so that reading an element before it is written is an error
            (in the checked flavour); `data`'s contents are replaced by 0xff bytes (NaN).
        offset: bytes between a 256-byte boundary and the first element: what a slice of a larger tensor has.
        parts: where `data` holds several tensors, each one's first byte and size by name: they are checked and
            counted as buffers of their own, and what lies between them belongs to none.
    """

    data: np.ndarray
    name: str = ""
    read_only: bool = False
    unwritten: bool = False
    offset: int = 0
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict, init=False)
    bytes_read: int = field(default=0, init=False)
    bytes_written: int = field(default=0, init=False)


def _buffers(value: Array, otherwise: str) -> list[tuple[str, int, int]]:
    if value.parts:
        return [(name, at, size) for name, (at, size) in value.parts.items()]
    return [(value.name or otherwise, 0, value.data.nbytes)]


@dataclass(frozen=True)
class Counts:
    """Totals of one call: bytes of global memory asked for, atomics on it, block barriers, launches."""

    bytes_read: int
    bytes_written: int
    atomics: int
    barriers: int
    launches: int


class Library:
    """A built driver. `run` calls one of its functions under a seed."""

    def __init__(self, path: str | Path):
        self._lib = ctypes.CDLL(str(path))
        self._lib.simt_error.restype = ctypes.c_char_p
        self._libc = ctypes.CDLL(None)
        self._libc.free.argtypes = [ctypes.c_void_p]

    def reset(self, seed: int = 0, resident: int = 16) -> None:
        """Before launches that `run` does not make: see there."""
        self._lib.simt_reset(ctypes.c_uint64(seed), ctypes.c_uint(resident))

    def error(self) -> str:
        """What a kernel did wrong since the last reset, or nothing."""
        return (self._lib.simt_error() or b"").decode()

    def address(self, function: str) -> int:
        """Of one of the driver's functions, for other C++ to call."""
        found = ctypes.cast(getattr(self._lib, function), ctypes.c_void_p).value
        assert found is not None
        return found

    def run(self, function: str, *arguments: Any, seed: int = 0, resident: int = 16) -> Counts:
        """Calls `function`, which launches kernels, and returns what was counted.

        Args:
            arguments: numpy arrays (name `argument i`, read and written), `Array`s, ints (passed as 64 bits),
                Python floats (as double), None (a null pointer), or ctypes values.
            seed: decides the order of threads, blocks and copies.
            resident: blocks that run together at most (a cluster always fits).

        Raises:
            SimtError: a kernel did something wrong.
        """
        lib = self._lib
        self.reset(seed, resident)
        converted: list[Any] = []
        arrays: list[tuple[Array, int, int]] = []
        try:
            for i, value in enumerate(arguments):
                if isinstance(value, np.ndarray):
                    value = Array(value)
                if isinstance(value, Array):
                    base, address = self._allocate(value)
                    arrays.append((value, base, address))
                    flags = READ_ONLY * value.read_only + UNWRITTEN * value.unwritten
                    for name, at, size in _buffers(value, f"argument {i}"):
                        lib.simt_register(
                            ctypes.c_void_p(address + at), ctypes.c_uint64(size), name.encode(), flags
                        )
                    converted.append(ctypes.c_void_p(address))
                elif isinstance(value, (bool, int, np.integer)):
                    converted.append(ctypes.c_int64(int(value)))
                elif isinstance(value, float):
                    converted.append(ctypes.c_double(value))
                else:
                    converted.append(value)
            getattr(lib, function)(*converted)
            if error := self.error():
                raise SimtError(error)
            counts = (ctypes.c_uint64 * 5)()
            lib.simt_counts(counts)
            pair = (ctypes.c_uint64 * 2)()
            for value, _, address in arrays:
                value.bytes_read = value.bytes_written = 0
                for name, at, _ in _buffers(value, ""):
                    lib.simt_buffer_counts(ctypes.c_void_p(address + at), pair)
                    value.moved[name] = pair[0] + pair[1]
                    value.bytes_read += pair[0]
                    value.bytes_written += pair[1]
                if not value.read_only and value.data.nbytes:
                    flat = np.ctypeslib.as_array((ctypes.c_uint8 * value.data.nbytes).from_address(address))
                    value.data[...] = flat.view(value.data.dtype).reshape(value.data.shape)
            return Counts(*counts)
        finally:
            for _, base, _ in arrays:
                self._libc.free(base)

    def _allocate(self, value: Array) -> tuple[int, int]:
        # The allocation ends with the array, so that AddressSanitizer's redzone begins there.
        base = ctypes.c_void_p()
        size = value.offset + value.data.nbytes
        if self._libc.posix_memalign(ctypes.byref(base), ctypes.c_size_t(256), ctypes.c_size_t(max(size, 1))):
            raise MemoryError(f"cannot allocate {size} bytes")
        assert base.value is not None
        address = base.value + value.offset
        if value.unwritten:
            ctypes.memset(address, 0xFF, value.data.nbytes)
        else:
            source = np.ascontiguousarray(value.data)
            ctypes.memmove(address, source.ctypes.data, source.nbytes)
        return base.value, address


def load(source: str | Path, **options: Any) -> Library:
    """`build` and load in one step; takes `build`'s options."""
    return Library(build(source, **options))


def sanitized_environment() -> dict[str, str]:
    """Environment of a process that loads libraries of the "asan" flavour: `SIMT_FLAVOR` asks for it."""
    preload = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        preload.append(str(Path(_output(CXX, f"-print-file-name={name}")).resolve()))
    return {
        **os.environ,
        "SIMT_FLAVOR": "asan",
        "LD_PRELOAD": " ".join(preload),
        # Python and numpy leave objects behind at exit; fibers keep their frames on their own stacks.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0:exitcode=97",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=97",
    }
