"""Amortised guides: thin wrappers over the distributions, for any Pyro model with a latent."""

from riemvae.guides.amortized import AmortizedGuide
from riemvae.guides.evaluation import evaluating
from riemvae.guides.flow import FlowGuide
from riemvae.guides.gaussian import GaussianGuide
from riemvae.guides.hamiltonian import HamiltonianGuide, RiemannianHamiltonianGuide
from riemvae.guides.refined import RefinedGuide

__all__ = [
    "AmortizedGuide",
    "FlowGuide",
    "GaussianGuide",
    "HamiltonianGuide",
    "RefinedGuide",
    "RiemannianHamiltonianGuide",
    "evaluating",
]
