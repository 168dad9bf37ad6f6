"""A mixture prior, whose support Pyro's bijections do not know, against its exact marginal."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import riemvae as rv

S, DIM, LATENT = 4000, 5, 2


def gaussian(model, encoder):
    return rv.guides.GaussianGuide(model, encoder)


def hamiltonian(model, encoder):
    return rv.guides.HamiltonianGuide(model, encoder, step_size=0.05, tempering=1.0)


def riemannian(model, encoder):
    metric = rv.geometry.ConstantMetric(torch.tensor([[2.0, 0.3], [0.3, 1.0]]))
    return rv.guides.RiemannianHamiltonianGuide(model, encoder, metric, step_size=0.05, tempering=1.0)


@pytest.mark.parametrize("make", [gaussian, hamiltonian, riemannian])
def test_a_mixture_prior_gives_the_exact_marginal(make):
    torch.manual_seed(0)
    decoder = nn.Linear(LATENT, DIM)
    weights, means = torch.tensor([0.3, 0.7]), torch.tensor([[-1.0, 0.5], [1.0, 0.0]])
    components = dist.Normal(means, 0.5).to_event(1)
    prior = dist.MixtureSameFamily(dist.Categorical(weights), components)
    model = rv.VAE(decoder, LATENT, prior=prior, likelihood=rv.likelihoods.Gaussian(scale=0.5))
    with torch.no_grad():
        x = model(size=6)
        covariance = 0.25 * decoder.weight @ decoder.weight.T + 0.25 * torch.eye(DIM)
        marginals = dist.MultivariateNormal(decoder(means).unsqueeze(1), covariance).log_prob(x)
        exact = torch.logsumexp(weights.log()[:, None] + marginals, 0)

    def encoder(x):  # wide around the prior's own centre: both components are covered
        return torch.tensor([0.4, 0.15]).expand(len(x), 2), torch.tensor([1.2, 0.8]).expand(len(x), 2)

    ll = rv.log_likelihood(model, make(model, encoder), x, S, seed=0)
    assert (ll.khat < 0.7).all()
    assert ((ll.log_prob - exact).abs() < 4 * ll.mcse).all()


def test_a_mixture_on_the_positive_half_line_is_drawn_there():
    torch.manual_seed(0)
    components = dist.LogNormal(torch.zeros(3, LATENT), 0.5).to_event(1)
    prior = dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), components)
    model = rv.VAE(nn.Linear(LATENT, DIM), LATENT, prior=prior, likelihood="gaussian")
    guide = rv.guides.HamiltonianGuide(model, rv.networks.MLPEncoder((DIM,), LATENT, hidden=(8,)))
    x = torch.randn(10, DIM)
    assert (guide(x)["z"] > 0).all()
    assert torch.isfinite(torch.tensor(rv.ELBO().loss(model, guide, x)))
