"""Random radii and angles: exact draws by rejection, and gradients by their distribution function."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 14  # draws whose distribution function is differentiated at once
NODES = 64


@functools.lru_cache(maxsize=8)
def _legendre(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return 0.5 * (points + 1), 0.5 * weights


def legendre_rule(like: Tensor, nodes: int = NODES) -> tuple[Tensor, Tensor]:
    """Nodes and weights ``(nodes,)`` of Gauss and Legendre on [0, 1], in the dtype and device of ``like``."""
    points, weights = _legendre(nodes)
    return torch.as_tensor(points).to(like), torch.as_tensor(weights).to(like)


def rejection_sample(like: Tensor, propose: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """One draw for each entry of ``like (n,)``, proposed again until it is accepted.

    Args:
        like: A tensor ``(n,)`` whose dtype and device the draws get.
        propose: For the indices ``(m,)`` of the entries that still wait, proposals ``(m,)`` and the
            logarithms of their acceptance probabilities. One that is NaN accepts: its parameters are NaN.
    """
    result = torch.empty_like(like)
    waiting = torch.arange(len(like), device=like.device)
    while len(waiting):
        value, log_acceptance = propose(waiting)
        accepted = ~(torch.rand_like(value).log() > log_acceptance)
        result[waiting[accepted]] = value[accepted]
        waiting = waiting[~accepted]
    return result


def implicit_derivatives(
    draw: Tensor,
    low: Tensor,
    high: Tensor,
    mode: Tensor,
    log_density: Callable[[Tensor, slice], Tensor],
    scores: Callable[[Tensor, slice], list[Tensor]],
) -> list[Tensor]:
    r"""The derivatives of draws by parameters at a fixed probability (implicit reparametrisation).

    .. math:: \partial_\theta r = -\frac{\partial_\theta F(r)}{p(r)}
        = -\int_{-\infty}^r e^{h(t) - h(r)} \, s(t)\, dt = \int_r^\infty e^{h(t) - h(r)} \, s(t)\, dt

    with ``h = log p`` up to a constant and ``s = ∂_θ log p`` its score, of mean zero. The side of ``r`` away
    from the mode is integrated, where the exponential is at most one, by Gauss-Legendre.

    Args:
        draw: Draws ``(n,)`` in double precision.
        low: Where the mass begins, ``(n,)``; below it a negligible part.
        high: Where it ends, ``(n,)``.
        mode: The mode of the density, ``(n,)``.
        log_density: ``h`` at points ``(m, nodes)`` of the rows in a slice.
        scores: Every parameter's ``s`` at points ``(m, nodes)`` of the rows in a slice.

    Returns:
        One tensor ``(n,)`` a parameter.

    Source: Figurnov, Mohamed and Mnih (2018), Implicit Reparameterization Gradients, eq. 5.
    """
    points, weights = legendre_rule(draw)
    parts = []
    for begin in range(0, len(draw), _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        r = draw[rows, None]
        after = r > mode[rows, None]
        # A draw beyond the bounds (probability below 1e-14) still has an interval.
        end = torch.where(after, torch.maximum(high[rows, None], r), torch.minimum(low[rows, None], r))
        t = r + (end - r) * points
        ratio = (log_density(t, rows) - log_density(r, rows)).exp() * weights * (end - r)
        parts.append([(ratio * score).sum(-1) for score in scores(t, rows)])
    if not parts:
        return [torch.zeros_like(draw) for _ in scores(draw[:, None], slice(0, 0))]
    return [torch.cat(column) for column in zip(*parts)]


def with_derivatives(value: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """``value`` with first derivatives attached: of each pair, a parameter and ``∂ value / ∂ parameter``."""
    for parameter, derivative in pairs:
        if parameter.requires_grad:
            value = value + derivative.detach() * (parameter - parameter.detach())
    return value
