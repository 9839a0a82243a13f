"""benchmarks/passes.py: the clocks around the passes of the CPU kernels, and versions in turns."""

from __future__ import annotations

import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from oracle import processors

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import passes  # noqa: E402

SMALL = ["--shape", "96,9,7", "--threads", "2", "--rounds", "3"]
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="compiles csrc/cpu: no c++ here")


def small_version(layout="contiguous", batch="3", seed=2, shape=(96, 9, 7)):
    """The kernels as they lie there, at work on 96x9x7; baseline is the quickest to compile."""
    options = passes.parse([*SMALL, "--isa", "baseline", "--layout", layout, "--batch", batch])
    version = passes.Version("now", passes.compile_version(None, "baseline", "float32"))
    x, dy = (passes.make_input(shape, options, s) for s in (1, seed))
    version.take(shape, options, x, dy)
    return version, x, dy


@needs_compiler
@pytest.mark.parametrize("batch", ["4", "1"], ids=["own samples", "a shared sample"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_pass_is_timed_and_no_longer_than_its_call(layout, batch):
    version, x, _dy = small_version(layout, batch)
    out = passes.aligned(x.size, np.float32)
    for backward, names in ((False, passes.FORWARD), (True, passes.BACKWARD)):
        seconds = version.run(backward, out)
        first = len(passes.FORWARD) if backward else 0
        own = seconds[first : first + len(names)]
        assert (own > 0).all()
        assert not np.delete(seconds[: passes.COUNT], range(first, first + len(names))).any()
        assert own.sum() <= seconds[passes.COUNT]  # threads' times over their number
    version.release()


# What one thread does for all, and what every thread enters, whatever it finds to do there.
ALONE = ("what forward saved", "MLP's backward")
ENTERED = ("gradients of the weights",)


# Of a sample that in backward is one tile, shared by rows: what goes another way than above.
BY_ROWS = {
    "spatial gate",
    "products of x and dy",
    "gradient of the maps",
    "rest of the gate's gradient",
    "dx",
}


@needs_compiler
@pytest.mark.skipif(processors() < 2, reason="two threads need two processors")
@pytest.mark.parametrize("shape, some", [((96, 56, 56), None), ((96, 40, 40), BY_ROWS)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_both_threads_have_a_part_in_every_pass_of_a_batch_of_one(layout, shape, some):
    """A thread that waits is as busy as one that works, and one that is late finds its part done by the other. So it is
    counted who enters a pass, call by call until in some call both have: what only one may do at a time, no call has
    twice."""
    version, x, _dy = small_version(layout, "1", shape=shape)
    out = passes.aligned(x.size, np.float32)
    for backward, names in ((False, passes.FORWARD), (True, passes.BACKWARD)):
        wanted = {p.name for p in names} - {*ALONE, *ENTERED}
        if some:
            wanted &= some
        until = time.monotonic() + 30
        while wanted and time.monotonic() < until:
            version.run(backward, out)
            calls = [version.calls(thread) for thread in (0, 1)]
            both = np.minimum(*calls)[len(passes.FORWARD) if backward else 0 :]
            wanted -= {p.name for p, count in zip(names, both) if count}
            assert not any(count for p, count in zip(names, both) if p.name in ALONE)
        assert not wanted, f"no call in which both threads had a part of {wanted}"
    version.release()


@needs_compiler
def test_a_run_prints_every_pass(capsys):
    assert passes.main([*SMALL, "--isa", "baseline", "--batch", "4", "--between", "1"]) == 0
    out = capsys.readouterr().out
    assert "4x96x9x7 float32 contiguous baseline" in out
    ms = {name.strip(): float(value) for name, value in re.findall(r"^(.{32}) *(-?[\d.]+)", out, re.M)}
    names = [p.name for p in passes.FORWARD + passes.BACKWARD]
    assert [n for n in ms if n in names] == names
    assert {"forward", "y read by the next layer", "backward", "dx read by the layer before"} < set(ms)
    assert passes.OUTSIDE in ms and ms["forward"] > 0 and ms["backward"] > 0


@needs_compiler
def test_another_seed_of_dy_changes_dx_and_not_y():
    """The harness runs the kernels it says: y from x alone, dx from both, and no dependence on what lay there."""
    results = []
    for seed in (2, 2, 5):
        version, x, _dy = small_version(seed=seed)
        y, dx = passes.aligned(x.size, np.float32), passes.aligned(x.size, np.float32)
        y[:] = dx[:] = np.nan
        version.run(False, y)
        version.run(True, dx)
        results.append((y, dx))
        gradients = version.gradients()
        assert gradients.size == 2 * 6 * 96 + 6 + 96 + 98 and gradients[-(96 + 98) :].all()
        assert np.count_nonzero(gradients[: 6 * 96]) >= 96  # at least one hidden unit is alive
        version.release()
    (y0, dx0), (y1, dx1), (y2, dx2) = results
    assert np.array_equal(y0, y1) and np.array_equal(dx0, dx1)
    assert np.array_equal(y0, y2) and not np.array_equal(dx0, dx2)
    assert (np.abs(y0) < np.abs(x)).all()  # gates are between 0 and 1


def version_that_writes(value: float, parameters: float = 1.0) -> passes.Version:
    class Stub(passes.Version):
        def __init__(self) -> None:
            self.name = f"writes {value}"

        def run(self, backward: bool, out: np.ndarray) -> np.ndarray:
            out[:] = 1.0 if backward else value
            return np.ones(passes.COUNT + 1)

        def gradients(self) -> np.ndarray:
            return np.full(5, parameters)

    return Stub()


@pytest.mark.parametrize(
    "other, message", [(1.0001, "is off by 0.0001"), (np.nan, "off by nan"), (0.0, "off by 1")]
)
def test_versions_that_compute_something_else_are_not_timed(other, message):
    options = passes.parse(SMALL)
    out = passes.aligned(8, np.float32)
    passes.check_agreement([version_that_writes(1.0), version_that_writes(1.000001)], options, out)
    with pytest.raises(SystemExit, match=message):
        passes.check_agreement([version_that_writes(1.0), version_that_writes(other)], options, out)
    with pytest.raises(SystemExit, match="the gradient of the parameters.*" + message):
        passes.check_agreement([version_that_writes(1.0), version_that_writes(1.0, other)], options, out)


def test_floors_are_what_a_pass_moves():
    assert passes.Pass("a", reads=2).floor(3.0, 10.0) == 6.0
    assert passes.Pass("a", reads=1, writes=1).floor(3.0, 10.0) == 10.0
    assert passes.Pass("a").floor(3.0, 10.0) == 0.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "24,9"], "--shape is C,H,W, three positive numbers"),
        (["--shape", "24,9,x"], "--shape is C,H,W, three positive numbers"),
        (["--threads", "0"], "--threads is 1 to 256, --batch and --rounds at least 1"),
        (["--isa", "avx512_bf16"], "--isa avx512_bf16 has kernels for --dtype bfloat16 alone"),
    ],
)
def test_bad_options_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit):
        passes.parse(arguments)
    assert message in capsys.readouterr().err
