"""fuse on whole models of other packages: the same output, the same training."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from dialect_cases import randomise
from whole_models import assert_trains_alike

from cbam_fused import fuse


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


# The second is narrower inside its bottlenecks; what its CBAMs see is a ResNet-50's.
@pytest.mark.parametrize(
    "name, source, width", [("cbam", "CbamModule", 64), ("lcbam", "LightCbamModule", 16)]
)
def test_timm_resnet50(name, source, width):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model(
        "resnet50", num_classes=7, base_width=width, block_args={"attn_layer": name}
    ).double()
    for module in model.modules():
        if type(module).__name__ == source:
            randomise(module)
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.constant_(module.weight, 0.5)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    target = torch.tensor([1, 5, 0, 3])
    assert_trains_alike(model, x, lambda m, x: F.cross_entropy(m(x), target), 16)


def test_torchvision_squeeze_and_excitation():
    models = pytest.importorskip("torchvision", reason="torchvision is not installed").models
    model = models.mobilenet_v3_small(num_classes=5).eval()
    report = fuse(model)
    # Its gates are hard sigmoids: every one is left, and the report says why.
    assert not report.swapped and len(report.left) == 9
    assert all("Hardsigmoid" in r.reason for r in report.left)
    model = models.regnet_y_400mf(num_classes=5).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        report = fuse(model)
        assert len(report.swapped) == 16 and not report.left
        torch.testing.assert_close(model(x), expected)


def test_timm_squeeze_and_excitation():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model(
        "seresnet18" if timm.is_model("seresnet18") else "seresnet50", num_classes=3
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        # A fresh model's last norm of each block is zero, and what the gate scales with it.
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d) and not m.weight.any():
                nn.init.constant_(m.weight, 0.5)
        expected = model(x)
        report = fuse(model)
        assert report.swapped and not report.left
        torch.testing.assert_close(model(x), expected)
        for swapped in report.swapped:
            for p in model.get_submodule(swapped.name).parameters():
                p.mul_(1.01)
        assert not torch.allclose(model(x), expected)


def test_segmentation_models_scse_is_left_and_its_encoder_is_fused():
    smp = pytest.importorskip(
        "segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed"
    )
    model = smp.Unet("se_resnet50", encoder_weights=None, decoder_attention_type="scse").eval()
    x = torch.randn(1, 3, 64, 64)
    scse = [m for m in model.modules() if type(m).__name__ == "SCSEModule"]
    with torch.no_grad():
        expected = model(x)
        report = fuse(model)
        assert len(report.swapped) == 16
        assert all(s.source == "segmentation_models_pytorch.SEModule" for s in report.swapped)
        torch.testing.assert_close(model(x), expected)
    # scSE adds its two gated maps instead of chaining the gates: no CBAM.
    assert scse and scse == [m for m in model.modules() if type(m).__name__ == "SCSEModule"]


def test_pytorchcv_resnet():
    cv = pytest.importorskip("pytorchcv.models.cbamresnet", reason="pytorchcv is not installed")
    model = cv.CbamResNet([[16] * 2, [32] * 2], 16, False, num_classes=3, in_size=(56, 56)).double()
    x = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    target = torch.tensor([0, 2])
    assert_trains_alike(model, x, lambda m, x: F.cross_entropy(m(x), target), 4)
