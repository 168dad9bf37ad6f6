"""Metrics, manifolds, Hamiltonian integrators: the geometry of a latent space, on plain tensors."""

from riemvae.geometry.centroid import CentroidMetric
from riemvae.geometry.integrators import IntegratorInfo, generalized_leapfrog, inverse_temperatures, leapfrog
from riemvae.geometry.metric import ConstantMetric, EuclideanMetric, LocalMetric, Metric, inverse_and_log_det
from riemvae.geometry.potential import DifferentiablePotential, Potential, value_and_gradient

__all__ = [
    "CentroidMetric",
    "ConstantMetric",
    "DifferentiablePotential",
    "EuclideanMetric",
    "IntegratorInfo",
    "LocalMetric",
    "Metric",
    "Potential",
    "generalized_leapfrog",
    "inverse_and_log_det",
    "inverse_temperatures",
    "leapfrog",
    "value_and_gradient",
]
