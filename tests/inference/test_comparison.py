"""Comparison of models: arithmetic by hand, coverage of the interval, refusals."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from oracles import LinearGaussian

import riemvae as rv
from riemvae.inference.comparison import compare
from riemvae.inference.likelihood import LogLikelihood


def result(log_prob, mcse=0.0, khat=0.1, num_dims=4):
    like = torch.ones_like(log_prob)
    khat = khat if isinstance(khat, torch.Tensor) else khat * like
    return LogLikelihood(log_prob, mcse * like, 50 * like, khat, 100, 0 * like, num_dims)


def test_the_table_is_the_arithmetic_of_paired_differences():
    a = torch.tensor([-3.0, -1.0, -2.0, -4.0], dtype=torch.float64)
    d = torch.tensor([-0.2, -0.1, -0.4, 0.3], dtype=torch.float64)
    table = compare({"b": result(a + d, mcse=0.03), "a": result(a, mcse=0.04), "c": a - 1.0})
    assert [row.name for row in table] == ["a", "b", "c"] and table.best == "a" and len(table) == 3
    row = table["b"]
    assert row.mean == pytest.approx(-2.6) and row.total == pytest.approx(-10.4)
    assert row.difference == pytest.approx(-0.1)
    stderr = math.sqrt(sum((v + 0.1) ** 2 for v in d.tolist()) / 3 / 4)
    assert row.stderr == pytest.approx(stderr) and row.z == pytest.approx(-0.1 / stderr)
    # Four data of error 0.05 in the difference each: 0.05 / √4.
    assert row.mcse == pytest.approx(0.025)
    assert row.interval == pytest.approx((-0.1 - 1.96 * stderr, -0.1 + 1.96 * stderr), abs=1e-4)
    assert row.probability == pytest.approx(0.5 * math.erfc(0.1 / stderr / math.sqrt(2)))
    assert table["a"].difference == 0 and table["a"].z == 0 and table["a"].probability == 0.5
    # A constant difference has no error over data.
    assert table["c"].stderr == 0 and table["c"].z == -math.inf and math.isnan(table["c"].mcse)
    torch.testing.assert_close(table.differences["b"], d)
    assert list(table.to_dict()) == ["a", "b", "c"]
    assert table.to_dict()["b"]["rank"] == 1 and table.to_dict()["b"]["num_data"] == 4


def test_the_errors_are_paired_not_those_of_the_values():
    torch.manual_seed(0)
    hard = 30 * torch.randn(200, dtype=torch.float64)  # some data are hard for both
    table = compare({"a": hard, "b": hard - 0.1 + 0.2 * torch.randn(200, dtype=torch.float64)})
    assert table["b"].mean_stderr > 1.5 and table["b"].stderr < 0.02 and table["b"].z < -4


def test_the_interval_covers_the_true_difference_of_two_known_models():
    torch.manual_seed(1)
    one, other = LinearGaussian(2, scale=0.7), LinearGaussian(2, scale=0.8)
    x = one.data(200 * 300, seed=3)
    a, b = one.log_prob(x), other.log_prob(x)
    truth = float((b - a).mean())
    covered = 0
    for rows in torch.arange(len(x)).reshape(300, 200):
        table = compare({"a": a[rows], "b": b[rows]})
        low, high = table.rows[1].interval
        # Where the worse model leads by luck, the interval is of the opposite difference.
        sign = 1 if table.rows[1].name == "b" else -1
        covered += low <= sign * truth <= high
    # 95 % of 300 is 285, with a standard deviation of 3.8.
    assert 270 <= covered <= 299


def test_estimates_of_one_model_by_two_guides_do_not_differ():
    torch.manual_seed(2)
    oracle = LinearGaussian(3)
    x = oracle.data(300)
    guides = [
        rv.guides.GaussianGuide(oracle.model, lambda x, w=w: oracle.encoder(x, widening=w))
        for w in (1.1, 1.3)
    ]
    lls = [rv.log_likelihood(oracle.model, g, x, num_samples=200) for g in guides]
    exact = oracle.log_prob(x)
    table = compare({"first": lls[0], "second": lls[1], "exact": exact})
    # All of the spread is Monte Carlo's here, and the two errors say so.
    pair = compare({"first": lls[0], "second": lls[1]}).rows[1]
    assert 0.7 < pair.stderr / pair.mcse < 1.4
    assert "Monte Carlo" in pair.warning
    assert all(abs(row.z) < 4 for row in table)


def test_doubtful_estimates_are_flagged():
    torch.manual_seed(0)
    a = torch.randn(100)
    khat = torch.full((100,), 0.2)
    khat[:3] = 0.9
    khat[3:10] = math.nan
    table = compare({"good": result(a), "bad": result(a - torch.rand(100), khat=khat)})
    assert table["bad"].khat_share == pytest.approx(3 / 93) and "too low" in table["bad"].warning
    assert table["good"].warning == "" and "! bad" in repr(table) and "! good" not in repr(table)
    lines = repr(table).splitlines()
    assert lines[1].startswith("good") and "3.2 %" in lines[2]
    assert len({len(line) for line in lines[:3]}) == 1  # aligned


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"a": torch.zeros(3)}, "two results or more"),
        ({"a": torch.zeros(3), "b": torch.zeros(4)}, "different numbers"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, "two data or more"),
        ({"a": torch.zeros(3), "b": torch.zeros(3, 2)}, r"tensor \(B,\)"),
        ({"a": torch.zeros(3), "b": torch.tensor([0.0, -math.inf, 0.0])}, "1 NaN or infinite of 3"),
        ({"a": result(torch.zeros(3)), "b": result(torch.ones(3), num_dims=5)}, "numbers of dimensions"),
        ([torch.zeros(3), torch.zeros(3)], "by name"),
    ],
)
def test_what_cannot_be_compared_is_refused(models, message):
    with pytest.raises(ValueError, match=message):
        compare(models)


def test_rows_are_plain_data():
    table = compare({"a": torch.zeros(3), "b": torch.ones(3)})
    assert table.best == "b" and dataclasses.asdict(table.rows[0])["name"] == "b"
    with pytest.raises(KeyError):
        table["c"]


def test_the_monte_carlo_error_is_that_with_the_tail_where_there_is_one():
    a = torch.tensor([-3.0, -1.0, -2.0, -4.0])
    tail = dataclasses.replace(result(a - 1.0, mcse=0.03), tail_mcse=torch.full((4,), 0.06))
    table = compare({"a": result(a, mcse=0.08), "b": tail})
    # √(0.08² + 0.06²) for each of four data.
    assert table["b"].mcse == pytest.approx(0.05)
