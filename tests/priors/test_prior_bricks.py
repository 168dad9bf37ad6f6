"""Priors that are learned or fixed: what they are, that they train, and that a guide of them is unbiased."""

from __future__ import annotations

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import GUIDES, gauss_hermite, make_guide, traced_weights
from pyro.infer import SVI, Trace_ELBO
from scipy.special import roots_legendre
from sklearn.datasets import load_digits
from torch import nn

import riemvae as rv
from riemvae.distributions.check import check_distribution
from riemvae.guides.evaluation import evaluating
from riemvae.networks import MLPDecoder, MLPEncoder
from riemvae.priors.constrained import DirichletPrior, GammaPrior, LogNormalPrior
from riemvae.priors.full_covariance import FullCovarianceNormal
from riemvae.priors.mixture import MixturePrior
from riemvae.priors.parameters import Positive
from riemvae.priors.sparse import HorseshoePrior, SpikeAndSlabPrior
from riemvae.priors.student import StudentTPrior

F64 = torch.float64
TRIL = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.0, 0.3, 0.4]])


def codes():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(300, 3, generator=generator) * torch.tensor([1.0, 2.0, 0.5])
    return z + 4.0 * torch.randint(2, (300, 1), generator=generator)


PRIORS = {
    "full covariance": lambda learn: FullCovarianceNormal(3, 0.5, TRIL, learn=learn),
    "mixture": lambda learn: MixturePrior(3, 4, learn=learn),
    "fitted mixture": lambda learn: MixturePrior.from_codes(codes(), 2, learn=learn, seed=0),
    "full mixture": lambda learn: MixturePrior.from_codes(codes(), 2, learn=learn, full=True, seed=0),
    "student": lambda learn: StudentTPrior(3, torch.tensor([2.0, 4.0, 30.0]), learn=learn),
    "horseshoe": lambda learn: HorseshoePrior(3, 0.5, learn=learn),
    "spike and slab": lambda learn: SpikeAndSlabPrior(3, inclusion=0.3, learn=learn),
    "spike and t": lambda learn: SpikeAndSlabPrior(3, "student", 0.3, slab_scale=2.0, learn=learn),
    "dirichlet": lambda learn: DirichletPrior(3, torch.tensor([0.8, 1.0, 2.0]), learn=learn),
    "log-normal": lambda learn: LogNormalPrior(3, 0.2, 0.5, learn=learn),
    "gamma": lambda learn: GammaPrior(3, 1.5, 2.0, learn=learn),
}


@pytest.mark.parametrize("name", PRIORS)
def test_it_is_what_it_says_learned(name):
    torch.manual_seed(0)
    assert check_distribution(PRIORS[name](True).double(), num_samples=4000).passed


@pytest.mark.parametrize("name", PRIORS)
def test_learned_and_fixed_start_as_one(name):
    torch.manual_seed(0)
    learned = PRIORS[name](True).double()
    torch.manual_seed(0)
    fixed = PRIORS[name](False).double()
    assert list(fixed.parameters()) == [] and list(learned.parameters())
    z = fixed().sample((50,))
    assert z.dtype == F64 and z.shape == (50, 3)
    torch.testing.assert_close(learned().log_prob(z), fixed().log_prob(z), rtol=1e-5, atol=1e-5)
    assert copy.deepcopy(fixed).float()().sample().dtype == torch.float32


def digits_vae(prior, hidden=16):
    x = torch.tensor(load_digits().data[:200] > 8, dtype=torch.float32)
    event = prior().event_shape[0] - isinstance(prior, DirichletPrior)
    vae = rv.VAE(MLPDecoder(prior.latent_dim, 64, hidden=(hidden,)), prior.latent_dim, prior=prior)
    return x, vae, rv.guides.GaussianGuide(vae, MLPEncoder(64, event, hidden=(hidden,)))


@pytest.mark.parametrize("name", PRIORS)
def test_it_trains_on_digits(name):
    """A real decrease, twenty times the noise of the loss; and every number of the prior has moved."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    prior = PRIORS[name](True)
    before = copy.deepcopy(dict(prior.named_parameters()))
    x, vae, guide = digits_vae(prior)
    svi = SVI(vae, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = torch.tensor([svi.step(x) / len(x) for _ in range(80)])
    first, last = losses[:10], losses[-10:]
    assert bool(torch.isfinite(losses).all())
    assert float(first.mean() - last.mean()) > 20 * float(last.diff().std()) / math.sqrt(10)
    assert all(not torch.equal(before[k], v) for k, v in prior.named_parameters())


def test_positive_numbers_stay_above_their_floor():
    for dtype in (torch.float32, F64):
        part = Positive("scale", torch.ones(2, dtype=dtype), True, floor=0.1)
        torch.testing.assert_close(part(), torch.ones(2, dtype=dtype))
        with torch.no_grad():
            part.value.fill_(-1e4)
        assert bool((part() >= 0.1).all())
        again = Positive("scale", part().detach(), True, floor=0.1)  # as a saved prior is rebuilt
        assert bool(torch.isfinite(again.value).all())


# -- each by its own formula ---------------------------------------------------------------------------------


def test_full_covariance():
    prior = FullCovarianceNormal(3, 0.5, TRIL)
    torch.testing.assert_close(prior().covariance_matrix, TRIL @ TRIL.T)
    with torch.no_grad():  # what lies above the diagonal is no parameter
        prior.factor.below.value.add_(torch.ones(3, 3))
    assert bool((prior.scale_tril.triu(1) == 0).all())


def test_mixture_and_its_responsibilities():
    weights, locs = torch.tensor([0.2, 0.8]), torch.tensor([[-1.0, 0.0], [2.0, 1.0]])
    scales = torch.tensor([[0.5, 1.0], [1.0, 2.0]])
    z = torch.randn(6, 2)
    parts = dist.Normal(locs, scales).to_event(1)
    expected = dist.MixtureSameFamily(dist.Categorical(weights), parts)
    joint = weights * parts.log_prob(z.unsqueeze(-2)).exp()
    for full in (False, True):
        values = (weights, locs, torch.diag_embed(scales) if full else scales)
        prior = MixturePrior(2, 2, False, full, 0.01, *values)
        torch.testing.assert_close(prior().log_prob(z), expected.log_prob(z))
        torch.testing.assert_close(prior.responsibilities(z), joint / joint.sum(-1, keepdim=True))
        torch.testing.assert_close(prior.weights, weights)


@pytest.mark.parametrize("full", [False, True])
def test_a_mixture_from_codes_finds_their_clusters(full):
    z, before = codes(), codes().clone()
    state = torch.get_rng_state()
    prior = MixturePrior.from_codes(z, 2, full=full, seed=3)
    assert torch.equal(z, before) and torch.equal(torch.get_rng_state(), state)
    centers = prior.locs[prior.locs[:, 0].argsort()].detach()
    assert float((centers - torch.tensor([[0.0] * 3, [4.0] * 3])).abs().max()) < 0.5
    one = dist.MultivariateNormal(z.mean(0), torch.cov(z.T))
    assert float(prior().log_prob(z).detach().mean() - one.log_prob(z).mean()) > 0.3


def test_codes_that_collapse_keep_the_floor():
    z = torch.zeros(50, 2)
    z[:25, 0] = 1.0
    for full in (False, True):
        prior = MixturePrior.from_codes(z, 2, full=full, floor=0.05, seed=0)
        assert bool(torch.isfinite(prior().log_prob(z)).all())
        diagonal = prior.scales.diagonal(dim1=-2, dim2=-1) if full else prior.scales
        assert float(diagonal.detach().min()) >= 0.05


def test_spike_and_slab_inclusion():
    prior = SpikeAndSlabPrior(2, "student", 0.2, 0.1, 2.0, 4.0)
    z = torch.tensor([[0.0, 0.3], [3.0, -0.1]])
    slab = 0.2 * dist.StudentT(4.0, 0.0, 2.0).log_prob(z).exp()
    spike = 0.8 * dist.Normal(0.0, 0.1).log_prob(z).exp()
    torch.testing.assert_close(prior.inclusion_probability(z), slab / (slab + spike))
    learned = SpikeAndSlabPrior(2, learn=True)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.fill_(-1e4)
    assert bool((learned.slab_scale >= learned.spike_scale).all())
    assert bool(torch.isfinite(learned().log_prob(z)).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StudentTPrior(2, scale=0.0), "scale: expected positive numbers"),
        (lambda: StudentTPrior(2, df=0.5, learn=True), "df: expected numbers of at least 1"),
        (lambda: StudentTPrior(2, loc=torch.zeros(3)), r"loc: expected .*shape \(2,\)"),
        (lambda: HorseshoePrior(2, 0.001, learn=True), "scale: expected numbers of at least 0.01"),
        (lambda: SpikeAndSlabPrior(2, "laplace"), "slab: expected one of"),
        (lambda: SpikeAndSlabPrior(2, inclusion=1.0), "inclusion: expected numbers in"),
        (lambda: SpikeAndSlabPrior(2, slab_scale=0.1), "slab_scale: expected numbers above"),
        (lambda: MixturePrior(2, 2, weights=torch.tensor([1.0, 0.0])), "weights: expected positive"),
        (lambda: MixturePrior(2, 2, locs=torch.zeros(2)), "locs: expected"),
        (lambda: MixturePrior.from_codes(torch.zeros(1, 2), 2), "z: expected codes"),
        (lambda: FullCovarianceNormal(2, scale_tril=torch.ones(2, 2)), "scale_tril: expected lower-tri"),
        (lambda: FullCovarianceNormal(2, scale_tril=torch.eye(3)), "scale_tril: expected"),
        (lambda: DirichletPrior(1), "latent_dim: expected"),
        (lambda: GammaPrior(2, rate=-1.0), "rate: expected positive"),
        (lambda: LogNormalPrior(2, scale=math.nan), "scale: expected finite"),
    ],
)
def test_bad_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- guides of constrained priors ----------------------------------------------------------------------------

X = torch.tensor([[0.7, 0.4]], dtype=F64)


def observed(z):
    """A smooth likelihood of any latent."""
    loc = torch.stack([z[..., 0] / (1 + z[..., 0]) + z[..., -1].sin(), z.square().sum(-1).log1p()], -1)
    return dist.Normal(loc, 0.5).log_prob(X).sum(-1), loc


def evidence(law, points, weight):
    return float((weight * (law.log_prob(points) + observed(points)[0]).exp()).sum())


def legendre(count, low, high):
    x, w = roots_legendre(count)
    x, w = torch.as_tensor(x), torch.as_tensor(w)
    return low + 0.5 * (high - low) * (x + 1), 0.5 * (high - low) * w


def simplex_nodes(count):
    """Gauss-Legendre on the triangle of the first two shares, by ``(s, (1 - s) t)``."""
    s, w = legendre(count, 0.0, 1.0)
    a, b = torch.cartesian_prod(s, s).unbind(-1)
    weight = torch.cartesian_prod(w, w).prod(-1) * (1 - a)
    first, second = a, (1 - a) * b
    return torch.stack([first, second, 1 - first - second], -1), weight


def positive_nodes(count):
    axis, w = legendre(count, -9.0, 4.0)  # of the logarithm
    u = torch.cartesian_prod(axis, axis)
    return u.exp(), torch.cartesian_prod(w, w).prod(-1) * u.exp().prod(-1)


GUIDED = [(kind, name) for kind in ("simplex 2", "simplex 3") for name in GUIDES[:2] + GUIDES[3:5]]
GUIDED += [
    (kind, name) for kind in ("log-normal", "gamma") for name in ("gaussian", "hamiltonian on gaussian")
]


@pytest.mark.parametrize(("kind", "name"), GUIDED)
def test_a_guide_of_a_constrained_prior_is_unbiased(kind, name):
    """``E[ŵ] = p(x)`` by quadrature over all that the guide draws; the simplex has one coordinate less."""
    if kind.startswith("simplex"):
        size = int(kind[-1])
        prior = DirichletPrior(size, torch.tensor([2.0, 1.5, 3.0], dtype=F64)[:size])
        k = size - 1
        if size == 2:
            s, weight = legendre(400, 0.0, 1.0)
            points = torch.stack([s, 1 - s], -1)
        else:
            points, weight = simplex_nodes(120)
    else:
        five = torch.tensor([4.0, 6.0], dtype=F64)
        prior = LogNormalPrior(2, 0.1, 0.2 * five) if kind == "log-normal" else GammaPrior(2, five, five)
        prior, k = prior.double(), 2
        points, weight = positive_nodes(160)
    exact = evidence(prior(), points, weight)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(observed(z)[1], 0.5).to_event(1), obs=x)

    width = 0.6 if kind == "gamma" else 1.1  # near its posterior's, which the few nodes then resolve

    def encoder(x):
        return torch.full((len(x), k), 0.1, dtype=F64), torch.full((len(x), k), width, dtype=F64)

    guide = make_guide(name, model, encoder, k, num_steps=2, step_size=0.08)
    sites = {
        "gaussian": ["z_unconstrained"],
        "hamiltonian on gaussian": ["z_unconstrained_0", "z_momentum"],
    }.get(name, ["z_0", "z_momentum"])
    axes = k * len(sites)
    grid, weight = gauss_hermite({1: 80, 2: 60, 4: 16}[axes], axes)
    noise = dict(zip(sites, grid.split(k, -1)))
    with torch.no_grad(), evaluating(1e-10):
        log_weights, _, _ = traced_weights(model, guide, X.expand(len(grid), -1), noise)
    assert float(weight[~torch.isfinite(log_weights)].sum()) < 1e-6
    tolerance = {1: 1e-4, 2: 1e-3, 4: 2e-2}[axes]
    assert float((weight * log_weights.exp()).nan_to_num(0.0).sum()) == pytest.approx(exact, rel=tolerance)


def test_an_encoder_of_the_simplex_has_one_coordinate_less():
    vae = rv.VAE(nn.Linear(3, 5), 3, prior=DirichletPrior(3), likelihood="gaussian")
    guide = rv.guides.GaussianGuide(vae, MLPEncoder(5, 3, hidden=()))
    with pytest.raises(ValueError, match=r"event shape \(2,\), as the model's latent unconstrained"):
        guide(torch.randn(4, 5))
    guide = rv.guides.HamiltonianGuide(vae, MLPEncoder(5, 2, hidden=()))
    z = guide(torch.randn(4, 5))["z"]
    assert z.shape == (4, 3)
    torch.testing.assert_close(z.sum(-1), torch.ones(4))
    assert np.isfinite(rv.ELBO().loss(vae, guide, torch.randn(4, 5)))


@pytest.mark.parametrize("full", [False, True])
def test_a_mixture_from_responsibilities_has_weighted_moments(full):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(500, 3, generator=g, dtype=torch.float64) @ torch.randn(3, 3, generator=g).double() + 2.0
    shares = torch.rand(500, 2, generator=g, dtype=torch.float64)
    shares = shares / shares.sum(1, keepdim=True)
    prior = MixturePrior.from_responsibilities(z, shares, learn=False, full=full)
    for k in range(2):
        mean = np.average(z.numpy(), axis=0, weights=shares[:, k].numpy())
        covariance = np.cov(z.T.numpy(), aweights=shares[:, k].numpy(), ddof=0)
        np.testing.assert_allclose(prior.locs[k].numpy(), mean, rtol=1e-6)
        scale = prior.scales[k].numpy()
        found = scale @ scale.T if full else scale**2
        np.testing.assert_allclose(found, covariance if full else np.diag(covariance), atol=1e-3)
    np.testing.assert_allclose(prior.weights.numpy(), shares.mean(0).numpy(), rtol=1e-6)
    for bad in (shares[:-1], -shares, torch.zeros(500, 2).double(), shares[:, 0]):
        with pytest.raises(ValueError, match="weights"):
            MixturePrior.from_responsibilities(z, bad)
    with pytest.raises(ValueError, match="z"):
        MixturePrior.from_responsibilities(z[0], shares)
