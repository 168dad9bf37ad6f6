"""Coordinates in ``ℝᵏ`` for the points of a distribution's support, whatever that is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import geoopt
import torch
from pyro.distributions.constraints import sphere
from torch import Tensor
from torch.distributions import Distribution, Independent, biject_to, constraints

from riemvae._checks import argument_error
from riemvae.distributions.space_forms import Hyperboloid, plain, space_form
from riemvae.geometry import LatentManifold


@dataclass(frozen=True)
class Chart:
    """A bijection from ``ℝᵏ`` to a support, with the base measure of the density.

    Attributes:
        dim: ``k``.
        to_points: Coordinates ``(n, k)`` to points ``(n,) + event_shape`` and the log of the base measure's
            density in these coordinates, ``(n,)``: a log density plus this is one over coordinates.
        to_coordinates: The inverse.
        description: What the points are and what the density is taken with.
    """

    dim: int
    to_points: Callable[[Tensor], tuple[Tensor, Tensor]]
    to_coordinates: Callable[[Tensor], Tensor]
    description: str


def innermost(distribution: Distribution) -> Any:
    """The distribution inside any ``Independent`` ones."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def pointwise(support: Any) -> Any:
    """The support of a mixture's components, which is the mixture's; any other as it is."""
    while not isinstance(support, constraints.independent) and hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def is_all_of_space(support: Any) -> bool:
    """Whether a support has no outside."""
    while hasattr(support, "base_constraint"):  # of independent coordinates, or of a mixture
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector


def chart_of(
    distribution: Distribution, support: Any, points: Tensor | None, index: tuple[int, ...] = ()
) -> Chart:
    """Coordinates for one member of a distribution.

    Args:
        distribution: The distribution.
        support: Its support.
        points: Some draws of that member, ``(n,) + event_shape``; they place the pole of a sphere's chart.
        index: Which member of its batch.

    Raises:
        ValueError: No bijection to that support is registered with ``torch.distributions.biject_to``.
    """
    support = pointwise(support)
    if isinstance(support, type(sphere)):
        size = distribution.event_shape[0]
        return _sphere_chart(size, points)
    if isinstance(support, Hyperboloid):
        return _hyperboloid_chart(distribution.event_shape[0], support.k)
    try:
        transform = biject_to(support)
    except NotImplementedError:
        raise argument_error(
            "d",
            "a distribution whose support torch.distributions.biject_to knows",
            f"support {support}",
            "register a bijection for it with biject_to.register",
        ) from None
    return _bijection_chart(distribution, transform, index)


def _bijection_chart(distribution: Distribution, transform: Any, index: tuple[int, ...]) -> Chart:
    event, batch = distribution.event_shape, distribution.batch_shape
    scalar = not event
    dim = 1 if scalar else transform.inverse_shape(event)[0]
    log_volume, measure = _base_measure(distribution)

    def spread(value: Tensor, rank: int) -> Tensor:
        """``(n, ...)`` to ``(n,) + batch + (...)``: bounds may differ between members."""
        lead, rest = value.shape[: value.dim() - rank], value.shape[value.dim() - rank :]
        return value.reshape(*lead, *[1] * len(batch), *rest).expand(*lead, *batch, *rest)

    def member(value: Tensor) -> Tensor:
        place: tuple[Any, ...] = (slice(None), *index)
        return value[place]

    def to_points(u: Tensor) -> tuple[Tensor, Tensor]:
        wide = spread(u.squeeze(-1), 0) if scalar else spread(u, 1)
        x = transform(wide)
        log_det = transform.log_abs_det_jacobian(wide, x)
        log_det = log_det.reshape(*wide.shape[: 1 + len(batch)], -1).sum(-1)
        x = member(x)
        return x, member(log_det) + log_volume(x)

    def to_coordinates(x: Tensor) -> Tensor:
        u = member(transform.inv(spread(x, 0 if scalar else 1)))
        return u.unsqueeze(-1) if scalar else u

    return Chart(dim, to_points, to_coordinates, measure)


def _base_measure(distribution: Distribution) -> tuple[Callable[[Tensor], Tensor], str]:
    """Log of the base measure's density over the coordinates of points."""
    inner = innermost(distribution)
    manifold = getattr(inner, "manifold", None)
    if getattr(inner, "measure", None) != "riemannian" or manifold is None:
        return lambda x: x.new_zeros(()), "Lebesgue measure"
    if isinstance(manifold, LatentManifold):
        return manifold.metric.log_volume, "the Riemannian volume"
    space = space_form(manifold)
    if isinstance(manifold, geoopt.Manifold) and space is not None:
        return space.log_volume, "the Riemannian volume"
    return lambda x: x.new_zeros(()), "Lebesgue measure"


def _sphere_chart(size: int, points: Tensor | None) -> Chart:
    """Stereographic projection from the pole that lies opposite to the mean of the draws."""
    axis = torch.zeros(size, dtype=torch.float64)
    axis[0] = 1.0
    mean = axis if points is None else plain(points).double().mean(0).cpu()
    pole = -mean / torch.linalg.vector_norm(mean)
    mirror = axis - pole
    length = mirror.square().sum()

    def reflected(x: Tensor) -> Tensor:
        """The reflection that swaps the first axis and the pole."""
        if float(length) < 1e-12:
            return x
        normal = (mirror / length.sqrt()).to(x)
        return x - 2 * (x @ normal).unsqueeze(-1) * normal

    def to_points(u: Tensor) -> tuple[Tensor, Tensor]:
        square = u.square().sum(-1, keepdim=True)
        y = torch.cat([square - 1, 2 * u], -1) / (square + 1)
        return reflected(y), (size - 1) * (math.log(2.0) - square.squeeze(-1).log1p())

    def to_coordinates(x: Tensor) -> Tensor:
        y = reflected(plain(x))
        return y[..., 1:] / (1 - y[..., :1])

    return Chart(size - 1, to_points, to_coordinates, "the area of the sphere")


def _hyperboloid_chart(size: int, k: Any) -> Chart:
    """The coordinates but the first; the area element is ``√k / x_0``."""

    def to_points(u: Tensor) -> tuple[Tensor, Tensor]:
        square = torch.as_tensor(k).to(u)
        time = (square + u.square().sum(-1, keepdim=True)).sqrt()
        return torch.cat([time, u], -1), 0.5 * square.log() - time.squeeze(-1).log()

    return Chart(size - 1, to_points, lambda x: plain(x)[..., 1:], "the area of the hyperboloid")


_BEND = 3.0  # where standardised coordinates turn from linear to logarithmic


class Standardised:
    """Coordinates ``t``, ``u = c + 3 L sinh(t/3)``: draws are of order one, and tails of any weight short.

    Args:
        chart: The coordinates ``u``.
        u: Draws in these, ``(n, k)``, double precision; None centres at zero with unit scale.
        like: A tensor of the dtype and device that points are evaluated in.
    """

    def __init__(self, chart: Chart, u: Tensor | None, like: Tensor) -> None:
        self.chart, self.like = chart, like
        k = chart.dim
        if u is None:
            self.center = torch.zeros(k, dtype=torch.float64, device=like.device)
            self.factor = torch.eye(k, dtype=torch.float64, device=like.device)
        else:
            self.center = u.median(0).values
            offset = u - self.center
            spread = 1.4826 * offset.abs().median(0).values
            # A coordinate where more than half of the draws agree has no such spread.
            spread = torch.where(spread > 0, spread, offset.abs().mean(0)).clamp(min=1e-12)
            clipped = (offset / spread).clamp(-5.0, 5.0)
            covariance = clipped.mT @ clipped / len(u)
            ridge = 1e-9 * torch.eye(k, dtype=torch.float64, device=like.device)
            self.factor = spread.unsqueeze(-1) * torch.linalg.cholesky(covariance + ridge)
        self.log_det = self.factor.diagonal().log().sum()

    def points(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Points and the log of the base measure in the coordinates ``t (n, k)``."""
        x, log_measure = self.chart.to_points(
            (self.center + self.straight(t) @ self.factor.mT).to(self.like.dtype)
        )
        bent = t.abs() / _BEND
        log_cosh = bent + (-2 * bent).exp().log1p() - math.log(2.0)
        return x, log_measure.double() + self.log_det + log_cosh.sum(-1)

    def coordinates(self, x: Tensor) -> Tensor:
        """The inverse, in double precision."""
        u = self.chart.to_coordinates(x).double()
        return self.bent(torch.linalg.solve_triangular(self.factor, (u - self.center).mT, upper=False).mT)

    @staticmethod
    def straight(t: Tensor) -> Tensor:
        """Whitened coordinates ``y``, ``u = c + L y``, from ``t``."""
        return _BEND * (t / _BEND).sinh()

    @staticmethod
    def bent(y: Tensor) -> Tensor:
        """The inverse."""
        return _BEND * (y / _BEND).asinh()
