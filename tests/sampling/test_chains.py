"""Chains on the inverse volume element agree with a grid, from any start; what a run reports."""

import math

import pytest
import torch
from grid_checks import cell_p_value, density

from riemvae.sampling import HMC, run_chains, sample_chains


def starts(kind, target, chains):
    d, centroids = target.event_shape[0], target.metric.centroids
    corner = torch.full((chains, d), 0.99 * target.radius / math.sqrt(d))
    if kind == "corner":
        return corner
    if kind == "one centroid":
        return centroids[:1].expand(chains, d).clone()
    return torch.cat([corner[: chains // 2], centroids[torch.arange(chains - chains // 2) % len(centroids)]])


@pytest.mark.parametrize("kind", ["corner", "one centroid", "mixed"])
@pytest.mark.parametrize("d", [1, 2])
def test_chains_match_the_grid_from_any_start(d, kind):
    """The last states of many chains are independent draws, so the chi-square holds without thinning."""
    torch.manual_seed(10 + d)
    target, chains = density(d), 1500
    result = sample_chains(target, starts(kind, target, chains), 1, warmup=150, thin=100, num_leapfrog=8)
    assert float(result.acceptance.mean()) >= 0.9
    assert int(result.divergences.sum()) == 0
    assert (torch.linalg.vector_norm(result.samples, dim=-1) <= target.radius).all()
    assert cell_p_value(target, result.samples[-1], 24 if d == 1 else 9) > 1e-3


@pytest.mark.parametrize("d", [1, 2])
def test_the_grid_test_has_power(d):
    """Draws of densities that one might target by mistake (volume, squared, half a root) are told apart."""
    target = density(d)
    torch.manual_seed(0)
    proposals = target.importance_sample(100_000)
    for exponent in (-1.0, 0.0, 0.5, 2.0):
        weight = proposals.log_weight + (exponent - 1) * target.log_density(proposals.points).nan_to_num(
            neginf=0
        )
        index = torch.multinomial(weight.softmax(0), 1500)
        assert cell_p_value(target, proposals.points[index], 24 if d == 1 else 9) < 1e-4


def test_time_averages_match_the_grid():
    """Long runs of few chains: mean square norm within 4 standard errors of the chains' spread."""
    torch.manual_seed(5)
    target = density(2)
    result = sample_chains(target, starts("mixed", target, 60), 150, warmup=100, num_leapfrog=8)
    axis = (torch.arange(600) + 0.5) * (2 * target.radius / 600) - target.radius
    points = torch.cartesian_prod(axis, axis)
    mass = target.log_density(points).double().softmax(0)
    expected = float((mass * points.square().sum(-1)).sum())
    means = result.samples.square().sum(-1).mean(0)
    assert abs(float(means.mean()) - expected) < 4 * float(means.std()) / math.sqrt(60)


def test_same_chains_with_automatic_gradients():
    """A plain callable takes autodiff and follows the very same chain as the closed form, to rounding."""
    target = density(2, torch.float64)
    start = starts("mixed", target, 8)
    runs = []
    for log_density in (target, target.log_density):
        torch.manual_seed(1)
        runs.append(sample_chains(log_density, start.double(), 3, warmup=5, step_size=0.2, num_leapfrog=4))
    torch.testing.assert_close(runs[0].samples, runs[1].samples, atol=1e-9, rtol=0)


def test_result_shapes_and_continuation():
    torch.manual_seed(0)
    kernel = HMC(lambda z: (-0.5 * z.square().sum(-1), -z), 0.4, 3)
    state = kernel.init(torch.zeros(7, 2))
    torch.manual_seed(1)
    whole = run_chains(kernel, state, 6, thin=2)
    assert whole.samples.shape == (6, 7, 2) and whole.log_density.shape == (6, 7)
    assert whole.acceptance.shape == whole.divergences.shape == (7,)
    torch.testing.assert_close(whole.log_density, -0.5 * whole.samples.square().sum(-1))
    torch.manual_seed(1)
    first = run_chains(kernel, state, 2, thin=2)
    rest = run_chains(kernel, first.state, 4, thin=2)
    assert torch.equal(torch.cat([first.samples, rest.samples]), whole.samples)


def test_reports_rejections_and_divergences():
    torch.manual_seed(0)

    def log_density(z):
        return torch.where(z[:, 0] > 1, torch.full_like(z[:, 0], math.nan), -0.5 * z.square().sum(-1))

    result = sample_chains(log_density, torch.zeros(50, 2), 20, warmup=0, step_size=0.5, num_leapfrog=3)
    assert result.divergences.sum() > 10
    assert (result.samples[..., 0] <= 1).all()
    assert 0.1 < float(result.acceptance.mean()) < 0.95
    assert result.step_size == 0.5


def test_progress_bar_is_shown_on_request(capsys):
    kernel = HMC(lambda z: (-0.5 * z.square().sum(-1), -z), 0.4, 3)
    run_chains(kernel, kernel.init(torch.zeros(2, 2)), 3)
    assert capsys.readouterr().out == ""
    run_chains(kernel, kernel.init(torch.zeros(2, 2)), 3, progress=True)
    assert "HMC" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("start", "match"),
    [
        (torch.zeros(3), "^start: .*chains"),
        (torch.zeros(0, 2), "^start: "),
        (torch.tensor([[math.nan, 0.0]]), "^start: .*finite"),
        (torch.tensor([[0.0, 0.0], [100.0, 0.0]]), "^start: .*1 of 2 outside"),
    ],
    ids=["shape", "empty", "nan", "outside"],
)
def test_bad_starts(start, match):
    with pytest.raises(ValueError, match=match):
        sample_chains(density(2), start, 1, warmup=1)
