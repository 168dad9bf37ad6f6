"""The anchored guide: whose anchors it draws, its densities, its spread of draws, and what it is told."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from flow_cases import make_flow, roughen
from longitudinal_oracles import AffineSequences, Growth
from pyro import poutine
from torch import nn
from torch.distributions import AffineTransform

import riemvae as rv
from riemvae.flows import IAF, NSF
from riemvae.longitudinal import AnchoredGuide, AnchorMixture, AnchorPosterior, FlowChain, LongitudinalVAE
from riemvae.networks import MLPEncoder
from riemvae.priors import MixturePrior, VampPrior

F64 = torch.float64
CASE = AffineSequences()
T, D = CASE.num_visits, CASE.latent_dim
OBSERVED = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 1]]).bool()
B = len(OBSERVED)

# The 0.999 quantiles of chi-square with 1, 2 and 3 degrees of freedom.
CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27}


def affine(anchors="random", **options):
    return AnchoredGuide(CASE.model(), CASE.visit_posterior(), anchors=anchors, **options)


def fix_anchors(monkeypatch, visits):
    """What ``torch.multinomial`` draws from now on, ``(B,)``."""
    monkeypatch.setattr(torch, "multinomial", lambda p, n: visits.clone().unsqueeze(1))


# -- the anchors -------------------------------------------------------------------------------------------


def chi_square(found, m):
    """Of draws ``found`` from ``m`` equal chances."""
    counts = torch.bincount(found, minlength=m).to(F64)
    expected = len(found) / m
    return float(((counts - expected) ** 2 / expected).sum())


def test_anchors_are_uniform_over_the_subjects_own_observed_visits():
    torch.manual_seed(0)
    n = 6000
    x = CASE.sample(1).expand(n, -1, -1)
    for row in OBSERVED:
        visit = affine().posterior(x, row.expand(n, -1)).visit
        own = row.nonzero().squeeze(1)
        assert set(visit.tolist()) == set(own.tolist())
        if len(own) > 1:
            assert chi_square(torch.searchsorted(own, visit), len(own)) < CHI_SQUARE[len(own) - 1]


def test_anchors_are_drawn_for_each_subject_and_not_for_the_batch():
    torch.manual_seed(0)
    guide, x = affine(), CASE.sample(2)
    drawn = torch.stack([guide.posterior(x).visit for _ in range(1500)])
    # All pairs of anchors of two subjects are equally likely: independent of one another.
    counts = torch.bincount(T * drawn[:, 0] + drawn[:, 1], minlength=T * T).to(F64)
    expected = len(drawn) / T**2
    assert ((counts - expected) ** 2 / expected).sum() < 37.7  # the 0.999 quantile with 15 degrees


def test_one_anchor_a_subject_for_all_draws_of_a_call():
    torch.manual_seed(0)
    guide, x = affine(), CASE.sample(B)
    calls = []
    encoder = guide.encoder
    guide.encoder = lambda x: (calls.append(x.clone()), encoder(x))[1]
    with pyro.plate("particles", 50, dim=-3):
        guide(x, OBSERVED)
    (rows,) = calls
    assert rows.shape == (B, CASE.data_dim)  # the anchors, and nothing else, are encoded
    for b in range(B):
        chosen = [v for v in range(T) if torch.equal(x[b, v], rows[b])]
        assert len(chosen) == 1 and OBSERVED[b, chosen[0]]


def test_encoders_never_see_what_is_missing():
    x = torch.where(OBSERVED[..., None], CASE.sample(B), math.nan)
    for anchors in ("random", "mixture"):

        def encode(x):
            assert torch.isfinite(x).all()
            return CASE.visit_posterior()(x)

        guide = AnchoredGuide(CASE.model(), encode, anchors=anchors)
        assert torch.isfinite(guide(x, OBSERVED)["z_0"]).all()


# -- densities ---------------------------------------------------------------------------------------------


def exact_components(x, z_0):
    """``log q_k(z_0)`` of each subject's every visit by the oracle, ``(..., T, B)``."""
    loc, scale = CASE.visit_posterior()(x)
    rows = [
        torch.stack(
            [CASE.anchor_log_prob(k, loc[b, k], scale[b, k]).log_prob(z_0[..., b, :]) for b in range(B)], -1
        )
        for k in range(T)
    ]
    return torch.stack(rows, -2)


@pytest.mark.parametrize("visits", [[0, 1, 2, 3, 3], [3, 1, 0, 2, 0]])
def test_the_density_of_a_single_anchor_is_the_known_gaussian(visits, monkeypatch):
    torch.manual_seed(0)
    visits, x = torch.tensor(visits), CASE.sample(B)
    fix_anchors(monkeypatch, visits)
    posterior = affine().posterior(x, OBSERVED)
    assert isinstance(posterior, AnchorPosterior)
    assert posterior.batch_shape == (B,) and posterior.event_shape == (D,) and posterior.has_rsample
    z_0 = torch.randn(7, B, D, dtype=F64)
    every = exact_components(x, z_0)
    expected = every.gather(-2, visits.expand(7, 1, B)).squeeze(-2)
    torch.testing.assert_close(posterior.log_prob(z_0), expected, rtol=0, atol=1e-9)
    # Its own draws, whose density it remembers, and those of an expanded one.
    draw = posterior.rsample((7,))
    expected = exact_components(x, draw).gather(-2, visits.expand(7, 1, B)).squeeze(-2)
    torch.testing.assert_close(posterior.log_prob(draw), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(posterior.log_prob(draw.clone()), expected, rtol=0, atol=1e-9)
    wide = posterior.expand((7, 1, B))
    assert wide.batch_shape == (7, 1, B)
    draw = wide.rsample()
    assert draw.shape == (7, 1, B, D)
    torch.testing.assert_close(wide.log_prob(draw), wide.log_prob(draw.clone()), rtol=0, atol=1e-9)
    assert wide.log_prob(draw).shape == (7, 1, B)


def test_draws_of_a_single_anchor_have_its_moments(monkeypatch):
    visits, x = torch.tensor([0, 1, 2, 3, 3]), CASE.sample(B)
    fix_anchors(monkeypatch, visits)
    torch.manual_seed(0)
    n = 20_000
    draws = affine().posterior(x).rsample((n,))
    loc, scale = CASE.visit_posterior()(x)
    for b, k in enumerate(visits.tolist()):
        exact = CASE.anchor_log_prob(k, loc[b, k], scale[b, k])
        spread = exact.covariance_matrix.diagonal()
        assert ((draws[:, b].mean(0) - exact.mean) / (spread / n).sqrt()).abs().max() < 4.5
        deviation = ((spread[:, None] * spread + exact.covariance_matrix**2) / n).sqrt()
        assert ((draws[:, b].T.cov() - exact.covariance_matrix) / deviation).abs().max() < 4.5


def test_the_density_of_the_mixture_is_the_mean_of_its_components():
    torch.manual_seed(0)
    x = CASE.sample(B)
    mixture = affine("mixture").posterior(x, OBSERVED)
    assert isinstance(mixture, AnchorMixture) and mixture.batch_shape == (B,)
    for z_0 in (torch.randn(6, B, D, dtype=F64), mixture.rsample((6,)), mixture.rsample((6,)).clone()):
        every = exact_components(x, z_0)
        own = torch.where(OBSERVED.T, every, -math.inf)
        expected = own.logsumexp(-2) - OBSERVED.sum(1).to(F64).log()
        torch.testing.assert_close(mixture.log_prob(z_0), expected, rtol=0, atol=1e-9)
        path = CASE.model().dynamics.unroll(z_0, log_det=True)
        components = mixture.component_log_prob(path.z, path.log_det)
        torch.testing.assert_close(components, own, rtol=0, atol=1e-9)


def test_the_site_in_a_trace_has_that_density():
    torch.manual_seed(0)
    x = CASE.sample(B)
    for lead in ((), (6,)):
        for anchors in ("random", "mixture"):
            guide = affine(anchors)
            with pyro.plate("particles", 6, dim=-3) if lead else poutine.block(hide=[]):
                trace = poutine.trace(guide).get_trace(x, OBSERVED)
            latents = [
                n for n, s in trace.nodes.items() if s["type"] == "sample" and "Subsample" not in str(s["fn"])
            ]
            assert latents == ["z_0"]  # one site: no auxiliary ones, no factor
            site = trace.nodes["z_0"]
            assert site["value"].shape == ((*lead, 1, B, D) if lead else (B, D))
            every = exact_components(x, site["value"])
            if anchors == "mixture":
                own = torch.where(OBSERVED.T, every, -math.inf)
                expected = own.logsumexp(-2) - OBSERVED.sum(1).to(F64).log()
                torch.testing.assert_close(site["fn"].log_prob(site["value"]), expected, rtol=0, atol=1e-9)
            else:
                found = site["fn"].log_prob(site["value"]).unsqueeze(-2)
                assert ((found - every).abs().min(-2).values < 1e-9).all()


class Features(nn.Module):
    """The context of a posterior flow."""

    def forward(self, x):
        return torch.stack([x.sum(-1), x[..., 0]], -1)


def nonlinear(d, posterior_flow, anchors):
    """Nonlinear transitions and an encoder that is not the posterior, two subjects, three visits."""
    torch.manual_seed(0)
    transitions = [
        make_flow("iaf" if d > 1 else "nsf", d, scale=0.2 if d > 1 else 0.4, seed=k) for k in range(2)
    ]
    model = LongitudinalVAE(nn.Linear(d, 3), FlowChain(transitions, d)).double()
    flow = None if posterior_flow is None else posterior_flow(d)
    guide = AnchoredGuide(
        model,
        lambda x: (0.3 * x[:, :d], 0.5 + 0.3 * x[:, :d].sigmoid()),
        flow,
        context=None if flow is None else Features(),
        anchors=anchors,
    ).double()
    x = torch.randn(2, 3, 3, dtype=F64)
    return model, guide, x, torch.tensor([[1, 1, 1], [0, 1, 1]]).bool()


POSTERIOR_FLOWS = {
    "none": None,
    "iaf": lambda d: make_flow("iaf", d, 2, scale=0.3),
    "two": lambda d: [make_flow("iaf", d, 2, scale=0.2), make_flow("maf", d, 2, scale=0.2, seed=1)],
}


@pytest.mark.parametrize("anchors", ["random", "mixture"])
@pytest.mark.parametrize("flow", POSTERIOR_FLOWS)
@pytest.mark.parametrize("d", [1, 2])
def test_the_density_of_the_subjects_latent_integrates_to_one(d, flow, anchors):
    """A missing or reversed log-determinant of the dynamics or of the posterior flow is seen here."""
    _, guide, x, observed = nonlinear(d, POSTERIOR_FLOWS[flow], anchors)
    # A sinh grid: the tails of a pulled back density reach far. The trapezium rule converges fast on it.
    nodes, width = (4001, 7.0) if d == 1 else (201, 4.6)
    t = torch.linspace(-width, width, nodes, dtype=F64)
    axis, weight = t.sinh(), t.cosh() * (t[1] - t[0])
    grid = torch.cartesian_prod(*[axis] * d).reshape(-1, 1, d).expand(-1, 2, d)
    weights = torch.cartesian_prod(*[weight] * d).reshape(-1, d).prod(-1, keepdim=True)
    torch.manual_seed(1)
    with torch.no_grad():
        posterior = guide.posterior(x, observed)
        total = (posterior.log_prob(grid).exp() * weights).sum(0)
    torch.testing.assert_close(total, torch.ones(2, dtype=F64), rtol=0, atol=3e-4 if d == 1 else 2e-3)


@pytest.mark.parametrize("anchors", ["random", "mixture"])
@pytest.mark.parametrize("flow", POSTERIOR_FLOWS)
def test_the_density_of_draws_is_that_of_the_points_where_they_lie(flow, anchors):
    _, guide, x, observed = nonlinear(2, POSTERIOR_FLOWS[flow], anchors)
    posterior = guide.posterior(x, observed)
    draws = posterior.rsample((9,))
    torch.testing.assert_close(
        posterior.log_prob(draws), posterior.log_prob(draws.clone()), rtol=0, atol=1e-7
    )
    # And their gradients, to every parameter.
    parameters = [p for m in (guide, guide.dynamics) for p in m.parameters()]
    weight = torch.randn(9, 2, dtype=F64)
    found = [
        torch.autograd.grad((weight * log_prob).sum(), parameters, retain_graph=True, allow_unused=True)
        for log_prob in (posterior.log_prob(draws), posterior.log_prob(draws * 1.0))
    ]
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# -- the spread of the mixture's draws ---------------------------------------------------------------------


def components_of(draws, x):
    """From which visit each draw comes: an encoder with a tiny scale gives them away, ``(S, B)``."""
    z = CASE.model().dynamics.unroll(draws).z
    loc = CASE.visit_posterior()(x)[0]
    return (z - loc.transpose(0, 1)).norm(dim=-1).argmin(-2)


def tight():
    """An encoder without spread, by which draws show their anchor."""
    encode = CASE.visit_posterior()
    return lambda x: (encode(x)[0], torch.full_like(encode(x)[0], 1e-6))


@pytest.mark.parametrize("num_samples", [12, 60])
def test_draws_are_spread_evenly_over_the_anchors(num_samples):
    torch.manual_seed(0)
    guide, x = AnchoredGuide(CASE.model(), tight(), anchors="mixture"), CASE.sample(B)
    with pyro.plate("particles", num_samples, dim=-3):
        draws = guide(x, OBSERVED)["z_0"].squeeze(-3)
    found = components_of(draws, x)
    for b in range(B):  # 12 is a multiple of 1, 2, 3 and 4
        counts = torch.bincount(found[:, b], minlength=T)
        m = int(OBSERVED[b].sum())
        assert counts.tolist() == [num_samples // m if seen else 0 for seen in OBSERVED[b]]


def test_numbers_that_do_not_divide_are_spread_within_one():
    torch.manual_seed(0)
    guide, x = AnchoredGuide(CASE.model(), tight(), anchors="mixture"), CASE.sample(B)
    found = components_of(guide.posterior(x).rsample((10,)), x)
    for b in range(B):
        assert sorted(torch.bincount(found[:, b], minlength=T).tolist()) == [2, 2, 3, 3]


def test_each_draw_by_itself_is_one_of_the_mixture():
    """Any of the draws of a call, the first alone or the last, falls on each anchor equally often."""
    torch.manual_seed(0)
    n = 6000
    guide = AnchoredGuide(CASE.model(), tight(), anchors="mixture")
    x = CASE.sample(1).expand(n, -1, -1)
    for row in (OBSERVED[0], OBSERVED[2], OBSERVED[3]):
        own = row.nonzero().squeeze(1)
        found = components_of(guide.posterior(x, row.expand(n, -1)).rsample((3,)), x)
        for s in range(3):
            chosen = torch.searchsorted(own, found[s])
            assert (own[chosen] == found[s]).all()
            assert chi_square(chosen, len(own)) < CHI_SQUARE[len(own) - 1]
    # A single draw, as a step of training makes.
    single = components_of(guide.posterior(x).rsample().unsqueeze(0), x)[0]
    assert chi_square(single, T) < CHI_SQUARE[T - 1]


def test_subjects_start_their_spread_independently():
    torch.manual_seed(0)
    guide, x = AnchoredGuide(CASE.model(), tight(), anchors="mixture"), CASE.sample(1).expand(400, -1, -1)
    first = components_of(guide.posterior(x).rsample((4,)), x)[0]
    assert chi_square(first, T) < CHI_SQUARE[T - 1]


# -- permutations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchors", ["random", "mixture"])
def test_permuting_subjects_permutes_outputs_with_noise_and_anchors_fixed(anchors, monkeypatch):
    model, guide, _, _ = nonlinear(2, POSTERIOR_FLOWS["iaf"], anchors)
    torch.manual_seed(2)
    visits, samples = 3, 8
    x = torch.randn(B, visits, 3, dtype=F64)
    observed = OBSERVED[:, 1:]
    pixels = torch.rand(x.shape) < 0.7
    pixels[..., 0] = True
    chosen, offset = torch.tensor([0, 0, 1, 2, 2]), torch.rand(B)
    shape = (samples, 1, B, 2) if anchors == "random" else (samples, 1, visits, B, 2)
    noise = torch.randn(shape, dtype=F64)
    pixels[torch.arange(B), chosen] = True

    def weights(order):
        def standard_normal(size, dtype, device):
            if torch.Size(size).numel() != noise.numel():  # the model's look at itself
                return torch.zeros(size)
            return noise.index_select(-2, order).reshape(size)

        with monkeypatch.context() as patch:
            patch.setattr(torch.distributions.normal, "_standard_normal", standard_normal)
            patch.setattr(torch, "multinomial", lambda p, n: chosen[order].unsqueeze(1))
            patch.setattr(torch, "rand", lambda size, device=None: offset[order])
            data = {"x": x[order], "observed": observed[order], "pixel_mask": pixels[order]}
            particles = pyro.plate("particles", samples, dim=-3)
            with particles:
                trace = poutine.trace(guide).get_trace(**data)
            with particles:
                joint = poutine.trace(poutine.replay(model, trace)).get_trace(**data)
        joint.compute_log_prob()
        site = trace.nodes["z_0"]
        return (
            site["value"].squeeze(-3),
            site["fn"].log_prob(site["value"]).squeeze(-2),
            joint.nodes["x"]["log_prob"],
        )

    order = torch.tensor([3, 0, 4, 1, 2])
    plain, permuted = weights(torch.arange(B)), weights(order)
    dims = (-2, -1, -1)
    for one, other, dim in zip(plain, permuted, dims):
        torch.testing.assert_close(other, one.index_select(dim, order), rtol=0, atol=1e-9)


# -- subjects of whom nothing is seen ----------------------------------------------------------------------


@pytest.mark.parametrize("anchors", ["random", "mixture"])
@pytest.mark.parametrize("kind", ["pair", "distribution", "flow", "times"])
def test_a_subject_nobody_saw_has_the_standard_normal(kind, anchors):
    """Also where the first visit is not the subject's latent, and whatever the networks say of nothing."""
    torch.manual_seed(0)

    def pair(x):
        return 3.0 + x[:, :2], 0.1 + x[:, :2].abs()

    encoder = pair if kind != "distribution" else lambda x: dist.Laplace(*pair(x)).to_event(1)
    if kind == "times":
        model = LongitudinalVAE(nn.Linear(2, 3), Growth(2)).double()
        given = {"times": 2.0 + torch.rand(3, 2, dtype=F64)}
    else:
        model, given = (
            LongitudinalVAE(nn.Linear(2, 3), FlowChain([AffineTransform(1.0, 3.0)], 2)).double(),
            {},
        )
    guide = AnchoredGuide(model, encoder, make_flow("iaf", 2) if kind == "flow" else None, anchors=anchors)
    x = torch.randn(3, 2, 3, dtype=F64)
    x[1] = math.nan
    observed = torch.tensor([[1, 1], [0, 0], [0, 1]]).bool()
    posterior = guide.posterior(x, observed, **given)
    z = torch.randn(5, 3, 2, dtype=F64)
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    found = posterior.log_prob(z)
    torch.testing.assert_close(found[:, 1], expected[:, 1])
    assert (found[:, [0, 2]] - expected[:, [0, 2]]).abs().min() > 1e-3
    draws = posterior.rsample((8000,))
    torch.testing.assert_close(
        posterior.log_prob(draws)[:, 1], dist.Normal(0.0, 1.0).log_prob(draws[:, 1]).sum(-1)
    )
    moments = torch.stack([draws[:, 1].mean(0), draws[:, 1].square().mean(0) - 1.0])
    assert (moments / torch.tensor([[1.0], [2.0**0.5]]) * 8000**0.5).abs().max() < 4.5
    # The others are what they are without such a neighbour.
    alone = guide.posterior(x[2:], observed[2:], **{k: v[2:] for k, v in given.items()})
    torch.testing.assert_close(found[:, 2:], alone.log_prob(z[:, 2:]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("anchors", ["random", "mixture"])
@pytest.mark.parametrize("kind", ["mixture", "vamp"])
def test_a_subject_nobody_saw_pulls_on_nothing(kind, anchors):
    """Its bound is 0 = log p(nothing), draw by draw, and so are gradients, of a prior that learns too."""
    torch.manual_seed(1)
    encoder = MLPEncoder(3, 2, (8,)).double()
    prior = MixturePrior.from_codes(torch.randn(40, 2, dtype=F64) + 3, 2, seed=0)
    if kind == "vamp":
        prior = VampPrior(encoder, torch.randn(4, 3, dtype=F64), learn_pseudo_inputs=True)
    flow = make_flow("nsf", 2).double()
    model = LongitudinalVAE(nn.Linear(2, 3).double(), FlowChain([flow], 2), prior)
    guide = AnchoredGuide(model, encoder, anchors=anchors)
    x = torch.randn(3, 2, 3, dtype=F64)
    observed = torch.tensor([[1, 1], [0, 0], [0, 0]]).bool()
    posterior = guide.posterior(x, observed)
    z_0 = posterior.rsample((4000,))
    data = model.seen_part(x, observed, None, None)
    joint = model.log_prob_visits(model.trajectory(z_0), data).sum(-2) + model.prior_of().log_prob(z_0)
    bounds = joint - posterior.log_prob(z_0)
    assert torch.equal(bounds[:, 1:], torch.zeros(4000, 2, dtype=F64)) and bounds[:, 0].abs().min() > 0
    bounds[:, 1:].sum().backward()
    parameters = [*model.parameters(), *guide.parameters()]
    assert all(p.grad is None or p.grad.abs().max() < 1e-8 for p in parameters)
    # And it is drawn from the prior.
    law = model.prior_of()
    draws, expected = z_0[:, 1:].detach(), law.sample((8000,))
    error = (draws.flatten(0, 1).mean(0) - expected.mean(0)) / expected.std(0) * 4000**0.5
    assert error.abs().max() < 4.5


# -- what it is made of ------------------------------------------------------------------------------------


def test_an_encoder_with_a_second_argument_is_told_the_mask():
    told = []

    class Encoder(nn.Module):
        def forward(self, x, mask):
            told.append((x, mask))
            return x[:, :2], torch.ones_like(x[:, :2])

    x = CASE.sample(B)
    pixels = torch.rand(x.shape) < 0.6
    pixels[..., 0] = True
    guide = AnchoredGuide(CASE.model(), Encoder(), anchors="mixture")
    guide(x, OBSERVED, pixels)
    guide(x, OBSERVED)
    seen = OBSERVED[..., None] & pixels
    values, mask = told[0]
    assert mask.dtype == torch.bool
    rows = OBSERVED.T.reshape(-1)  # in the order of the plates
    assert torch.equal(mask[rows], pixels.transpose(0, 1).reshape(-1, 3)[rows])
    visits = torch.where(seen, x, 0.0).transpose(0, 1)
    assert torch.equal(values[rows], visits.reshape(-1, 3)[rows])
    # In place of a visit that is not seen the encoder gets one that is: the subject's first, or another's.
    for value, told_mask, subject in zip(values[~rows], mask[~rows], rows.logical_not().nonzero() % B):
        known = OBSERVED[subject.item()]
        owner = subject.item() if known.any() else int(OBSERVED.any(1).to(torch.uint8).argmax())
        first = int(OBSERVED[owner].to(torch.uint8).argmax())
        assert torch.equal(value, visits[first, owner])
        assert torch.equal(told_mask, pixels[owner, first])
    assert told[1][1].all()
    # With random anchors those of the anchors.
    told.clear()
    posterior = AnchoredGuide(CASE.model(), Encoder()).posterior(x, OBSERVED, pixels)
    assert torch.equal(told[0][1], pixels[torch.arange(B), posterior.visit])


@pytest.mark.parametrize("anchors", ["random", "mixture"])
def test_an_encoder_that_divides_by_what_is_seen_has_finite_gradients(anchors):
    """The mean of the seen pixels: of a visit without any it is 0 / 0."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 2)

        def forward(self, x, mask):
            mean = (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            loc = self.layer(mean.to(self.layer.weight))
            return loc.to(x), torch.ones_like(loc).to(x)

    encoder, x = Encoder(), CASE.sample(B)
    pixels = torch.rand(x.shape) < 0.6
    pixels[..., 0] = True
    pixels[:, 1] = False
    guide = AnchoredGuide(CASE.model(), encoder, anchors=anchors)
    pyro.infer.Trace_ELBO().differentiable_loss(guide.model, guide, x, OBSERVED, pixels).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in encoder.parameters())


def test_an_encoder_may_return_a_distribution():
    x = CASE.sample(B)
    encode = CASE.visit_posterior()
    torch.manual_seed(0)
    pair = affine("mixture").posterior(x, OBSERVED)
    other = AnchoredGuide(
        CASE.model(),
        lambda x: dist.MultivariateNormal(encode(x)[0], torch.diag_embed(encode(x)[1] ** 2)),
        anchors="mixture",
    ).posterior(x, OBSERVED)
    z = torch.randn(4, B, D, dtype=F64)
    torch.testing.assert_close(pair.log_prob(z), other.log_prob(z))


def test_flows_in_a_list_train_and_act_in_their_order():
    model = LongitudinalVAE(nn.Linear(2, 3), FlowChain([], 2))
    flows = [roughen(IAF(2, hidden=(4,)), 0.5), AffineTransform(torch.tensor([1.0, 2.0]), 3.0)]
    for many in (flows, [flows[0], roughen(NSF(2, hidden=(4,)), 0.2)]):
        guide = AnchoredGuide(model, lambda x: (x[:, :2], torch.ones(len(x), 2)), many)
        expected = {id(p) for part in many if isinstance(part, nn.Module) for p in part.parameters()}
        assert expected == {id(p) for p in guide.parameters()}
        with poutine.trace(param_only=True) as captured:
            guide(torch.randn(4, 1, 3))
        assert expected == {id(s["value"].unconstrained()) for s in captured.trace.nodes.values()}
    x = torch.randn(4, 1, 3)
    guide = AnchoredGuide(model, lambda x: (x[:, :2], torch.full((len(x), 2), 1e-7)), flows)
    expected = flows[1](flows[0]().transform.inv(x[:, 0, :2]))
    torch.testing.assert_close(guide(x)["z_0"], expected, rtol=1e-4, atol=1e-4)


def test_a_copy_of_the_pair_goes_on_alone_and_a_saved_one_comes_back(tmp_path):
    torch.manual_seed(0)
    model = LongitudinalVAE(
        rv.networks.MLPDecoder(2, 3, hidden=(4,)), FlowChain([roughen(IAF(2, hidden=(4,)))], 2)
    )
    guide = AnchoredGuide(
        model, rv.networks.MLPEncoder(3, 2, hidden=(4,)), IAF(2, hidden=(4,)), anchors="mixture"
    )
    x = torch.randn(B, 2, 3)
    data = {"x": torch.where(OBSERVED[:, :2, None], x, math.nan), "observed": OBSERVED[:, :2]}
    torch.manual_seed(1)
    expected = rv.log_weights(model, guide, data, 5)
    twin_model, twin = copy.deepcopy((model, guide))
    assert twin.model is twin_model and twin.dynamics is twin_model.dynamics
    with torch.no_grad():
        for parameter in [*twin_model.parameters(), *twin.parameters()]:
            parameter.add_(0.1)
    rv.save(tmp_path / "pair", model, guide)
    loaded_model, loaded = rv.load(tmp_path / "pair")
    for pair, same in (((model, guide), True), ((loaded_model, loaded), True), ((twin_model, twin), False)):
        torch.manual_seed(1)
        assert torch.equal(rv.log_weights(*pair, data, 5), expected) == same
    assert loaded.anchors == "mixture"


@pytest.mark.parametrize("anchors", ["random", "mixture"])
def test_hamiltonian_refinement_on_top_keeps_the_likelihood(anchors):
    x = CASE.sample(B)
    # Wider than the oracle's encoder: light tails, and so an estimate whose error is known.
    encode = CASE.visit_posterior()
    base = AnchoredGuide(CASE.model(), lambda x: (encode(x)[0], 1.5 * encode(x)[1]), anchors=anchors)
    guide = rv.guides.HamiltonianGuide(
        base.model, base, num_steps=3, step_size=0.1, tempering=1.0, latent="z_0"
    )
    found = rv.log_likelihood(base.model, guide, {"x": x, "observed": OBSERVED}, num_samples=4000, seed=0)
    exact = torch.stack([CASE.log_prob(x[b], OBSERVED[b]) for b in range(B)])
    assert ((found.log_prob - exact).abs() < 4.5 * found.mcse + 1e-9).all()
    assert found.mcse.max() < 0.15


def test_what_does_not_fit_is_refused():
    model = CASE.model()
    encoder = CASE.visit_posterior()
    with pytest.raises(ValueError, match=r"anchors: .*'random', 'mixture'"):
        AnchoredGuide(model, encoder, anchors="all")
    vae = rv.VAE(nn.Linear(2, 3), 2)
    for bad in (vae, lambda x: x):
        with pytest.raises(ValueError, match=r"model: .*invertible"):
            AnchoredGuide(bad, encoder)

    class OneWay(Growth):
        invertible = False

    with pytest.raises(ValueError, match=r"model: .*OneWay.*GaussianGuide"):
        AnchoredGuide(LongitudinalVAE(nn.Linear(2, 3), OneWay(2)), encoder)
    x = CASE.sample(B)
    with pytest.raises(ValueError, match=r"encoder: .*event shape \(2,\)"):
        AnchoredGuide(model, lambda x: (x, x.exp()))(x)
    with pytest.raises(ValueError, match=r"encoder: .*loc, scale"):
        AnchoredGuide(model, lambda x: x.sum())(x)
    with pytest.raises(ValueError, match="flow"):
        AnchoredGuide(model, encoder, [])
    with pytest.raises(ValueError, match="flow"):
        AnchoredGuide(model, encoder, 3)
    with pytest.raises(ValueError, match=r"flow: .*2 features"):
        AnchoredGuide(model, encoder, IAF(3).double())(x)
    with pytest.raises(ValueError, match="context"):
        AnchoredGuide(model, encoder, IAF(2, 4).double())(x)
    with pytest.raises(ValueError, match=r"x: .*data for the encoder"):
        affine()(size=3)
