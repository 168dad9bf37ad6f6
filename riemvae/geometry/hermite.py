"""Cubic Hermite curves through equally timed nodes, and their length and energy under a metric."""

from __future__ import annotations

import torch
from torch import Tensor

from riemvae.geometry.metric import Metric

# Points given to a metric at once: its work arrays then fit a processor's cache, and are bounded elsewhere.
_CHUNK = {"cpu": 1 << 13}
_CHUNK_ELSEWHERE = 1 << 18

# Two-point Gauss-Legendre nodes of [0, 1]: exact for cubics, an error of fourth order in the segment.
_GAUSS = (0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5)


def chunk_size(z: Tensor) -> int:
    """How many points ``(..., d)`` to evaluate a metric at in one call."""
    return max(256, _CHUNK.get(z.device.type, _CHUNK_ELSEWHERE) // z.shape[-1])


def tangents(points: Tensor) -> Tensor:
    """``dc/dt (..., K+1, d)`` at nodes ``c(k/K)``: differences of second order, one-sided at the ends."""
    segments = points.shape[-2] - 1
    step = points.diff(dim=-2)
    if segments == 1:
        return step.expand_as(points)
    first = 1.5 * step[..., :1, :] - 0.5 * step[..., 1:2, :]
    last = 1.5 * step[..., -1:, :] - 0.5 * step[..., -2:-1, :]
    middle = 0.5 * (step[..., 1:, :] + step[..., :-1, :])
    return segments * torch.cat([first, middle, last], -2)


def hermite(points: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Curve through ``points (..., K+1, d)`` and velocity at times ``t (T,)``, both ``(..., T, d)``."""
    segments = points.shape[-2] - 1
    k = (t * segments).floor().clamp(0, segments - 1).long()
    s = (t * segments - k).unsqueeze(-1)
    slopes = tangents(points) / segments
    left, right = points[..., k, :], points[..., k + 1, :]
    a, b = slopes[..., k, :], slopes[..., k + 1, :]
    chord = right - left
    # c(s) = left + s a + s² (3 chord - 2a - b) + s³ (a + b - 2 chord)
    square, cube = 3.0 * chord - 2.0 * a - b, a + b - 2.0 * chord
    value = left + s * (a + s * (square + s * cube))
    return value, segments * (a + s * (2.0 * square + 3.0 * s * cube))


def resample(points: Tensor, num_segments: int) -> Tensor:
    """The same curves through ``num_segments + 1`` equally timed nodes."""
    if points.shape[-2] - 1 == num_segments:
        return points
    t = torch.linspace(0.0, 1.0, num_segments + 1, dtype=points.dtype, device=points.device)
    nodes = hermite(points, t)[0]
    nodes[..., 0, :], nodes[..., -1, :] = points[..., 0, :], points[..., -1, :]
    return nodes


def squared_norms(metric: Metric, z: Tensor, v: Tensor) -> Tensor:
    """``vᵀ G(z) v`` for ``z, v (..., d)``, in chunks, shape ``(...)``."""
    d = z.shape[-1]
    size = chunk_size(z)
    parts = [
        (w * (metric.at(x).tensor @ w.unsqueeze(-1)).squeeze(-1)).sum(-1)
        for x, w in zip(z.reshape(-1, d).split(size), v.reshape(-1, d).split(size))
    ]
    return torch.cat(parts).reshape(z.shape[:-1])


def measure(metric: Metric, points: Tensor) -> tuple[Tensor, Tensor]:
    """Energy ``∫ ‖c'‖² dt`` and length ``∫ ‖c'‖ dt`` of the curves through ``points (B, K+1, d)``.

    Gauss' rule with two nodes a segment. Infinite where the metric is not finite.
    """
    segments = points.shape[-2] - 1
    k = torch.arange(segments, dtype=points.dtype, device=points.device)
    t = torch.cat([(k + node) / segments for node in _GAUSS])
    squares = squared_norms(metric, *hermite(points, t))
    squares = torch.where(squares >= 0, squares, torch.inf)  # NaN as well
    return squares.mean(-1), squares.sqrt().mean(-1)
