"""Priors on curved spaces: ``E[w] = p(x)`` by quadrature, draws against densities, the ball's bijection."""

from __future__ import annotations

import copy
import math
import warnings

import geoopt
import numpy as np
import oracles
import pyro.distributions as dist
import pytest
import torch
from oracles import GUIDES, gauss_hermite, make_guide, noise_sites, traced_weights
from sklearn.datasets import load_digits
from torch import nn
from torch.distributions import biject_to, transform_to

import riemvae as rv
from riemvae.distributions import InverseVolume, RiemannianUniform, WrappedNormal
from riemvae.distributions.ball import Ball, ToBall
from riemvae.distributions.check import check_distribution
from riemvae.geometry import ConstantMetric, LatentManifold, value_and_gradient
from riemvae.guides.evaluation import evaluating
from riemvae.guides.log_joint import LogJoint, examine
from riemvae.networks import MLPDecoder, MLPEncoder
from riemvae.priors.riemannian import InverseVolumePrior, RiemannianUniformPrior, WrappedNormalPrior

# -- the bijection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 5])
def test_the_bijection_to_a_ball(d):
    torch.manual_seed(0)
    transform = biject_to(Ball(2.5))
    assert isinstance(transform, ToBall) and transform_to(Ball(2.5)) == transform
    # From next to the centre, where the formulas are series, to next to the border.
    u = torch.randn(60, d, dtype=torch.float64) * torch.logspace(-6, 0.4, 60).double().unsqueeze(-1)
    z = transform(u)
    assert bool(Ball(2.5).check(z).all()) and transform.codomain.radius == 2.5
    torch.testing.assert_close(transform.inv(z), u, rtol=1e-6, atol=1e-9)
    jacobian = torch.stack([torch.autograd.functional.jacobian(transform, row) for row in u])
    torch.testing.assert_close(transform.log_abs_det_jacobian(u, z), torch.linalg.slogdet(jacobian)[1])
    length = u.norm(dim=-1)
    torch.testing.assert_close(
        z.norm(dim=-1), 2.5 * (1 - (-0.5 * length**2).exp()).sqrt(), rtol=1e-9, atol=1e-10
    )
    leaf = u[::9].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda u: transform.log_abs_det_jacobian(u, u), leaf)
    assert torch.autograd.gradgradcheck(transform, leaf)
    # Uniform on a disc is normal in the plane.
    if d == 2:
        uniform = -math.log(math.pi * 2.5**2) + transform.log_abs_det_jacobian(u, z)
        torch.testing.assert_close(uniform, dist.Normal(0.0, 1.0).log_prob(u).sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_image_lies_outside_the_ball(dtype):
    torch.manual_seed(0)
    for scale in (1.0, 1e3, 1e8):
        z = ToBall(0.7)(scale * torch.randn(2000, 3, dtype=dtype))
        assert bool(Ball(0.7).check(z).all())
        assert bool(torch.isfinite(ToBall(0.7).inv(z)).all())


# -- the priors ----------------------------------------------------------------------------------------------


def metric(d):
    return oracles.centroid_metric(d, n=5, scale=0.6, temperature=0.7, regularization=0.3)


def ball_prior(d):
    loc = torch.tensor([0.3, -0.2][:d], dtype=torch.float64)
    return WrappedNormalPrior(geoopt.PoincareBall(c=0.8), loc=loc, scale=0.6, learn=True)


def flat_prior(d):
    loc = torch.tensor([0.3, -0.2][:d], dtype=torch.float64)
    matrix = torch.tensor([[2.0, 0.4], [0.4, 1.0]], dtype=torch.float64)[:d, :d]
    return WrappedNormalPrior(ConstantMetric(matrix), loc=loc, scale=0.9)


PRIORS = {
    "inverse volume": lambda d: InverseVolumePrior(metric(d), radius=2.0),
    "uniform": lambda d: RiemannianUniformPrior(metric(d), radius=1.5),
    "poincaré ball": ball_prior,
    "flat metric": flat_prior,
}


def disc(radius, d, nodes=120):
    """Gauss-Legendre nodes and weights of a ball of ``d`` = 1, 2, the latter in polar coordinates."""
    x, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
    if d == 1:
        return radius * x.unsqueeze(-1), radius * w
    r, weight = 0.5 * radius * (x + 1), 0.5 * radius * w
    angle = torch.arange(nodes, dtype=torch.float64) * (2 * math.pi / nodes)  # periodic: the trapezium rule
    grid = torch.stack([r[:, None] * angle.cos(), r[:, None] * angle.sin()], -1)
    return grid.reshape(-1, 2), ((r * weight)[:, None].expand(-1, nodes) * (2 * math.pi / nodes)).reshape(-1)


def radius_of(prior):
    """A radius that holds the mass."""
    support = prior().support
    if isinstance(support, Ball):
        return support.radius
    return 1 / 0.8**0.5 if "ball" in repr(support).lower() else 9.0


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("name", PRIORS)
def test_it_is_a_density_and_draws_are_of_it(name, d):
    torch.manual_seed(0)
    prior = PRIORS[name](d).double()
    z, weight = disc(radius_of(prior), d, 40 if name == "flat metric" else 120)
    law = prior()
    density = law.log_prob(z).detach().exp() * weight
    assert float(density.sum()) == pytest.approx(1.0, abs=2e-5)
    with torch.no_grad():
        draws = law.sample((20_000,))
    for moment in (lambda z: z, lambda z: z.square()):
        exact = (density.unsqueeze(-1) * moment(z)).sum(0)
        found = moment(draws)
        assert ((found.mean(0) - exact).abs() < 4.5 * found.std(0) / len(draws) ** 0.5).all()


@pytest.mark.parametrize("name", ["inverse volume", "uniform", "poincaré ball"])
def test_the_public_check_passes(name):
    check_distribution(PRIORS[name](2).double(), num_samples=4000)


SITES = {
    "gaussian": ["z_unconstrained"],
    "hamiltonian on gaussian": ["z_unconstrained_0", "z_momentum"],
    "riemannian on gaussian": ["z_unconstrained_0", "z_momentum"],
}

CASES = [(prior, guide, 1) for prior in PRIORS for guide in GUIDES if guide != "hamiltonian on riemannian"]
CASES = [case for case in CASES if case[0] != "flat metric" or case[1] in ("gaussian", "hamiltonian")]
CASES += [(prior, guide, 2) for prior in list(PRIORS)[:3] for guide in ("gaussian", "hamiltonian")]


@pytest.mark.parametrize(("name", "guide_name", "d"), CASES)
def test_the_mean_weight_is_the_evidence(name, guide_name, d):
    prior = PRIORS[name](d).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = nn.Sequential(nn.Linear(d, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    vae = rv.VAE(decoder, d, prior=prior, likelihood=rv.likelihoods.Gaussian(0.7)).double()
    x = torch.linspace(-0.8, 0.9, 3, dtype=torch.float64).unsqueeze(0)
    z, mass = disc(radius_of(prior), d)
    with torch.no_grad():
        joint = prior().log_prob(z) + dist.Normal(decoder(z), 0.7).log_prob(x).sum(-1)
    exact = float((joint.exp() * mass).sum())

    def encoder(x):
        scale = {"flat metric": 0.9, "poincaré ball": 0.5}.get(name, 1.1)
        return torch.full((len(x), d), 0.1).double(), torch.full((len(x), d), scale).double()

    guide = make_guide(guide_name, vae, encoder, d, 0.7, num_steps=2, step_size=0.05)
    constrained = name != "flat metric"
    sites = SITES.get(guide_name, noise_sites(guide_name)) if constrained else noise_sites(guide_name)
    nodes = {1: 90, 2: 60, 4: 20}[d * len(sites)]
    if d == 2 and len(sites) == 1:
        nodes = 90
    grid, weight = gauss_hermite(nodes, d * len(sites))
    noise = dict(zip(sites, grid.split(d, -1)))
    with torch.no_grad(), evaluating(1e-10), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        log_weights, _, _ = traced_weights(vae, guide, x.expand(len(grid), -1), noise)
    assert float(weight[~torch.isfinite(log_weights)].sum()) < 1e-7
    tolerance = 1e-4 if d * len(sites) < 4 else 5e-3  # of the quadrature of 20 nodes an axis
    assert float((weight * log_weights.exp().nan_to_num(0.0)).sum()) == pytest.approx(exact, rel=tolerance)


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("name", PRIORS)
def test_the_fast_potential_is_that_of_the_trace(name, d):
    torch.manual_seed(0)
    prior = PRIORS[name](d).double()
    vae = rv.VAE(nn.Linear(d, 3).double(), d, prior=prior, likelihood="gaussian").double()
    x = torch.randn(4, 3, dtype=torch.float64)
    z = 0.3 * torch.randn(2, 4, d, dtype=torch.float64)
    traced = LogJoint(vae, examine(vae, "z", (x,), {}), (x,), {})
    for a, b in zip(*(value_and_gradient(p, z) for p in (vae.latent_potential("z", (x,), {}), traced))):
        torch.testing.assert_close(a, b)


def test_wrapped_normals_are_those_of_the_distribution():
    z = torch.tensor([[0.1, 0.2], [-0.3, 0.4]], dtype=torch.float64)
    loc, scale = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.5, 0.8]).double()
    for manifold in (geoopt.PoincareBall(), LatentManifold(ConstantMetric(2 * torch.eye(2).double()))):
        for learn in (False, True):
            prior = WrappedNormalPrior(manifold, loc=loc, scale=scale, learn=learn).double()
            torch.testing.assert_close(prior.loc, loc)
            torch.testing.assert_close(prior.scale, scale)
            law = WrappedNormal(manifold, loc, torch.diag(scale), measure="lebesgue")
            torch.testing.assert_close(prior().log_prob(z), law.log_prob(z))
            assert len(list(prior.parameters())) == (2 if learn else 0)
    normal = WrappedNormalPrior(ConstantMetric(4 * torch.eye(2).double()), scale=torch.ones(()).double())
    # Lengths are twice those of coordinates: a plain normal of half the scale.
    plain = dist.Normal(torch.zeros(2).double(), 0.5).to_event(1)
    torch.testing.assert_close(normal.double()().log_prob(z), plain.log_prob(z))


@pytest.mark.parametrize(
    ("prior", "law"), [(InverseVolumePrior, InverseVolume), (RiemannianUniformPrior, RiemannianUniform)]
)
def test_volume_priors_report_their_constant_and_draw_in_any_dimension(prior, law):
    torch.manual_seed(0)
    for d in (2, 4):
        found, plain = prior(metric(d), radius=2.0), law(metric(d), radius=2.0)
        z = 0.5 * torch.randn(5, d, dtype=torch.float64)
        torch.testing.assert_close(found().log_prob(z), plain.log_prob(z))
        assert found.log_normalizer == plain.log_normalizer
        assert (found.log_normalizer_stderr == 0.0) == (d == 2)
        assert found.log_normalizer_stderr < 0.02
    # d = 4: moments against importance weights of many draws.
    draws = found().expand((2,)).sample((5000,))
    assert draws.shape == (5000, 2, 4) and bool(found().support.check(draws).all())
    weighted = plain.importance_sample(100_000)
    weight = weighted.log_weight.softmax(0)
    for moment in (lambda z: z, lambda z: z.square()):
        exact, sample = weight @ moment(weighted.points), moment(draws.flatten(0, 1))
        # Draws with replacement of a pool 64 times as large: 5 standard errors hold what repeats add.
        assert ((sample.mean(0) - exact).abs() < 5 * sample.std(0) / len(sample) ** 0.5).all()


def test_a_volume_prior_in_four_dimensions_under_a_guide():
    torch.manual_seed(0)
    prior = InverseVolumePrior(metric(4).float(), radius=2.5)
    vae = rv.VAE(nn.Linear(4, 5), 4, prior=prior, likelihood="gaussian")
    guide = rv.guides.HamiltonianGuide(vae, MLPEncoder(5, 4, hidden=(8,)), step_size=0.02)
    x = torch.randn(9, 5)
    fit = rv.fit(vae, guide, x, max_epochs=2, batch_size=4, progress=False, seed=0)
    assert math.isfinite(fit.best_loss) and vae(size=7).shape == (7, 5)
    assert bool(prior().support.check(guide(x)["z"]).all())


@pytest.mark.parametrize("name", PRIORS)
def test_saves_copies_and_moves(name, tmp_path):
    torch.manual_seed(0)
    vae = rv.VAE(nn.Linear(2, 5).double(), 2, prior=PRIORS[name](2).double(), likelihood="gaussian")
    guide = rv.guides.GaussianGuide(vae, MLPEncoder(5, 2).double())
    z = 0.3 * torch.randn(6, 2, dtype=torch.float64)
    expected = vae.prior().log_prob(z)
    rv.save(tmp_path / "pair", vae, guide)
    loaded = rv.load(tmp_path / "pair")[0].prior
    for other in (loaded, copy.deepcopy(vae.prior)):
        torch.testing.assert_close(other().log_prob(z), expected, rtol=0, atol=1e-12)
    single = copy.deepcopy(vae.prior).float()
    assert single().sample((3,)).dtype == torch.float32
    torch.testing.assert_close(single().log_prob(z.float()).double(), expected, rtol=1e-4, atol=1e-4)
    loaded.load_state_dict(vae.prior.state_dict())
    torch.testing.assert_close(loaded().log_prob(z), expected)


def test_another_metric_in_a_state_is_normalised_anew():
    one, two = InverseVolumePrior(metric(1), 2.0), InverseVolumePrior(metric(1), 2.0)
    with torch.no_grad():
        two.metric.factors.mul_(2.0)
    other = one.log_normalizer
    one.load_state_dict(two.state_dict())
    assert abs(one.log_normalizer - other) > 0.1
    assert one.log_normalizer == pytest.approx(two.log_normalizer)


@pytest.mark.parametrize("name", ["inverse volume", "poincaré ball"])
def test_training_lowers_the_loss_on_digits(name):
    torch.manual_seed(0)
    x = (torch.as_tensor(load_digits().data[:300]) > 7).float()
    vae = rv.VAE(MLPDecoder(2, 64, hidden=(24,)), 2, prior=PRIORS[name](2).float())
    guide = rv.guides.GaussianGuide(vae, MLPEncoder(64, 2, hidden=(24,)))
    fit = rv.fit(vae, guide, x, max_epochs=8, batch_size=64, learning_rate=1e-2, progress=False, seed=0)
    losses = [row["train_loss"] for row in fit.history]
    assert losses[-1] < losses[0] - 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WrappedNormalPrior(geoopt.Sphere(), 3), "manifold: expected a space with a chart"),
        (lambda: WrappedNormalPrior(geoopt.Lorentz(), 3), "manifold: expected a space with a chart"),
        (lambda: WrappedNormalPrior(geoopt.Euclidean(), 3), "manifold: expected a geoopt.PoincareBall"),
        (
            lambda: WrappedNormalPrior(geoopt.PoincareBall(learnable=True), 2),
            "manifold: expected a ball of fixed curvature",
        ),
        (lambda: WrappedNormalPrior(geoopt.PoincareBall()), "latent_dim: expected one number"),
        (lambda: WrappedNormalPrior(metric(2), 3), "latent_dim: expected one number"),
        (
            lambda: WrappedNormalPrior(geoopt.PoincareBall(), loc=torch.tensor([1.2, 0.0])),
            "loc: expected a point of OpenBall",
        ),
        (lambda: WrappedNormalPrior(geoopt.PoincareBall(), 2, scale=-1.0), "scale: expected"),
        (lambda: WrappedNormalPrior(geoopt.PoincareBall(), 2, scale=torch.ones(3)), "scale: expected"),
        (lambda: WrappedNormalPrior(metric(2), loc=torch.zeros(1, 2)), "loc: expected a floating"),
        (lambda: InverseVolumePrior(oracles.Bump(2)), "metric: expected a fixed metric"),
        (lambda: RiemannianUniformPrior(metric(2)), "radius: expected a positive number"),
        (lambda: InverseVolumePrior(3), "metric: expected a riemvae.geometry.Metric"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
