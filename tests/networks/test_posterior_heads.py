"""Encoders of full-covariance normals and of mixtures, alone, in guides and under the objectives."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, Nonlinear
from torch import nn
from torch.nn.functional import softplus

import riemvae as rv
from riemvae.distributions.implicit_mixture import ImplicitMixture
from riemvae.inference.bounds import IWAE, MIWAE
from riemvae.networks import ConvEncoder, MLPEncoder
from riemvae.networks.full_covariance import FullCovarianceEncoder
from riemvae.networks.mixture import MixtureEncoder

TRUNKS = {
    "mlp": MLPEncoder((1, 8, 8), 3, hidden=(20,)),
    "mlp with layers of each head": MLPEncoder((1, 8, 8), 3, hidden=(20, 10), shared_layers=1),
    "mlp without layers": MLPEncoder((1, 8, 8), 3, hidden=()),
    "conv": ConvEncoder((1, 8, 8), 3, channels=(4, 8)),
    "conv with layers": ConvEncoder((1, 8, 8), 3, channels=(4, 8), hidden=(7,)),
    "sequence": nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU()),
}
HEADS = {
    "full": lambda f, d, **o: FullCovarianceEncoder(f, d, **o),
    "mixture": lambda f, d, **o: MixtureEncoder(f, d, 3, **o),
}


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("head", HEADS)
def test_heads_on_the_trunks_of_our_encoders(head, trunk):
    torch.manual_seed(0)
    encoder = HEADS[head](TRUNKS[trunk], 3)
    q = encoder(torch.rand(5, 1, 8, 8))
    assert q.batch_shape == (5,) and q.event_shape == (3,) and q.has_rsample
    z = q.expand((4, 5)).rsample()
    assert z.shape == (4, 5, 3)
    q.log_prob(z).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    for p in encoder.parameters():
        p.grad = None


def test_the_trunk_is_shared_and_gives_what_the_encoders_heads_get():
    for name in ("mlp", "conv with layers"):
        encoder = TRUNKS[name]
        features = encoder.features(torch.rand(5, 1, 8, 8))
        assert features.shape == (5, encoder.num_features)
        head = FullCovarianceEncoder(encoder, 3)
        own = {id(p) for p in encoder.trunk.parameters()}
        assert own and own <= {id(p) for p in head.parameters()}
    x = torch.rand(5, 1, 8, 8)
    mlp = TRUNKS["mlp"]
    torch.testing.assert_close(mlp.heads(mlp.features(x))[0], mlp(x)[0])


def test_starts_near_the_identity_and_even():
    torch.manual_seed(0)
    x = torch.rand(50, 1, 8, 8)
    full = FullCovarianceEncoder(TRUNKS["mlp"], 3)(x)
    assert (full.scale_tril - torch.eye(3)).abs().max() < 0.3
    assert (full.scale_tril.triu(1) == 0).all() and (full.scale_tril.diagonal(dim1=-2, dim2=-1) > 0).all()
    mixture = MixtureEncoder(TRUNKS["mlp"], 3, 4)(x)
    assert (mixture.scale - 1).abs().max() < 0.3
    assert (mixture.log_weights.exp() - 0.25).abs().max() < 0.1
    assert mixture.loc.std(1).min() > 0.05


def test_sizes_are_named():
    class Odd(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"num_features: expected the number of features.*pass num_features"):
        FullCovarianceEncoder(Odd(), 2)
    assert FullCovarianceEncoder(Odd(), 2, num_features=6)(torch.zeros(3, 6)).event_shape == (2,)
    with pytest.raises(ValueError, match="features: expected a module"):
        MixtureEncoder(lambda x: x, 2)
    with pytest.raises(ValueError, match="num_components: expected an integer of at least 1"):
        MixtureEncoder(Odd(), 2, 0, num_features=3)


# -- in guides -----------------------------------------------------------------------------------------------

CASE = LinearGaussian(3, seed=1)


def exact_encoder():
    """The linear map and the constant factor of the posterior, written into the layers."""
    encoder = FullCovarianceEncoder(nn.Identity(), 3, num_features=5).double()
    factor = torch.linalg.cholesky(CASE.covariance)
    weight = CASE.covariance @ CASE.weight.mT / CASE.scale**2
    rows, columns = torch.tril_indices(3, 3, -1)
    with torch.no_grad():
        encoder.loc.weight.copy_(weight)
        encoder.loc.bias.copy_(-weight @ CASE.bias)
        last = encoder.heads.branches[0][-1]
        last.weight.zero_()
        last.bias.copy_(torch.cat([factor.diagonal().expm1().log(), factor[rows, columns]]))
    return encoder


def test_a_full_covariance_is_exact_on_a_linear_gaussian_model():
    x = CASE.data(6)
    guide = rv.guides.GaussianGuide(CASE.vae(), exact_encoder())
    weights = rv.log_weights(guide.model, guide, x, 9)
    torch.testing.assert_close(weights, CASE.log_prob(x).expand(9, 6))
    # The part below the diagonal is in its place: another order would not be exact.
    factor = guide.posterior(x).scale_tril[0]
    torch.testing.assert_close(factor @ factor.mT, CASE.covariance)


def mixture_near_the_posterior(x):
    """Two components a little off the mean on either side, wide enough to cover it."""
    mean, sd = CASE.posterior_mean(x), CASE.covariance.diagonal().sqrt()
    loc = torch.stack([mean + 0.4 * sd, mean - 0.3 * sd], -2)
    return ImplicitMixture(torch.tensor([0.2, -0.3]).double().expand(len(x), 2), loc, 1.1 * sd.expand_as(loc))


@pytest.mark.parametrize("head", ["mixture", "full"])
@pytest.mark.parametrize("on_top", ["nothing", "hamiltonian", "hamiltonian on guide"])
def test_weights_are_unbiased(head, on_top):
    encoder = mixture_near_the_posterior
    if head == "full":

        def encoder(x):
            factor = 1.1 * torch.linalg.cholesky(CASE.covariance)
            return dist.MultivariateNormal(
                CASE.posterior_mean(x) + 0.1, scale_tril=factor.expand(len(x), 3, 3)
            )

    model, x = CASE.vae(), CASE.data(4)
    guide = rv.guides.GaussianGuide(model, encoder)
    if on_top != "nothing":
        base = guide if on_top.endswith("guide") else encoder
        guide = rv.guides.HamiltonianGuide(model, base, num_steps=2, step_size=0.1, tempering=1.0)
    ll = rv.log_likelihood(model, guide, x, 4000, seed=0)
    assert (ll.khat < 0.5).all()
    assert ((ll.log_prob - CASE.log_prob(x)).abs() < 4 * ll.mcse + 1e-9).all()


def test_the_doubly_reparametrised_gradient_through_a_mixture():
    """Its mean is the standard one's: paired over copies of one datum that have parameters of their own."""
    problem, n = Nonlinear(1), 40_000
    x, results = problem.x.expand(n, -1), {}
    for gradient in ("standard", "doubly"):
        leaves = [
            torch.tensor(v, dtype=torch.float64).expand(n, *torch.tensor(v).shape).clone().requires_grad_()
            for v in ([0.3, -0.2], [[0.5], [-0.4]], [[0.8], [0.9]])
        ]
        guide = rv.guides.GaussianGuide(problem.vae(), lambda x, ls=leaves: ImplicitMixture(*ls))
        torch.manual_seed(0)
        loss = IWAE(2, gradient).differentiable_loss(guide.model, guide, x)
        results[gradient] = torch.cat([g.flatten(1) for g in torch.autograd.grad(loss, leaves)], 1)
    difference = results["doubly"] - results["standard"]
    # Six numbers, each with a standard error below 0.005; the score alone would move them by 0.05.
    assert (difference.mean(0).abs() < 4.5 * difference.std(0) / math.sqrt(n)).all()
    assert (difference.std(0) / math.sqrt(n)).max() < 0.005


def test_a_mixture_learns_a_posterior_with_two_modes():
    """``x = z² + noise``: the sign of ``z`` cannot be known. A component starts on each side, and stays."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.square(), 0.4).to_event(1), obs=x)

    x = torch.linspace(0.8, 2.5, 32).unsqueeze(-1)
    bounds, means = {}, {}
    for name, make in (("full", HEADS["full"]), ("mixture", lambda f, d: MixtureEncoder(f, d, 2))):
        torch.manual_seed(0)
        encoder = make(nn.Sequential(nn.Linear(1, 16), nn.Tanh()), 1)
        if name == "mixture":
            with torch.no_grad():
                encoder.loc.bias.copy_(torch.tensor([1.0, -1.0]))
                encoder.scale.bias.fill_(-1.0)  # about 0.3: narrower than the gap between the modes
        guide = rv.guides.GaussianGuide(model, encoder)
        # The weights of modes far apart have a noisy gradient: many draws, and the quieter estimator.
        objective = MIWAE(32, 1, "sticking")
        rv.fit(model, guide, x, objective, max_epochs=120, learning_rate=0.03, seed=0, progress=False)
        bounds[name] = float(rv.log_weights(model, guide, x, 500).mean())
        means[name] = guide.posterior(x).mean
    assert (means["full"].abs() > 0.5).all() and (means["mixture"].abs() < 0.4).all()
    # A guide of one mode misses half of the mass: log 2 = 0.69, less what little the modes overlap.
    assert bounds["mixture"] > bounds["full"] + 0.6


def test_softplus_of_the_start_is_one():
    from riemvae.networks.full_covariance import SOFTPLUS_ONE

    assert float(softplus(torch.tensor(SOFTPLUS_ONE))) == pytest.approx(1.0)
