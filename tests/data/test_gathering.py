from __future__ import annotations

import pytest
import torch
from data_sets import Items
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)

from riemvae import zoo
from riemvae.data import in_memory


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(300.0))


NUMBERS = torch.arange(300.0)


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(NUMBERS),
        Items(lambda row: row[0], 300),
        Items(lambda row: (row[0],), 300),
        Stream(),
        DataLoader(NUMBERS, batch_size=7, shuffle=True),
        DataLoader(NUMBERS, batch_size=7, collate_fn=torch.stack),
        DataLoader(
            TensorDataset(NUMBERS),
            sampler=BatchSampler(SequentialSampler(NUMBERS), 7, False),
            batch_size=None,
        ),
    ],
    ids=["tensors", "items", "tuples", "stream", "loader", "collate", "batches"],
)
def test_data_sets_and_loaders_are_read_in_order(data):
    torch.testing.assert_close(in_memory(data), NUMBERS, rtol=0, atol=0)


def test_items_of_several_parts_stay_apart():
    x, y = in_memory(Items(lambda row: (row[0], -row[:2]), 300))
    assert torch.equal(x, NUMBERS) and torch.equal(y, -NUMBERS[:, None].expand(-1, 2))
    named = in_memory(Items(lambda row: {"x": row[0]}, 300))
    assert list(named) == ["x"] and torch.equal(named["x"], NUMBERS)


def test_anything_else_is_as_it_was():
    for data in (NUMBERS, [1.0, 2.0], {"x": NUMBERS}, None):
        assert in_memory(data) is data


def test_what_is_no_data_is_named():
    with pytest.raises(ValueError, match=r"^val_data: expected at least one datum"):
        in_memory(Items(torch.clone, 0), "val_data")
    with pytest.raises(ValueError, match=r"^x\[1\]: expected batches of tensors"):
        in_memory(Items(lambda row: (row[0], "name"), 3))


def trained(recipe, data, **options):
    ae = zoo.build(recipe, 4, 2, hidden=(8,), seed=0, **options)
    ae.fit(data, max_epochs=2, seed=0, progress=False)
    return torch.cat([p.detach().flatten() for p in ae.parameters()])


def test_autoencoders_train_on_them_as_on_tensors():
    x = torch.rand(20, 4)
    expected = trained("vae", x)
    assert torch.equal(trained("vae", TensorDataset(x)), expected)
    assert torch.equal(trained("vae", Items(lambda row: x[int(row[0])], 20)), expected)
    with pytest.raises(ValueError, match=r"^x: expected data alone, got items of 2 parts; leave out labels"):
        trained("vae", TensorDataset(x, torch.zeros(20)))


def test_the_batch_size_of_a_loader_is_that_of_the_training():
    x = torch.rand(20, 4)
    ae = zoo.build("vae", 4, 2, hidden=(8,), seed=0)
    ae.fit(DataLoader(x, batch_size=5, shuffle=True), max_epochs=2, seed=0, progress=False)
    same = zoo.build("vae", 4, 2, hidden=(8,), seed=0)
    same.fit(x, batch_size=5, max_epochs=2, seed=0, progress=False)
    for p, q in zip(ae.parameters(), same.parameters()):
        assert torch.equal(p, q)
    assert not torch.equal(trained("vae", x), torch.cat([p.detach().flatten() for p in ae.parameters()]))


def test_models_of_sequences_take_their_arguments_in_order():
    x, observed = torch.randn(12, 3, 4), torch.rand(12, 3) < 0.7
    expected = trained("lvae", (x, observed), num_visits=3)
    assert torch.equal(trained("lvae", TensorDataset(x, observed), num_visits=3), expected)
    mapped = Items(lambda row: {"x": x[int(row[0])], "observed": observed[int(row[0])]}, 12)
    assert torch.equal(trained("lvae", mapped, num_visits=3), expected)
    assert not torch.equal(trained("lvae", x, num_visits=3), expected)
