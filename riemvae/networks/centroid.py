"""The metric of eq. 1.7 as a module: around the encoder's means, a network's factors or its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from riemvae._checks import argument_error, check_positive
from riemvae._recipe import recipe
from riemvae.geometry import CentroidMetric


@recipe
class CentroidMetricNetwork(nn.Module):
    """``(x, loc) -> CentroidMetric`` with centroids ``loc`` and factors ``network(x)``.

    Args:
        network: ``x -> L (B, d, d)``, lower triangular with a positive diagonal.
        temperature: ``T > 0``.
        regularization: ``λ > 0``.

    Raises:
        ValueError: Numbers out of range.

    Source: thesis, eq. 1.7 and algorithm 1.

    Example:
        >>> import torch
        >>> network = CentroidMetricNetwork(lambda x: torch.eye(2).expand(len(x), 2, 2))
        >>> metric = network(torch.zeros(3, 5), torch.zeros(3, 2))
        >>> metric.inverse(torch.zeros(2)).round(decimals=3)
        tensor([[3.0010, 0.0000],
                [0.0000, 3.0010]])
    """

    def __init__(self, network: nn.Module, temperature: float = 0.8, regularization: float = 1e-3) -> None:
        super().__init__()
        if not callable(network):
            raise argument_error("network", "a module x -> (B, d, d)", network)
        check_positive("temperature", temperature)
        check_positive("regularization", regularization)
        self.network = network
        self.temperature, self.regularization = temperature, regularization

    def forward(self, x: Tensor, loc: Tensor) -> CentroidMetric:
        return CentroidMetric(loc, self.network(x), self.temperature, self.regularization)


@recipe
class PosteriorCentroidNetwork(nn.Module):
    """``(x, posterior) -> CentroidMetric`` with the encoder's own covariances, ``A_i = Σ_i`` in eq. 1.7.

    It takes the place of :class:`CentroidMetricNetwork` in a ``RiemannianHamiltonianGuide`` and has no
    parameters: the metric learns through the encoder, whose means and covariances it is made of. The inverse
    metric is then large where posteriors are wide, and a trajectory moves there with long steps.

    Args:
        temperature: ``T > 0``.
        regularization: ``λ > 0``.

    Raises:
        ValueError: Numbers out of range.

    Source: thesis, eq. 1.7 with the covariances of section 3.4.3.

    Example:
        >>> posterior = torch.distributions.Normal(torch.zeros(3, 2), torch.full((3, 2), 0.5))
        >>> metric = PosteriorCentroidNetwork()(torch.zeros(3, 5), posterior)
        >>> metric.inverse(torch.zeros(2)).round(decimals=3)
        tensor([[0.7510, 0.0000],
                [0.0000, 0.7510]])
    """

    takes_posterior = True
    """Tells a guide to pass the encoder's distribution where it passes its means otherwise."""

    def __init__(self, temperature: float = 0.8, regularization: float = 1e-3) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        check_positive("regularization", regularization)
        self.temperature, self.regularization = temperature, regularization

    def forward(self, x: Tensor, posterior: Any) -> CentroidMetric:
        """The metric of a posterior with batch ``(..., B)`` and event ``(d,)``, or its factors a coordinate.

        Args:
            x: Not used; modules that build a metric take it.
            posterior: A multivariate normal gives its full covariances, another distribution its variances.
        """
        loc = posterior.mean
        d = loc.shape[-1]
        full = hasattr(posterior, "scale_tril")
        factors = posterior.scale_tril if full else torch.diag_embed(posterior.stddev)
        factors = factors.expand(*loc.shape, d).reshape(-1, d, d)
        return CentroidMetric(loc.reshape(-1, d), factors, self.temperature, self.regularization)
