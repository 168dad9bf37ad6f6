"""Trajectories under other covariates against a closed form, and against subject by subject."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from flow_cases import roughen
from torch import nn

from riemvae.longitudinal.counterfactual import contrast, counterfactual, one_hot
from riemvae.longitudinal.flow_chain import FlowChain
from riemvae.longitudinal.model import LongitudinalVAE
from riemvae.longitudinal.ode import OdeFlow
from riemvae.longitudinal.time_flow import time_flow

D, B, T, S = 2, 4, 3, 5
SHAPE = (1, 2, 3)


def model_of(dynamics):
    decoder = nn.Sequential(nn.Linear(D, math.prod(SHAPE)), nn.Unflatten(-1, SHAPE)).double()
    return LongitudinalVAE(decoder, dynamics).double()


def treated():
    """``z' = dose``: the latents move along their first axis at the speed of the dose."""
    speed = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return model_of(OdeFlow(lambda z, t, c: c * speed, D))


def draws():
    torch.manual_seed(0)
    u = torch.randn(S, B, D, dtype=torch.float64)
    return u, 2.0 * torch.rand(B, T, dtype=torch.float64), torch.rand(B, 1, dtype=torch.float64)


def test_trajectories_are_the_decoders_means_subject_by_subject():
    torch.manual_seed(0)
    model = model_of(roughen(time_flow(D, covariates=1, hidden=(8,))))
    u, times, covariates = draws()
    found = counterfactual(model, u, times, covariates)
    assert found.shape == (S, B, T, *SHAPE)
    for b in range(B):
        for v in range(T):
            z = model.dynamics.unroll(u[:, b : b + 1], times[b : b + 1, v : v + 1], covariates[b : b + 1]).z
            torch.testing.assert_close(found[:, b, v], model.decoder(z[:, 0, 0]), rtol=0, atol=1e-9)
    for chunk_size in (1, 7, 10_000):
        parts = counterfactual(model, u, times, covariates, chunk_size=chunk_size)
        torch.testing.assert_close(parts, found, rtol=0, atol=1e-12)
    torch.testing.assert_close(counterfactual(model, u[2], times, covariates), found[2], rtol=0, atol=1e-12)


def test_one_setting_and_one_row_of_times_are_for_all_subjects():
    model = treated()
    u, times, covariates = draws()
    found = counterfactual(model, u, times[0], covariates[0])
    expected = counterfactual(model, u, times[:1].expand(B, T), covariates[:1].expand(B, 1))
    assert torch.equal(found, expected)


def test_numbered_visits_need_no_times():
    chain = FlowChain([torch.distributions.AffineTransform(1.0, 2.0)], D)
    model = model_of(chain)
    u, _, _ = draws()
    found = counterfactual(model, u)
    assert found.shape == (S, B, 2, *SHAPE)
    torch.testing.assert_close(
        found[:, :, 1], model.decoder((1.0 + 2.0 * u).reshape(-1, D)).unflatten(0, (S, B))
    )


def test_a_contrast_is_of_the_same_draws():
    """The dose moves the first axis by ``dose · t``: the difference is the decoder's column alone."""
    model = treated()
    u, times, dose = draws()
    effect = contrast(model, u, times, dose, dose + 0.5)
    column = model.decoder[0].weight[:, 0].reshape(SHAPE)
    exact = 0.5 * times[..., None, None, None] * column
    torch.testing.assert_close(effect.difference, exact.expand(S, *exact.shape), rtol=0, atol=1e-12)
    torch.testing.assert_close(effect.mean, exact, rtol=0, atol=1e-12)
    for end in effect.interval(0.9):  # of no width, however far the subjects' draws are apart
        torch.testing.assert_close(end, exact, rtol=0, atol=1e-12)
    assert effect.first.std(0).max() > 0.2
    assert torch.equal(effect.first, counterfactual(model, u, times, dose))


def test_intervals_are_those_of_a_further_draw():
    torch.manual_seed(0)
    model = model_of(roughen(time_flow(D, covariates=1, hidden=(8,))))
    u = torch.randn(101, B, D, dtype=torch.float64)
    _, times, dose = draws()
    effect = contrast(model, u, times, dose, dose + 1.0, chunk_size=100)
    for level in (0.5, 0.9):
        low, high = effect.interval(level)
        tails = 0.5 * (1.0 - level), 0.5 * (1.0 + level)
        expected = np.quantile(effect.difference.detach().numpy(), tails, axis=0, method="weibull")
        np.testing.assert_allclose(low.detach(), expected[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(high.detach(), expected[1], rtol=0, atol=1e-12)
        assert (high > low).all()
    one = contrast(model, u[:1], times, dose, dose + 1.0)
    assert torch.equal(one.interval()[0], one.mean) and torch.equal(one.interval()[1], one.mean)


def test_gradients_reach_the_covariates():
    u, times, dose = draws()
    counterfactual(treated(), u, times, dose.requires_grad_()).sum().backward()
    assert dose.grad.abs().min() > 0


def test_categories_become_indicators():
    assert one_hot(torch.tensor([2, 0, 2])).tolist() == [[0, 1], [1, 0], [0, 1]]
    assert one_hot(torch.tensor([2, 0]), categories=[0, 1, 2]).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert one_hot(["b", None], categories=["a", "b", None]).tolist() == [[0, 1, 0], [0, 0, 1]]
    assert one_hot(["x"]).dtype == torch.get_default_dtype()
    assert one_hot([], categories=["a", "b"]).shape == (0, 2)
    assert one_hot(["b", None, "a"]).tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    with pytest.raises(ValueError, match=r"^values: expected values of one kind.*pass categories="):
        one_hot(["a", 1])
    with pytest.raises(ValueError, match="'c'"):
        one_hot(["a", "c"], categories=["a", "b"])
    with pytest.raises(ValueError, match="categories"):
        one_hot(["a"], categories=["a", "a"])


def test_what_does_not_fit_is_refused():
    model = treated()
    u, times, dose = draws()
    with pytest.raises(ValueError, match="model"):
        counterfactual(nn.Linear(1, 1), u, times, dose)
    for bad in (u[0, 0], u[..., :1]):
        with pytest.raises(ValueError, match="z_base"):
            counterfactual(model, bad, times, dose)
    with pytest.raises(ValueError, match="times"):
        counterfactual(model, u, times[:2], dose)
    with pytest.raises(ValueError, match="covariates"):
        counterfactual(model, u, times, dose[:2])
    with pytest.raises(ValueError, match="chunk_size"):
        counterfactual(model, u, times, dose, chunk_size=0)
    for bad in (u[0], u[:0]):
        with pytest.raises(ValueError, match="z_base"):
            contrast(model, bad, times, dose, dose)
    with pytest.raises(ValueError, match="level"):
        contrast(model, u, times, dose, dose).interval(1.0)


def test_a_model_without_covariates_shows_no_effect_of_them():
    model = model_of(time_flow(2, hidden=(8,)))
    u, times = draws()[0], torch.linspace(0.0, 1.0, 5).double()
    with pytest.raises(ValueError, match=r"^covariates: expected None for a model that takes none"):
        contrast(model, u, times, torch.zeros(1), torch.ones(1))
    counterfactual(model, u, times)


def test_lists_are_taken():
    model, u = treated(), draws()[0]
    lists = contrast(model, u, [0.0, 1.0], [0.0], [1])
    double = {"dtype": torch.float64}
    settings = [torch.tensor(values, **double) for values in ([0.0, 1.0], [0.0], [1.0])]
    assert torch.equal(lists.mean, contrast(model, u, *settings).mean)
