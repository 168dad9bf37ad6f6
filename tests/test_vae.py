"""The model of a variational autoencoder: shapes, draws, its fast potential, and what it refuses."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import riemvae as rv
from riemvae.geometry import value_and_gradient
from riemvae.geometry.potential import gradient
from riemvae.guides.log_joint import LogJoint, examine

D, N = 2, 6


class TwoHeads(nn.Module):
    """A decoder of location and scale."""

    def __init__(self, constant=False):
        super().__init__()
        self.loc, self.scale, self.constant = nn.Linear(D, N), nn.Linear(D, N), constant

    def forward(self, z):
        loc = self.loc(z)
        return loc, torch.full_like(loc.detach(), 0.4) if self.constant else self.scale(z).exp()


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, 2 * 3)

    def forward(self, z):
        assert z.dim() == 2
        return self.layer(z).reshape(-1, 1, 2, 3)


def counts(x):
    return (5 * x.sigmoid()).round()


SYSTEMS = {
    "bernoulli": (lambda: nn.Linear(D, N), "bernoulli", lambda x: (x > 0).to(x)),
    "continuous": (lambda: nn.Linear(D, N), "continuous_bernoulli", torch.sigmoid),
    "gaussian": (lambda: nn.Linear(D, N), "gaussian", lambda x: x),
    "learned": (lambda: nn.Linear(D, N), rv.likelihoods.Gaussian("learned"), lambda x: x),
    "two heads": (TwoHeads, "gaussian", lambda x: x),
    "constant head": (lambda: TwoHeads(constant=True), "gaussian", lambda x: x),
    "poisson": (lambda: nn.Linear(D, N), "poisson", counts),
    "images": (Images, "bernoulli", lambda x: (x > 0).to(x).reshape(-1, 1, 2, 3)),
}


def make(name, prior=None, b=5):
    torch.manual_seed(0)
    decoder, likelihood, transform = SYSTEMS[name]
    vae = rv.VAE(decoder(), D, prior=prior, likelihood=copy.deepcopy(likelihood)).double()
    return vae, transform(torch.randn(b, N, dtype=torch.float64))


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_trace_has_a_plate_a_latent_and_data(name):
    vae, x = make(name)
    trace = poutine.trace(vae).get_trace(x)
    assert [n for n, s in trace.nodes.items() if s["type"] == "sample"] == ["data", "z", "x"]
    assert trace.nodes["z"]["value"].shape == (5, D)
    assert trace.nodes["x"]["is_observed"] and trace.nodes["x"]["fn"].batch_shape == (5,)
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (5,)
    assert vae(size=3).shape == (3, *x.shape[1:])
    assert vae().shape == (1, *x.shape[1:])


@pytest.mark.parametrize("prior", ["standard", "fixed", "module"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_fast_potential_is_that_of_the_trace(name, prior):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.full((D,), 0.3))

        def forward(self):
            return dist.Normal(self.loc, 0.8).to_event(1)

    law = {
        "standard": None,
        "fixed": dist.MultivariateNormal(torch.ones(D).double(), 0.5 * torch.eye(D).double()),
        "module": Shifted(),
    }[prior]
    vae, x = make(name, law)
    fast = vae.latent_potential("z", (x,), {})
    traced = LogJoint(vae, examine(vae, "z", (x,), {}), (x,), {})
    for lead in ((), (3,)):
        z = torch.randn(*lead, 5, D, dtype=torch.float64, requires_grad=True)
        values = [value_and_gradient(p, z) for p in (fast, traced)]
        for a, b in zip(*values):
            torch.testing.assert_close(a, b)
            assert a.shape[: len(lead) + 1] == (*lead, 5)
        torch.testing.assert_close(fast(z), traced(z))
        torch.testing.assert_close(gradient(fast, z), values[1][1])
        # Differentiated again, in z and in every parameter.
        leaves = [z, *vae.parameters()]
        again = [torch.autograd.grad(g.sin().sum() + u.sum(), leaves, allow_unused=True) for u, g in values]
        for a, b in zip(*again):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                value, slope = fast.value_and_gradient(z.detach())
                assert not value.requires_grad and not slope.requires_grad
                torch.testing.assert_close(slope.clone(), values[1][1].detach())


def test_the_fast_potential_steps_aside_for_another_model():
    class Other(rv.VAE):
        def forward(self, x=None, *, size=1):
            return super().forward(x, size=size)

    class Decoded(rv.VAE):
        def decode(self, z):
            return 2.0 * super().decode(z)

    x = torch.ones(3, N)
    assert rv.VAE(nn.Linear(D, N), D).latent_potential("z", (x,), {}) is not None
    assert rv.VAE(nn.Linear(D, N), D).latent_potential("z", (), {"x": x}) is not None
    for kind in (Other, Decoded):
        assert kind(nn.Linear(D, N), D).latent_potential("z", (x,), {}) is None
    assert rv.VAE(nn.Linear(D, N), D).latent_potential("w", (x,), {}) is None
    assert rv.VAE(nn.Linear(D, N), D).latent_potential("z", (), {}) is None


@pytest.mark.parametrize("prior", [None, dist.Normal(torch.zeros(D).double(), 1.0).to_event(1)])
def test_a_position_that_is_no_number_stands_alone(prior):
    """Validation of the user's own distributions must not raise for the whole batch."""
    vae, x = make("gaussian", prior)

    def model(x):  # with a stored distribution, which validates what it is asked
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", law)
            pyro.sample("x", dist.Normal(vae.decoder(z), 1.0).to_event(1), obs=x)

    law = dist.Normal(torch.zeros(D).double(), 1.0).to_event(1)
    z = torch.zeros(5, D, dtype=torch.float64)
    z[1, 0] = math.nan
    functions = [LogJoint(m, examine(m, "z", (x,), {}), (x,), {}) for m in (vae, model)]
    for potential in (vae.latent_potential("z", (x,), {}), *functions):
        value, slope = value_and_gradient(potential, z)
        assert value.isnan().tolist() == [False, True, False, False, False]
        assert slope.isnan().any(-1).tolist() == [False, True, False, False, False]


def test_decoding_and_means():
    vae, _ = make("bernoulli")
    z = torch.randn(4, 3, D, dtype=torch.float64)
    assert vae.decode(z).shape == (4, 3, N)
    assert vae.decode(z[0, 0]).shape == (N,)
    torch.testing.assert_close(vae.decoder_mean(z), vae.decoder(z).sigmoid())
    loc, scale = make("two heads")[0].decode(z)
    assert loc.shape == scale.shape == (4, 3, N)
    assert make("images")[0].decoder_mean(z).shape == (4, 3, 1, 2, 3)


def test_draws_from_the_prior():
    torch.manual_seed(0)
    linear = nn.Linear(D, N).double()
    vae = rv.VAE(linear, D, likelihood=rv.likelihoods.Gaussian(0.5)).double()
    draws = vae(size=20_000).detach()
    weight = linear.weight.detach()
    covariance = weight @ weight.mT + 0.25 * torch.eye(N).double()
    # A covariance's standard error is at most √(2/n) times the largest variance: 4 of them.
    bound = 4 * math.sqrt(2 / 20_000) * float(covariance.diagonal().max())
    assert (torch.cov(draws.mT) - covariance).abs().max() < bound
    assert (draws.mean(0) - linear.bias.detach()).abs().max() < 4 * math.sqrt(
        float(covariance.max()) / 20_000
    )


def test_a_trained_prior_is_called_at_each_step():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(D))

        def forward(self):
            return dist.Normal(self.loc, 1.0).to_event(1)

    prior = Learned()
    vae = rv.VAE(nn.Linear(D, N), D, prior=prior, likelihood="gaussian")
    network = nn.Linear(N, D)
    guide = rv.guides.HamiltonianGuide(vae, lambda x: (network(x), torch.ones(len(x), D)))
    svi = pyro.infer.SVI(vae, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    for _ in range(3):
        svi.step(torch.randn(8, N) + 3.0)
    assert prior.loc.detach().abs().min() > 0.01
    assert "prior.loc" in dict(vae.named_parameters())


def test_types_copies_and_states():
    vae, x = make("learned", dist.MultivariateNormal(torch.zeros(D), torch.eye(D)))
    assert vae(size=2).dtype == torch.float64
    copied = copy.deepcopy(vae)
    with torch.no_grad():
        copied.decoder.weight.zero_()
    assert vae.decoder.weight.abs().sum() > 0
    copied.load_state_dict(vae.state_dict())
    torch.testing.assert_close(copied.decoder.weight, vae.decoder.weight)
    assert vae.float()(size=2).dtype == torch.float32
    assert make("gaussian")[0](x).dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("bernoulli", torch.full((2, N), 0.5), "x: expected"),
        ("continuous", torch.full((2, N), 1.5), "x: expected"),
        ("gaussian", torch.full((2, N), math.nan), "x: expected finite"),
        ("poisson", torch.full((2, N), -1.0), "x: expected"),
        (
            "gaussian",
            torch.zeros(2, N + 1),
            r"x: expected a batch of data of shape \(6,\), as the decoder gives",
        ),
        ("images", torch.zeros(2, N), r"x: expected a batch of data of shape \(1, 2, 3\)"),
    ],
)
def test_data_that_do_not_fit_are_refused(name, bad, message):
    vae, _ = make(name)
    with pytest.raises(ValueError, match=message):
        vae(bad.double())
    guide = rv.guides.HamiltonianGuide(
        vae, lambda x: (torch.zeros(len(x), D).double(), torch.ones(len(x), D).double())
    )
    with pytest.raises(ValueError, match=message):
        pyro.infer.Trace_ELBO().loss(vae, guide, bad.double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "latent_dim: expected an integer of at least 1"),
        ({"likelihood": "bernouli"}, "likelihood: expected one of 'bernoulli'"),
        ({"prior": dist.Normal(0.0, 1.0)}, r"prior: expected .*to_event\(1\)"),
        ({"prior": dist.Normal(torch.zeros(D), 1.0)}, r"prior: expected .*to_event\(1\)"),
        (
            {"prior": dist.Normal(torch.zeros(3), 1.0).to_event(1)},
            r"prior: expected .*event shape \(2,\), got event shape \(3,\)",
        ),
        (
            {"prior": dist.Normal(torch.zeros(D, requires_grad=True), 1.0).to_event(1)},
            "prior: expected a fixed distribution",
        ),
        ({"prior": 3.0}, "prior: expected a distribution, or a callable"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rv.VAE(nn.Linear(D, N), **{"latent_dim": D, **options})


def test_a_callable_prior_of_another_shape_is_refused_when_called():
    vae = rv.VAE(nn.Linear(D, N), D, prior=lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pytest.raises(ValueError, match=r"prior: expected a distribution with event shape \(2,\)"):
        vae(size=2)
