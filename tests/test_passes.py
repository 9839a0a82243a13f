"""benchmarks/passes.py: the clocks around the passes of the CPU kernels, and versions in turns."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import passes  # noqa: E402

SMALL = ["--shape", "24,9,7", "--threads", "2", "--rounds", "3"]
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="compiles csrc/cpu: no c++ here")


@needs_compiler
@pytest.mark.parametrize("batch", ["4", "1"], ids=["own samples", "a shared sample"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_pass_is_timed_and_no_longer_than_its_call(capsys, layout, batch):
    isa = ["--isa", "baseline"]  # the quickest to compile
    assert passes.main([*SMALL, *isa, "--layout", layout, "--batch", batch]) == 0
    out = capsys.readouterr().out
    assert f"{batch}x24x9x7 float32 {layout} baseline" in out
    ms = {name.strip(): float(value) for name, value in re.findall(r"^(.{32}) *([\d.]+)", out, re.M)}
    whole = {"forward": passes.FORWARD, "backward": passes.BACKWARD}
    for call, parts in whole.items():
        assert all(p.name in ms for p in parts)
        # Medians of three rounds each, to a thousandth.
        assert 0 < sum(ms[p.name] for p in parts) <= 1.5 * ms[call] + 0.01 * len(parts)
    reads = ms["y read by the next layer"] + ms["dx read by the layer before"]
    assert ms["the calls and those reads"] >= 0.5 * (ms["forward"] + ms["backward"] + reads)


@needs_compiler
def test_another_seed_of_dy_changes_dx_and_not_y():
    """The harness runs the kernels it says: y from x alone, dx from both, and no dependence on what lay there."""
    options = passes.parse([*SMALL, "--isa", "baseline", "--batch", "3"])
    version = passes.Version("now", passes.compile_version(None, "baseline", "float32"))
    results = []
    for seed in (2, 2, 5):
        x, dy = (passes.make_input((24, 9, 7), options, s) for s in (1, seed))
        version.take((24, 9, 7), options, x, dy)
        y, dx = passes.aligned(x.size, np.float32), passes.aligned(x.size, np.float32)
        y[:] = dx[:] = np.nan
        version.run(False, y)
        version.run(True, dx)
        version.release()
        results.append((y, dx))
    (y0, dx0), (y1, dx1), (y2, dx2) = results
    assert np.array_equal(y0, y1) and np.array_equal(dx0, dx1)
    assert np.array_equal(y0, y2) and not np.array_equal(dx0, dx2)
    assert (np.abs(y0) < np.abs(x)).all()  # gates are between 0 and 1


def version_that_writes(value: float) -> passes.Version:
    class Stub(passes.Version):
        def __init__(self) -> None:
            self.name = f"writes {value}"

        def run(self, backward: bool, out: np.ndarray) -> np.ndarray:
            out[:] = value
            return np.ones(passes.COUNT + 1)

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
