"""Pictures of what a metric measures: geodesics, balls and maps of the distance from a point."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

from riemvae._checks import argument_error, check_count, check_finite, check_last_dim
from riemvae.evaluation.pictures import canvas
from riemvae.geometry.exponential import exponential_map
from riemvae.geometry.geodesics import Distances, Geodesic, distance_matrix
from riemvae.geometry.metric import Metric

# Steps on a grid to the 16 nearest directions, one of each opposite pair.
_STEPS = [(0, 1), (1, 0), (1, 1), (1, -1), (1, 2), (2, 1), (1, -2), (2, -1)]
# A picture does not wait for the last digit, or for a curve that the next step replaces.
_LOOSELY: dict[str, Any] = {"tolerance": 1e-4, "max_iterations": 80}
_GAUSS = (0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5)


def draw_geodesics(
    curves: Geodesic | Tensor,
    *,
    num: int = 100,
    straight: bool = False,
    color: Any | None = None,
    plane: Sequence[int] | None = None,
    ax: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Curves in a latent space, solid, and on request the straight lines between their ends, dashed.

    Args:
        curves: a :class:`~riemvae.geometry.geodesics.Geodesic` of any batch, or points ``(..., T, d)``.
        num: points of a curve at which a ``Geodesic`` is evaluated.
        straight: whether to draw the straight lines too.
        color: one colour for all; ``None`` gives each its own.
        plane: the two coordinates to draw, needed for ``d > 2``.
        ax: axes to draw on, such as those of ``draw_latent_space``; ``None`` makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes.

    Raises:
        ValueError: curves of the wrong shape, or ``d > 2`` without ``plane``.

    Source: figure 3.1 of the thesis.

    Example:
        >>> from riemvae.geometry import EuclideanMetric
        >>> from riemvae.geometry.geodesics import geodesic
        >>> curves = geodesic(EuclideanMetric(2), torch.zeros(2), torch.eye(2))
        >>> len(draw_geodesics(curves, straight=True).lines)
        4
    """
    check_count("num", num, 2)
    if isinstance(curves, Geodesic):
        times = torch.linspace(0, 1, num, dtype=curves.points.dtype, device=curves.points.device)
        nodes = curves(times).movedim(0, -2)
    else:
        nodes = torch.as_tensor(curves)
    if nodes.dim() < 2 or nodes.shape[-2] < 2:
        raise argument_error("curves", "a Geodesic, or points (..., T, d) of at least two times", nodes)
    where = canvas.Plane(nodes.shape[-1], plane)
    lines = where.project(nodes).reshape(-1, nodes.shape[-2], 2)
    ax = canvas.axes(ax)
    for k, line in enumerate(lines):
        (drawn,) = ax.plot(*line.T, color=color or f"C{k % 10}", linewidth=1.6, zorder=2.5)
        if straight:
            ends = line[[0, -1]].T
            ax.plot(*ends, color=drawn.get_color(), linestyle="--", linewidth=1.1, zorder=2.4)
    where.label(ax)
    return canvas.finish(ax, path)


def draw_geodesic_balls(
    metric: Metric,
    centers: Tensor,
    radii: Sequence[float],
    *,
    num_directions: int = 200,
    num_steps: int = 50,
    color: Any = "tab:red",
    ax: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """The ends of geodesics of given lengths, shot from centers in all directions.

    Up to the injectivity radius of a center these are the borders of the geodesic balls. Beyond it, fronts
    cross themselves: the part inside the outermost line is reached by a shorter way too.

    Args:
        metric: the metric, ``d = 2``.
        centers: ``(n, 2)`` or ``(2,)``.
        radii: lengths of the geodesics, positive.
        num_directions: geodesics a center.
        num_steps: steps of the integrator.
        color: of the lines.
        ax: axes to draw on, such as those of ``draw_latent_space``; ``None`` makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes: a closed line for each center and radius, center by center. A line is broken where the
        integration diverged.

    Raises:
        ValueError: another dimension than 2, centers that are not finite, or radii that are not positive.

    Source: figure 2.1 of the thesis.

    Example:
        >>> from riemvae.geometry import EuclideanMetric
        >>> ax = draw_geodesic_balls(EuclideanMetric(2), torch.zeros(2), [1.0, 2.0])
        >>> [round(float((line.get_xydata() ** 2).sum(1).max()), 4) for line in ax.lines]
        [1.0, 4.0]
    """
    if metric.latent_dim != 2:
        raise argument_error(
            "metric", "one of dimension 2: a ball of a higher one is no line", metric.latent_dim
        )
    check_last_dim("centers", centers, 2)
    check_finite("centers", centers)
    check_count("num_directions", num_directions, 3)
    if not len(radii) or not all(np.isfinite(r) and r > 0 for r in radii):
        raise argument_error("radii", "positive numbers", str(list(radii)))
    centers = centers.detach().reshape(-1, 2)
    angle = torch.linspace(0, 2 * torch.pi, num_directions + 1, dtype=centers.dtype, device=centers.device)
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what diverges is a gap in a line
        unit = circle @ torch.linalg.cholesky(metric.inverse(centers)).mT  # (n, directions, 2) of length 1
        length = torch.as_tensor(radii, dtype=centers.dtype, device=centers.device)
        v = unit[:, None] * length[:, None, None]
        fronts = exponential_map(metric, centers[:, None, None].expand_as(v), v, num_steps)
    fronts = fronts.masked_fill(~torch.isfinite(fronts), torch.nan)
    ax = canvas.axes(ax)
    for front in canvas.array(fronts.reshape(-1, num_directions + 1, 2)):
        ax.plot(*front.T, color=color, linewidth=1.0, zorder=2.2)
    ax.scatter(*canvas.array(centers).T, c=[color], s=18, edgecolors="black", linewidths=0.4, zorder=3)
    canvas.Plane(2, None).label(ax)
    return canvas.finish(ax, path)


def distances_on_grid(metric: Metric, point: Tensor, z: Tensor, *, num_segments: int = 16) -> Tensor:
    """Geodesic distances from a point to those of a grid ``(rows, columns, d)``, shape ``(rows, columns)``.

    Each is the length of a curve from the batched solver, whose minimum is a local one. So a grid point may
    then take a neighbour's curve and the straight step from there, if that is shorter (Dijkstra's algorithm
    over steps in 16 directions, of lengths by Gauss' rule with two nodes). The result is an upper bound of
    the distance up to quadrature; its error is the solver's where that found the shortest curve (4e-5
    relative on the unit sphere with 16 segments), and elsewhere that of a grid path, 3 percent on a fine
    grid.

    Example:
        >>> from riemvae.geometry import EuclideanMetric
        >>> z = torch.tensor([[[0.0, 0.0], [3.0, 0.0]], [[0.0, 4.0], [3.0, 4.0]]])
        >>> distances_on_grid(EuclideanMetric(2), torch.zeros(2), z)
        tensor([[0., 3.],
                [4., 5.]])
    """
    rows, columns, d = z.shape
    flat = z.reshape(-1, d)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the solver did not finish is still a curve's length
        solved = cast(
            Distances,
            distance_matrix(metric, flat, point[None], num_segments=num_segments, full=True, **_LOOSELY),
        )
        direct = solved.distance[:, 0]
        index = torch.arange(rows * columns, device=z.device).reshape(rows, columns)
        tails, heads = [], []
        for down, right in _STEPS:
            if down >= rows or abs(right) >= columns:
                continue
            left = max(0, -right)
            tails.append(index[: rows - down, left : columns - max(0, right)].reshape(-1))
            heads.append(index[down:, left + right : columns - max(0, right) + right].reshape(-1))
        tail, head = torch.cat(tails), torch.cat(heads)
        step = flat[head] - flat[tail]
        length = sum(metric.norm(flat[tail] + s * step, step) for s in _GAUSS) / 2
    # The point itself is one more node, joined to every grid point by its solved curve.
    source = rows * columns
    tiny = np.finfo(np.float64).tiny  # a stored zero would be no edge
    weights = np.concatenate([canvas.array(cast(Tensor, length)), canvas.array(direct)]).astype(np.float64)
    good = np.isfinite(weights)
    start = np.concatenate([canvas.array(tail), np.full(source, source)])[good]
    end = np.concatenate([canvas.array(head), np.arange(source)])[good]
    graph = coo_matrix(
        (np.maximum(weights[good], tiny), (start, end)), shape=(source + 1, source + 1)
    ).tocsr()
    best = dijkstra(graph, directed=False, indices=source)[:-1]
    return torch.as_tensor(best, dtype=z.dtype, device=z.device).reshape(rows, columns)


def draw_distance_map(
    metric: Metric,
    point: Tensor,
    points: Tensor | None = None,
    *,
    bounds: Sequence[float] | None = None,
    num: int = 50,
    num_segments: int = 16,
    levels: int = 12,
    largest: float | None = None,
    plane: Sequence[int] | None = None,
    ax: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """The geodesic distance from a point, as a colour map with contours.

    See :func:`distances_on_grid` for how it is computed and how exact it is.

    Args:
        metric: the metric.
        point: ``(d,)``, marked by a star.
        points: ``(N, d)``, drawn on top, and what the bounds are taken from.
        bounds: ``(left, right, bottom, top)``; ``None`` goes around the points, or else the centroids.
        num: grid points along the longer side: ``num²`` geodesics.
        num_segments: segments of each.
        levels: contours.
        largest: end of the colour scale; ``None`` is a quarter above the largest distance of the points (or
            the centroids), so that what lies far from data does not take all the colours.
        plane: the two coordinates to draw, needed for ``d > 2``: the map is cut at ``point``, its geodesics
            run through all coordinates.
        ax: axes to draw on; ``None`` makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes; ``ax.images[0]`` holds the distances.

    Raises:
        ValueError: points that do not fit, or ``d > 2`` without ``plane``.

    Source: the distance maps of the talk; figure 3.1 of the thesis.

    Example:
        >>> from riemvae.geometry import EuclideanMetric
        >>> ax = draw_distance_map(EuclideanMetric(2), torch.zeros(2), bounds=(-3, 3, -4, 4), num=5)
        >>> round(float(ax.images[0].get_array().max()), 4)
        5.0
    """
    d = metric.latent_dim
    check_last_dim("point", point, d)
    point = canvas.checked_points("point", point.reshape(1, -1), d)[0]
    points = None if points is None else canvas.checked_points("points", points, d)
    around = canvas.surroundings(metric, points)
    where = canvas.Plane(d, plane, point)
    limits = where.bounds(bounds, around)
    z, x, y = where.grid(limits, num, point)
    distances = canvas.array(distances_on_grid(metric, point, z, num_segments=num_segments))
    shown = np.ma.masked_invalid(distances)
    if largest is None:
        largest = _largest(distances, x, y, None if around is None else where.project(around))
    ax = canvas.axes(ax)
    image = ax.imshow(
        shown,
        extent=canvas.extent(x, y),
        origin="lower",
        cmap="viridis",
        aspect="equal",
        interpolation="bilinear",
        vmin=0,
        vmax=largest,
    )
    lines = np.linspace(0, largest, levels + 1)[1:]
    ax.contour(x, y, shown, levels=lines, colors="white", linewidths=0.6, alpha=0.7)
    canvas.colorbar(ax, image, "geodesic distance", extend="max" if shown.max() > largest else "neither")
    if points is not None:
        ax.scatter(*where.project(points).T, s=9, c="white", edgecolors="black", linewidths=0.3, zorder=3)
    ax.scatter(*where.project(point)[:, None], s=170, marker="*", c="tab:red", edgecolors="black", zorder=4)
    where.label(ax, limits)
    return canvas.finish(ax, path)


def _largest(distances: np.ndarray, x: np.ndarray, y: np.ndarray, points: np.ndarray | None) -> float:
    """A quarter more than the largest distance at the points' pixels, or the largest of all."""
    finite = np.where(np.isfinite(distances), distances, 0.0)
    if points is not None:
        column, row = (np.abs(axis[:, None] - points[:, i]).argmin(0) for i, axis in enumerate((x, y)))
        reached = 1.25 * float(finite[row, column].max())
        if reached > 0:
            return min(reached, float(finite.max()))
    return float(finite.max())
