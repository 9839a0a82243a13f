"""The host execution model: right kernels pass with the same bits under every seed, planted faults are reported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build  # noqa: E402
from build import Array, SimtError  # noqa: E402

DRIVERS = Path(__file__).resolve().parent / "drivers"
SEEDS = range(4)
FLAVOR = build.default_flavor()
CHECKED = FLAVOR == "checked"
only_checked = pytest.mark.skipif(not CHECKED, reason="needs the hooks of the checked flavour")


@pytest.fixture(scope="module")
def correct() -> build.Library:
    return build.load(DRIVERS / "correct.cpp")


@pytest.fixture(scope="module")
def faults() -> build.Library:
    return build.load(DRIVERS / "faults.cpp")


def bfloat16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def over_seeds(run) -> np.ndarray:
    """`run(seed)` for each seed; asserts that all results have the same bits."""
    results = [run(seed) for seed in SEEDS]
    for r in results[1:]:
        assert r.tobytes() == results[0].tobytes()
    return results[0]


@pytest.mark.parametrize("columns", [1, 37, 1024])
def test_row_sum(correct, columns):
    x = np.random.default_rng(0).integers(-9, 9, (9, columns)).astype(np.float32)

    def run(seed):
        source, out = Array(x, "x", read_only=True), Array(np.zeros(9, np.float32), "out", unwritten=True)
        correct.run("run_row_sum", source, out, 9, columns, seed=seed)
        if CHECKED:
            assert (source.bytes_read, out.bytes_written) == (x.nbytes, 36)
        return out.data

    assert np.array_equal(over_seeds(run), x.sum(1))


@pytest.mark.parametrize("resident", [1, 3, 16])
@pytest.mark.parametrize("grid", [1, 7])
def test_ticketed_persistent_kernel(correct, grid, resident):
    units, tiles, width = 6, 5, 33
    x = np.random.default_rng(1).standard_normal((units, tiles, width)).astype(np.float32)

    def run(seed):
        out = Array(np.zeros_like(x), "out", unwritten=True)
        counters = np.zeros(2 + units, np.uint32)
        partial = Array(np.zeros((units, tiles), np.float32), "partial", unwritten=True)
        correct.run(
            "run_tickets", Array(x, "x", read_only=True), partial, out, counters, units, tiles, width, grid, 3,
            seed=seed, resident=resident,
        )  # fmt: skip
        assert not counters.any(), "the counters reset themselves"
        return out.data

    want = x.astype(np.float64) * x.astype(np.float64).sum((1, 2), keepdims=True)
    np.testing.assert_allclose(over_seeds(run), want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("cluster", [1, 2, 8])
def test_cluster_with_bulk_copies(correct, cluster):
    n = 1024
    x = bfloat16(np.random.default_rng(2).integers(-3, 4, (3, n)))

    def run(seed):
        source, y = Array(x, "x", read_only=True), Array(np.zeros_like(x), "y", unwritten=True)
        correct.run("run_cluster_scale", source, y, 3, n, cluster, seed=seed)
        assert (source.bytes_read, y.bytes_written) == (x.nbytes, x.nbytes)
        return y.data

    values = from_bfloat16(x)
    want = values * values.sum(1, keepdims=True)
    assert np.array_equal(from_bfloat16(over_seeds(run)), from_bfloat16(round_to_bfloat16(want)))


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    u = x.astype(np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def test_copies_between_shared_memories(correct):
    x = np.random.default_rng(3).standard_normal((8, 64)).astype(np.float32)

    def run(seed):
        y = Array(np.zeros_like(x), "y", unwritten=True)
        correct.run("run_rotate", Array(x, "x", read_only=True), y, 8, 64, 4, seed=seed)
        return y.data

    source = np.array([b // 4 * 4 + (b - 1) % 4 for b in range(8)])
    assert np.array_equal(over_seeds(run), x[source] + source[:, None].astype(np.float32))


def test_pipelined_async_copies(correct):
    x = np.random.default_rng(4).integers(-99, 99, (7, 256)).astype(np.float32)

    def run(seed):
        y = Array(np.zeros(256, np.float32), "y", unwritten=True)
        correct.run("run_pipeline", Array(x, "x", read_only=True), y, 7, seed=seed)
        return y.data

    assert np.array_equal(over_seeds(run), x.sum(0))


def test_named_barriers(correct):
    x = np.arange(5 * 32, dtype=np.int32).reshape(5, 32)

    def run(seed):
        y = np.zeros(32, np.int32)
        correct.run("run_producer", Array(x, "x", read_only=True), y, 5, seed=seed)
        return y

    assert np.array_equal(over_seeds(run)[::-1], x.sum(0))


def test_votes_and_shuffles(correct):
    out = np.zeros(6, np.uint32)
    correct.run("run_votes", out)
    ballot = sum(1 << lane for lane in range(0, 32, 3))
    assert out.tolist() == [ballot, 0xFF000000, sum(range(32)), 2**32 - 26, 64, 16]


def test_half_and_bfloat16_conversions(correct):
    rng = np.random.default_rng(5)
    every = np.arange(0x10000, dtype=np.uint32) << 16
    bits = np.concatenate([rng.integers(0, 2**32, 200_000, dtype=np.uint32), every])
    halves = np.arange(0x10000, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        ties = (halves[:-1].astype(np.float64) + halves[1:]) / 2
        x = np.concatenate([bits.view(np.float32), halves, ties.astype(np.float32)])
        want_half = x.astype(np.float16)
    h, b = np.zeros(x.size, np.uint16), np.zeros(x.size, np.uint16)
    back_h, back_b = np.zeros_like(x), np.zeros_like(x)
    correct.run("run_convert", x, h, b, back_h, back_b, x.size)
    nan = np.isnan(x)
    assert np.array_equal(h[~nan], want_half.view(np.uint16)[~nan]) and np.all(np.isnan(back_h[nan]))
    assert np.array_equal(b[~nan], round_to_bfloat16(x)[~nan]) and np.all(np.isnan(back_b[nan]))
    exact = np.isin(x, halves) & ~nan
    assert np.array_equal(back_h[exact], x[exact])


def test_speed(correct):
    """64 blocks of 256 threads; a guard against a slow switch, not a measurement."""
    x = np.ones((64, 2048), np.float32)
    out = np.zeros(64, np.float32)
    begin = time.process_time()
    correct.run("run_row_sum", Array(x, "x", read_only=True), out, 64, 2048)
    assert time.process_time() - begin < 5.0
    assert np.all(out == 2048)


# function: what the message must say. The line must be one marked FAULT in drivers/faults.cpp.
# The reader comes after, or before, the writer that it does not wait for.
EARLY = "race: read .* shared memory|read of unwritten shared memory"
FAULTS = {
    "missing_barrier": EARLY,
    "missing_second_barrier": "race: (store|read) ",
    "missing_syncwarp": EARLY,
    "byte_race": EARLY,
    "global_store_bounds": "out-of-bounds store of 4 bytes at byte 512 of 'out', which has 512 bytes",
    "global_load_bounds": "out-of-bounds load of 4 bytes",
    "read_only_store": "store of 4 bytes into the read-only buffer 'x'",
    "shared_bounds": "out-of-bounds store of 4 bytes at byte 256 of shared memory",
    "static_shared_bounds": "out-of-bounds store",
    "local_bounds": "index [45] is out of the bounds",
    "unwritten_shared": "read of unwritten shared memory at byte 256",
    "unwritten_global": "of unwritten memory at byte .* of 'out'",
    "half_unwritten_shared": "read of unwritten shared memory at byte",
    "half_unwritten_global": "of unwritten memory at byte .* of 'out'",
    "async_not_waited": "asynchronous copy into it has not landed",
    "async_no_barrier": "race: read|unwritten shared|asynchronous copy into it has not landed",
    "async_never_waited": "returned before this cp.async was waited for",
    "bulk_not_waited": "before the bulk copy into it was waited for",
    "bulk_wrong_parity": "before the bulk copy into it was waited for",
    "bulk_expect_too_much": "livelock",
    "mbarrier_no_barrier": "never initialised|initialisation is not ordered",
    "bulk_misaligned": "misaligned",
    "bulk_store_no_fence": "no fence.proxy.async",
    "bulk_store_overwritten": "overwritten before the store was waited for",
    "bulk_store_never_waited": "returned before this bulk store was waited for",
    "early_return": "divergent barrier",
    "two_barriers": "divergent barrier",
    "barrier_deadlock": "deadlock",
    "cluster_deadlock": "livelock",
    "livelock": "livelock",
    "volatile_poll": "livelock",
    "plain_poll": "livelock: the thread reads and writes without end",
    "shuffle_absent_lane": "shuffles from lane 16|not in the mask 0000ffff",
    "shuffle_returned_lane": "lane 31 returned|have returned",
    "shuffle_partial_warp": "do not exist",
    "shuffle_outside_mask": "leaves it out",
    "shuffle_divergent": "different warp operations",
    "misaligned_ldg": "misaligned load of 16 bytes",
    "misaligned_dereference": "misaligned access .* 'const (struct )?float4'",
    "misaligned_shared": "misaligned access .* '(struct )?double2'",
    "remote_before_start": "before a cluster barrier shows that it has started",
    "remote_after_return": "which has returned",
    "remote_race": "race: ",
    "relaxed_cluster_arrive": EARLY,
    "handover_no_barrier": "race: load .* 'out', written by .* no release and acquire|unwritten memory",
    "handover_relaxed_signal": "race: load .* 'out', written by .* no release and acquire",
    "handover_relaxed_poll": "race: load .* 'out'",
    "handover_read_only": "read-only path",
    "handover_chain_broken": "race: load .* 'out', written by .* no release and acquire",
    "ring_overwritten": "race: (store|load) .* 'out'",
    "shared_written_twice": "race: store .* shared memory .* last written by",
    "global_written_twice": "race: store .* 'out', written by .* no release and acquire",
    "shared_written_behind_readers": "race: store .* shared memory .* read by",
    "global_written_behind_readers": "race: store .* 'out', read by",
    "bytes_of_a_word": "race: (store .* shared memory .* read by|read .* shared memory .* last written by)",
    "halves_of_a_word": "race: (store .* 'out', read by|load .* 'out', written by)",
    "named_barrier_not_waited": "race: (store .* shared memory .* read by|read .* shared memory .* last written by)",
    "bulk_never_waited": "returned before the bulk copy of .* landed in its shared memory",
    "bulk_store_early_fence": "no fence.proxy.async",
    "bulk_store_fence_before_own": "no fence.proxy.async",
    "bulk_store_fence_before_syncthreads": "no fence.proxy.async",
    "bulk_store_fence_before_syncwarp": "no fence.proxy.async",
    "bulk_store_fence_before_named": "no fence.proxy.async",
    "bulk_store_fence_before_acquire": "no fence.proxy.async",
    "mbarrier_arrivals_too_many": "more arrivals at an mbarrier than its count of 2",
    "cluster_not_waited": "returned between a cluster arrive and its wait",
    "cluster_arrived_twice": "a second arrive without a wait between",
    "cluster_returned_lane": "lane 5 returned|have returned",
    "atomic_beside_plain": "race: (read .* shared memory .* last written by|.* shared memory .* read by)",
}
# Reported when the last thread has gone: of the block, not of a thread.
OF_A_BLOCK = {"bulk_never_waited"}
# Found without hooks: through helpers, barriers and the scheduler.
WITHOUT_HOOKS = {
    "async_never_waited", "bulk_expect_too_much", "bulk_misaligned", "bulk_store_overwritten",
    "bulk_store_never_waited", "bulk_never_waited", "mbarrier_arrivals_too_many", "cluster_not_waited",
    "cluster_arrived_twice", "cluster_returned_lane", "early_return", "two_barriers", "barrier_deadlock", "cluster_deadlock", "livelock",
    "shuffle_absent_lane", "shuffle_returned_lane", "shuffle_partial_warp", "shuffle_outside_mask",
    "shuffle_divergent", "misaligned_ldg", "global_load_bounds",
}  # fmt: skip


def run_fault(library, name, seed):
    x = Array(np.arange(128, dtype=np.float32), "x", read_only=True)
    out = Array(np.zeros(128, np.float32), "out", unwritten=True)
    library.run(f"run_{name}", x, out, Array(np.zeros(4, np.uint32), "counters"), seed=seed)
    return out.data


def fault_lines(name: str) -> set[int]:
    lines = (DRIVERS / "faults.cpp").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if re.match(rf"(FAULT|HANDOVER|CHAIN)\({name},", line))
    last = first
    while lines[first].startswith("FAULT") and lines[last] != "}":
        last += 1
    return {i + 1 for i in range(first, last + 1) if "// FAULT" in lines[i]}


@pytest.mark.parametrize("name", [n for n in FAULTS if CHECKED or n in WITHOUT_HOOKS])
def test_fault_is_reported(faults, name):
    for seed in SEEDS:
        with pytest.raises(SimtError) as caught:
            run_fault(faults, name, seed)
        message = str(caught.value)
        assert re.search(FAULTS[name], message, re.DOTALL), message
        if name == "remote_race":
            continue
        named = {int(line) for line in re.findall(r"faults\.cpp:(\d+)", message)}
        assert named & fault_lines(name), message
        if "lock" not in FAULTS[name] and name not in OF_A_BLOCK:
            assert re.search(rf"kernel '{name}' block \(\d+,0,0\) thread \(\d+,0,0\)", message), message


@pytest.mark.parametrize("name", ["handover", "handover_fence", "handover_chain"])
def test_right_handover_passes(faults, name):
    for seed in range(10):
        run_fault(faults, name, seed)


@pytest.mark.parametrize("name", ["async_source_overwritten", "bulk_source_overwritten"])
def test_a_copy_may_read_its_source_late(faults, name):
    """Nothing is reported, but no kernel's results that hang on it are the same under every seed."""
    brought = {float(run_fault(faults, name, seed)[1]) for seed in range(20)}
    assert brought == {1.0, 2.0}


@pytest.mark.parametrize(
    "name, reason", [("too_much_shared", "at most 227 KiB"), ("uneven_cluster", "does not divide")]
)
def test_impossible_launch(faults, name, reason):
    with pytest.raises(SimtError, match=f"kernel '{name}': .*{reason}"):
        run_fault(faults, name, 0)


@pytest.mark.skipif(FLAVOR == "asan", reason="the switch is told apart by the runtime, not by the flavour")
def test_portable_switch():
    library = build.load(DRIVERS / "correct.cpp", flavor="portable")
    x = np.random.default_rng(6).integers(-9, 9, (5, 96)).astype(np.float32)
    out = np.zeros(5, np.float32)
    for seed in SEEDS:
        library.run("run_row_sum", Array(x, "x", read_only=True), out, 5, 96, seed=seed)
        assert np.array_equal(out, x.sum(1))


def test_library_recovers_after_a_fault(faults):
    with pytest.raises(SimtError):
        run_fault(faults, "early_return", 0)
    run_fault(faults, "handover", 0)


@only_checked
def test_misaligned_slice():
    library = build.load(DRIVERS / "correct.cpp")
    x = np.ones((2, 1024), np.float32)
    with pytest.raises(SimtError, match="misaligned load of 16 bytes"):
        library.run("run_row_sum", Array(x, "x", read_only=True, offset=4), np.zeros(2, np.float32), 2, 1024)


@only_checked
def test_parts_of_an_array_are_buffers_of_their_own(correct):
    """Each is counted by itself; a store between two of them, or past one, belongs to none."""
    x = np.ones((9, 32), np.float32)

    def run(**parts):
        out = Array(np.zeros(9, np.float32), "out", unwritten=True, parts=parts)
        correct.run("run_row_sum", Array(x, "x", read_only=True), out, 9, 32)
        return out

    out = run(low=(0, 16), high=(16, 20))
    assert np.array_equal(out.data, x.sum(1)) and out.moved == {"low": 16, "high": 20}
    assert out.bytes_written == 36
    with pytest.raises(SimtError, match="out-of-bounds store of 4 bytes"):
        run(low=(0, 16), high=(20, 16))


def sanitized(code: str) -> subprocess.CompletedProcess[str]:
    prelude = (
        f"import sys; sys.path.insert(0, {str(build.HERE)!r})\nimport numpy as np, build, test_simt as t\n"
    )
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        env=build.sanitized_environment(),
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(FLAVOR == "asan", reason="runs the sanitized flavour itself")
@pytest.mark.parametrize(
    "name, reason",
    [
        ("global_store_bounds", "heap-buffer-overflow"),
        ("shared_bounds", "use-after-poison"),
        ("static_shared_bounds", "use-after-poison"),
        ("local_bounds", "out of bounds"),
        ("misaligned_dereference", "misaligned address"),
        ("signed_overflow", "signed integer overflow"),
    ],
)
def test_address_and_undefined_behaviour_sanitizers(name, reason):
    out = sanitized(f"t.run_fault(build.load(t.DRIVERS / 'faults.cpp'), {name!r}, 0)")
    assert out.returncode == 97, out.stderr
    assert reason in out.stderr and re.search(r"faults\.cpp:\d+", out.stderr), out.stderr


@pytest.mark.skipif(FLAVOR == "asan", reason="runs the sanitized flavour itself")
def test_this_file_under_sanitizers():
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=build.sanitized_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr
    assert re.search(r"\d+ passed", out.stdout), out.stdout


def test_build_is_cached():
    first = build.build(DRIVERS / "correct.cpp")
    stamp = os.stat(first).st_mtime_ns
    assert build.build(DRIVERS / "correct.cpp") == first and os.stat(first).st_mtime_ns == stamp


def test_compile_error_is_shown(tmp_path):
    source = tmp_path / "bad.cpp"
    source.write_text('#include "simt.h"\n__global__ void k() { __shared__ float s[4]; }\n')
    with pytest.raises(RuntimeError, match="declare shared memory with CBAM_SHARED"):
        build.build(source)
