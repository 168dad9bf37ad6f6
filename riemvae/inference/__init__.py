"""Weights, bounds, training, likelihoods and their diagnostics."""

from riemvae.inference.bounds import ELBO, IWAE
from riemvae.inference.diagnostics import ActiveUnits, active_units
from riemvae.inference.fit import fit
from riemvae.inference.likelihood import LogLikelihood, log_likelihood
from riemvae.inference.pareto import pareto_shape
from riemvae.inference.weights import log_weights

__all__ = [
    "ELBO",
    "IWAE",
    "ActiveUnits",
    "LogLikelihood",
    "active_units",
    "fit",
    "log_likelihood",
    "log_weights",
    "pareto_shape",
]
