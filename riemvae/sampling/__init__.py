"""Transition kernels, batched chains, and samplers of latent points.

A sampler has ``sample(n) -> z (n, d)``.
"""

from riemvae.sampling.adaptation import DualAveraging, DualAveragingState, reasonable_step_size, warm_up
from riemvae.sampling.chains import ChainResult, run_chains, sample_chains
from riemvae.sampling.generation import PriorSampler, decode
from riemvae.sampling.kernel import HMC, ChainState, TransitionInfo, with_gradient
from riemvae.sampling.manifold import (
    Estimate,
    ManifoldSampler,
    RegularizationChoice,
    SamplingReport,
    choose_regularization,
    exact_far_share,
    far_share,
)

__all__ = [
    "HMC",
    "ChainResult",
    "ChainState",
    "DualAveraging",
    "DualAveragingState",
    "Estimate",
    "ManifoldSampler",
    "PriorSampler",
    "RegularizationChoice",
    "SamplingReport",
    "TransitionInfo",
    "choose_regularization",
    "decode",
    "exact_far_share",
    "far_share",
    "reasonable_step_size",
    "run_chains",
    "sample_chains",
    "warm_up",
    "with_gradient",
]
