"""benchmarks/fuse_model.py: its arithmetic, a short run, and that a red gate reports nothing."""

import csv

import pytest
import torch

from benchmarks import fuse_model, fuse_subjects
from benchmarks.measure import Step

SHORT = "--modes train infer --model resnet18 --batch 2 --size 32 --rounds 1 --seconds 1 --threads 1".split()


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def steps(*milliseconds):
    return [Step(str(i), lambda: None, 1, samples=[ms]) for i, ms in enumerate(milliseconds)]


def test_the_share_allows_what_amdahl_says():
    # CBAM takes 20 of 100 ms and gets 4 times faster: 15 ms less at best, and 10 less came of it.
    found, text = fuse_model.summary(steps(100.0, 90.0, 80.0, 24.0, 6.0))
    assert found == pytest.approx(
        {"share": 0.2, "blocks_speedup": 4.0, "allowed_speedup": 1 / 0.85, "model_speedup": 1 / 0.9}
    )
    assert "20.0 %" in text and "1.176x (at most 1.250x" in text and "94 % of what the share allows" in text
    assert "saved 10.0 of the 15.0 ms" in text


def test_a_short_run_prints_and_writes_what_it_measured(capsys, tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    path = tmp_path / "rows.csv"
    assert fuse_model.main([*SHORT, "--out", str(path)]) in (0, 1)  # a timing: either verdict may come
    text = capsys.readouterr().out
    assert "fused 8 blocks, left 0" in text
    assert "CBAM's share of the training step" in text and "CBAM's share of the inference" in text
    rows = list(csv.DictReader(path.open()))
    assert (
        len(rows) == 10
        and {r["mode"] for r in rows} == {"train", "infer"}
        and all(float(r["p50_ms"]) > 0 for r in rows)
    )


def test_a_yolo_model_from_a_yaml(capsys):
    pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    deterministic = torch.are_deterministic_algorithms_enabled()
    options = "--model yolo --modes infer --batch 1 --size 64 --rounds 1 --seconds 1 --threads 1"
    assert fuse_model.main(options.split()) in (0, 1)
    text = capsys.readouterr().out
    assert "fused 4 blocks, left 0" in text and "CBAM's share of the inference" in text
    assert torch.are_deterministic_algorithms_enabled() == deterministic


@pytest.mark.parametrize("name", ["resnet18", "yolo"])
def test_the_bare_twin_computes_without_cbam(name):
    pytest.importorskip("timm" if name != "yolo" else "ultralytics", reason="not installed")
    subject = fuse_subjects.make(name, "cbam")
    bare = fuse_subjects.without(subject)
    blocks = fuse_subjects.blocks_of(subject)
    assert len(blocks) == (4 if name == "yolo" else 8)
    for _, block in blocks:
        block.forward = lambda x: x
    x = torch.rand(1, 3, 64, 64)
    a, b = (m.eval()(x) for m in (subject.model, bare))
    assert torch.equal(a[0], b[0])
    assert not any(type(m).__name__ == subject.block for m in bare.modules())


def test_a_red_gate_reports_no_time(capsys, monkeypatch):
    pytest.importorskip("timm", reason="timm is not installed")

    def broken(model, **options):
        report = fuse(model, **options)
        with torch.no_grad():
            model.layer1[0].se.channel.fc1.weight.mul_(1.001)
        return report

    fuse = fuse_model.fuse
    monkeypatch.setattr(fuse_model, "fuse", broken)
    assert fuse_model.main(SHORT) == 1
    text = capsys.readouterr().out
    assert "red gate" in text and "p50" not in text and "faster" not in text
