"""The standard normal prior."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from riemvae._checks import check_count
from riemvae._recipe import recipe


@recipe
class StandardNormal(nn.Module):
    """``N(0, I)`` on ``ℝᵈ``, wherever the module is moved to.

    Args:
        latent_dim: ``d``.

    Example:
        >>> StandardNormal(2)().event_shape
        torch.Size([2])
    """

    zero: Tensor
    one: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.register_buffer("zero", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("one", torch.ones(latent_dim), persistent=False)

    def forward(self) -> TorchDistribution:
        return dist.Normal(self.zero, self.one, validate_args=False).to_event(1)
