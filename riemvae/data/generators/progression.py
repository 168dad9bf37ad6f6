"""A synthetic progression of any images: intensity, growth and rotation, linear in time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_count
from riemvae._seeding import forked
from riemvae.data.arrays import as_tensor
from riemvae.data.generators.pixels import as_pixels, check_dtype, chunks, turned, unit_images
from riemvae.data.sequences import Sequences


def progression(
    images: Any,
    num_visits: int = 11,
    seed: int | None = 0,
    noise: float = 0.001,
    dtype: torch.dtype = torch.float32,
) -> Sequences:
    """Images that change their contrast, grow and turn, each at its own pace, as in chapter 5.

    ``α = ±α_max`` with ``α_max ~ U[1, 2]`` and a fair sign makes the exponent ``e`` of the intensities at the
    last visit: ``α`` where ``α >= 1``, else ``1/|α|``. The image grows by ``β ~ U[1, 1.5]`` and turns by
    ``γ ~ U[-90, 90]`` degrees. At the share ``s`` of the time the image is ``y₀^(1 + s(e - 1))``, enlarged by
    ``1 + s(β - 1)`` and turned by ``sγ`` about its centre, cropped to its size, with Gaussian noise; then
    each image is brought to [0, 1] by its smallest and largest value. The first visit is the image itself,
    brought to [0, 1], without noise.

    Args:
        images: ``(N, H, W)`` or ``(N, C, H, W)``, unsigned bytes or values in [0, 1].
        num_visits: ``T``; the thesis has the image and ten visits after it.
        seed: Of the draws; None draws from torch's global generator.
        noise: Standard deviation.
        dtype: Of the pixels: floating point in [0, 1], or ``torch.uint8``.

    Returns:
        Sequences ``(N, T, C, H, W)`` at the times ``0, ..., 1``, all visits observed; truth: ``exponent``,
        ``growth`` and ``degrees``, those of the last visit, ``(N,)``.

    Raises:
        ValueError: Images of another shape or range, a negative noise, fewer than two visits.

    Source: Chadbec et al. (2022); Chadebec (thesis), section 5.6.1.

    Example:
        >>> data = progression(torch.rand(2, 16, 16))
        >>> data.x.shape, data.times[0, -1].item()
        (torch.Size([2, 11, 1, 16, 16]), 1.0)
    """
    x = as_tensor(images, "images")
    if x.dim() not in (3, 4):
        raise argument_error("images", "images (N, H, W) or (N, C, H, W)", x)
    x = _stretched(unit_images("images", x if x.dim() == 4 else x[:, None]))
    check_count("num_visits", num_visits, 2)
    check_dtype(dtype)
    if not isinstance(noise, (int, float)) or not noise >= 0:
        raise argument_error("noise", "a standard deviation of at least 0", noise)
    number = len(x)
    share = torch.linspace(0, 1, num_visits)
    out = torch.empty((number, num_visits, *x.shape[1:]), dtype=dtype, device=x.device)
    with forked(seed):
        strength, forward = 1 + torch.rand(number), torch.rand(number) < 0.5
        exponent = torch.where(forward, strength, 1 / strength)
        growth, degrees = 1 + 0.5 * torch.rand(number), 180 * torch.rand(number) - 90
        for part in chunks(number, x[0].numel() * num_visits):
            power, zoom = (1 + share * (value[part, None] - 1) for value in (exponent, growth))
            power = power.to(x)[..., None, None, None]
            frames = (x[part, None] ** power).flatten(0, 1)
            frames = turned(frames, (share * degrees[part, None]).flatten(), zoom.flatten())
            frames = frames + noise * torch.randn(frames.shape).to(frames)
            frames = _stretched(frames).view(-1, num_visits, *x.shape[1:])
            frames[:, 0] = x[part]
            out[part] = as_pixels(frames, dtype)
    return Sequences(
        x=out,
        observed=torch.ones(number, num_visits, dtype=torch.bool, device=x.device),
        times=share.to(x).expand(number, -1).contiguous(),
        truth={
            name: value.to(x)
            for name, value in (("exponent", exponent), ("growth", growth), ("degrees", degrees))
        },
    )


def _stretched(x: Tensor) -> Tensor:
    """Each image ``(n, ...)`` brought to [0, 1] by its smallest and largest value; a constant one stays."""
    low, high = (bound.reshape(-1, 1, 1, 1) for bound in x.flatten(1).aminmax(dim=1))
    spread = high - low
    return torch.where(spread > 0, (x - low) / torch.where(spread > 0, spread, 1), x)
