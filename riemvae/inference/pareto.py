"""The Pareto shape of importance weights, for many data at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Fewer tail weights than this say nothing of a shape.
_MINIMUM_TAIL = 5


def tail_size(num_samples: int) -> int:
    """How many of ``num_samples`` weights are the tail: ``ceil(min(S/5, 3√S))``."""
    return math.ceil(min(0.2 * num_samples, 3.0 * math.sqrt(num_samples)))


def pareto_shape(largest: Tensor) -> Tensor:
    """``k̂`` of the generalised Pareto distribution fitted to the largest weights of each datum.

    Above 0.7 an importance-sampling estimate, its standard error included, is not to be trusted. The prior of
    Vehtari et al. (shape 1/2, weight 10 draws) steadies short tails.

    Args:
        largest: The ``M + 1`` largest log weights of each datum, ``(M + 1, B)``, in any order; the smallest
            is the cutoff.

    Returns:
        ``k̂ (B,)``; ``-inf`` where all weights of the tail are equal (the guide is exact), NaN where fewer
        than 5 lie above the cutoff, ``inf`` where that is because a few weights are everything.

    Source: Zhang and Stephens (2009); Vehtari, Simpson, Gelman, Yao and Gabry (2024).

    Example:
        >>> log_weights = -0.5 * torch.log(1 - torch.linspace(0.001, 0.999, 500, dtype=torch.float64))
        >>> round(float(pareto_shape(log_weights[:, None])[0]), 1)  # Pareto's distribution of shape 1/2
        0.5
    """
    return pareto_smooth(largest)[1]


def pareto_smooth(largest: Tensor) -> tuple[Tensor, Tensor]:
    """The largest weights of each datum, replaced by the order statistics that their fitted tail expects.

    The ``M`` weights above the cutoff ``c`` become ``c + F⁻¹((j - 1/2)/M)``, ``j = 1..M``, with ``F`` the
    generalised Pareto distribution of :func:`pareto_shape`, and none exceeds the largest weight that was
    drawn. They are what they were where there is no such fit.

    Args:
        largest: The ``M + 1`` largest log weights of each datum, ``(M + 1, B)``, in any order; the smallest
            is the cutoff, and stays.

    Returns:
        Smoothed log weights ``(M + 1, B)``, the largest first, and ``k̂ (B,)``.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry (2024), section 3.

    Example:
        >>> torch.manual_seed(0)
        <torch._C.Generator object at ...>
        >>> smoothed, shape = pareto_smooth(torch.randn(50, 1))
        >>> bool((smoothed.diff(dim=0) <= 0).all()), smoothed.shape
        (True, torch.Size([50, 1]))
    """
    raw = largest.double().sort(0).values  # (M + 1, B)
    top = torch.where(torch.isfinite(raw[-1]), raw[-1], 0.0)
    ordered = raw - top
    cutoff = ordered[0].clamp_min(math.log(torch.finfo(torch.float64).tiny))
    tail = ordered[1:].exp() - cutoff.exp()  # ascending, (M, B)
    m, batch = tail.shape
    smoothed = ordered.clone()
    if m < _MINIMUM_TAIL:
        return raw.flip(0).to(largest.dtype), largest.new_full((batch,), math.nan)
    constant = ~(ordered[0] < -1e-9)
    counts = (tail > 0).sum(0)
    # Ties with the cutoff are not part of the tail; data are few of that kind, so they are fitted one by one.
    shapes = torch.full((batch,), math.nan, dtype=torch.float64, device=largest.device)
    whole = (counts == m) & ~constant
    if bool(whole.any()):
        shapes[whole], smoothed[1:, whole] = _fitted(tail[:, whole], ordered[1:, whole], cutoff[whole])
    for column in torch.nonzero((counts < m) & (counts >= _MINIMUM_TAIL) & ~constant).flatten().tolist():
        above = slice(-int(counts[column]), None)
        pick = (above, slice(column, column + 1))
        shape, values = _fitted(tail[pick], ordered[1:][pick], cutoff[column : column + 1])
        shapes[column], smoothed[1:][pick] = shape[0], values
    # So few are left above the smallest number that there is: a handful of draws is the whole estimate.
    shapes[(counts < _MINIMUM_TAIL) & (ordered[0] < cutoff)] = math.inf
    shapes[constant] = -math.inf
    shapes[~torch.isfinite(largest).any(0)] = math.nan
    return (smoothed + top).flip(0).to(largest.dtype), shapes.to(largest.dtype)


def _fitted(x: Tensor, raw: Tensor, cutoff: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and smoothed log weights of exceedances ``x (n, B)``, ascending; ``raw`` where the fit failed."""
    shape, scale = _fit(x)
    n = x.shape[0]
    probability = (torch.arange(n, dtype=x.dtype, device=x.device).unsqueeze(-1) + 0.5) / n
    flat = shape.abs() < torch.finfo(x.dtype).eps
    curved = torch.where(flat, 1.0, shape)
    exponential = -torch.log1p(-probability)
    quantile = torch.where(flat, exponential, torch.expm1(curved * exponential) / curved)
    smoothed = torch.log(scale * quantile + cutoff.exp()).clamp_max(0.0)
    good = torch.isfinite(shape) & torch.isfinite(smoothed).all(0) & (scale > 0)
    return shape, torch.where(good, smoothed, raw)


def _fit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and scale, the profile-posterior mean of Zhang and Stephens, of ascending ``x (n, B)``."""
    n = x.shape[0]
    grid = 30 + int(math.sqrt(n))
    index = torch.arange(1, grid + 1, dtype=x.dtype, device=x.device)
    quartile = x[int(n / 4 + 0.5) - 1]
    b = (1.0 - torch.sqrt(grid / (index - 0.5))).unsqueeze(-1) / (3.0 * quartile) + 1.0 / x[-1]  # (grid, B)
    k = torch.log1p(-b.unsqueeze(1) * x.unsqueeze(0)).mean(1)
    log_likelihood = n * (torch.log(-(b / k)) - k - 1.0)
    weights = torch.softmax(log_likelihood, 0)
    # As the reference implementation: candidates without weight are dropped before the mean.
    weights = torch.where(weights >= 10.0 * torch.finfo(x.dtype).eps, weights, torch.zeros_like(weights))
    mean = (weights / weights.sum(0) * b).sum(0)
    shape = torch.log1p(-mean * x).mean(0)
    return (n * shape + 10.0 * 0.5) / (n + 10.0), -shape / mean
