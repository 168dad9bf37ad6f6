"""Metrics, manifolds, geodesics, Hamiltonian integrators: the geometry of a latent space on plain tensors."""

from riemvae.geometry.centroid import CentroidMetric
from riemvae.geometry.clustering import KMedoids, k_medoids
from riemvae.geometry.conformal import VolumeWeightedMetric
from riemvae.geometry.decoder_metric import PullbackMetric
from riemvae.geometry.exponential import ExponentialMap, exponential_map, exponential_map_and_jacobian
from riemvae.geometry.geodesics import Distances, Geodesic, distance, distance_matrix, geodesic
from riemvae.geometry.integrators import IntegratorInfo, generalized_leapfrog, inverse_temperatures, leapfrog
from riemvae.geometry.logarithm import LogMap, log_map
from riemvae.geometry.manifold import LatentManifold
from riemvae.geometry.means import KarcherMean, RiemannianKMeans, karcher_mean, riemannian_k_means
from riemvae.geometry.metric import ConstantMetric, EuclideanMetric, LocalMetric, Metric, inverse_and_log_det
from riemvae.geometry.posterior import PosteriorMetric
from riemvae.geometry.potential import DifferentiablePotential, Potential, value_and_gradient
from riemvae.geometry.transport import exponential_map_and_transport, parallel_transport

__all__ = [
    "CentroidMetric",
    "ConstantMetric",
    "DifferentiablePotential",
    "Distances",
    "EuclideanMetric",
    "ExponentialMap",
    "Geodesic",
    "IntegratorInfo",
    "KMedoids",
    "KarcherMean",
    "LatentManifold",
    "LocalMetric",
    "LogMap",
    "Metric",
    "PosteriorMetric",
    "Potential",
    "PullbackMetric",
    "RiemannianKMeans",
    "VolumeWeightedMetric",
    "distance",
    "distance_matrix",
    "exponential_map",
    "exponential_map_and_jacobian",
    "exponential_map_and_transport",
    "generalized_leapfrog",
    "geodesic",
    "inverse_and_log_det",
    "inverse_temperatures",
    "k_medoids",
    "karcher_mean",
    "leapfrog",
    "log_map",
    "parallel_transport",
    "riemannian_k_means",
    "value_and_gradient",
]
