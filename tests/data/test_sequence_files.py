"""Sequences in .npz and .npy: what is written comes back, and nothing foreign is run or taken for data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from riemvae.data import Sequences
from riemvae.data.sequence_files import read_sequences, write_arrays, write_sequences


def full(n=5, visits=3):
    g = torch.Generator().manual_seed(0)
    observed = torch.rand(n, visits, generator=g) < 0.7
    observed[:, 0] = True
    pixels = torch.rand(n, visits, 2, generator=g) < 0.8
    pixels[..., 0] = True
    return Sequences(
        torch.randn(n, visits, 2, generator=g),
        observed,
        pixel_mask=pixels & observed[..., None],
        times=torch.rand(n, visits, generator=g).cumsum(1),
        covariates=torch.randn(n, 3, generator=g),
        labels=torch.tensor([0, 1, 0, 1, 1]),
        subjects=tuple("abcde"),
        label_names=("left", "right"),
        truth={"stage": torch.rand(n, visits, generator=g)},
    )


def test_everything_comes_back(tmp_path):
    data = full()
    write_sequences(tmp_path / "a.npz", data)
    back = read_sequences(tmp_path / "a.npz")
    for name in ("observed", "pixel_mask", "times", "covariates", "labels"):
        assert torch.equal(getattr(back, name), getattr(data, name)), name
    assert torch.equal(back.batch()["x"], data.batch()["x"])
    assert back.subjects == data.subjects
    assert back.label_names == data.label_names
    assert torch.equal(back.truth["stage"], data.truth["stage"])
    # What lies under a mask is in the file, to score an imputation by, but is read as missing.
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["x"], data.x.numpy())


def test_nan_is_missing_and_masks_may_be_numbers(tmp_path):
    x = np.ones((2, 3, 2), dtype=np.float32)
    x[0, 1] = np.nan
    np.save(tmp_path / "a.npy", x)
    assert read_sequences(tmp_path / "a.npy").observed.tolist() == [[True, False, True], [True] * 3]
    np.savez(tmp_path / "b.npz", x=x, observed=np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
    assert read_sequences(tmp_path / "b.npz").observed.tolist() == [[True, False, False], [False, True, True]]


def test_bytes_stay_bytes_and_another_name_is_taken(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 3, 1, 4, 4), np.uint8), y=np.array(["u", "v"]), s="note")
    data = read_sequences(tmp_path / "a.npz", key="images")
    assert data.x.dtype == torch.uint8
    assert data.label_names == ("u", "v")
    assert not data.truth


def test_what_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        read_sequences(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"suffix of a\.csv"):
        read_sequences(tmp_path / "a.csv")
    np.savez(tmp_path / "a.npz", y=np.zeros((2, 3, 1)))
    with pytest.raises(ValueError, match="an array named 'x', got the names y; pass key="):
        read_sequences(tmp_path / "a.npz")
    np.savez(tmp_path / "o.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="run code"):
        read_sequences(tmp_path / "o.npz")
    np.savez(tmp_path / "m.npz", x=np.zeros((2, 3, 1)), observed=np.ones((2, 4)))
    with pytest.raises(ValueError, match=r"observed: expected the shape \(2, 3\)"):
        read_sequences(tmp_path / "m.npz")
    with pytest.raises(ValueError, match="run code"):
        write_arrays(tmp_path / "w.npz", {"x": np.array([None])})
    with pytest.raises(ValueError, match=r"\.npz"):
        write_arrays(tmp_path / "w.npy", {"x": np.zeros(1)})
    np.save(tmp_path / "s.npy", np.zeros((2, 3, 1)))
    (tmp_path / "s.npy").rename(tmp_path / "s.npz")
    with pytest.raises(ValueError, match="named arrays"):
        read_sequences(tmp_path / "s.npz")
    assert not list(tmp_path.glob("*w.np*"))


def test_what_lies_under_a_mask_comes_back(tmp_path):
    data = full()
    data = Sequences(**{**vars(data), "visit_truth": ("stage",)})
    write_sequences(tmp_path / "a.npz", data)
    back = read_sequences(tmp_path / "a.npz")
    assert not bool(data.seen.all())
    assert torch.equal(back.x, data.x)
    assert back.visit_truth == ("stage",)
    whole = Sequences.of(torch.randint(255, (4, 3, 2), dtype=torch.uint8)).drop_visits(0.5, seed=0)
    write_sequences(tmp_path / "b.npz", whole)
    assert torch.equal(read_sequences(tmp_path / "b.npz").x, whole.x)


@pytest.mark.parametrize("name", ["y", "x", "times", "file", "visit_truth"])
def test_a_truth_is_not_taken_for_something_else(tmp_path, name):
    data = Sequences.of(torch.zeros(3, 2, 1), truth={name: torch.zeros(3)})
    with pytest.raises(ValueError, match=f"^truth '{name}': expected another name"):
        write_sequences(tmp_path / "a.npz", data)
    assert not list(tmp_path.iterdir())
