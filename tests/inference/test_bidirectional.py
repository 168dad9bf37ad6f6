"""Bounds that sandwich the evidence of simulated data."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, make_guide

import riemvae as rv
from riemvae.inference.bidirectional import bidirectional_bounds
from riemvae.sampling.kernel import HMC, TransitionInfo

GUIDES = ("gaussian", "hamiltonian", "riemannian centroid")


def over_errors(values):
    """A mean over data in units of its standard error."""
    return float(values.mean() / (values.std() / math.sqrt(len(values))))


def crooks(bounds, exact):
    """``E_forward[min(ŵ/p, 1)] - E_backward[min(1, p/ŵ)]`` in standard errors: zero.

    The laws of a draw there and of one back differ by the factor ``ŵ/p``. That the means of ``ŵ/p`` and of
    ``p/ŵ`` are one are two consequences of it; this one has no tails.

    Source: Crooks (1999); Bennett (1976).
    """
    forward, backward = (bounds.lower - exact).exp(), (exact - bounds.upper).exp()
    return over_errors(forward.clamp_max(1.0) - backward.clamp_max(1.0))


@pytest.mark.parametrize("num_chains", [1, 4])
@pytest.mark.parametrize("method", ["ais", "importance"])
@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("d", [1, 6])
def test_the_bounds_bracket_the_evidence(d, name, method, num_chains):
    """Loose on purpose, so that both sides are away from the truth by more than their errors."""
    if method == "ais" and name != "gaussian":
        name = "hamiltonian"  # its start is the encoder's: once is enough
    case = LinearGaussian(d)
    guide = make_guide(name, case.vae(), lambda x: case.encoder(x, 1.5, 0.8), d, 0.7)
    bounds = bidirectional_bounds(
        guide.model,
        guide,
        800,
        method=method,
        num_chains=num_chains,
        num_temperatures=3,
        chunk_size=4000,
        seed=0,
    )
    exact = case.log_prob(bounds.x)
    assert over_errors(bounds.lower - exact) < -2.0
    assert over_errors(bounds.upper - exact) > 2.0
    if method == "importance" or num_chains == 1:  # chains that share their start follow another law
        assert abs(crooks(bounds, exact)) < 4.0


def test_long_schedules_close_the_gap():
    case = LinearGaussian(6)
    vae, gaps = case.vae(), []
    for temperatures in (5, 50):
        bounds = bidirectional_bounds(
            vae, None, 100, num_temperatures=temperatures, start="prior", num_chains=8, seed=0
        )
        exact = case.log_prob(bounds.x)
        assert over_errors(bounds.lower - exact) < 4 and over_errors(bounds.upper - exact) > -4
        gaps.append(bounds.mean_gap)
    assert gaps[0] > 4 * gaps[1] > 0 and gaps[1] < 0.5
    assert (bounds.lower_mcse > 0).all()
    summary = bounds.summary()
    assert summary["gap"] == pytest.approx(summary["upper"] - summary["lower"])
    assert "100 simulated data" in repr(bounds)


class NeverRejects:
    """HMC without the accept step."""

    def __init__(self, density, step_size):
        self.hmc = HMC(density, step_size, 3)

    def __call__(self, state):
        end, _ = self.hmc.trajectory(state, torch.randn_like(state.position))
        one = torch.ones_like(state.log_density)
        return end, TransitionInfo(one, one.bool(), ~one.bool(), 0 * one)


def test_backward_chains_are_forward_ones_reversed_and_a_planted_error_is_seen():
    """A kernel without its accept step, otherwise the same, is more than ten errors off."""
    case = LinearGaussian(2, scale=0.5)
    options = {"num_chains": 1, "num_temperatures": 8, "start": "prior", "adapt": False, "seed": 0}
    found = []
    for kernel in ("hmc", NeverRejects):
        bounds = bidirectional_bounds(
            case.vae(),
            None,
            4000,
            kernel=kernel,
            num_leapfrog=3,
            step_size=0.6,
            chunk_size=4000,
            **options,
        )
        found.append(crooks(bounds, case.log_prob(bounds.x)))
    assert abs(found[0]) < 4 and abs(found[1]) > 10


def test_a_users_function_with_a_global_latent_simulates_by_a_callable():
    """The bound is of ``p(x | μ)`` for the ``μ`` that was simulated; the latent is positive."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(mu, torch.ones(1, dtype=x.dtype)).to_event(1))
            pyro.sample("x", dist.LogNormal(z.log(), 0.5).to_event(1), obs=x)

    def simulate(n):
        mu = torch.tensor(0.3, dtype=torch.float64)
        z = (mu + torch.randn(n, 1, dtype=torch.float64)).exp()
        return z * (0.5 * torch.randn(n, 1, dtype=torch.float64)).exp(), {"z": z, "mu": mu}

    guide = rv.guides.GaussianGuide(model, lambda x: (0.7 * x.log(), 0.6 * torch.ones_like(x)))
    for method in ("ais", "importance"):
        for start in ("guide", "prior"):
            bounds = bidirectional_bounds(
                model,
                guide,
                1500,
                method=method,
                simulate=simulate,
                start=start,
                num_chains=1,
                num_temperatures=3,
                chunk_size=3000,
                seed=1,
            )
            exact = dist.LogNormal(0.3, math.sqrt(1.25)).log_prob(bounds.x)[:, 0]
            assert over_errors(bounds.lower - exact) < 3 and over_errors(bounds.upper - exact) > -3
            assert abs(crooks(bounds, exact)) < 4.0
            assert set(bounds.latents) == {"z", "mu"}


def test_seeds_repeat():
    vae = LinearGaussian(2).vae()
    options = {"start": "prior", "num_temperatures": 4, "num_chains": 2}
    state = torch.get_rng_state()
    a, b = (bidirectional_bounds(vae, None, 4, seed=3, **options) for _ in range(2))
    assert torch.equal(a.upper, b.upper) and torch.equal(a.x, b.x)
    assert torch.equal(state, torch.get_rng_state())


def test_refusals():
    case = LinearGaussian(2)
    vae = case.vae()
    with pytest.raises(ValueError, match="simulate"):
        bidirectional_bounds(case.model, None, 4, start="prior")
    with pytest.raises(ValueError, match="latent"):
        bidirectional_bounds(case.model, None, 4, start="prior", simulate=lambda n: (case.data(n), {}))
    with pytest.raises(ValueError, match="simulate"):
        bidirectional_bounds(
            case.model, None, 4, start="prior", simulate=lambda n: (case.data(n), {"z": torch.zeros(3, 2)})
        )
    with pytest.raises(ValueError, match="method"):
        bidirectional_bounds(vae, None, 4, method="iwae")
    nested = make_guide("hamiltonian on gaussian", vae, case.encoder, 2)
    with pytest.raises(ValueError, match="method='ais'"):
        bidirectional_bounds(vae, nested, 4, method="importance")
