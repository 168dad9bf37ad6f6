"""What the generators share: images in, pixels out, turns and zooms of images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from riemvae._checks import argument_error
from riemvae.data.arrays import as_tensor


def grey_images(name: str, images: Any) -> Tensor:
    """Images ``(N, H, W)`` of unsigned bytes or of values in [0, 1], as floating point ``(N, 1, H, W)``."""
    x = as_tensor(images, name)
    if x.dim() != 3:
        raise argument_error(name, "images (N, H, W)", x)
    return unit_images(name, x)[:, None]


def unit_images(name: str, x: Tensor) -> Tensor:
    """Floating-point images with values in [0, 1]; unsigned bytes are divided by 255."""
    if x.dtype == torch.uint8:
        return x.to(torch.get_default_dtype()) / 255
    if not x.is_floating_point():
        raise argument_error(name, "unsigned bytes or floating-point values", x)
    if bool(((x < 0) | (x > 1)).any()):
        got = f"values from {float(x.min()):.4g} to {float(x.max()):.4g}"
        raise argument_error(name, "values in [0, 1]", got, "scale them, or pass unsigned bytes")
    return x


def check_dtype(dtype: torch.dtype) -> None:
    """Refuses pixels that are neither floating point nor unsigned bytes."""
    if not (dtype.is_floating_point or dtype == torch.uint8):
        raise argument_error("dtype", "a floating-point dtype or torch.uint8", str(dtype))


def as_pixels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in [0, 1] in the dtype; for unsigned bytes 255 times as many, rounded."""
    return (x * 255).round().to(dtype) if dtype == torch.uint8 else x.to(dtype)


def turned(images: Tensor, degrees: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Images turned counterclockwise about their centre and enlarged, bilinear, black outside.

    Args:
        images: ``(n, C, H, W)``.
        degrees: ``(n,)``.
        scale: ``(n,)`` or one for all.
    """
    angle = torch.deg2rad(degrees.to(images))
    scale = torch.as_tensor(scale).to(images).expand_as(angle)
    height, width = images.shape[-2:]
    # affine_grid's coordinates run from -1 to 1 along either side: the off-diagonal terms carry the aspect.
    cos, sin, zero = angle.cos() / scale, angle.sin() / scale, torch.zeros_like(angle)
    rows = [cos, -sin * (height / width), zero, sin * (width / height), cos, zero]
    theta = torch.stack(rows, -1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def chunks(total: int, values_each: int, budget: int = 2**22) -> list[slice]:
    """Slices over ``total`` items of ``values_each`` numbers, about ``budget`` numbers a slice."""
    step = max(1, budget // max(1, values_each))
    return [slice(start, min(total, start + step)) for start in range(0, total, step)]
