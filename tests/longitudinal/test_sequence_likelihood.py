"""Likelihoods and bounds of sequences against what is known: Gaussians, and quadrature where nonlinear."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from flow_cases import make_flow
from longitudinal_oracles import AffineSequences
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

import riemvae as rv
from riemvae.guides import GaussianGuide
from riemvae.longitudinal import AnchoredGuide, FlowChain, LongitudinalVAE

F64 = torch.float64
# Transitions that stretch little: the gaps of single anchors are some nats.
CASE = AffineSequences(scale=1.5, seed=3)
T, D = CASE.num_visits, CASE.latent_dim
SUBSETS = torch.tensor(list(itertools.product([False, True], repeat=T)))
ANY = SUBSETS[1:]  # at least one visit


def wider(factor=1.5):
    """Wider than the posteriors: light tails, and so an estimate whose error is known."""
    encode = CASE.visit_posterior()
    return lambda x: (encode(x)[0], factor * encode(x)[1])


def guide_of(anchors, factor=1.5):
    return AnchoredGuide(CASE.model(), wider(factor), anchors=anchors)


def exact(x, seen):
    return torch.stack([CASE.log_prob(one, mask) for one, mask in zip(x, seen)])


def fix_anchor(monkeypatch, visit):
    """Every subject's random anchor from now on."""
    monkeypatch.setattr(torch, "multinomial", lambda p, n: torch.full((len(p), n), visit))


# -- Monte Carlo -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchors", ["random", "mixture"])
def test_the_likelihood_of_any_subset_of_visits_is_found(anchors):
    """All sixteen at once, each a subject with a mask of its own; the sums are over visits, not means."""
    x = CASE.sample(len(SUBSETS), seed=2)
    x = torch.where(SUBSETS[..., None], x, math.nan)
    guide = guide_of(anchors)
    found = rv.log_likelihood(guide.model, guide, {"x": x, "observed": SUBSETS}, num_samples=4000, seed=1)
    error = (found.log_prob - exact(x, SUBSETS)).abs()
    assert (error < 4.0 * found.mcse + 1e-12).all()
    assert found.mcse.max() < 0.1
    # The bound lies below, but for its own error.
    assert (found.elbo - exact(x, SUBSETS) < 4.0 * found.elbo_mcse + 1e-12).all()


@pytest.mark.parametrize("anchors", ["random", "mixture"])
def test_the_likelihood_of_what_pixel_masks_leave_is_found(anchors):
    torch.manual_seed(0)
    x = CASE.sample(len(ANY), seed=3)
    pixels = torch.rand(x.shape) < 0.7
    seen = pixels & ANY[..., None]
    x = torch.where(seen, x, 1e30)
    guide = AnchoredGuide(CASE.model(), lambda x: (0.0 * x[:, :D], 1.6 + 0.0 * x[:, :D]), anchors=anchors)
    data = {"x": x, "observed": ANY, "pixel_mask": pixels}
    found = rv.log_likelihood(guide.model, guide, data, num_samples=10_000, seed=1)
    error = (found.log_prob - exact(x, seen)).abs()
    assert (error < 4.0 * found.mcse + 1e-12).all()
    assert found.mcse.max() < 0.1


def test_subjects_do_not_share_a_mask():
    """A known mistake: the first subject's mask for the whole batch."""
    x = CASE.sample(1).expand(len(ANY), -1, -1)
    together = {"x": x, "observed": ANY}
    guide = guide_of("mixture")
    found = rv.log_likelihood(guide.model, guide, together, num_samples=4000, seed=0).log_prob
    assert found.unique().numel() == len(ANY)
    first = exact(x, ANY[:1].expand(len(ANY), -1))
    wrong = (found - first)[1:].abs()
    assert (found - exact(x, ANY)).abs().max() < 0.1 < wrong.min() and wrong.median() > 2.0


def test_the_mixture_has_the_smaller_variance_at_equal_samples():
    """Against single anchors where these differ much: over repeated estimates, and to the exact value."""
    case = AffineSequences()
    samples, x = 12, case.sample(100, seed=5)
    value = torch.stack([case.log_prob(one, torch.ones(T, dtype=torch.bool)) for one in x])
    error, spread = {}, {}
    for anchors in ("random", "mixture"):
        guide = AnchoredGuide(case.model(), case.visit_posterior(), anchors=anchors)
        torch.manual_seed(0)
        log_w = torch.stack([rv.log_weights(guide.model, guide, x, samples) for _ in range(30)])
        estimates = log_w.logsumexp(1) - math.log(samples)
        error[anchors] = float((estimates - value).square().mean())
        spread[anchors] = float(estimates.var(0).mean())
    # About a third each.
    assert spread["mixture"] < 0.5 * spread["random"] and error["mixture"] < 0.5 * error["random"]


# -- quadrature over the guide's noise ---------------------------------------------------------------------


def weights_at(monkeypatch, guide, data, noise, anchors=1):
    """``log w (S, B)`` where the guide's standard normal draws are ``noise (n, d)``; ``S = anchors n``.

    With the mixture draws number ``anchors i + k`` have the ``i``-th noise and come from the ``k``-th anchor.
    """
    repeated = noise.repeat_interleave(anchors, 0)

    def standard_normal(size, dtype, device):
        size = torch.Size(size)
        if size[0] != len(repeated):  # the model's look at itself
            return torch.zeros(size, dtype=dtype)
        return repeated.reshape(len(repeated), *(1,) * (len(size) - 2), noise.shape[-1]).expand(size)

    with monkeypatch.context() as patch:
        patch.setattr(torch.distributions.normal, "_standard_normal", standard_normal)
        patch.setattr(torch, "rand", lambda size, device=None: torch.zeros(size))
        return rv.log_weights(guide.model, guide, data, len(repeated), chunk_size=10**9)


@pytest.mark.parametrize("visits", [[0], [2], [1, 3], [0, 1, 2], [0, 1, 2, 3]])
def test_mean_weights_and_bounds_are_exact_by_quadrature(visits, monkeypatch):
    """Evidence and bound of every single anchor and of their mixture, without Monte Carlo error."""
    observed = torch.zeros(3, T, dtype=torch.bool)
    observed[:, visits] = True
    x = CASE.sample(3, seed=4)
    value = exact(x, observed)
    posteriors = [MultivariateNormal(*CASE.posterior(one, seen)) for one, seen in zip(x, observed)]
    loc, scale = wider(2.0)(x)
    # The trapezium rule converges exponentially: its spacing is below the width of all integrands.
    axis = torch.linspace(-7.5, 7.5, 121, dtype=F64)
    noise = torch.cartesian_prod(axis, axis)
    weight = dist.Normal(0.0, 1.0).log_prob(noise).sum(-1).exp() * (axis[1] - axis[0]) ** 2
    data = {"x": x, "observed": observed}
    gaps = []
    for visit in visits:
        fix_anchor(monkeypatch, visit)
        log_w = weights_at(monkeypatch, guide_of("random", 2.0), data, noise)
        evidence = (weight[:, None] * log_w.exp()).sum(0).log()
        torch.testing.assert_close(evidence, value, rtol=0, atol=1e-5)
        bound = (weight[:, None] * log_w).sum(0)
        gap = torch.stack(
            [
                kl_divergence(CASE.anchor_log_prob(visit, loc[b, visit], scale[b, visit]), posteriors[b])
                for b in range(3)
            ]
        )
        torch.testing.assert_close(value - bound, gap, rtol=0, atol=1e-6)
        gaps.append(gap)
    log_w = weights_at(monkeypatch, guide_of("mixture", 2.0), data, noise, len(visits))
    share = weight.repeat_interleave(len(visits))[:, None] / len(visits)
    torch.testing.assert_close((share * log_w.exp()).sum(0).log(), value, rtol=0, atol=1e-5)
    mixture_gap = value - (share * log_w).sum(0)
    # A bound, and by convexity a tighter one than that of a random anchor.
    assert (mixture_gap > 0).all()
    if len(visits) == 1:
        torch.testing.assert_close(mixture_gap, gaps[0], rtol=0, atol=1e-6)
    else:
        assert (mixture_gap < torch.stack(gaps).mean(0)).all()


def test_the_random_anchors_bound_is_the_mean_over_the_subjects_own_anchors():
    """In training, over subjects: ``log p`` less the mean divergence of the observed visits' posteriors."""
    torch.manual_seed(0)
    n, observed = 20_000, torch.tensor([True, False, True, True])
    x = CASE.sample(1, seed=6)
    loc, scale = wider()(x)
    posterior = MultivariateNormal(*CASE.posterior(x[0], observed))
    gaps = [
        float(kl_divergence(CASE.anchor_log_prob(k, loc[0, k], scale[0, k]), posterior)) for k in (0, 2, 3)
    ]
    expected = float(CASE.log_prob(x[0], observed)) - sum(gaps) / 3
    guide = guide_of("random")
    data = (x.expand(n, -1, -1), observed.expand(n, -1))
    weights = rv.log_weights(guide.model, guide, data, 1, chunk_size=10**9)[0]
    error = float(weights.std()) / n**0.5
    assert abs(float(weights.mean()) - expected) < 4.0 * error < 0.25
    assert max(gaps) - min(gaps) > 0.5  # another distribution of anchors would be seen
    # The loss is a sum over subjects and visits, divided by nothing.
    loss = rv.ELBO().loss(guide.model, guide, *data) / n
    assert abs(loss + expected) < 4.0 * error


# -- exact posteriors --------------------------------------------------------------------------------------


def test_an_exact_posterior_of_all_visits_has_constant_weights():
    """For any subset of visits and any pixels: the guide of whole sequences, the bound without a gap."""
    torch.manual_seed(0)
    x = CASE.sample(len(ANY), seed=7)
    pixels = torch.rand(x.shape) < 0.7

    def encode(x, observed, pixel_mask):
        seen = observed[..., None] & pixel_mask
        parts = [CASE.posterior(one, mask) for one, mask in zip(x, seen)]
        return dist.MultivariateNormal(torch.stack([m for m, _ in parts]), torch.stack([c for _, c in parts]))

    model = CASE.model()
    guide = GaussianGuide(model, encode, latent="z_0")
    for mask, seen in ((torch.ones_like(pixels), ANY), (pixels, pixels & ANY[..., None])):
        data = {"x": x, "observed": ANY, "pixel_mask": mask}
        log_w = rv.log_weights(model, guide, data, 20)
        torch.testing.assert_close(log_w, exact(x, seen).expand(20, -1), rtol=0, atol=1e-8)


@pytest.mark.parametrize("anchors", ["random", "mixture"])
@pytest.mark.parametrize("visit", range(T))
def test_an_exact_encoder_of_the_one_visit_seen_has_constant_weights(visit, anchors):
    """``p(z_j | x_j)`` with its full covariance, carried back: bound and likelihood without a gap."""
    observed = torch.zeros(6, T, dtype=torch.bool)
    observed[:, visit] = True
    x = torch.where(observed[..., None], CASE.sample(6, seed=8), math.nan)
    M, m, C, s2 = CASE.M[visit], CASE.m[visit], CASE.C, CASE.scale**2
    prior = torch.linalg.inv(M @ M.T)
    covariance = torch.linalg.inv(prior + C.T @ C / s2)

    def encode(x):
        loc = ((x - CASE.c) @ C / s2 + prior @ m) @ covariance
        return dist.MultivariateNormal(loc, covariance.expand(len(x), -1, -1))

    guide = AnchoredGuide(CASE.model(), encode, anchors=anchors)
    data = {"x": x, "observed": observed}
    log_w = rv.log_weights(guide.model, guide, data, 25)
    torch.testing.assert_close(log_w, exact(x, observed).expand(25, -1), rtol=0, atol=1e-8)
    found = rv.log_likelihood(guide.model, guide, data, num_samples=50)
    assert found.mcse.max() < 1e-8 and (found.log_prob - found.elbo).abs().max() < 1e-8


# -- nonlinear, by quadrature ------------------------------------------------------------------------------


class Curved:
    """One latent dimension, spline flows between three visits and a curved decoder."""

    def __init__(self):
        torch.manual_seed(1)
        self.transitions = [make_flow("nsf", 1, seed=k) for k in range(2)]
        self.decoder = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.model = LongitudinalVAE(
            self.decoder, FlowChain(self.transitions, 1), likelihood=rv.likelihoods.Gaussian(0.6)
        ).double()
        self.x = torch.randn(1, 3, 2, dtype=F64)

    def log_joint(self, z_0, seen):
        """``log p(x, z_0)`` of points ``(n, 1)``, written out; ``seen (3, 2)``."""
        total, z = dist.Normal(0.0, 1.0).log_prob(z_0).sum(-1), z_0
        for visit in range(3):
            if visit:
                z = self.transitions[visit - 1]().transform.inv(z)
            terms = dist.Normal(self.decoder(z), 0.6).log_prob(self.x[0, visit])
            total = total + (terms * seen[visit]).sum(-1)
        return total

    @torch.no_grad()
    def log_prob(self, seen):
        z = torch.linspace(-9.0, 9.0, 6001, dtype=F64)
        return torch.trapezoid(self.log_joint(z[:, None], seen).exp(), z).log()

    def guide(self, anchors, flow=None):
        def encode(x):
            return 0.2 * x[:, :1], 1.0 + 0.1 * x[:, :1].tanh()

        return AnchoredGuide(self.model, encode, flow, anchors=anchors)


@pytest.mark.parametrize("flow", [None, "iaf"])
@pytest.mark.parametrize("visits", [[1], [0, 2], [0, 1, 2]])
def test_nonlinear_models_by_quadrature(visits, flow, monkeypatch):
    case = Curved()
    observed = torch.zeros(1, 3, dtype=torch.bool)
    observed[0, visits] = True
    pixels = torch.tensor([[[1, 1], [1, 0], [0, 1]]]).bool()
    noise = torch.linspace(-9.0, 9.0, 4001, dtype=F64)[:, None]
    weight = dist.Normal(0.0, 1.0).log_prob(noise).exp() * (noise[1] - noise[0])
    posterior_flow = None if flow is None else make_flow(flow, 1, scale=0.3)
    for mask in (None, pixels):
        data = {"x": torch.where(observed[..., None], case.x, math.nan), "observed": observed}
        seen = observed[0, :, None].expand(3, 2)
        if mask is not None:
            data["pixel_mask"], seen = mask, seen & mask[0]
        value = case.log_prob(seen)
        for visit in visits:
            fix_anchor(monkeypatch, visit)
            log_w = weights_at(monkeypatch, case.guide("random", posterior_flow), data, noise)
            found = (weight * log_w.exp()).sum().log()
            assert float(found) == pytest.approx(float(value), abs=2e-4)
            assert float((weight * log_w).sum()) < float(value) - 1e-3
        log_w = weights_at(monkeypatch, case.guide("mixture", posterior_flow), data, noise, len(visits))
        share = weight.repeat_interleave(len(visits), 0) / len(visits)
        assert float((share * log_w.exp()).sum().log()) == pytest.approx(float(value), abs=2e-4)


@pytest.mark.parametrize("anchors", ["random", "mixture"])
def test_nonlinear_models_by_the_librarys_estimate(anchors):
    case = Curved()
    subsets = torch.tensor(list(itertools.product([False, True], repeat=3)))[1:]
    x = case.x.expand(len(subsets), -1, -1)
    guide = case.guide(anchors)
    value = torch.stack([case.log_prob(s[:, None].expand(3, 2)) for s in subsets])
    found = rv.log_likelihood(case.model, guide, (x, subsets), num_samples=4000, seed=0)
    assert ((found.log_prob - value).abs() < 4.0 * found.mcse).all()
    assert found.mcse.max() < 0.05


def test_every_anchors_estimate_agrees_with_the_others(monkeypatch):
    x = CASE.sample(6, seed=9)
    found = []
    for visit in range(T):
        fix_anchor(monkeypatch, visit)
        guide = guide_of("random")
        found.append(rv.log_likelihood(guide.model, guide, x, num_samples=4000, seed=visit))
    for one, other in itertools.combinations(found, 2):
        error = (one.mcse**2 + other.mcse**2).sqrt()
        assert ((one.log_prob - other.log_prob).abs() < 4.0 * error).all()
    # Their bounds do not: each anchor has a gap of its own.
    bounds = torch.stack([one.elbo for one in found])
    assert (bounds.max(0).values - bounds.min(0).values).min() > 0.3


def test_chunks_of_draws_give_the_same_likelihood():
    x = CASE.sample(6, seed=10)
    value = exact(x, torch.ones(6, T, dtype=torch.bool))
    for chunk in (6 * 40, 10**9):
        for anchors in ("random", "mixture"):
            guide = guide_of(anchors)
            found = rv.log_likelihood(guide.model, guide, x, num_samples=1600, chunk_size=chunk, seed=0)
            assert ((found.log_prob - value).abs() < 4.0 * found.mcse).all()


def test_a_bound_of_many_draws_is_between_the_bound_and_the_likelihood():
    """The objectives of the library on these pairs: IWAE of the mixture above its ELBO, below ``log p``."""
    torch.manual_seed(0)
    n = 3000
    x = CASE.sample(1, seed=11).expand(n, -1, -1)
    value = float(CASE.log_prob(x[0], torch.ones(T, dtype=torch.bool)))
    guide = guide_of("mixture")
    elbo = -rv.ELBO().loss(guide.model, guide, x) / n
    iwae = -rv.IWAE(8).loss(guide.model, guide, x) / n
    assert elbo + 0.1 < iwae < value + 0.02
    options = {"num_particles": 4, "vectorize_particles": True}
    losses = []
    for loss in (rv.ELBO(**options), pyro.infer.Trace_ELBO(**options)):
        torch.manual_seed(1)
        losses.append(loss.loss(guide.model, guide, x[:50]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
