from __future__ import annotations

import pytest
import torch

from riemvae.data import load_digits_split


def test_digits_split_is_stratified_disjoint_and_complete():
    split = load_digits_split(per_class=5, seed=3, val_per_class=7)
    assert split.x_train.shape == (50, 1, 8, 8) and split.x_val.shape == (70, 1, 8, 8)
    assert split.x_test.shape == (1797 - 120, 1, 8, 8)
    assert split.y_train.bincount().tolist() == [5] * 10 and split.y_val.bincount().tolist() == [7] * 10
    every = torch.cat([split.x_train, split.x_val, split.x_test])
    assert every.dtype == torch.float32 and every.min() == 0 and every.max() == 1
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    rows = torch.cat(
        [torch.cat([split.y_train, split.y_val, split.y_test])[:, None], every.flatten(1) * 16], 1
    )
    expected = torch.cat([torch.tensor(labels)[:, None], torch.tensor(images)], 1)
    assert sorted(rows.tolist()) == sorted(expected.tolist())  # every image once, with its own label
    assert split.y_train.tolist() != sorted(split.y_train.tolist())  # classes are mixed


def test_digits_split_follows_its_seed_and_leaves_torch_alone():
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    a, b, c = (load_digits_split(5, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), first)
    assert torch.equal(a.x_train, b.x_train) and torch.equal(a.y_test, b.y_test)
    assert not torch.equal(a.x_train, c.x_train)
    assert len(a.x_val) == 0 and a.x_val.shape == (0, 1, 8, 8)


@pytest.mark.parametrize("arguments", [(0,), (5, 0, -1), (174,), (100, 0, 100)])
def test_bad_counts_are_refused(arguments):
    with pytest.raises(ValueError, match="per_class"):
        load_digits_split(*arguments)
