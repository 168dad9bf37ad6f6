"""``E[ŵ] = p(x)`` by quadrature over all that a guide draws: no Monte Carlo error hides a wrong factor."""

from __future__ import annotations

import math

import oracles
import pyro.distributions as dist
import pytest
import torch
from oracles import GUIDES, Nonlinear, gauss_hermite, make_guide, noise_sites, traced_weights

import riemvae as rv
from riemvae.distributions import HamiltonianPosterior, MomentumNormal
from riemvae.guides.evaluation import evaluating

# Nodes an axis: as many as the error of 1e-6 (d = 1) and 1e-4 (d = 2) needs with the widest guide.
NODES = {1: 48, 2: 48, 3: 34, 4: 14}


def expectation(name, d, tempering, model_kind="vae", num_steps=3):
    case = Nonlinear(d)
    model = case.vae() if model_kind == "vae" else case.model
    guide = make_guide(name, model, case.encoder, d, tempering, num_steps=num_steps if d == 1 else 2)
    sites = noise_sites(name)
    grid, weight = gauss_hermite(NODES[d * len(sites)], d * len(sites))
    noise = dict(zip(sites, grid.split(d, -1)))
    with torch.no_grad(), evaluating(1e-10):
        log_weights, guide_trace, _ = traced_weights(model, guide, case.x.expand(len(grid), -1), noise)
    return case.evidence(), log_weights, weight, guide_trace


CASES = [(name, 1, tempering) for name in GUIDES for tempering in (1.0, 0.6)]
CASES += [(name, 2, tempering) for name in GUIDES[:4] for tempering in (1.0, 0.6)]


@pytest.mark.parametrize(("name", "d", "tempering"), CASES)
def test_the_mean_weight_is_the_evidence(name, d, tempering):
    exact, log_weights, weight, _ = expectation(name, d, tempering)
    tolerance = 1e-5 if d == 1 else 1e-3
    assert float((weight * log_weights.exp()).sum()) == pytest.approx(exact, rel=tolerance)
    if name != "gaussian" and tempering < 1.0:
        # The factor that a published formula keeps, (d/2) log β_0 in log ŵ, would be seen.
        biased = float((weight * (log_weights + d * math.log(tempering)).exp()).sum())
        assert abs(biased / exact - 1.0) > 100 * tolerance


@pytest.mark.parametrize("model_kind", ["vae", "function"])
def test_the_potential_of_a_function_and_of_a_vae_give_the_same_weights(model_kind):
    exact, log_weights, weight, _ = expectation("riemannian user", 1, 0.6, model_kind)
    assert float((weight * log_weights.exp()).sum()) == pytest.approx(exact, rel=1e-5)


def test_other_mistakes_would_be_seen():
    exact, log_weights, weight, trace = expectation("riemannian centroid", 1, 0.6)
    # The momentum's density left out of the weight.
    momentum, final = trace.nodes["z_momentum"], trace.nodes["z_flow"]
    initial = momentum["fn"].log_prob(momentum["value"])
    without = log_weights + initial + final["fn"].log_prob(final["value"])
    assert abs(float((weight * without.exp()).nan_to_num(0.0).sum()) / exact - 1.0) > 1e-2
    # The momentum drawn from N(0, I) and weighed as if from N(0, G).
    case = Nonlinear(1)
    guide = make_guide("riemannian centroid", case.vae(), case.encoder, 1, 0.6)
    grid, weight = gauss_hermite(48, 2)
    with torch.no_grad(), evaluating(1e-10):
        draw = case.encoder(case.x)
        z_0 = draw[0] + draw[1] * grid[:, :1]
        noise = guide.metric.at(z_0).inverse[..., 0].sqrt() * grid[:, 1:]  # becomes γ = grid[:, 1:]
        wrong, _, _ = traced_weights(
            case.vae(), guide, case.x.expand(len(grid), -1), {"z_0": grid[:, :1], "z_momentum": noise}
        )
    assert abs(float((weight * wrong.exp()).sum()) / exact - 1.0) > 1e-2


def test_an_explicit_position_step_would_be_seen():
    """With one iteration the position step is explicit: volume is not kept, and the mean weight is off."""
    case = Nonlinear(1)
    guide = rv.guides.RiemannianHamiltonianGuide(
        case.vae(),
        case.encoder,
        oracles.centroid_metric(1),
        tempering=0.6,
        step_size=0.1,
        fixed_point_steps=1,
    )
    grid, weight = gauss_hermite(48, 2)
    noise = {"z_0": grid[:, :1], "z_momentum": grid[:, 1:]}
    x = case.x.expand(len(grid), -1)
    with torch.no_grad():
        explicit, _, _ = traced_weights(case.vae(), guide, x, noise)
        with evaluating(1e-10):
            implicit, _, _ = traced_weights(case.vae(), guide, x, noise)
    assert abs(float((weight * explicit.exp()).sum()) / case.evidence() - 1.0) > 1e-3
    assert float((weight * implicit.exp()).sum()) == pytest.approx(case.evidence(), rel=1e-5)


@pytest.mark.parametrize("tempering", [1.0, 0.6])
@pytest.mark.parametrize("metric", [None, "centroid", "user"])
def test_the_posterior_distribution_alone_gives_the_evidence(metric, tempering):
    """``HamiltonianPosterior`` without any guide: draws at the nodes, its own ``log_prob``."""
    case = Nonlinear(1)
    loc, scale = case.encoder(case.x)
    geometry = None if metric is None else oracles.METRICS[metric](1)

    def potential(z):
        prior = dist.Normal(0.0, 1.0, validate_args=False).log_prob(z).sum(-1)
        likelihood = dist.Normal(case.decoder(z), case.scale, validate_args=False)
        return -prior - likelihood.log_prob(case.x).sum(-1)

    options = {"step_size": 0.05, "num_steps": 3, "tempering": tempering, "tolerance": 1e-11}
    position = dist.Normal(loc[0], scale[0]).to_event(1)
    q = HamiltonianPosterior(position, potential, geometry, **options)
    grid, weight = gauss_hermite(48, 2)
    z_0 = loc + scale * grid[:, :1]
    with torch.no_grad():
        v = MomentumNormal(q.base_dist.metric, z_0).local.momentum(grid[:, 1:])
        end = q.flow(torch.cat([z_0, v], -1))
        z, v = end.chunk(2, -1)
        log_q = q.log_prob(end.clone())  # a clone: nothing is cached, the flow is inverted
        log_weights = -potential(z) + MomentumNormal(q.base_dist.metric, z).log_prob(v) - log_q
    assert float(weight[~torch.isfinite(log_weights)].sum()) < 1e-8  # nodes far out
    mean = (weight * log_weights.exp()).nan_to_num(0.0).sum()
    assert float(mean) == pytest.approx(case.evidence(), rel=1e-5)


@pytest.mark.parametrize("tempering", [1.0, 0.6])
@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("prior", ["lognormal", "beta"])
def test_a_prior_on_a_constrained_support_is_exact(prior, name, tempering):
    """The encoder works in unconstrained coordinates; the Jacobian belongs in the weight."""
    import pyro

    x = torch.tensor([[0.7, 0.4]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    if prior == "lognormal":
        law, axis = dist.LogNormal(0.0 * one, 0.6 * one), torch.linspace(-7, 7, 4001).double().exp()
    else:
        law, axis = dist.Beta(2.0 * one, 3.0 * one), torch.linspace(0, 1, 20001).double()[1:-1]

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", law.to_event(1))
            loc = torch.cat([z.log1p(), z / (1.0 + z)], -1)
            pyro.sample("x", dist.Normal(loc, 0.6).to_event(1), obs=x)

    joint = law.log_prob(axis[:, None]).sum(-1) + dist.Normal(
        torch.stack([axis.log1p(), axis / (1.0 + axis)], -1), 0.6
    ).log_prob(x).sum(-1)
    exact = float(torch.trapezoid(joint.exp(), axis))

    def encoder(x):
        return torch.full((len(x), 1), -0.2).double(), torch.full((len(x), 1), 0.9).double()

    guide = make_guide(name, model, encoder, 1, tempering, num_steps=2, step_size=0.08)
    sites = {
        "gaussian": ["z_unconstrained"],
        "hamiltonian on gaussian": ["z_unconstrained_0", "z_momentum"],
        "riemannian on gaussian": ["z_unconstrained_0", "z_momentum"],
    }.get(name, noise_sites(name))
    grid, weight = gauss_hermite({1: 64, 2: 64, 3: 36}[len(sites)], len(sites))
    noise = dict(zip(sites, grid.split(1, -1)))
    with torch.no_grad(), evaluating(1e-10):
        log_weights, _, _ = traced_weights(model, guide, x.expand(len(grid), -1), noise)
    # Nodes far out, where a fixed point does not converge, have next to no mass.
    assert float(weight[~torch.isfinite(log_weights)].sum()) < 1e-7
    assert float((weight * log_weights.exp()).sum()) == pytest.approx(exact, rel=1e-4)
