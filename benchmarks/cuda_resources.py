"""What ptxas makes of every CUDA kernel, for every architecture of the default build.

    python benchmarks/cuda_resources.py [--arch sm_90a ...] [--files streamed_forward_bfloat16 ...] [--jobs 2] [--each]

Needs nvcc and no GPU. Compiles each file of kernels at setup.py's level of optimisation, and reads the resource report: registers a
thread, stack frame, spilled bytes, static shared memory. A row is a file on an architecture (the most that any of
its kernels takes), with --each a kernel. A kernel passes with no stack and no spills, with few enough registers
for the blocks that its tier keeps on a multiprocessor, and in the resident tier, whose plan counts on all of a
block's shared memory, with no static shared memory. All of it takes a core about half an hour. Exits with 1 where
a kernel misses.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, NamedTuple, Optional

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
FILES = sorted(p.stem for p in SOURCES.glob("*.cu"))
REGISTERS = 65536  # of a multiprocessor, on every architecture here
STATIC_SHARED = int(re.search(r"kStaticShared = (\d+) << 10", (SOURCES / "streamed.h").read_text())[1]) << 10


def architecture_lists() -> List[str]:
    """setup.py's TORCH_CUDA_ARCH_LISTs, that of the newest toolkit first."""
    module = ast.parse((ROOT / "setup.py").read_text())
    (value,) = (
        node.value
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ARCHITECTURES"
    )
    return [architectures for _, architectures in ast.literal_eval(value)]


def default_architectures() -> List[str]:
    """What setup.py builds machine code for with the newest toolkit."""
    return [f"sm_{a.replace('+PTX', '').replace('.', '')}" for a in architecture_lists()[0].split(";")]


def find_nvcc() -> Optional[str]:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) or shutil.which("nvcc")


class Kernel(NamedTuple):
    """One kernel's resources; bytes but for registers."""

    tier: str
    direction: str
    traits: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int

    def most_registers(self) -> int:
        # 512 threads a multiprocessor; doubles in the streamed tier have blocks of 256 threads to themselves.
        return REGISTERS // (256 if self.tier == "streamed" and self.traits.startswith("double") else 512)

    def fault(self) -> str:
        """What misses, or nothing."""
        if self.stack or self.spill_stores or self.spill_loads:
            return f"{self.stack} bytes of stack, {self.spill_stores} + {self.spill_loads} spilled"
        if self.registers > self.most_registers():
            return f"{self.registers} registers, {self.most_registers()} leave the blocks that are wanted"
        limit = STATIC_SHARED if self.tier == "streamed" else 0
        if self.static_shared > limit:
            return f"{self.static_shared} bytes of static shared memory, at most {limit}"
        return ""


# Traits as the compiler mangles them: an element type, then an integer (Li8E), an enumerator (LNS_6LayoutE1E) and
# another enumerator.
MANGLED = {"f": "float", "d": "double", "4Half": "Half", "8BFloat16": "BFloat16"}
LAYOUTS = ("contiguous", "channels_last")
LAST_TRAIT = {"streamed": ("", ", folded", ", ragged"), "resident": (", by positions", ", by channels")}


def read_report(text: str) -> List[Kernel]:
    """Every kernel that ptxas reports on; raises ValueError where there is none."""
    kernels = []
    for part in re.split(r"Compiling entry function ", text)[1:]:
        name = re.search(r"(streamed|resident)_(forward|backward)_kernelI\w*?Traits(I\w+?E)E*v", part)
        assert name, part
        element = re.search(r"I(?:NS_)?(f|d|4Half|8BFloat16)", name[3])
        assert element, name[3]
        values = re.findall(r"L(?:NS\w*?E|i|b)(\d+)E", name[3])
        assert len(values) == 3, name[3]
        vector, layout, last = map(int, values)
        traits = f"{MANGLED[element[1]]}, {vector}, {LAYOUTS[layout]}{LAST_TRAIT[name[1]][last]}"

        def number(pattern: str, part: str = part, optional: bool = False) -> int:
            found = re.search(pattern, part)
            if not found and not optional:
                raise ValueError(f"ptxas does not say {pattern!r} in {part!r}")
            return int(found[1]) if found else 0

        kernels.append(
            Kernel(
                name[1], name[2], traits, number(r"Used (\d+) registers"),
                number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes spill stores"),
                number(r"(\d+) bytes spill loads"), number(r"(\d+) bytes smem", optional=True),
            )
        )  # fmt: skip
    if not kernels:
        raise ValueError(f"nothing about a kernel in {text!r}")
    return kernels


def compile_report(nvcc: str, source: Path, arch: str, cubin: Path) -> str:
    """Compiles a file to a cubin; returns what ptxas says of it. Raises CalledProcessError."""
    command = [nvcc, "-std=c++17", "-O3", f"-arch={arch}", f"-I{SOURCES}", "-Xptxas", "-v", "-cubin", "-o"]
    run = subprocess.run([*command, str(cubin), str(source)], capture_output=True, text=True)
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command, run.stdout, run.stderr)
    return run.stderr


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=default_architectures())
    parser.add_argument("--files", nargs="+", default=FILES, choices=FILES, metavar="FILE")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--each", action="store_true", help="a row for each kernel")
    a = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc found: set CUDA_HOME", file=sys.stderr)
        return 2
    todo = [(arch, file) for arch in a.arch for file in a.files]
    start, faults = time.monotonic(), []
    width = 2 + max(len(file) for file in a.files) + 42 * a.each
    columns = f"{'kernels':>8}{'registers':>10}{'stack':>7}{'spilled':>8}{'static shared':>14}"
    print(f"{'architecture':13}{'file':{width}}{columns}")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(a.jobs) as pool:

        def report(job) -> List[Kernel]:
            arch, file = job
            cubin = Path(folder) / f"{file}_{arch}.cubin"
            return read_report(compile_report(nvcc, SOURCES / f"{file}.cu", arch, cubin))

        count = 0
        for (arch, file), kernels in zip(todo, pool.map(report, todo)):
            count += len(kernels)
            for rows in [[k] for k in kernels] if a.each else [kernels]:
                name = f"{file} <{rows[0].traits}>" if a.each else file
                most = [max(getattr(k, f) for k in rows) for f in ("registers", "stack")]
                spilled = max(k.spill_stores + k.spill_loads for k in rows)
                shared = max(k.static_shared for k in rows)
                values = f"{len(rows):8}{most[0]:10}{most[1]:7}{spilled:8}{shared:14}"
                print(f"{arch:13}{name:{width}}{values}", flush=True)
            faults += [f"{arch} {file} <{k.traits}>: {k.fault()}" for k in kernels if k.fault()]
    print(f"{count} kernels in {time.monotonic() - start:.0f} s, {len(faults)} miss", *faults, sep="\n  ")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
