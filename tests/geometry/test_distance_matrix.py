"""All distances of a set of points: closed forms, the axioms of a distance, blocks of bounded memory."""

from __future__ import annotations

import time

import pytest
import torch
from closed_forms import CLOSED_FORMS
from oracles import METRICS, centroid_metric

from riemvae.geometry import geodesics
from riemvae.geometry.centroid import CentroidMetric
from riemvae.geometry.curve_starts import shortest_ways, stations
from riemvae.geometry.geodesics import distance, distance_matrix
from riemvae.geometry.metric import ConstantMetric, EuclideanMetric


def learned_metric(n, d, seed=0, dtype=torch.float64):
    """Such as training leaves: centroids spread like the prior, factors of order 0.3."""
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(n, d, generator=generator)
    below = 0.05 * torch.randn(n, d, d, generator=generator).tril(-1)
    diagonal = 0.3 * (0.2 * torch.randn(n, d, generator=generator)).exp()
    factors = below + torch.diag_embed(diagonal)
    return CentroidMetric(centroids.to(dtype), factors.to(dtype), temperature=0.8, regularization=1e-3)


@pytest.mark.parametrize("d", [2, 5])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms_to_the_stated_error_and_to_1e_4_where_refined(name, d):
    torch.manual_seed(0)
    manifold = CLOSED_FORMS[name](d)
    z = 0.6 * manifold.random(12) if name == "sphere" else manifold.random(12)
    exact = manifold.dist(z.unsqueeze(1), z)
    off = ~torch.eye(12, dtype=torch.bool)
    for refine in (False, True):
        result = distance_matrix(manifold.metric, z, refine=refine, full=True)
        assert result.converged.all()
        error = (result.distance[off] / exact[off] - 1).abs()
        assert (error <= result.discretisation_error[off] + 1e-5).all()
        if refine:
            assert error.max() < 1e-4


@pytest.mark.parametrize("name", METRICS)
def test_a_distance_is_symmetric_zero_at_home_and_obeys_the_triangle_inequality(name):
    torch.manual_seed(0)
    metric = METRICS[name](3)
    z = torch.randn(15, 3, dtype=torch.float64)
    result = distance_matrix(metric, z, full=True, refine=1e-4)
    d = result.distance
    assert torch.equal(d, d.mT)
    assert (d.diagonal() == 0).all()
    off = ~torch.eye(15, dtype=torch.bool)
    assert (d[off] > 0).all()
    slack = (1e-5 + 1e-4) * d.max()
    assert (d.unsqueeze(1) <= d.unsqueeze(2) + d.unsqueeze(0) + slack).all()
    torch.testing.assert_close(d, distance(metric, z.unsqueeze(1), z), rtol=1e-3, atol=1e-9)


def test_the_triangle_inequality_on_a_learned_metric():
    metric = learned_metric(60, 2)
    result = distance_matrix(metric, metric.centroids, refine=1e-3, full=True)
    d = result.distance
    assert result.converged.all()
    assert (d.unsqueeze(1) <= d.unsqueeze(2) + d.unsqueeze(0) + 2e-3 * d.max()).all()


def test_other_points_give_a_rectangle():
    metric = centroid_metric(2)
    torch.manual_seed(0)
    z, other = torch.randn(5, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    result = distance_matrix(metric, z, other, full=True)
    assert result.distance.shape == result.converged.shape == result.discretisation_error.shape == (5, 3)
    square = distance_matrix(metric, torch.cat([z, other]))
    torch.testing.assert_close(result.distance, square[:5, 5:], rtol=1e-4, atol=0)


def test_a_constant_metric_gives_mahalanobis_distances_exactly():
    torch.manual_seed(0)
    root = torch.randn(4, 4, dtype=torch.float64)
    matrix = root @ root.mT + torch.eye(4, dtype=torch.float64)
    z = torch.randn(10, 4, dtype=torch.float64)
    delta = z.unsqueeze(1) - z
    exact = torch.einsum("...i,ij,...j->...", delta, matrix, delta).sqrt()
    torch.testing.assert_close(distance_matrix(ConstantMetric(matrix), z), exact, rtol=1e-12, atol=1e-12)


def test_one_point_two_points_and_the_same_point_twice():
    metric = EuclideanMetric(2)
    assert distance_matrix(metric, torch.tensor([[1.0, 2.0]])).tolist() == [[0.0]]
    assert distance_matrix(metric, torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist() == [
        [0.0, 5.0],
        [5.0, 0.0],
    ]
    z = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    twice = distance_matrix(centroid_metric(2), z)
    assert twice[0, 1] == 0
    torch.testing.assert_close(twice[0, 2], twice[1, 2])


def test_clusters_far_apart_are_reached():
    metric = centroid_metric(2)
    torch.manual_seed(0)
    z = torch.cat([torch.randn(12, 2), 30.0 + torch.randn(12, 2)]).double()
    result = distance_matrix(metric, z, full=True)
    assert torch.isfinite(result.distance).all()
    assert result.converged.all()
    # Far from all centroids the metric is I/λ, λ = 0.2.
    assert result.distance[:12, 12:].min() > 0.8 * 25 * 2**0.5 / 0.2**0.5


def test_no_way_through_other_points_undercuts_a_distance():
    # A grid that reaches beyond the centroids, where the first valley found is often not the shortest.
    metric = learned_metric(60, 2)
    axis = torch.linspace(-3, 3, 7, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    result = distance_matrix(metric, z, full=True)
    d = result.distance
    through = (d.unsqueeze(2) + d.unsqueeze(0)).amin(1)
    assert (d <= 1.001 * through * (1 + 1e-12)).all()
    assert torch.equal(d, d.mT)
    assert (d.diagonal() == 0).all()


def test_ways_through_points_that_coincide():
    distances = torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, 1.0], [5.0, 1.0, 0.0]])
    lengths, before = shortest_ways(distances)
    assert lengths[0].tolist() == [0.0, 0.0, 1.0]
    trail = stations(before, torch.tensor([0, 1]), torch.tensor([2, 2]))
    assert trail.tolist() == [[2, 1, 0], [2, 1, 1]]


def test_blocks_change_nothing(monkeypatch):
    metric = learned_metric(20, 2)
    z = metric.centroids
    whole = distance_matrix(metric, z)
    monkeypatch.setattr(geodesics, "_BLOCK", 17 * 2 * 16)
    torch.testing.assert_close(distance_matrix(metric, z, progress=False), whole, rtol=1e-4, atol=0)


def test_bad_arguments_name_what_is_wrong():
    metric = EuclideanMetric(2)
    with pytest.raises(ValueError, match=r"z: expected a tensor \(N, d\)"):
        distance_matrix(metric, torch.zeros(2))
    with pytest.raises(ValueError, match="at least one point"):
        distance_matrix(metric, torch.zeros(0, 2))
    with pytest.raises(ValueError, match=r"other: expected a tensor of shape \(\.\.\., 2\)"):
        distance_matrix(metric, torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="z: expected finite values"):
        distance_matrix(metric, torch.full((3, 2), torch.inf))


def test_the_tolerance_bounds_the_excess_of_a_learned_metric():
    metric = learned_metric(40, 2)
    loose = distance_matrix(metric, metric.centroids, tolerance=1e-5)
    tight = distance_matrix(metric, metric.centroids, tolerance=1e-10)
    off = ~torch.eye(40, dtype=torch.bool)
    excess = loose[off] / tight[off] - 1
    assert excess.quantile(0.99) < 1e-5
    assert (excess > -1e-5).all()


@pytest.mark.slow
def test_all_distances_of_180_points_take_seconds():
    metric = learned_metric(180, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        result = distance_matrix(metric, metric.centroids, full=True)
        seconds = time.process_time() - start
    finally:
        torch.set_num_threads(threads)
    assert result.converged.all()
    assert seconds < 12  # 6 on an idle machine
