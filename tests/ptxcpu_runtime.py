"""ptxcpu, an optional sibling directory that executes compiled PTX, with changes of this project's to its runtime."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import tempfile
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


def _replace(text: str, anchor: str, replacement: str) -> str:
    if text.count(anchor) != 1:
        raise RuntimeError(f"ptxcpu must have {anchor!r} once, it has it {text.count(anchor)} times")
    return text.replace(anchor, replacement)


def _hinted(ldst: Any) -> Any:
    """The translator's loads and stores, which say beforehand whether they have the hint."""

    def method(s, instruction, parts, *rest):  # type: ignore[no-untyped-def]
        s.e(f"hint = {int('cs' in parts)};")
        ldst(s, instruction, parts, *rest)
        s.e("hint = false;")

    return method


def _as_threaded_code(build: Any) -> Any:
    def method(s):  # type: ignore[no-untyped-def]
        source, blocks = build(s)
        return threaded(source), blocks

    return method


@functools.lru_cache(maxsize=None)
def load(name: str, replacements: Tuple[Tuple[str, str], ...], as_threaded_code: bool = True) -> Any:
    """ptxcpu as a module of its own under that name: other tests run it as it is, or otherwise."""
    if str(DIRECTORY) not in sys.path:
        sys.path.insert(0, str(DIRECTORY))
    spec = importlib.util.spec_from_file_location(f"ptxcpu_{name}", DIRECTORY / "ptxcpu.py")
    assert spec and spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runtime = (DIRECTORY / "runtime.h").read_text()
    for anchor, replacement in replacements:
        runtime = _replace(runtime, anchor, replacement)
    module.DRIVER = module.DRIVER.replace(_END, _FREE)
    folder = Path(module.CACHE) / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        file.write(runtime)
    os.replace(file.name, folder / "runtime.h")
    module.HERE = module.CACHE = str(folder)
    if as_threaded_code:
        module.Gen.build = _as_threaded_code(module.Gen.build)
    if replacements is EVICT_FIRST:
        module.Gen.ldst = _hinted(module.Gen.ldst)
    return module
