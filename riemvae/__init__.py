"""Generative latent-variable models whose latent space has a geometry, as Pyro model/guide pairs."""

from riemvae import distributions, geometry, guides, inference, likelihoods, networks, priors, sampling
from riemvae.autoencoder import VAE
from riemvae.inference import ELBO, IWAE, fit, log_likelihood, log_weights

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "IWAE",
    "VAE",
    "distributions",
    "fit",
    "geometry",
    "guides",
    "inference",
    "likelihoods",
    "log_likelihood",
    "log_weights",
    "networks",
    "priors",
    "sampling",
]
