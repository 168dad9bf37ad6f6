"""Chairs: three-dimensional chairs of boxes, seen from all around."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from riemvae._checks import argument_error, check_count
from riemvae._seeding import forked
from riemvae.data.generators.pixels import as_pixels, check_dtype, chunks
from riemvae.data.sequences import Sequences

SAMPLES = 2  # along each side of a pixel
SIDE_LIGHT, TOP_LIGHT, SLOPE_LIGHT = 0.62, 1.0, 0.30
FRAME = 1.62  # half the side of the picture, in units of the chair


def chairs(
    number: int,
    num_visits: int = 11,
    size: int = 64,
    *,
    elevation: float = 25.0,
    seed: int | None = 0,
    dtype: torch.dtype = torch.float32,
) -> Sequences:
    """Chairs on white that turn once around, evenly over the visits.

    A chair is a seat, a back (a board, or slats between posts), four legs or a column on a foot, and maybe
    arms: boxes with sizes drawn uniformly and a colour each for the frame and the seat. They are seen in
    parallel projection from above, shaded by the direction of each face; which face is in front is decided
    for each pixel by the nearest crossing of its line of sight. The pictures are drawn by this library; they
    stand in for the published renderings.

    Args:
        number: ``N``.
        num_visits: ``T``, at azimuths ``k · 360°/T``.
        size: Pixels along a side.
        elevation: Of the viewer above the horizon, degrees in (0, 90).
        seed: Of the draws; None draws from torch's global generator.
        dtype: Of the pixels: floating point in [0, 1], or ``torch.uint8``.

    Returns:
        Sequences ``(N, T, 3, size, size)``, all visits observed; truth: ``azimuth (N, T)`` (radians), ``sizes
        (N, 6)`` (width, depth, seat height, thickness of the seat, height of the back, thickness of the
        legs), ``slats``, ``column``, ``arms`` (booleans, ``(N,)``), ``frame_color`` and
        ``seat_color (N, 3)``.

    Raises:
        ValueError: Counts or an elevation out of range.

    Source: Chadebec (thesis), section 6.5.1, after Aubry et al. (2014).

    Example:
        >>> chairs(2).x.shape
        torch.Size([2, 11, 3, 64, 64])
    """
    check_count("number", number)
    check_count("num_visits", num_visits)
    check_count("size", size, 8)
    check_dtype(dtype)
    if not isinstance(elevation, (int, float)) or not 0 < elevation < 90:
        raise argument_error("elevation", "degrees above 0 and below 90", elevation)
    low = torch.tensor([0.60, 0.55, 0.65, 0.06, 0.65, 0.05])
    high = torch.tensor([0.95, 0.85, 1.00, 0.18, 1.25, 0.11])
    with forked(seed):
        sizes = low + (high - low) * torch.rand(number, 6)
        slats, column, arms = (torch.rand(number) < share for share in (0.45, 0.25, 0.35))
        frame_color = 0.15 + 0.6 * torch.rand(number, 3)
        seat_color = 0.2 + 0.75 * torch.rand(number, 3)
    boxes = _boxes(sizes, slats, column, arms)
    is_seat = torch.zeros(boxes.shape[1], dtype=torch.bool)
    is_seat[0] = True
    colors = torch.where(is_seat[:, None], seat_color[:, None], frame_color[:, None])
    azimuth = torch.arange(num_visits) * (2 * math.pi / num_visits)
    out = torch.empty(number, num_visits, 3, size, size, dtype=dtype)
    for part in chunks(number, 3 * (SAMPLES * size) ** 2):
        for visit, angle in enumerate(azimuth.tolist()):
            view = _view(boxes[part], colors[part], angle, math.radians(elevation), size)
            out[part, visit] = as_pixels(view, dtype)
    return Sequences(
        x=out,
        observed=torch.ones(number, num_visits, dtype=torch.bool),
        truth={
            "azimuth": azimuth.expand(number, -1).contiguous(),
            "sizes": sizes,
            "slats": slats,
            "column": column,
            "arms": arms,
            "frame_color": frame_color,
            "seat_color": seat_color,
        },
        visit_truth=("azimuth",),
    )


def _boxes(sizes: Tensor, slats: Tensor, column: Tensor, arms: Tensor) -> Tensor:
    """Lowest and highest corners ``(N, boxes, 2, 3)``: x sideways, y to the front, z up; the seat first."""
    wide, deep, seat, thick, back, leg = sizes.unbind(1)
    zero = torch.zeros_like(wide)
    under = seat - thick
    top = seat + back
    board = slats.logical_not()

    def box(
        x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], z: tuple[Tensor, Tensor], shown: Tensor
    ) -> Tensor:
        corners = torch.stack([torch.stack([low, high], -1) for low, high in (x, y, z)], -1)
        # A box that a chair does not have lies below the floor, without extent.
        return torch.where(shown[:, None, None], corners, torch.full_like(corners, -5.0))

    every = torch.ones_like(slats)
    rear = (-deep, -deep + leg)
    parts = [box((-wide, wide), (-deep, deep), (under, seat), every)]
    parts.append(box((-wide, wide), rear, (seat + 0.15 * back, top), board))
    for side in (-1.0, 1.0):  # posts that carry the board or the slats
        edge = side * (wide - leg)
        parts.append(
            box((edge - leg, edge + leg), rear, (seat, torch.where(board, seat + 0.16 * back, top)), every)
        )
    for low, high in ((0.30, 0.42), (0.58, 0.70), (0.86, 1.0)):
        parts.append(box((-wide + leg, wide - leg), rear, (seat + low * back, seat + high * back), slats))
    legged = column.logical_not()
    for side in (-1.0, 1.0):
        for end in (-1.0, 1.0):
            x, y = side * (wide - leg), end * (deep - leg)
            parts.append(box((x - leg, x + leg), (y - leg, y + leg), (zero, under), legged))
    parts.append(box((-1.5 * leg, 1.5 * leg), (-1.5 * leg, 1.5 * leg), (zero, under), column))
    foot = (-0.7 * wide, 0.7 * wide)
    parts.append(box(foot, (-0.7 * deep, 0.7 * deep), (zero, zero + 0.08), column))
    for side in (-1.0, 1.0):
        edge = side * (wide - leg)
        breadth = (edge - leg, edge + leg)
        parts.append(box(breadth, (-deep + leg, 0.7 * deep), (seat + 0.36, seat + 0.36 + leg), arms))
        parts.append(box(breadth, (0.7 * deep - 2 * leg, 0.7 * deep), (seat, seat + 0.36), arms))
    boxes = torch.stack(parts, 1)
    boxes[..., 2] -= 1.0  # the chair's middle near the origin
    return boxes


def _view(boxes: Tensor, colors: Tensor, azimuth: float, elevation: float, size: int) -> Tensor:
    """Pictures ``(n, 3, size, size)`` of all chairs from one direction."""
    forward = [
        -math.cos(elevation) * math.sin(azimuth),
        -math.cos(elevation) * math.cos(azimuth),
        -math.sin(elevation),
    ]
    # A line of sight parallel to a face would divide by zero: it is tilted by less than any pixel.
    forward = [value if abs(value) > 1e-5 else math.copysign(1e-5, value) for value in forward]
    right = [-math.cos(azimuth), math.sin(azimuth), 0.0]
    up = [
        -math.sin(elevation) * math.sin(azimuth),
        -math.sin(elevation) * math.cos(azimuth),
        math.cos(elevation),
    ]
    fine = SAMPLES * size
    across = ((torch.arange(fine) + 0.5) * (2.0 / fine) - 1) * FRAME
    number = len(boxes)
    depth = torch.full((number, fine, fine), torch.inf)
    picture = torch.ones(number, 3, fine, fine)
    light = [SIDE_LIGHT + SLOPE_LIGHT * abs(forward[0]), SIDE_LIGHT - 0.25 * abs(forward[0]), TOP_LIGHT]
    axes = torch.tensor([right, up])
    for index in range(boxes.shape[1]):
        low, high = boxes[:, index, 0], boxes[:, index, 1]
        present = high[:, 2] > -5
        if not bool(present.any()):
            continue
        # The rows and columns that the box can reach in any of the chairs.
        corners = torch.where(axes[:, None] > 0, high, low), torch.where(axes[:, None] > 0, low, high)
        most, least = ((corner * axes[:, None]).sum(-1)[:, present] for corner in corners)
        columns = _reach(float(least[0].min()), float(most[0].max()), fine)
        rows = _reach(-float(most[1].max()), -float(least[1].min()), fine)
        u, v = across[columns], -across[rows]
        enter = torch.full((number, len(v), len(u)), -torch.inf)
        leave, shade = -enter, torch.empty_like(enter)
        for axis in range(3):
            inverse = 1.0 / forward[axis]
            origin = (u[None, :] * right[axis] + v[:, None] * up[axis]) * inverse
            near, far = (low, high) if inverse > 0 else (high, low)
            first = near[:, axis, None, None] * inverse - origin
            shade = torch.where(first > enter, light[axis], shade)
            enter = torch.maximum(enter, first)
            leave = torch.minimum(leave, far[:, axis, None, None] * inverse - origin)
        part = depth[:, rows, columns]
        hit = (enter < leave) & (enter < part)
        part.copy_(torch.where(hit, enter, part))
        tint = colors[:, index, :, None, None] * shade[:, None]
        painted = picture[:, :, rows, columns]
        painted.copy_(torch.where(hit[:, None], tint, painted))
    return F.avg_pool2d(picture, SAMPLES).clamp_(0, 1)


def _reach(low: float, high: float, fine: int) -> slice:
    first, last = ((edge / FRAME + 1) * fine / 2 for edge in (low, high))
    return slice(max(0, min(fine - 1, int(first) - 1)), max(1, min(fine, int(last) + 2)))
