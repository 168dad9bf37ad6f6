"""Distributions over latent spaces and transforms between them, all of them Pyro's kind."""

from riemvae.distributions import transforms
from riemvae.distributions.hamiltonian import HamiltonianPosterior, PhaseSpace
from riemvae.distributions.inverse_volume import InverseVolume
from riemvae.distributions.momentum import MomentumNormal

__all__ = ["HamiltonianPosterior", "InverseVolume", "MomentumNormal", "PhaseSpace", "transforms"]
