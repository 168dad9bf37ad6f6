"""Uniform, random walk and Riemannian HMC samplers: long chains match quadrature, short ones stay near."""

import math
from dataclasses import replace

import pytest
import torch
from grid_checks import cell_p_value, density
from scipy import stats

from riemvae._recipe import is_recipe, recipe_arguments
from riemvae.geometry import CentroidMetric, EuclideanMetric, Metric
from riemvae.geometry.posterior import PosteriorMetric
from riemvae.sampling import ManifoldSampler, run_chains
from riemvae.sampling.far import far_share
from riemvae.sampling.kernel import HMC
from riemvae.sampling.samplers import RandomWalkSampler, RiemannianHMCSampler, UniformSampler


def posteriors(d=2, **options):
    generator = torch.Generator().manual_seed(1)
    loc = 1.5 * torch.randn(6, d, generator=generator)
    scale = 0.4 + 0.4 * torch.rand(6, d, generator=generator)
    return PosteriorMetric(loc, scale, **{"bandwidth": 0.9, "regularization": 0.05, **options})


def centroids(d=2):
    return density(d).metric


SAMPLERS = {
    "manifold": lambda **o: ManifoldSampler(centroids(), **o),
    "uniform": lambda **o: UniformSampler(posteriors(), radius=5.0, **o),
    "walk": lambda **o: RandomWalkSampler(centroids(), **o),
    "walk with Σ": lambda **o: RandomWalkSampler(centroids(), covariance=0.3 * torch.eye(2), **o),
    "heuristic": lambda **o: RandomWalkSampler(centroids(), heuristic=True, scale=0.3, **o),
    "rhmc": lambda **o: RiemannianHMCSampler(centroids(), **o),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_finite_chains_from_centroids(name):
    sampler = SAMPLERS[name](num_steps=2, block_size=40)
    torch.manual_seed(0)
    z = sampler.sample(100)
    assert z.shape == (100, 2) and torch.isfinite(z).all() and not z.requires_grad
    report = sampler.report
    assert report.mode == "chains" and 0 < report.acceptance <= 1 and report.effective_starts is None
    assert report.far_share == far_share(sampler.metric, z)
    assert (report.not_converged >= 0) and sampler.trace is None
    torch.manual_seed(0)
    assert torch.equal(sampler(100), z)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_trace_is_the_whole_of_every_chain(name):
    torch.manual_seed(3)
    plain = SAMPLERS[name](num_steps=5, block_size=7)
    z = plain.sample(20)
    torch.manual_seed(3)
    kept = SAMPLERS[name](num_steps=5, block_size=7, keep_trace=True)
    assert torch.equal(kept.sample(20), z)
    trace = kept.trace
    assert trace.samples.shape == (5, 20, 2) and trace.log_density.shape == (5, 20)
    assert torch.equal(trace.samples[-1], z) and torch.equal(trace.state.position, z)
    assert trace.trace.acceptance.shape == (5, 20) and trace.divergences.shape == (20,)
    moved = (trace.samples[1:] != trace.samples[:-1]).any(-1)
    assert torch.equal(moved, trace.trace.accepted[1:])
    assert plain.report.acceptance == pytest.approx(kept.report.acceptance)
    assert len(kept.sample(3)) == 3 and kept.trace.samples.shape == (5, 3, 2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_given_starts(name):
    small = {"scale": 1e-5} if "walk" in name else {"step_size": 1e-6}
    small = {} if name == "heuristic" else small
    start = 0.1 * torch.arange(8.0).reshape(4, 2)
    sampler = SAMPLERS[name](num_steps=1, **small)
    if small:
        torch.testing.assert_close(sampler.sample(4, start=start), start, atol=1e-3, rtol=0)
        pool = SAMPLERS[name](num_steps=1, start=start[3:], **small)
        torch.testing.assert_close(pool.sample(5), start[3:].expand(5, 2), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match=r"^start: .*outside"):
        sampler.sample(1, start=torch.full((1, 2), 1e3))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_can_be_rebuilt_from_its_arguments(name):
    sampler = SAMPLERS[name](num_steps=2, keep_trace=True)
    assert is_recipe(sampler)
    again = type(sampler)(**recipe_arguments(sampler))
    torch.manual_seed(0)
    z = sampler.sample(9)
    torch.manual_seed(0)
    assert torch.equal(again.sample(9), z)


OPTIONS = {
    "walk": {"num_steps": 12, "scale": "adapt"},
    "walk with Σ": {"num_steps": 12, "num_geodesic_steps": 3},
    "rhmc": {"num_steps": 8, "step_size": "adapt", "num_leapfrog": 4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_exact_draws_stay_exact(name):
    """From exact starts the ends of the chains are draws of √det G⁻¹ still, against quadrature."""
    torch.manual_seed(0)
    sampler = SAMPLERS[name](**OPTIONS[name], warmup=40)
    start = sampler.density.sample([1500])
    z = sampler.sample(1500, start=start)
    assert cell_p_value(sampler.density, z, 8) > 1e-3
    assert float((z != start).any(-1).double().mean()) > 0.85
    assert abs(sampler.report.acceptance - (0.95 if name == "rhmc" else 0.5)) < 0.2


def test_uniform_matches_the_grid():
    torch.manual_seed(0)
    sampler = UniformSampler(posteriors(), radius=5.0, step_size="adapt", num_steps=80, warmup=80)
    z = sampler.sample(1500)
    assert sampler.report.acceptance > 0.85
    assert cell_p_value(sampler.density, z, 9) > 1e-3
    wrong = ManifoldSampler(posteriors(), radius=5.0)
    assert cell_p_value(wrong.density, z, 9) < 1e-10


def test_uniform_is_the_volume_of_a_users_metric():
    """The Poincaré disc of radius tanh(1) has hyperbolic radius 2: cosh r is uniform on [1, cosh 2]."""

    class Disc(Metric):
        latent_dim = 2

        def tensor(self, z):
            return (2 / (1 - z.square().sum(-1)))[..., None, None] ** 2 * torch.eye(2)

    torch.manual_seed(0)
    start = torch.zeros(1, 2)
    sampler = UniformSampler(Disc(), radius=math.tanh(1.0), start=start, num_steps=60, step_size=0.08)
    r = 2 * sampler.sample(2000).norm(dim=-1).atanh()
    assert stats.kstest(((r.cosh() - 1) / (math.cosh(2) - 1)).numpy(), "uniform").pvalue > 1e-3
    assert math.isnan(sampler.report.far_share)


def test_uniform_takes_a_decay_for_a_ball():
    torch.manual_seed(0)
    sampler = UniformSampler(posteriors(decay=0.01), num_steps=5)
    sampler.sample(20)
    assert sampler.radius is None
    for bad in (posteriors(), centroids(), EuclideanMetric(2)):
        with pytest.raises(ValueError, match=r"^radius: "):
            UniformSampler(bad, start=torch.zeros(1, 2))


def test_algorithm_5_by_default():
    sampler = UniformSampler(posteriors(), radius=5.0)
    kernel, adapting = sampler._kernel()
    assert isinstance(kernel, HMC) and not adapting
    assert (sampler.num_steps, kernel.num_steps, kernel.step_size) == (100, 10, 0.01)


def test_far_share_of_posteriors_is_where_every_weight_is_small():
    """Beyond 2ρ in every Mahalanobis distance: all ω_i below e⁻⁴; diagonal and full covariances alike."""
    torch.manual_seed(0)
    diagonal = posteriors()
    full = PosteriorMetric(
        diagonal.centroids, torch.diag_embed(diagonal.scale), bandwidth=0.9, regularization=0.05
    )
    z = 3 * torch.randn(500, 2)
    weights = (-((z[:, None] - diagonal.centroids) / diagonal.scale / 0.9).square().sum(-1)).exp()
    expected = float((weights < math.exp(-4)).all(-1).double().mean())
    assert 0.1 < expected < 0.9
    assert far_share(diagonal, z) == far_share(full, z) == expected


def test_the_heuristic_is_the_kernel_of_its_name():
    metric = centroids()
    torch.manual_seed(0)
    sampler = RandomWalkSampler(metric, heuristic=True, num_steps=4, scale=0.4, covariance=torch.eye(2))
    z = sampler.sample(6)
    torch.manual_seed(0)
    start, _, _ = sampler._starts(6)
    kernel, _ = sampler._kernel()
    kernel = replace(kernel, scale=0.4)
    assert torch.equal(run_chains(kernel, kernel.init(start), 1, thin=4).state.position, z)
    assert kernel.radius == sampler.radius == 2 * float(metric.centroids.norm(dim=-1).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_number_types(dtype):
    metric = CentroidMetric(torch.randn(4, 3).to(dtype), torch.eye(3).to(dtype).expand(4, 3, 3))
    for sampler in (
        RandomWalkSampler(metric, num_steps=2),
        RandomWalkSampler(metric, num_steps=2, heuristic=True),
        RiemannianHMCSampler(metric, num_steps=2),
        UniformSampler(metric, num_steps=2, radius=9.0),
    ):
        assert sampler.sample(3).dtype == dtype


BAD = {
    "num_steps": {"num_steps": 0},
    "step_size": {"step_size": "large"},
    "block_size": {"block_size": 0},
    "warmup": {"warmup": 0},
    "start": {"start": torch.zeros(2, 3)},
    "radius": {"radius": -1.0},
    "num_leapfrog": {"num_leapfrog": 0},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        RiemannianHMCSampler(centroids(), **BAD[name])
    with pytest.raises(ValueError, match=f"^{name}: "):
        UniformSampler(posteriors(), **{"radius": 5.0, **BAD[name]})


def test_bad_walks():
    with pytest.raises(ValueError, match=r"^covariance: .*heuristic"):
        RandomWalkSampler(centroids(), heuristic=True, covariance="metric")
    with pytest.raises(ValueError, match=r"^covariance: "):
        RandomWalkSampler(centroids(), covariance=torch.eye(3))
    with pytest.raises(ValueError, match=r"^num_steps: "):
        RandomWalkSampler(centroids(), num_geodesic_steps=0)
    with pytest.raises(ValueError, match=r"^scale: "):
        RandomWalkSampler(centroids(), scale="big")
    with pytest.raises(ValueError, match=r"^start: .*EuclideanMetric"):
        RandomWalkSampler(EuclideanMetric(2), radius=1.0)
    with pytest.raises(ValueError, match=r"^radius: .*none inside"):
        RiemannianHMCSampler(centroids(), radius=1e-3).sample(1)
