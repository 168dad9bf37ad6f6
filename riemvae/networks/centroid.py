"""The metric of eq. 1.7 as a module: a network's factors around the encoder's means."""

from __future__ import annotations

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
