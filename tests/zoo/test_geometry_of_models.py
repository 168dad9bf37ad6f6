"""What any trained model with a Gaussian posterior offers: metrics of its codes, samplers, curves, checks."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

import riemvae as rv
from riemvae import data, zoo
from riemvae.geometry import CentroidMetric, PosteriorMetric, geodesic
from riemvae.zoo import PosteriorCodes

D = (1, 8, 8)
CHAINS = ["manifold", "random_walk", "riemannian_hmc", "uniform"]


@pytest.fixture(scope="module")
def digits():
    return data.load_digits_split(5, seed=0)


@pytest.fixture(scope="module")
def trained(digits):
    models = {}
    for name in ("vae", "rhvae"):
        ae = zoo.build(name, D, 2, hidden=(32,), seed=0)
        models[name] = ae.fit(digits.x_train, max_epochs=200, learning_rate=1e-2, seed=0, progress=False)
    return models


def test_codes_are_the_posteriors_of_the_training_data(trained, digits):
    ae = trained["vae"]
    posterior = ae.posterior(digits.x_train)
    torch.testing.assert_close(ae.codes.loc, posterior.mean)
    torch.testing.assert_close(ae.codes.scale, posterior.stddev)


def test_the_two_metrics_are_the_equations(trained):
    ae = trained["vae"]
    codes, z = ae.codes, torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    delta = z[:, None] - codes.loc
    metric = ae.covariance_metric(temperature=0.7, regularization=0.01)
    weight = torch.exp(-delta.square().sum(-1) / 0.7**2)
    expected = torch.diag_embed(weight @ codes.scale.square()) + 0.01 * torch.eye(2)
    torch.testing.assert_close(metric.inverse(z), expected)
    metric = ae.posterior_metric(bandwidth=1.5, regularization=0.1)
    weight = torch.exp(-(delta / codes.scale).square().sum(-1) / 1.5**2)
    expected = torch.diag_embed(weight @ codes.scale.pow(-2)) + 0.1 * torch.eye(2)
    torch.testing.assert_close(metric.tensor(z), expected, rtol=1e-4, atol=1e-5)
    assert len(ae.posterior_metric(num_centroids=7).centroids) == 7


def test_default_widths_follow_spacing_and_variance():
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))
    near = PosteriorCodes(grid, torch.full((25, 2), 0.1)).covariance_metric()
    assert near.temperature == pytest.approx(2.0**0.5)  # four at distance one, the fifth across
    assert near.regularization == pytest.approx(1e-4)
    # Posteriors wider than the spacing cannot be told apart: their width rules.
    wide = PosteriorCodes(grid, torch.full((25, 2), 4.0)).covariance_metric()
    assert wide.temperature == pytest.approx(4.0)
    two = PosteriorCodes(torch.tensor([[0.0, 0.0], [0.0, 3.0]]), torch.full((2, 2), 0.5)).covariance_metric()
    assert two.temperature == pytest.approx(3.0)
    alone = PosteriorCodes(torch.zeros(1, 2), torch.full((1, 2), 0.5)).covariance_metric()
    assert alone.temperature == pytest.approx(0.5)


def test_full_covariances():
    loc = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    tril = torch.tensor([[0.5, 0.0], [0.3, 0.2]]).expand(6, 2, 2)
    codes = PosteriorCodes.of(dist.MultivariateNormal(loc, scale_tril=tril))
    torch.testing.assert_close(codes.covariance_metric().factors, tril.contiguous())
    lone = PosteriorCodes(loc[:1], tril[:1]).posterior_metric(bandwidth=1.0, regularization=0.0)
    torch.testing.assert_close(lone.inverse(loc[0]), tril[0] @ tril[0].mT)


def test_metric_is_the_learned_one_or_that_of_the_covariances(trained):
    assert trained["rhvae"].metric is trained["rhvae"].guide.metric
    metric, covariances = trained["vae"].metric, trained["vae"].covariance_metric()
    assert isinstance(metric, CentroidMetric)
    torch.testing.assert_close(metric.factors, covariances.factors)


@pytest.mark.parametrize("sampler", CHAINS)
@pytest.mark.parametrize("name", ["vae", "rhvae"])
def test_every_sampler_returns_draws_and_the_whole_trace(trained, name, sampler):
    ae = trained[name]
    options = {"sampler": sampler, "num_steps": 4, "seed": 0, "return_trace": True}
    x, z, trace = ae.sample(6, return_latents=True, **options)
    assert x.shape == (6, *D)
    assert trace.samples.shape == (4, 6, 2)
    torch.testing.assert_close(trace.samples[-1], z)
    torch.testing.assert_close(ae.decode(z), x)
    assert 0.0 <= ae.sampling_report_.acceptance <= 1.0
    torch.testing.assert_close(ae.sample(6, **options)[1].samples, trace.samples)


def test_samplers_follow_the_metric_that_suits_them(trained):
    ae = trained["rhvae"]
    assert isinstance(ae.sampler("uniform").metric, PosteriorMetric)
    assert ae.sampler("riemannian_hmc").metric is ae.metric
    other = ae.covariance_metric()
    assert ae.sampler("manifold", metric=other).metric is other
    # Without a ball the uniform distribution is improper; with a decay it needs none.
    radius = 2 * torch.linalg.vector_norm(ae.codes.loc, dim=-1).max()
    assert ae.sampler("uniform").density.radius == pytest.approx(float(radius))
    decaying = ae.sampler("uniform", metric=ae.posterior_metric(decay=0.1))
    assert not hasattr(decaying.density.support, "radius")


def test_uniform_draws_are_nearer_to_the_codes_than_the_prior(trained):
    ae = trained["vae"]
    distance = {}
    for sampler in ("prior", "uniform"):
        _, z = ae.sample(200, sampler=sampler, return_latents=True, seed=0)
        distance[sampler] = rv.evaluation.nearest(z, ae.codes.loc).distances.mean()
    assert distance["uniform"] < 0.6 * distance["prior"]


@pytest.mark.parametrize("curve", ["geodesic", "volume"])
def test_curved_interpolation_decodes_the_curve(trained, digits, curve):
    ae, x = trained["vae"], digits.x_train
    path = ae.interpolate(x[:2], x[3:5], num=5, curve=curve)
    assert path.shape == (2, 5, *D)
    torch.testing.assert_close(path[:, 0], ae.reconstruct(x[:2]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(path[:, -1], ae.reconstruct(x[3:5]), rtol=1e-4, atol=1e-4)
    if curve == "geodesic":
        z = geodesic(ae.metric, ae.encode(x[:2]), ae.encode(x[3:5])).evenly(0.5)
        torch.testing.assert_close(path[:, 2], ae.decode(z), rtol=0.02, atol=0.02)


def test_overfitting_check_finds_copies(trained, digits):
    ae, x = trained["vae"], digits.x_train
    copies = ae.overfitting_check(x[:20], x)
    assert copies.copied().all()
    fresh = ae.overfitting_check(digits.x_test[:200], x)
    assert fresh.copied().float().mean() < 0.2


def test_the_geometry_is_saved_with_the_model(trained, tmp_path):
    ae = trained["vae"]
    ae.save(tmp_path / "ae")
    loaded = rv.load(tmp_path / "ae")
    torch.testing.assert_close(loaded.codes.loc, ae.codes.loc, rtol=0, atol=0)
    draws = [model.sample(5, sampler="uniform", num_steps=3, seed=1) for model in (ae, loaded)]
    torch.testing.assert_close(*draws, rtol=0, atol=0)


def test_codes_of_a_large_set_are_a_part_of_it(digits):
    ae = zoo.build("vae", D, 2, hidden=(8,), seed=0)
    torch.manual_seed(0)
    assert len(ae.read_geometry(digits.x_test, max_codes=30).codes.loc) == 30
    assert len(ae.read_geometry(digits.x_test[:20], max_codes=30).codes.loc) == 20


def test_an_rhvae_with_its_own_covariances_has_no_metric_parameters(digits, tmp_path):
    ae = zoo.build("rhvae", D, 2, metric="posterior", hidden=(16,), seed=0)
    plain = zoo.build("vae", D, 2, hidden=(16,), seed=0)
    assert sum(p.numel() for p in ae.parameters()) == sum(p.numel() for p in plain.parameters())
    ae.fit(digits.x_train, max_epochs=3, seed=0, progress=False)
    torch.testing.assert_close(ae.metric.factors, torch.diag_embed(ae.codes.scale))
    ae.save(tmp_path / "ae")
    z = torch.zeros(3, 2)
    torch.testing.assert_close(rv.load(tmp_path / "ae").metric.inverse(z), ae.metric.inverse(z))


class LaplaceEncoder(torch.nn.Module):
    def forward(self, x):
        return dist.Laplace(torch.zeros(len(x), 2), 1.0).to_event(1)


def test_a_posterior_that_is_not_gaussian_has_no_such_geometry(digits):
    ae = zoo.build("vae", D, 2, encoder=LaplaceEncoder(), hidden=(8,), seed=0)
    ae.fit(digits.x_train, max_epochs=1, seed=0, progress=False)
    assert ae.codes is None
    with pytest.raises(ValueError, match=r"posterior: expected a Gaussian posterior.*Independent"):
        ae.read_geometry(digits.x_train)
    with pytest.raises(RuntimeError, match="read_geometry"):
        ae.sample(3, sampler="uniform")
    assert ae.sample(3).shape == (3, *D)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ae, x: ae.interpolate(x[:2], x[2:4], curve="bent"), "curve: expected one of"),
        (lambda ae, x: ae.sample(3, return_trace=True, sampler=lambda n: torch.zeros(n, 2)), "return_trace"),
        (lambda ae, x: ae.overfitting_check(torch.zeros(2, 5), x), "generated: expected"),
        (lambda ae, x: zoo.build("rhvae", D, 2, metric="euclidean"), "metric: expected one of 'posterior'"),
        (lambda ae, x: PosteriorCodes(torch.zeros(3, 2), torch.ones(3)), "scale: expected"),
        (lambda ae, x: PosteriorCodes(torch.zeros(0, 2), torch.ones(0, 2)), "loc: expected"),
    ],
)
def test_bad_input_is_named(trained, digits, call, message):
    with pytest.raises(ValueError, match=message):
        call(trained["vae"], digits.x_train)
