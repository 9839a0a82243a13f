"""benchmarks/cuda_bytes.py: its rows, on maps that take seconds, and what it judges."""

from __future__ import annotations

import re
import shutil

import pytest

if shutil.which("g++") is None:
    pytest.skip("there is no g++ to compile the kernels for the host", allow_module_level=True)

import cuda_ptx
from simt import build

from benchmarks import cuda_bytes


def _rows(capsys, *arguments: str) -> list:
    cuda_bytes.main([*arguments, "--tier", "resident", "--layout", "contiguous"])
    return capsys.readouterr().out.splitlines()


@pytest.mark.skipif(build.default_flavor() != "checked", reason="only the checked flavour counts bytes")
def test_counted_rows_of_the_resident_tier(capsys):
    """Exactly 2 S and 3 S; what the tier does not take is said to go elsewhere."""
    rows = _rows(capsys, "--shapes", "16,14,14", "16,7,7", "6,7,7", "--dtype", "float32")
    assert [row.split()[:3] for row in rows] == [
        ["resident", name, f"1,{shape}"]
        for shape in ("16,14,14", "16,7,7", "6,7,7")
        for name in ("forward", "backward")
    ]
    for forward, backward in (rows[:2], rows[2:4]):
        assert re.search(r"x-sized 2\.000 S .* pass \(bar 2\)$", forward)
        assert re.search(r"x-sized 3\.000 S .* pass \(bar 3\)$", backward)
    assert all(row.endswith("goes to the streamed tier") for row in rows[4:])


@pytest.mark.skipif(build.default_flavor() != "checked", reason="only the checked flavour counts bytes")
def test_scratch_memory_by_tensor(capsys):
    """What the option prints below a row are the parts of the row's scratch memory."""
    cuda_bytes.main("--tier streamed --layout contiguous --shapes 16,14,14 --by-tensor".split())
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4 and [row.split()[:2] for row in rows[::2]] == [
        ["streamed", "forward"],
        ["streamed", "backward"],
    ]
    for row, parts in zip(rows[::2], rows[1::2]):
        moved = [float(v) for v in re.findall(r"(\S+) S", parts)]
        assert moved and min(moved) > 0
        assert abs(sum(moved) - float(re.search(r"scratch +(\S+) S", row)[1])) <= 1e-3 * len(moved)


@pytest.mark.skipif(build.default_flavor() != "checked", reason="only the checked flavour counts bytes")
@pytest.mark.parametrize("shape, x_sized", (("512,7,7", 4), ("128,28,28", 4 + 16 / (28 * 28 * 2))))
def test_counted_rows_of_the_streamed_tier(capsys, shape, x_sized):
    """A tiny map, whose samples are chained, and what gathers: the bars hold, and x-sized tensors move 4 S and 5 S.

    Where rows are not folded, the plain pool reads 16 bytes a channel again.
    """
    cuda_bytes.main(["--tier", "streamed", "--shapes", shape, "--layout", "contiguous"])
    forward, backward = capsys.readouterr().out.splitlines()
    assert forward.split()[2] == backward.split()[2] == f"8,{shape}"
    assert re.search(rf"x-sized {x_sized:.3f} S .* pass \(bar 4\.1\)$", forward)
    assert re.search(r"x-sized 5\.000 S .* pass \(bar 5\.2\)$", backward)


@pytest.mark.skipif(cuda_ptx.unavailable() is not None, reason=str(cuda_ptx.unavailable()))
def test_modelled_rows_of_the_resident_tier(capsys):
    """The traffic of a tiny map: all of it once, and small tensors counted apart; no bar for its time."""
    rows = _rows(capsys, "--modelled", "--samples", "2", "--shapes", "32,14,14", "6,7,7")
    pattern = (
        r"resident (forward|backward) +2,32,14,14 +bfloat16 +contiguous L2 50 MB   DRAM (\S+) of the floor,"
        r" (\S+) without small tensors (pass|MISS) \(bar 1\.03\) +L1 to L2 +(\S+) S +(\S+) PTX instructions an element"
        r"   time / copy at N = 16 (\S+)"
    )
    found = [re.fullmatch(pattern, row) for row in rows[:2]]
    assert all(found), rows
    assert [m[1] for m in found] == ["forward", "backward"]
    for m in found:
        traffic, apart, past_l1, instructions, time = (float(m[i]) for i in (2, 3, 5, 6, 7))
        assert 0.99 < apart < traffic < 2 and instructions > 1 and time > 1
        # x, y and the like once, and what is small at least once.
        assert past_l1 >= (2 if m[1] == "forward" else 3) * traffic * 0.99
        assert (m[4] == "pass") == (apart <= 1.03)
    assert all(row.endswith("goes to the streamed tier") for row in rows[2:]) and len(rows) == 4


def test_a_bar_is_judged_as_measured_not_as_printed():
    assert cuda_bytes.verdict(1.0300001, 1.03).startswith("MISS") and cuda_bytes.verdict(
        1.03, 1.03
    ).startswith("pass")


def test_time_is_judged_where_the_bar_holds(capsys):
    for shape, judged in (((256, 28, 28), True), ((255, 28, 28), False), ((1024, 14, 14), False)):
        cuda_bytes.modelled_row(
            "resident", "backward", 4, shape, "torch.bfloat16", False, 50 << 20, 100, 101, 1, 0, 0, 1.2
        )
        assert ("MISS (bar 1.1)" in capsys.readouterr().out) == judged
