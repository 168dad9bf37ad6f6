"""What a trained encoder says of its training data, and the metrics that it makes of the latent space."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from riemvae._checks import argument_error
from riemvae._recipe import recipe
from riemvae.evaluation import nearest
from riemvae.geometry import CentroidMetric, PosteriorMetric

# Far from data the inverse metric must be smaller than the covariances are.
_RELATIVE_REGULARIZATION = 1e-2
# The bumps of eq. 1.7 reach to the fifth nearest neighbour of a typical code: they overlap along the data and
# leave the gaps. The largest distance of a nearest neighbour, ρ of algorithm 4, is an outlier's, and bumps so
# wide hide the data's shape: geodesics were then farther from it than straight lines (180 disks and rings).
_NEIGHBOUR = 5


@recipe
class PosteriorCodes(nn.Module):
    """Means and scales of the Gaussian posteriors of training data: the geometry that any VAE brings.

    Args:
        loc: Means ``(N, d)``.
        scale: Standard deviations ``(N, d)``, or lower triangular factors ``(N, d, d)``.

    Raises:
        ValueError: Shapes that do not fit.

    Source: Chadebec and Allassonnière (2022); thesis, section 3.4.3 and algorithm 4.

    Example:
        >>> codes = PosteriorCodes(torch.eye(2), torch.full((2, 2), 0.5))
        >>> codes.posterior_metric(regularization=0.0).tensor(torch.eye(2)).round(decimals=2)[0, 0, 0]
        tensor(4.0700)
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        if loc.dim() != 2 or len(loc) == 0:
            raise argument_error("loc", "means (N, d), N >= 1", loc)
        if tuple(scale.shape) not in (tuple(loc.shape), (*loc.shape, loc.shape[-1])):
            raise argument_error(
                "scale", f"a tensor {tuple(loc.shape)} or {(*loc.shape, loc.shape[-1])}", scale
            )
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, posterior: Distribution) -> PosteriorCodes:
        """The codes of Gaussian posteriors of batch shape ``(N,)``.

        Raises:
            ValueError: Posteriors that are not Gaussian.
        """
        parameters = gaussian_parameters(posterior)
        if parameters is None:
            raise argument_error(
                "posterior",
                "a Gaussian posterior (loc, scale), which the geometry is read from",
                type(posterior).__name__,
                "pass metric= or use another sampler",
            )
        loc, scale = parameters
        return cls(loc.detach().clone(), scale.detach().clone())

    def posterior_metric(self, num_centroids: int | None = None, **options: Any) -> PosteriorMetric:
        """The metric of eq. 3.6, whose volume is large near data.

        Args:
            num_centroids: Keep so many medoids of the codes as centroids; None keeps all.
            **options: Those of :meth:`~riemvae.geometry.PosteriorMetric.from_posterior`.
        """
        return PosteriorMetric.from_posterior((self.loc, self.scale), num_centroids=num_centroids, **options)

    def covariance_metric(
        self, temperature: float | None = None, regularization: float | None = None
    ) -> CentroidMetric:
        """The metric of eq. 1.7 with ``A_i = Σ_i``, whose volume is small near data: geodesics keep to it.

        Args:
            temperature: ``T``; None is the median distance of a code to its fifth nearest neighbour, and at
                least the root mean variance of the posteriors, below which codes are not told apart.
            regularization: ``λ``; None is a hundredth of the mean variance of the posteriors.
        """
        factors = torch.diag_embed(self.scale) if self.scale.dim() == 2 else self.scale
        variance = float(factors.square().sum((-2, -1)).mean()) / self.loc.shape[-1]
        if temperature is None:
            temperature = math.sqrt(variance)
            if len(self.loc) > 1:
                k = min(_NEIGHBOUR, len(self.loc) - 1)
                reach = nearest(self.loc, self.loc, k, skip_self=True).distances[:, -1].median()
                temperature = max(temperature, float(reach))
        if regularization is None:
            regularization = _RELATIVE_REGULARIZATION * variance
        return CentroidMetric(self.loc, factors, temperature, regularization)


def gaussian_parameters(posterior: Distribution) -> tuple[Tensor, Tensor] | None:
    """Mean and scale (standard deviations, or a factor of the covariance) of a Gaussian, else None."""
    base = posterior
    while isinstance(base, Independent):
        base = base.base_dist
    if isinstance(base, Normal):
        return posterior.mean, posterior.stddev
    if isinstance(base, MultivariateNormal):
        return base.loc, base.scale_tril
    return None
