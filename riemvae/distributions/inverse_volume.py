"""The generating density of the Riemannian Hamiltonian VAE: inverse volume element on a ball (eq. 1.8)."""

from __future__ import annotations

import torch

from riemvae._checks import argument_error, check_positive
from riemvae._recipe import recipe
from riemvae.distributions.ball import Ball
from riemvae.distributions.mixture import bumps_of
from riemvae.distributions.volume import MatrixSum, VolumeDensity, WeightedDraws
from riemvae.geometry import CentroidMetric, Metric
from riemvae.geometry.posterior import PosteriorMetric

__all__ = ["Ball", "InverseVolume", "WeightedDraws", "bumps_of"]


@recipe
class InverseVolume(VolumeDensity):
    r"""The density ``∝ √det G⁻¹(z)`` with respect to Lebesgue measure on the ball ``‖z‖ <= radius``.

    .. math:: p(z) = 1_S(z) \sqrt{\det G^{-1}(z)} \,/ \int_S \sqrt{\det G^{-1}(z)}\, dz

    It is large where the metric's volume element is small, which for a
    :class:`~riemvae.geometry.CentroidMetric` is near data. The ball makes it proper. In high dimensions most
    of its mass may lie far from data all the same, since a small density fills a large ball: see
    ``riemvae.sampling.far_share`` and ``choose_regularization``.

    The normaliser is computed when :meth:`log_prob` first needs it: for ``d`` = 1 and 2 by adaptive
    quadrature (relative error below 1e-5), above that, and for very many narrow bumps, by an importance
    estimate whose error is :attr:`log_normalizer_stderr`. It is a constant: gradients reach the point, and
    not the metric through the normaliser. A generator of its own makes it the same at every call and leaves
    the caller's random numbers alone.

    Draws are exact (rejection) for a ``CentroidMetric`` with ``d <= 2``. Elsewhere, use ``riemvae.sampling``.

    Args:
        metric: the metric. It is taken as a value: changing it after the first :meth:`log_prob` is not seen.
        radius: radius of the ball around the origin. ``None`` is twice the largest norm of
            ``metric.centroids``.

    Raises:
        ValueError: when there is no radius and the metric has no centroids, when the radius is not positive,
            or for a metric of centroids with regularization 0, whose density far from data underflows (or
            grows without bound).

    Source: Chadebec, Thibeau-Sutre, Burgos and Allassonnière (2022), eq. 1.8 of the thesis.

    Example:
        >>> from riemvae.geometry import CentroidMetric
        >>> metric = CentroidMetric(torch.ones(1, 2), torch.eye(2)[None], temperature=1, regularization=0.01)
        >>> density = InverseVolume(metric)
        >>> density.log_prob(torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 0.0]]))
        tensor([-1.1796, -3.1183,    -inf])
        >>> _ = torch.manual_seed(0)
        >>> draws = density.importance_sample(1000)
        >>> bool(abs(draws.log_weight.exp().mean().log() - density.log_normalizer) < 0.1)
        True
    """

    _sign = -1.0

    def __init__(self, metric: Metric, radius: float | None = None) -> None:
        centroids = getattr(metric, "centroids", None)
        if radius is None:
            if centroids is None:
                raise argument_error(
                    "radius",
                    f"a positive number, since {type(metric).__name__} has no centroids to take it from",
                    None,
                    "pass radius=, the density is improper without a ball",
                )
            radius = 2 * float(torch.linalg.vector_norm(centroids.detach(), dim=-1).max())
        check_positive("radius", float(radius), "pass radius=")
        if isinstance(metric, (CentroidMetric, PosteriorMetric)) and metric.regularization == 0:
            raise argument_error(
                "metric",
                "a positive regularization",
                0.0,
                "the density is not computable far from the centroids",
            )
        self._raised = bumps_of(metric) is not None
        super().__init__(metric, float(radius))

    def _matrix_sum(self) -> MatrixSum | None:
        if not isinstance(self.metric, CentroidMetric):
            return None
        factors = self.metric.factors.detach()
        return MatrixSum(factors @ factors.mT, self.metric.regularization)
