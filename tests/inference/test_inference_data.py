"""Posteriors for ArviZ: groups, dimensions, exact values; leave-one-out against closed forms."""

from __future__ import annotations

import math

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian
from pyro import poutine

import riemvae as rv
from riemvae.inference.inference_data import to_arviz
from riemvae.sampling import HMC, BatchedMCMC
from riemvae.sampling.diagnostics import from_groups
from riemvae.sampling.kernel import with_gradient


def values(data, group, name):
    return np.asarray(data[group][name].values)


def dims_of(data, group):
    return {name: variable.dims for name, variable in data[group].data_vars.items()}


def example(widening=1.3, shift=0.5):
    oracle = LinearGaussian(2)
    guide = rv.guides.GaussianGuide(oracle.model, lambda x: oracle.encoder(x, widening, shift))
    return oracle, guide, oracle.data(5)


# -- by a guide ----------------------------------------------------------------------------------------------


def test_groups_dimensions_and_coordinates():
    torch.manual_seed(0)
    oracle, guide, x = example()
    data = to_arviz(
        oracle.model,
        guide,
        x,
        40,
        coords={"subject": list("abcde"), "time": [10, 20, 30, 40]},
        dims={"x": ["time"]},
    )
    draws, subject = ("chain", "draw"), ("subject",)
    assert dims_of(data, "posterior") == {"z": (*draws, "subject", "latent")}
    assert dims_of(data, "prior") == {"z": (*draws, "subject", "latent")}
    for group in ("posterior_predictive", "prior_predictive"):
        assert dims_of(data, group) == {"x": (*draws, "subject", "time")}
    assert dims_of(data, "log_likelihood") == {"x": (*draws, "subject")}
    assert dims_of(data, "sample_stats") == {"log_weight": (*draws, "subject")}
    assert dims_of(data, "observed_data") == {"x": ("subject", "time")}
    names = ("log_marginal", "log_marginal_mcse", "khat", "ess")
    assert dims_of(data, "constant_data") == dict.fromkeys(names, subject)
    assert values(data, "posterior", "z").shape == (1, 40, 5, 2)
    assert list(data["posterior"]["z"].coords["subject"].values) == list("abcde")
    assert list(data["observed_data"]["x"].coords["time"].values) == [10, 20, 30, 40]
    np.testing.assert_array_equal(values(data, "observed_data", "x"), x)
    assert "conditional and mislead" in data["log_likelihood"]["x"].attrs["note"]
    assert "do not weigh them again" in data["sample_stats"]["log_weight"].attrs["note"]
    less = to_arviz(oracle.model, guide, x, 10, prior=False, posterior_predictive=False, log_likelihood=False)
    for group in ("prior", "prior_predictive", "posterior_predictive", "log_likelihood"):
        assert hasattr(data, group) and not hasattr(less, group)


def test_the_posterior_is_resampled_and_its_numbers_are_the_models():
    torch.manual_seed(1)
    oracle, guide, x = example()
    data = to_arviz(oracle.model, guide, x, 2000, num_proposals=8000, prior=False)
    z = torch.from_numpy(values(data, "posterior", "z")[0])
    sd = oracle.covariance.diagonal().sqrt()
    # 1/√2000 of the draws, and some of the proposals.
    assert ((z.mean(0) - oracle.posterior_mean(x)) / sd).abs().max() < 4.5 * 1.2 / math.sqrt(2000)
    # log p(x|z) and the weight of each draw, by the formulas.
    conditional = dist.Normal(z @ oracle.weight.mT + oracle.bias, oracle.scale).log_prob(x).sum(-1)
    np.testing.assert_allclose(values(data, "log_likelihood", "x")[0], conditional, rtol=1e-9)
    loc, scale = oracle.encoder(x, 1.3, 0.5)
    weight = (
        conditional + dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - dist.Normal(loc, scale).log_prob(z).sum(-1)
    )
    np.testing.assert_allclose(values(data, "sample_stats", "log_weight")[0], weight, rtol=1e-9)
    error = values(data, "constant_data", "log_marginal") - oracle.log_prob(x).numpy()
    assert np.abs(error / values(data, "constant_data", "log_marginal_mcse")).max() < 4
    assert (values(data, "constant_data", "khat") < 0.7).all()


def test_weighted_draws_give_the_posterior_by_their_weights():
    torch.manual_seed(2)
    oracle, guide, x = example()
    data = to_arviz(
        oracle.model, guide, x, 4000, posterior="weighted", prior=False, posterior_predictive=False
    )
    z = torch.from_numpy(values(data, "posterior", "z")[0])
    log_weight = torch.from_numpy(values(data, "sample_stats", "log_weight")[0])
    sd = oracle.covariance.diagonal().sqrt()
    assert ((z.mean(0) - oracle.posterior_mean(x)) / sd).min() > 0.4  # the guide's own
    mean = (torch.softmax(log_weight, 0).unsqueeze(-1) * z).sum(0)
    assert ((mean - oracle.posterior_mean(x)) / sd).abs().max() < 4.5 * 1.5 / math.sqrt(4000)
    marginal = torch.logsumexp(log_weight, 0) - math.log(4000)
    np.testing.assert_allclose(values(data, "constant_data", "log_marginal"), marginal, rtol=1e-9)


def test_global_latents_of_the_guide_are_in_the_posterior():
    torch.manual_seed(3)

    def model(x):
        shift = pyro.sample("shift", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + shift[:2], 1.0).to_event(1), obs=x)

    def given(x):
        pyro.sample("shift", dist.Normal(torch.zeros(3), 0.1).to_event(1))

    guide = rv.guides.GaussianGuide(model, lambda x: (x / 2, torch.ones_like(x)), given=given)
    data = to_arviz(model, guide, torch.randn(4, 2), 30, num_globals=6)
    assert values(data, "posterior", "z").shape == (1, 30, 4, 2)
    shift = values(data, "posterior", "shift")
    assert shift.shape == (1, 30, 3) and len(np.unique(shift[0, :, 0])) == 6
    assert values(data, "prior", "shift").shape == (1, 30, 3)
    # Each draw's likelihood is that at its own shift.
    loc = values(data, "posterior", "z")[0] + shift[0, :, None, :2]
    expected = dist.Normal(torch.from_numpy(loc), 1.0).log_prob(
        torch.from_numpy(values(data, "observed_data", "x"))
    )
    np.testing.assert_allclose(values(data, "log_likelihood", "x")[0], expected.sum(-1), rtol=1e-4)


def test_plates_besides_the_data_and_masks_are_respected():
    torch.manual_seed(8)
    x, observed = torch.randn(4, 3, 2), torch.rand(4, 3) < 0.5

    def model(x, observed):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("visits", 3, dim=-2), poutine.mask(mask=observed.mT):
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x.movedim(0, 1))

    guide = rv.guides.GaussianGuide(model, lambda x: (x.mean(1) / 2, torch.ones_like(x[:, 0])))
    data = to_arviz(model, guide, (x, observed), 20, dims={"x": ["visit", "feature"]})
    for group in ("posterior_predictive", "prior_predictive"):
        assert dims_of(data, group) == {"x": ("chain", "draw", "subject", "visit", "feature")}
        assert values(data, group, "x").shape == (1, 20, 4, 3, 2)
    np.testing.assert_array_equal(values(data, "observed_data", "x"), x)
    z = torch.from_numpy(values(data, "posterior", "z")[0])
    terms = dist.Normal(z.unsqueeze(2), 1.0).log_prob(x).sum(-1)  # (20, 4, 3)
    expected = torch.where(observed, terms, 0.0).sum(-1)
    np.testing.assert_allclose(values(data, "log_likelihood", "x")[0], expected, rtol=1e-4, atol=1e-5)


# -- by chains -----------------------------------------------------------------------------------------------


class Conjugate:
    """``θ ~ N(0, τ²)``, ``x_b | θ ~ N(θ, s²)``: the posterior and leave-one-out in closed form."""

    def __init__(self, num=40, tau=2.0, noise=1.3):
        generator = torch.Generator().manual_seed(0)
        self.x = 0.8 + noise * torch.randn(num, 1, generator=generator, dtype=torch.float64)
        self.x[0] = 4.5  # a datum that matters
        self.tau, self.noise = tau, noise

    def model(self, x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(1).double(), self.tau).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, self.noise).to_event(1), obs=x)

    def local_model(self, x):
        """The same after ``z_b ~ N(θ, s²/2)``, ``x_b ~ N(z_b, s²/2)`` is integrated over ``z``."""
        half = self.noise / math.sqrt(2.0)
        theta = pyro.sample("theta", dist.Normal(torch.zeros(1).double(), self.tau).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, half).to_event(1))
            pyro.sample("x", dist.Normal(z, half).to_event(1), obs=x)

    def posterior(self, x):
        precision = 1 / self.tau**2 + len(x) / self.noise**2
        return x.sum() / self.noise**2 / precision, 1 / precision**0.5

    def loo(self):
        terms = []
        for b in range(len(self.x)):
            mean, sd = self.posterior(torch.cat([self.x[:b], self.x[b + 1 :]]))
            terms.append(dist.Normal(mean, math.hypot(sd, self.noise)).log_prob(self.x[b, 0]))
        return torch.stack(terms)

    def chains(self, chains=4, draws=500):
        mean, sd = self.posterior(self.x)
        return {"theta": mean + sd * torch.randn(chains, draws, 1, dtype=torch.float64)}


def loo_of(data, **options):
    found = az.loo(data, pointwise=True, **options)
    pointwise = found.loo_i if hasattr(found, "loo_i") else found.elpd_i
    total = found["elpd_loo"] if hasattr(found, "loo_i") else found.elpd
    return float(total), np.asarray(pointwise).reshape(-1)


def test_loo_of_chains_is_the_exact_one():
    torch.manual_seed(4)
    oracle = Conjugate()
    data = to_arviz(oracle.model, mcmc=oracle.chains(), data=oracle.x)
    assert dims_of(data, "log_likelihood") == {"x": ("chain", "draw", "subject")}
    theta = torch.from_numpy(values(data, "posterior", "theta"))
    expected = dist.Normal(theta, oracle.noise).log_prob(oracle.x[:, 0])
    np.testing.assert_allclose(values(data, "log_likelihood", "x"), expected, rtol=1e-9)
    total, pointwise = loo_of(data)
    exact = oracle.loo().numpy()
    # Of 2000 draws: log p(x_b|θ) varies by 0.2 (0.6 for the far one), so the mean by 0.005 (0.015).
    assert np.abs(pointwise - exact).max() < 0.06 and abs(total - exact.sum()) < 0.15
    assert abs(values(data, "log_likelihood", "x").mean((0, 1)).sum() - exact.sum()) > 0.3  # not by chance


def test_loo_with_local_latents_is_that_of_the_marginal():
    torch.manual_seed(5)
    oracle = Conjugate(num=20)
    half = oracle.noise / math.sqrt(2.0)
    guide = rv.guides.GaussianGuide(
        oracle.local_model,
        lambda x: ((x + 0.8) / 2, torch.full_like(x, 1.2 * half / math.sqrt(2.0))),
        given={"theta": torch.zeros(1).double()},  # replaced by each draw
    )
    chains = oracle.chains(2, 100)
    data = to_arviz(oracle.local_model, guide, oracle.x, 200, mcmc=chains, prior=False)
    assert "integrated out" in data["log_likelihood"]["x"].attrs["note"]
    expected = dist.Normal(chains["theta"], oracle.noise).log_prob(oracle.x[:, 0])
    # Errors of 200 weights whose relative spread is near 0.5.
    assert np.abs(values(data, "log_likelihood", "x") - expected.numpy()).mean() < 0.05
    total, _ = loo_of(data)
    assert total == pytest.approx(float(oracle.loo().sum()), abs=0.5)
    with pytest.raises(ValueError, match="guide of the local latents"):
        to_arviz(oracle.local_model, mcmc=chains, data=oracle.x)


def test_a_model_that_does_not_broadcast_over_draws_is_taken_one_by_one():
    torch.manual_seed(6)
    covariates, y = torch.randn(7, 3), torch.randn(7)

    def model(covariates, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(covariates @ w, 1.0), obs=y)

    chains = {"w": torch.randn(2, 10, 3)}
    data = to_arviz(model, mcmc=chains, data={"covariates": covariates, "y": y})
    expected = dist.Normal(chains["w"] @ covariates.mT, 1.0).log_prob(y)
    np.testing.assert_allclose(values(data, "log_likelihood", "y"), expected, rtol=1e-5)
    assert values(data, "posterior_predictive", "y").shape == (2, 10, 7)

    def summing(covariates, y):  # broadcasts, but to something else: over draws it sums over them
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(w.sum() * torch.ones(7), 1.0), obs=y)

    data = to_arviz(summing, mcmc=chains, data={"covariates": covariates, "y": y})
    expected = dist.Normal(chains["w"].sum(-1, keepdim=True), 1.0).log_prob(y)
    np.testing.assert_allclose(values(data, "log_likelihood", "y"), expected, rtol=1e-5)


def test_pyros_own_chains_and_batched_ones():
    torch.manual_seed(7)
    oracle = Conjugate(num=10)
    nuts = pyro.infer.MCMC(
        pyro.infer.HMC(oracle.model, step_size=0.3, num_steps=3, adapt_step_size=False),
        num_samples=150,
        warmup_steps=20,
        disable_progbar=True,
    )
    nuts.run(oracle.x)

    def density(theta):
        prior = dist.Normal(0.0, oracle.tau).log_prob(theta).sum(-1)
        return prior + dist.Normal(theta, oracle.noise).log_prob(oracle.x[:, 0]).sum(-1)

    start = torch.zeros(20, 1, dtype=torch.float64)
    batched = BatchedMCMC(
        HMC(with_gradient(density), step_size=0.2, num_steps=4), 50, 50, start=start, name="theta"
    )
    batched.run()
    mean, sd = oracle.posterior(oracle.x)
    for mcmc, shape in ((nuts, (1, 150, 1)), (batched, (20, 50, 1))):
        data = to_arviz(oracle.model, mcmc=mcmc, data=oracle.x)
        theta = values(data, "posterior", "theta")
        assert theta.shape == shape and abs(theta.mean() - float(mean)) < 0.5 * sd
        assert values(data, "posterior_predictive", "x").shape == (*shape[:2], 10, 1)
        assert values(data, "sample_stats", "diverging").shape == shape[:2]
        assert not values(data, "sample_stats", "diverging").any()
    assert values(data, "sample_stats", "lp").shape == (20, 50)


# -- refusals, and the brick ---------------------------------------------------------------------------------


def test_what_cannot_be_shown_is_refused(monkeypatch):
    oracle, guide, x = example()
    with pytest.raises(ValueError, match="pass data="):
        to_arviz(oracle.model, guide)
    with pytest.raises(ValueError, match="a guide, or chains"):
        to_arviz(oracle.model, data=x)
    with pytest.raises(ValueError, match="posterior"):
        to_arviz(oracle.model, guide, x, posterior="raw")
    with pytest.raises(ValueError, match="5 names"):
        to_arviz(oracle.model, guide, x, 5, coords={"subject": ["a"]})
    with pytest.raises(ValueError, match="1 names for the shape"):
        to_arviz(oracle.model, guide, x, 5, dims={"x": ["time", "place"]})
    with pytest.raises(ValueError, match=r"coords\['time'\]"):
        to_arviz(oracle.model, guide, x, 5, dims={"x": ["time"]}, coords={"time": [1, 2]})
    conjugate = Conjugate(num=5)
    with pytest.raises(ValueError, match="mcmc: expected draws of every global latent"):
        to_arviz(conjugate.model, mcmc={"other": torch.zeros(1, 5)}, data=conjugate.x)
    with pytest.raises(ValueError, match="mcmc"):
        to_arviz(conjugate.model, mcmc=[1, 2], data=conjugate.x)
    monkeypatch.setattr("riemvae.inference.resampling.LARGEST_RESULT", 100)
    with pytest.raises(ValueError, match="posterior_predictive=False"):
        to_arviz(oracle.model, guide, x, 50, prior=False)


def test_a_name_may_have_other_dimensions_in_another_group():
    data = from_groups(
        {"posterior": {"x": torch.zeros(2, 8, 3)}, "observed_data": {"x": torch.zeros(5, 4)}},
        {"posterior": {"x": ["latent"]}, "observed_data": {"x": ["subject", "time"]}},
        {"latent": [7, 8, 9]},
    )
    assert dims_of(data, "posterior") == {"x": ("chain", "draw", "latent")}
    assert dims_of(data, "observed_data") == {"x": ("subject", "time")}
    assert data["posterior"].coords["latent"].values.tolist() == [7, 8, 9]
