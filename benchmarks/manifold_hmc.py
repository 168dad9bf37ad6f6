"""One transition of Hamiltonian Monte Carlo along the learned geometry, against the peer's sampler."""

from __future__ import annotations

import torch
from measure import Result, alternate, compared
from models import REGULARIZATION, TEMPERATURE, centroid_cloud, peer_model, set_peer_metric
from pythae.samplers import RHVAESampler, RHVAESamplerConfig

import riemvae as rv

TITLE = "manifold HMC, one transition of 100 chains, 15 leapfrog steps"
CASES = ((180, 2, 10.0), (2000, 10, 120.0))
CHAINS, LEAPFROG, STEP_SIZE = 100, 15, 0.03


def run(quick: bool) -> Result:
    rounds = 3 if quick else 15
    rows = []
    for count, d, target in CASES:
        torch.manual_seed(0)
        centroids, factors = centroid_cloud(count, d)
        metric = rv.geometry.CentroidMetric(centroids, factors, TEMPERATURE, REGULARIZATION)
        density = rv.distributions.InverseVolume(metric)
        kernel = rv.sampling.HMC(
            density.log_density_and_gradient, STEP_SIZE, LEAPFROG, gradient=density.log_density_gradient
        )
        state = kernel.init(centroids[torch.randint(count, (CHAINS,))])
        model = peer_model("rhvae", latent_dim=d)
        set_peer_metric(model, centroids, factors)
        options = RHVAESamplerConfig(mcmc_steps_nbr=1, n_lf=LEAPFROG, eps_lf=STEP_SIZE)
        sampler = RHVAESampler(model, options)

        with torch.no_grad():
            timings = alternate(
                {
                    "ours": lambda: kernel(state),  # noqa: B023 - called before the next case
                    "peer": lambda: sampler.hmc_sampling(CHAINS),  # noqa: B023
                },
                rounds,
            )
        rows.append(compared(f"N = {count}, d = {d}", timings["ours"], timings["peer"], target))
    method = (
        "riemvae.sampling.HMC on InverseVolume with its closed-form gradient, against "
        f"RHVAESampler.hmc_sampling with one transition; the same centroids and matrices, {CHAINS} "
        f"chains, step size {STEP_SIZE}."
    )
    return Result(TITLE, method, rows, ("ours, ms", "peer, ms"))
