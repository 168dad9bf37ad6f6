import numpy as np
import pytest
import torch
from data_sets import Items
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from riemvae.inference.batches import ArrayBatches, batch_call, batch_length, make_batches


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.arange(5.0)


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


class Unsized(Dataset):
    def __getitem__(self, i):
        return torch.zeros(1)


X = torch.arange(21.0).reshape(7, 3)
KINDS = {
    "tensor": X,
    "array": X.numpy(),
    "tuple": (X, X[:, 0]),
    "list": [X, X[:, 0].numpy()],
    "mapping": {"x": X, "mask": X > 3},
    "tensor data set": TensorDataset(X, X[:, 0]),
    "data set of tensors": Items(lambda v: v),
    "data set of tuples": Items(lambda v: (v, v[0])),
    "data set of mappings": Items(lambda v: {"x": v, "mask": v > 3}),
    "loader": DataLoader(TensorDataset(X), batch_size=5, shuffle=True),
}


def first_member(batch):
    args, kwargs = batch_call(batch)
    return args[0] if args else kwargs["x"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_datum_comes_once_a_pass_in_batches_of_the_asked_size(kind):
    torch.manual_seed(0)
    data = KINDS[kind]
    batches = make_batches("data", data, None if kind == "loader" else 5)
    for _ in range(2):
        seen = list(batches)
        assert [batch_length(batch) for batch in seen] == [5, 2]
        rows = torch.cat([first_member(batch)[:, 0] for batch in seen])
        wanted = torch.arange(7.0) if kind.startswith("data set") else X[:, 0]
        assert torch.equal(rows.sort().values, wanted)
        for batch in seen:  # members stay aligned
            args, kwargs = batch_call(batch)
            if len(args) == 2:
                assert torch.equal(args[1], args[0][:, 0])
            if kwargs:
                assert torch.equal(kwargs["mask"], kwargs["x"] > 3)
    assert len(batches) == 2
    assert batch_length(batches.first()) == 5


@pytest.mark.parametrize(
    ("num_data", "size", "shuffle", "lengths"),
    [
        (7, 3, True, [3, 4]),
        (3, 2, True, [3]),
        (7, 3, False, [3, 3, 1]),
        (8, 3, True, [3, 3, 2]),
        (3, 1, True, [1, 1, 1]),
        (1, 4, True, [1]),
        (6, 3, True, [3, 3]),
    ],
)
def test_one_datum_left_over_joins_the_batch_before_it_in_training(num_data, size, shuffle, lengths):
    batches = make_batches("data", torch.arange(float(num_data)), size, shuffle=shuffle)
    for _ in range(2):
        seen = list(batches)
        assert [len(batch) for batch in seen] == lengths
        assert torch.equal(torch.cat(seen).sort().values, torch.arange(float(num_data)))
    assert len(batches) == len(lengths)


def test_each_pass_has_an_order_of_its_own_from_torchs_generator():
    batches = make_batches("data", torch.arange(100.0), 50)
    torch.manual_seed(0)
    first, second = torch.cat(list(batches)), torch.cat(list(batches))
    torch.manual_seed(0)
    assert torch.equal(torch.cat(list(batches)), first)
    assert not torch.equal(first, second)


def test_a_full_batch_is_the_data_themselves_and_draws_nothing():
    before = torch.get_rng_state()
    (batch,) = make_batches("data", X)
    assert batch.data_ptr() == X.data_ptr()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loader_draws_only_when_its_first_batch_is_asked_for():
    batches = make_batches("data", Items(lambda v: v), 3)
    before = torch.get_rng_state()
    passing = iter(batches)
    assert torch.equal(torch.get_rng_state(), before)
    next(passing)
    assert not torch.equal(torch.get_rng_state(), before)


def test_floating_arrays_take_the_asked_type_and_tensors_keep_theirs():
    assert make_batches("data", np.zeros((2, 1))).first().dtype == torch.float32
    assert make_batches("data", np.zeros((2, 1)), dtype=torch.float64).first().dtype == torch.float64
    assert make_batches("data", torch.zeros(2, 1).double()).first().dtype == torch.float64
    assert make_batches("data", np.zeros((2, 1), dtype=np.int64)).first().dtype == torch.int64


def test_a_read_only_array_is_taken_without_a_warning(recwarn):
    array = np.zeros((2, 1), dtype=np.float32)
    array.setflags(write=False)
    make_batches("data", array)
    assert not recwarn.list


@pytest.mark.parametrize("batch_size", [None, 2])
def test_processes_share_one_order_in_equal_parts(batch_size):
    device = torch.device("cpu")
    shares = [ArrayBatches(torch.arange(11.0), batch_size).on(device, rank, 3, seed=5) for rank in range(3)]
    for _ in range(2):
        parts = [torch.cat(list(share)) for share in shares]
        assert [len(part) for part in parts] == [4, 4, 4]
        assert set(torch.cat(parts).tolist()) == set(range(11))
    assert len({len(share) for share in shares}) == 1
    assert not torch.equal(parts[0], torch.cat(list(shares[0])))


@pytest.mark.parametrize(
    ("data", "batch_size", "message"),
    [
        (torch.zeros(0, 3), None, "data: expected at least one datum"),
        (Items(lambda v: v, length=0), None, "data: expected at least one datum"),
        (DataLoader(Items(lambda v: v, length=0)), None, "data: expected at least one datum"),
        ((), None, "data: expected at least one datum"),
        ((torch.zeros(3), torch.zeros(4)), None, r"same number of data, got \[3, 4\]"),
        (torch.tensor([0.0, float("nan")]), None, "data: expected finite values, got 1 NaN or infinite of 2"),
        ({"x": np.array([np.inf, 1.0])}, None, r"data\['x'\]: expected finite"),
        ((torch.zeros(2), "text"), None, r"data\[1\]: expected a tensor or numeric array"),
        (np.array(["a", "b"]), None, "data: expected a tensor or numeric array"),
        (torch.tensor(1.0), None, "data: expected a tensor or numeric array"),
        (3.0, None, "data: expected a tensor or numeric array"),
        (torch.zeros(3), 0, "batch_size: expected an integer of at least 1"),
        (torch.zeros(3), 2.5, "batch_size: expected an integer of at least 1"),
        (DataLoader(TensorDataset(X)), 3, "batch_size: expected None, since data is a DataLoader"),
        (Unsized(), None, "data: expected a Dataset with a length.*define __len__"),
        (Stream(), None, "batch_size: expected a number, since data is an IterableDataset"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(data, batch_size, message):
    with pytest.raises(ValueError, match=message):
        make_batches("data", data, batch_size)


def test_a_stream_has_no_length_but_comes_whole():
    batches = make_batches("data", Stream(), 2)
    with pytest.raises(TypeError):
        len(batches)
    assert torch.equal(torch.cat(list(batches)), torch.arange(5.0))


def test_a_loader_of_unknown_length_is_taken_and_an_empty_one_is_found_out():
    assert torch.equal(make_batches("data", DataLoader(Stream(), batch_size=5)).first(), torch.arange(5.0))
    with pytest.raises(ValueError, match="expected at least one batch"):
        make_batches("data", DataLoader(Nothing(), batch_size=5)).first()


def test_a_batch_without_a_tensor_is_refused():
    with pytest.raises(ValueError, match="at least one tensor"):
        batch_length(("text",))
