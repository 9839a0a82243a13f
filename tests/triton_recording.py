"""Records the launches of an op, and compiles them ahead of time: the real host path without a GPU."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cbam_fused._config import Config
from cbam_fused.triton_kernels.configurations import Configuration, Device

# Shared memory that one program may use, bytes, and the largest number of registers a thread.
TARGETS: Dict[str, Tuple[str, Any, int, int]] = {
    "sm_80": ("cuda", 80, 32, 163 << 10),
    "sm_90": ("cuda", 90, 32, 227 << 10),
    "sm_100": ("cuda", 100, 32, 227 << 10),
    "sm_120": ("cuda", 120, 32, 99 << 10),
    "gfx942": ("hip", "gfx942", 64, 64 << 10),
}
DEVICES = {
    "sm_80": Device("sm_80", 108, 40 << 20),
    "sm_90": Device("sm_90", 132, 50 << 20),
    "sm_100": Device("sm_100", 148, 126 << 20),
    "sm_120": Device("sm_120", 170, 96 << 20),
    "gfx942": Device("gfx942", 304, 4 << 20),
}
_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int16: "*i16",
    torch.int32: "*i32",
}


# Memory from the caching allocator, which a capture serves from its own pool, without a value in it.
ALLOCATIONS = {"aten::empty_like", "aten::new_empty"}
# Another look at the same memory, or at the tensor's own properties.
VIEWS = {
    "aten::slice.Tensor",
    "aten::select.int",
    "aten::view",
    "aten::unsqueeze",
    "aten::permute",
    "prim::device",
}


class Seen(TorchDispatchMode):
    """Names of the operators of torch, and an error for a tensor that is not on `device`."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.names: List[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        for t in tree_leaves((args, kwargs, out)):
            if isinstance(t, torch.Tensor):
                assert t.device.type == self.device, f"{func.name()} touches {t.device}"
        return out


@dataclass
class Launch:
    """One launch: the kernel, the number of programs, and what it was given."""

    kernel: Any
    programs: int
    args: Tuple
    meta: Mapping[str, Any]
    found: Configuration

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def runtime_args(self) -> List[Any]:
        """The arguments that the compiled kernel takes, in order."""
        _, constexprs, _ = self._specialise()
        return [a for i, a in enumerate(self.args) if (i,) not in constexprs]

    def _specialise(self):
        """Signature, constexprs and attributes as Triton's own launcher would choose them."""
        names = self.kernel.arg_names
        signature, constexprs, attrs = {}, {}, {}
        for i, name in enumerate(names):
            if i >= len(self.args):
                signature[name], constexprs[(i,)] = "constexpr", self.meta[name]
                continue
            a = self.args[i]
            plain = self.kernel.params[i].do_not_specialize
            if a is None or (a == 1 if isinstance(a, int) and not plain else False):
                signature[name], constexprs[(i,)] = "constexpr", a
            elif isinstance(a, torch.Tensor):
                signature[name] = _TYPES[a.dtype]
                aligned = a.device.type == "meta" or a.data_ptr() % 16 == 0
                if aligned:
                    attrs[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "i32" if -(2**31) <= a < 2**31 else "i64"
                if not plain and a % 16 == 0:
                    attrs[(i,)] = [["tt.divisibility", 16]]
        return signature, constexprs, attrs

    def key(self) -> Tuple:
        """Equal for launches that compile to the same code."""
        signature, constexprs, attrs = self._specialise()
        return (
            self.name,
            tuple(signature.items()),
            tuple(sorted((k, str(v)) for k, v in constexprs.items())),
            tuple(attrs),
            self.found.warps,
            self.found.registers,
        )

    def compile(self, target: str):
        """The kernel compiled for a device that need not be there."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from cbam_fused.triton_kernels.problem import compile_options

        backend, arch, warp, _ = TARGETS[target]
        signature, constexprs, attrs = self._specialise()
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
        return triton.compile(
            source,
            target=GPUTarget(backend, arch, warp),
            options=compile_options(self.found, amd=backend == "hip"),
        )


@contextlib.contextmanager
def recording(device: Optional[Device] = None, run: bool = False) -> Iterator[List[Launch]]:
    """Launches of the block, in order; `device` is what the launchers believe to run on."""
    from cbam_fused.triton_kernels import configurations
    from cbam_fused.triton_kernels import problem as pb

    found: List[Launch] = []
    launch, describe = pb.launch, configurations.describe

    def record(kernel, programs, tensors, meta, configuration):
        found.append(Launch(kernel, programs, tuple(tensors), dict(meta), configuration))
        if run:
            launch(kernel, programs, tensors, meta, configuration)

    pb.launch = record
    if device is not None:
        configurations.describe = lambda _: device
    try:
        yield found
    finally:
        pb.launch, configurations.describe = launch, describe


def make_inputs(
    shape: Tuple[int, ...],
    dtype: torch.dtype,
    config: Config = Config(),
    hidden: Optional[int] = None,
    kernel: Tuple[int, ...] = (7, 7),
    channels_last: bool = False,
    norm: bool = True,
    device: str = "meta",
    seed: int = 0,
    parameters: Optional[torch.dtype] = None,
):
    """x, six weights, four norm tensors, in the order of the schemas. hidden 0: a one-layer gate. `parameters`: the
    dtype of all but x, where it is another."""
    generator = torch.Generator().manual_seed(seed)

    def make(*size: int, scale: float = 1.0, dtype: torch.dtype = parameters or dtype) -> torch.Tensor:
        if device == "meta":
            return torch.empty(size, dtype=dtype, device="meta")
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

    c = shape[1]
    h = max(1, c // 16) if hidden is None else hidden
    x = make(*shape, dtype=dtype)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    mlp = [None] * 4
    if config.pools:
        mlp = [make(h, c, scale=c**-0.5), make(h), make(c, h, scale=0.5), make(c)]
        if h == 0:
            mlp = [None, None, make(c, c, scale=c**-0.5), make(c)]
    conv, bn = [None] * 2, [None] * 4
    if config.spatial:
        planes = 1 if config.spatial == 3 else 2
        conv = [make(1, planes, *kernel, scale=0.3), make(1)]
        if norm:
            bn = [make(1), make(1), make(1), make(1).abs() + 0.5]
    return x, [*mlp, *conv], bn


def run_ops(
    x, weights, bn, config: Config, save: bool = True, backward: bool = True, dy=None, eps: float = 1e-5
):
    """Forward and backward through the launchers themselves, past the dispatcher."""
    from cbam_fused.triton_kernels import launchers

    options = (config.pools, config.spatial, config.ties)
    arguments = (x, *weights, *bn, eps, *options, config.residual)
    forward = launchers.cbam_forward(*arguments) if save else (launchers.cbam_inference(*arguments),)
    if not backward:
        return forward, None
    dy = torch.empty_like(x) if dy is None else dy
    return forward, launchers.cbam_backward(
        dy, x, *weights, *bn, eps, *forward[1:], *options, config.residual
    )


def run_split_ops(x, weights, bn, config: Config, save: bool = True, backward: bool = True, dy=None):
    """As `run_ops`, cut around a norm in training, which itself is left out; bn is not used."""
    from cbam_fused.triton_kernels import launchers

    options = (config.pools, config.spatial, config.ties)
    z, *saved = launchers.attention_forward(x, *weights, *options, save)
    y, s = launchers.scale_forward(x, saved[2], z, config.residual)
    if not backward:
        return (y, z, *saved, s), None
    dy = torch.empty_like(x) if dy is None else dy
    dz, dgate = launchers.scale_backward(dy, x, saved[2], s)
    return (y, z, *saved, s), launchers.attention_backward(
        dy, x, *weights, *saved, s, dz, dgate, *options, config.residual
    )


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses: registers a thread, what spills (bytes of stack, or AMD's vector registers), bytes
    of shared memory; whether some loop has a load from global memory of 16 bytes, and of 2; and whether there are
    atomics."""

    registers: int
    spilled: int
    shared: int
    wide_loop: bool
    narrow_loop: bool
    atomics: bool


# A label, a jump back to one, and loads of 16 bytes or more, and of 2, in each language.
_PTX = (
    r"(\$L\w+):",
    r"\bbra\S*\s+(\$L\w+)",
    r"\bld\.global\S*\.(v4\.b32|v2\.b64|v8\.b32|v4\.b64)",
    r"\bld\.global\S*\.[bu]16",
)
_AMD = (
    r"(\.L\w+):",
    r"s_c?branch\w*\s+(\.L\w+)",
    r"(global|buffer)_load_dwordx4",
    r"(global|buffer)_load_(ushort|short_d16)",
)


def resources(compiled, target: str) -> Resources:
    shared = compiled.metadata.shared
    if TARGETS[target][0] == "hip":
        text = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            return int(text.split(f".{name}:")[1].split()[0])

        # Spilled scalar registers go to lanes of a vector register, not to memory.
        return Resources(
            field("vgpr_count"),
            field("vgpr_spill_count"),
            shared,
            *_loads_in_loops(text, *_AMD),
            "_atomic_" in text,
        )
    report = cuobjdump(compiled, "-res-usage")
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    text = compiled.asm["ptx"]
    atomics = re.search(r"\b(atom|red)\.", text) is not None
    spilled = used["STACK"] + used["LOCAL"]
    return Resources(used["REG"], spilled, shared, *_loads_in_loops(text, *_PTX), atomics)


def cuobjdump(compiled, *options: str) -> str:
    """What NVIDIA's tool says of a compiled kernel. To disassemble it takes as long as to compile it."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, *options, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _loads_in_loops(text: str, label: str, jump: str, *loads: str) -> List[bool]:
    """For each pattern of a load, whether one is between a label and a jump back to it."""
    lines = text.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(label, line))}
    jumps = [(i, m[1]) for i, line in enumerate(lines) if (m := re.search(jump, line))]
    loops = [(labels[to], i) for i, to in jumps if labels.get(to, i) < i]
    inside = {i for first, last in loops for i in range(first, last)}
    return [any(re.search(load, lines[i]) for i in inside) for load in loads]


_work: Tuple[List[Launch], str] = ([], "")


def _inspect(i: int) -> Resources:
    some, target = _work
    return resources(some[i].compile(target), target)


def inspect_all(some: List[Launch], target: str) -> List[Resources]:
    """Compiles them, on every core: forked workers inherit the launches, which cannot be sent to others."""
    global _work
    _work = (some, target)
    if "fork" not in multiprocessing.get_all_start_methods():
        return [_inspect(i) for i in range(len(some))]
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        return pool.map(_inspect, range(len(some)), chunksize=1)
