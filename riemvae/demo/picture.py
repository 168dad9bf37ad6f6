"""The demo's figure: digits real and synthetic, and a latent plane with its volume element."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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
    """The log volume element around the codes of ``x``, and ``num`` points drawn by either sampler."""
    codes = ae.encode(x)
    manifold, prior = ae.sampler("manifold").sample(num), ae.sampler("prior").sample(num)
    reach = 1.05 * float(torch.cat([codes, manifold, prior]).abs().max())
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


def draw(
    images: Mapping[str, np.ndarray], plane: Plane, differences: Mapping[str, Mapping[str, Any]]
) -> Figure:
    """The figure.

    Args:
        images: ``"real"``, ``"manifold"`` and ``"prior"``: images ``(10 r, H, W)``, digit by digit.
        plane: The latent plane.
        differences: Those of the report, by comparison and classifier.
    """
    figure = Figure(figsize=(11, 6.2))
    figure.set_layout_engine("constrained", wspace=0.06)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[1, 1.55])[:, 0]
    names = {
        "real": "real: the whole training set",
        "manifold": "synthetic, along the learned geometry",
        "prior": "synthetic, from the prior",
    }
    for ax, (key, name) in zip(top.subplots(1, 3), names.items()):
        ax.imshow(mosaic(images[key], len(images[key]) // 10), cmap="gray_r", vmin=0, vmax=1)
        ax.set_title(name, fontsize=10)
        ax.axis("off")
    axes = bottom.subplots(1, 3, width_ratios=[1, 1, 0.9])
    seen = _show_plane(axes[0], plane, plane.manifold, "2-D latent space, draws along the geometry")
    _show_plane(axes[1], plane, plane.prior, "the same, draws from the prior")
    bar = bottom.colorbar(seen, ax=axes[1], shrink=0.85, pad=0.02)
    bar.set_label("log volume element", fontsize=9)
    _show_differences(axes[2], differences)
    return figure


def _show_plane(ax: Any, plane: Plane, draws: np.ndarray, title: str) -> Any:
    reach = plane.axes[-1]
    image = ax.imshow(plane.log_volume, extent=(-reach, reach, -reach, reach), origin="lower", cmap="gray")
    ax.scatter(*draws.T, s=6, c="#ffb000", linewidths=0)
    for digit in range(10):
        own = plane.codes[plane.labels == digit]
        ax.scatter(*own.T, s=42, color=COLOURS[digit], edgecolors="white", linewidths=0.7)
        for point in own:
            ax.annotate(str(digit), point, ha="center", va="center_baseline", fontsize=5.5, color="white")
    ax.set_title(title, fontsize=10)
    ax.set_xticks([])
    ax.set_yticks([])
    return image


def _show_differences(ax: Any, differences: Mapping[str, Mapping[str, Any]]) -> None:
    rows = [
        ("real + manifold against real", "along the geometry", "#d04000", "o"),
        ("real + prior against real", "from the prior", "#3060c0", "s"),
        ("real + noise against real", "control: noise, no model", "#909090", "D"),
    ]
    kinds = list(differences[rows[0][0]])
    ax.axvline(0, color="black", linewidth=0.8)
    for k, (key, label, colour, marker) in enumerate(rows):
        cells = [differences[key][kind] for kind in kinds]
        ax.errorbar(
            [cell["mean"] for cell in cells],
            np.arange(len(kinds)) + 0.22 * (k - 1),
            xerr=np.nan_to_num(
                [[cell["mean"] - cell["low"], cell["high"] - cell["mean"]] for cell in cells]
            ).T,
            fmt=marker,
            color=colour,
            markersize=5,
            capsize=2,
            label=label,
        )
    ax.set_yticks(range(len(kinds)), kinds)
    ax.invert_yaxis()
    ax.set_title("points of accuracy gained (95 %)", fontsize=10)
    ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08))
