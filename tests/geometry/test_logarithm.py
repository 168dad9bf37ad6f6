"""The logarithm against closed forms, its inverse, and what it must refuse."""

import warnings

import pytest
import torch
from closed_forms import CLOSED_FORMS, Revolution
from oracles import Bump, PlainCentroid, centroid_metric
from torch.func import jacrev, vmap

from riemvae.geometry import EuclideanMetric, Metric
from riemvae.geometry.exponential import exponential_map
from riemvae.geometry.geodesics import geodesic
from riemvae.geometry.logarithm import log_map

DOUBLE = torch.float64


class HalfLine(Metric):
    """``G = z^{-3/2}`` for ``z > 0``, where ``4 z^{1/4}`` is the arc length."""

    latent_dim = 1

    def inverse(self, z):
        return (z**1.5).unsqueeze(-1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def relative(a, b):
    return float(((a - b).abs() / (1 + b.abs())).max())


def pairs(case, n=12, length=1.0):
    z1 = case.random(n)
    return z1, case.expmap(z1, case.random_velocity(z1, length))


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms(name):
    case = CLOSED_FORMS[name](3)
    z1, z2 = pairs(case)
    found = log_map(case.metric, z1, z2, 40, full=True)
    assert bool(found.converged.all()) and found.iterations.dtype == torch.int64
    assert relative(found.velocity, case.logmap(z1, z2)) < 1e-5
    torch.testing.assert_close(case.metric.norm(z1, found.velocity), case.dist(z1, z2), rtol=1e-5, atol=1e-8)
    assert float(found.energy_drift.max()) < 1e-4


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_inverse_of_the_exponential_map(name):
    case = CLOSED_FORMS[name](3)
    z1 = 0.3 * case.random(12) if name == "sphere" else case.random(12)
    # On the sphere most of the way to where the logarithm ends, at π.
    v = case.random_velocity(z1, 0.7 * case.injectivity if name == "sphere" else 2.0)
    z2 = exponential_map(case.metric, z1, v, 60)
    back = log_map(case.metric, z1, z2, 60)
    assert relative(back, v) < 1e-6  # of the same discrete map: the shooting's tolerance, times its condition
    again = exponential_map(case.metric, z1, back, 60)
    assert float(((again - z2).abs().amax(-1) / (z2 - z1).abs().amax(-1)).max()) < 2e-9


def test_rays_of_a_rotationally_symmetric_metric():
    case = Revolution()
    ray = torch.nn.functional.normalize(torch.randn(20, 2, dtype=DOUBLE), dim=-1)
    velocity = log_map(case.metric, 0.2 * ray, 1.4 * ray)
    torch.testing.assert_close(velocity, 1.2 * ray, rtol=1e-6, atol=1e-7)


def test_user_metric_equals_the_closed_form():
    closed = centroid_metric(2)
    user = PlainCentroid(closed.centroids, closed.factors, closed.temperature, closed.regularization)
    z1, z2 = torch.randn(2, 10, 2, dtype=DOUBLE)
    first, second = log_map(closed, z1, z2, full=True), log_map(user, z1, z2, full=True)
    torch.testing.assert_close(first.velocity, second.velocity, rtol=1e-6, atol=1e-8)
    assert torch.equal(first.converged, second.converged) and bool(first.converged.all())


def test_learned_metric_gives_shortest_geodesics_or_nothing():
    """A rough metric: no pair is silently wrong."""
    metric = centroid_metric(2, n=100, scale=0.3, temperature=0.3, regularization=1e-2)
    z1, z2 = torch.randn(2, 40, 2, dtype=DOUBLE)
    with pytest.warns(RuntimeWarning, match=r"log_map: (\d+) of 40 pairs did not converge") as record:
        found = log_map(metric, z1, z2, full=True)
    good = found.converged
    assert f"{int((~good).sum())} of 40" in str(record[0].message)
    assert torch.equal(torch.isfinite(found.velocity).all(-1), good)
    assert int(good.sum()) > 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shortest = geodesic(metric, z1, z2, refine=True)
    ratio = (metric.norm(z1, found.velocity) / shortest.length)[good]
    # One hundredth of drift of the energy, half of it of the length, and the margin for the discrete path.
    assert float(ratio.min()) > 0.98 and float(ratio.max()) < 1.02
    # More steps resolve more.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert int(log_map(metric, z1, z2, 60, full=True).converged.sum()) > int(good.sum())


def test_too_few_steps_are_refused():
    case = CLOSED_FORMS["ball"](2)
    z1, z2 = torch.tensor([[-0.9, 0.3], [0.9, 0.3]], dtype=DOUBLE)
    with pytest.warns(RuntimeWarning, match="1 of 1"):
        found = log_map(case.metric, z1, z2, 4, full=True)
    assert not bool(found.converged) and bool(torch.isnan(found.velocity).all())
    assert relative(log_map(case.metric, z1, z2, 100), case.logmap(z1, z2)) < 1e-5


def test_the_long_way_round_is_refused():
    case = CLOSED_FORMS["sphere"](2)
    z1 = torch.tensor([-0.2, -0.3], dtype=DOUBLE)
    z2 = torch.tensor([0.3, -0.2], dtype=DOUBLE)
    short = case.logmap(z1, z2)
    length = case.dist(z1, z2)
    long = -short * (2 * torch.pi - length) / length
    torch.testing.assert_close(case.expmap(z1, long), z2)  # it does lead there
    with pytest.warns(RuntimeWarning, match="1 of 1"):
        found = log_map(case.metric, z1, z2, 100, start=long, full=True)
    assert not bool(found.converged) and float(found.residual) < 1e-8
    assert relative(log_map(case.metric, z1, z2, 40, start=1.1 * short), short) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_coincident_points_give_zero(dtype):
    z = torch.randn(3, 2, dtype=dtype)
    other = z.clone()
    other[1] += 0.1
    for metric in (centroid_metric(2, dtype=dtype), Bump(2).to(dtype), EuclideanMetric(2)):
        found = log_map(metric, z, other, full=True)
        assert bool(found.converged.all())
        assert torch.equal(found.velocity[[0, 2]], torch.zeros(2, 2, dtype=dtype))
        assert found.iterations.tolist()[::2] == [0, 0]
        assert float(found.velocity[1].detach().abs().max()) > 0.01
        assert torch.equal(log_map(metric, z, z), torch.zeros_like(z))


def test_nothing_spreads_from_a_pair_that_is_not_a_number():
    metric = centroid_metric(2)
    z1, z2 = torch.randn(2, 4, 2, dtype=DOUBLE)
    expected = log_map(metric, z1, z2)
    z1[2, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="1 of 4"):
        found = log_map(metric, z1, z2, full=True)
    assert found.converged.tolist() == [True, True, False, True]
    assert bool(torch.isnan(found.velocity[2]).all())
    torch.testing.assert_close(found.velocity[found.converged], expected[found.converged])


def test_few_iterations_are_reported():
    case = CLOSED_FORMS["ball"](2)
    z1, z2 = pairs(case, 8)
    with pytest.warns(RuntimeWarning, match="8 of 8"):
        found = log_map(case.metric, z1, z2, max_iterations=1, start=0.1 * (z2 - z1), full=True)
    assert not bool(found.converged.any()) and bool((found.iterations == 1).all())
    assert bool((found.residual > 1e-6).all()) and bool(torch.isnan(found.energy_drift).all())


def test_wild_starts_are_tamed():
    case = CLOSED_FORMS["half_space"](2)
    z1, z2 = pairs(case, 8)
    exact = case.logmap(z1, z2)
    assert relative(log_map(case.metric, z1, z2, 40, start=4.0 * exact), exact) < 1e-5
    # A start whose geodesic leaves the domain: it is shortened until there is an end to correct.
    z1, z2 = torch.ones(1, dtype=DOUBLE), torch.tensor([0.5], dtype=DOUBLE)
    start = torch.tensor([-30.0], dtype=DOUBLE)
    assert bool(torch.isnan(exponential_map(HalfLine(), z1, start, full=True).end))
    found = log_map(HalfLine(), z1, z2, 40, start=start, full=True)
    torch.testing.assert_close(found.velocity, 4 * (z2**0.25 - 1), rtol=1e-5, atol=0)


def test_shapes():
    metric = centroid_metric(2)
    z1, z2 = torch.randn(3, 1, 2, dtype=DOUBLE), torch.randn(4, 2, dtype=DOUBLE)
    found = log_map(metric, z1, z2, full=True)
    assert found.velocity.shape == (3, 4, 2)
    assert {x.shape for x in found[1:]} == {torch.Size([3, 4])}
    single = log_map(metric, z1[1, 0], z2[2])
    torch.testing.assert_close(found.velocity[1, 2], single, rtol=1e-6, atol=1e-8)
    assert log_map(metric, z1[:0], z2).shape == (0, 4, 2)
    assert not single.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(log_map(metric, z1[1, 0], z2[2]), single, rtol=1e-6, atol=1e-8)


def test_single_precision():
    case = CLOSED_FORMS["ball"](3)
    z1, z2 = pairs(case)
    velocity = log_map(case.metric, z1.float(), z2.float())
    assert velocity.dtype == torch.float32
    assert relative(velocity.double(), case.logmap(z1, z2)) < 1e-3


# -- derivatives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_gradients_against_closed_forms(name):
    case = CLOSED_FORMS[name](2)
    z1, z2 = pairs(case, 6)
    leaves = [x.clone().requires_grad_() for x in (z1, z2)]
    velocity = log_map(case.metric, *leaves, 60)
    for k, leaf in enumerate(leaves):
        exact = vmap(jacrev(case.logmap, argnums=k))(z1, z2)
        rows = [torch.autograd.grad(velocity[:, i].sum(), leaf, retain_graph=True)[0] for i in range(2)]
        assert relative(torch.stack(rows, 1), exact) < 1e-4


def test_gradients_reach_the_metric():
    metric = Bump(2).double()
    z1, z2 = torch.randn(2, 3, 2, dtype=DOUBLE)
    z2[2] = z1[2]
    (gradient,) = torch.autograd.grad(log_map(metric, z1, z2).square().sum(), metric.height)
    values = []
    for shift in (1e-4, -1e-4):
        with torch.no_grad():
            metric.height += shift
            values.append(log_map(metric, z1, z2).square().sum())
            metric.height -= shift
    torch.testing.assert_close(gradient, (values[0] - values[1]) / 2e-4, rtol=1e-5, atol=1e-8)


def test_gradients_at_coincident_points():
    z = torch.randn(2, 2, dtype=DOUBLE)
    leaves = [z.clone().requires_grad_() for _ in range(2)]
    gradients = torch.autograd.grad(log_map(centroid_metric(2), *leaves)[:, 0].sum(), leaves)
    axis = torch.tensor([[1.0, 0.0]] * 2, dtype=DOUBLE)
    torch.testing.assert_close(gradients[0], -axis)
    torch.testing.assert_close(gradients[1], axis)


# -- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z2": torch.zeros(3, 3)}, r"z2: expected a tensor of shape \(..., 2\)"),
        ({"z2": torch.zeros(4, 2)}, "z2: expected a shape that broadcasts"),
        ({"num_steps": 0}, "num_steps"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"tolerance": 0.0}, "tolerance: expected a finite positive number"),
        ({"start": torch.zeros(5, 2)}, r"start: expected velocities .* \(3, 2\)"),
    ],
)
def test_errors(change, message):
    arguments = {"z1": torch.zeros(3, 2), "z2": torch.ones(3, 2), **change}
    with pytest.raises(ValueError, match=message):
        log_map(EuclideanMetric(2), **arguments)
