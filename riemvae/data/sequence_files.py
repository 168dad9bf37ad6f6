"""Sequences in ``.npz`` and ``.npy``: values, masks, times; no code is run, no file left half written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from riemvae._atomic import write_file
from riemvae._checks import argument_error, check_choice
from riemvae.data.files import _load_numpy, read_array
from riemvae.data.sequences import Sequences

SUFFIXES = (".npz", ".npy")
PARTS = ("observed", "pixel_mask", "times", "covariates", "labels", "subjects")
RESERVED = (*PARTS, "x", "y", "visit_truth", "file")


def read_sequences(path: str | os.PathLike[str], key: str | None = None) -> Sequences:
    """Reads sequences.

    * ``.npy``: one array ``(N, T, *shape)``, NaN as missing.
    * ``.npz``: the same under ``key``, else ``x``; and those there are of ``observed``, ``pixel_mask``,
      ``times``, ``covariates``, ``labels`` (or ``y``) and ``subjects``, as :meth:`Sequences.of` takes them.
      Other arrays of numbers with ``N`` rows are kept in ``truth``, of which ``visit_truth`` names those
      with one entry a visit. Numbers under a mask stay.

    Args:
        path: The file.
        key: Name of the values in an ``.npz``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another suffix, an unreadable or foreign file, Python objects inside, no such key, and
            what :class:`Sequences` refuses.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "visits.npz"
        >>> write_sequences(path, Sequences.of([[[1.0], [2.0]], [[3.0]]], times=[[0.0, 1.5], [0.5]]))
        >>> read_sequences(path)
        Sequences(x=(2, 2, 1), observed=(2, 2), times=(2, 2), missing_visits=25%)
    """
    path = Path(path)
    check_choice(f"suffix of {path.name}", path.suffix.lower(), SUFFIXES)
    if path.suffix.lower() == ".npy" or not path.is_file():
        return Sequences.of(read_array(path, key).x)
    content = _load_numpy(path)
    if isinstance(content, np.ndarray):
        raise argument_error(path.name, "a file of named arrays", "a single array", "name it .npy")
    key = "x" if key is None else key
    if key not in content:
        keys = ", ".join(content) or "none"
        raise argument_error(path.name, f"an array named {key!r}", f"the names {keys}", "pass key=")
    x = content.pop(key)
    parts: dict[str, Any] = {name: content.pop(name) for name in PARTS if name in content}
    if "labels" not in parts and "y" in content:
        parts["labels"] = content.pop("y")
    if "subjects" in parts:
        parts["subjects"] = parts["subjects"].astype(str).tolist()
    of_visits = content.pop("visit_truth", np.array([], dtype=str)).astype(str).tolist()
    rows = len(x) if x.ndim else 0
    truth = {
        name: value
        for name, value in content.items()
        if value.ndim and len(value) == rows and value.dtype.kind in "buif"
    }
    made = Sequences.of(x, **parts, truth=truth, visit_truth=[name for name in of_visits if name in truth])
    # What lies under a mask may be the truth: it stays, where it is a number.
    values = torch.as_tensor(x).to(made.x)
    if values.is_floating_point():
        values = torch.where(torch.isnan(values), 0.0, values)
    return replace(made, x=values)


def write_sequences(path: str | os.PathLike[str], data: Sequences) -> None:
    """Writes sequences for :func:`read_sequences`; the file appears whole or not at all.

    Values under a mask are written too, so that they can be imputed and compared.

    Args:
        path: A ``.npz``.
        data: What to write.

    Raises:
        ValueError: Another suffix; a truth whose name means something else in such a file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "visits.npz"
        >>> write_sequences(path, Sequences.of(np.ones((2, 3, 4))))
        >>> sorted(np.load(path))
        ['observed', 'x']
    """
    for name in data.truth:
        if name in RESERVED:
            raise argument_error(f"truth {name!r}", "another name", "one of the file's own", "rename it")
    named: dict[str, Any] = {"x": data.x, "observed": data.observed, "pixel_mask": data.pixel_mask}
    named |= {"times": data.times, "covariates": data.covariates, "labels": data.labels, **data.truth}
    arrays = {name: value.detach().cpu().numpy() for name, value in named.items() if value is not None}
    if data.labels is not None and data.label_names is not None:
        arrays["labels"] = np.array(data.label_names)[arrays["labels"]]
    if data.subjects is not None:
        arrays["subjects"] = np.array(data.subjects)
    if data.visit_truth:
        arrays["visit_truth"] = np.array(data.visit_truth)
    write_arrays(path, arrays)


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays to a ``.npz`` that appears whole or not at all.

    Args:
        path: A ``.npz``.
        arrays: By name, numbers or text.

    Raises:
        ValueError: Another suffix, Python objects.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.npz"
        >>> write_arrays(path, {"a": np.arange(2), "b": np.array(["x"])})
        >>> np.load(path)["b"]
        array(['x'], dtype='<U1')
    """
    path = Path(path)
    check_choice(f"suffix of {path.name}", path.suffix.lower(), (".npz",))
    for name, value in arrays.items():
        if value.dtype.hasobject:
            raise argument_error(name, "an array of numbers", value, "reading objects back would run code")
    write_file(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]
