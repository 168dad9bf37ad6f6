"""Karcher means, where closed-form logarithms must sum to zero; k-means against scikit-learn and its loss."""

from __future__ import annotations

import math

import pytest
import torch
from closed_forms import CLOSED_FORMS
from sklearn.cluster import KMeans

from riemvae.geometry import CentroidMetric, EuclideanMetric
from riemvae.geometry.means import karcher_mean, riemannian_k_means


def near_points(form, *shape):
    """Points within a third of the curvature's scale of each other, so that the mean is unique."""
    center = form.random(1)[0].repeat(*shape, 1)
    return form.expmap(center, form.random_velocity(center, 0.6))


def gradient(form, mean, points, weights):
    logs = form.logmap(mean.unsqueeze(-2).expand(points.shape).clone(), points)
    return form.metric.norm(mean, (weights.unsqueeze(-1) * logs).sum(-2) / weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_logarithms_at_the_mean_sum_to_zero(name):
    torch.manual_seed(1)
    form = CLOSED_FORMS[name](2)
    points = near_points(form, 2, 5)
    weights = torch.rand(2, 5, dtype=torch.float64)
    exact = karcher_mean(form.metric, points, weights, method="shooting", tolerance=1e-6)
    assert exact.converged.tolist() == [True] * 2
    assert float(gradient(form, exact.mean, points, weights).max()) < 1e-6
    squared = form.dist(exact.mean[:, None].expand(points.shape), points).square()
    torch.testing.assert_close(
        exact.variance, (weights * squared).sum(-1) / weights.sum(-1), rtol=1e-5, atol=0
    )
    curves = karcher_mean(form.metric, points, weights)
    assert curves.converged.tolist() == [True] * 2
    # Discretised curves: their logarithms are right to some 1e-3 of their length, which is below 1.2.
    assert float(gradient(form, curves.mean, points, weights).max()) < 1e-3
    torch.testing.assert_close(curves.variance, exact.variance, rtol=1e-3, atol=0)


def test_a_flat_metric_has_the_ordinary_mean():
    torch.manual_seed(0)
    points, weights = torch.randn(5, 7, 3), torch.rand(7)
    result = karcher_mean(EuclideanMetric(3), points, weights)
    mean = (weights[:, None] * points).sum(-2) / weights.sum()
    torch.testing.assert_close(result.mean, mean, rtol=1e-4, atol=1e-4)
    spread = ((points - mean[:, None]).square().sum(-1) * weights).sum(-1) / weights.sum()
    torch.testing.assert_close(result.variance, spread, rtol=1e-4, atol=0)
    assert bool(result.converged.all()) and int(result.unsolved.sum()) == 0


def test_limits():
    metric = CLOSED_FORMS["sphere"](2).metric
    point = torch.tensor([[0.3, 0.4]], dtype=torch.float64)
    one = karcher_mean(metric, point)
    torch.testing.assert_close(one.mean, point[0])
    assert one.variance == 0 and bool(one.converged)
    same = karcher_mean(metric, point.expand(4, 2))
    torch.testing.assert_close(same.mean, point[0])
    assert bool(same.converged)
    points = torch.tensor([[0.3, 0.4], [0.0, 0.1], [9.0, 9.0]], dtype=torch.float64)
    without = karcher_mean(metric, points, torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(without.mean, karcher_mean(metric, points[:2]).mean)


def test_a_mean_of_data_on_an_arc_lies_on_the_arc():
    torch.manual_seed(0)
    angle = torch.linspace(0.0, math.pi, 40)
    points = 2 * torch.stack([angle.cos(), angle.sin()], -1)
    metric = CentroidMetric(points, 0.3 * torch.eye(2).expand(40, 2, 2), 0.6, 1e-3)
    result = karcher_mean(metric, points, tolerance=1e-3)
    assert bool(result.converged)
    assert abs(float(result.mean[0])) < 0.05
    assert 1.7 < float(result.mean[1]) < 2.0  # geodesics cut the bend a little
    assert float(points.mean(0)[1]) < 1.3  # the ordinary mean lies in the hole


def test_an_iteration_too_few_is_reported():
    torch.manual_seed(0)
    form = CLOSED_FORMS["ball"](2)
    points = form.random(8)
    result = karcher_mean(form.metric, points, tolerance=1e-9, max_iterations=1)
    assert not bool(result.converged)
    assert float(result.gradient_norm) > 1e-9 * float(result.variance.sqrt())


def test_flat_k_means_is_scikit_learns():
    torch.manual_seed(0)
    centers = 4 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    points = (centers[:, None] + torch.randn(4, 15, 2, dtype=torch.float64)).reshape(-1, 2)
    result = riemannian_k_means(points, 4, EuclideanMetric(2), seed=0)
    known = KMeans(4, n_init=20, random_state=0).fit(points.numpy())
    assert result.converged
    assert result.loss == pytest.approx(known.inertia_, rel=1e-3)
    order = torch.cdist(torch.from_numpy(known.cluster_centers_), result.centers).argmin(-1)
    torch.testing.assert_close(
        result.centers[order], torch.from_numpy(known.cluster_centers_), rtol=0, atol=1e-2
    )
    assert torch.equal(order[torch.from_numpy(known.labels_).long()], result.labels)


@pytest.mark.parametrize(("name", "number"), [("half_space", 24), ("sphere", 12)])
def test_k_means_is_a_fixed_point_of_lloyds_steps(name, number):
    torch.manual_seed(2)
    form = CLOSED_FORMS[name](2)
    points = form.random(number)
    result = riemannian_k_means(points, 3, form.metric, seed=0)
    assert result.converged
    distances = form.dist(points[:, None], result.centers[None])
    assert torch.equal(distances.argmin(-1), result.labels)
    assert result.loss == pytest.approx(float(distances.min(-1).values.square().sum()), rel=1e-2)
    for j in range(3):
        mine = points[result.labels == j]
        ones = torch.ones(len(mine), dtype=torch.float64)
        spread = float(distances[result.labels == j, j].square().mean().sqrt())
        assert float(gradient(form, result.centers[j], mine, ones)) < 5e-3 * spread + 1e-9
    worse = riemannian_k_means(points, 3, form.metric, start=points[:3])
    assert result.loss <= 1.01 * worse.loss


def test_an_empty_cluster_gets_the_farthest_point():
    points = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0]], dtype=torch.float64)
    start = torch.tensor([[0.0, 0.5], [50.0, 0.0]])
    result = riemannian_k_means(points, 2, EuclideanMetric(2), start=start)
    assert result.labels.tolist() == [0, 0, 1]
    torch.testing.assert_close(result.centers.float(), torch.tensor([[0.0, 0.5], [9.0, 0.0]]))


def test_what_is_not_finished_warns():
    torch.manual_seed(0)
    points = torch.randn(60, 2)
    with pytest.warns(UserWarning, match="clusters still change after 1 rounds"):
        result = riemannian_k_means(points, 4, EuclideanMetric(2), start=points[:4], max_iterations=1)
    assert not result.converged


FLAT = EuclideanMetric(2)
NAN = torch.full((3, 2), math.nan)
BAD = {
    "mean, no points": (lambda: karcher_mean(FLAT, torch.zeros(0, 2)), "points: "),
    "mean, one vector": (lambda: karcher_mean(FLAT, torch.zeros(2)), "points: "),
    "mean, dimension": (lambda: karcher_mean(FLAT, torch.zeros(3, 3)), "points: "),
    "mean, NaN": (lambda: karcher_mean(FLAT, NAN), "points: "),
    "mean, weights' shape": (lambda: karcher_mean(FLAT, torch.zeros(3, 2), torch.ones(4)), "weights: "),
    "mean, negative weight": (lambda: karcher_mean(FLAT, torch.zeros(3, 2), -torch.ones(3)), "weights: "),
    "mean, no weight": (lambda: karcher_mean(FLAT, torch.zeros(3, 2), torch.zeros(3)), "weights: "),
    "mean, start": (lambda: karcher_mean(FLAT, torch.zeros(3, 2), start=torch.zeros(3)), "start: "),
    "mean, method": (lambda: karcher_mean(FLAT, torch.zeros(3, 2), method="newton"), "method: "),
    "k-means, k": (lambda: riemannian_k_means(torch.zeros(3, 2), 4, FLAT), "k: "),
    "k-means, k of 0": (lambda: riemannian_k_means(torch.zeros(3, 2), 0, FLAT), "k: "),
    "k-means, NaN": (lambda: riemannian_k_means(NAN, 2, FLAT), "points: "),
    "k-means, start": (lambda: riemannian_k_means(torch.zeros(3, 2), 2, FLAT, start=NAN), "start: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
