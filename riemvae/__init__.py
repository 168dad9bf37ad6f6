"""Generative latent-variable models whose latent space has a geometry, as Pyro model/guide pairs."""

from riemvae import (
    data,
    distributions,
    evaluation,
    flows,
    geometry,
    guides,
    inference,
    likelihoods,
    networks,
    priors,
    sampling,
    zoo,
)
from riemvae.autoencoder import VAE
from riemvae.inference import (
    ELBO,
    IWAE,
    compare,
    fit,
    log_likelihood,
    log_weights,
    posterior_predictive,
    to_arviz,
)
from riemvae.persistence import load, save

__version__ = "0.1.0"

__all__ = [
    "to_arviz",
    "posterior_predictive",
    "compare",
    "ELBO",
    "IWAE",
    "VAE",
    "data",
    "distributions",
    "evaluation",
    "fit",
    "flows",
    "geometry",
    "guides",
    "inference",
    "likelihoods",
    "load",
    "log_likelihood",
    "log_weights",
    "networks",
    "priors",
    "sampling",
    "save",
    "zoo",
]
