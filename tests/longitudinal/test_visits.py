from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal

import riemvae as rv
from riemvae._recipe import recipe_arguments
from riemvae.distributions.check import check_distribution
from riemvae.likelihoods import Gaussian
from riemvae.longitudinal import LongitudinalVAE
from riemvae.longitudinal.visit_encoders import GaussianProcessEncoder, VisitEncoder
from riemvae.longitudinal.visits import RepeatedPrior, VisitLatents, VisitProduct
from riemvae.priors import MixturePrior, StandardNormal, StudentTPrior, VampPrior
from riemvae.priors.gaussian_process import GaussianProcessPrior

KERNELS = ("rbf", "cauchy", "diffusion", "matern")
NOISE = 0.6


class LinearVisits:
    """A Gaussian process seen through an orthogonal linear decoder: all of it Gaussian, and known.

    Visits ``T`` in ``d`` dimensions, data of ``D``; ``x_l = C z_l + c + s e`` with ``Cᵀ C`` diagonal.
    """

    def __init__(self, kernel="cauchy", num_visits=4, times=None, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.num_visits, self.d, self.D, self.times = num_visits, 2, 3, times
        basis = torch.linalg.qr(torch.randn(3, 2, generator=g, dtype=torch.float64))[0]
        self.gains = torch.tensor([1.5, 0.5], dtype=torch.float64)
        self.C = basis * self.gains
        self.c = torch.randn(3, generator=g, dtype=torch.float64)
        scale = torch.tensor([0.2, 0.4] if kernel == "diffusion" else [1.0, 2.5], dtype=torch.float64)
        self.prior = GaussianProcessPrior(
            num_visits if times is None else None, 2, kernel, scale, learn=True
        ).double()

    def decoder(self):
        linear = torch.nn.Linear(2, 3).double()
        with torch.no_grad():
            linear.weight.copy_(self.C)
            linear.bias.copy_(self.c)
        return linear

    def encoder(self, off=0.0):
        """The pseudo-observations that make the posterior exact; ``off`` spoils them."""

        def encode(x):
            loc = (x - self.c) @ self.C / self.gains**2 + off
            return loc, ((1 + off) * NOISE / self.gains).expand_as(loc)

        return encode

    def visit_posterior(self):
        """Of each visit under the standard normal, somewhat too wide."""
        ratio = self.gains**2 / NOISE**2

        def encode(x):
            loc = (x - self.c) @ self.C / self.gains**2 * ratio / (1 + ratio)
            return loc, (1.2 * (1 + ratio) ** -0.5).expand_as(loc)

        return encode

    def model(self):
        latents = VisitLatents(self.prior.num_visits, 2)
        return LongitudinalVAE(self.decoder(), latents, self.prior, Gaussian(NOISE)).double()

    def joint(self, subject=0):
        """Covariance of all latents, ``(T d, T d)``, and the matrix from them to all data."""
        law = self.prior() if self.times is None else self.prior(self.times)
        per_process = law.covariance.detach()
        per_process = per_process if self.times is None else per_process[subject]
        cov = torch.zeros(self.num_visits, 2, self.num_visits, 2, dtype=torch.float64)
        for j in range(2):
            cov[:, j, :, j] = per_process[j]
        size = 2 * self.num_visits
        H = torch.block_diag(*[self.C] * self.num_visits)
        return cov.reshape(size, size), H

    def log_prob(self, x, observed, subject=0):
        cov, H = self.joint(subject)
        rows = observed.repeat_interleave(3)
        if not rows.any():
            return torch.zeros((), dtype=torch.float64)
        H = H[rows]
        full = H @ cov @ H.T + NOISE**2 * torch.eye(len(H), dtype=torch.float64)
        return MultivariateNormal(self.c.repeat(self.num_visits)[rows], full).log_prob(x.reshape(-1)[rows])

    def posterior(self, x, observed, subject=0):
        """Mean and covariance of the latents given the observed visits, by the textbook formula."""
        cov, H = self.joint(subject)
        rows = observed.repeat_interleave(3)
        H = H[rows]
        gain = cov @ H.T @ torch.linalg.inv(H @ cov @ H.T + NOISE**2 * torch.eye(len(H), dtype=torch.float64))
        centred = x.reshape(-1)[rows] - self.c.repeat(self.num_visits)[rows]
        return gain @ centred, cov - gain @ H @ cov


def sequences(size=6, num_visits=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, num_visits, 3, generator=g, dtype=torch.float64)
    observed = torch.rand(size, num_visits, generator=g) < 0.6
    observed[0], observed[1] = True, False
    return x, observed


def test_unrolling_takes_visits_out():
    latents = VisitLatents(3, 2)
    z_0 = torch.arange(24.0).reshape(2, 2, 6)
    z = latents.unroll(z_0).z
    assert z.shape == (2, 3, 2, 2)
    for visit in range(3):
        assert torch.equal(z[:, visit], z_0[..., 2 * visit : 2 * visit + 2])
    assert latents.unroll(z_0).log_det is None
    assert not latents.invertible
    timed = VisitLatents(None, 2)
    assert torch.equal(timed.unroll(z_0, torch.rand(2, 3)).z, z)
    assert torch.equal(VisitLatents(**recipe_arguments(latents)).unroll(z_0).z, z)


LAWS = {
    "normal": lambda: dist.Normal(torch.tensor([0.5, -1.0]).double(), 0.7).to_event(1),
    "mixture": lambda: MixturePrior(2, 3, locs=torch.tensor([[0.0, 1], [2, 0], [0, -1]])).double()(),
    "student": lambda: StudentTPrior(2, 5.0).double()(),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_product_over_visits(name):
    base = LAWS[name]()
    law = VisitProduct(base, 3)
    assert RepeatedPrior(lambda: base, 3)().event_shape == law.event_shape
    torch.manual_seed(0)
    z = torch.randn(5, 4, 6, dtype=torch.float64)
    expected = sum(base.log_prob(z[..., 2 * i : 2 * i + 2]) for i in range(3))
    assert torch.allclose(law.log_prob(z), expected)
    assert torch.allclose(law.expand((4,)).log_prob(z), expected)
    assert law.expand((5, 4)).log_prob(z[0, 0]).shape == (5, 4)
    assert law.expand((4,)).sample((5,)).shape == (5, 4, 6)
    assert law.has_rsample == base.has_rsample
    assert check_distribution(law, num_samples=2000).passed


def test_a_vamp_prior_a_visit():
    torch.manual_seed(0)
    vamp = VampPrior(rv.networks.MLPEncoder(3, 2, hidden=(8,)), torch.randn(7, 3))
    numbered, timed = RepeatedPrior(vamp, 4), RepeatedPrior(vamp)
    z = torch.randn(5, 8)
    expected = sum(vamp().log_prob(z[:, 2 * i : 2 * i + 2]) for i in range(4))
    assert torch.allclose(numbered().log_prob(z), expected, atol=1e-5)
    assert torch.allclose(timed(torch.rand(5, 4)).log_prob(z), expected, atol=1e-5)
    assert (numbered.takes_times, timed.takes_times) == (False, True)


# -- the GP-VAE against its closed form ------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_with_the_exact_posterior_weights_are_the_likelihood(kernel):
    task = LinearVisits(kernel)
    model = task.model()
    x, observed = sequences()
    guide = rv.guides.GaussianGuide(model, GaussianProcessEncoder(task.encoder(), task.prior), latent="z_0")
    torch.manual_seed(0)
    weights = rv.log_weights(model, guide, (x, observed), 4)
    expected = torch.stack([task.log_prob(a, b) for a, b in zip(x, observed)])
    # No Monte Carlo error at all: every draw of the exact posterior has the weight log p(x).
    assert torch.allclose(weights, expected.expand(4, -1), atol=1e-8)


@pytest.mark.parametrize("posterior", ["process", "visits"])
def test_any_other_posterior_estimates_the_same_likelihood(posterior):
    # A product over visits is far off where neighbours are strongly correlated: there, weights have no
    # variance.
    task = LinearVisits("cauchy" if posterior == "process" else "diffusion")
    model = task.model()
    x, observed = sequences()
    if posterior == "process":
        encoder = GaussianProcessEncoder(task.encoder(off=0.1), task.prior)
    else:
        encoder = VisitEncoder(task.visit_posterior())
    guide = rv.guides.GaussianGuide(model, encoder, latent="z_0")
    ll = rv.log_likelihood(model, guide, (x, observed), num_samples=4000, seed=0)
    expected = torch.stack([task.log_prob(a, b) for a, b in zip(x, observed)])
    # Its own standard errors, and five of them.
    assert bool(((ll.log_prob - expected).abs() < 5 * ll.mcse + 1e-6).all())
    assert float(ll.mcse.max()) < 0.1
    assert float((ll.log_prob - expected).abs().max()) > 1e-9  # not exact by accident


def test_an_unseen_subject_has_likelihood_one():
    task = LinearVisits()
    model = task.model()
    guide = rv.guides.GaussianGuide(model, GaussianProcessEncoder(task.encoder(), task.prior), latent="z_0")
    x = torch.full((2, 4, 3), float("nan"), dtype=torch.float64)
    observed = torch.zeros(2, 4, dtype=torch.bool)
    assert torch.allclose(
        rv.log_weights(model, guide, (x, observed), 3), torch.zeros(3, 2).double(), atol=1e-9
    )


@pytest.mark.parametrize("kernel", ["rbf", "matern"])
def test_irregular_times(kernel):
    g = torch.Generator().manual_seed(3)
    times = (4 * torch.rand(6, 4, generator=g, dtype=torch.float64)).sort(1)[0]
    task = LinearVisits(kernel, times=times)
    model = task.model()
    x, observed = sequences()
    # A missing visit may have no time; what its latent is then says nothing of the others.
    broken = torch.where(observed, times, float("nan"))
    guide = rv.guides.GaussianGuide(model, GaussianProcessEncoder(task.encoder(), task.prior), latent="z_0")
    torch.manual_seed(0)
    weights = rv.log_weights(model, guide, {"x": x, "observed": observed, "times": broken}, 4)
    expected = torch.stack([task.log_prob(x[i], observed[i], i) for i in range(6)])
    assert torch.allclose(weights, expected.expand(4, -1), atol=1e-7)
    assert model(times=times, size=6).shape == (6, 4, 3)


def test_learning_the_lengthscale_through_model_and_guide():
    # The bound with the exact posterior is the likelihood, so its maximum is that of the likelihood.
    task = LinearVisits("rbf", num_visits=8)
    model = task.model()
    with torch.no_grad():
        torch.manual_seed(0)
        x = model(size=400)
        true = task.prior.lengthscale.clone()
    for module in (model.decoder, model.likelihood):
        module.requires_grad_(False)
    model.prior = GaussianProcessPrior(8, 2, "rbf", 0.5 * true, learn=True).double()
    guide = rv.guides.GaussianGuide(model, GaussianProcessEncoder(task.encoder(), model.prior), latent="z_0")
    rv.fit(model, guide, x, max_epochs=30, batch_size=100, learning_rate=0.1, seed=0)
    assert torch.allclose(model.prior.lengthscale, true, rtol=0.15)


# -- whole pairs -----------------------------------------------------------------------------------------


def curves(size=64, num_visits=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    phase = 6.3 * torch.rand(size, 1, 1, generator=g)
    x = torch.sin(torch.arange(num_visits)[:, None] + torch.arange(5.0) + phase)
    return x + 0.1 * torch.randn(x.shape, generator=g), torch.rand(size, num_visits, generator=g) < 0.7


def pair(name, num_visits=4, dim=2):
    torch.manual_seed(0)
    encoder = rv.networks.MLPEncoder(5, dim, hidden=(16,))
    decoder = rv.networks.MLPDecoder(dim, 5, hidden=(16,))
    latents = VisitLatents(num_visits, dim)
    if name == "vae":
        prior, sequence_encoder = None, VisitEncoder(encoder)
    elif name == "vamp":
        prior = RepeatedPrior(VampPrior(encoder, curves()[0][:10, 0]), num_visits)
        sequence_encoder = VisitEncoder(encoder)
    else:
        prior = GaussianProcessPrior(num_visits, dim, name, learn=True)
        sequence_encoder = GaussianProcessEncoder(encoder, prior)
    model = LongitudinalVAE(decoder, latents, prior)
    return model, rv.guides.GaussianGuide(model, sequence_encoder, latent="z_0")


PAIRS = ("vae", "vamp", *KERNELS)


@pytest.mark.parametrize("name", PAIRS)
def test_it_trains(name):
    model, guide = pair(name)
    x, observed = curves()
    fit = rv.fit(model, guide, (x, observed), max_epochs=15, batch_size=32, learning_rate=5e-3, seed=0)
    losses = [epoch["train_loss"] for epoch in fit.history]
    assert losses[-1] < losses[0] - 0.5
    assert bool(torch.isfinite(rv.log_likelihood(model, guide, (x, observed), num_samples=5).log_prob).all())
    assert model(size=3).shape == (3, 4, 5)


@pytest.mark.parametrize("name", PAIRS)
def test_missing_values_change_nothing(name):
    model, guide = pair(name)
    x, observed = curves(8)
    pixel_mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) < 0.8
    seen = observed[..., None] & pixel_mask
    results = []
    for junk in (0.0, float("nan"), float("inf"), -1e30):
        broken = torch.where(seen, x, junk)
        torch.manual_seed(1)
        model.zero_grad()
        guide.zero_grad()
        loss = rv.inference.IWAE(num_samples=3).differentiable_loss(
            model, guide, broken, observed, pixel_mask
        )
        loss.backward()
        grads = [p.grad for m in (model, guide) for p in m.parameters()]
        assert all(bool(torch.isfinite(g).all()) for g in grads)
        results.append([loss.detach(), *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    # And what is seen does change it.
    torch.manual_seed(1)
    moved = rv.inference.IWAE(num_samples=3).differentiable_loss(model, guide, x + 0.1, observed, pixel_mask)
    assert not torch.equal(moved.detach(), results[0][0])


@pytest.mark.parametrize("name", PAIRS)
def test_all_seen_is_no_mask(name):
    model, guide = pair(name)
    x, _ = curves(8)
    results = []
    for arguments in ((x,), (x, torch.ones(8, 4, dtype=torch.bool))):
        torch.manual_seed(0)
        results.append(rv.log_weights(model, guide, arguments, 3))
    assert torch.equal(*results)


def test_one_visit_is_a_vae():
    torch.manual_seed(0)
    encoder = rv.networks.MLPEncoder(5, 2, hidden=(16,))
    decoder = rv.networks.MLPDecoder(2, 5, hidden=(16,))
    x = curves(8, 1)[0]
    sequence = LongitudinalVAE(decoder, VisitLatents(1, 2))
    plain = rv.VAE(decoder, latent_dim=2, likelihood="gaussian")
    weights = []
    for model, guide, data in (
        (sequence, rv.guides.GaussianGuide(sequence, VisitEncoder(encoder), latent="z_0"), x),
        (plain, rv.guides.GaussianGuide(plain, encoder), x[:, 0]),
    ):
        torch.manual_seed(1)
        weights.append(rv.log_weights(model, guide, data, 3))
    assert torch.allclose(*weights, atol=1e-5)


def test_a_fixed_distribution_repeated():
    base = dist.Normal(torch.tensor([0.5, -1.0]), 0.7).to_event(1)
    prior = RepeatedPrior(base, 3).double()
    assert prior().sample().dtype == torch.float64


BAD = {
    "num_visits": lambda: VisitLatents(0, 2),
    "latent_dim": lambda: VisitLatents(3, 0),
    "z_0": lambda: VisitLatents(3, 2).unroll(torch.zeros(4, 5)),
    "log_det": lambda: VisitLatents(3, 2).unroll(torch.zeros(4, 6), log_det=True),
    "times": lambda: VisitLatents(None, 2).unroll(torch.zeros(4, 6)),
    "times: number": lambda: VisitLatents(3, 2).unroll(torch.zeros(4, 6), torch.zeros(4, 2)),
    "times: prior": lambda: RepeatedPrior(StandardNormal(2))(),
    "prior": lambda: RepeatedPrior(3),
    "prior: batch": lambda: VisitProduct(dist.Normal(torch.zeros(3, 2), 1.0).to_event(1), 3),
    "prior: support": lambda: VisitProduct(dist.LogNormal(torch.zeros(2), 1.0).to_event(1), 3),
    "value": lambda: RepeatedPrior(StandardNormal(2), 3)().log_prob(torch.zeros(5)),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_argument(name):
    with pytest.raises(ValueError, match=f"^{name.split(':')[0]}: expected"):
        BAD[name]()
