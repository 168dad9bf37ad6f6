"""The normal distribution of a momentum at a point of a Riemannian latent space."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from riemvae._checks import check_last_dim
from riemvae.geometry import LocalMetric, Metric


class MomentumNormal(TorchDistribution):
    """``N(0, G(z))`` over momenta ``v (..., d)``: the kinetic part of a Hamiltonian at ``z``.

    The density is taken with the Lebesgue measure of the coordinates of ``v``.

    Args:
        metric: The metric ``G``.
        z: Points ``(..., d)``; their leading dimensions are the batch shape.

    Example:
        >>> from riemvae.geometry import EuclideanMetric
        >>> momentum = MomentumNormal(EuclideanMetric(2), torch.zeros(5, 2))
        >>> momentum.log_prob(torch.zeros(5, 2))[0].round(decimals=4)
        tensor(-1.8379)
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, metric: Metric, z: Tensor, *, local: LocalMetric | None = None) -> None:
        check_last_dim("z", z, metric.latent_dim)
        self.metric, self.z = metric, z
        self.local = metric.at(z) if local is None else local
        super().__init__(z.shape[:-1], z.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: object = None) -> MomentumNormal:
        batch_shape = torch.Size(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        return MomentumNormal(self.metric, self.z.expand(*batch_shape, self.z.shape[-1]))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        noise = torch.randn(*sample_shape, *self.z.shape, dtype=self.z.dtype, device=self.z.device)
        return self.local.momentum(noise)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.local.momentum_log_prob(value)
