"""An encoder with several modes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from riemvae._checks import check_count
from riemvae._recipe import recipe
from riemvae.distributions.implicit_mixture import ImplicitMixture
from riemvae.networks.full_covariance import SOFTPLUS_ONE, START_WEIGHT_SCALE
from riemvae.networks.layers import feature_module

# Standard deviation of the components' first centres: apart, or they would stay the same component.
_SPREAD = 0.5


@recipe
class MixtureEncoder(nn.Module):
    """Encoder ``x -> Σ_k π_k(x) N(μ_k(x), diag σ_k²(x))``, with differentiable draws.

    Linear layers on the features give the log weights, the means, and the scales through a softplus. It
    starts with even weights, scales near one and centres a little apart.

    Trained by the evidence lower bound, components are drawn to the nearest mode and may all end in the same
    one; ``IWAE(num_samples, "doubly")`` spreads them.

    Args:
        features: A module ``x -> (B, h)``, or one of our encoders, as for :class:`FullCovarianceEncoder`.
        latent_dim: ``d``.
        num_components: ``K``; 1 is a factorised normal.
        num_features: ``h``; None where the module says it.

    Raises:
        ValueError: A size that is not a positive integer, an unknown number of features.

    Example:
        >>> from riemvae.networks import MLPEncoder
        >>> q = MixtureEncoder(MLPEncoder(64, 2), latent_dim=2, num_components=3)(torch.zeros(5, 64))
        >>> q.batch_shape, q.event_shape, q.num_components
        (torch.Size([5]), torch.Size([2]), 3)
    """

    def __init__(
        self, features: nn.Module, latent_dim: int, num_components: int = 4, num_features: int | None = None
    ) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.num_components = check_count("num_components", num_components)
        self.features, self.num_features = feature_module(features, num_features)
        size = self.num_components * self.latent_dim
        self.logits = nn.Linear(self.num_features, self.num_components)
        self.loc = nn.Linear(self.num_features, size)
        self.scale = nn.Linear(self.num_features, size)
        with torch.no_grad():
            for layer, bias in ((self.logits, 0.0), (self.scale, SOFTPLUS_ONE)):
                layer.weight.mul_(START_WEIGHT_SCALE)
                layer.bias.fill_(bias)
            if self.num_components > 1:
                # Around zero: on one side of it they would all go to the same mode.
                centres = _SPREAD * torch.randn(self.num_components, self.latent_dim)
                self.loc.bias.copy_((centres - centres.mean(0)).flatten())

    def forward(self, x: Tensor) -> ImplicitMixture:
        """``(B, ...)`` -> a mixture of batch shape ``(B,)`` and event ``(d,)``."""
        features = self.features(x)
        shape = (self.num_components, self.latent_dim)
        loc, scale = (layer(features).unflatten(-1, shape) for layer in (self.loc, self.scale))
        return ImplicitMixture(self.logits(features), loc, softplus(scale), validate_args=False)
