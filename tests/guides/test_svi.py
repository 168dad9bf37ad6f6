"""Plain SVI trains every part of a pair: nothing is hidden from Pyro's parameter capture."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn

import riemvae as rv

D, LATENT = 12, 2


def vanilla(model, encoder, metric):
    return rv.guides.GaussianGuide(model, encoder)


def hamiltonian(model, encoder, metric):
    return rv.guides.HamiltonianGuide(model, encoder)


def riemannian(model, encoder, metric):
    return rv.guides.RiemannianHamiltonianGuide(
        model, encoder, metric, learn_step_size=True, learn_tempering=True
    )


def stacked(model, encoder, metric):
    return rv.guides.RiemannianHamiltonianGuide(model, rv.guides.HamiltonianGuide(model, encoder), metric)


@pytest.mark.parametrize("make", [vanilla, hamiltonian, riemannian, stacked])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "learned"])
def test_svi_moves_every_parameter(make, likelihood):
    torch.manual_seed(0)
    brick = rv.likelihoods.Gaussian(scale="learned") if likelihood == "learned" else likelihood
    model = rv.VAE(rv.networks.MLPDecoder(LATENT, (D,), hidden=(6,)), LATENT, likelihood=brick)
    encoder = rv.networks.MLPEncoder((D,), LATENT, hidden=(6,))
    metric = rv.networks.CentroidMetricNetwork(rv.networks.MLPMetric((D,), LATENT, hidden=(6,)))
    guide = make(model, encoder, metric)
    parts = nn.ModuleList([model, guide])
    x = (torch.rand(20, D) < 0.4).float()
    svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    before = {name: p.detach().clone() for name, p in parts.named_parameters()}
    for _ in range(2):
        svi.step(x)
    still = [name for name, p in parts.named_parameters() if torch.equal(p, before[name])]
    assert still == []
    assert len(before) >= 8


def test_the_model_takes_what_the_flow_decoded():
    """``K + 1`` gradients decode ``K + 1`` times; the model's own evaluation at the end adds none."""
    torch.manual_seed(0)
    calls = []

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(LATENT, D)

        def forward(self, z):
            calls.append(len(z))
            return self.layer(z)

    model = rv.VAE(Decoder(), LATENT)
    guide = rv.guides.HamiltonianGuide(model, rv.networks.MLPEncoder((D,), LATENT, hidden=(6,)), num_steps=3)
    x = (torch.rand(5, D) < 0.4).float()
    elbo = Trace_ELBO()
    elbo.differentiable_loss(model, guide, x)  # looks at the model's structure first
    calls.clear()
    elbo.differentiable_loss(model, guide, x)
    assert calls == [5] * 4


def test_what_was_decoded_is_not_taken_after_the_weights_changed():
    torch.manual_seed(0)
    model = rv.VAE(nn.Linear(LATENT, D), LATENT)
    guide = rv.guides.HamiltonianGuide(model, rv.networks.MLPEncoder((D,), LATENT, hidden=(6,)))
    x = (torch.rand(5, D) < 0.4).float()
    guide_trace = pyro.poutine.trace(guide).get_trace(x)
    with torch.no_grad():
        model.decoder.weight.mul_(3.0)
    replayed = pyro.poutine.trace(pyro.poutine.replay(model, guide_trace)).get_trace(x)
    z = guide_trace.nodes["z"]["value"]
    expected = model.likelihood(model.decode(z), 1).log_prob(x)
    torch.testing.assert_close(replayed.nodes["x"]["fn"].log_prob(x), expected)


def test_a_stacked_guide_encodes_again_only_for_a_learned_metric():
    torch.manual_seed(0)
    calls = []

    class Encoder(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return x[:, :LATENT], torch.ones(len(x), LATENT)

    model = rv.VAE(nn.Linear(LATENT, D), LATENT)
    base = rv.guides.HamiltonianGuide(model, Encoder())
    network = rv.networks.CentroidMetricNetwork(rv.networks.MLPMetric((D,), LATENT, hidden=(6,)))
    x = (torch.rand(5, D) < 0.4).float()
    counts = {}
    for name, metric in (("given", rv.geometry.ConstantMetric(torch.eye(LATENT))), ("learned", network)):
        guide = rv.guides.RiemannianHamiltonianGuide(model, base, metric)
        calls.clear()
        guide(x)
        counts[name] = len(calls)
    assert counts == {"given": 1, "learned": 2}
