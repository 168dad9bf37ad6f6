"""Distributions over latent spaces and transforms between them, all of them Pyro's kind."""

from riemvae.distributions import transforms
from riemvae.distributions.hamiltonian import HamiltonianPosterior, PhaseSpace
from riemvae.distributions.momentum import MomentumNormal

__all__ = ["HamiltonianPosterior", "MomentumNormal", "PhaseSpace", "transforms"]
