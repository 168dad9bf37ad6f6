"""Precision, recall, density and coverage against their definitions and their known expectations."""

from __future__ import annotations

import pytest
import torch

from riemvae.evaluation import neighbours
from riemvae.evaluation.coverage import PrecisionRecall, precision_recall


def by_definition(real, generated, k):
    """The four sums of the papers, written out."""

    def radius(points, i):
        others = [float((points[i] - p).norm()) for j, p in enumerate(points) if j != i]
        return sorted(others)[k - 1] + 1e-9

    real_radii = [radius(real, i) for i in range(len(real))]
    generated_radii = [radius(generated, j) for j in range(len(generated))]
    inside = [
        [float((x - y).norm()) <= r for x, r in zip(real, real_radii)] for y in generated
    ]  # [generated][real]
    recalled = [any(float((x - y).norm()) <= r for y, r in zip(generated, generated_radii)) for x in real]
    return PrecisionRecall(
        precision=sum(any(row) for row in inside) / len(generated),
        recall=sum(recalled) / len(real),
        density=sum(sum(row) for row in inside) / (k * len(generated)),
        coverage=sum(any(row[i] for row in inside) for i in range(len(real))) / len(real),
    )


@pytest.mark.parametrize("tile", [1 << 22, 40], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_definitions(monkeypatch, k, tile):
    monkeypatch.setattr(neighbours, "_TILE_ELEMENTS", tile)
    monkeypatch.setattr(neighbours, "_TILE_ROWS", 8)
    torch.manual_seed(k)
    real, generated = torch.randn(60, 3).double(), torch.randn(35, 3).double() + 1.2
    expected = by_definition(real, generated, k)
    assert precision_recall(real, generated, k) == pytest.approx(expected)
    # The question is not trivial: no share sits at its limit, and no two scores agree.
    assert 0 < expected.precision < 1 and 0 < expected.recall < 1 and 0 < expected.coverage < 1
    assert len({round(score, 3) for score in expected}) == 4


def test_a_set_against_itself_is_perfect():
    torch.manual_seed(0)
    x = 100 + torch.randn(60, 8)
    scores = precision_recall(x, x, 4)
    # k others and the datum itself lie in each ball, its border included.
    assert scores == pytest.approx(PrecisionRecall(1.0, 1.0, 5 / 4, 1.0))


def test_two_samples_of_one_distribution():
    torch.manual_seed(0)
    k, n = 5, 2000
    scores = precision_recall(torch.randn(n, 16), torch.randn(n, 16), k)
    assert scores.density == pytest.approx(1.0, abs=0.05)  # Naeem et al., section 3.3
    # Lemma 2 of Naeem et al.; the standard error of a share over 2000 is below 0.004.
    assert scores.coverage == pytest.approx(1 - 0.5**k, abs=0.015)


def test_a_dropped_mode_costs_recall_and_far_draws_cost_precision():
    torch.manual_seed(0)
    left, right = torch.randn(200, 2), 50 + torch.randn(200, 2)
    dropped = precision_recall(torch.cat([left, right]), torch.randn(200, 2))
    assert dropped.coverage < 0.51 > dropped.recall
    assert dropped.precision > 0.9
    spread = precision_recall(left, torch.cat([torch.randn(100, 2), right[:100]]))
    assert spread.precision < 0.51
    assert spread.recall > 0.9


@pytest.mark.parametrize(
    ("real", "generated", "k", "message"),
    [
        (torch.zeros(5, 2), torch.zeros(6, 2), 5, "real: "),
        (torch.zeros(6, 2), torch.zeros(5, 2), 5, "generated: "),
        (torch.zeros(6, 2), torch.zeros(6, 3), 2, "generated: "),
        (torch.zeros(6, 2), torch.zeros(6, 2), 0, "k: "),
        (torch.full((6, 2), torch.nan), torch.zeros(6, 2), 2, "real: "),
    ],
)
def test_bad_input_is_named(real, generated, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(real, generated, k)
