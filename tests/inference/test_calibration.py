"""Simulation-based calibration: uniform for the exact posterior, planted faults found and named."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian
from scipy import stats

import riemvae as rv
from riemvae.inference.calibration import (
    bins_for,
    ecdf_band,
    holm,
    simulation_based_calibration,
    uniformity_p_value,
)


def posterior(oracle, width=1.0, shift=0.0, correlated=True):
    """The exact posterior, or one with a planted fault."""
    tril = torch.linalg.cholesky(oracle.covariance)
    if not correlated:
        tril = torch.diag_embed(oracle.covariance.diagonal().sqrt())
    sd = oracle.covariance.diagonal().sqrt()

    def encoder(x):
        return dist.MultivariateNormal(oracle.posterior_mean(x) + shift * sd, scale_tril=width * tril)

    return encoder


def calibrate(oracle, num=400, draws=39, **options):
    model = oracle.vae()
    guide = rv.guides.GaussianGuide(model, posterior(oracle, **options))
    return simulation_based_calibration(
        model, guide, num_simulations=num, num_draws=draws, chunk_size=1 << 15
    )


# -- uniformity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "draws"), [(50, 9), (200, 99)])
def test_the_band_of_the_ecdf_has_its_level_and_agrees_with_the_p_value(num, draws):
    torch.manual_seed(0)
    sets = torch.randint(draws + 1, (2000, num))
    places, lower, upper = ecdf_band(num, draws, 0.1)
    cut = np.round(places * (draws + 1))
    counts = (sets.numpy()[:, :, None] < cut).mean(1)
    outside = ((counts < lower - 1e-9) | (counts > upper + 1e-9)).any(1)
    p_values = np.array([uniformity_p_value(ranks, draws) for ranks in sets])
    # 10 % of 2000, with a standard error of 0.7 %; counts are discrete, so the level is at most 10 %.
    assert 0.06 < outside.mean() < 0.125
    assert 0.06 < (p_values <= 0.1).mean() < 0.125
    assert (outside == (p_values < 0.1)).mean() > 0.99
    # The p-value is (nearly) uniform: Kolmogorov's distance at 2000 is 0.044 at the level 0.1 %.
    assert stats.kstest(p_values, "uniform").statistic < 0.06


def test_the_number_of_bins_divides_the_ranks():
    for num, draws in ((1000, 99), (100, 19), (10_000, 127), (20, 9)):
        bins = bins_for(num, draws)
        assert (draws + 1) % bins == 0 and num / bins >= 5
    assert bins_for(1000, 99) == 25
    with pytest.raises(ValueError, match="take num_draws=109"):
        bins_for(1000, 100)  # 101 is a prime


def test_holm_by_hand():
    assert holm([0.01, 0.5, 0.02]) == pytest.approx([0.03, 0.5, 0.04])
    assert holm([0.4, 0.6, 0.9]) == pytest.approx([1.0, 1.0, 1.0])


# -- exact guides --------------------------------------------------------------------------------------------


def test_false_alarms_for_the_exact_posterior_come_at_their_level():
    torch.manual_seed(1)
    oracle = LinearGaussian(2)
    results = [calibrate(oracle, num=80, draws=19) for _ in range(200)]
    # Quantities are dependent, and Holm's level is at most 5 %: 10 of 200, with a standard deviation of 3.1.
    assert 1 <= sum(not r.calibrated for r in results) <= 20
    for name in ("z[0]", "z[1]", "|z|", "log p(x, z)"):
        p_values = np.array([r[name].p_value for r in results])
        chi2 = np.array([r[name].chi2_p_value for r in results])
        assert 1 <= (p_values < 0.05).sum() <= 21 and 1 <= (chi2 < 0.05).sum() <= 21
        # Kolmogorov's distance of 200: 0.138 at the level 0.1 %; the p-values are a little discrete.
        assert stats.kstest(p_values, "uniform").statistic < 0.15
    # All ranks together: 16,000 over 20 values; the 99.99 % quantile of χ² at 19 is 50.8.
    ranks = torch.cat([r.ranks for r in results])
    counts = torch.bincount(ranks[:, 0], minlength=20).double()
    assert ((counts - 800) ** 2 / 800).sum() < 50.8


def test_a_users_function_is_simulated_in_the_shape_of_its_data():
    torch.manual_seed(2)
    slope = torch.tensor([1.0, -2.0])

    def model(covariate, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z + (covariate @ slope).unsqueeze(-1), 0.5).to_event(1), obs=y)

    def encoder(covariate, y):
        gain = 1 / (1 + 0.25)
        return gain * (y - (covariate @ slope).unsqueeze(-1)), torch.full_like(y, math.sqrt(0.25 * gain))

    guide = rv.guides.GaussianGuide(model, encoder)
    data = {"covariate": 3 * torch.randn(300, 2), "y": torch.randn(300, 1)}
    found = simulation_based_calibration(model, guide, data, 600, 49, seed=0)
    assert len(found) == 600 and found.calibrated
    # Were the covariates not kept row by row, the truth would lie nowhere near.
    late = rv.guides.GaussianGuide(model, lambda covariate, y: encoder(covariate.flip(0), y))
    assert not simulation_based_calibration(model, late, data, 300, 49).calibrated


def test_global_latents_are_held_at_one_value_in_simulation_and_guide():
    torch.manual_seed(3)

    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + shift, 1.0).to_event(1), obs=x)

    guide = rv.guides.GaussianGuide(
        model, lambda x: ((x - 4.0) / 2, torch.full_like(x, 0.5**0.5)), given={"shift": torch.tensor(4.0)}
    )
    assert simulation_based_calibration(model, guide, torch.randn(400, 1), 400, 39).calibrated


def test_a_simulator_and_statistics_of_ones_own():
    torch.manual_seed(4)
    oracle = LinearGaussian(2)

    def simulate(n):
        z = torch.randn(n, 2, dtype=torch.float64)
        return z, z @ oracle.weight.mT + oracle.bias + oracle.scale * torch.randn(n, 4, dtype=torch.float64)

    guide = rv.guides.GaussianGuide(oracle.model, posterior(oracle, width=0.7))
    found = simulation_based_calibration(
        oracle.model,
        guide,
        num_simulations=300,
        num_draws=39,
        simulate=simulate,
        statistics={"sum": lambda z, x: z.sum(-1), "constant": lambda z, x: 0.0 * z[..., 0] + 0.0 * x[:, 0]},
    )
    assert found.names == ["z[0]", "z[1]", "|z|", "log p(x, z)", "sum", "constant"]
    assert "narrow" in found["sum"].shape
    # All draws tie with the truth, and a tie is broken at random: uniform.
    assert found["constant"].adjusted > 0.01 and found["constant"].shape == "as uniform"


# -- planted faults ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ({"width": 0.7}, "U: the guide is too narrow (overconfident)"),
        ({"width": 1.4}, "hump: the guide is too wide (underconfident)"),
        ({"shift": -0.4}, "slope: the guide is too low: the truth lies above it"),
        ({"shift": 0.4}, "slope: the guide is too high: the truth lies below it"),
    ],
)
def test_planted_faults_are_found_and_named(fault, word):
    torch.manual_seed(5)
    found = calibrate(LinearGaussian(2), **fault)
    assert not found.calibrated and "NOT calibrated" in repr(found)
    for name in ("z[0]", "z[1]"):
        assert found[name].adjusted < 0.01 and found[name].chi2_p_value < 0.01
        assert found[name].shape.startswith(word)
    # The histogram has that shape.
    counts = found.histogram()[:, 0].double()
    third = len(counts) // 3
    ends, middle = torch.cat([counts[:third], counts[-third:]]).mean(), counts[third:-third].mean()
    if "width" in fault:
        assert (ends > middle) == (fault["width"] < 1)
    else:
        assert (counts[-third:].mean() > counts[:third].mean()) == (fault["shift"] < 0)
    places, curve, lower, upper = found.ecdf()
    assert curve.shape == (len(places), 4) and bool(((curve[:, 0] < lower) | (curve[:, 0] > upper)).any())


def test_a_wrong_correlation_is_found_though_coordinates_are_uniform():
    torch.manual_seed(6)
    oracle = LinearGaussian(2)
    oracle.weight = torch.tensor([[1.0, 0.9], [1.0, 1.1], [0.0, 0.1], [0.1, 0.0]], dtype=torch.float64)
    precision = torch.eye(2, dtype=torch.float64) + oracle.weight.mT @ oracle.weight / oracle.scale**2
    oracle.covariance = torch.linalg.inv(precision)
    assert calibrate(oracle).calibrated
    found = calibrate(oracle, correlated=False)
    assert found["z[0]"].adjusted > 0.01 and found["z[1]"].adjusted > 0.01
    assert found["log p(x, z)"].adjusted < 0.01


def test_resampling_by_the_weights_calibrates_a_wide_guide():
    torch.manual_seed(7)
    oracle = LinearGaussian(2)
    model = oracle.vae()
    guide = rv.guides.GaussianGuide(model, posterior(oracle, width=1.4, shift=0.3))
    options = {"num_simulations": 400, "num_draws": 39, "chunk_size": 1 << 15}
    assert not simulation_based_calibration(model, guide, **options).calibrated
    found = simulation_based_calibration(model, guide, weights=True, **options)
    assert found.calibrated and found.khat.shape == (400,) and float(found.khat.median()) < 0.5


# -- refusals ------------------------------------------------------------------------------------------------


def test_what_cannot_be_calibrated_is_refused():
    oracle = LinearGaussian(2)
    guide = rv.guides.GaussianGuide(oracle.model, oracle.encoder)
    with pytest.raises(ValueError, match="simulate: expected a way to draw data"):
        simulation_based_calibration(oracle.model, guide)
    with pytest.raises(ValueError, match="num_draws"):
        simulation_based_calibration(oracle.vae(), guide, num_draws=100)
    with pytest.raises(ValueError, match="level"):
        simulation_based_calibration(oracle.vae(), guide, level=1.0)
    with pytest.raises(ValueError, match=r"statistics\['s'\]"):
        simulation_based_calibration(
            oracle.model, guide, oracle.data(5), 10, 9, statistics={"s": lambda z, x: z}
        )

    def scaled(x):
        return oracle.model(2 * x)

    with pytest.raises(ValueError, match="none of the 1 arguments as they are"):
        simulation_based_calibration(
            scaled, rv.guides.GaussianGuide(scaled, oracle.encoder), oracle.data(9), 10, 9
        )
    with pytest.raises(ValueError, match="latent"):
        simulation_based_calibration(oracle.model, guide, oracle.data(5), 10, 9, latent="w")


def test_too_few_proposals_are_named_as_such():
    oracle = LinearGaussian(2)
    model = oracle.vae()
    guide = rv.guides.GaussianGuide(model, posterior(oracle, width=4.0))
    options = {"num_simulations": 40, "num_draws": 19, "weights": True, "seed": 0}
    # Weights of a guide four times too wide in two dimensions are worth about an eighth of it.
    with pytest.warns(UserWarning, match=r"below num_draws=19 for .* raise num_proposals \(here 60\)"):
        simulation_based_calibration(model, guide, num_proposals=60, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulation_based_calibration(model, guide, num_proposals=1000, **options)
