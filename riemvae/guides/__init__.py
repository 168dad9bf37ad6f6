"""Amortised guides: thin wrappers over the distributions, for any Pyro model with a latent."""

from riemvae.guides.amortized import AmortizedGuide
from riemvae.guides.evaluation import evaluating
from riemvae.guides.gaussian import GaussianGuide
from riemvae.guides.hamiltonian import HamiltonianGuide, RiemannianHamiltonianGuide

__all__ = ["AmortizedGuide", "GaussianGuide", "HamiltonianGuide", "RiemannianHamiltonianGuide", "evaluating"]
