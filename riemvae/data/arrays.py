"""Whatever a user calls data, as one tensor, or an error that says what is wrong with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from riemvae._checks import argument_error, check_finite


def as_tensor(x: Any, name: str = "x", dtype: torch.dtype | None = None) -> Tensor:
    """A tensor from a tensor, array, nested list, or pandas table or column.

    Memory is shared where possible. Integers stay integers, so that images keep the dtype from which their
    preprocessing is inferred.

    Args:
        x: The data, first dimension over data.
        name: The argument's name in the messages.
        dtype: Converts to this dtype; ``None`` keeps that of ``x``.

    Returns:
        A detached tensor with at least one dimension and one value.

    Raises:
        ValueError: The data are empty, one number, text, objects, complex, sparse or ragged, or hold NaN, an
            infinity or a masked value.

    Example:
        >>> as_tensor([[0, 1], [2, 3]]).shape
        torch.Size([2, 2])
        >>> as_tensor([[0.0, float("nan")]])
        Traceback (most recent call last):
        ValueError: x: expected finite values, got 1 NaN or infinite of 2; drop or impute them.
    """
    tensor = x.detach() if isinstance(x, Tensor) else _from_array(_as_array(x, name), name)
    if tensor.layout is not torch.strided:
        raise argument_error(
            name, "a dense tensor", f"one of layout {tensor.layout}", "call .to_dense() on it"
        )
    check_real(name, tensor)
    if tensor.dim() == 0 or tensor.numel() == 0:
        raise argument_error(name, "at least one datum along the first dimension", tensor)
    check_finite(name, tensor)
    return tensor if dtype is None else tensor.to(dtype)


def check_real(name: str, tensor: Tensor) -> None:
    """Refuses complex numbers."""
    if tensor.is_complex():
        raise argument_error(name, "real values", tensor, "split real and imaginary parts")


def _as_array(x: Any, name: str) -> np.ndarray:
    if hasattr(x, "columns") and hasattr(
        x, "dtypes"
    ):  # a pandas table: name the columns that are not numbers
        bad = [str(c) for c, t in zip(x.columns, x.dtypes) if getattr(t, "kind", "O") not in "biuf"]
        if bad:
            remedy = "drop them or encode them as numbers"
            raise argument_error(name, "numeric columns", f"others: {', '.join(bad)}", remedy)
        x = x.to_numpy(na_value=np.nan)
        x = x.astype(np.float64) if x.dtype.hasobject else x  # nullable columns
    if hasattr(x, "tocsr"):
        raise argument_error(name, "a dense array", "a sparse matrix", "call .toarray() on it")
    if isinstance(x, (list, tuple)) and x and all(isinstance(item, Tensor) for item in x):
        x = [item.detach().cpu().numpy() for item in x]
    if isinstance(x, np.ma.MaskedArray) and bool(np.ma.getmaskarray(x).any()):
        raise argument_error(
            name, "no masked values", f"{int(np.ma.getmaskarray(x).sum())} of them", "impute them"
        )
    try:
        return np.asarray(x)
    except ValueError:
        raise argument_error(name, "rows of one length", "a ragged list", "pad or drop rows") from None


def _from_array(array: np.ndarray, name: str) -> Tensor:
    kind = array.dtype.kind
    if kind not in "biufc":
        what = {"U": "text", "S": "bytes", "O": "Python objects", "M": "dates", "m": "time spans"}.get(
            kind, "other data"
        )
        raise argument_error(
            name, "numbers", f"{what} (dtype {array.dtype})", "convert with .astype(float) or encode"
        )
    if array.dtype in (np.uint16, np.uint32, np.uint64):  # torch hardly computes with these
        array = array.astype(np.int64)
    elif kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    elif not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    array = np.ascontiguousarray(array) if array.ndim else array
    return torch.from_numpy(array if array.flags.writeable else array.copy())
