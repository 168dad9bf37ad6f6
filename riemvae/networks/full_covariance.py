"""An encoder with correlated coordinates."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn
from torch.nn.functional import softplus

from riemvae._checks import check_count
from riemvae._recipe import recipe
from riemvae.networks.layers import Heads, TriangularFactors, feature_module

# softplus of it is one.
SOFTPLUS_ONE = math.log(math.e - 1.0)
# Of the default initial weights: a factor starts near the identity, whatever the features.
START_WEIGHT_SCALE = 0.1


@recipe
class FullCovarianceEncoder(nn.Module):
    """Encoder ``x -> N(μ(x), L(x) L(x)ᵀ)`` with a lower-triangular factor ``L`` of positive diagonal.

    One linear layer on the features gives ``μ``, the diagonal of ``L`` through a softplus, and what is below
    it. ``L`` starts near the identity.

    Args:
        features: A module ``x -> (B, h)``; or an :class:`MLPEncoder` or :class:`ConvEncoder`, whose layers
            before its heads are taken (shared with it, not copied).
        latent_dim: ``d``.
        num_features: ``h``; None where the module says it: those encoders, a module with that attribute, or
            a sequence that ends in a linear layer and activations.

    Raises:
        ValueError: A size that is not a positive integer, an unknown number of features.

    Source: Kingma and Welling (2019), section 2.5.1.

    Example:
        >>> import torch
        >>> from riemvae.networks import MLPEncoder
        >>> q = FullCovarianceEncoder(MLPEncoder(64, 2), latent_dim=2)(torch.zeros(5, 64))
        >>> q.batch_shape, q.event_shape, q.scale_tril.shape
        (torch.Size([5]), torch.Size([2]), torch.Size([5, 2, 2]))
    """

    def __init__(self, features: nn.Module, latent_dim: int, num_features: int | None = None) -> None:
        super().__init__()
        d = self.latent_dim = check_count("latent_dim", latent_dim)
        self.features, self.num_features = feature_module(features, num_features)
        self.loc = nn.Linear(self.num_features, d)
        self.heads = Heads(self.num_features, (), d, d * (d - 1) // 2, "relu")
        self.heads.start_at(SOFTPLUS_ONE, 0.0, START_WEIGHT_SCALE)
        self.factors = TriangularFactors(d)

    def forward(self, x: Tensor) -> Any:
        """``(B, ...)`` -> a multivariate normal of batch shape ``(B,)`` and event ``(d,)``."""
        features = self.features(x)
        diagonal, below = self.heads(features)
        scale_tril = self.factors.assemble(softplus(diagonal), below)
        return dist.MultivariateNormal(self.loc(features), scale_tril=scale_tril, validate_args=False)
