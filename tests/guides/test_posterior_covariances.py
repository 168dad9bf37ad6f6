"""The Riemannian guide with the encoder's own covariances as metric: built, trained, frozen, saved, exact."""

from __future__ import annotations

import copy
import math

import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, Nonlinear, gauss_hermite, traced_weights
from torch import nn

import riemvae as rv
from riemvae.geometry import CentroidMetric
from riemvae.guides.evaluation import evaluating
from riemvae.networks.centroid import CentroidMetricNetwork, PosteriorCentroidNetwork


def guide_of(model, encoder, temperature=0.8, regularization=0.1, **options):
    options = {"num_steps": 2, "step_size": 0.1, "tempering": 0.6, **options}
    network = PosteriorCentroidNetwork(temperature, regularization)
    return rv.guides.RiemannianHamiltonianGuide(model, encoder, network, **options)


def test_the_metric_is_eq_1_7_with_posterior_covariances():
    torch.manual_seed(0)
    loc, std = torch.randn(5, 3).double(), 0.5 + torch.rand(5, 3).double()
    tril = torch.diag_embed(std) + 0.2 * torch.randn(5, 3, 3).double().tril(-1)
    z = torch.randn(4, 3).double()
    weight = torch.exp(-(z[:, None] - loc).square().sum(-1) / 0.49)
    eye = 0.01 * torch.eye(3).double()
    network = PosteriorCentroidNetwork(0.7, 0.01)
    for posterior, covariance in (
        (dist.Normal(loc, std), torch.diag_embed(std**2)),
        (dist.Normal(loc, std).to_event(1), torch.diag_embed(std**2)),
        (dist.MultivariateNormal(loc, scale_tril=tril), tril @ tril.mT),
    ):
        metric = network(None, posterior)
        assert isinstance(metric, CentroidMetric)
        torch.testing.assert_close(metric.inverse(z), torch.einsum("bn,nij->bij", weight, covariance) + eye)
    particles = network(None, dist.Normal(loc.expand(2, 5, 3), std.expand(2, 5, 3)).to_event(1))
    assert particles.centroids.shape == (10, 3)
    assert not list(network.parameters())


@pytest.mark.parametrize(("d", "tempering"), [(1, 1.0), (1, 0.6), (2, 0.6)])
def test_the_mean_weight_is_the_evidence(d, tempering):
    """``E[ŵ] = p(x)`` by quadrature over all that the guide draws, with the metric frozen from other data."""
    case = Nonlinear(d)

    def encoder(x):
        return 0.15 + 0.2 * x[:, :d], 0.9 + 0.05 * x[:, :d] ** 2

    guide = guide_of(case.vae(), encoder, 0.8, 0.2, step_size=0.04, tempering=tempering)
    torch.manual_seed(0)
    data = 2 * torch.randn(4, case.data_dim, dtype=torch.float64)
    metric = guide.freeze_metric(data)
    torch.testing.assert_close(metric.factors, torch.diag_embed(encoder(data)[1]))
    # It bends over the posterior: a flat metric would leave most of the weight untested.
    assert metric.at(torch.zeros(1, d).double()).log_volume_gradient.abs().max() > 1e-2
    grid, weight = gauss_hermite({1: 64, 2: 16}[d], 2 * d)
    noise = dict(zip(["z_0", "z_momentum"], grid.split(d, -1)))
    with torch.no_grad(), evaluating(1e-10):
        log_weights, _, _ = traced_weights(case.vae(), guide, case.x.expand(len(grid), -1), noise)
    # Nodes far out, where a fixed point does not converge, have next to no mass.
    assert float(weight[~torch.isfinite(log_weights)].sum()) < 1e-5
    mean = float((weight * log_weights.exp()).sum())
    assert mean == pytest.approx(case.evidence(), rel=1e-4 if d == 1 else 2e-3)
    if tempering < 1.0:  # the error of a published weight would be seen
        biased = float((weight * (log_weights + d * math.log(tempering)).exp()).sum())
        assert abs(biased / case.evidence() - 1) > 0.1


class Encoder(nn.Module):
    """A small trainable encoder."""

    def __init__(self, data_dim, d):
        super().__init__()
        self.loc, self.log_scale = nn.Linear(data_dim, d), nn.Linear(data_dim, d)

    def forward(self, x):
        return self.loc(x), self.log_scale(x).mul(0.1).exp()


def test_the_loss_s_gradient_reaches_the_encoder_through_the_metric():
    """Finite differences of the bound at fixed noise, with the metric built from the minibatch."""
    torch.manual_seed(0)
    case = LinearGaussian(2)
    encoder, model, x = Encoder(case.data_dim, 2).double(), case.vae(), case.data(4)
    guide = guide_of(model, encoder)
    noise = {"z_0": torch.randn(4, 2).double(), "z_momentum": torch.randn(4, 2).double()}

    def bound(guide):
        return traced_weights(model, guide, x, noise)[0].sum()

    gradients = torch.autograd.grad(bound(guide), list(encoder.parameters()))
    h = 1e-5
    for parameter, gradient in zip(encoder.parameters(), gradients):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[0] += sign * h
                values.append(float(bound(guide)))
                parameter.view(-1)[0] -= sign * h
        assert float(gradient.view(-1)[0]) == pytest.approx(
            (values[0] - values[1]) / (2 * h), rel=1e-5, abs=1e-7
        )
    # The same metric without a gradient to the encoder gives another one: the path through it counts.
    frozen = copy.deepcopy(encoder).requires_grad_(False)
    other = rv.guides.RiemannianHamiltonianGuide(
        model,
        encoder,
        CentroidMetricNetwork(lambda x: torch.diag_embed(frozen(x)[1]), 0.8, 0.1),
        num_steps=2,
        step_size=0.1,
        tempering=0.6,
    )
    torch.testing.assert_close(bound(other), bound(guide))
    detached = torch.autograd.grad(bound(other), list(encoder.parameters()))
    assert (detached[2] - gradients[2]).abs().max() > 1e-4


def test_training_freezing_saving_and_likelihood(tmp_path):
    torch.manual_seed(0)
    case = LinearGaussian(2)
    x = case.data(60).float()
    model = rv.VAE(nn.Linear(2, case.data_dim), 2, likelihood=rv.likelihoods.Gaussian(case.scale))
    encoder = rv.networks.MLPEncoder(case.data_dim, 2, hidden=(16,))
    guide = guide_of(model, encoder, num_steps=3, step_size=0.02, regularization=0.05)
    fit = rv.fit(model, guide, x, max_epochs=40, batch_size=20, learning_rate=1e-2, seed=0)
    assert fit.best_loss < fit.history[0]["train_loss"] - 0.3
    with pytest.raises(ValueError, match="freeze_metric"):
        rv.log_likelihood(model, guide, x[:3], num_samples=2)
    metric = guide.freeze_metric(x, chunk_size=25)
    with torch.no_grad():
        loc, scale = encoder(x)
    torch.testing.assert_close(metric.centroids, loc)
    expected = (20 / 60) ** 0.5 * torch.diag_embed(scale)  # trained with 20 centroids, frozen with 60
    torch.testing.assert_close(metric.factors, expected)

    rv.save(tmp_path / "pair", model, guide)
    _, loaded = rv.load(tmp_path / "pair")
    z = torch.randn(5, 2)
    assert torch.equal(loaded.metric.inverse(z), metric.inverse(z))
    loaded.unfreeze_metric()
    torch.testing.assert_close(loaded.freeze_metric(x).inverse(z), metric.inverse(z))

    # An importance estimate of a likelihood that is known: of the trained linear decoder.
    weight, bias = model.decoder.weight.detach().double(), model.decoder.bias.detach().double()
    eye = torch.eye(case.data_dim, dtype=torch.float64)
    exact = dist.MultivariateNormal(bias, weight @ weight.mT + case.scale**2 * eye).log_prob(x.double())
    estimate = rv.log_likelihood(model, guide, x, num_samples=300, seed=0)
    error = (estimate.log_prob.double() - exact) / estimate.mcse.double()
    assert float(error.mean().abs()) < 4 / math.sqrt(len(x))
    assert float(error.abs().max()) < 6


def test_a_guide_between_hands_on_the_encoder_s_posterior():
    torch.manual_seed(0)
    case = LinearGaussian(2)
    model, x = case.vae(), case.data(6)
    seen = []

    class Spy(PosteriorCentroidNetwork):
        def forward(self, x, posterior):
            seen.append(posterior)
            return super().forward(x, posterior)

    base = rv.guides.GaussianGuide(model, case.encoder)
    guide = rv.guides.RiemannianHamiltonianGuide(model, base, Spy(0.8, 0.1), step_size=0.05)
    guide(x)
    loc, scale = case.encoder(x)
    torch.testing.assert_close(seen[0].mean, loc)
    torch.testing.assert_close(seen[0].stddev, scale)
