"""How much of a density, or of its draws, lies far from all centroids, and the λ that bounds it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from riemvae._checks import argument_error
from riemvae.distributions.inverse_volume import InverseVolume
from riemvae.distributions.mixture import Bumps, terms_of
from riemvae.geometry import CentroidMetric, Metric

FAR = 2.0
"""A point is far when it lies beyond this many widths (temperatures) from every centroid."""


class Estimate(NamedTuple):
    """A Monte Carlo estimate with its standard error."""

    value: float
    stderr: float


class RegularizationChoice(NamedTuple):
    """What :func:`choose_regularization` found.

    Attributes:
        regularization: the λ chosen.
        far_share: share of the exact target's mass beyond ``2T`` of all centroids at this λ.
        stderr: its standard error.
    """

    regularization: float
    far_share: float
    stderr: float


def has_bumps(metric: Metric) -> bool:
    """Whether :func:`far_share` can tell near from far for this metric."""
    return terms_of(metric) is not None


def _bumps(metric: Metric) -> Bumps:
    bumps = terms_of(metric)
    if bumps is None:
        raise argument_error(
            "metric",
            "a metric with centroids and a temperature",
            type(metric).__name__,
            "without them nothing is far",
        )
    return bumps


def _far(metric: Metric, z: Tensor) -> Tensor:
    """Whether each point of ``(n, d)`` lies beyond two widths of all centroids."""
    nearest = [squares.amin(-1) for squares in _bumps(metric).square_chunks(z)]
    return torch.cat(nearest) > FAR**2


def far_share(metric: Metric, z: Tensor) -> float:
    """The share of points ``z (..., d)`` that lie beyond ``2T`` of all centroids of the metric.

    There the metric knows nothing but its regularization. For a metric made of posteriors (eq. 3.6), which
    has no temperature, it is beyond ``2ρ`` in every centroid's Mahalanobis distance: in either case the
    weight of every centroid is below ``e⁻⁴``.

    Raises:
        ValueError: when the metric has no centroids.

    Example:
        >>> metric = CentroidMetric(torch.zeros(1, 2), torch.eye(2)[None], temperature=1.0)
        >>> far_share(metric, torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
        0.5
    """
    return float(_far(metric, z.reshape(-1, z.shape[-1])).double().mean())


@torch.no_grad()
def exact_far_share(
    metric: Metric,
    radius: float | None = None,
    regularization: float | None = None,
    num_samples: int = 20_000,
) -> Estimate:
    """The share of the mass of ``InverseVolume(metric, radius)`` beyond ``2T`` of all centroids.

    A self-normalised importance estimate with random numbers of its own: the same arguments give the same
    estimate, and the caller's generator is left alone.

    Args:
        metric: a metric with centroids and a temperature.
        radius: of the ball; ``None`` is twice the largest norm of the centroids.
        regularization: λ in place of the metric's own (``CentroidMetric`` only).
        num_samples: importance draws.

    Returns:
        An :class:`Estimate`.

    Raises:
        ValueError: when the metric has no centroids, or a regularization is given for another kind of metric.

    Example:
        >>> metric = CentroidMetric(torch.zeros(1, 2), torch.eye(2)[None], temperature=1, regularization=0.01)
        >>> share = exact_far_share(metric, radius=4.0)
        >>> bool(abs(share.value - 0.1192) < 0.01)
        True
    """
    if regularization is not None:
        metric = _regularized(metric, regularization)
    density = InverseVolume(metric, radius)
    generator = torch.Generator(_bumps(metric).centers.device).manual_seed(0)
    points, log_weight = density.importance_sample(num_samples, generator)
    return _share(log_weight.double(), _far(metric, points))


@torch.no_grad()
def choose_regularization(
    metric: CentroidMetric,
    share: float = 0.05,
    radius: float | None = None,
    *,
    num_samples: int = 20_000,
    bounds: tuple[float, float] = (1e-8, 1e2),
) -> RegularizationChoice:
    """The largest λ at which at most ``share`` of the exact mass lies beyond ``2T`` of all centroids.

    Bisection over log λ. With ``S = Σ_i w_i A_i``, whose eigenvalues ``e`` are computed once for each draw,
    the density at any λ is ``Π (e + λ)^{1/2}``, so the same weighted draws serve every λ of a bisection. The
    proposal is then fitted again at the λ found, until that no longer moves.

    The metric itself is not changed: build ``CentroidMetric(..., regularization=result.regularization)``.

    Args:
        metric: the metric.
        share: largest share of far mass.
        radius: of the ball; ``None`` is twice the largest norm of the centroids.
        num_samples: importance draws of each round.
        bounds: range of λ that is searched. When even its upper end keeps the share, that end is returned.

    Returns:
        A :class:`RegularizationChoice`, with the share reached and its standard error.

    Raises:
        ValueError: for another kind of metric, a share outside (0, 1), or when no λ in the bounds keeps the
            share.

    Example:
        >>> metric = CentroidMetric(torch.zeros(1, 2), torch.eye(2)[None], temperature=1, regularization=1)
        >>> choice = choose_regularization(metric, share=0.10, radius=4.0)
        >>> bool(abs(choice.regularization - 0.00785) < 0.0005)
        True
    """
    if not isinstance(share, float) or not 0.0 < share < 1.0:
        raise argument_error("share", "a number strictly between 0 and 1", share)
    low, high = (math.log(b) for b in bounds)
    start = (
        metric.regularization if getattr(metric, "regularization", 0) else math.sqrt(bounds[0] * bounds[1])
    )
    current = min(max(math.log(start), low), high)
    for _ in range(8):
        reached = _regularized(metric, math.exp(current))
        estimate = _ShareOfRegularization(reached, radius, num_samples)
        if estimate(high).value <= share:
            found = high
        else:
            lower, found = low, high
            for _ in range(40):
                middle = 0.5 * (lower + found)
                lower, found = (middle, found) if estimate(middle).value <= share else (lower, middle)
            found = lower
        # Far from the λ of the proposal the weights degenerate: go there by bounded strides.
        settled = abs(found - current) < 0.1
        current = found if settled else current + min(max(found - current, -4.0), 4.0)
        if settled:
            break
    value, stderr = estimate(current)
    if value > share:
        raise argument_error(
            "share",
            f"a share that some regularization in {bounds} reaches",
            f"{share} (at {math.exp(current):.3g} it is {value:.3g})",
            "raise the temperature or lower the radius",
        )
    return RegularizationChoice(math.exp(current), value, stderr)


class _ShareOfRegularization:
    """The far share as a function of log λ, over one set of weighted draws."""

    def __init__(self, metric: CentroidMetric, radius: float | None, num_samples: int) -> None:
        density = InverseVolume(metric, radius)
        generator = torch.Generator(_bumps(metric).centers.device).manual_seed(0)
        points, log_weight = density.importance_sample(num_samples, generator)
        inverse = torch.cat([metric.inverse(part) for part in points.split(1 << 14)]).double()
        eigenvalues = torch.linalg.eigvalsh(inverse)
        self.scale = (eigenvalues - metric.regularization).clamp(min=0)
        self.log_weight = log_weight.double() - 0.5 * eigenvalues.log().sum(-1)
        self.far = _far(metric, points)

    def __call__(self, log_regularization: float) -> Estimate:
        log_density = 0.5 * (self.scale + math.exp(log_regularization)).log().sum(-1)
        return _share(self.log_weight + log_density, self.far)


def _share(log_weight: Tensor, far: Tensor) -> Estimate:
    """Self-normalised share of the weight on ``far``, with the standard error of the delta method."""
    weight = log_weight.softmax(0)
    value = weight[far].sum()
    return Estimate(float(value), float((weight * (far.to(weight) - value)).square().sum().sqrt()))


def _regularized(metric: Metric, regularization: float) -> CentroidMetric:
    if not isinstance(metric, CentroidMetric):
        raise argument_error(
            "metric", "a CentroidMetric, whose regularization can be replaced", type(metric).__name__
        )
    return CentroidMetric(
        metric.centroids.detach(),
        metric.factors.detach(),
        temperature=metric.temperature,
        regularization=regularization,
    )
