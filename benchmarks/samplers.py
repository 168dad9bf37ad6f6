"""Effective draws a second of every kernel on one target, the peer's sampler beside; and uniform sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import Result, Row, bounded, clock
from models import REGULARIZATION, TEMPERATURE, centroid_cloud, peer_model, set_peer_metric
from pythae.samplers import RHVAESampler, RHVAESamplerConfig
from torch import Tensor

import riemvae as rv
from riemvae.geometry.posterior import PosteriorMetric
from riemvae.sampling.diagnostics import effective_sample_size, split_rhat
from riemvae.sampling.random_walk import HeuristicRandomWalk, RiemannianRandomWalk
from riemvae.sampling.riemannian_hmc import RiemannianHMC
from riemvae.sampling.samplers import UniformSampler

TITLE = "effective draws a second on one target"
CASES = ((180, 2), (180, 10))
CHAINS, LEAPFROG, STEP_SIZE = 100, 15, 0.03
UNIFORM_SECONDS = 5.0


def run(quick: bool) -> Result:
    draws, warmup = (20, 10) if quick else (300, 150)
    rows = []
    for count, d in CASES:
        torch.manual_seed(0)
        centroids, factors = centroid_cloud(count, d)
        metric = rv.geometry.CentroidMetric(centroids, factors, TEMPERATURE, REGULARIZATION)
        start = centroids[torch.randint(count, (CHAINS,))]
        for name, (kernel, adapt) in _kernels(metric, d).items():
            state = kernel.init(start)
            if adapt:
                kernel, state = rv.sampling.warm_up(kernel, state, warmup)
            else:
                state = rv.sampling.run_chains(kernel, state, 1, thin=warmup).state
            begin = clock()
            result = rv.sampling.run_chains(kernel, state, draws)
            seconds = clock() - begin
            figures = {"acceptance": float(result.acceptance.mean()), "step": float(result.step_size)}
            rows.append(_row(f"{name}, d = {d}", result.samples, seconds, figures))
        rows.append(_peer(centroids, factors, draws, warmup))
    rows.append(_uniform(quick))
    method = (
        f"{CHAINS} chains from random centroids (N = 180), {warmup} transitions of warm-up, {draws} draws "
        "timed; the target is the inverse volume element; the smallest bulk effective size of a coordinate. "
        f"'thesis' is {LEAPFROG} leapfrog steps of {STEP_SIZE}; the others adapt their step in the warm-up. "
        "R-hat far above 1.01 says that the chains have not mixed, and their effective size is then next to "
        "meaningless. The heuristic does not sample this target; the peer has no ball, and a force that is "
        "not the gradient, which its acceptance corrects. Uniform: N = 1000 posteriors, d = 16, 1000 chains "
        "of 100 steps of 10 leapfrogs."
    )
    return Result(TITLE, method, rows, ("effective", "seconds", "acceptance", "r_hat"))


def _kernels(metric: rv.geometry.Metric, d: int) -> dict[str, tuple[Any, bool]]:
    """Each kernel, and whether its step is adapted."""
    density = rv.distributions.InverseVolume(metric)
    both, gradient = density.log_density_and_gradient, density.log_density_gradient
    return {
        "HMC, thesis": (rv.sampling.HMC(both, STEP_SIZE, LEAPFROG, gradient=gradient), False),
        "HMC": (rv.sampling.HMC(both, STEP_SIZE, LEAPFROG, jitter=0.1, gradient=gradient), True),
        "Riemannian HMC": (RiemannianHMC(both, metric, 0.1, 5, jitter=0.1), True),
        "exact walk": (RiemannianRandomWalk(density, metric, 1.0), True),
        "exact walk, fixed Σ": (RiemannianRandomWalk(density, metric, 0.5, torch.eye(d)), True),
        "algorithm 3 (heuristic)": (HeuristicRandomWalk(metric, 0.5, radius=density.radius), True),
    }


def _row(name: str, samples: Tensor, seconds: float, figures: dict[str, Any]) -> Row:
    size = float(effective_sample_size(samples).min())
    values = {"effective": size, "seconds": seconds, "r_hat": float(split_rhat(samples).max()), **figures}
    values["effective a second"] = size / seconds
    return Row(name, values, f"{size / seconds:,.0f}/s")


def _peer(centroids: Tensor, factors: Tensor, draws: int, warmup: int) -> Row:
    """The peer's own chain; it returns the ends only, so its density is listened to."""
    model = peer_model("rhvae", latent_dim=centroids.shape[-1])
    set_peer_metric(model, centroids, factors)
    options = RHVAESamplerConfig(mcmc_steps_nbr=warmup + draws + 1, n_lf=LEAPFROG, eps_lf=STEP_SIZE)
    sampler = RHVAESampler(model, options)
    visited: list[Tensor] = []
    sampler.log_pi = _listening(sampler.log_pi, visited)
    begin = clock()
    sampler.hmc_sampling(CHAINS)
    seconds = (clock() - begin) * draws / (warmup + draws + 1)
    # It evaluates the density where a transition starts, then where it would end.
    chain = torch.stack(visited[::2])[warmup + 1 :]
    acceptance = float((chain[1:] != chain[:-1]).any(-1).double().mean())
    figures = {"acceptance": acceptance, "step": STEP_SIZE}
    return _row(f"peer, thesis, d = {centroids.shape[-1]}", chain, seconds, figures)


def _listening(log_density: Callable[..., Tensor], visited: list[Tensor]) -> Callable[..., Tensor]:
    def heard(z: Tensor, model: Any) -> Tensor:
        visited.append(z.clone())
        return log_density(z, model)

    return heard


def _uniform(quick: bool) -> Row:
    torch.manual_seed(0)
    count, d, chains = 1000, 16, 1000
    metric = PosteriorMetric(torch.randn(count, d), 0.2 + 0.3 * torch.rand(count, d), decay=1e-3)
    sampler = UniformSampler(metric, num_steps=2 if quick else 100)
    sampler.sample(10)
    begin = clock()
    sampler.sample(chains)
    seconds = clock() - begin
    values = {"seconds": seconds, "acceptance": sampler.report.acceptance}
    return bounded("uniform sampler, N = 1000, d = 16", seconds, UNIFORM_SECONDS, " s", values)
