"""The launch table and the user's table over it; the tuner itself where there is a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from cbam_fused import tune
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


@pytest.mark.parametrize("text", ["{", json.dumps({"format": 0, "rows": []})])
def test_a_broken_table_says_where_it_is(text):
    path = configurations.user_table_path()
    path.write_text(text)
    with pytest.raises(ValueError, match="launch_table.json"):
        configurations._look_up(*KEY)


def test_candidates_keep_the_names_of_the_blocks():
    for kernel in configurations.KERNELS:
        now = configurations._look_up(kernel, "sm_90", "contiguous", "large", 2)
        found = list(tune.candidates(kernel, now))
        assert all(c.meta.keys() == now.meta.keys() for c in found) and len(found) >= 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_tuner_says_why_it_cannot_run(capsys):
    assert tune.main([]) == 1
    assert "cannot tune" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="tuning needs a GPU")
def test_tuner_writes_a_table_that_is_used(monkeypatch):
    monkeypatch.setattr(tune, "SHAPES", {"small": (2, 64, 14, 14)})
    monkeypatch.setattr(tune, "WARPS", (4,))
    assert tune.main([]) == 0
    assert json.loads(configurations.user_table_path().read_text())["format"] == configurations.FORMAT
