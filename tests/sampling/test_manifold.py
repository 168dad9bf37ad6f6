"""The manifold sampler's two modes, the far share and the choice of λ, against radial and grid quadrature."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from riemvae.geometry import CentroidMetric, EuclideanMetric
from riemvae.sampling import ManifoldSampler, choose_regularization, exact_far_share, far_share


def lone_bump(d, regularization, temperature=1.0, dtype=torch.float32):
    """One centroid at the origin with A = I: every integral is one-dimensional."""
    return CentroidMetric(
        torch.zeros(1, d, dtype=dtype), torch.eye(d, dtype=dtype)[None], temperature, regularization
    )


def radial_share(d, regularization, radius, temperature=1.0, edge=2.0):
    """Mass beyond ``edge * T`` of √det((e^{-r²/T²} + λ) I) r^{d-1}, by quadrature."""

    def f(r):
        return (math.exp(-((r / temperature) ** 2)) + regularization) ** (d / 2) * r ** (d - 1)

    near = integrate.quad(f, 0, edge * temperature, epsrel=1e-10)[0]
    far = integrate.quad(f, edge * temperature, radius, epsrel=1e-10)[0]
    return far / (near + far)


def scattered(d, regularization=1e-2, n=6, seed=1, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    centroids = 2.0 * torch.randn(n, d, generator=generator) + offset
    factors = 0.3 * torch.randn(n, d, d, generator=generator).tril() + 0.7 * torch.eye(d)
    return CentroidMetric(centroids, factors, 0.6, regularization)


def grid(metric, radius, side=900):
    axis = (torch.arange(side) + 0.5) * (2 * radius / side) - radius
    points = torch.cartesian_prod(axis, axis)
    points = points[points.norm(dim=-1) <= radius]
    distance = (points[:, None] - metric.centroids).norm(dim=-1).amin(-1)
    return points, distance


def grid_share(metric, radius):
    points, distance = grid(metric, radius)
    mass = (-metric.log_volume(points)).double().softmax(0)
    return float(mass[distance > 2 * metric.temperature].sum())


def test_far_share_counts():
    metric = CentroidMetric(
        torch.tensor([[0.0, 0.0], [50.0, 50.0]]), torch.eye(2).expand(2, 2, 2), temperature=0.5
    )
    z = torch.tensor([[[0.0, 0.99], [50.0, 51.01]], [[49.5, 50.0], [25.0, 25.0]]])
    assert far_share(metric, z) == 0.5


@pytest.mark.parametrize("d", [1, 2, 3, 6, 10])
@pytest.mark.parametrize("regularization", [1e-3, 1e-1])
def test_exact_far_share_is_the_radial_integral(d, regularization):
    share = exact_far_share(lone_bump(d, regularization), radius=4.0)
    expected = radial_share(d, regularization, 4.0)
    assert 0 <= share.stderr < 0.02
    assert abs(share.value - expected) < 4 * share.stderr


def test_far_share_standard_error_is_honest():
    """Errors over independent repetitions are as large as the standard error says."""
    from riemvae.distributions.inverse_volume import InverseVolume
    from riemvae.sampling.far import _far, _share

    torch.manual_seed(0)
    metric, expected = lone_bump(4, 0.05), radial_share(4, 0.05, 4.0)
    scores = []
    for _ in range(30):
        points, log_weight = InverseVolume(metric, 4.0).importance_sample(2000)
        share = _share(log_weight.double(), _far(metric, points))
        scores.append((share.value - expected) / share.stderr)
    # Shares drawn in exact proportion make the true error smaller than the formula's, never larger.
    assert 0.2 < np.std(scores) < 1.4
    assert abs(np.mean(scores)) < 4 / math.sqrt(30)


@pytest.mark.parametrize("offset", [0.0, 6.0])
def test_exact_far_share_matches_the_grid(offset):
    metric = scattered(2, offset=offset)
    radius = 2 * float(metric.centroids.norm(dim=-1).max())
    share = exact_far_share(metric)
    assert 0.02 < share.value < 0.98
    assert abs(share.value - grid_share(metric, radius)) < 4 * share.stderr + 1e-4


def test_another_regularization_is_another_metric():
    a = exact_far_share(scattered(2, 1e-2), radius=8.0, regularization=0.3)
    assert a == exact_far_share(scattered(2, 0.3), radius=8.0)
    assert a.value > exact_far_share(scattered(2, 1e-2), radius=8.0).value


@pytest.mark.parametrize("initial", [1e-6, 1.0])
@pytest.mark.parametrize("d", [2, 5, 10])
def test_chosen_regularization_solves_the_radial_equation(d, initial):
    choice = choose_regularization(lone_bump(d, initial), share=0.1, radius=4.0)
    reached = radial_share(d, choice.regularization, 4.0)
    assert choice.far_share <= 0.1
    assert abs(reached - 0.1) < 4 * choice.stderr
    # The share is steep in λ at high d, so λ itself is close too.
    root = optimize.brentq(lambda t: radial_share(d, math.exp(t), 4.0) - 0.1, math.log(1e-6), math.log(10.0))
    assert abs(math.log(choice.regularization) - root) < 0.15


def test_chosen_regularization_matches_the_grid():
    metric = scattered(2)
    radius = 2 * float(metric.centroids.norm(dim=-1).max())
    choice = choose_regularization(metric, share=0.2)
    again = CentroidMetric(metric.centroids, metric.factors, metric.temperature, choice.regularization)
    assert abs(grid_share(again, radius) - 0.2) < 4 * choice.stderr
    assert metric.regularization == 1e-2


def test_choice_at_the_ends_of_its_bounds():
    # A ball of radius 2T has no far part: any λ serves, and the upper end is returned.
    assert choose_regularization(lone_bump(2, 0.1), 0.05, radius=2.0).regularization == pytest.approx(1e2)
    # Beyond 2T the bump alone (λ = 0) keeps e^{-4} = 1.8 % of the mass at d = 2.
    with pytest.raises(ValueError, match=r"^share: .*temperature"):
        choose_regularization(lone_bump(2, 0.1), 0.01, radius=4.0)


def test_estimates_leave_the_generator_alone_and_repeat():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = (
        choose_regularization(scattered(3), num_samples=2000),
        exact_far_share(scattered(3), num_samples=2000),
    )
    assert torch.equal(torch.rand(4), expected)
    second = (
        choose_regularization(scattered(3), num_samples=2000),
        exact_far_share(scattered(3), num_samples=2000),
    )
    assert first == second


def test_exact_mode_weighs_modes_that_no_chain_connects():
    """Two bumps of unequal mass, 20 temperatures apart, over almost nothing: the starts must weigh them."""
    factors = torch.stack([torch.eye(2), 2 * torch.eye(2)])
    metric = CentroidMetric(torch.tensor([[-5.0, 0.0], [5.0, 0.0]]), factors, 0.5, 1e-6)
    torch.manual_seed(0)
    sampler = ManifoldSampler(metric, "exact", num_steps=10, num_leapfrog=5, warmup=50)
    z = sampler.sample(2000)
    # √det A: 1 against 4.
    heavy = float((z[:, 0] > 0).float().mean())
    assert abs(heavy - 0.8) < 4.5 * math.sqrt(0.16 / 2000)
    assert sampler.report.acceptance >= 0.9 and sampler.report.divergences == 0
    assert sampler.report.effective_starts > 2000
    # Within a bump the density is exp(-r²/T²): r² is exponential with mean T².
    r2 = (z - torch.tensor([5.0, 0.0]))[z[:, 0] > 0].square().sum(-1)
    assert stats.kstest(r2.numpy(), "expon", args=(0, 0.25)).pvalue > 1e-3


def test_exact_mode_matches_the_grid():
    metric = scattered(2)
    torch.manual_seed(1)
    sampler = ManifoldSampler(metric, "exact", num_steps=10, num_leapfrog=5, warmup=50)
    z = sampler.sample(3000)
    points, distance = grid(metric, sampler.radius)
    mass = (-metric.log_volume(points)).double().softmax(0)
    # Cells: which quadrant, and how far from the nearest centroid.
    edges = torch.tensor([0.15, 0.3, 0.5, 0.8, 1.2, 1.8, 2.6])

    def cell(p, r):
        return (torch.bucketize(r, edges) * 2 + (p[:, 0] > 0)) * 2 + (p[:, 1] > 0)

    expected = torch.zeros(32).double().index_add(0, cell(points, distance), mass) * len(z)
    counts = torch.bincount(
        cell(z, (z[:, None] - metric.centroids).norm(dim=-1).amin(-1)), minlength=32
    ).double()
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp(min=1e-9)
    assert stats.chisquare(counts, expected).pvalue > 1e-3
    share = grid_share(metric, sampler.radius)
    assert abs(sampler.report.far_share - share) < 4.5 * math.sqrt(share * (1 - share) / len(z))


def test_high_dimension_far_mass_in_both_modes():
    """d = 10: the exact draws hold the far mass that the radial integral gives; finite chains stay near."""
    metric = lone_bump(10, 0.01)
    share = radial_share(10, 0.01, 8.0)
    assert 0.3 < share < 0.99
    torch.manual_seed(2)
    exact = ManifoldSampler(metric, "exact", radius=8.0, num_steps=5, num_leapfrog=5, warmup=50)
    exact.sample(2000)
    assert abs(exact.report.far_share - share) < 4.5 * math.sqrt(share * (1 - share) / 2000)
    near = ManifoldSampler(metric, radius=8.0, num_steps=30)
    near.sample(500)
    assert near.report.far_share < 0.05
    assert near.report.mode == "chains" and near.report.effective_starts is None


def test_chains_start_from_centroids_and_move():
    metric = scattered(3)
    torch.manual_seed(0)
    sampler = ManifoldSampler(metric, num_steps=1, num_leapfrog=1, step_size=1e-4)
    z = sampler(600)
    distance = (z[:, None] - metric.centroids).norm(dim=-1)
    assert distance.amin(-1).max() < 1e-2
    counts = torch.bincount(distance.argmin(-1), minlength=len(metric.centroids))
    assert stats.chisquare(counts).pvalue > 1e-3
    assert sampler.report.step_size == pytest.approx(1e-4)


def test_explicit_starts_pools_blocks_and_seeds():
    metric = scattered(2)
    start = metric.centroids[:1] + 0.01 * torch.arange(5)[:, None]
    sampler = ManifoldSampler(metric, num_steps=1, num_leapfrog=1, step_size=1e-5, block_size=2)
    torch.testing.assert_close(sampler.sample(5, start=start), start, atol=1e-3, rtol=0)
    pool = ManifoldSampler(metric, num_steps=1, num_leapfrog=1, step_size=1e-5, start=torch.ones(3, 2))
    torch.testing.assert_close(pool.sample(4), torch.ones(4, 2), atol=1e-3, rtol=0)
    torch.manual_seed(7)
    first = sampler.sample(5)
    torch.manual_seed(7)
    assert torch.equal(sampler.sample(5), first)


def test_adapted_step_in_chains_mode():
    torch.manual_seed(0)
    sampler = ManifoldSampler(scattered(2), step_size="adapt", num_steps=20, num_leapfrog=5, warmup=100)
    sampler.sample(300)
    assert sampler.report.step_size > 0.06
    assert sampler.report.acceptance >= 0.9


def test_float64_and_a_metric_without_centroids():
    torch.manual_seed(0)
    assert ManifoldSampler(lone_bump(2, 0.1, dtype=torch.float64), "exact", radius=3.0, num_steps=2).sample(
        5
    ).dtype == (torch.float64)
    flat = ManifoldSampler(EuclideanMetric(3), "exact", radius=2.0, num_steps=20, num_leapfrog=3, warmup=50)
    z = flat.sample(2000)
    assert math.isnan(flat.report.far_share)
    assert stats.kstest(z.norm(dim=-1).numpy() ** 3 / 8, "uniform").pvalue > 1e-3
    pool = ManifoldSampler(EuclideanMetric(3), radius=2.0, start=torch.zeros(1, 3), num_steps=2)
    assert pool.sample(3).shape == (3, 3)


def test_few_effective_starts_warn():
    metric = scattered(2)
    with pytest.warns(UserWarning, match=r"num_proposals"):
        ManifoldSampler(metric, "exact", num_proposals=60, num_steps=1, warmup=1).sample(5)


BAD = {
    "mode": {"mode": "both"},
    "num_steps": {"num_steps": 0},
    "num_leapfrog": {"num_leapfrog": 0},
    "step_size": {"step_size": "large"},
    "radius": {"radius": -1.0},
    "start": {"start": torch.zeros(3)},
    "block_size": {"block_size": 0},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        ManifoldSampler(scattered(2), **BAD[name])


def test_refusals():
    metric = scattered(2)
    with pytest.raises(ValueError, match=r"^n: "):
        ManifoldSampler(metric).sample(0)
    with pytest.raises(ValueError, match=r"^start: .*one for each draw"):
        ManifoldSampler(metric).sample(3, start=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"^start: .*outside"):
        ManifoldSampler(metric).sample(1, start=torch.full((1, 2), 1e3))
    with pytest.raises(ValueError, match=r"^radius: .*none inside"):
        ManifoldSampler(metric, radius=1e-3).sample(1)
    with pytest.raises(ValueError, match=r"^start: .*EuclideanMetric"):
        ManifoldSampler(EuclideanMetric(2), radius=1.0)
    with pytest.raises(ValueError, match=r"^metric: .*EuclideanMetric"):
        exact_far_share(EuclideanMetric(2), radius=1.0)
    with pytest.raises(ValueError, match=r"^metric: .*CentroidMetric"):
        choose_regularization(EuclideanMetric(2), radius=1.0)
    with pytest.raises(ValueError, match=r"^share: "):
        choose_regularization(metric, share=5)
