"""PTX instructions of the CUDA kernels an element of x, by line of source, counted by executing them on the CPU.

    python benchmarks/cuda_instructions.py [--tier streamed resident] [--shape 256,56,56] [--samples 8]
        [--dtype bfloat16] [--layout contiguous] [--direction forward backward] [--multiprocessors 8] [--top 30]

Where issued instructions limit a kernel, these are the lines to begin with. What is counted is what nvcc hands to ptxas,
executed by the optional sibling ../shared/ptxcpu, a warp's count as 32 whatever its mask is. ptxas makes a half to a third
of it: a `mov.b32` between a float and its bits, for one, becomes nothing. A line of an inlined function is listed once for
each line that calls it. A persistent kernel's blocks wait for each other here as long as the order of warps that was drawn
has it: what they poll with says nothing of a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
import pytest
from shapes import DTYPES, LAYOUTS

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cuda_ptx  # noqa: E402
import cuda_streamed as cs  # noqa: E402
from oracle import Options, make_problem, run_problem  # noqa: E402

L2 = 50 << 20  # of 132 multiprocessors
Line = Tuple[str, ...]


def lines_of(ptx: str) -> List[Optional[Line]]:
    """For each instruction of the PTX in order, `file:line`, and behind it that of the call that was inlined."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"]+)"', ptx, re.MULTILINE))
    found: List[Optional[Line]] = []
    at: Optional[Line] = None
    inside = False
    for text in ptx.split("\n"):
        location = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)(?:.*inlined_at\s+(\d+)\s+(\d+))?", text)
        if location:
            numbers = [n for n in location.groups() if n]
            at = tuple(f"{files[f]}:{n}" for f, n in zip(numbers[::2], numbers[1::2]))
        text = re.sub(r"//.*", "", text).strip()
        inside = inside or ".entry" in text
        if inside and not text.startswith((".", "(", ")")):
            text = re.sub(r"\.reg[^;]*;", "", text)  # within inline assembly
            found += [at] * text.count(";")
    return found


def counted(module) -> Tuple[Counter, Dict[Optional[Line], Counter]]:
    """Warps' instructions of a kernel that has run, by opcode, and those of each line of source."""
    (name,) = module.mod.funcs
    generated, library = module.compile(name)
    body = [what for kind, what in generated.f.body if kind == "inst"]
    lines = lines_of(module.text)
    if len(lines) != len(body):
        raise RuntimeError(f"{len(body)} instructions, and {len(lines)} lines for them")
    counts = np.ctypeslib.as_array((ctypes.c_uint64 * len(body)).in_dll(library, "counts")).tolist()
    opcodes: Counter = Counter()
    by_line: Dict[Optional[Line], Counter] = {}
    for instruction, line, count in zip(body, lines, counts):
        opcodes[instruction.op] += count
        by_line.setdefault(line, Counter())[instruction.op] += count
    return opcodes, by_line


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tier", nargs="+", choices=("streamed", "resident"), default=["streamed"])
    parser.add_argument("--shape", default="256,56,56", metavar="C,H,W")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="contiguous")
    directions = ["forward", "backward"]
    parser.add_argument("--direction", nargs="+", choices=directions, default=directions)
    parser.add_argument("--multiprocessors", type=int, default=8, help="of the streamed tier's device")
    parser.add_argument("--top", type=int, default=30, help="lines of source")
    options = parser.parse_args()
    reason = cuda_ptx.unavailable()
    if reason is not None:
        print(f"cannot count: {reason}", file=sys.stderr)
        return 1
    cuda_ptx.COUNTING = True
    shape = (options.samples, *(int(n) for n in options.shape.split(",")))
    problem = make_problem(
        shape, Options(hidden=max(1, shape[1] // 16)), DTYPES[options.dtype], layout=options.layout
    )
    elements = problem.x.numel()
    compile_kernel = cuda_ptx._module
    for tier in options.tier:
        if tier == "resident":
            machine = cuda_ptx.ResidentPtxMachine(trace=False)
        else:
            n = options.multiprocessors
            machine = cuda_ptx.PtxMachine(multiprocessors=n, l2=L2 * n // 132, trace=False, seed=1)
        modules = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                cuda_ptx, "_module", lambda *what: modules.append(compile_kernel(*what)) or modules[-1]
            )
            cs.HostOps(machine).installed(patch)
            run_problem(problem, "cuda")
        for direction, module in zip(directions, modules, strict=True):
            if direction not in options.direction:
                continue
            opcodes, by_line = counted(module)
            total = sum(opcodes.values())
            print(f"\n{tier} {direction} of {'x'.join(map(str, shape))} {options.dtype} {options.layout}: "
                  f"{32 * total / elements:.1f} an element")  # fmt: skip

            def each(some: Counter, most: int) -> str:
                return ", ".join(f"{op} {32 * n / elements:.2f}" for op, n in some.most_common(most))

            print(f"  {each(opcodes, 16)}")
            for line, ops in sorted(by_line.items(), key=lambda item: -item[1].total())[: options.top]:
                where = " < ".join(line or ("nowhere",))
                n = ops.total()
                print(f"  {32 * n / elements:6.2f} {n / total:6.1%}  {where:60}  {each(ops, 4)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
