"""Priors: modules that return distributions of the latent."""

from riemvae.priors.fixed import FixedPrior
from riemvae.priors.standard import StandardNormal

__all__ = ["FixedPrior", "StandardNormal"]
