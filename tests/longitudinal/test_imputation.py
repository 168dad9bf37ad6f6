"""Draws of the subjects' latents and what they fill in, where the exact answers are Gaussian."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from longitudinal_oracles import AffineSequences
from torch import nn
from torch.distributions import AffineTransform

import riemvae as rv
from riemvae.guides import GaussianGuide
from riemvae.likelihoods import Bernoulli, Gaussian
from riemvae.longitudinal import (
    AnchoredGuide,
    FlowChain,
    GaussianProcessEncoder,
    LongitudinalVAE,
    VisitLatents,
)
from riemvae.longitudinal.clustering import cluster_trajectories, fit_mixture, fit_motions, posterior_means
from riemvae.longitudinal.dynamics import Dynamics, Trajectory
from riemvae.longitudinal.generation import generate
from riemvae.longitudinal.imputation import Imputation, central_interval, imputation_error, impute
from riemvae.longitudinal.posterior_draws import METHODS, LatentDraws, best_candidate, draw_posterior
from riemvae.longitudinal.subject_batch import SubjectBatch
from riemvae.longitudinal.time_flow import time_flow
from riemvae.longitudinal.trajectories import conditional_trajectories
from riemvae.priors import GaussianProcessPrior, MixturePrior

SEEN = torch.tensor(
    [
        [True, False, True, False],
        [False, True, False, False],
        [True, True, True, True],
        [False, True, True, True],
    ]
)
ORACLE = AffineSequences()


class ExactEncoder(nn.Module):
    """The posterior itself: the product of one Gaussian expert a visit with the prior, full covariance."""

    def __init__(self, oracle):
        super().__init__()
        self.oracle = oracle
        self.calls = []

    def forward(self, x, observed, pixel_mask, times, covariates):
        self.calls.append(self.training)
        found = [self.oracle.posterior(row, seen) for row, seen in zip(x, observed)]
        return dist.MultivariateNormal(torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found]))


def anchored(oracle=ORACLE, widening=1.0):
    model, encode = oracle.model(), oracle.visit_posterior()

    def widened(x):
        loc, scale = encode(x)
        return loc, widening * scale

    return model, AnchoredGuide(model, widened)


def whitened_error(oracle, x, mask, mean):
    """How far means of draws lie from the exact ones, in posterior deviations."""
    errors = []
    for b in range(len(x)):
        exact, cov = oracle.posterior(x[b], mask[b])
        errors.append(torch.linalg.solve(torch.linalg.cholesky(cov), mean[b] - exact))
    return torch.stack(errors)


# -- draws of the latent -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [False, True])
def test_importance_has_the_moments_of_the_posterior(pixels):
    x = ORACLE.sample(4)
    model, guide = anchored(widening=2.0)
    data, mask = {"x": x, "observed": SEEN}, SEEN[..., None].expand_as(x)
    if pixels:
        data["pixel_mask"] = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.7
        mask = mask & data["pixel_mask"]
    draws = draw_posterior(model, guide, data, 4000, seed=0)
    assert draws.z_0.shape == (4000, 4, 2) and (draws.ess > 40).all()
    # Errors of 1/sqrt(ESS) in posterior deviations; four of them.
    assert (whitened_error(ORACLE, x, mask, draws.mean).abs() < 4 / draws.ess.sqrt()[:, None]).all()
    centred = draws.z_0 - draws.mean
    cov = torch.einsum("sb,sbi,sbj->bij", draws.weights, centred, centred)
    exact = torch.stack([ORACLE.posterior(x[b], mask[b])[1] for b in range(4)])
    deviation = exact.diagonal(dim1=-2, dim2=-1).sqrt()
    error = (cov - exact) / deviation[:, None] / deviation[..., None]
    assert (error.abs().amax((1, 2)) < 4 * (2 / draws.ess).sqrt()).all() and error[:2].abs().max() < 0.25
    resampled = draw_posterior(model, guide, data, 1000, resample=True, seed=0)
    assert len(resampled) == 1000 and (resampled.log_weights == 0).all()
    assert (whitened_error(ORACLE, x, mask, resampled.mean).abs() < 5 / draws.ess.sqrt()[:, None]).all()


def test_importance_with_the_fused_posterior_in_closed_form_has_equal_weights():
    x, model = ORACLE.sample(4), ORACLE.model()
    guide = GaussianGuide(model, ExactEncoder(ORACLE), latent="z_0")
    draws = draw_posterior(model, guide, (x, SEEN), 50, seed=0)
    torch.testing.assert_close(draws.ess, torch.full((4,), 50.0, dtype=torch.float64))
    # and the weight is the likelihood of what is seen
    exact = torch.stack([ORACLE.log_prob(x[b], SEEN[b]) for b in range(4)])
    torch.testing.assert_close(draws.log_weights, exact.expand(50, -1), rtol=1e-9, atol=1e-9)
    own = draw_posterior(model, guide, (x, SEEN), 50, method="guide", seed=0)
    assert own.z_0.shape == (50, 4, 2) and (own.log_weights == 0).all()


def test_guide_draws_are_the_fused_posterior():
    x, model = ORACLE.sample(4), ORACLE.model()
    guide = GaussianGuide(model, ExactEncoder(ORACLE), latent="z_0")
    draws = draw_posterior(model, guide, (x, SEEN), 4000, method="guide", seed=0)
    assert whitened_error(ORACLE, x, SEEN, draws.mean).abs().max() < 4 / 4000**0.5


def test_map_is_the_exact_mean():
    x = ORACLE.sample(4)
    model, guide = anchored()
    for options in ({}, {"num_starts": 1, "num_proposals": 1}):
        found = draw_posterior(model, guide, (x, SEEN), method="map", seed=0, tolerance=1e-8, **options)
        assert found.z_0.shape == (1, 4, 2)
        exact = torch.stack([ORACLE.posterior(x[b], SEEN[b])[0] for b in range(4)])
        torch.testing.assert_close(found.z_0[0], exact, atol=1e-7, rtol=0)


def test_hmc_has_the_moments_of_the_posterior():
    x = ORACLE.sample(4)
    model, guide = anchored()
    draws = draw_posterior(
        model, guide, (x, SEEN), 1200, method="hmc", seed=0, num_chains=12, num_leapfrog=5, warmup=60
    )
    assert draws.z_0.shape == (1200, 4, 2) and (draws.rhat < 1.1).all() and (draws.acceptance > 0.6).all()
    # At an effective size of a third of the draws the error is 0.05 deviations.
    assert whitened_error(ORACLE, x, SEEN, draws.mean).abs().max() < 0.2
    variance = torch.stack([ORACLE.posterior(x[b], SEEN[b])[1].diagonal() for b in range(4)])
    assert (draws.z_0.var(0) / variance - 1).abs().max() < 0.35


def test_naive_draws_are_those_of_one_random_observed_visit():
    x = ORACLE.sample(4)
    model, guide = anchored()
    draws = draw_posterior(model, guide, (x, SEEN), 6000, method="naive", seed=0)
    for b in range(4):
        share = torch.bincount(draws.anchor[:, b], minlength=4) / 6000
        expected = SEEN[b] / SEEN[b].sum()
        assert (share - expected).abs().max() < 4 * 0.5 / 6000**0.5
        for visit in SEEN[b].nonzero().flatten().tolist():
            loc, scale = ORACLE.visit_posterior()(x[b : b + 1, visit])
            exact = ORACLE.anchor_log_prob(visit, loc[0], scale[0])
            own = draws.z_0[draws.anchor[:, b] == visit, b]
            error = (own.mean(0) - exact.loc) / exact.variance.sqrt() * len(own) ** 0.5
            assert error.abs().max() < 4.5


def test_best_picks_the_arg_max_of_the_likelihood_of_what_is_seen():
    found = torch.tensor([[[-3.0, 0.0], [-1.0, torch.nan], [5.0, -torch.inf]]]).nan_to_num(nan=-torch.inf)
    valid = torch.tensor([[True, False], [True, False], [False, True]])
    assert best_candidate(found, valid).tolist() == [[1, 2]]
    # A visit posterior without any noise leaves one candidate an anchor: by hand, which is best.
    x, model = ORACLE.sample(30), ORACLE.model()
    encode = ORACLE.visit_posterior()
    guide = AnchoredGuide(model, lambda rows: (encode(rows)[0], torch.full((len(rows), 2), 1e-12).double()))
    seen = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    seen[:, 1] = True
    draws = draw_posterior(model, guide, (x, seen), 2, method="best", seed=0)
    for b in range(30):
        scores = {}
        for j in seen[b].nonzero().flatten().tolist():
            z_j = encode(x[b : b + 1, j])[0][0]
            z_0 = torch.linalg.solve(ORACLE.M[j], z_j - ORACLE.m[j])
            loc = (ORACLE.H @ z_0 + ORACLE.h).reshape(4, 3)
            score = dist.Normal(loc, ORACLE.scale).log_prob(x[b])[seen[b]].sum()
            scores[j] = (float(score), z_0)
        best = max(scores, key=lambda j: scores[j][0])
        assert draws.anchor[:, b].tolist() == [best, best]
        torch.testing.assert_close(draws.z_0[0, b], scores[best][1], atol=1e-8, rtol=0)


def test_best_of_more_candidates_is_likelier():
    x, model = ORACLE.sample(8), ORACLE.model()
    guide = AnchoredGuide(model, ORACLE.visit_posterior())
    seen = SEEN.repeat(2, 1)
    scores = [
        conditional_trajectories(
            model, guide, (x, seen), 40, "best", seed=0, num_candidates=n
        ).log_likelihood.mean(0)
        for n in (1, 20)
    ]
    naive = conditional_trajectories(model, guide, (x, seen), 40, "naive", seed=0).log_likelihood.mean(0)
    several = seen.sum(1) > 1
    assert (scores[1] > scores[0]).all() and (scores[0] > naive)[several].all()


def test_best_of_one_observed_visit_is_naive():
    x = ORACLE.sample(3)
    model, guide = anchored()
    seen = torch.tensor(
        [[True, False, False, False], [False, False, True, False], [False, False, False, True]]
    )
    moments = []
    for method in ("naive", "best"):
        draws = draw_posterior(model, guide, (x, seen), 3000, method=method, seed=1)
        assert (draws.anchor == torch.tensor([0, 2, 3])).all()
        moments.append((draws.z_0.mean(0), draws.z_0.std(0)))
    scale = moments[0][1]
    assert ((moments[0][0] - moments[1][0]) / scale).abs().max() < 4 * (2 / 3000) ** 0.5
    assert (moments[1][1] / scale - 1).abs().max() < 4 * (1 / 3000) ** 0.5


@pytest.mark.parametrize("method", METHODS)
def test_a_subject_of_whom_nothing_is_seen_gets_the_prior(method):
    x = ORACLE.sample(3)
    model, guide = anchored()
    seen = torch.tensor([[False] * 4, [True, False, True, True], [True, True, False, False]])
    pixels = torch.ones_like(x, dtype=torch.bool)
    pixels[2] = False  # visits that happened, of which no value is known
    x[0], x[2] = torch.nan, torch.nan
    data = {"x": x, "observed": seen, "pixel_mask": pixels}
    options = {"num_chains": 80, "warmup": 20} if method == "hmc" else {}
    draws = draw_posterior(model, guide, data, 800, method=method, seed=0, **options)
    for b in (0, 2):
        if method == "map":
            torch.testing.assert_close(
                draws.z_0[0, b], torch.zeros(2, dtype=torch.float64), atol=1e-4, rtol=0
            )
            continue
        assert draws.log_weights[:, b].abs().max() == 0
        assert draws.anchor is None or (draws.anchor[:, b] == -1).all()
        assert draws.z_0[:, b].mean(0).abs().max() < 4 / 800**0.5
        assert (draws.z_0[:, b].std(0) - 1).abs().max() < 4 / 1600**0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fused", [False, True])
def test_what_is_not_seen_changes_nothing(method, fused):
    x, model = ORACLE.sample(4), ORACLE.model()
    guide = (
        GaussianGuide(model, ExactEncoder(ORACLE), latent="z_0")
        if fused
        else AnchoredGuide(model, ORACLE.visit_posterior(), anchors="mixture")
    )
    if fused and method in ("naive", "best"):
        with pytest.raises(ValueError, match="anchors"):
            draw_posterior(model, guide, (x, SEEN), 4, method=method)
        return
    options = {"warmup": 6, "num_leapfrog": 2} if method == "hmc" else {}
    results = []
    for filler in (0.0, torch.nan, -1e30):
        filled = torch.where(SEEN[..., None], x, filler)
        result = impute(model, guide, (filled, SEEN), method, 8, seed=0, keep_draws=3, noise=True, **options)
        assert torch.equal(result.filled[SEEN], x[SEEN]) and torch.equal(
            result.missing, ~SEEN[..., None].expand_as(x)
        )
        assert torch.equal(result.draws[:, SEEN], x[SEEN].expand(3, -1, -1))
        results.append(result)
    for other in results[1:]:
        for name in ("filled", "mean", "variance", "lower", "upper", "draws", "ess"):
            assert torch.equal(getattr(other, name), getattr(results[0], name)), name
    assert torch.isfinite(results[0].filled).all()


# -- imputation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [False, True])
def test_predictive_mean_and_variance_of_what_is_missing(pixels):
    x = ORACLE.sample(4)
    model, guide = anchored(widening=2.0)
    data, mask = {"x": x, "observed": SEEN}, SEEN[..., None].expand_as(x)
    if pixels:
        data["pixel_mask"] = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.7
        mask = mask & data["pixel_mask"]
    result = impute(model, guide, data, num_draws=4000, level=None, seed=0)
    assert result.lower is None and torch.equal(result.missing, ~mask)
    assert torch.equal(result.filled[mask], x[mask]) and torch.equal(result.filled[~mask], result.mean[~mask])
    for b in range(4):
        mean, cov = ORACLE.predictive(x[b], mask[b])
        variance = cov.diagonal().reshape(4, 3)
        error = (result.mean[b] - mean.reshape(4, 3)) / variance.sqrt()
        assert error.abs().max() < 4 / result.ess[b] ** 0.5
        assert (result.variance[b] / variance - 1).abs().max() < 4 * (2 / result.ess[b]) ** 0.5
    modes = impute(model, guide, data, "map", level=None, seed=0, tolerance=1e-8)
    for b in range(4):
        mean, _ = ORACLE.predictive(x[b], mask[b])
        torch.testing.assert_close(modes.mean[b], mean.reshape(4, 3), atol=1e-6, rtol=0)
    assert modes.variance.abs().max() == 0 and (modes.ess == 1).all()


@pytest.mark.parametrize("method", ["importance", "hmc"])
def test_intervals_cover_missing_values_at_their_level(method):
    size = 400 if method == "importance" else 200
    x = ORACLE.sample(size)
    model, guide = anchored()
    seen = torch.rand(size, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[:, 2] |= ~seen.any(1)
    options = {"warmup": 40, "num_leapfrog": 4, "num_chains": 10} if method == "hmc" else {"num_draws": 200}
    result = impute(model, guide, (x, seen), method, seed=0, **options)
    inside = (result.lower <= x) & (x <= result.upper)
    assert 0.87 < float(inside[~seen].double().mean()) < 0.93
    # Those of the decoder's mean hold the decoder's mean, and are narrower.
    means = impute(model, guide, (x, seen), method, seed=0, interval="mean", **options)
    widths = [(r.upper - r.lower)[~seen].mean() for r in (means, result)]
    assert 0 < float(widths[0]) < 0.95 * float(widths[1])


def test_interval_of_the_noise_alone_under_map():
    x = ORACLE.sample(2)
    model, guide = anchored()
    results = [impute(model, guide, (x, SEEN[:2]), "map", seed=s) for s in range(20)]
    half = torch.stack([(r.upper - r.lower) / 2 for r in results]).mean(0)
    # 1.645 deviations; an end is known to 0.09 of them by 200 draws, so 20 pairs to 0.02.
    torch.testing.assert_close(half, torch.full_like(half, 1.645 * ORACLE.scale), atol=0.08, rtol=0)


def test_central_interval_contains_a_further_draw_at_its_level():
    torch.manual_seed(0)
    for n, level in ((19, 0.9), (200, 0.9), (50, 0.5), (100, 0.8)):
        draws = torch.randn(n + 1, 20000)
        low, high = central_interval(draws[:n], level)
        share = float(((draws[n] >= low) & (draws[n] <= high)).double().mean())
        assert abs(share - level) < 4 * (level * (1 - level) / 20000) ** 0.5
    low, high = central_interval(torch.randn(5, 3), 0.99)  # fewer draws than the level needs
    assert (low < high).all()


def test_kept_draws_are_fair_and_noisy_on_request():
    x = ORACLE.sample(4)
    model, guide = anchored(widening=2.0)
    for noise in (False, True):
        result = impute(
            model, guide, (x, SEEN), num_draws=3000, level=None, keep_draws=1500, noise=noise, seed=0
        )
        assert result.draws.shape == (1500, 4, 4, 3)
        for b in range(4):
            mean, cov = ORACLE.predictive(x[b], SEEN[b])
            variance = cov.diagonal().reshape(4, 3)[~SEEN[b]] + (ORACLE.scale**2 if noise else 0.0)
            drawn = result.draws[:, b][:, ~SEEN[b]]
            if drawn.numel():
                error = 1 / float(result.ess[b]) ** 0.5 + 1500**-0.5
                assert (
                    (drawn.mean(0) - mean.reshape(4, 3)[~SEEN[b]]) / variance.sqrt()
                ).abs().max() < 4 * error
                assert (drawn.var(0) / variance - 1).abs().max() < 4 * 2**0.5 * error


@pytest.mark.parametrize("method", ["map", "importance", "best", "hmc"])
def test_chunks_change_nothing_but_the_draws(method):
    x = ORACLE.sample(5)
    model, guide = anchored(widening=2.0)
    seen = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    seen[:, 0] = True
    options = {"map": {"tolerance": 1e-8}, "hmc": {"warmup": 20, "num_leapfrog": 4}}.get(method, {})
    found = [
        impute(model, guide, (x, seen), method, 100, level=None, seed=0, chunk_size=chunk, **options)
        for chunk in (60, None)  # 15 draws at once, and all
    ]
    if method == "map":
        torch.testing.assert_close(found[0].mean, found[1].mean, atol=1e-6, rtol=0)
    deviation = (found[0].variance + found[1].variance).sqrt()
    # Of a hundred draws the weights leave some, and chains repeat themselves.
    ess = 0.2 * torch.minimum(found[0].ess, found[1].ess) if method == "hmc" else found[0].ess
    bound = 4 / ess.sqrt()[:, None, None]
    assert method == "map" or (((found[0].mean - found[1].mean) / deviation).abs() < bound).all()


def test_subclass_with_another_forward_is_traced():
    class Other(LongitudinalVAE):
        def forward(self, x=None, observed=None, pixel_mask=None, times=None, covariates=None, *, size=None):
            return super().forward(x, observed, pixel_mask, times, covariates, size=size)

    plain = ORACLE.model()
    model = Other(plain.decoder, plain.dynamics, likelihood=plain.likelihood).double()
    x = ORACLE.sample(4)
    given = {"x": x, "observed": SEEN}
    guide = AnchoredGuide(model, ORACLE.visit_posterior())
    z_0 = torch.randn(5, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batches = [SubjectBatch(m, guide, given, {}, 100) for m in (plain, model)]
    torch.testing.assert_close(batches[0].potential()(z_0), batches[1].potential()(z_0))
    torch.testing.assert_close(
        batches[0].potential()(z_0), plain.latent_potential("z_0", (), given)(z_0), rtol=1e-12, atol=1e-12
    )


def test_evaluation_mode_no_gradients_seeds_and_single_precision():
    x, model = ORACLE.sample(4), ORACLE.model()
    encoder = ExactEncoder(ORACLE)
    guide = GaussianGuide(model, encoder, latent="z_0").train()
    encoder.calls.clear()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = impute(model, guide, (x, SEEN), "guide", 4, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert encoder.calls and not any(encoder.calls) and encoder.training and model.training
    assert not first.filled.requires_grad
    again = impute(model, guide, {"x": x, "observed": SEEN, "times": None}, "guide", 4, seed=3)
    assert torch.equal(first.upper, again.upper)
    single = ORACLE.model().float()
    parts = [single.decoder, *single.dynamics.transitions]
    for part in parts[1:]:
        part.matrix, part.shift = part.matrix.float(), part.shift.float()
    weight, shift, scale = ORACLE.C.float(), ORACLE.c.float(), 0.5
    guide = AnchoredGuide(single, lambda rows: ((rows - shift) @ weight, torch.full((len(rows), 2), scale)))
    for method in METHODS:
        options = {"warmup": 4} if method == "hmc" else {}
        result = impute(single, guide, (x.float(), SEEN), method, 8, seed=0, **options)
        assert (
            result.filled.dtype == result.upper.dtype == torch.float32 and torch.isfinite(result.filled).all()
        )


# -- times and covariates ------------------------------------------------------------------------------------


class Line(Dynamics):
    """``z(t) = a + t b``: two visits' worth of latent, at any times."""

    site, base_dim, latent_dim = "u", 2, 1

    def unroll(self, z_0, times=None, covariates=None, *, log_det=False):
        shift = 0.0 if covariates is None else covariates.sum(-1)
        z = z_0[..., 0:1, :].new_zeros(()) + (z_0[..., None, :, 0] + times.mT * z_0[..., None, :, 1] + shift)
        return Trajectory(z.unsqueeze(-1))


def line_posterior(x, times, seen, shift, scale):
    design = torch.stack([torch.ones_like(times), times], -1)[seen]
    precision = torch.eye(2, dtype=x.dtype) + design.T @ design / scale**2
    cov = torch.linalg.inv(precision)
    return cov @ design.T @ (x[seen, 0] - shift) / scale**2, cov


class LineEncoder(nn.Module):
    def forward(self, x, observed, pixel_mask, times, covariates):
        found = [
            line_posterior(x[b], times[b].nan_to_num(), observed[b], covariates[b].sum(), 0.5)
            for b in range(len(x))
        ]
        return dist.MultivariateNormal(
            torch.stack([f[0] for f in found]), 2 * torch.stack([f[1] for f in found])
        )


def test_irregular_times_and_covariates_predict_at_the_times_asked_for():
    from riemvae.likelihoods import Gaussian

    torch.manual_seed(0)
    model = LongitudinalVAE(nn.Identity(), Line(), likelihood=Gaussian(0.5)).double()
    guide = GaussianGuide(model, LineEncoder(), latent="u")
    times = torch.rand(5, 6, dtype=torch.float64) * 4
    covariates = torch.randn(5, 2, dtype=torch.float64)
    z = torch.randn(5, 2, dtype=torch.float64)
    x = (z[:, :1] + times * z[:, 1:] + covariates.sum(1, keepdim=True)).unsqueeze(-1)
    seen = torch.rand(5, 6) < 0.6
    seen[:, 0] = True
    times[0, ~seen[0]] = torch.nan
    x[~seen] = torch.nan
    data = {"x": x, "observed": seen, "times": times, "covariates": covariates}
    for method, tolerance in (("importance", 0.15), ("map", 1e-6), ("hmc", 0.2)):
        result = impute(
            model, guide, data, method, 2000 if method == "importance" else 400, seed=0, level=None
        )
        for b in range(5):
            mean, _ = line_posterior(x[b], times[b].nan_to_num(), seen[b], covariates[b].sum(), 0.5)
            exact = mean[0] + times[b] * mean[1] + covariates[b].sum()
            unknown = times[b].isnan()
            assert torch.equal(result.filled[b, :, 0].isnan(), unknown)
            error = (result.mean[b, :, 0] - exact)[~unknown]
            assert error.abs().max() < tolerance
    # The time of an unseen visit moves the prediction at that visit alone.
    row, visit = [int(i) for i in (~seen & ~times.isnan()).nonzero()[0]]
    moved = times.clone()
    moved[row, visit] += 1.0
    a, b = (
        impute(model, guide, {**data, "times": t}, "map", seed=0, level=None).mean for t in (times, moved)
    )
    changed = a.nan_to_num() != b.nan_to_num()
    assert changed.nonzero().tolist() == [[row, visit, 0]]


def test_flows_in_time_with_anchors():
    torch.manual_seed(0)
    model = LongitudinalVAE(nn.Linear(2, 5), time_flow(2, covariates=1, hidden=(8,), transforms=2))
    guide = AnchoredGuide(model, lambda rows: (rows[:, :2], torch.ones(len(rows), 2)), anchors="mixture")
    data = {
        "x": torch.randn(3, 4, 5),
        "observed": SEEN[:3],
        "times": torch.rand(3, 4),
        "covariates": torch.randn(3, 1),
    }
    for method in METHODS:
        options = {"warmup": 4} if method == "hmc" else {}
        result = impute(model, guide, data, method, 6, seed=0, **options)
        assert torch.isfinite(result.filled).all()
    assert generate(model, 7, torch.linspace(0, 1, 4), torch.zeros(1), seed=0).shape == (7, 4, 5)
    assert conditional_trajectories(model, guide, data, 3, seed=0).means.shape == (3, 3, 4, 5)
    with pytest.raises(ValueError, match="times"):
        generate(model, 7, torch.zeros(3, 4))


def test_bernoulli_pixels():
    torch.manual_seed(0)
    model, _ = anchored()
    model = LongitudinalVAE(nn.Linear(2, 6), model.dynamics, likelihood=Bernoulli()).double()
    guide = AnchoredGuide(model, lambda rows: (rows[:, :2], torch.ones(len(rows), 2).double()))
    x = (torch.rand(4, 4, 6) < 0.5).double()
    result = impute(model, guide, (x, SEEN), num_draws=30, keep_draws=4, noise=True, seed=0)
    assert set(result.draws.unique().tolist()) == {0.0, 1.0}
    assert ((result.mean > 0) & (result.mean < 1)).all() and set(result.lower.unique().tolist()) <= {0.0, 1.0}


# -- errors of imputations, trajectories, generation ---------------------------------------------------------


def test_imputation_error_by_hand():
    draws = torch.tensor([[[[1.0], [9.0]], [[2.0], [4.0]]], [[[3.0], [9.0]], [[2.0], [0.0]]]])  # (2, 2, 2, 1)
    truth = torch.tensor([[[0.0], [float("nan")]], [[1.0], [1.0]]])
    missing = torch.tensor([[True, False], [True, True]])
    error = imputation_error(draws, truth, missing)
    # values: (1, 9) / 2 = 5; (1, 1) / 2 = 1; (9, 1) / 2 = 5; means 2, 2, 2
    assert error.of_draws == pytest.approx(11 / 3) and error.of_mean == pytest.approx((4 + 1 + 1) / 3)
    assert error.subject_of_draws.tolist() == [5.0, 3.0] and error.subject_of_mean.tolist() == [4.0, 1.0]
    assert error.num_values.tolist() == [1, 2]
    single = imputation_error(draws[0], truth, missing)
    assert single.of_draws == single.of_mean == pytest.approx((1 + 1 + 9) / 3)
    with pytest.raises(ValueError, match="missing"):
        imputation_error(draws, truth)
    with pytest.raises(ValueError, match="finite"):
        imputation_error(draws, truth, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="missing"):
        imputation_error(draws, truth, torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="x_true"):
        imputation_error(draws, truth[:1], missing)


def test_imputation_error_of_an_imputation_is_that_of_all_its_draws():
    x = ORACLE.sample(4)
    model, guide = anchored()
    result = impute(model, guide, (x, SEEN), "naive", 30, seed=0, keep_draws=30)
    a, b = imputation_error(result, x), imputation_error(result.draws, x, ~SEEN)
    assert a.of_draws == pytest.approx(b.of_draws) and a.of_mean == pytest.approx(b.of_mean)
    assert (
        a.of_draws > a.of_mean and torch.isnan(a.subject_of_mean[2]) and a.num_values.tolist() == [6, 9, 0, 3]
    )
    # In a true model: the posterior mean beats a single visit's, and drawing costs the posterior variance.
    x = ORACLE.sample(300, seed=5)
    seen = torch.rand(300, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[:, 1] = True
    errors = {
        method: imputation_error(impute(model, guide, (x, seen), method, num, seed=0, level=None), x)
        for method, num in (("naive", 50), ("best", 50), ("importance", 300), ("map", 1))
    }
    exact = sum(
        float((ORACLE.predictive(x[b], seen[b])[0].reshape(4, 3) - x[b])[~seen[b]].square().sum())
        for b in range(300)
    ) / (3 * int((~seen).sum()))
    assert abs(errors["map"].of_mean - exact) < 1e-3 * exact
    assert abs(errors["importance"].of_mean - exact) < 0.1 * exact
    assert errors["naive"].of_draws > errors["best"].of_draws > errors["importance"].of_draws > exact


def test_map_of_an_imputation_to_another_scale():
    x = ORACLE.sample(4)
    model, guide = anchored()
    result = impute(model, guide, (x, SEEN), num_draws=20, seed=0, keep_draws=2)
    moved = result.map(lambda values: 3.0 * values + 1.0)
    assert isinstance(moved, Imputation)
    torch.testing.assert_close(moved.variance, 9.0 * result.variance)
    torch.testing.assert_close(moved.upper, 3.0 * result.upper + 1.0)
    assert result.map(lambda v: v).lower is not None and len(result) == 4 and "filled in" in repr(result)


def test_trajectories_are_ranked_by_what_is_seen():
    x = ORACLE.sample(4)
    model, guide = anchored()
    found = conditional_trajectories(model, guide, (x, SEEN), 6, "naive", seed=0)
    assert found.means.shape == (6, 4, 4, 3)
    torch.testing.assert_close(found.means, (found.z_0 @ ORACLE.H.T + ORACLE.h).reshape(6, 4, 4, 3))
    terms = dist.Normal(found.means, ORACLE.scale).log_prob(x).sum(-1)
    torch.testing.assert_close(found.log_likelihood, torch.where(SEEN, terms, 0.0).sum(-1))
    ranked = found.ranked()
    assert (ranked.log_likelihood.diff(dim=0) <= 0).all()
    best = found.log_likelihood.argmax(0)
    assert torch.equal(ranked.means[0], found.means[best, torch.arange(4)])
    assert torch.equal(ranked.anchor[0], found.anchor[best, torch.arange(4)])


def test_generated_sequences_have_the_moments_of_the_model():
    model = ORACLE.model()
    for noise in (False, True):
        x = generate(model, 4000, noise=noise, seed=0, chunk_size=1000).reshape(4000, -1)
        cov = ORACLE.H @ ORACLE.H.T + (ORACLE.scale**2 * torch.eye(12).double() if noise else 0.0)
        deviation = cov.diagonal().sqrt()
        assert ((x.mean(0) - ORACLE.h) / deviation).abs().max() < 4 / 4000**0.5
        assert ((torch.cov(x.T) - cov) / deviation / deviation[:, None]).abs().max() < 0.1


def test_resampling_is_fair():
    torch.manual_seed(0)
    log_weights = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()[:, None].expand(-1, 2)
    draws = LatentDraws(torch.arange(4.0)[:, None, None].expand(4, 2, 1), log_weights)
    for num in (3, 4, 10):
        taken = torch.cat([draws.resampled(num).z_0 for _ in range(1500)]).flatten(1)
        share = torch.stack([(taken == v).double().mean(0) for v in range(4)])
        assert (share - log_weights.exp()).abs().max() < 4 * 0.5 / (1500 * num) ** 0.5 + 0.01
    assert draws.ess.tolist() == pytest.approx([1 / 0.3] * 2, rel=1e-5) and "4 draws" in repr(draws)


def test_arguments_are_refused():
    x = ORACLE.sample(2)
    model, guide = anchored()
    with pytest.raises(ValueError, match="method"):
        draw_posterior(model, guide, x, method="mcmc")
    with pytest.raises(ValueError, match="num_draws"):
        draw_posterior(model, guide, x, 0)
    with pytest.raises(ValueError, match="num_leapfrog"):
        draw_posterior(model, guide, x, method="hmc", num_leapfrog=0)
    with pytest.raises(TypeError):
        draw_posterior(model, guide, x, steps=3)
    with pytest.raises(ValueError, match="model"):
        impute(nn.Linear(2, 2), guide, x)
    with pytest.raises(ValueError, match="level"):
        impute(model, guide, x, level=1.5)
    with pytest.raises(ValueError, match="interval"):
        impute(model, guide, x, interval="noise")
    with pytest.raises(ValueError, match="x"):
        impute(model, guide, x[:, :3])


# -- Gaussian processes in time ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "asked"),
    [(m, t) for m in ("guide", "importance") for t in (0.0, 1.5, 3.0, 50.0)] + [("hmc", 0.0), ("hmc", 1.5)],
)
def test_a_gaussian_process_is_asked_at_any_time(method, asked):
    """Visits at 0 and 3, their values known up to noise: regression at another time, in closed form."""
    noise = 0.1
    prior = GaussianProcessPrior(None, 1, "rbf", lengthscale=1.0)
    model = LongitudinalVAE(nn.Identity(), VisitLatents(None, 1), prior, Gaussian(noise))
    encoder = GaussianProcessEncoder(lambda x: (x, torch.full_like(x, noise)), prior)
    guide = GaussianGuide(model, encoder, latent="z_0")
    seen = torch.tensor([1.0, -1.0])
    times = torch.tensor([[0.0, 3.0, asked]])
    data = {"x": torch.tensor([[[1.0], [-1.0], [torch.nan]]]), "times": times}
    data["observed"] = torch.tensor([[True, True, False]])
    kernel = prior.covariance(times)[0, 0].double()
    gain = kernel[2, :2] @ torch.linalg.inv(kernel[:2, :2] + noise**2 * torch.eye(2))
    exact, variance = gain @ seen.double(), kernel[2, 2] - gain @ kernel[:2, 2]
    draws = 4000
    found = impute(model, guide, data, method, draws, level=None, seed=0)
    error = (found.mean[0, 2, 0].double() - exact) / variance.sqrt()
    assert abs(float(error)) < 5 * (20 if method == "hmc" else 1) ** 0.5 / draws**0.5
    assert float(found.variance[0, 2, 0]) == pytest.approx(
        float(variance), rel=0.3 if method == "hmc" else 0.12
    )
    assert float(found.ess[0]) > 0.99 * draws  # the guide is exact: all draws count alike


# -- draws without weight, whole numbers, evaluation ---------------------------------------------------------


class Sinh(torch.distributions.Transform):
    """A bijection that overflows single precision beyond ``|z| = 2.2``."""

    bijective = True
    domain = codomain = torch.distributions.constraints.real_vector

    def _call(self, x):
        return torch.sinh(40 * x)

    def _inverse(self, y):
        return torch.asinh(y) / 40

    def log_abs_det_jacobian(self, x, y):
        size = (40 * x).abs()
        return (size + torch.log1p(torch.exp(-2 * size)) + math.log(20.0)).sum(-1)


@pytest.mark.parametrize("transition", [Sinh(), Sinh().inv])
def test_draws_without_weight_count_nothing(transition):
    torch.manual_seed(0)
    model = LongitudinalVAE(nn.Linear(2, 3), FlowChain([transition], 2))
    guide = AnchoredGuide(model, lambda x: (torch.zeros(len(x), 2), torch.ones(len(x), 2)))
    data = {"x": torch.randn(4, 2, 3), "pixel_mask": torch.ones(4, 2, 3, dtype=torch.bool)}
    data["pixel_mask"][:, :, 0] = False
    draws = draw_posterior(model, guide, data, 200, seed=0)
    lost = torch.isinf(draws.log_weights)
    assert 0 < int(lost.sum()) < lost.numel()  # some draws overflow
    for subject in range(4):
        kept = ~lost[:, subject]
        weights = draws.log_weights[kept, subject].double().softmax(0).float()
        expected = weights @ draws.z_0[kept, subject]
        torch.testing.assert_close(draws.mean[subject], expected, rtol=1e-4, atol=1e-6)
    found = impute(model, guide, data, num_draws=200, seed=0)
    for values in (found.mean, found.variance, found.filled, found.lower, found.upper):
        assert torch.isfinite(values).all()
    assert torch.isfinite(posterior_means(model, guide, data, 200, seed=0)).all()
    mixture = MixturePrior(2, 2)
    shares = cluster_trajectories(model, guide, data, 200, mixture=mixture, seed=0).responsibilities
    torch.testing.assert_close(shares.sum(1), torch.ones(4))


@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson"])
def test_what_is_filled_in_between_integers_keeps_its_digits(likelihood):
    torch.manual_seed(0)
    model = LongitudinalVAE(nn.Linear(2, 3), FlowChain([AffineTransform(0.0, 1.0)], 2), None, likelihood)
    guide = AnchoredGuide(model, lambda x: (x[:, :2].float(), torch.ones(len(x), 2)))
    x = torch.randint(2, (5, 2, 3))
    observed = torch.tensor([[True, False]] * 5)
    whole, real = (
        impute(model, guide, (values, observed), num_draws=50, keep_draws=4, seed=0)
        for values in (x, x.float())
    )
    assert torch.equal(whole.filled, real.filled) and torch.equal(whole.draws, real.draws)
    assert bool((whole.filled[:, 1] % 1 != 0).any())


def test_estimates_are_those_of_evaluation_and_leave_the_mode():
    """Dropout and running statistics: as left by training, and after ``eval()``, the same numbers."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
    model = LongitudinalVAE(decoder, FlowChain([AffineTransform(0.0, 1.0)], 2))
    guide = AnchoredGuide(model, nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), Pair()))
    x = torch.randn(40, 2, 3)
    rv.fit(model, guide, x, max_epochs=1, batch_size=20, seed=0, progress=False)
    results = []
    for training in (True, False):
        model.train(training), guide.train(training)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        motions = fit_motions(model, guide, x, 2, num_samples=5, num_starts=1, seed=0)
        results.append(
            [
                rv.log_likelihood(model, guide, x, 5, seed=0).log_prob,
                fit_mixture(model, guide, x, 2, num_samples=5, num_starts=1, seed=0).locs,
                motions.scores(torch.zeros(1, 2)),
                draw_posterior(model, guide, x, 5, seed=0).mean,
            ]
        )
        assert decoder.training is training and guide.encoder.training is training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for one, other in zip(*results):
        assert torch.equal(one, other)


class Pair(nn.Module):
    def forward(self, x):
        return x[:, :2], x[:, 2:].exp()
