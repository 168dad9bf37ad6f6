"""The pullback metric: linear decoders, embedded surfaces, and Fisher information from scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal, Poisson

from riemvae.geometry import decoder_metric
from riemvae.geometry.decoder_metric import PullbackMetric
from riemvae.geometry.exponential import exponential_map


def network(d=2, outputs=5, seed=0, activation=nn.Tanh):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(d, 8), activation(), nn.Linear(8, outputs)).double()


def sphere(z):
    """Colatitude and longitude to the unit sphere: ``G = diag(1, sin² θ)``."""
    theta, phi = z[..., 0], z[..., 1]
    return torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], -1)


class Pair(nn.Module):
    """Outputs ``(loc, scale)``."""

    def __init__(self):
        super().__init__()
        self.loc, self.raw = network(seed=1), network(seed=2)
        self.latent_dim = 2

    def forward(self, z):
        return self.loc(z), 0.3 + nn.functional.softplus(self.raw(z))


def test_a_linear_decoder():
    decoder = nn.Linear(3, 7).double()
    expected = decoder.weight.mT @ decoder.weight
    metric, z = PullbackMetric(decoder), torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(metric.tensor(z), expected.expand(2, 4, 3, 3))
    eye = torch.eye(3, dtype=torch.float64)
    noisy = PullbackMetric(decoder, "gaussian", scale=0.5, regularization=0.1)
    torch.testing.assert_close(noisy.tensor(z[0, 0]), 4 * expected + 0.1 * eye)
    assert metric.tensor(z[:0]).shape == (0, 4, 3, 3)


@pytest.mark.parametrize("elements", [1 << 22, 1])
def test_the_sphere_and_its_derivatives(elements, monkeypatch):
    monkeypatch.setattr(decoder_metric, "_TANGENT_ELEMENTS", elements)
    metric = PullbackMetric(sphere, latent_dim=2)
    z = torch.tensor([[0.4, 1.0], [1.2, -2.0], [2.0, 0.3]], dtype=torch.float64)
    sine, cosine = z[:, 0].sin(), z[:, 0].cos()
    expected = torch.diag_embed(torch.stack([torch.ones_like(sine), sine**2], -1))
    v = torch.randn(3, 2, dtype=torch.float64)
    # log √det G = log sin θ, and ½ v_φ² ∂_θ sin⁻² θ = -v_φ² cos θ / sin³ θ.
    volume = torch.stack([cosine / sine, torch.zeros_like(sine)], -1)
    kinetic = volume - torch.stack([v[:, 1] ** 2 * cosine / sine**3, torch.zeros_like(sine)], -1)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(metric.tensor(z), expected)
            torch.testing.assert_close(metric.log_volume(z), sine.log())
            torch.testing.assert_close(metric.log_volume_gradient(z), volume)
            torch.testing.assert_close(metric.at(z).kinetic_gradient(v), kinetic)
    leaf = z.clone().requires_grad_()
    (second,) = torch.autograd.grad(metric.log_volume_gradient(leaf)[:, 0].sum(), leaf)
    torch.testing.assert_close(second[:, 0], -(sine**-2))


def test_geodesics_of_the_sphere_are_great_circles():
    metric = PullbackMetric(sphere, latent_dim=2)
    z = torch.tensor([[1.3, 0.2], [1.0, 0.0]], dtype=torch.float64)
    v = torch.tensor([[0.6, 0.5], [-0.2, 0.8]], dtype=torch.float64)
    _, tangent = torch.func.jvp(sphere, (z,), (v,))
    length = tangent.norm(dim=-1, keepdim=True)
    expected = length.cos() * sphere(z) + length.sin() * tangent / length
    torch.testing.assert_close(sphere(exponential_map(metric, z, v, 40)), expected, rtol=0, atol=1e-6)


def score_covariance(distribution, values, z):
    """``E[∇ log p ∇ log pᵀ]`` by enumeration of the values of each coordinate, which are independent."""
    total = 0.0
    for value in values:
        for log_p in distribution(z).log_prob(value):
            (score,) = torch.autograd.grad(log_p, z, retain_graph=True)
            total = total + (log_p.exp() * torch.outer(score, score)).detach()
    return total


def bernoulli_case():
    decoder = network()
    return decoder, "bernoulli", lambda z: Bernoulli(logits=decoder(z)), torch.tensor([0.0, 1.0])


def categorical_case():
    decoder = nn.Sequential(network(outputs=6), nn.Unflatten(-1, (2, 3)))
    return decoder, "categorical", lambda z: Categorical(logits=decoder(z[None])[0]), torch.arange(3)


def poisson_case():
    decoder = network()
    return decoder, "poisson", lambda z: Poisson(decoder(z).exp()), torch.arange(60.0)


@pytest.mark.parametrize("case", [bernoulli_case, categorical_case, poisson_case])
def test_fisher_information_is_the_covariance_of_the_score(case):
    torch.manual_seed(0)
    decoder, name, distribution, values = case()
    z = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)
    metric = PullbackMetric(decoder, name, latent_dim=2)
    torch.testing.assert_close(metric.tensor(z[None].detach())[0], score_covariance(distribution, values, z))


def log_continuous_bernoulli(logits, x):
    """``l x - log((e^l - 1)/l)``."""
    return logits * x - (torch.expm1(logits) / logits).log()


@pytest.mark.parametrize("name", ["gaussian", "continuous_bernoulli"])
def test_fisher_information_of_densities_by_quadrature(name):
    """The integral of the score's outer product over each coordinate, by the trapezium rule."""
    z = torch.tensor([0.4, -0.7], dtype=torch.float64)
    if name == "gaussian":
        decoder = Pair()
        grid = torch.linspace(-15, 15, 6001, dtype=torch.float64)[:, None]

        def log_prob(z):
            loc, scale = decoder(z)
            return Normal(loc, scale).log_prob(grid)

    else:
        decoder = nn.Sequential(network(), nn.Unflatten(-1, (5,)))
        grid = torch.linspace(0, 1, 20001, dtype=torch.float64)[:, None]

        def log_prob(z):
            return log_continuous_bernoulli(decoder(z), grid)

    scores = torch.func.jacfwd(log_prob)(z)  # (nodes, outputs, d)
    density = log_prob(z).exp()
    integrand = density[..., None, None] * scores.unsqueeze(-1) * scores.unsqueeze(-2)
    expected = torch.trapezoid(integrand, grid[:, 0], dim=0).sum(0)
    metric = PullbackMetric(decoder, name, latent_dim=2)
    torch.testing.assert_close(metric.tensor(z), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_continuous_bernoulli_s_variance_at_all_logits(dtype):
    logits = torch.tensor([0.0, 1e-4, 0.3, 0.499, 0.501, 1.0, -3.0, 30.0, -500.0], dtype=dtype)
    root = decoder_metric._FISHER["continuous_bernoulli"](logits, torch.ones_like(logits))
    x = logits.double()
    series = 1 / 12 - x**2 / 240 + x**4 / 6048
    closed = x**-2 - 0.25 / torch.sinh(x.clamp(-300, 300) / 2) ** 2
    expected = torch.where(x.abs() < 1e-2, series, closed)
    torch.testing.assert_close(
        root.double() ** 2, expected, rtol=2e-5 if dtype == torch.float32 else 1e-10, atol=0
    )


def test_bernoulli_information_does_not_overflow():
    decoder = nn.Linear(1, 1)
    with torch.no_grad():
        decoder.weight.fill_(1.0), decoder.bias.zero_()
    metric = PullbackMetric(decoder, "bernoulli")
    z = torch.tensor([[0.0], [80.0], [-80.0], [500.0]])
    expected = torch.tensor([0.25, math.exp(-80.0), math.exp(-80.0), 0.0])
    torch.testing.assert_close(metric.tensor(z).detach().flatten(), expected)


def test_a_given_root_and_an_object_with_one():
    decoder = network()

    class Brick(nn.Module):
        def fisher_root(self, outputs, tangents):
            return 3.0 * tangents

    z = torch.randn(4, 2, dtype=torch.float64)
    plain = PullbackMetric(decoder).tensor(z)
    for fisher in (Brick(), lambda outputs, tangents: (3.0 * tangents).reshape(len(outputs), 5, 1)):
        torch.testing.assert_close(PullbackMetric(decoder, fisher).tensor(z), 9 * plain)


def test_decoders_are_read_in_evaluation_mode_and_left_as_they_were():
    torch.manual_seed(0)
    decoder = nn.Sequential(
        nn.Linear(2, 16),
        nn.Unflatten(1, (4, 2, 2)),
        nn.ConvTranspose2d(4, 3, 3, 2, 1),
        nn.BatchNorm2d(3),
        nn.SiLU(),
        nn.Dropout(0.5),
        nn.ConvTranspose2d(3, 1, 3, 2),
    )
    metric, z = PullbackMetric(decoder), torch.randn(5, 2)
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    together = metric.tensor(z)
    assert all(m.training for m in decoder.modules())
    assert all(torch.equal(v, before[k]) for k, v in decoder.state_dict().items())
    alone = torch.stack([metric.tensor(p) for p in z])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together, PullbackMetric(decoder.eval()).tensor(z))


def test_gradients_reach_the_decoder():
    decoder, z = network(), torch.randn(3, 2, dtype=torch.float64)
    PullbackMetric(decoder).log_volume(z).sum().backward()
    weight = decoder[0].weight
    h = 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight[0, 0] += sign * h
            values.append(float(PullbackMetric(decoder).log_volume(z).sum()))
            weight[0, 0] -= sign * h
    assert float(weight.grad[0, 0]) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)


def test_singular_tensors():
    class Fold(nn.Module):
        latent_dim = 2

        def forward(self, z):
            return torch.stack([z[:, 0], z[:, 1] ** 2, 0 * z[:, 0]], -1)

    z = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # flat along the second coordinate at the first point
    volume = PullbackMetric(Fold()).log_volume(z)
    assert torch.isnan(volume[0]) and volume[1] == pytest.approx(math.log(2.0))
    assert torch.isfinite(PullbackMetric(Fold(), regularization=1e-4).log_volume_gradient(z)).all()
    with pytest.raises(ValueError, match=r"^regularization: .*1 outputs from 3"):
        PullbackMetric(nn.Linear(3, 1)).tensor(torch.zeros(3))
    assert PullbackMetric(nn.Linear(3, 1), regularization=0.1).log_volume(torch.zeros(3)).isfinite()


def test_refusals():
    decoder = network()
    for call, name in (
        (lambda: PullbackMetric(3.0), "decoder"),
        (lambda: PullbackMetric(sphere), "latent_dim"),
        (lambda: PullbackMetric(decoder, "gausian"), "fisher"),
        (lambda: PullbackMetric(decoder, 3.0), "fisher"),
        (lambda: PullbackMetric(decoder, scale=0.0), "scale"),
        (lambda: PullbackMetric(decoder, regularization=-1.0), "regularization"),
        (lambda: PullbackMetric(decoder).tensor(torch.zeros(3)), "z"),
        (lambda: PullbackMetric(lambda z: z.sum(0), latent_dim=2).tensor(torch.zeros(4, 2)), "decoder"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: "):
            call()
    assert PullbackMetric(decoder).latent_dim == 2
