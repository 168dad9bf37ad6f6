"""Priors: modules that return distributions of the latent."""

from riemvae.priors.conditional import ClassConditional, ConditionalNormal
from riemvae.priors.constrained import DirichletPrior, GammaPrior, LogNormalPrior
from riemvae.priors.fixed import FixedPrior
from riemvae.priors.flow import FlowPrior
from riemvae.priors.full_covariance import FullCovarianceNormal
from riemvae.priors.gaussian_process import GaussianProcessPrior
from riemvae.priors.hierarchical import GlobalGuide, HierarchicalNormal
from riemvae.priors.mixture import MixturePrior
from riemvae.priors.riemannian import InverseVolumePrior, RiemannianUniformPrior, WrappedNormalPrior
from riemvae.priors.sparse import HorseshoePrior, SpikeAndSlabPrior
from riemvae.priors.standard import StandardNormal
from riemvae.priors.student import StudentTPrior
from riemvae.priors.vamp import VampPrior

__all__ = [
    "ClassConditional",
    "ConditionalNormal",
    "DirichletPrior",
    "FixedPrior",
    "FlowPrior",
    "FullCovarianceNormal",
    "GammaPrior",
    "GaussianProcessPrior",
    "GlobalGuide",
    "HierarchicalNormal",
    "HorseshoePrior",
    "InverseVolumePrior",
    "LogNormalPrior",
    "MixturePrior",
    "RiemannianUniformPrior",
    "SpikeAndSlabPrior",
    "StandardNormal",
    "StudentTPrior",
    "VampPrior",
    "WrappedNormalPrior",
]
