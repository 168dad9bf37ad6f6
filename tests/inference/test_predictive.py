"""Posterior draws by resampling and what they predict: exact moments, quadrature, any Pyro model."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, Nonlinear, make_guide
from pyro import poutine

import riemvae as rv
from riemvae.inference import resampling
from riemvae.inference.predictive import posterior_predictive, predictive_check, prior_predictive


def covariance(draws):
    """Of draws ``(S, B, d)``, ``(B, d, d)``."""
    centred = draws - draws.mean(0)
    return torch.einsum("sbi,sbj->bij", centred, centred) / (len(draws) - 1)


# -- posterior draws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian", "hamiltonian", "riemannian centroid"])
@pytest.mark.parametrize("chunk_size", [1 << 16, 500])
def test_resampled_draws_have_the_exact_posteriors_moments(name, chunk_size):
    # The guide is shifted by half a standard deviation and 1.3 times as wide: its own moments are far off.
    torch.manual_seed(0)
    oracle = LinearGaussian(2)
    x = oracle.data(3)

    def encoder(x):
        return oracle.encoder(x, widening=1.3, shift=0.5)

    model = oracle.vae()
    guide = make_guide(name, model, encoder, 2, num_steps=1, step_size=0.05)
    options = {"sites": ["z"], "chunk_size": chunk_size}
    z = posterior_predictive(model, guide, x, 3000, num_proposals=12000, **options)["z"]
    assert z.shape == (3000, 3, 2)
    # Standard errors: 1/√3000 of the draws and as much again, at most, of the proposals' weights.
    sd = oracle.covariance.diagonal().sqrt()
    assert ((z.mean(0) - oracle.posterior_mean(x)) / sd).abs().max() < 4 * 1.2 / math.sqrt(3000)
    assert (covariance(z) - oracle.covariance).abs().max() < 4 * 1.2 * math.sqrt(2 / 3000) * sd.max() ** 2
    raw = posterior_predictive(model, guide, x, 3000, resample=False, **options)["z"]
    assert ((raw.mean(0) - oracle.posterior_mean(x)) / sd).min() > 0.3


@pytest.mark.parametrize("d", [1, 2])
def test_resampled_draws_agree_with_quadrature_on_a_curved_decoder(d):
    torch.manual_seed(1)
    oracle = Nonlinear(d)
    axis = torch.linspace(-8, 8, 400, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * d).reshape(-1, d)
    with torch.no_grad():
        density = dist.Normal(0.0, 1.0).log_prob(grid).sum(-1)
        decoded = oracle.decoder(grid)
        density = density + dist.Normal(decoded, oracle.scale).log_prob(oracle.x).sum(-1)
    share = torch.softmax(density, 0).unsqueeze(-1)
    mean, second = (share * grid).sum(0), (share * grid.square()).sum(0)
    guide = rv.guides.GaussianGuide(oracle.model, oracle.encoder)
    found = posterior_predictive(oracle.model, guide, oracle.x, 4000, num_proposals=16000, sites=["z", "x"])
    z, x = found["z"][:, 0], found["x"][:, 0]
    sd = (second - mean.square()).sqrt()
    assert ((z.mean(0) - mean) / sd).abs().max() < 5 / math.sqrt(4000)
    assert ((z.square().mean(0) - second) / second).abs().max() < 5 * 1.5 / math.sqrt(4000)
    # E[x̃ | x] by the same quadrature.
    predicted = (share * decoded).sum(0)
    assert ((x.mean(0) - predicted) / x.std(0)).abs().max() < 5 / math.sqrt(4000)


def test_weights_that_pass_by_in_chunks_are_picked_as_one_set():
    torch.manual_seed(0)
    num, data = 40_000, 2
    log_weights = torch.tensor([0.0, 1.0, -2.0, 0.5, -math.inf, 1.5, -1.0, 0.3], dtype=torch.float64)
    log_weights = torch.stack([log_weights, log_weights.flip(0) + 900.0], -1)  # no overflow
    places = resampling.Places(num)
    for rows in torch.arange(8).split(3):
        values = torch.stack([rows, rows + 10], -1)
        places.add(log_weights[rows], {"z": values, "w": values.unsqueeze(-1).expand(-1, -1, 2)})
    assert torch.equal(places.values["w"], places.values["z"].unsqueeze(-1).expand(-1, -1, 2))
    for b in range(data):
        index = places.values["z"][:, b] - 10 * b
        assert torch.equal(places.log_weights[:, b], log_weights[index, b])
        counts = torch.bincount(index, minlength=8).double()
        expected = num * torch.softmax(log_weights[:, b], 0)
        some = expected > 0
        assert float(counts[~some].sum()) == 0
        # Pearson's statistic of 7 cells: the 99.99 % quantile at 6 degrees of freedom is 27.9.
        assert float(((counts - expected)[some].square() / expected[some]).sum()) < 27.9


def test_places_wait_for_a_first_weight():
    torch.manual_seed(0)
    places = resampling.Places(10)
    for value, weight in ((0.0, -math.inf), (1.0, -5.0), (2.0, -math.inf)):
        places.add(torch.full((2, 1), weight).double(), {"z": torch.full((2, 1), value)})
    assert places.values["z"].unique().tolist() == [1.0]


# -- predictions -------------------------------------------------------------------------------------------


def test_predictions_have_the_exact_moments():
    torch.manual_seed(2)
    oracle = LinearGaussian(2)
    x = oracle.data(3)
    guide = rv.guides.GaussianGuide(oracle.model, lambda x: oracle.encoder(x, 1.3, 0.5))
    draws = posterior_predictive(oracle.model, guide, x, 4000, num_proposals=16000)["x"]
    assert draws.shape == (4000, 3, 4)
    mean = oracle.posterior_mean(x) @ oracle.weight.mT + oracle.bias
    exact = oracle.weight @ oracle.covariance @ oracle.weight.mT + oracle.scale**2 * torch.eye(4)
    sd = exact.diagonal().sqrt()
    assert ((draws.mean(0) - mean) / sd).abs().max() < 4.5 * 1.1 / math.sqrt(4000)
    assert (covariance(draws) - exact).abs().max() < 4.5 * 1.1 * math.sqrt(2 / 4000) * sd.max() ** 2


def test_the_prior_predictive_has_the_exact_moments():
    torch.manual_seed(3)
    oracle = LinearGaussian(2)
    exact = oracle.weight @ oracle.weight.mT + oracle.scale**2 * torch.eye(4)
    for draws in (
        prior_predictive(oracle.vae(), num_samples=2000, size=4),
        prior_predictive(oracle.model, oracle.data(4), 2000),
    ):
        assert draws["z"].shape == (2000, 4, 2) and draws["x"].shape == (2000, 4, 4)
        x = draws["x"].flatten(0, 1)
        assert (x.mean(0) - oracle.bias).abs().max() < 4.5 * exact.diagonal().sqrt().max() / math.sqrt(8000)
        assert (torch.cov(x.mT) - exact).abs().max() < 4.5 * math.sqrt(2 / 8000) * exact.diagonal().max()
        # The latents are those that the data were drawn with: their covariance is the weight.
        cross = x.mT @ draws["z"].flatten(0, 1) / 8000
        assert (cross - oracle.weight).abs().max() < 4.5 * 1.5 / math.sqrt(8000)


def nested_model(x, observed):
    """Visits in a plate outside the data's, a mask, a covariate, two observed sites and a positive latent."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 0.5).to_event(1))
        pyro.deterministic("total", z.sum(-1))
        with pyro.plate("visits", 3, dim=-2), poutine.mask(mask=observed.mT):
            pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x.movedim(0, 1))
        pyro.sample("y", dist.Normal(10.0 * z[..., 0], 0.1), obs=torch.zeros(len(x)))


def test_nested_plates_masks_and_several_sites():
    torch.manual_seed(4)
    x = torch.rand(5, 3, 2) + 0.5
    observed = torch.rand(5, 3) < 0.6
    guide = rv.guides.GaussianGuide(nested_model, lambda x: (x.mean(1).log(), torch.full_like(x[:, 0], 0.3)))
    data = (x, observed)
    found = posterior_predictive(nested_model, guide, data, 40, resample=False)
    assert {k: tuple(v.shape) for k, v in found.items()} == {"x": (40, 5, 3, 2), "y": (40, 5)}
    found = posterior_predictive(
        nested_model, guide, data, 40, resample=False, sites=["x", "z", "total", "y"]
    )
    z = found["z"]
    assert bool((z > 0).all()) and (found["total"] - z.sum(-1)).abs().max() < 1e-6
    # The prediction of each datum and visit belongs to the same draw of z: 0.1 apart.
    assert (found["x"] - z.unsqueeze(2)).abs().max() < 0.6 and (found["y"] - 10 * z[..., 0]).abs().max() < 0.6
    assert (found["x"] - z.unsqueeze(2)).std() == pytest.approx(0.1, rel=0.1)
    prior = prior_predictive(nested_model, data, 30)
    assert {k: tuple(v.shape) for k, v in prior.items()} == {
        "z": (30, 5, 2),
        "x": (30, 5, 3, 2),
        "y": (30, 5),
    }
    assert (prior["x"] - prior["z"].unsqueeze(2)).abs().max() < 0.6


def test_a_site_that_is_not_named_stays_as_it_was_observed():
    torch.manual_seed(0)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            first = pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)
            pyro.sample("y", dist.Normal(100 + first, 0.1).to_event(1), obs=y)

    data = (torch.full((4, 1), 7.0), torch.zeros(4, 1))
    guide = rv.guides.GaussianGuide(model, lambda x: (x, torch.full_like(x, 0.1)))
    alone = posterior_predictive(model, guide, data, 50, resample=False, sites=["y"])["y"]
    assert (alone - 107).abs().max() < 1  # at the observed x
    both = posterior_predictive(model, guide, data, 50, resample=False)
    assert (both["y"] - 100 - both["x"]).abs().max() < 1  # at the drawn one


def test_global_latents_are_drawn_from_their_guide():
    torch.manual_seed(5)

    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 0.1).to_event(1))
            pyro.sample("x", dist.Normal(z + shift, 0.1).to_event(1), obs=x)

    def given(x):
        pyro.sample("shift", dist.Normal(3.0, 0.5))

    def encoder(x):
        return torch.zeros_like(x), torch.full_like(x, 0.1)

    x = torch.full((30, 1), 3.0)
    guide = rv.guides.GaussianGuide(model, encoder, given=given)
    draws = posterior_predictive(model, guide, x, 400, resample=False, num_globals=200, chunk_size=4000)["x"]
    # Half a unit of spread, shared by the data of a draw: means over 30 data vary as the shift does.
    assert draws.mean((1, 2)).std() == pytest.approx(0.5, rel=0.2)
    assert draws.mean() == pytest.approx(3.0, abs=0.15)
    fixed = rv.guides.GaussianGuide(model, encoder, given={"shift": torch.tensor(3.0)})
    draws = posterior_predictive(model, fixed, x, 400, resample=False, chunk_size=4000)["x"]
    assert draws.mean((1, 2)).std() < 0.05
    prior = prior_predictive(model, x, 200)
    assert prior["shift"].shape == (200,) and prior["x"].shape == (200, 30, 1)
    assert (prior["x"].mean((1, 2)) - prior["shift"]).abs().max() < 0.2


def test_the_seed_fixes_the_draws_and_leaves_the_generator():
    oracle = LinearGaussian(2)
    guide = rv.guides.GaussianGuide(oracle.model, oracle.encoder)
    x = oracle.data(4)
    torch.manual_seed(9)
    first = posterior_predictive(oracle.model, guide, x, 10, seed=1)["x"]
    after = torch.rand(1)
    torch.manual_seed(9)
    assert torch.equal(after, torch.rand(1))
    torch.testing.assert_close(posterior_predictive(oracle.model, guide, x, 10, seed=1)["x"], first)
    assert not torch.equal(posterior_predictive(oracle.model, guide, x, 10, seed=2)["x"], first)


def test_a_guide_too_far_from_the_posterior_is_warned_of():
    torch.manual_seed(0)
    oracle = LinearGaussian(2)
    guide = rv.guides.GaussianGuide(oracle.model, lambda x: oracle.encoder(x, 0.3, 2.0))
    with pytest.warns(UserWarning, match="for 4 of 4 data: their resampled draws"):
        posterior_predictive(oracle.model, guide, oracle.data(4), 50)


def test_draws_that_diverged_are_never_kept():
    torch.manual_seed(6)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.factor("lost", torch.where(z[..., 0] > 0, -math.inf, 0.0))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.zeros(3, 1)
    guide = rv.guides.GaussianGuide(model, lambda x: (x, torch.ones_like(x)))
    for resample in (True, False):
        z = posterior_predictive(model, guide, x, 200, resample=resample, sites=["z"])["z"]
        assert bool((z <= 0).all())
    far = rv.guides.GaussianGuide(model, lambda x: (x + 50, torch.ones_like(x)))
    with pytest.raises(ValueError, match="none for 3 of 3 data"):
        posterior_predictive(model, far, x, 20)


def test_what_cannot_be_predicted_is_refused(monkeypatch):
    oracle = LinearGaussian(2)
    guide = rv.guides.GaussianGuide(oracle.model, oracle.encoder)
    x = oracle.data(4)
    with pytest.raises(ValueError, match=r"sites: expected names among.*'w'"):
        posterior_predictive(oracle.model, guide, x, 5, sites=["w"])
    with pytest.raises(ValueError, match="num_proposals"):
        posterior_predictive(oracle.model, guide, x, 50, num_proposals=20)
    with pytest.raises(ValueError, match="pass data="):
        prior_predictive(oracle.model)
    with pytest.raises(ValueError, match="size"):
        prior_predictive(oracle.vae(), x, size=3)
    monkeypatch.setattr(resampling, "LARGEST_RESULT", 100)
    with pytest.raises(ValueError, match=r"at most 100 numbers.*predictive_check"):
        posterior_predictive(oracle.model, guide, x, 50)
    with pytest.raises(ValueError, match="at most 100 numbers"):
        prior_predictive(oracle.model, x, 50)


# -- checks ------------------------------------------------------------------------------------------------


def test_tail_probabilities_are_the_exact_ones():
    torch.manual_seed(7)
    oracle = LinearGaussian(2)
    x = oracle.data(6)
    guide = rv.guides.GaussianGuide(oracle.model, lambda x: oracle.encoder(x, 1.3, 0.5))
    check = predictive_check(oracle.model, guide, x, lambda x: x.sum(-1), 4000, num_proposals=16000)
    mean = (oracle.posterior_mean(x) @ oracle.weight.mT + oracle.bias).sum(-1)
    exact = oracle.weight @ oracle.covariance @ oracle.weight.mT + oracle.scale**2 * torch.eye(4)
    z = (x.sum(-1) - mean) / exact.sum().sqrt()
    torch.testing.assert_close(check.p_value, 1 - dist.Normal(0.0, 1.0).cdf(z), atol=4.5 * 0.5 / 60, rtol=0)
    # The mean over the set: independent data, so the variance is a sixth.
    whole = (x.sum(-1) - mean).mean() / (exact.sum() / 6).sqrt()
    assert check.set_p_value == pytest.approx(float(1 - dist.Normal(0.0, 1.0).cdf(whole)), abs=4.5 * 0.5 / 60)
    assert len(check) == 6 and check.observed.shape == (6,) and check.predicted.shape == (4000, 6)
    assert "PredictiveCheck('x'" in repr(check)


def test_a_discrepancy_sees_the_same_latents_on_both_sides():
    torch.manual_seed(8)
    oracle = LinearGaussian(2)
    x = oracle.data(400)

    def squares(x, z):
        return (x - z @ oracle.weight.mT - oracle.bias).square().sum(-1)

    guide = rv.guides.GaussianGuide(oracle.model, oracle.encoder)
    good = predictive_check(oracle.model, guide, x, squares, 100, latent="z")
    # Of the true model, the residuals are a χ² of 4 on both sides.
    assert good.predicted.mean() == pytest.approx(4 * 0.7**2, rel=0.03)
    assert good.observed.shape == (100, 400) and 0.02 < good.set_p_value < 0.98
    noisy = predictive_check(
        oracle.model, guide, x + 0.5 * torch.randn(x.shape, dtype=x.dtype), squares, 100, latent="z"
    )
    assert noisy.set_p_value < 0.01


def test_ties_count_half_and_statistics_are_checked():
    torch.manual_seed(0)
    oracle = LinearGaussian(2)
    guide = rv.guides.GaussianGuide(oracle.model, oracle.encoder)
    x = oracle.data(3)
    check = predictive_check(oracle.model, guide, x, lambda x: torch.zeros(x.shape[:2]))
    assert check.set_p_value == 0.5 and check.p_value.tolist() == [0.5] * 3 and check.extreme == 0
    with pytest.raises(ValueError, match="one number a datum"):
        predictive_check(oracle.model, guide, x, lambda x: x)
    with pytest.raises(ValueError, match="site: expected one of the observed sites"):
        predictive_check(oracle.model, guide, x, lambda x: x, site="w")
