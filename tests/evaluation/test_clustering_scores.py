"""F1 of clusters against the best of all matchings, computed by scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from riemvae.evaluation.clustering_scores import clustering_f1, match_clusters


def best_by_enumeration(labels, truth, average):
    """The largest F1 over every way of giving clusters distinct classes (or none)."""
    clusters, classes = np.unique(labels), np.unique(truth)
    names = list(classes) + [-1 - j for j in range(len(clusters))]
    best = 0.0
    for chosen in itertools.permutations(names, len(clusters)):
        predicted = np.array(chosen)[np.searchsorted(clusters, labels)]
        best = max(best, f1_score(truth, predicted, labels=classes, average=average, zero_division=0))
    return best


@pytest.mark.parametrize("average", ["macro", "weighted"])
@pytest.mark.parametrize("k", [2, 3, 4], ids="{} clusters".format)
def test_it_is_the_best_over_all_matchings(k, average):
    rng = np.random.default_rng(0)
    for _ in range(5 - k):
        truth = rng.choice(3, 40, p=[0.6, 0.3, 0.1])
        labels = np.where(rng.random(40) < 0.6, (truth + 1) % k, rng.integers(k, size=40))
        assert clustering_f1(labels, truth, average) == pytest.approx(
            best_by_enumeration(labels, truth, average)
        )


def test_the_match_says_what_the_score_is_made_of():
    truth = torch.tensor([0, 0, 0, 4, 4, 9])
    labels = torch.tensor([7, 7, 8, 8, 8, 8])
    match = match_clusters(labels, truth)
    assert match.classes.tolist() == [0, 4, 9]
    assert match.predicted.tolist() == [0, 0, 4, 4, 4, 4]
    np.testing.assert_allclose(match.per_class, [0.8, 2 / 3, 0.0])
    np.testing.assert_allclose(
        match.per_class, f1_score(truth, match.predicted, average=None, zero_division=0)
    )
    assert match.f1 == pytest.approx(np.mean([0.8, 2 / 3, 0]))


def test_names_of_clusters_and_classes_do_not_matter():
    torch.manual_seed(0)
    truth, labels = torch.randint(4, (50,)), torch.randint(5, (50,))
    score = clustering_f1(labels, truth)
    assert clustering_f1(torch.randperm(5)[labels] + 10, torch.randperm(4)[truth] - 20) == pytest.approx(
        score
    )
    assert clustering_f1(labels.double(), [f"class {t}" for t in truth.tolist()]) == pytest.approx(score)
    assert clustering_f1((truth + 1) % 4, truth) == 1.0


def test_a_cluster_too_many_stays_without_a_class():
    match = match_clusters([0, 0, 1, 1, 2], [-5, -5, 3, 3, 3])
    assert match.predicted.tolist() == [-5, -5, 3, 3, match.unmatched]
    assert match.unmatched == -6
    assert match_clusters([0, 1, 1], ["a", "a", "a"]).predicted.tolist() == ["", "a", "a"]


@pytest.mark.parametrize(
    ("labels", "truth", "options", "message"),
    [
        ([0, 1], [0], {}, "labels: "),
        ([], [], {}, "labels: "),
        ([[0, 1]], [[0, 1]], {}, "labels: "),
        ([0.5, 1], [0, 1], {}, "labels: "),
        ([0, 1], [0, float("nan")], {}, "truth: "),
        ([0, 1], [0, 1], {"average": "micro"}, "average: "),
    ],
)
def test_bad_input_is_named(labels, truth, options, message):
    with pytest.raises(ValueError, match=message):
        clustering_f1(labels, truth, **options)


def test_the_matching_serves_the_score_and_not_the_count():
    # Clusters of 7 a + 2 b and of 4 a: by counts the first is a (7 right), and b has nothing.
    truth = ["a"] * 7 + ["b"] * 2 + ["a"] * 4
    match = match_clusters([0] * 9 + [1] * 4, truth)
    assert match.f1 == pytest.approx((8 / 15 + 4 / 11) / 2)
    assert match.predicted.tolist() == ["b"] * 9 + ["a"] * 4
