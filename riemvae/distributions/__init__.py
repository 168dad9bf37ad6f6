"""Distributions over latent spaces and transforms between them, all of them Pyro's kind."""

from riemvae.distributions import transforms
from riemvae.distributions.ball import Ball, ToBall
from riemvae.distributions.check import DistributionCheck, check_distribution
from riemvae.distributions.diagonal_mixture import DiagonalMixture
from riemvae.distributions.flow import FlowDistribution
from riemvae.distributions.gaussian_process import GaussianProcess
from riemvae.distributions.hamiltonian import HamiltonianPosterior, PhaseSpace
from riemvae.distributions.horseshoe import Horseshoe
from riemvae.distributions.implicit_mixture import ImplicitMixture
from riemvae.distributions.inverse_volume import InverseVolume
from riemvae.distributions.momentum import MomentumNormal
from riemvae.distributions.riemannian_normal import RiemannianNormal
from riemvae.distributions.riemannian_uniform import RiemannianUniform
from riemvae.distributions.spherical import HypersphericalUniform, VonMisesFisher
from riemvae.distributions.spike_and_slab import SpikeAndSlab
from riemvae.distributions.wrapped_normal import WrappedNormal

__all__ = [
    "Ball",
    "DiagonalMixture",
    "DistributionCheck",
    "FlowDistribution",
    "GaussianProcess",
    "HamiltonianPosterior",
    "Horseshoe",
    "HypersphericalUniform",
    "ImplicitMixture",
    "InverseVolume",
    "MomentumNormal",
    "PhaseSpace",
    "RiemannianNormal",
    "RiemannianUniform",
    "SpikeAndSlab",
    "ToBall",
    "VonMisesFisher",
    "WrappedNormal",
    "check_distribution",
    "transforms",
]
