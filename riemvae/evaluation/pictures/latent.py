"""Pictures of a latent space: its volume, its points, clusters and chains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from riemvae._checks import argument_error
from riemvae.evaluation.pictures import canvas
from riemvae.geometry.clustering import KMedoids
from riemvae.geometry.metric import Metric

_LEGEND_CLASSES = 12  # more classes get a colour bar


def draw_latent_space(
    metric: Metric,
    points: Tensor | None = None,
    labels: Any | None = None,
    *,
    bounds: Sequence[float] | None = None,
    num: int = 200,
    plane: Sequence[int] | None = None,
    origin: Tensor | None = None,
    colorbar: bool = True,
    ax: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """The log volume element ``log √det G(z)`` in gray, light where it is large, and points on it.

    Args:
        metric: the metric.
        points: ``(N, d)``, coloured by their labels.
        labels: class of each point, ``(N,)``.
        bounds: ``(left, right, bottom, top)``; ``None`` goes around the points, or else the centroids.
        num: pixels along the longer side.
        plane: the two coordinates to draw, needed for ``d > 2``: points are projected on them, and the volume
            is cut at ``origin``.
        origin: ``(d,)``; ``None`` is the mean of the points (or the centroids).
        colorbar: draws the scale of the gray.
        ax: axes to draw on; ``None`` makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes.

    Raises:
        ValueError: points that do not fit, ``d > 2`` without ``plane``, or a path of an unknown format.

    Source: figures 1.3, 2.1 and 3.1 of the thesis.

    Example:
        >>> from riemvae.geometry import CentroidMetric
        >>> metric = CentroidMetric(torch.zeros(1, 2), torch.eye(2)[None])
        >>> ax = draw_latent_space(metric, torch.zeros(1, 2), num=20, bounds=(-1, 1, -1, 1))
        >>> ax.images[0].get_array().shape
        (20, 20)
    """
    d = metric.latent_dim
    points = None if points is None else canvas.checked_points("points", points, d)
    around = canvas.surroundings(metric, points)
    where = canvas.Plane(d, plane, origin, around)
    limits = where.bounds(bounds, around)
    z, x, y = where.grid(limits, num, canvas.like_of(metric, points))
    ax = canvas.axes(ax)
    volume = np.ma.masked_invalid(canvas.log_volume(metric, z))
    image = ax.imshow(
        volume,
        extent=canvas.extent(x, y),
        origin="lower",
        cmap="gray",
        aspect="equal",
        interpolation="bilinear",
    )
    if colorbar:
        canvas.colorbar(ax, image, r"$\log\sqrt{\det G}$")
    if points is not None:
        _scatter(ax, where.project(points), labels, None)
    where.label(ax, limits)
    return canvas.finish(ax, path)


def draw_samples(
    points: Tensor,
    labels: Any | None = None,
    *,
    name: str | None = None,
    color: Any | None = None,
    marker: str = "o",
    plane: Sequence[int] | None = None,
    ax: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Points of a latent space, on their own or over another picture.

    Args:
        points: ``(N, d)``.
        labels: class of each, ``(N,)``, shown by colour.
        name: what a legend calls them.
        color: one colour for all.
        marker: matplotlib's marker.
        plane: the two coordinates to draw, needed for ``d > 2``.
        ax: axes to draw on; ``None`` makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes.

    Raises:
        ValueError: points that are not finite, of the wrong shape, or ``d > 2`` without ``plane``.

    Example:
        >>> ax = draw_samples(torch.randn(10, 2), name="prior")
        >>> len(ax.collections[0].get_offsets())
        10
    """
    points = canvas.checked_points("points", points, torch.as_tensor(points).shape[-1])
    where = canvas.Plane(points.shape[-1], plane)
    ax = canvas.axes(ax)
    _scatter(ax, where.project(points), labels, color, marker, name)
    where.label(ax)
    return canvas.finish(ax, path)


def draw_trajectories(
    paths: Tensor,
    *,
    num_chains: int | None = None,
    plane: Sequence[int] | None = None,
    ax: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """The paths of chains or curves: a line each, its start marked by a ring, its end by a disk.

    Args:
        paths: positions ``(draws, chains, d)``, as ``sample_chains(...).samples``.
        num_chains: draws only the first; ``None`` draws all.
        plane: the two coordinates to draw, needed for ``d > 2``.
        ax: axes to draw on; ``None`` makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes.

    Raises:
        ValueError: paths of the wrong shape, or ``d > 2`` without ``plane``.

    Source: figure 5 of the thesis's introduction (the steps of a Riemannian random walk).

    Example:
        >>> ax = draw_trajectories(torch.randn(20, 3, 2).cumsum(0))
        >>> len(ax.lines)
        3
    """
    if paths.dim() != 3 or not paths.numel():
        raise argument_error("paths", "positions (draws, chains, d)", paths)
    where = canvas.Plane(paths.shape[-1], plane)
    ax = canvas.axes(ax)
    lines = where.project(paths[:, :num_chains])
    colors = _colors(lines.shape[1])
    for k in range(lines.shape[1]):
        ax.plot(*lines[:, k].T, color=colors[k], linewidth=0.9, alpha=0.8, zorder=2)
    ax.scatter(*lines[0].T, s=28, facecolors="white", edgecolors=colors, linewidths=1.2, zorder=3)
    ax.scatter(*lines[-1].T, s=28, c=colors, edgecolors="black", linewidths=0.5, zorder=3)
    where.label(ax)
    return canvas.finish(ax, path)


def draw_clusters(
    points: Tensor,
    clustering: KMedoids | Tensor,
    *,
    metric: Metric | None = None,
    plane: Sequence[int] | None = None,
    ax: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Points coloured by their cluster, medoids as stars.

    Args:
        points: ``(N, d)``.
        clustering: what ``k_medoids`` returned, or labels ``(N,)`` alone.
        metric: draws its log volume element behind.
        plane: the two coordinates to draw, needed for ``d > 2``.
        ax: axes to draw on; ``None`` makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes.

    Raises:
        ValueError: points and clustering that do not fit, or ``d > 2`` without ``plane``.

    Source: the clustering figure of the talk.

    Example:
        >>> from riemvae.geometry.clustering import k_medoids
        >>> points = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 0.0], [5.1, 0.0]])
        >>> ax = draw_clusters(points, k_medoids(points, 2))
        >>> len(ax.collections)  # two clusters and the medoids
        3
    """
    points = canvas.checked_points("points", points, torch.as_tensor(points).shape[-1])
    labels = clustering.labels if isinstance(clustering, KMedoids) else clustering
    if len(labels) != len(points):
        raise argument_error("clustering", f"of {len(points)} points", f"of {len(labels)}")
    where = canvas.Plane(points.shape[-1], plane)
    ax = canvas.axes(ax)
    if metric is not None:
        draw_latent_space(metric, bounds=where.bounds(None, points), plane=plane, ax=ax)
    flat = where.project(points)
    _scatter(ax, flat, labels, None, prefix="cluster ")
    if isinstance(clustering, KMedoids):
        medoids = flat[canvas.array(clustering.medoids)]
        colors = _colors(len(medoids))
        edge = "black" if metric is None else "white"  # seen on the dark of the volume too
        ax.scatter(*medoids.T, s=190, marker="*", c=colors, edgecolors=edge, linewidths=1.0, zorder=4)
    where.label(ax)
    return canvas.finish(ax, path)


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](i) for i in range(count)]
    return [colormaps["turbo"](i / (count - 1)) for i in range(count)]


def _scatter(
    ax: Any,
    flat: np.ndarray,
    labels: Any | None,
    color: Any | None,
    marker: str = "o",
    name: str | None = None,
    prefix: str = "",
) -> None:
    edges = {} if marker in "x+1234|_" else {"edgecolors": "black", "linewidths": 0.3}
    style = {"s": 16, "marker": marker, "zorder": 3, **edges}
    if labels is None:
        ax.scatter(*flat.T, c=[color or "tab:orange"], label=name, **style)
        if name is not None:
            ax.legend(loc="best", fontsize="small")
        return
    values = canvas.array(labels)
    if values.shape != (len(flat),):
        raise argument_error("labels", f"one a point, ({len(flat)},)", values)
    classes = np.unique(values)
    if len(classes) > _LEGEND_CLASSES and values.dtype.kind in "iuf":
        shown = ax.scatter(*flat.T, c=values, cmap="turbo", label=name, **style)
        canvas.colorbar(ax, shown, "label")
        return
    for value, tint in zip(classes, _colors(len(classes))):
        ax.scatter(*flat[values == value].T, c=[tint], label=f"{prefix}{value}", **style)
    ax.legend(loc="best", fontsize="small")
