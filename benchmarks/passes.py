"""The passes of the CPU kernels, one by one, and two versions of the kernels in turns.

`bench.py` measures whole calls, and on a shared machine those differ by a tenth and more from run to run. This
compiles csrc/cpu with a clock around each pass (passes.cpp), with --against COMMIT a second time as it was then. The
versions take turns on the same tensors in one process, so that the median of the ratios of pairs tells a twentieth.
Beside the passes stand a plain read of x, a plain copy of it past the caches, and a read of y (dx) after the call, as
by the layer that comes next: what a kernel gains by not leaving its output in cache, that one may lose.

    python benchmarks/passes.py --shape 256,56,56 --shape 512,28,28
    python benchmarks/passes.py --between 128 --against HEAD~3
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "benchmarks/passes.cpp"
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-DCBAM_VECTOR_BYTES=64")
# The instruction sets of csrc/cpu/isa_*.cpp.
FLAGS: Dict[str, Tuple[str, ...]] = {
    "baseline": ("-DCBAM_VECTOR_BYTES=16",),
    "avx2": (*_AVX2, "-DCBAM_VECTOR_BYTES=32"),
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512bf16", "-DCBAM_BF16_ALONE"),
}
# The kernels' name of a dtype, what numpy holds it as, and how far two versions may be apart, relative to the
# largest value.
DTYPES = {
    "float32": ("float", np.float32, 1e-5),
    "float64": ("double", np.float64, 1e-13),
    "bfloat16": ("bf16", np.uint16, 1e-2),
    "float16": ("half", np.float16, 2e-3),
}
OUTSIDE = "outside the passes, and waiting"
Shape = Tuple[int, ...]


@dataclass(frozen=True)
class Pass:
    """A pass of passes.cpp, in its order, and how often it reads x or dy and writes y or dx."""

    name: str
    reads: int = 0
    writes: int = 0

    def floor(self, read: float, copy: float) -> float:
        """Its time if it were plain reads and a plain copy, of so many seconds each; 0 if it is neither."""
        return copy + (self.reads - 1) * read if self.writes else self.reads * read


FORWARD = (
    Pass("channel pools", reads=1),
    Pass("MLP"),
    Pass("spatial pools (and y of tiles)", reads=1),
    Pass("spatial gate"),
    Pass("y (but what is above)", reads=1, writes=1),
)
BACKWARD = (
    Pass("what forward saved"),
    Pass("products of x and dy", reads=2),
    Pass("gradient of the logits"),
    Pass("gradient of the maps"),
    Pass("rest of the gate's gradient", reads=1),
    Pass("gradient of the convolution"),
    Pass("MLP's backward"),
    Pass("dx", reads=1, writes=1),
    Pass("gradients of the weights"),
)
COUNT = len(FORWARD) + len(BACKWARD)
MAX_THREADS = 256  # that have clocks in passes.cpp


def compile_version(commit: Optional[str], isa: str, dtype: str) -> Path:
    """The library of csrc/cpu of one commit, or as it lies there; kept, as it takes half a minute."""
    flags = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden", "-w", *FLAGS[isa])
    command = [os.environ.get("CXX", "c++"), *flags, f"-DCBAM_PASSES_DTYPE={DTYPES[dtype][0]}"]
    with tempfile.TemporaryDirectory() as folder:
        source = ROOT / "csrc/cpu"
        if commit:
            archive = ["git", "archive", commit, "csrc/cpu"]
            files = subprocess.run(archive, cwd=ROOT, check=True, capture_output=True).stdout
            subprocess.run(["tar", "-x", "-C", folder], input=files, check=True)
            source = Path(folder) / "csrc/cpu"
        texts = [SOURCE.read_bytes(), *(path.read_bytes() for path in sorted(source.glob("*.h")))]
        name = hashlib.sha256(b"\0".join([repr(command).encode(), *texts])).hexdigest()[:16]
        library = ROOT / f"build/passes/{name}.so"
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            print(f"compiling csrc/cpu of {commit or 'the working tree'} ...", file=sys.stderr)
            part = f"{library}.{Path(folder).name}"  # another may be at work on the same
            subprocess.run([*command, f"-I{source}", str(SOURCE), "-o", part], check=True)
            os.replace(part, library)
    return library


class Version:
    """A library of compile_version, loaded, with a block of the default configuration."""

    def __init__(self, name: str, library: Path) -> None:
        self.name = name
        self.library = ctypes.CDLL(str(library))
        self.library.make.restype = ctypes.c_void_p
        self.library.plain_read.restype = self.library.plain_copy.restype = ctypes.c_double

    def take(self, shape: Shape, options: argparse.Namespace, x: np.ndarray, dy: np.ndarray) -> None:
        c, h, w = shape
        hidden = max(1, c // 16)
        self.parameters = 2 * hidden * c + hidden + c + 98
        self.subject = ctypes.c_void_p(
            self.library.make(
                *(ctypes.c_int64(size) for size in (options.batch, c, h, w, hidden)),
                int(options.layout == "channels_last"),
                int(options.mode == "train"),
                options.threads,
                pointer(x),
                pointer(dy),
            )
        )

    def release(self) -> None:
        self.library.release(self.subject)

    def gradients(self) -> np.ndarray:
        """Of the parameters, after a backward."""
        out = np.zeros(self.parameters)
        self.library.gradients(self.subject, pointer(out))
        return out

    def run(self, backward: bool, out: np.ndarray) -> np.ndarray:
        """Seconds of each pass, and of the whole call."""
        seconds = np.zeros(COUNT + 1)
        self.library.run(self.subject, int(backward), pointer(out), pointer(seconds))
        return seconds

    def calls(self, thread: int) -> np.ndarray:
        """How often a thread entered each pass in the last call."""
        out = np.zeros(COUNT, np.int64)
        self.library.calls(thread, pointer(out))
        return out


def widest(dtype: str) -> str:
    """The instruction set that this processor's kernels for a dtype come from, as csrc/cpu/ops.cpp chooses."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        return "avx512_bf16" if dtype == "bfloat16" and "avx512_bf16" in flags else "avx512"
    return "avx2" if {"avx2", "fma"} <= flags else "baseline"


def pointer(a: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.ctypes.data)


def aligned(count: int, dtype: type) -> np.ndarray:
    """`count` numbers that begin at a multiple of 64 bytes."""
    size = count * np.dtype(dtype).itemsize
    room = np.zeros(size + 64, np.uint8)
    return room[-room.ctypes.data % 64 :][:size].view(dtype)


def make_input(shape: Shape, options: argparse.Namespace, seed: int) -> np.ndarray:
    """N(0, 1) as the dtype's bits, flat; the layout is how the kernels read it."""
    values = np.random.default_rng(seed).standard_normal(options.batch * int(np.prod(shape)), np.float32)
    out = aligned(values.size, DTYPES[options.dtype][1])
    out[:] = values.view(np.uint32) >> 16 if options.dtype == "bfloat16" else values
    return out


def as_numbers(a: np.ndarray) -> np.ndarray:
    bits = a.astype(np.uint32) << 16 if a.dtype == np.uint16 else None
    return a.astype(np.float64) if bits is None else bits.view(np.float32).astype(np.float64)


def check_agreement(versions: Sequence[Version], options: argparse.Namespace, out: np.ndarray) -> None:
    """Whether all versions compute the same: what is faster and wrong is not measured."""
    tolerance = DTYPES[options.dtype][2]
    results: Dict[str, List[np.ndarray]] = {}
    for v in versions:
        out[:] = 0
        v.run(False, out)
        results.setdefault("y", []).append(as_numbers(out))
        if options.mode == "train":
            out[:] = 0
            v.run(True, out)
            results.setdefault("dx", []).append(as_numbers(out))
            results.setdefault("the gradient of the parameters", []).append(v.gradients())
    for what, of_versions in results.items():
        for v, result in zip(versions, of_versions):
            off = np.abs(result - of_versions[0]).max() / np.abs(of_versions[0]).max()
            if not (np.isfinite(result).all() and result.any() and off <= tolerance):
                raise SystemExit(
                    f"passes.py: {what} of {v.name} is off by {off:.2g}, tolerance {tolerance:.2g}"
                )


@dataclass
class Samples:
    """Seconds, of each round: a version's passes and rows of `report`, a plain read and a plain copy of x."""

    of: Dict[str, List[np.ndarray]]
    read: List[float]
    copy: List[float]


def measure(versions: Sequence[Version], shape: Shape, options: argparse.Namespace) -> Samples:
    x, dy = make_input(shape, options, 1), make_input(shape, options, 2)
    out = aligned(x.size, x.dtype.type)
    for v in versions:
        v.take(shape, options, x, dy)
    check_agreement(versions, options, out)
    plain, size = versions[0].library, (ctypes.c_int64(x.nbytes), options.threads)
    other = np.zeros(options.threads * options.between << 20, np.uint8)

    def evict() -> None:
        plain.write_other(pointer(other), ctypes.c_int64(options.between << 20), options.threads)

    def call(v: Version, backward: bool) -> np.ndarray:
        evict()
        return np.append(v.run(backward, out), plain.plain_read(pointer(out), *size))

    samples = Samples({v.name: [] for v in versions}, [], [])
    for i in range(options.rounds):
        for v in versions if i % 2 else versions[::-1]:
            seconds = call(v, False)
            if options.mode == "train":
                both = call(v, True)
                seconds = np.concatenate([seconds[:COUNT] + both[:COUNT], seconds[COUNT:], both[COUNT:]])
            outside = seconds[COUNT::2].sum() - seconds[:COUNT].sum()
            samples.of[v.name].append(np.append(seconds, [seconds[COUNT:].sum(), outside]))
        evict()
        samples.read.append(plain.plain_read(pointer(x), *size))
        evict()
        samples.copy.append(plain.plain_copy(pointer(x), pointer(out), *size))
    for v in versions:
        v.release()
    return samples


def report(versions: Sequence[Version], samples: Samples, train: bool) -> None:
    rows = list(enumerate(FORWARD + BACKWARD if train else FORWARD))
    whole = ["forward", "y read by the next layer"]
    whole += ["backward", "dx read by the layer before"] if train else []
    rows += [(COUNT + i, Pass(name)) for i, name in enumerate([*whole, "the calls and those reads", OUTSIDE])]
    read, copy = float(np.median(samples.read)), float(np.median(samples.copy))
    print(f"plain read of x {read * 1e3:.3f} ms, plain copy {copy * 1e3:.3f} ms")
    first, *others = versions
    header = f"{'':32}{'ms':>8}{'x plain':>9}"
    for v in others:
        header += f"{v.name[:12]:>14}{'ratio':>8}{'p20':>7}{'p80':>7}"
    print(header)
    for i, row in rows:
        now = np.array([s[i] for s in samples.of[first.name]])
        floor = row.floor(read, copy)
        line = f"{row.name:32}{np.median(now) * 1e3:8.3f}"
        line += f"{np.median(now) / floor:9.2f}" if floor else " " * 9
        for v in others:
            then = np.array([s[i] for s in samples.of[v.name]])
            line += f"{np.median(then) * 1e3:14.3f}"
            if then.all():  # a pass may be part of another
                low, middle, high = np.percentile(now / then, (20, 50, 80))
                line += f"{middle:8.3f}{low:7.3f}{high:7.3f}"
        print(line)


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", help="C,H,W; may be repeated (default: 256,56,56)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--layout", choices=("contiguous", "channels_last"), default="contiguous")
    parser.add_argument("--mode", choices=("infer", "train"), default="train")
    parser.add_argument("--threads", type=int, default=min(len(os.sched_getaffinity(0)), MAX_THREADS))
    parser.add_argument("--isa", choices=FLAGS, help="(default: the widest that this processor has)")
    parser.add_argument(
        "--between", type=int, default=0, help="MiB of other data that each thread writes first"
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--against", metavar="COMMIT", help="a commit whose kernels take turns with these")
    options = parser.parse_args(argv)
    try:
        options.shapes = [tuple(map(int, shape.split(","))) for shape in options.shape or ["256,56,56"]]
    except ValueError:
        options.shapes = []
    if not options.shapes or any(len(shape) != 3 or min(shape) < 1 for shape in options.shapes):
        parser.error("--shape is C,H,W, three positive numbers")
    if not 1 <= options.threads <= MAX_THREADS or min(options.batch, options.rounds) < 1:
        parser.error(f"--threads is 1 to {MAX_THREADS}, --batch and --rounds at least 1")
    options.isa = options.isa or widest(options.dtype)
    if options.isa == "avx512_bf16" and options.dtype != "bfloat16":
        parser.error("--isa avx512_bf16 has kernels for --dtype bfloat16 alone")
    return options


def main(argv: Optional[Sequence[str]] = None) -> int:
    options = parse(argv)
    commits = [None, options.against] if options.against else [None]
    with ThreadPoolExecutor() as pool:
        libraries = list(pool.map(lambda c: compile_version(c, options.isa, options.dtype), commits))
    if len(set(libraries)) < len(libraries):
        print(f"csrc/cpu is that of {options.against}: the ratios are the noise", file=sys.stderr)
    versions = [Version(commit or "now", library) for commit, library in zip(commits, libraries)]
    for shape in options.shapes:
        samples = measure(versions, shape, options)
        print(f"\n{options.batch}x{'x'.join(map(str, shape))} {options.dtype} {options.layout} {options.isa}")
        report(versions, samples, options.mode == "train")
    return 0


if __name__ == "__main__":
    sys.exit(main())
