"""The launch table and the user's table over it; the tuner itself where there is a GPU."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from triton_recording import DEVICES, make_inputs, recording, run_ops

from cbam_fused import tune
from cbam_fused._config import Config
from cbam_fused.triton_kernels import configurations

KEY = ("scale_forward", "sm_90", "contiguous", "large", 2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CBAM_FUSED_CACHE", str(tmp_path))
    configurations.forget()
    yield
    monkeypatch.undo()
    configurations.forget()


def test_user_table_goes_first():
    pinned = configurations._look_up(*KEY)
    mine = configurations.Configuration({**pinned.meta, "BP": 128}, 2, 1)
    tune.write([configurations.user_row(*KEY, mine)], configurations.user_table_path())
    assert configurations._look_up(*KEY) == mine
    other = ("scale_forward", "sm_80", "contiguous", "large", 2)
    assert configurations._look_up(*other) == pinned


def test_a_row_for_large_maps_leaves_thin_ones_their_own():
    thin = ("input_backward", "sm_90", "contiguous", "thin", 2)
    large = ("input_backward", "sm_90", "contiguous", "large", 2)
    pinned, mine = configurations._look_up(*thin), replace(configurations._look_up(*large), warps=2)
    assert pinned != configurations._look_up(*large)
    tune.write([configurations.user_row(*large, mine)], configurations.user_table_path())
    assert configurations._look_up(*large) == mine and configurations._look_up(*thin) == pinned
    # A kernel without a row for thin maps takes that for large ones.
    other = ("scale_forward", "sm_90", "contiguous")
    tune.write([configurations.user_row(*other, "large", 2, mine)], configurations.user_table_path())
    assert configurations._look_up(*other, "thin", 2) == mine


@pytest.mark.parametrize("text", ["{", json.dumps({"format": 0, "rows": []})])
def test_a_broken_table_says_where_it_is(text, monkeypatch, capsys):
    path = configurations.user_table_path()
    path.write_text(text)
    with pytest.raises(ValueError, match="launch_table.json"):
        configurations._look_up(*KEY)
    pretend_to_tune(monkeypatch, lambda k, found: 1.0)
    assert tune.main([]) == 1 and str(path) in capsys.readouterr().err


def test_an_output_that_cannot_be_added_to_is_refused_before_tuning(tmp_path, monkeypatch, capsys):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"format": 1, "rows": []}))
    monkeypatch.setattr(tune, "tune", lambda: pytest.fail("it was tuned all the same"))
    assert tune.main(["--output", str(path)]) == 1 and str(path) in capsys.readouterr().err


def test_a_second_tuning_keeps_what_it_does_not_replace():
    path = configurations.user_table_path()
    mine = replace(configurations._look_up(*KEY), warps=2)
    others = {key: replace(mine, warps=warps) for key, warps in (
        ((KEY[0], "sm_80", *KEY[2:]), 4), ((*KEY[:3], "small", 2), 8), ((*KEY[:4], 4), 16))}  # fmt: skip
    tune.write([configurations.user_row(*key, found) for key, found in {KEY: mine, **others}.items()], path)
    better = replace(mine, warps=1)
    tune.write([configurations.user_row(*KEY, better)], path)
    assert configurations._look_up(*KEY) == better
    assert all(configurations._look_up(*key) == found for key, found in others.items())
    assert len(json.loads(path.read_text())["rows"]) == 4


def test_a_device_without_rows_takes_its_familys():
    for generation, like in {"sm_103": "sm_100", "sm_121": "sm_120", "gfx950": "gfx942"}.items():
        kernel, row = next((r["kernel"], r) for r in configurations.pinned_rows() if r.get("device") == like)
        key = ("contiguous" if row["layout"] == "any" else row["layout"], row["map"][0], row["bytes"][0])
        found = configurations._look_up(kernel, generation, *key)
        assert (
            found
            == configurations._look_up(kernel, like, *key)
            != configurations._look_up(kernel, "sm_90", *key)
        )
    device = configurations.Device("sm_121", 48, 96 << 20)
    assert configurations.chunk_samples(device, 1 << 20, 64, 1) < 64


def test_a_broken_table_takes_the_backend_away_and_says_so(monkeypatch):
    monkeypatch.setattr(configurations, "interpreting", lambda: True)
    assert configurations.reason_unusable() is None
    path = configurations.user_table_path()
    path.write_text(json.dumps({"format": 1, "rows": []}))
    configurations.forget()
    assert configurations.reason_unusable() == (
        f"launch table {path} must have format {configurations.FORMAT}, got 1: delete it"
    )


def neighbour(t):
    """What rounding may make of it if a sum in float32 came out a little larger."""
    return torch.nextafter(t.cpu(), torch.full((), float("inf"), dtype=t.dtype)).to(t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_agrees(dtype):
    wanted = [torch.linspace(-1, 1, 100).to(dtype), torch.full((3,), 1e-3, dtype=dtype)]
    wrong = 1 + max(3 * torch.finfo(dtype).eps, 1e-5)
    assert tune._agrees(wanted, wanted) and tune._agrees([neighbour(t) for t in wanted], wanted)
    # A whole tensor, however small its numbers are, and one number of a tensor.
    for factor in (wrong, 1.1):
        assert not tune._agrees([wanted[0], wanted[1] * factor], wanted)
    one = wanted[0].clone()
    one[7] += (wrong - 1) * wanted[0].abs().max()
    assert not tune._agrees([one, wanted[1]], wanted)
    assert not tune._agrees([wanted[0], wanted[1].clone().fill_(float("nan"))], wanted)


def test_a_step_is_a_forward_and_a_backward():
    x, weights, norm = make_inputs((2, 64, 28, 28), torch.bfloat16)
    with recording(DEVICES["sm_90"]) as launches:
        results = tune._step(x, weights, norm)
    assert {f"{kernel}_kernel" for kernel in configurations.KERNELS if "pool" not in kernel} <= {
        launch.name for launch in launches
    }
    assert len(launches) == 8 and results[0].shape == results[1].shape == x.shape


def test_candidates_keep_the_names_of_the_blocks():
    for kernel in configurations.KERNELS:
        now = configurations._look_up(kernel, "sm_90", "contiguous", "large", 2)
        found = list(tune.candidates(kernel, now))
        assert all(c.meta.keys() == now.meta.keys() for c in found) and len(found) >= 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_tuner_says_why_it_cannot_run(capsys):
    assert tune.main([]) == 1
    assert "cannot tune" in capsys.readouterr().err


def pretend_to_tune(monkeypatch, price):
    """Tuning with no GPU: steps run nothing, a fake timer prices the configurations that the step would use."""
    device = configurations.Device("sm_90", 132, 50 << 20)
    monkeypatch.setattr(tune, "load", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(configurations, "describe", lambda _: device)
    monkeypatch.setattr(tune, "SHAPES", {"large": (2, 80, 28, 28)})
    monkeypatch.setattr(tune, "DTYPES", {2: torch.bfloat16})
    monkeypatch.setattr(tune, "_inputs", lambda *_: (torch.empty(0), [], []))
    monkeypatch.setattr(tune, "_step", lambda *_: [torch.ones(1)])

    def milliseconds(_):
        used = [configurations._look_up(k, *KEY[1:]) for k in configurations.KERNELS]
        return float(sum(price(k, found) for k, found in zip(configurations.KERNELS, used)))

    monkeypatch.setattr(tune, "_milliseconds", milliseconds)


def written_rows(*shape):
    """The user's table by key, after a look at the launchers: each finds its row there for such an x."""
    configurations.forget()
    rows = json.loads(configurations.user_table_path().read_text())["rows"]
    found = {}
    for row in rows:
        key = (row["kernel"], row["device"], row["layout"], *row["map"], *row["bytes"])
        found[key] = configurations.Configuration(
            row["meta"], row["warps"], row["fill"], row.get("registers")
        )
    look_up, looked_up = configurations._look_up, {}
    for (kernel, generation, layout, _, itemsize), mine in found.items():
        dtype = next(d for d in tune.DTYPES.values() if d.itemsize == itemsize)
        x, weights, norm = make_inputs(shape, dtype, channels_last=layout == "channels_last")
        with (
            pytest.MonkeyPatch.context() as spy,
            recording(replace(DEVICES["sm_90"], generation=generation)) as made,
        ):
            spy.setattr(configurations, "_look_up", lambda *key: looked_up.setdefault(key, look_up(*key)))
            run_ops(x, weights, norm, Config())
        launch = next(launch for launch in made if launch.name.startswith(kernel))
        assert (launch.found.warps, launch.found.fill) == (mine.warps, mine.fill), launch
    assert len(rows) == len(found) and {key: looked_up.get(key) for key in found} == found
    return found


def test_the_fastest_is_written_and_then_used(monkeypatch, capsys):
    best = {**configurations._look_up(*KEY).meta, "BC": 8, "BP": 128}
    pinned = {k: configurations._look_up(k, *KEY[1:]) for k in configurations.KERNELS}
    with monkeypatch.context() as pretended:
        pretend_to_tune(
            pretended,
            lambda k, found: 1.0 if k == KEY[0] and found.meta == best and found.warps == 8 else 10.0,
        )
        assert tune.main([]) == 0
    assert "1 configurations faster" in capsys.readouterr().out
    written = written_rows(2, 80, 28, 28)
    assert written.keys() == {KEY} and written[KEY].meta == best and written[KEY].warps == 8
    for kernel in configurations.KERNELS[:2]:
        assert configurations._look_up(kernel, *KEY[1:]) == pinned[kernel]


def test_a_limit_of_registers_goes_through_the_users_table():
    key = ("spatial_pool", "sm_90", "channels_last", "large", 2)
    found = configurations._look_up(*key)
    assert found.registers and found.limited(False).registers is None
    assert {c.registers for c in tune.candidates(key[0], found)} == {found.registers}
    mine = replace(found, warps=4)
    tune.write([configurations.user_row(*key, mine)], configurations.user_table_path())
    assert configurations._look_up(*key) == mine


def test_noise_is_no_reason_to_leave_the_pinned_table(monkeypatch):
    pinned = configurations._look_up(*KEY)
    pretend_to_tune(monkeypatch, lambda k, found: 10.0 if found == pinned else 9.99)
    assert tune.tune(lambda _: None) == []


def test_a_wrong_result_never_wins(monkeypatch):
    pinned = configurations._look_up(*KEY)
    pretend_to_tune(monkeypatch, lambda k, found: 1.0)
    monkeypatch.setattr(
        tune, "_step",
        lambda *_: [torch.ones(1) if configurations._look_up(*KEY) == pinned else torch.tensor([float("nan")])],
    )  # fmt: skip
    # Each candidate is faster than all before it, by more than noise.
    prices = iter(0.9**i for i in range(10_000))
    monkeypatch.setattr(tune, "_milliseconds", lambda _: next(prices))
    rows = {(row["kernel"], row["layout"]): row for row in tune.tune(lambda _: None)}
    # What is right is replaced by the last candidate. Of the one kernel only the pinned configuration is right.
    assert rows.keys() == set(
        itertools.product(configurations.kernels("large"), ("contiguous", "channels_last"))
    )
    found = rows[KEY[0], KEY[2]]
    assert (found["meta"], found["warps"], found["fill"]) == (pinned.meta, pinned.warps, pinned.fill)


def tune_to_the_last_candidate(monkeypatch, generation, size):
    """Every candidate that agrees wins; each kernel's last is written, and what its launcher then takes."""
    monkeypatch.setattr(tune, "MARGIN", float("inf"))
    tuned = itertools.product(("contiguous", "channels_last"), (size,), tune.DTYPES)
    keys = [(kernel, generation, *rest) for rest in tuned for kernel in configurations.kernels(size)]
    before = {key: configurations._look_up(*key) for key in keys}
    assert tune.main([]) == 0
    written = written_rows(*tune.SHAPES[size])
    changed = [key for key in before if written[key] != before[key]]
    assert written.keys() == before.keys() and len(changed) > len(before) // 2


def test_every_written_row_is_used(monkeypatch):
    with monkeypatch.context() as pretended:
        pretend_to_tune(pretended, lambda k, found: 1.0)
        tune_to_the_last_candidate(pretended, "sm_90", "large")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="tuning needs a GPU")
def test_tuner_writes_a_table_that_is_used(monkeypatch):
    monkeypatch.setattr(tune, "SHAPES", {"small": (2, 64, 14, 14)})
    monkeypatch.setattr(tune, "WARPS", (4,))
    generation = configurations.describe(torch.device("cuda")).generation
    tune_to_the_last_candidate(monkeypatch, generation, "small")
