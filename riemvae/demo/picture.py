"""The demo's figure: digits real and synthetic, and a latent plane with its volume element."""

from __future__ import annotations

from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from riemvae.zoo import Autoencoder

# Ten colours that the eye tells apart, one a digit.
COLOURS = matplotlib.colormaps["tab10"](np.arange(10))


class Plane(NamedTuple):
    """What is seen of a model with two latent dimensions.

    Attributes:
        axes: Coordinates ``(n,)`` of the grid along either direction.
        log_volume: ``½ log det G`` on the grid, ``(n, n)``; rows go along the second coordinate.
        codes: The encoder's means ``(N, 2)`` of the training images.
        labels: Their digits ``(N,)``.
        manifold: Latent draws along the geometry ``(n, 2)``.
        prior: Latent draws from the prior ``(n, 2)``.
    """

    axes: np.ndarray
    log_volume: np.ndarray
    codes: np.ndarray
    labels: np.ndarray
    manifold: np.ndarray
    prior: np.ndarray


@torch.no_grad()
def look_at_plane(ae: Autoencoder, x: Tensor, y: Tensor, num: int, num_grid: int = 200) -> Plane:
    """Evaluates the log volume element around the codes of ``x``, and draws ``num`` points by both samplers."""
    codes = ae.encode(x)
    manifold, prior = ae.sampler("manifold").sample(num), ae.sampler("prior").sample(num)
    reach = 1.15 * float(torch.cat([codes, manifold, prior]).abs().max())
    axis = torch.linspace(-reach, reach, num_grid, dtype=codes.dtype)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    log_volume = ae.metric.log_volume(grid.reshape(-1, 2)).reshape(num_grid, num_grid)
    return Plane(*(np.asarray(a) for a in (axis, log_volume, codes, y, manifold, prior)))


def mosaic(images: np.ndarray, rows: int, gap: int = 1) -> np.ndarray:
    """Images ``(10 rows, H, W)``, digit by digit, as one picture with a column a digit; the gaps are NaN."""
    height, width = images.shape[-2:]
    picture = np.full((rows * (height + gap) - gap, 10 * (width + gap) - gap), np.nan)
    for k, image in enumerate(
        images.reshape(10, rows, height, width).swapaxes(0, 1).reshape(-1, height, width)
    ):
        top, left = (k // 10) * (height + gap), (k % 10) * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture


def draw(real: np.ndarray, manifold: np.ndarray, prior: np.ndarray, plane: Plane, title: str) -> Figure:
    """The figure.

    Args:
        real: Training images ``(10 r, H, W)``, digit by digit.
        manifold: Synthetic images drawn along the geometry, likewise.
        prior: Synthetic images drawn from the prior, likewise.
        plane: The latent plane.
        title: Says what was trained on what.
    """
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.75])
    panels = [
        ("real: the training set", real),
        ("synthetic, along the learned geometry", manifold),
        ("synthetic, from the prior", prior),
    ]
    for ax, (name, images) in zip(top.subplots(1, 3), panels):
        ax.imshow(mosaic(images, len(images) // 10), cmap="gray_r", vmin=0, vmax=1)
        ax.set_title(name, fontsize=9)
        ax.axis("off")
    left, right = bottom.subplots(1, 2, sharey=True)
    reach = plane.axes[-1]
    for ax, name, draws in (
        (left, "2-D latent space: codes, and draws along the geometry", plane.manifold),
        (right, "the same, and draws from the prior", plane.prior),
    ):
        image = ax.imshow(
            plane.log_volume,
            extent=(-reach, reach, -reach, reach),
            origin="lower",
            cmap="gray",
            aspect="equal",
        )
        ax.scatter(*draws.T, s=7, c="#ffb000", linewidths=0, alpha=0.8, label="draws")
        for digit in range(10):
            ax.scatter(
                *plane.codes[plane.labels == digit].T,
                s=46,
                color=COLOURS[digit],
                edgecolors="white",
                linewidths=0.8,
                label=str(digit),
            )
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("$z_1$")
    left.set_ylabel("$z_2$")
    bar = bottom.colorbar(image, ax=[left, right], shrink=0.9, pad=0.01)
    bar.set_label("log volume element ½ log det G", fontsize=9)
    right.legend(loc="center left", bbox_to_anchor=(1.32, 0.5), fontsize=8, frameon=False)
    return figure
