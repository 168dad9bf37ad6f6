"""Generative latent-variable models whose latent space has a geometry, as Pyro model/guide pairs."""

from riemvae import distributions, geometry, guides, likelihoods, priors
from riemvae.autoencoder import VAE

__version__ = "0.1.0"

__all__ = ["VAE", "distributions", "geometry", "guides", "likelihoods", "priors"]
