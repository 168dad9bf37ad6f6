"""Transition kernels, batched chains, and samplers of latent points.

A sampler has ``sample(n) -> z (n, d)``.
"""

from riemvae.sampling.adaptation import DualAveraging, DualAveragingState, reasonable_step_size, warm_up
from riemvae.sampling.chain_sampler import ChainSampler, SamplingReport
from riemvae.sampling.chains import ChainResult, run_chains, sample_chains
from riemvae.sampling.diagnostics import effective_sample_size, split_rhat, to_inference_data
from riemvae.sampling.far import (
    Estimate,
    RegularizationChoice,
    choose_regularization,
    exact_far_share,
    far_share,
)
from riemvae.sampling.generation import PriorSampler, decode
from riemvae.sampling.kernel import HMC, ChainState, Kernel, TransitionInfo, log_density_of, with_gradient
from riemvae.sampling.manifold import ManifoldSampler
from riemvae.sampling.mcmc import BatchedMCMC
from riemvae.sampling.mixup import GeodesicMixup
from riemvae.sampling.random_walk import HeuristicRandomWalk, RiemannianRandomWalk
from riemvae.sampling.riemannian_hmc import RiemannianHMC
from riemvae.sampling.samplers import RandomWalkSampler, RiemannianHMCSampler, UniformSampler

__all__ = [
    "HMC",
    "BatchedMCMC",
    "ChainResult",
    "ChainSampler",
    "ChainState",
    "DualAveraging",
    "DualAveragingState",
    "Estimate",
    "GeodesicMixup",
    "HeuristicRandomWalk",
    "Kernel",
    "ManifoldSampler",
    "PriorSampler",
    "RandomWalkSampler",
    "RegularizationChoice",
    "RiemannianHMC",
    "RiemannianHMCSampler",
    "RiemannianRandomWalk",
    "SamplingReport",
    "TransitionInfo",
    "UniformSampler",
    "choose_regularization",
    "decode",
    "effective_sample_size",
    "exact_far_share",
    "far_share",
    "log_density_of",
    "reasonable_step_size",
    "run_chains",
    "sample_chains",
    "split_rhat",
    "to_inference_data",
    "warm_up",
    "with_gradient",
]
