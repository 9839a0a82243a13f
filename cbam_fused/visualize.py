"""Pictures of attention: the spatial gate laid over the image that it was computed from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_IMAGE_SHAPES = "(H, W), (H, W, 3), (3, H, W) or (1, H, W)"
_GATE_SHAPES = "(h, w), (1, h, w) or (1, 1, h, w)"


def overlay(
    image: Any,
    spatial_gate: Any,
    *,
    ax: Optional[Axes] = None,
    alpha: float = 0.5,
    cmap: str = "inferno",
    limits: Optional[Tuple[float, float]] = None,
    colorbar: bool = False,
    title: Optional[str] = None,
) -> Axes:
    """Lays a spatial gate over an image, as in the figures of the CBAM paper.

    The gate is resized to the image bilinearly, so its map may be of any size.

    Args:
        image: (H, W), (H, W, 3), (3, H, W) or (1, H, W), a tensor on any device or a NumPy array;
            uint8 in 0 .. 255, or floating point in 0 .. 1. Three channels in the last dimension
            are read as (H, W, 3) even where the first dimension is 3 too.
        spatial_gate: (h, w), (1, h, w) or (1, 1, h, w), a tensor or array with values in 0 .. 1:
            one sample of what `FusedCBAM.attention_maps` returns second.
        ax: the matplotlib axes to draw into; by default those of a new figure, as large as the
            image asks for.
        alpha: opacity of the gate over the image, 0 .. 1.
        cmap: name of a matplotlib colour map for the gate.
        limits: the gate values at both ends of the colour map; by default the gate's own smallest
            and largest. Give (0, 1) to compare pictures with each other.
        colorbar: adds a scale of the gate's values.
        title: text above the picture.

    Returns:
        The axes drawn into; `overlay(...).figure.savefig("attention.png")` writes the picture.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: an argument that cannot be drawn; nothing is drawn.

    Example:
        >>> channel, spatial = module.attention_maps(features)
        >>> overlay(image, spatial[:1])

    Source: Woo et al., "CBAM: Convolutional Block Attention Module", arXiv:1807.06521.
    """
    picture = _image(image)
    gate = _gate(spatial_gate)
    if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be a number in 0 .. 1, got {alpha!r}")
    if limits is not None and not (len(limits) == 2 and limits[0] < limits[1]):
        raise ValueError(f"limits must be (low, high) with low < high, got {limits!r}")
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("overlay needs matplotlib: pip install cbam_fused[visualize]") from error

    height, width = picture.shape[:2]
    gate = F.interpolate(gate[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    if ax is None:
        scale = 5 / max(height, width)
        size = (max(1.5, width * scale) + (0.8 if colorbar else 0), max(1.5, height * scale))
        ax = pyplot.subplots(figsize=size, layout="constrained")[1]
    low, high = limits or (gate.min().item(), gate.max().item())
    ax.imshow(picture.numpy(), cmap="gray" if picture.dim() == 2 else None, vmin=0, vmax=1)
    drawn = ax.imshow(gate.numpy(), cmap=cmap, alpha=alpha, vmin=low, vmax=high)
    if colorbar:
        ax.figure.colorbar(drawn, ax=ax, fraction=0.046, label="spatial gate")
    if title is not None:
        ax.set_title(title)
    ax.set_axis_off()
    return ax


def _tensor(name: str, value: Any) -> Tensor:
    """value on the CPU, out of its graph."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    # By its interface and not its type: NumPy need not be installed.
    if hasattr(value, "__array_interface__") and hasattr(value, "copy"):
        # A copy, because torch refuses negative strides and warns about read-only arrays.
        return torch.from_numpy(value.copy())
    raise TypeError(f"{name} must be a Tensor or a NumPy array, got {type(value).__name__}")


def _within_unit(name: str, t: Tensor, hint: str = "") -> None:
    low, high = t.min().item(), t.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name} must have values in 0 .. 1{hint}, got {low:g} .. {high:g}")


def _image(image: Any) -> Tensor:
    """(H, W) or (H, W, 3), float32 in 0 .. 1."""
    t = _tensor("image", image)
    if t.dim() == 3 and t.shape[2] != 3 and t.shape[0] in (1, 3):
        t = t.permute(1, 2, 0) if t.shape[0] == 3 else t[0]
    if t.dim() not in (2, 3) or t.dim() == 3 and t.shape[2] != 3 or t.numel() == 0:
        raise ValueError(f"image must have shape {_IMAGE_SHAPES}, got {tuple(_tensor('image', image).shape)}")
    if t.dtype == torch.uint8:
        return t.float() / 255
    if not t.is_floating_point():
        raise TypeError(f"image must be uint8 or floating point, got {t.dtype}")
    t = t.float()
    _within_unit("image", t, " or be uint8")
    return t


def _gate(gate: Any) -> Tensor:
    """(h, w), float32."""
    t = _tensor("spatial_gate", gate)
    shape = tuple(t.shape)
    if t.dim() not in (2, 3, 4) or any(size != 1 for size in shape[:-2]) or t.numel() == 0:
        raise ValueError(f"spatial_gate must have shape {_GATE_SHAPES}, got {shape}")
    if not t.is_floating_point():
        raise TypeError(f"spatial_gate must be floating point, got {t.dtype}")
    t = t.float().reshape(shape[-2:])
    _within_unit("spatial_gate", t)
    return t
