"""Ultralytics: CBAM and FusedCBAM in a model YAML; a whole YOLO model before and after fuse."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from dialect_cases import randomise
from whole_models import assert_trains_alike

from cbam_fused import FusedCBAM, compat, fuse

tasks = pytest.importorskip("ultralytics.nn.tasks", reason="ultralytics is not installed")

from cbam_fused.integrations import ultralytics as integration  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture
def registered():
    integration.register()
    yield
    integration.unregister()


@pytest.fixture(autouse=True)
def _restores_determinism():
    """Ultralytics turns deterministic algorithms on where it initialises weights."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def yolo(rows, scale="n"):
    """A small YOLO detector; `rows` are the attention rows after its three stages."""
    return {
        "nc": 3,
        "scales": {"n": [0.34, 0.25, 1024], "s": [0.34, 0.5, 128]},
        "scale": scale,
        "backbone": [
            [-1, 1, "Conv", [64, 3, 2]],
            [-1, 1, "Conv", [128, 3, 2]],
            rows[0],
            [-1, 1, "Conv", [256, 3, 2]],
            [-1, 1, "C2f", [256, True]],
            rows[1],
            [-1, 1, "Conv", [512, 3, 2]],
            rows[2],
        ],
        "head": [
            [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
            [[-1, 5], 1, "Concat", [1]],
            [-1, 1, "C2f", [256]],
            [[2, 10, 7], 1, "Detect", ["nc"]],
        ],
    }


def build(config):
    model = tasks.DetectionModel(copy.deepcopy(config), ch=3, verbose=False)
    model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)
    return model


@torch.no_grad()
def awaken(model):
    """A fresh detector's answer hardly hangs on its image: norms of what flows through it, and a head that looks."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    model.train()(torch.rand(8, 3, 64, 64))
    for module in model.eval().model[-1].modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.weight, 0, 0.3)


def batch(dtype=torch.float32):
    g = torch.Generator().manual_seed(4)
    boxes = torch.rand(5, 4, generator=g) * 0.4 + 0.2
    return {
        "img": torch.rand(2, 3, 64, 64, generator=g, dtype=dtype),
        "cls": torch.tensor([[0.0], [1], [2], [1], [0]]),
        "bboxes": boxes,
        "batch_idx": torch.tensor([0.0, 0, 0, 1, 1]),
    }


ROWS = [[-1, 1, "CBAM", [128]], [-1, 1, "FusedCBAM", ["None", 4, 3]], [-1, 3, "CBAM", []]]


def test_channels_follow_the_width_scaling(registered):
    for scale, widths in (("n", (32, 64, 128)), ("s", (64, 64, 64))):
        model = build(yolo(ROWS, scale))
        first, second, third = (model.model[i] for i in (2, 5, 7))
        assert type(first) is compat.ultralytics.CBAM and first.channels == widths[0]
        assert type(second) is FusedCBAM and second.channels == widths[1]
        assert second.channel_gate.hidden_channels == widths[1] // 4 and second.spatial_gate.kernel_size == 3
        assert type(third) is compat.ultralytics.CBAM and third.channels == widths[2]
        loss, _ = model.train()(batch())
        loss.sum().backward()
        assert all(p.grad is not None for m in (first, second, third) for p in m.parameters())


def test_keyword_options_and_repeats(registered):
    rows = [
        [-1, 9, "CBAM", [None, 3]],
        [-1, 1, "FusedCBAM", [256, {"spatial_norm": False, "residual": True}]],
        ROWS[2],
    ]
    model = build(yolo(rows))
    assert isinstance(model.model[2], nn.Sequential) and len(model.model[2]) == 3
    assert {m.spatial_attention.cv1.kernel_size for m in model.model[2]} == {(3, 3)}
    assert model.model[5].spatial_gate.bn is None and model.model[5].config.residual


@pytest.mark.parametrize(
    "row, text",
    [
        ([-1, 1, "CBAM", [64]], "CBAM: channels must be 32, those of layer -1, .* by width 0.25; got 64"),
        ([-1, 1, "CBAM", [128, 4]], "kernel_size must be odd, got 4"),
        ([[-1, 0], 1, "FusedCBAM", []], r"FusedCBAM: `from` must be one layer, got \[-1, 0\]"),
    ],
)
def test_a_wrong_row_is_refused_with_words(registered, row, text):
    with pytest.raises(ValueError, match=text):
        build(yolo([row, *ROWS[1:]]))


def test_register_twice_unregister_and_leave_no_trace():
    before = {n: getattr(tasks, n, None) for n in ("parse_model", "CBAM", "FusedCBAM")}
    integration.register()
    parser = tasks.parse_model
    integration.register()
    assert tasks.parse_model is parser is not before["parse_model"]
    integration.unregister()
    integration.unregister()
    assert {n: getattr(tasks, n, None) for n in before} == before


def test_the_yaml_of_the_caller_stays_as_it_is(registered):
    config = yolo(ROWS)
    kept = copy.deepcopy(config)
    model = tasks.DetectionModel(config, ch=3, verbose=False)
    assert config["backbone"] == kept["backbone"] and model.yaml["backbone"] == kept["backbone"]


def test_a_model_pickles_and_initialize_weights_finds_the_batch_norm(registered, tmp_path):
    model = build(yolo(ROWS)).eval()
    assert (model.model[5].spatial_gate.bn.eps, model.model[5].spatial_gate.bn.momentum) == (1e-3, 0.03)
    torch.save(model, tmp_path / "m.pt")
    twin = torch.load(tmp_path / "m.pt", weights_only=False)
    with torch.no_grad():
        a, b = (m(batch()["img"])[0] for m in (model, twin))
    assert torch.equal(a, b)


def stock(monkeypatch):
    """A model with Ultralytics' own CBAM, as a fork of it would wire it: the scaled widths written out."""
    from ultralytics.nn.modules import CBAM

    monkeypatch.setattr(tasks, "CBAM", CBAM, raising=False)
    model = build(yolo([[-1, 1, "CBAM", [32, 3]], [-1, 1, "CBAM", [64]], [-1, 1, "CBAM", [128]]]))
    for module in model.modules():
        if type(module) is CBAM:
            randomise(module)
    return model


def test_a_yolo_model_before_and_after_fuse(monkeypatch):
    model = stock(monkeypatch).double()
    data = batch(torch.float64)

    class Trainer(nn.Module):
        """Gives the detector the input of an image in eval and of a batch in training."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model({**data, "img": x}) if self.training else self.model(x)[0]

    assert_trains_alike(Trainer(model), data["img"], lambda m, x: m(x)[0].sum(), 3)


def test_checkpoints_pass_between_stock_fused_and_registered(monkeypatch):
    plain = stock(monkeypatch)
    awaken(plain)
    state = plain.state_dict()
    fused = copy.deepcopy(plain)
    assert len(fuse(fused).swapped) == 3
    monkeypatch.undo()
    integration.register()
    try:
        ours = build(
            yolo([[-1, 1, "CBAM", [None, 3]], ROWS[2][:1] + [1, "CBAM", []], [-1, 1, "CBAM", []]])
        ).eval()
    finally:
        integration.unregister()
    assert list(fused.state_dict()) == list(ours.state_dict()) == list(state)
    ours.load_state_dict(state)
    for p in fused.parameters():
        nn.init.zeros_(p)
    fused.load_state_dict(ours.state_dict())
    x = batch()["img"]
    with torch.no_grad():
        expected = plain(x)[0]
        for model in (fused, ours):
            torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-3)


def test_export(registered, tmp_path, monkeypatch):
    """Ultralytics' own exporter, on a model with both blocks: the file gives the model's numbers, by no op of ours."""
    import ultralytics
    import yaml

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "yolov8n-cbam.yaml"
    path.write_text(yaml.safe_dump(yolo(ROWS)))
    model = ultralytics.YOLO(path, verbose=False)
    awaken(model.model)
    exported = torch.jit.load(model.export(format="torchscript", imgsz=64, verbose=False))
    kinds = {node.kind() for node in exported.inlined_graph.nodes()}
    assert "aten::sigmoid" in kinds and not any(kind.startswith("cbam_fused") for kind in kinds)
    plain = model.model.eval().fuse(verbose=False)
    x = torch.rand(1, 3, 64, 64)
    answer = exported(x)
    torch.testing.assert_close(answer, plain(x)[0], rtol=1e-4, atol=1e-3)
    for i in (2, 5, 7):
        other = copy.deepcopy(plain)
        with torch.no_grad():
            for p in other.model[i].parameters():
                p.mul_(1.05)
        assert not torch.allclose(answer, other(x)[0], rtol=1e-2, atol=1e-1), f"block {i} does not show"
