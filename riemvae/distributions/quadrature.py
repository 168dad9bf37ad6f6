"""Adaptive quadrature over an interval or a disc, in log space."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from riemvae._checks import argument_error

_NODES = 8
_PAIRS = 1 << 22  # panels times centres held at once


def log_integral(
    log_density: Callable[[Tensor], Tensor],
    radius: float,
    like: Tensor,
    dim: int,
    centers: Tensor | None = None,
    widths: tuple[Tensor, Tensor] | None = None,
    max_points: float = math.inf,
) -> float | None:
    """Log of the integral of a density over ``‖z‖ <= radius`` in one or two dimensions.

    Gauss-Legendre panels (in polar coordinates for two) are split where halving them still changes the
    result, up to twelve times; near centres they start as small as the narrowest bump there, because what no
    node sees would not be refined.

    Args:
        log_density: ``z (n, d) -> (n,)``, smooth.
        radius: of the interval or disc.
        like: a tensor of the dtype and device to evaluate in.
        dim: ``d``, 1 or 2.
        centers: where the density has bumps, ``(N, d)``.
        widths: their smallest and largest widths, ``(N,)`` each.
        max_points: how many points may be evaluated.

    Returns:
        The logarithm, or ``None`` where it takes more points.

    Raises:
        ValueError: The density is NaN somewhere: its metric is not positive definite there.

    Example:
        >>> value = log_integral(lambda z: -0.5 * z.square().sum(-1), 9.0, torch.zeros(0).double(), 2)
        >>> bool(abs(value - math.log(2 * math.pi)) < 1e-7)
        True
    """
    nodes, weights = (torch.as_tensor(a, device=like.device) for a in np.polynomial.legendre.leggauss(_NODES))
    if dim == 1:
        edges = [np.linspace(-radius, radius, 17)]
    else:
        edges = [np.linspace(0, radius, 9), np.linspace(0, 2 * np.pi, 17)]
    panels = _product_panels([torch.as_tensor(e, device=like.device) for e in edges])
    if centers is not None and widths is not None:
        narrow, wide = widths
        most = max_points / _NODES**dim
        refined = _refine_near(panels, centers.double(), narrow.double(), wide.double(), most)
        if refined is None:
            return None
        panels = refined
    evaluated = 0

    def log_values(panels: Tensor) -> Tensor:
        """Log of (density times volume element times weights) at the nodes, (P, nodes^d)."""
        nonlocal evaluated
        evaluated += len(panels) * _NODES**dim
        middle, half = panels.mean(-1), 0.5 * (panels[..., 1] - panels[..., 0])
        grid = middle.unsqueeze(-1) + half.unsqueeze(-1) * nodes  # (P, d, nodes)
        mass = half.unsqueeze(-1) * weights
        if dim == 1:
            points, mass = grid.reshape(-1, 1), mass.reshape(-1)
        else:
            r, angle = torch.broadcast_tensors(grid[:, 0, :, None], grid[:, 1, None, :])
            points = _polar(r, angle).reshape(-1, 2)
            mass = (r * mass[:, 0, :, None] * mass[:, 1, None, :]).reshape(-1)
        values = torch.cat([log_density(part.to(like.dtype)) for part in points.split(1 << 14)]).double()
        if bool(values.isnan().any()):  # it would be refined for ever
            raise argument_error(
                "metric",
                "a metric that is positive definite on all of the support",
                f"{int(values.isnan().sum())} of {len(values)} points where it is not",
                "lower radius= to where it is, or mend its tensor",
            )
        return (values + mass.log()).reshape(len(panels), -1)

    shift = float(log_values(panels).max())

    def integrate(panels: Tensor) -> Tensor:
        return (log_values(panels) - shift).exp().sum(-1)

    tolerance = 1e-8 if like.dtype == torch.float64 else 1e-6
    values, done = integrate(panels), 0.0
    for _ in range(12):
        if evaluated + len(panels) * (2 * _NODES) ** dim > max_points:
            return None
        children = _split(panels)
        parts = integrate(children.flatten(0, 1)).reshape(children.shape[:2])
        total = done + float(parts.sum())
        settled = (parts.sum(1) - values).abs() <= tolerance * total
        done += float(parts[settled].sum())
        panels, values = children[~settled].flatten(0, 1), parts[~settled].flatten()
        if not len(panels):
            break
    return math.log(done + float(values.sum())) + shift


def _polar(r: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([r * angle.cos(), r * angle.sin()], -1)


def _product_panels(edges: list[Tensor]) -> Tensor:
    """Panels ``(P, d, 2)`` (lower, upper) between the edges of each axis."""
    lower = torch.cartesian_prod(*[e[:-1] for e in edges]).reshape(-1, len(edges))
    upper = torch.cartesian_prod(*[e[1:] for e in edges]).reshape(-1, len(edges))
    return torch.stack([lower, upper], -1)


def _split(panels: Tensor) -> Tensor:
    """Each panel halved along every axis, ``(P, 2^d, d, 2)``."""
    middle = panels.mean(-1)
    halves = torch.stack(
        [torch.stack([panels[..., 0], middle], -1), torch.stack([middle, panels[..., 1]], -1)], 1
    )  # (P, 2, d, 2)
    if panels.shape[1] == 1:
        return halves
    return torch.stack(
        [torch.stack([halves[:, i, 0], halves[:, j, 1]], 1) for i in (0, 1) for j in (0, 1)], 1
    )


def _refine_near(panels: Tensor, centers: Tensor, narrow: Tensor, wide: Tensor, most: float) -> Tensor | None:
    """Splits panels near a centre down to the size of a bump; ``None`` where that makes too many."""
    done: list[Tensor] = []
    while len(panels):
        if sum(map(len, done)) + len(panels) > most:
            return None
        width = panels[..., 1] - panels[..., 0]
        middle = panels.mean(-1)
        if panels.shape[1] == 2:
            width = torch.stack([width[:, 0], panels[:, 0, 1] * width[:, 1]], -1)
            middle = _polar(middle[:, 0], middle[:, 1])
        size = width.amax(-1)
        parts = []
        rows = max(1, _PAIRS // len(centers))
        for m, s in zip(middle.split(rows), size.unsqueeze(-1).split(rows)):
            near = torch.cdist(m, centers) < 0.75 * s + 2 * wide
            parts.append((near & (s > 2 * narrow)).any(-1))
        coarse = torch.cat(parts)
        done.append(panels[~coarse])
        panels = _split(panels[coarse]).flatten(0, 1)
    return torch.cat(done)
