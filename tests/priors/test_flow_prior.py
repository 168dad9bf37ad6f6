"""Flows as priors."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from flow_cases import FLOWS, make_flow
from oracles import Nonlinear
from torch import nn

import riemvae as rv
from riemvae.flows import MAF, RealNVP
from riemvae.guides import GaussianGuide, HamiltonianGuide, RiemannianHamiltonianGuide
from riemvae.priors.flow import FlowPrior


def case(name, context=0):
    """A VAE with a curved decoder and a flow prior, in double precision."""
    oracle = Nonlinear(1 if context == 0 else 2)
    prior = FlowPrior(make_flow(name, oracle.d, context, scale=0.3))
    return oracle, rv.VAE(
        oracle.decoder, oracle.d, prior=prior, likelihood=rv.likelihoods.Gaussian(oracle.scale)
    )


def evidence(oracle, vae, y=None):
    """``∫ p(x|z) p(z) dz`` by the trapezium rule."""
    axis = torch.linspace(-12, 12, 3001 if oracle.d == 1 else 241, dtype=torch.float64)
    z = torch.cartesian_prod(*[axis] * oracle.d).reshape(-1, oracle.d)
    with torch.no_grad():
        log_joint = vae.prior(y).log_prob(z)
        log_joint = log_joint + vae.likelihood.log_prob(vae.decode(z), oracle.x, 1)
    return math.log(float(log_joint.exp().sum()) * float(axis[1] - axis[0]) ** oracle.d)


@pytest.mark.parametrize("name", FLOWS)
def test_the_likelihood_is_that_of_quadrature(name):
    oracle, vae = case(name)
    guide = GaussianGuide(vae, lambda x: (0.0 * x[:, :1], 1.6 + 0.0 * x[:, :1]))
    found = rv.log_likelihood(vae, guide, oracle.x, num_samples=4000, seed=0)
    # 4.5 standard errors, and 1e-3 for the quadrature over kinks
    assert abs(float(found.log_prob) - evidence(oracle, vae)) < 4.5 * float(found.mcse) + 1e-3


@pytest.mark.parametrize("name", ["maf", "realnvp", "planar"])
def test_a_hamiltonian_guide_follows_a_flow_prior(name):
    oracle, vae = case(name)
    encoder = lambda x: (0.0 * x[:, :1], 1.6 + 0.0 * x[:, :1])  # noqa: E731
    guide = HamiltonianGuide(vae, encoder, step_size=0.1, num_steps=2, tempering=0.7)
    found = rv.log_likelihood(vae, guide, oracle.x, num_samples=2000, seed=0)
    assert abs(float(found.log_prob) - evidence(oracle, vae)) < 4.5 * float(found.mcse) + 1e-3
    loss = pyro.infer.Trace_ELBO().differentiable_loss(vae, guide, oracle.x)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.prior.parameters())


@pytest.mark.parametrize("name", FLOWS)
def test_a_conditional_flow_is_a_prior_given_y(name):
    oracle, vae = case(name, context=1)
    y = torch.tensor([[0.8]], dtype=torch.float64)
    guide = GaussianGuide(vae, lambda x: (0.0 * x[:, :2], 1.6 + 0.0 * x[:, :2]))
    found = rv.log_likelihood(vae, guide, (oracle.x, y), num_samples=4000, seed=0)
    exact = evidence(oracle, vae, y[0])
    assert abs(float(found.log_prob) - exact) < 4.5 * float(found.mcse) + 3e-3
    assert abs(evidence(oracle, vae, -3.0 * y[0]) - exact) > 1e-3  # y matters
    assert vae(y=y.expand(4, 1)).shape == (4, 3)


def test_it_trains_with_svi_and_a_riemannian_guide_and_generates():
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    vae = rv.VAE(
        rv.networks.MLPDecoder(2, 3, hidden=(8,)), 2, prior=FlowPrior(RealNVP(2)), likelihood="gaussian"
    )
    network = rv.networks.CentroidMetricNetwork(rv.networks.MLPMetric(3, 2, hidden=(5,)))
    guide = RiemannianHamiltonianGuide(vae, rv.networks.MLPEncoder(3, 2, hidden=(8,)), network)
    before = {k: v.clone() for k, v in vae.prior.state_dict().items()}
    svi = pyro.infer.SVI(vae, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    for _ in range(3):
        assert math.isfinite(svi.step(x))
    after = vae.prior.state_dict()
    assert all(not torch.equal(after[k], v) for k, v in before.items() if v.is_floating_point())
    assert vae(size=6).shape == (6, 3)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"pass the flow itself, not flow\(\)"):
        FlowPrior(MAF(2)())
    with pytest.raises(ValueError, match="prior: expected a distribution with event shape"):
        rv.VAE(nn.Linear(2, 3), 2, prior=FlowPrior(MAF(3)))(size=2)
    with pytest.raises(ValueError, match="context"):
        rv.VAE(nn.Linear(2, 3), 2, prior=FlowPrior(MAF(2, 1)))(size=2)
