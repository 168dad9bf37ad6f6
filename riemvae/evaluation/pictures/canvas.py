"""What the pictures share: axes, planes of a latent space, files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from riemvae._atomic import write_file
from riemvae._checks import argument_error, check_count, check_finite
from riemvae.geometry.metric import Metric

_MARGIN = 0.2  # around the points, of their extent
_DEFAULT_REACH = 3.0
_CHUNK = 1 << 13  # points given to a metric at once

Bounds = tuple[float, float, float, float]


def axes(ax: Any, size: tuple[float, float] = (5.0, 4.4)) -> Any:
    """``ax``, or the axes of a new figure."""
    if ax is not None:
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, layout="constrained")[1]


def finish(ax: Any, path: str | os.PathLike[str] | None) -> Any:
    """Writes the figure of ``ax`` to ``path``, if there is one, whole or not at all; returns ``ax``."""
    if path is not None:
        write_figure(ax.figure, path)
    return ax


def write_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure in the format that the name of the file ends with."""
    kinds = figure.canvas.get_supported_filetypes()
    kind = Path(path).suffix.lower()[1:]
    if kind not in kinds:
        raise argument_error("path", "a name that ends with ." + ", .".join(sorted(kinds)), str(path))
    write_file(path, lambda file: figure.savefig(file, dpi=150, format=kind, bbox_inches="tight"))


def array(values: Any) -> np.ndarray:
    """Tensors and arrays as numpy arrays."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


class Plane:
    """Two coordinates of a latent space, in which it is drawn.

    Points are projected: their other coordinates are left out. Functions of ``z`` (a volume, a distance) are
    cut: the other coordinates are those of ``origin``.

    Args:
        dim: dimension of the latent space, at least 2.
        plane: the coordinates ``(i, j)``; ``None`` is ``(0, 1)`` for ``d = 2``. Above that they must be
            chosen.
        origin: a point ``(d,)`` of the cut; ``None`` is the mean of ``points``, or 0.
        points: what ``origin`` and the bounds are taken from.
    """

    def __init__(
        self,
        dim: int,
        plane: Sequence[int] | None,
        origin: Tensor | None = None,
        points: Tensor | None = None,
    ) -> None:
        if dim < 2:
            raise argument_error("latent_dim", "at least 2 for a picture of the plane", dim)
        if plane is None:
            if dim > 2:
                raise argument_error(
                    "plane",
                    f"two of the {dim} latent coordinates to draw",
                    None,
                    "pass plane=(0, 1): points are projected, fields cut at the mean of the points",
                )
            plane = (0, 1)
        chosen = tuple(plane)
        if len(chosen) != 2 or chosen[0] == chosen[1] or not all(0 <= i < dim for i in chosen):
            raise argument_error("plane", f"two different coordinates below {dim}", str(chosen))
        self.dim, self.coordinates = dim, chosen
        if origin is not None:
            if tuple(origin.shape) != (dim,):
                raise argument_error("origin", f"a point ({dim},)", origin)
            check_finite("origin", origin)
        self.origin = (
            origin if origin is not None else points.mean(0) if points is not None else torch.zeros(dim)
        )

    def project(self, z: Any) -> np.ndarray:
        """The two coordinates of points ``(..., d)``."""
        values = array(z)
        if values.shape[-1] != self.dim:
            raise argument_error("points", f"points (..., {self.dim})", z)
        return values[..., list(self.coordinates)]

    def bounds(self, bounds: Sequence[float] | None, points: Tensor | None) -> Bounds:
        """``(left, right, bottom, top)``: as given, or around the points, or ``±3``."""
        if bounds is not None:
            left, right, bottom, top = (float(b) for b in bounds)
            if not (left < right and bottom < top):
                raise argument_error("bounds", "(left, right, bottom, top)", str(tuple(bounds)))
            return left, right, bottom, top
        if points is None or not len(points):
            return (-_DEFAULT_REACH, _DEFAULT_REACH, -_DEFAULT_REACH, _DEFAULT_REACH)
        flat = self.project(points).reshape(-1, 2)
        low, high = flat.min(0), flat.max(0)
        margin = _MARGIN * max(float((high - low).max()), 1e-3)
        return (
            float(low[0] - margin),
            float(high[0] + margin),
            float(low[1] - margin),
            float(high[1] + margin),
        )

    def grid(self, bounds: Bounds, num: int, like: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Points ``(rows, columns, d)`` of the cut, and the two axes; ``num`` along the longer side."""
        check_count("num", num, 2)
        width, height = bounds[1] - bounds[0], bounds[3] - bounds[2]
        columns = max(2, 1 + round((num - 1) * min(1.0, width / height)))
        rows = max(2, 1 + round((num - 1) * min(1.0, height / width)))
        x = torch.linspace(bounds[0], bounds[1], columns, dtype=like.dtype, device=like.device)
        y = torch.linspace(bounds[2], bounds[3], rows, dtype=like.dtype, device=like.device)
        z = self.origin.to(like).repeat(rows, columns, 1)
        z[..., self.coordinates[0]], z[..., self.coordinates[1]] = x[None, :], y[:, None]
        return z, array(x), array(y)

    def label(self, ax: Any, bounds: Bounds | None = None) -> None:
        """Names the axes, at equal scale."""
        ax.set_xlabel(f"$z_{{{self.coordinates[0] + 1}}}$")
        ax.set_ylabel(f"$z_{{{self.coordinates[1] + 1}}}$")
        ax.set_aspect("equal")
        if bounds is not None:
            ax.set_xlim(bounds[0], bounds[1])
            ax.set_ylim(bounds[2], bounds[3])


def extent(x: np.ndarray, y: np.ndarray) -> Bounds:
    """The edges of an image whose pixels have these middles."""
    dx, dy = 0.5 * (x[1] - x[0]), 0.5 * (y[1] - y[0])
    return float(x[0] - dx), float(x[-1] + dx), float(y[0] - dy), float(y[-1] + dy)


def colorbar(ax: Any, mappable: Any, label: str, extend: str = "neither") -> None:
    """A scale beside ``ax``, as high as it is whatever its aspect."""
    beside = ax.inset_axes((1.03, 0.0, 0.04, 1.0))
    ax.figure.colorbar(mappable, cax=beside, label=label, extend=extend)


def like_of(metric: Metric, points: Tensor | None) -> Tensor:
    """A tensor of the dtype and device in which a metric is to be evaluated."""
    if points is not None:
        return points.detach()
    for tensor in (*metric.parameters(), *metric.buffers()):
        if tensor.is_floating_point():
            return tensor.detach()
    return torch.zeros(())


def surroundings(metric: Metric, points: Tensor | None) -> Tensor | None:
    """What bounds are taken from: the points, or else the centroids of the metric."""
    return points if points is not None else getattr(metric, "centroids", None)


def log_volume(metric: Metric, z: Tensor) -> np.ndarray:
    """``log √det G`` of points ``(..., d)``, in chunks."""
    with torch.no_grad():
        parts = [metric.log_volume(part) for part in z.reshape(-1, z.shape[-1]).split(_CHUNK)]
    return array(torch.cat(parts).reshape(z.shape[:-1]))


def checked_points(name: str, points: Any, dim: int) -> Tensor:
    """Points ``(N, d)`` that are finite."""
    points = torch.as_tensor(points).detach()
    if points.dim() != 2 or points.shape[1] != dim:
        raise argument_error(name, f"points (N, {dim})", points)
    check_finite(name, points)
    return points
