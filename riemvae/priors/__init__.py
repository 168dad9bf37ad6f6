"""Priors: modules that return distributions of the latent."""

from riemvae.priors.conditional import ClassConditional, ConditionalNormal
from riemvae.priors.fixed import FixedPrior
from riemvae.priors.flow import FlowPrior
from riemvae.priors.hierarchical import GlobalGuide, HierarchicalNormal
from riemvae.priors.riemannian import InverseVolumePrior, RiemannianUniformPrior, WrappedNormalPrior
from riemvae.priors.standard import StandardNormal
from riemvae.priors.vamp import VampPrior

__all__ = [
    "ClassConditional",
    "ConditionalNormal",
    "FixedPrior",
    "FlowPrior",
    "GlobalGuide",
    "HierarchicalNormal",
    "InverseVolumePrior",
    "RiemannianUniformPrior",
    "StandardNormal",
    "VampPrior",
    "WrappedNormalPrior",
]
