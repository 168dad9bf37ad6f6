"""The uniform distribution of a Riemannian manifold, in coordinates: its volume element (section 3.4.5)."""

from __future__ import annotations

import torch

from riemvae._checks import argument_error, check_positive
from riemvae._recipe import recipe
from riemvae.distributions.volume import MatrixSum, VolumeDensity
from riemvae.geometry import CentroidMetric, Metric
from riemvae.geometry.posterior import PosteriorMetric


@recipe
class RiemannianUniform(VolumeDensity):
    r"""The density ``∝ √det G(z)`` with respect to Lebesgue measure: uniform for the Riemannian volume.

    .. math:: p(z) = 1_S(z) \sqrt{\det G(z)} \,/ \int_S \sqrt{\det G(z)}\, dz

    For a :class:`~riemvae.geometry.PosteriorMetric` it is large near data. The set ``S`` is the ball ``‖z‖ <=
    radius``, or the whole space where the metric's ``decay`` ``τ > 0`` makes its volume finite: far from data
    the density is then ``∝ exp(-τ d ‖z‖²/2)``, and the smaller ``τ``, the more of its mass lies far from all
    data (the thesis sets ``τ ≈ 0``, and draws by finite chains that start at centroids: so do the samplers of
    ``riemvae.sampling``).

    The normaliser is computed when :meth:`log_prob` first needs it: for ``d`` = 1 and 2 by adaptive
    quadrature (relative error below 1e-5), above that, and for very many narrow bumps, by an importance
    estimate whose error is :attr:`log_normalizer_stderr`. It is a constant with random numbers of its own.

    Draws are exact (rejection) for a ``PosteriorMetric`` with ``d <= 2``. Elsewhere, use
    ``riemvae.sampling``.

    Args:
        metric: the metric. It is taken as a value: changing it after the first :meth:`log_prob` is not seen.
        radius: radius of the ball around the origin. ``None`` is the whole space, for a ``PosteriorMetric``
            with a decay.

    Raises:
        ValueError: when there is no radius and no decay, when the radius is not positive, or for a
            ``CentroidMetric`` with regularization 0, whose volume far from data overflows.

    Source: Pennec (2006); Chadebec and Allassonnière (2022), section 3.4.5 of the thesis.

    Example:
        >>> from riemvae.geometry.posterior import PosteriorMetric
        >>> metric = PosteriorMetric(torch.zeros(1, 2), torch.full((1, 2), 0.5), bandwidth=1.0)
        >>> density = RiemannianUniform(metric, radius=2.0)
        >>> density.log_prob(torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]]))
        tensor([ 0.2048, -3.6697,    -inf])
    """

    _sign = 1.0

    def __init__(self, metric: Metric, radius: float | None = None) -> None:
        posterior = isinstance(metric, PosteriorMetric)
        decay = metric.decay if isinstance(metric, PosteriorMetric) and metric.regularization else 0.0
        if radius is None:
            if decay == 0.0:
                remedy = (
                    "radius=, or decay= (with a regularization) of the metric" if posterior else "radius="
                )
                raise argument_error(
                    "radius",
                    f"a positive number, since the volume of {type(metric).__name__} need not be finite",
                    None,
                    f"pass {remedy}",
                )
        else:
            radius = float(radius)
            check_positive("radius", radius, "pass radius=")
        if isinstance(metric, CentroidMetric) and metric.regularization == 0:
            raise argument_error(
                "metric", "a positive regularization", 0.0, "the volume is infinite far from the centroids"
            )
        self._raised = posterior
        super().__init__(metric, radius, decay)

    def _matrix_sum(self) -> MatrixSum | None:
        if not isinstance(self.metric, PosteriorMetric):
            return None
        scale = self.metric.scale.detach()
        precision = torch.diag_embed(scale**-2) if scale.dim() == 2 else torch.cholesky_inverse(scale)
        return MatrixSum(precision, self.metric.regularization)
