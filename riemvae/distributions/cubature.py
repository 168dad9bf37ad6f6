"""Adaptive integrals over one or two standardised coordinates, split where draws lie."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_NODES = {1: 10, 2: 6}
_REACH = {1: 120.0, 2: 60.0}  # 1e17 and 7e8 standard deviations, in standardised coordinates
_LEVELS = 40


class Cells(NamedTuple):
    """A partition of the coordinates and the mass in each part.

    Attributes:
        lower: ``(C, k)``.
        upper: ``(C, k)``.
        mass: ``(C,)``.
        error: What halving the last panels still changed, over all.
        converged: Whether it ended within the points that it was allowed.
    """

    lower: Tensor
    upper: Tensor
    mass: Tensor
    error: float
    converged: bool

    @property
    def total(self) -> float:
        """The integral."""
        return float(self.mass.sum())

    def counts(self, t: Tensor) -> Tensor:
        """How many of ``t (n, k)`` lie in each cell."""
        inside = ((t[:, None] >= self.lower) & (t[:, None] < self.upper)).all(-1)
        return inside.sum(0)


def halved_cells(draws: Tensor | None, dim: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper corners ``(C, k)`` of about ``count`` boxes that hold equally many draws each."""
    box = torch.tensor([[-_REACH[dim]] * dim, [_REACH[dim]] * dim], dtype=torch.float64, device=like.device)
    if draws is None:
        return box[:1], box[1:]
    boxes = [(box[0], box[1], draws)]
    while len(boxes) < count:
        parts = []
        for lower, upper, inside in boxes:
            widths = inside.amax(0) - inside.amin(0)
            axis = int(widths.argmax())
            middle = inside[:, axis].median()
            left = inside[:, axis] < middle
            if not 0 < int(left.sum()) < len(inside):  # ties
                return _corners(boxes)
            top, bottom = upper.clone(), lower.clone()
            top[axis] = bottom[axis] = middle
            parts += [(lower, top, inside[left]), (bottom, upper, inside[~left])]
        boxes = parts
    return _corners(boxes)


def _corners(boxes: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([b[0] for b in boxes]), torch.stack([b[1] for b in boxes])


def integrate_cells(
    log_density: Callable[[Tensor], Tensor],
    lower: Tensor,
    upper: Tensor,
    tolerance: float = 1e-6,
    max_points: int = 300_000,
) -> Cells:
    """The integral of a density over each box, one or two dimensions.

    Gauss-Legendre panels are halved (along all axes) as long as that changes their part of the result; those
    that are wide for their distance from the centre always are, because what no node sees would not be.

    Args:
        log_density: ``t (n, k) -> (n,)``.
        lower: Corners of the boxes ``(C, k)``.
        upper: The opposite corners.
        tolerance: What a panel may still change, in all, relative to the whole.
        max_points: How many points may be evaluated.

    Returns:
        The masses.
    """
    dim, count = lower.shape[-1], len(lower)
    nodes, weights = (torch.as_tensor(a).to(lower) for a in np.polynomial.legendre.leggauss(_NODES[dim]))
    grid = torch.cartesian_prod(*[nodes] * dim).reshape(-1, dim)
    weight = torch.cartesian_prod(*[weights] * dim).reshape(-1, dim).prod(-1)
    evaluated = 0

    def panel_masses(low: Tensor, high: Tensor) -> Tensor:
        nonlocal evaluated
        half = 0.5 * (high - low)
        points = (0.5 * (high + low)).unsqueeze(1) + half.unsqueeze(1) * grid
        evaluated += points.shape[0] * points.shape[1]
        flat = points.reshape(-1, dim)
        values = torch.cat([log_density(part).double() for part in flat.split(1 << 15)])
        return (values.exp().reshape(len(low), -1) * weight).sum(-1) * half.prod(-1)

    def halve(low: Tensor, high: Tensor, owner: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        middle = 0.5 * (low[:, axis] + high[:, axis])
        top, bottom = high.clone(), low.clone()
        top[:, axis] = bottom[:, axis] = middle
        return torch.cat([low, bottom]), torch.cat([top, high]), torch.cat([owner, owner])

    def split(low: Tensor, high: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for axis in range(dim):
            low, high, owner = halve(low, high, owner, axis)
        return low, high, owner

    low, high, owner = lower, upper, torch.arange(count, device=lower.device)
    for axis in range(dim):
        while True:
            a, b = low[:, axis], high[:, axis]
            nearest = torch.where(a * b < 0, 0.0, torch.minimum(a.abs(), b.abs()))
            wide = (b - a) > torch.clamp(nearest, min=2.0)
            if not bool(wide.any()):
                break
            parts = halve(low[wide], high[wide], owner[wide], axis)
            low, high, owner = (torch.cat([x[~wide], y]) for x, y in zip((low, high, owner), parts))

    mass = lower.new_zeros(count)
    if len(low) * len(grid) * (1 + 2**dim) > max_points:  # not even one halving
        return Cells(lower, upper, mass, math.inf, False)
    values, error, converged = panel_masses(low, high), 0.0, False
    for _ in range(_LEVELS):
        if evaluated + len(low) * 2**dim * len(grid) > max_points:
            break
        size = len(low)
        low, high, owner = split(low, high, owner)
        parts_mass = panel_masses(low, high)
        change = (parts_mass.reshape(2**dim, size).sum(0) - values).abs()
        scale = float(mass.sum() + parts_mass.sum())
        # A sum over panels: the many that change by next to nothing count together.
        limit = tolerance * scale / 100
        settled = (change <= limit).repeat(2**dim)
        error += float(change[change <= limit].sum())
        mass.index_add_(0, owner[settled], parts_mass[settled])
        low, high, owner, values = low[~settled], high[~settled], owner[~settled], parts_mass[~settled]
        if not len(low):
            converged = True
            break
    if len(low):
        error += float(values.sum()) if not converged else 0.0
        mass.index_add_(0, owner, values)
    return Cells(lower, upper, mass, error, converged)
