"""k-medoids against the best of all choices of medoids, on Euclidean and on known geodesic distances."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from closed_forms import CLOSED_FORMS

from riemvae.geometry import EuclideanMetric
from riemvae.geometry.clustering import k_medoids


def euclidean(points):
    return (points[:, None] - points[None]).norm(dim=-1)


def optimum(distances, k):
    """The smallest loss over all choices of k medoids, and that choice."""
    choices = torch.tensor(list(itertools.combinations(range(len(distances)), k)))
    losses = distances[choices].min(1).values.sum(-1)
    best = losses.argmin()
    return float(losses[best]), choices[best]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("options", [{}, {"subsample": 9}], ids=["all", "parts"])
def test_the_best_choice_is_found_and_described(k, options):
    torch.manual_seed(k)
    points = torch.randn(10, 3, dtype=torch.float64)
    distances = euclidean(points)
    loss, _ = optimum(distances, k)  # the choice itself is not unique: either point of a pair serves it
    if options and k == 10:
        options = {"subsample": 10}
    result = k_medoids(points, k, seed=0, num_init=50, **options)
    assert result.loss == pytest.approx(loss, rel=1e-9)
    assert torch.equal(result.labels, distances[:, result.medoids].argmin(-1))
    assert result.labels.dtype == result.medoids.dtype == torch.long
    if not options:
        torch.testing.assert_close(result.distances, distances)


@pytest.mark.parametrize("method", ["fasterpam", "alternating", "pam"])
def test_every_method_ends_where_its_labels_and_loss_agree(method):
    torch.manual_seed(0)
    points = torch.randn(40, 2)
    result = k_medoids(points, 4, method=method, num_init=20)
    distances = euclidean(points)
    assert torch.equal(result.labels, distances[:, result.medoids].argmin(-1))
    assert result.loss == pytest.approx(float(distances[:, result.medoids].min(-1).values.sum()), rel=1e-5)
    if method != "alternating":  # no swap of a medoid for another point helps
        for j, i in itertools.product(range(4), range(40)):
            swapped = result.medoids.clone()
            swapped[j] = i
            assert float(distances[:, swapped].min(-1).values.sum()) > result.loss - 1e-3


@pytest.mark.parametrize(("name", "seed"), [("half_space", 0), ("sphere", 6)])
def test_with_a_metric_the_distance_is_geodesic(name, seed):
    torch.manual_seed(seed)
    form = CLOSED_FORMS[name](2)
    points = form.random(12)
    distances = form.dist(points[:, None], points[None])
    loss, medoids = optimum(distances, 3)
    # The question tells the two distances apart: Euclidean medoids cost more in the geodesic distance.
    wrong = k_medoids(points, 3, seed=0, num_init=50).medoids
    assert float(distances[:, wrong].min(-1).values.sum()) > 1.01 * loss
    result = k_medoids(points, 3, form.metric, seed=0, num_init=50)
    assert torch.equal(result.medoids, medoids)
    # The distances carry the discretisation error of the curves.
    torch.testing.assert_close(result.distances, distances, rtol=1e-3, atol=1e-6)


def test_given_distances_are_used_as_they_are():
    torch.manual_seed(1)
    points = torch.randn(9, 2, dtype=torch.float64)
    squared = euclidean(points).square()
    loss, medoids = optimum(squared, 3)
    for given in (points, None):
        result = k_medoids(given, 3, EuclideanMetric(2), distances=squared, num_init=50)
        assert result.loss == pytest.approx(loss)
        assert torch.equal(result.medoids, medoids)
        assert result.distances is squared


def test_coincident_points_leave_no_cluster_empty():
    result = k_medoids(torch.zeros(6, 2), 3)
    assert result.loss == 0
    assert sorted(result.labels.unique().tolist()) == [0, 1, 2]
    assert torch.equal(result.labels[result.medoids], torch.arange(3))


@pytest.mark.parametrize("options", [{}, {"subsample": 60}], ids=["all", "parts"])
def test_randomness_follows_torch_and_seed_forks_it(options):
    torch.manual_seed(0)
    points = torch.randn(300, 2)

    def run(**more):
        return k_medoids(points, 40, num_init=1, **more, **options).medoids

    state = torch.random.get_rng_state()
    assert torch.equal(run(seed=3), run(seed=3))
    assert torch.equal(torch.random.get_rng_state(), state)
    first = run()
    assert not torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(first, run())
    torch.random.set_rng_state(state)
    assert torch.equal(first, run())


def test_parts_of_many_points_come_near_to_all_of_them():
    torch.manual_seed(0)
    points = torch.randn(3000, 2)
    whole = k_medoids(points, 5, seed=0)
    parts = k_medoids(points, 5, seed=0, subsample=300)
    assert parts.distances is None
    assert parts.labels.shape == (3000,)
    to_medoids = (points[:, None] - points[parts.medoids]).norm(dim=-1)
    assert parts.loss == pytest.approx(float(to_medoids.min(-1).values.sum()), rel=1e-4)
    # A median of 60 points a cluster errs by about 1/√60 of the spread, which costs its square.
    assert parts.loss < 1.03 * whole.loss


def infinite():
    distances = euclidean(torch.randn(4, 2))
    distances[0, 1] = distances[1, 0] = math.inf
    return distances


BAD = {
    "k of 0": (lambda: k_medoids(torch.zeros(3, 2), 0), "k: "),
    "k above N": (lambda: k_medoids(torch.zeros(3, 2), 4), "k: expected at most the number of points, 3"),
    "k above N, distances": (lambda: k_medoids(None, 4, distances=torch.zeros(3, 3)), "k: "),
    "NaN": (lambda: k_medoids(torch.full((3, 2), math.nan), 1), "points: "),
    "one point": (lambda: k_medoids(torch.zeros(2), 1), "points: "),
    "no point": (lambda: k_medoids(torch.zeros(0, 2), 1), "points: "),
    "integers": (lambda: k_medoids(torch.zeros(3, 2, dtype=torch.long), 1), "points: "),
    "nothing": (lambda: k_medoids(None, 1), "points: "),
    "disconnected": (lambda: k_medoids(None, 2, distances=infinite()), "infinite"),
    "not square": (lambda: k_medoids(None, 1, distances=torch.zeros(3, 2)), "distances: "),
    "of other points": (lambda: k_medoids(torch.zeros(4, 2), 1, distances=torch.zeros(3, 3)), "distances: "),
    "negative": (lambda: k_medoids(None, 1, distances=-torch.ones(3, 3)), "distances: "),
    "similarities": (lambda: k_medoids(None, 1, distances=torch.eye(3)), "distances: "),
    "asymmetric": (lambda: k_medoids(None, 1, distances=torch.ones(3, 3).triu(1)), "distances: "),
    "metric of another d": (lambda: k_medoids(torch.zeros(3, 2), 1, EuclideanMetric(3)), "points: "),
    "method": (lambda: k_medoids(torch.zeros(3, 2), 1, method="pamm"), "method: "),
    "num_init": (lambda: k_medoids(torch.zeros(3, 2), 1, num_init=0), "num_init: "),
    "small parts": (lambda: k_medoids(torch.zeros(9, 2), 3, subsample=2), "subsample: "),
    "parts with a metric": (
        lambda: k_medoids(torch.zeros(9, 2), 3, EuclideanMetric(2), subsample=5),
        "subsam",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
