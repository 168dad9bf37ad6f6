"""Weights, bounds, training, likelihoods and their diagnostics."""

from riemvae.inference.annealed import AnnealedLogLikelihood, annealed_importance_sampling
from riemvae.inference.bidirectional import BidirectionalBounds, bidirectional_bounds
from riemvae.inference.bounds import CIWAE, ELBO, IWAE, MIWAE, PIWAE
from riemvae.inference.calibration import Calibration, simulation_based_calibration
from riemvae.inference.comparison import Comparison, compare
from riemvae.inference.diagnostics import ActiveUnits, active_units
from riemvae.inference.estimation import for_each_batch
from riemvae.inference.fit import fit
from riemvae.inference.inference_data import to_arviz
from riemvae.inference.likelihood import LogLikelihood, log_likelihood
from riemvae.inference.pareto import pareto_shape, pareto_smooth
from riemvae.inference.predictive import (
    PredictiveCheck,
    posterior_predictive,
    predictive_check,
    prior_predictive,
)
from riemvae.inference.schedules import Constant, Cyclical, Linear, Schedule, Sigmoid
from riemvae.inference.smc import SequentialLogLikelihood, sequential_monte_carlo
from riemvae.inference.weights import log_weights

__all__ = [
    "ActiveUnits",
    "AnnealedLogLikelihood",
    "BidirectionalBounds",
    "CIWAE",
    "Calibration",
    "Comparison",
    "Constant",
    "Cyclical",
    "ELBO",
    "IWAE",
    "Linear",
    "LogLikelihood",
    "MIWAE",
    "PIWAE",
    "PredictiveCheck",
    "Schedule",
    "SequentialLogLikelihood",
    "Sigmoid",
    "active_units",
    "annealed_importance_sampling",
    "bidirectional_bounds",
    "compare",
    "fit",
    "for_each_batch",
    "log_likelihood",
    "log_weights",
    "pareto_shape",
    "pareto_smooth",
    "posterior_predictive",
    "predictive_check",
    "prior_predictive",
    "sequential_monte_carlo",
    "simulation_based_calibration",
    "to_arviz",
]
