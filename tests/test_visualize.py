"""overlay: what it draws, which inputs it takes, and what it says about those it does not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cbam_fused import FusedCBAM
from cbam_fused.visualize import overlay

np = pytest.importorskip("numpy", reason="NumPy is not installed")
matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

H, W = 12, 20


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def layers(ax):
    picture, gate = ax.get_images()
    return np.asarray(picture.get_array()), np.asarray(gate.get_array())


def rgb() -> torch.Tensor:
    return torch.rand(H, W, 3, generator=torch.Generator().manual_seed(0))


IMAGES = {
    "HW": lambda x: x[:, :, 0],
    "1HW": lambda x: x[None, :, :, 0],
    "HW3": lambda x: x,
    "3HW": lambda x: x.permute(2, 0, 1),
}


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_every_form_of_an_image_draws_the_same_pixels(kind, array, dtype):
    x = rgb()
    image = IMAGES[kind](x)
    if dtype == torch.uint8:
        image = (image * 255).round().byte()
    image = image.to(dtype)
    ax = overlay(image.numpy() if array else image, torch.full((3, 5), 0.5))
    drawn, gate = layers(ax)
    wanted = x if kind in ("HW3", "3HW") else x[:, :, 0]
    assert np.abs(drawn - wanted.numpy()).max() <= (0.5 / 255 + 1e-6 if dtype == torch.uint8 else 1e-7)
    assert gate.shape == (H, W) and np.all(gate == 0.5)


@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
def test_gate_is_resized_bilinearly(lead):
    gate = torch.tensor([[0.0, 1.0]]).reshape(*lead, 1, 2).requires_grad_()
    _, drawn = layers(overlay(torch.zeros(2, 8), gate))
    # Pixel centres of 8 in the coordinates of 2: (i + 0.5) / 4 - 0.5, clamped to 0 .. 1.
    wanted = np.clip((np.arange(8) + 0.5) / 4 - 0.5, 0, 1)
    assert np.allclose(drawn, np.stack([wanted, wanted]), atol=1e-6)


def test_limits_colours_and_title():
    gate = torch.tensor([[0.2, 0.6]])
    ax = overlay(rgb(), gate, alpha=0.25, cmap="viridis", title="after layer 3", colorbar=True)
    layer = ax.get_images()[1]
    low, high = layer.get_clim()
    assert (low, high) == pytest.approx((0.2, 0.6))
    assert (layer.get_alpha(), layer.get_cmap().name, ax.get_title()) == (0.25, "viridis", "after layer 3")
    assert len(ax.figure.axes) == 2
    assert overlay(rgb(), gate, limits=(0, 1)).get_images()[1].get_clim() == (0, 1)


def test_draws_into_given_axes_and_makes_a_figure_otherwise():
    _, given = plt.subplots()
    assert overlay(rgb(), torch.full((2, 2), 0.5), ax=given) is given
    assert overlay(rgb(), torch.full((2, 2), 0.5)).figure is not given.figure


def test_strides_of_a_view_are_followed():
    x = rgb().numpy()
    drawn, _ = layers(overlay(x[::-1, ::2], np.full((2, 2), 0.5)))
    assert np.array_equal(drawn, x[::-1, ::2])


def test_takes_what_attention_maps_returns():
    torch.manual_seed(0)
    module = FusedCBAM(8, spatial_norm=False, backend="reference")
    _, spatial = module.attention_maps(torch.randn(2, 8, 3, 5))
    _, drawn = layers(overlay(rgb(), spatial[1:]))
    assert drawn.min() >= spatial[1].min().item() and drawn.max() <= spatial[1].max().item()
    assert drawn.std() > 0


OK = torch.full((2, 2), 0.5)
BAD = [
    ((torch.zeros(2, 4, 4), OK), {}, ValueError,
     "image must have shape (H, W), (H, W, 3), (3, H, W) or (1, H, W), got (2, 4, 4)"),
    ((torch.zeros(1, 3, 4, 4), OK), {}, ValueError,
     "image must have shape (H, W), (H, W, 3), (3, H, W) or (1, H, W), got (1, 3, 4, 4)"),
    ((torch.zeros(0, 4), OK), {}, ValueError,
     "image must have shape (H, W), (H, W, 3), (3, H, W) or (1, H, W), got (0, 4)"),
    ((torch.zeros(4, 4, dtype=torch.int64), OK), {}, TypeError,
     "image must be uint8 or floating point, got torch.int64"),
    (([[0.0]], OK), {}, TypeError, "image must be a Tensor or a NumPy array, got list"),
    ((torch.full((4, 4), -1.5), OK), {}, ValueError,
     "image must have values in 0 .. 1 or be uint8, got -1.5 .. -1.5"),
    ((torch.zeros(4, 4), torch.zeros(8, 1, 7, 7)), {}, ValueError,
     "spatial_gate must have shape (h, w), (1, h, w) or (1, 1, h, w), got (8, 1, 7, 7)"),
    ((torch.zeros(4, 4), torch.zeros(7)), {}, ValueError,
     "spatial_gate must have shape (h, w), (1, h, w) or (1, 1, h, w), got (7,)"),
    ((torch.zeros(4, 4), OK.byte()), {}, TypeError, "spatial_gate must be floating point, got torch.uint8"),
    ((torch.zeros(4, 4), 0.5), {}, TypeError, "spatial_gate must be a Tensor or a NumPy array, got float"),
    ((torch.zeros(4, 4), 8 * OK), {}, ValueError, "spatial_gate must have values in 0 .. 1, got 4 .. 4"),
    ((torch.zeros(4, 4), OK * float("nan")), {}, ValueError,
     "spatial_gate must have values in 0 .. 1, got nan .. nan"),
    ((torch.zeros(4, 4), OK), {"alpha": 2}, ValueError, "alpha must be a number in 0 .. 1, got 2"),
    ((torch.zeros(4, 4), OK), {"limits": (1, 0)}, ValueError,
     "limits must be (low, high) with low < high, got (1, 0)"),
]  # fmt: skip


@pytest.mark.parametrize("args, options, kind, message", BAD)
def test_bad_input_is_named_and_nothing_is_drawn(args, options, kind, message):
    with pytest.raises(kind) as raised:
        overlay(*args, **options)
    assert str(raised.value) == message
    assert not plt.get_fignums()


def test_without_matplotlib_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch\n"
        "from cbam_fused.visualize import overlay\n"
        "try:\n    overlay(torch.zeros(4, 4), torch.full((2, 2), 0.5))\n"
        "except ImportError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "overlay needs matplotlib: pip install cbam_fused[visualize]", run.stderr
