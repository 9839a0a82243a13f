"""ptxcpu's C++ as threaded code: one function for each kind of step, and a table of the steps.

ptxcpu writes a statement group for every PTX instruction into one function, of some 90,000 lines for a kernel of this
project. g++ takes two to three minutes over it at -O0, and what comes out is slow. But the groups differ by little
more than the numbers of registers, constants and branch targets in them: 18,000 of them are 169 kinds. `threaded`
gives each kind a function that takes those numbers as operands, and walks a table of (function, operands):

    4 s at -O0, 8 s at -O2, and optimised code to run

What a number means to the step is not interpreted: a group in which a number is not recognised as an operand is a
kind of its own, and as right as before. Where ptxcpu's text is not what is expected here, `threaded` raises.
"""

from __future__ import annotations

import re
from typing import Callable, Dict, List, Match, Tuple

# Where numbers stand, and by what each of them is replaced: `operand` remembers one and gives its expression.
Operand = Callable[[str], str]
_OPERANDS: Tuple[Tuple[str, Callable[[Match[str], Operand], str]], ...] = (
    # a register; a constant of any type; the bits of a float
    (r"R\.([phwdq])\[(\d+)\]", lambda m, operand: f"R.{m[1]}[{operand(m[2])}]"),
    (r"\(\((\w+)\)(\d+)(?:ull)?\)", lambda m, operand: f"(({m[1]}){operand(m[2])})"),
    (r"bc<f32>\((?:\(u32\))?(0x[0-9a-f]+|\d+)u\)", lambda m, operand: f"bc<f32>((u32){operand(m[1])})"),
    (r"bc<f64>\((?:\(u64\))?(0x[0-9a-f]+|\d+)ull\)", lambda m, operand: f"bc<f64>({operand(m[1])})"),
    # an address's offset, in 64 bits and in 32; a kernel parameter's
    (r"\(s64\)(-?\d+)\)", lambda m, operand: f"(s64){operand(m[1])})"),
    (r"(\[l\]) \+ (-?\d+)\)\)", lambda m, operand: f"{m[1]} + (u32){operand(m[2])}))"),
    (r"g->param \+ (\d+)", lambda m, operand: f"g->param + {operand(m[1])}"),
    # the line of PTX, for messages
    (r"(, (?:true|false), )(\d+)(, o\)\))", lambda m, operand: f"{m[1]}(u32){operand(m[2])}{m[3]}"),
    (r"(o\.soff\[l\], \d+, true, )(\d+)", lambda m, operand: f"{m[1]}(u32){operand(m[2])}"),
    (r"WARN_SHFL\((\d+)", lambda m, operand: f"WARN_SHFL((int){operand(m[1])}"),
    # a branch's targets
    (r"(npc = |w->pc\[l\] = )(\d+);", lambda m, operand: f"{m[1]}(int){operand(m[2])};"),
    (r"\? (\d+) : (\d+);", lambda m, operand: f"? (int){operand(m[1])} : (int){operand(m[2])};"),
)
_RULES = tuple((re.compile(pattern), replacement) for pattern, replacement in _OPERANDS)

_SWITCH, _DEFAULT, _END = "  switch (pc) {", "  default: g->fail(10", "   break; }"
_COUNT = "   g->st.tinst += __builtin_popcount(M);"  # with which each instruction begins
_LOCALS = "int spin = 0; bool yield_after = false;", "Run run{0, 0, false, false};"
_STEP_LOCALS = "bool uni; int npc;"
_KEPT = ("npc", "spin", "uni", "yield_after")  # what a step may set, from step to step

_STEPS = """
struct Run { int npc, spin; bool uni, yield_after; };
typedef u32 (*Op)(Warp *, Grid *, CTA *, Regs &, u32 *, u32, const u64 *__restrict, Run &);
static const u32 ON = ~0u;  // otherwise what run_warp returns
"""
_FUNCTION = """
static u32 op{}(Warp *w, Grid *g, CTA *c, Regs &R, u32 *CC, u32 M, const u64 *__restrict a, Run &run) {{
{}
  return ON; }}
"""
_WALK = """
  if ((u32)pc >= sizeof BLOCKS / sizeof *BLOCKS - 1) { g->fail(10, "bad pc %d", pc); return ST_ERR; }
  for (u32 i = BLOCKS[pc]; i < BLOCKS[pc + 1]; i++) {
    u32 r = STEPS[i].op(w, g, c, R, CC, M, OPERANDS + STEPS[i].at, run);
    if (r != ON) return (int)r; }
"""
_CALL = "    u32 r = STEPS[i].op("  # how often each step is taken is counted before it
_COUNTS = 'extern "C" {{ u64 counts[{}]; }}'


def _literal(number: str) -> str:
    return f"(u64){number}ll" if number.startswith("-") else f"{number}ull"


def _one(lines: List[str], what: str) -> int:
    """Where the one line is that ends or begins so."""
    found = [i for i, line in enumerate(lines) if line.startswith(what) or line.endswith(what)]
    if len(found) != 1:
        raise RuntimeError(f"ptxcpu's C++ must have {what!r} once, it has it {len(found)} times")
    return found[0]


def _steps(lines: List[str]) -> Tuple[List[List[str]], List[int]]:
    """The statement groups of a switch's body in order, and with which of them each case begins."""
    steps: List[List[str]] = []
    blocks: List[int] = []
    at = 0
    while at < len(lines):
        case = re.match(r"  case (\d+): \{(.*)$", lines[at])
        if not case or int(case[1]) != len(blocks):
            raise RuntimeError(f"ptxcpu's C++ has no case {len(blocks)} where one is expected")
        blocks.append(len(steps))
        end = lines.index(_END, at)
        # What stands before the first instruction, or behind the last, is a step too, or a part of one.
        group = [case[2]] if case[2].strip() else []
        for line in lines[at + 1 : end]:
            if line == _COUNT and group:
                steps.append(group)
                group = []
            group.append(line)
        if group:
            steps.append(group)
        at = end + 1
    return steps, [*blocks, len(steps)]


def threaded(source: str, counting: bool = False) -> str:
    """The translation unit that ptxcpu's Gen.build made, as threaded code.

    `counting`: its library has `counts`, by instruction in the order of the PTX: how many warps came to it.
    """
    lines = source.split("\n")
    first, last = _one(lines, _SWITCH), _one(lines, _DEFAULT)
    function = _one(lines, "int run_warp(Warp *w, long budget) {")
    steps, blocks = _steps(lines[first + 1 : last])
    if counting and any(step[0] != _COUNT for step in steps[:-1]):
        raise RuntimeError("a step that is no instruction")

    functions: Dict[str, int] = {}  # by body
    table: List[str] = []
    operands: List[str] = []
    for step in steps:
        own: List[str] = []

        def operand(number: str, own: List[str] = own) -> str:
            own.append(number)
            return f"a[{len(own) - 1}]"

        body = "\n".join(re.sub(r" // \d+: .*$", "", line) for line in step)
        for pattern, replacement in _RULES:
            body = pattern.sub(lambda m: replacement(m, operand), body)  # noqa: B023
        table.append(f"{{op{functions.setdefault(body, len(functions))},{len(operands)}}}")
        operands += own

    head = "\n".join(lines[function:first]) + "\n" + lines[first].replace(_SWITCH, "")
    for what in (_LOCALS[0], _STEP_LOCALS):
        if head.count(what) != 1:
            raise RuntimeError(f"ptxcpu's run_warp must declare {what!r} once")
    tail = "\n".join(lines[last + 1 :]).replace(
        '#include "driver.h"', "\n".join([*(f"#undef {name}" for name in _KEPT), '#include "driver.h"'])
    )
    return "\n".join(
        [
            *lines[:function],
            _STEPS,
            *(f"#define {name} run.{name}" for name in _KEPT),
            *(_FUNCTION.format(k, body) for body, k in functions.items()),
            f"static const u64 OPERANDS[] = {{{','.join(map(_literal, [*operands, '0']))}}};",
            f"static const struct {{ Op op; u32 at; }} STEPS[] = {{{','.join(table)}}};",
            f"static const u32 BLOCKS[] = {{{','.join(map(str, blocks))}}};",
            _COUNTS.format(len(steps)) if counting else "",
            head.replace(*_LOCALS).replace(_STEP_LOCALS, ""),
            _WALK.replace(_CALL, "    counts[i]++;\n" + _CALL) if counting else _WALK,
            tail,
        ]
    )
