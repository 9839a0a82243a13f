"""Measuring: interleaved timing, peak extra memory, and bytes kept for backward."""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor

from benchmarks.providers import Candidate
from benchmarks.shapes import Case

# A call shorter than this is repeated within a sample: the clock's own cost disappears, and what the
# candidate before has left in caches and heap fades.
SAMPLE_SECONDS = 2e-3


@dataclass
class Step:
    """What is timed under a name: one inference, or one training step."""

    label: str
    call: Callable[[], None]
    threads: int
    samples: List[float] = field(default_factory=list)  # ms a call
    faults: List[float] = field(default_factory=list)  # page faults a call
    repeat: int = 1

    def percentile(self, q: float) -> float:
        """q in [0, 1], linear between order statistics."""
        ordered = sorted(self.samples)
        at = q * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def candidate_step(case: Case, candidate: Candidate, x: Tensor, dy: Tensor) -> Step:
    """Inference without grad, or forward and backward to dx and all parameter gradients.

    Everything that a call makes is freed within it, as is the result of a copy. y is let go before
    backward begins: in a network whoever still needs it holds it, whichever CBAM has made it.
    """
    module = candidate.module
    if case.mode == "infer":

        def infer() -> None:
            with torch.no_grad():
                module(x)

        return Step(candidate.label, infer, candidate.threads)
    leaf = x.detach().requires_grad_(True)
    parameters = list(candidate.owner.parameters())

    def train() -> None:
        edge = torch.autograd.graph.get_gradient_edge(module(leaf))
        torch.autograd.backward([edge], [dy])
        leaf.grad = None
        for p in parameters:
            p.grad = None

    return Step(candidate.label, train, candidate.threads)


def copy_step(case: Case, x: Tensor, dy: Tensor) -> Step:
    """The yardstick. Inference: a copy, 2 S. Training: a copy and an out-of-place add, 2 S + 3 S."""
    if case.mode == "infer":

        def copy() -> None:
            x.clone()

        return Step("copy", copy, case.threads)

    def copy_add() -> None:
        x.clone()
        x + dy

    return Step("copy", copy_add, case.threads)


def last_level_cache() -> int:
    """Bytes of the third-level cache that a core sees; 32 MiB where Linux's table has none."""
    table = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if not table.exists():
        return 32 << 20
    text = table.read_text().strip()
    return int(text[:-1]) << {"K": 10, "M": 20}[text[-1]]


def page_faults() -> int:
    """Pages that the system has given to this process so far; 0 where it does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class _Cpu:
    """Milliseconds and page faults a call.

    Each timed call follows an untimed one of the same candidate: it meets the heap and the caches as it leaves
    them itself, as in a loop over it, and not what the candidate before it has left. (Freed pages that malloc gives
    back to the system cost whoever allocates next.) `cold` evicts the last-level cache in between, which also
    evicts the interpreter: calls of a fraction of a millisecond then measure mostly how it comes back."""

    def __init__(self, cold: bool) -> None:
        self.flush = torch.ones(2 * last_level_cache() // 4) if cold else None

    def time(self, step: Step) -> Tuple[float, float]:
        step.call()
        if self.flush is not None:
            self.flush.add_(1)
        faults = page_faults()
        start = time.perf_counter()
        for _ in range(step.repeat):
            step.call()
        seconds = time.perf_counter() - start
        return seconds * 1e3 / step.repeat, (page_faults() - faults) / step.repeat


class _Cuda:
    """Events around calls that start with a cold L2, as they would between a network's layers."""

    def __init__(self, device: torch.device):
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(2 * size, dtype=torch.uint8, device=device)

    def time(self, step: Step) -> Tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        step.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), 0.0


def time_interleaved(
    case: Case,
    steps: Sequence[Step],
    rounds: int,
    seconds: float,
    progress: Callable[[float], None] = lambda share: None,
    cold: bool = False,
) -> None:
    """Fills `samples` of every step, a sample a round, until `rounds` or `seconds` (at least 5 rounds).

    The steps take turns within a round and each round starts with another one, so that a change of
    the machine's speed, or what a neighbour leaves in the cache, falls on all alike.
    """
    cuda = case.device == "cuda"
    clock = _Cuda(torch.device("cuda")) if cuda else _Cpu(cold)
    for step in steps:
        torch.set_num_threads(step.threads)
        step.call()
        fastest = min(clock.time(step)[0] for _ in range(2))
        if not cuda and not cold:  # a repeated call would not be cold
            step.repeat = max(1, min(1000, int(SAMPLE_SECONDS * 1e3 / max(fastest, 1e-6)) + 1))
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    try:
        for done in range(rounds + 1):
            turn = done % len(steps)
            for step in (*steps[turn:], *steps[:turn]):
                if torch.get_num_threads() != step.threads:
                    torch.set_num_threads(step.threads)
                    step.call()  # the thread pool changes its size in here
                sample, faults = clock.time(step)
                if done:  # the first round warms up
                    step.samples.append(sample)
                    step.faults.append(faults)
            spent = time.perf_counter() - start
            progress(max(done / rounds, min(1.0, spent / seconds)))
            if spent > seconds and done >= 5:
                break
    finally:
        gc.enable()
        torch.set_num_threads(case.threads)


def cpu_allocations(call: Callable[[], None]) -> List[int]:
    """Bytes that a call takes from the CPU allocator, and, negative, gives back, in order.

    Memory that a kernel takes from elsewhere does not show. The call is a new thread's first one, so that what a thread
    keeps from call to call (scratch of the CPU backend) counts.
    """
    from torch.profiler import ProfilerActivity, profile

    gc.collect()

    def first_call() -> profile:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        return profiler

    with profile(activities=[ProfilerActivity.CPU]):
        pass  # its library complains where another thread than the main one is the first to use it
    with ThreadPoolExecutor(1) as new_thread:
        profiler = new_thread.submit(first_call).result()
    changes = []
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag.name == "Allocation" and event.extra_fields.device.type == "cpu":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return [change for _, change in sorted(changes, key=lambda c: c[0])]


def peak_bytes(device: str, step: Step) -> int:
    """Most bytes held at once by a call beyond what was held before it, its results included; on the CPU those of
    `cpu_allocations`."""
    step.call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return max(itertools.accumulate(cpu_allocations(step.call), initial=0))


def kept_bytes(candidate: Candidate, x: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward in storages other than x and parameters."""
    leaf = x.detach().requires_grad_(True)
    known = {
        t.untyped_storage().data_ptr()
        for t in (leaf, *candidate.owner.parameters(), *candidate.owner.buffers())
    }
    kept: Dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = candidate.module(leaf)
    total = sum(kept.values())
    del y
    return total
