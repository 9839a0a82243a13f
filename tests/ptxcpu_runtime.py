"""ptxcpu, an optional sibling directory that executes compiled PTX, with changes of this project's to its runtime."""

from __future__ import annotations

import bisect
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Tuple

from ptxcpu_threaded import threaded

DIRECTORY = Path(__file__).resolve().parents[2] / "shared" / "ptxcpu"

# ptxcpu ignores cache hints. Put into its runtime, this makes a line that is read or written with .cs the first
# to be replaced in its set, as PTX has it (evict-first, in L1 and L2), until it is touched without. In place of
# each text goes the other; `hint` is set by `_hinted`.
EVICT_FIRST: Tuple[Tuple[str, str], ...] = (
    ("struct Cache {", "static bool hint = false;\nstruct Cache {"),
    ("u64 tick = 0; struct L", "u64 tick = 1ull << 62; struct L"),
    ("*s = &v[(h % sets) * (u64)ways]; L *lru = s; tick++;",
     "*s = &v[(h % sets) * (u64)ways]; L *lru = s; tick++; const u64 now = hint ? tick - (1ull << 61) : tick;"),
    ("s[i].use = tick; return s + i;", "s[i].use = now; return s + i;"),
    ("*lru = L{line, tick, 0, 0}; return lru;", "*lru = L{line, now, 0, 0}; return lru;"),
)  # fmt: skip

# It keeps the registers of all warps of a launch, which of one of these kernels are gigabytes. This gives them back,
# where its driver still ends as it did.
_END = "if (!g->exact_race) st->race_line[6] = 0xffffffff; return err->code; }"
_FREE = """if (!g->exact_race) st->race_line[6] = 0xffffffff;
  for (auto cl : act) { freec.insert(freec.end(), cl->ctas.begin(), cl->ctas.end()); delete cl; }
  for (auto c : freec) { for (auto w : c->warps) { free(w->R); free(w->local); delete w; } delete c; }
  delete g; return err->code; }"""

# It compiles its driver and its headers anew with every kernel, which takes g++ longer than a small kernel's steps do.
# So the driver is a library of its own, which learns of the kernel what it needs, and the headers are precompiled.
_KERNEL = """
struct Args;
struct Kernel { size_t registers; int (*run_warp)(Warp *, long); const int *lines; };
extern "C" __attribute__((visibility("default"))) int LAUNCH(Args *, Stats *, Err *, const Kernel *);
"""
_DRIVEN = """
extern "C" int launch(Args *A, Stats *st, Err *err) {
  static const Kernel kernel{sizeof(Regs), run_warp, BLKLINE};
  return LAUNCH(A, st, err, &kernel); }
"""
_DRIVER: Tuple[Tuple[str, str], ...] = (
    ('extern "C" int launch(Args *A, Stats *st, Err *err) {',
     "int LAUNCH(Args *A, Stats *st, Err *err, const Kernel *kernel) {"),
    ("run_warp(w, 20000)", "kernel->run_warp(w, 20000)"),
    ("BLKLINE[", "kernel->lines["),
)  # fmt: skip
# As ptxcpu has them: a header precompiled with others is not used.
_FLAGS = ("-std=c++17", "-march=native", "-fno-math-errno", "-frounding-math", "-ffp-contract=off")
_FLAGS += ("-fno-strict-aliasing", "-w", "-shared", "-fPIC")


def _replace(text: str, anchor: str, replacement: str) -> str:
    if text.count(anchor) != 1:
        raise RuntimeError(f"ptxcpu must have {anchor!r} once, it has it {text.count(anchor)} times")
    return text.replace(anchor, replacement)


def _write(path: Path, text: str) -> None:
    """All of it or nothing, as other processes may be at it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def _compile(source: Path, out: Path, *flags: str) -> None:
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        # Elsewhere, since g++ tries all that lies where a precompiled header does; threads and processes may be at it.
        with tempfile.TemporaryDirectory(dir=source.parent) as folder:
            temporary = os.path.join(folder, "out")
            subprocess.run(["g++", *_FLAGS, *flags, str(source), "-o", temporary], check=True)
            os.replace(temporary, out)


def _with_a_driver_apart(module: Any, runtime: str, folder: Path, name: str) -> None:
    """Replaces the module's driver by a call of one that is compiled here, and has its headers precompiled."""
    kernel = _KERNEL.replace("LAUNCH", f"launch_{name}")
    driver = module.DRIVER.replace(_END, _FREE).replace("sizeof(Regs)", "kernel->registers")
    for anchor, replacement in _DRIVER:
        driver = _replace(driver, anchor, replacement)
    _write(folder / "inc" / "runtime.h", runtime)
    _write(
        folder / "driver.cpp",
        f'#include "inc/runtime.h"\n{kernel}{driver}'.replace("LAUNCH", f"launch_{name}"),
    )
    library = folder / "driver.so"
    # Hidden, so that none of the runtime's variables takes the place of a kernel's own.
    _compile(folder / "driver.cpp", library, "-O2", "-fvisibility=hidden")
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    module.DRIVER = kernel + _DRIVEN.replace("LAUNCH", f"launch_{name}")
    build = module.PtxModule.compile

    def compile(s, kernel: str):  # type: ignore[no-untyped-def]
        precompiled = folder / "inc" / "runtime.h.gch" / s.opt
        _compile(folder / "inc" / "runtime.h", precompiled, s.opt, "-x", "c++-header")
        # Who comes to the same kernel second waits, and finds it: ptxcpu has one name for what it writes.
        with open(folder / f"lock-{hashlib.sha256(s.text.encode()).hexdigest()[:16]}", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return build(s, kernel)

    module.PtxModule.compile = compile


def _hinted(ldst: Any) -> Any:
    """The translator's loads and stores, which say beforehand whether they have the hint."""

    def method(s, instruction, parts, *rest):  # type: ignore[no-untyped-def]
        s.e(f"hint = {int('cs' in parts)};")
        ldst(s, instruction, parts, *rest)
        s.e("hint = false;")

    return method


def _as_threaded_code(build: Any, counting: bool) -> Any:
    def method(s):  # type: ignore[no-untyped-def]
        source, blocks = build(s)
        return threaded(source, counting), blocks

    return method


def _with_line_numbers_looked_up(ptxparse: Any) -> None:
    """Its parser counts the lines before each statement from the text's start: 10 s in a large kernel."""
    parse_body = ptxparse.parse_body

    def method(text: str, p, e, f, scope, uid, line_of):  # type: ignore[no-untyped-def]
        if not isinstance(line_of, functools.partial):  # a scope within has its function's
            line_of = functools.partial(bisect.bisect_right, [0, *(m.end() for m in re.finditer("\n", text))])
        return parse_body(text, p, e, f, scope, uid, line_of)

    ptxparse.parse_body = method


_loading = threading.Lock()


def load(
    name: str,
    replacements: Tuple[Tuple[str, str], ...],
    as_threaded_code: bool = True,
    counting: bool = False,
) -> Any:
    """ptxcpu as a module of its own under that name: other tests run it as it is, or otherwise."""
    with _loading:  # threads that come at once get one module, whose KernelError is one class
        return _load(name, replacements, as_threaded_code, counting)


@functools.lru_cache(maxsize=None)
def _load(
    name: str, replacements: Tuple[Tuple[str, str], ...], as_threaded_code: bool, counting: bool
) -> Any:
    if str(DIRECTORY) not in sys.path:
        sys.path.insert(0, str(DIRECTORY))
        _with_line_numbers_looked_up(importlib.import_module("ptxparse"))
    spec = importlib.util.spec_from_file_location(f"ptxcpu_{name}", DIRECTORY / "ptxcpu.py")
    assert spec and spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runtime = (DIRECTORY / "runtime.h").read_text()
    for anchor, replacement in replacements:
        runtime = _replace(runtime, anchor, replacement)
    # Another runtime or driver, another folder: g++ does not ask whether a precompiled header is still the header's.
    digest = hashlib.sha256((runtime + module.DRIVER + _FREE).encode()).hexdigest()
    folder = Path(module.CACHE) / f"{name}-{digest[:8]}"
    _write(folder / "runtime.h", runtime)
    module.HERE = module.CACHE = str(folder)
    _with_a_driver_apart(module, runtime, folder, name)
    if as_threaded_code:
        module.Gen.build = _as_threaded_code(module.Gen.build, counting)
    if replacements is EVICT_FIRST:
        module.Gen.ldst = _hinted(module.Gen.ldst)
    return module
