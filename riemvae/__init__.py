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
    longitudinal,
    networks,
    priors,
    sampling,
    zoo,
)
from riemvae.autoencoder import VAE
from riemvae.distributions import check_distribution
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
    "ELBO",
    "IWAE",
    "VAE",
    "check_distribution",
    "compare",
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
    "longitudinal",
    "networks",
    "posterior_predictive",
    "priors",
    "sampling",
    "save",
    "to_arviz",
    "zoo",
]
