"""Marginal likelihoods against exact ones, and what is reported with them."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import GUIDES, LinearGaussian, make_guide
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import riemvae as rv


@pytest.mark.parametrize("tempering", [1.0, 0.8])
@pytest.mark.parametrize("d", [1, 2, 8])
@pytest.mark.parametrize("name", GUIDES)
def test_the_estimate_is_the_exact_value_within_four_standard_errors(name, d, tempering):
    """The encoder is near the posterior and wider, the steps short: light tails, with errors to trust."""
    case = LinearGaussian(d)
    model, x = case.vae(), case.data(2)
    guide = make_guide(name, model, case.encoder, d, tempering, step_size=0.05)
    ll = rv.log_likelihood(model, guide, x, num_samples=10_000, seed=1)
    assert (ll.khat < 0.7).all()
    assert (ll.mcse < 0.03).all()
    assert ((ll.log_prob - case.log_prob(x)).abs() < 4 * ll.mcse).all()
    assert ll.num_diverged.sum() == 0


def test_a_users_function_gives_the_same():
    case = LinearGaussian(2)
    x = case.data(3)
    results = []
    for model in (case.vae(), case.model):
        guide = make_guide("riemannian centroid", model, case.encoder, 2, 0.8)
        results.append(rv.log_likelihood(model, guide, x, 500, seed=0))
    torch.testing.assert_close(results[0].log_prob, results[1].log_prob)
    torch.testing.assert_close(results[0].khat, results[1].khat)


def test_errors_cover():
    """95 % intervals of 300 repetitions in one call: 90 to 98 % (binomial, 3 sigma: 91.2 to 98.8)."""
    case = LinearGaussian(2)
    x = case.data(1).expand(300, -1).contiguous()
    model = case.vae()
    guide = make_guide("hamiltonian", model, lambda x: case.encoder(x, 1.3, 0.3), 2, 0.8, num_steps=2)
    ll = rv.log_likelihood(model, guide, x, 400, seed=0)
    light = ll.khat < 0.5
    assert light.float().mean() > 0.9
    inside = (ll.log_prob - case.log_prob(x)).abs()[light] < 1.96 * ll.mcse[light]
    assert 0.90 < float(inside.float().mean()) < 0.98
    # The standard error is that of the repetitions.
    assert float(ll.mcse.mean()) == pytest.approx(float(ll.log_prob.std()), rel=0.15)


def test_the_exact_posterior_has_no_error():
    case = LinearGaussian(1)
    x = case.data(4)
    guide = rv.guides.GaussianGuide(case.model, lambda x: case.encoder(x, 1.0, 0.0))
    ll = rv.log_likelihood(case.model, guide, x, 50)
    torch.testing.assert_close(ll.log_prob, case.log_prob(x))
    assert (ll.mcse < 1e-6).all()
    torch.testing.assert_close(ll.ess, torch.full_like(ll.ess, 50.0))
    assert (ll.khat < 0).all()


def weights_by_hand(weights):
    """The numbers of one datum from its weights, in float64."""
    w = weights / weights.max()
    s = len(w)
    ess = w.sum() ** 2 / w.square().sum()
    return ess, (w.var() / s).sqrt() / w.mean()


def test_the_numbers_are_those_of_the_weights():
    case = LinearGaussian(2)
    model, x = case.vae(), case.data(3)
    guide = rv.guides.GaussianGuide(model, case.encoder)
    torch.manual_seed(0)
    log_weights = rv.log_weights(model, guide, x, 300)
    ll = rv.log_likelihood(model, guide, x, 300, seed=0)
    torch.testing.assert_close(ll.log_prob, log_weights.exp().mean(0).log())
    for b in range(3):
        ess, error = weights_by_hand(log_weights[:, b].exp())
        assert float(ll.ess[b]) == pytest.approx(float(ess))
        assert float(ll.mcse[b]) == pytest.approx(float(error))
    assert ll.num_samples == 300 and ll.num_dims == 4 and len(ll) == 3
    assert ll.mean == pytest.approx(float(ll.log_prob.mean()))
    assert ll.stderr == pytest.approx(float(ll.log_prob.std() / math.sqrt(3)))
    assert ll.bits_per_dim == pytest.approx(-ll.mean / (4 * math.log(2)))
    summary = ll.summary()
    assert summary["mcse"] == pytest.approx(float(ll.mcse.square().sum().sqrt() / 3))
    assert summary["num_data"] == 3 and summary["share_khat_above_0.7"] == 0.0
    assert "LogLikelihood(mean=" in repr(ll) and "3 data" in repr(ll)


@pytest.mark.parametrize("chunk_size", [1, 7, 100, 10_000])
def test_chunks_change_nothing_but_the_draws(chunk_size):
    case = LinearGaussian(1)
    x = case.data(3)
    exact = rv.guides.GaussianGuide(case.model, lambda x: case.encoder(x, 1.0, 0.0))
    ll = rv.log_likelihood(case.model, exact, x, 20, chunk_size=chunk_size)
    torch.testing.assert_close(ll.log_prob, case.log_prob(x))
    assert ll.log_prob.shape == ll.khat.shape == ll.num_diverged.shape == (3,)
    model = case.vae()
    wide = rv.guides.HamiltonianGuide(model, case.encoder, step_size=0.05, tempering=0.8)
    ll = rv.log_likelihood(model, wide, x, 300, chunk_size=chunk_size, seed=0) if chunk_size > 1 else ll
    assert ((ll.log_prob - case.log_prob(x)).abs() < 4 * ll.mcse + 1e-6).all()


def test_no_more_than_a_chunk_goes_through_the_decoder():
    case = LinearGaussian(2)
    sizes = []
    decoder = case.decoder()

    class Watched(nn.Module):
        def forward(self, z):
            sizes.append(len(z))
            return decoder(z)

    model = rv.VAE(Watched(), 2, likelihood=rv.likelihoods.Gaussian(0.7)).double()
    guide = rv.guides.HamiltonianGuide(model, case.encoder, step_size=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # 30 draws say little of a tail
        rv.log_likelihood(model, guide, case.data(40), 30, chunk_size=100)
    assert max(sizes) <= 100
    sizes.clear()
    rv.log_weights(model, guide, case.data(10), 30, chunk_size=50)
    assert max(sizes) <= 50


def test_the_callers_generator_is_left_alone_with_a_seed():
    case = LinearGaussian(2)
    model, x = case.vae(), case.data(3)
    guide = rv.guides.GaussianGuide(model, case.encoder)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = rv.log_likelihood(model, guide, x, 20, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    second = rv.log_likelihood(model, guide, x, 20, seed=1)
    torch.testing.assert_close(first.log_prob, second.log_prob, rtol=0, atol=0)
    third = rv.log_likelihood(model, guide, x, 20)
    assert not torch.equal(torch.get_rng_state(), state)
    assert (third.log_prob != first.log_prob).all()


class Rows(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


def test_data_of_any_kind():
    case = LinearGaussian(1)  # with the exact posterior, every draw gives the exact value
    x = case.data(5)
    kinds = {
        "tensor": x,
        "array": x.numpy(),
        "tuple": (x,),
        "mapping": {"x": x.numpy()},
        "tensor data set": TensorDataset(x),
        "data set": Rows(x),
        "loader": DataLoader(TensorDataset(x), batch_size=2),
    }
    model = case.vae()  # float64: arrays take the model's type
    guide = rv.guides.GaussianGuide(model, lambda x: case.encoder(x, 1.0, 0.0))
    for kind, data in kinds.items():
        ll = rv.log_likelihood(model, guide, data, 6)
        assert ll.log_prob.shape == (5,), kind
        torch.testing.assert_close(ll.log_prob, case.log_prob(x), msg=kind)
    assert rv.log_weights(model, guide, x.numpy(), 2).dtype == torch.float64
    assert rv.log_weights(model, guide, {"x": x}, 2).shape == (2, 5)


def test_bad_data_and_numbers_are_refused():
    case = LinearGaussian(1)
    model, x = case.vae(), case.data(3)
    guide = rv.guides.GaussianGuide(model, case.encoder)
    infinite = x.clone()
    infinite[0, 0] = math.inf
    for data, message in (
        (x[:0], "at least one datum"),
        (infinite, "data: expected finite values"),
        (np.array(["a"]), "data: expected"),
        (3.0, "data: expected"),
        (x[:, :2], "x: expected a batch of data of shape"),
    ):
        if data is x or getattr(data, "shape", ()) == (3, 2):
            sliced = rv.guides.GaussianGuide(model, lambda x: (x[:, :1], x[:, :1].exp()))
            with pytest.raises(ValueError, match=message):
                rv.log_likelihood(model, sliced, data, 5)
        else:
            with pytest.raises(ValueError, match=message):
                rv.log_likelihood(model, guide, data, 5)
    for options, message in (
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 5, "chunk_size": 0}, "chunk_size"),
    ):
        with pytest.raises(ValueError, match=f"{message}: expected"):
            rv.log_likelihood(model, guide, x, **options)


def test_a_relaxed_score_is_no_likelihood():
    model = rv.VAE(nn.Linear(2, 3), 2, likelihood=rv.likelihoods.Bernoulli(relaxed=True))
    guide = rv.guides.GaussianGuide(model, lambda x: (x[:, :2], torch.ones_like(x[:, :2])))
    grey = torch.rand(4, 3)
    assert math.isfinite(rv.ELBO().loss(model, guide, grey))
    for estimate in (rv.log_likelihood, rv.log_weights):
        with pytest.raises(
            ValueError, match="model: expected a density for the data, got a relaxed score at 'x'"
        ):
            estimate(model, guide, grey, 5)
    strict = rv.VAE(nn.Linear(2, 3), 2, likelihood="bernoulli")
    strict_guide = rv.guides.GaussianGuide(strict, guide.encoder)
    with pytest.raises(ValueError, match="x: expected"):
        rv.log_likelihood(strict, strict_guide, grey, 5)


def test_heavy_tails_warn():
    case = LinearGaussian(2)
    model, x = case.vae(), case.data(3)
    narrow = rv.guides.GaussianGuide(model, lambda x: case.encoder(x, 0.3, 1.5))
    with pytest.warns(UserWarning, match="k̂ > 0.7 for 3 of 3 data"):
        ll = rv.log_likelihood(model, narrow, x, 1000, seed=0)
    assert (ll.khat > 0.7).all() and (ll.log_prob < case.log_prob(x)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rv.log_likelihood(model, rv.guides.GaussianGuide(model, case.encoder), x, 1000, seed=0)


def test_one_sample_and_few():
    case = LinearGaussian(2)
    model, x = case.vae(), case.data(2)
    guide = rv.guides.GaussianGuide(model, case.encoder)
    one = rv.log_likelihood(model, guide, x, 1)
    assert one.mcse.isnan().all() and one.khat.isnan().all() and torch.isfinite(one.log_prob).all()
    torch.testing.assert_close(one.ess, torch.ones_like(one.ess))
    assert math.isnan(one.summary()["share_khat_above_0.7"])
    assert math.isnan(rv.log_likelihood(model, guide, x[:1], 3).stderr)


def test_all_draws_lost():
    def broken(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0, validate_args=False).to_event(1), obs=x)
            pyro.factor("lost", torch.where(x[..., 0] > 0, -math.inf, 0.0))

    guide = rv.guides.GaussianGuide(broken, lambda x: (x, torch.ones_like(x)))
    ll = rv.log_likelihood(broken, guide, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 100, seed=0)
    assert ll.log_prob[0] == -math.inf and torch.isfinite(ll.log_prob[1])
    assert ll.num_diverged.tolist() == [100, 0] and ll.ess[0] == 0
    assert math.isnan(float(ll.khat[0]))
