"""Batches of small pictures painted from rounded strokes, with soft edges of one pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Stroke(NamedTuple):
    """A line with round ends, one for each of ``n`` pictures; a disk where both ends are one point.

    Attributes:
        start: ``(n, 2)``: x to the right and y upwards, the picture being the square from -1 to 1.
        end: ``(n, 2)``.
        start_radius: ``(n,)``; a negative one hides what is near the start.
        end_radius: ``(n,)``.
    """

    start: Tensor
    end: Tensor
    start_radius: Tensor
    end_radius: Tensor


def pixel_centers(size: int) -> tuple[Tensor, Tensor]:
    """The x of the columns and the y of the rows, ``(size,)`` each; the first row is the highest."""
    x = (torch.arange(size) + 0.5) * (2.0 / size) - 1
    return x, -x


def stroke_distance(stroke: Stroke, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the strokes' edges, negative inside, ``(n, len(y), len(x))``.

    Exact for strokes of even width; for others the radius is that at the nearest point of the axis, which is
    off by the cosine of the taper.
    """
    along = stroke.end - stroke.start
    square = along.square().sum(-1).clamp_min(1e-12)
    off_x = x - stroke.start[:, :1]  # (n, w)
    off_y = y - stroke.start[:, 1:]  # (n, h)
    unit = along / square[:, None]
    share = ((off_x * unit[:, :1])[:, None, :] + (off_y * unit[:, 1:])[:, :, None]).clamp_(0, 1)
    distance = (off_x[:, None, :] - share * along[:, 0, None, None]).square_()
    distance += (off_y[:, :, None] - share * along[:, 1, None, None]).square_()
    taper = (stroke.end_radius - stroke.start_radius)[:, None, None]
    return distance.sqrt_().sub_(share.mul_(taper)).sub_(stroke.start_radius[:, None, None])


def coverage(distance: Tensor, size: int) -> Tensor:
    """The share of each pixel that is inside: a ramp of the distance of its centre, one pixel wide."""
    return (0.5 - distance * (size / 2)).clamp_(0, 1)


class Canvas:
    """``n`` pictures ``(n, 3, size, size)`` painted in layers, back to front.

    Args:
        number: ``n``.
        size: Pixels along a side.
        background: Grey value.
    """

    def __init__(self, number: int, size: int, background: float = 1.0) -> None:
        self.size = size
        self.pixels = torch.full((number, 3, size, size), background)
        self._x, self._y = pixel_centers(size)

    def paint(self, color: Tensor, strokes: Sequence[Stroke]) -> None:
        """Paints strokes in one colour a picture, ``(n, 3)``, where they are and nowhere else."""
        corners = torch.cat(
            [
                torch.cat([point - reach, point + reach])
                for stroke in strokes
                for point, reach in (
                    (stroke.start, stroke.start_radius[:, None].clamp_min(0)),
                    (stroke.end, stroke.end_radius[:, None].clamp_min(0)),
                )
            ]
        )
        # Only the part of the picture that some stroke of the batch reaches is worked on.
        low, high = corners.amin(0).tolist(), corners.amax(0).tolist()
        columns = self._reach(low[0], high[0])
        rows = self._reach(-high[1], -low[1])
        x, y = self._x[columns], self._y[rows]
        distance = stroke_distance(strokes[0], x, y)
        for stroke in strokes[1:]:
            distance = torch.minimum(distance, stroke_distance(stroke, x, y))
        part = self.pixels[:, :, rows, columns]
        part.lerp_(color[:, :, None, None], coverage(distance, self.size)[:, None])

    def _reach(self, low: float, high: float) -> slice:
        first, last = ((edge + 1) * self.size / 2 for edge in (low, high))
        return slice(max(0, min(self.size - 1, int(first) - 1)), max(1, min(self.size, int(last) + 2)))
