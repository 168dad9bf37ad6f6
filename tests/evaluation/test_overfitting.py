"""The overfitting check tells copies, fresh data and far draws apart."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import mannwhitneyu

from riemvae.evaluation.overfitting import overfitting_check


def test_neighbours_are_those_of_brute_force():
    torch.manual_seed(0)
    train, draws = torch.randn(30, 1, 2, 2), torch.randn(12, 1, 2, 2)
    rebuilt = train.flip(0)[:25] + 0.1
    check = overfitting_check(draws, train, rebuilt)
    to_train = (draws[:, None] - train).flatten(2).norm(dim=-1).min(-1)
    to_rebuilt = (draws[:, None] - rebuilt).flatten(2).norm(dim=-1).min(-1)
    torch.testing.assert_close(check.train_distances, to_train.values)
    assert torch.equal(check.train_indices, to_train.indices)
    torch.testing.assert_close(check.reconstruction_distances, to_rebuilt.values)
    assert torch.equal(check.reconstruction_indices, to_rebuilt.indices)
    among = (train[:, None] - train).flatten(2).norm(dim=-1) + 1e9 * torch.eye(30)
    torch.testing.assert_close(check.leave_one_out, among.min(-1).values)


def test_closer_is_the_mann_whitney_statistic_with_ties():
    train = torch.tensor([[0.0], [1.0], [3.0], [6.0], [7.0]])  # leave one out: 1, 1, 2, 1, 1
    draws = torch.tensor([[0.5], [2.0], [9.0], [4.5]])  # 0.5, 1, 2, 1.5
    check = overfitting_check(draws, train)
    statistic = mannwhitneyu(check.leave_one_out, check.train_distances).statistic
    assert check.closer == pytest.approx(statistic / 20)
    assert check.closer == pytest.approx((5 + (0.5 * 4 + 1) + 0.5 + 1) / 20)
    assert check.reconstruction_distances is None
    assert "median_reconstruction_distance" not in check.summary()


def test_copies_fresh_data_and_far_draws():
    torch.manual_seed(0)
    train = torch.randn(1000, 4)
    fresh = overfitting_check(torch.randn(1000, 4), train)
    # Standard error of the statistic for 1000 and 1000: about 0.013.
    assert fresh.closer == pytest.approx(0.5, abs=0.05)
    assert float(fresh.copied(0.2).double().mean()) == pytest.approx(0.2, abs=0.06)
    copies = overfitting_check(train[:300] + 0.01 * torch.randn(300, 4), train)
    assert copies.closer > 0.95
    assert float(copies.copied().double().mean()) > 0.95
    assert overfitting_check(5 + torch.randn(300, 4), train).closer < 0.05
    summary = copies.summary()
    assert summary["median_train_distance"] == pytest.approx(0.02, rel=0.3)  # 0.01 times √4, about
    assert summary["median_leave_one_out"] == pytest.approx(float(copies.leave_one_out.median()))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="train: "):
        overfitting_check(torch.zeros(3, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="reference: "):
        overfitting_check(torch.zeros(3, 2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="quantile: "):
        overfitting_check(torch.zeros(3, 2), torch.zeros(4, 2)).copied(1.0)
