from __future__ import annotations

import numpy as np
import pytest
import torch

from riemvae.data import as_tensor

VALUES = np.arange(6).reshape(3, 2)


def pandas_table():
    return pytest.importorskip("pandas").DataFrame(VALUES.astype(float), columns=["a", "b"])


GOOD = {
    "float64": lambda: VALUES.astype(np.float64),
    "float32": lambda: VALUES.astype(np.float32),
    "uint8": lambda: VALUES.astype(np.uint8),
    "uint16": lambda: VALUES.astype(np.uint16),
    "big_endian": lambda: VALUES.astype(">f4"),
    "longdouble": lambda: VALUES.astype(np.longdouble),
    "strided": lambda: np.repeat(VALUES, 2, axis=1)[:, ::2],
    "reversed": lambda: VALUES[::-1][::-1],
    "list": lambda: VALUES.tolist(),
    "list_of_tensors": lambda: [torch.tensor(row) for row in VALUES],
    "tensor": lambda: torch.tensor(VALUES),
    "trained_tensor": lambda: torch.tensor(VALUES, dtype=torch.float32, requires_grad=True),
    "unmasked": lambda: np.ma.masked_array(VALUES, mask=False),
    "pandas": pandas_table,
    "pandas_integers": lambda: pandas_table().astype(int),
    "pandas_nullable": lambda: pandas_table().astype("Float64"),
}


@pytest.mark.parametrize("name", GOOD)
def test_values_survive(name):
    tensor = as_tensor(GOOD[name]())
    assert tensor.shape == (3, 2) and not tensor.requires_grad
    assert torch.equal(tensor.double(), torch.tensor(VALUES).double())
    assert as_tensor(GOOD[name](), dtype=torch.float16).dtype == torch.float16


def test_dtype_is_kept_and_read_only_arrays_are_not_shared():
    assert as_tensor(VALUES.astype(np.uint8)).dtype == torch.uint8
    assert as_tensor(VALUES.astype(np.float32)).dtype == torch.float32
    frozen = VALUES.astype(np.float32)
    frozen.flags.writeable = False
    tensor = as_tensor(frozen)
    tensor += 1
    assert frozen[0, 0] == 0


BAD = {
    "nan": (lambda: np.array([[0.0, np.nan]]), "1 NaN or infinite of 2"),
    "infinite": (lambda: torch.tensor([np.inf, -np.inf]), "2 NaN or infinite"),
    "empty": (lambda: np.zeros((0, 3)), "at least one datum"),
    "empty_list": (lambda: [], "at least one datum"),
    "number": (lambda: 3.0, "at least one datum"),
    "none": (lambda: None, "Python objects"),
    "objects": (lambda: np.array([object(), 1]), "Python objects"),
    "text": (lambda: ["a", "b"], "text"),
    "dates": (lambda: np.array(["2020-01-01"], dtype="datetime64[D]"), "dates"),
    "complex": (lambda: np.array([1j]), "real values"),
    "ragged": (lambda: [[1.0], [1.0, 2.0]], "ragged"),
    "masked": (lambda: np.ma.masked_array(VALUES, mask=VALUES == 3), "1 of them"),
    "sparse": (lambda: pytest.importorskip("scipy.sparse").eye(3), "toarray"),
    "sparse_tensor": (lambda: torch.eye(3).to_sparse(), "to_dense"),
    "text_column": (lambda: pandas_table().assign(site=["u", "v", "w"]), "site"),
    "missing": (lambda: pandas_table().astype("Float64").replace(3.0, None), "pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_are_refused_by_name(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        as_tensor(make(), name="pixels")
    assert str(error.value).startswith("pixels: expected")
