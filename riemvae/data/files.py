"""Arrays in ``.npy``, ``.npz`` and ``.csv``, reports in JSON: no code is run, no file left half written."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import zipfile
import zlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from riemvae._atomic import write_file
from riemvae._checks import argument_error, check_choice

SUFFIXES = (".npy", ".npz", ".csv")


class ArrayFile(NamedTuple):
    """What a file held.

    Attributes:
        x: The data, ``(N, ...)``.
        y: Labels, ``(N,)``, or ``None``.
        columns: Names of the columns of ``x`` from a csv header, or ``None``.
    """

    x: np.ndarray
    y: np.ndarray | None = None
    columns: tuple[str, ...] | None = None


def read_array(path: str | os.PathLike[str], key: str | None = None, label: str | None = None) -> ArrayFile:
    """Reads data, and labels if there are any.

    * ``.npy``: one array.
    * ``.npz``: the array named ``key``, else ``x``, else the only one besides the labels; labels from
      ``label`` or ``y``.
    * ``.csv``: a table of numbers separated by commas (semicolons or tabs when the first line has no comma),
      with or without a header (a first line without a single number); ``label`` names the column of the
      labels, which may be text.

    Args:
        path: The file.
        key: Name of the data in an ``.npz``.
        label: Name of the labels in an ``.npz`` or column of a ``.csv``.

    Returns:
        Data, labels and column names.

    Raises:
        ValueError: Unknown suffix, unreadable, truncated or foreign file, Python objects inside, no such key
            or column, no rows, text in a numeric column, labels of another length; the message names file,
            line and column.
        FileNotFoundError: There is no such file.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> write_array(os.path.join(folder, "a.csv"), np.eye(2), columns=("u", "v"))
        >>> read_array(os.path.join(folder, "a.csv")).columns
        ('u', 'v')
    """
    path = Path(path)
    suffix = _suffix(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"path: expected a file, got {str(path)!r}, which does not exist or is a folder."
        )
    if suffix == ".csv":
        if key is not None:
            raise argument_error("key", "None for a csv file", key, "a csv file holds one table")
        return _read_csv(path, label)
    content = _load_numpy(path)
    if isinstance(content, np.ndarray):
        for name, value in (("key", key), ("label", label)):
            if value is not None:
                raise argument_error(name, "None for a .npy file, which holds one array", value, "use .npz")
        return _checked(path, content, None)
    if label is not None:
        check_choice(f"label in {path.name}", label, list(content))
    label = label if label is not None else "y"
    if key is None:
        candidates = [name for name in content if name != label]
        if "x" not in candidates and len(candidates) != 1:
            keys = ", ".join(content) or "none"
            raise argument_error(
                path.name, "an array named 'x' or a single array", f"keys {keys}", "pass key="
            )
        key = "x" if "x" in candidates else candidates[0]
    check_choice(f"key in {path.name}", key, list(content))
    return _checked(path, content[key], content.get(label))


def _suffix(path: Path) -> str:
    return check_choice(f"suffix of {path.name}", path.suffix.lower(), SUFFIXES)


def _checked(path: Path, x: np.ndarray, y: np.ndarray | None) -> ArrayFile:
    if x.ndim == 0 or x.size == 0:
        raise argument_error(path.name, "at least one row of data", x)
    if y is not None and y.shape[:1] != x.shape[:1]:
        raise argument_error(path.name, f"{len(x)} labels", y, "one label a row")
    return ArrayFile(x, y)


def _load_numpy(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if "Object arrays" in str(error):
            got, remedy = (
                "an array of Python objects",
                "save numbers: reading objects would run code from the file",
            )
        else:
            got, remedy = f"a truncated or foreign file ({error})", "write it again with numpy or write_array"
        raise argument_error(path.name, f"a numpy {path.suffix} file", got, remedy) from error


def _read_csv(path: Path, label: str | None) -> ArrayFile:
    try:
        lines = list(io.StringIO(path.read_text(encoding="utf-8-sig")))
    except UnicodeDecodeError as error:
        raise argument_error(
            path.name, "a text file in UTF-8", str(error), "save it as csv, UTF-8"
        ) from error
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None:
        raise argument_error(path.name, "at least one row of data", "an empty file")
    delimiter = next((d for d in (",", ";", "\t") if d in lines[first]), ",")
    head = [cell.strip() for cell in next(csv.reader([lines[first]], delimiter=delimiter))]
    columns = None if label not in head and any(_is_number(cell) for cell in head) else tuple(head)
    names = columns or tuple(f"column {i + 1}" for i in range(len(head)))
    where = None
    if label is not None:
        if columns is None:
            raise argument_error("label", "None for a csv file without a header", label, "add a header")
        where = columns.index(check_choice(f"label in {path.name}", label, columns))
        names = names[:where] + names[where + 1 :]
    skip = first if columns is None else first + 1
    values, labels, numbers = array("d"), [], []
    reader = csv.reader(lines[skip:], delimiter=delimiter)
    for cells in reader:
        if not cells:
            continue
        place = f"{path.name}, line {skip + reader.line_num}"
        if len(cells) != len(head):
            raise argument_error(place, f"{len(head)} columns", f"{len(cells)}")
        if where is not None:
            labels.append(cells.pop(where).strip())
        try:
            values.extend(map(float, cells))
        except ValueError:
            raise _text_error(place, cells, names) from None
        numbers.append(skip + reader.line_num)
    if not numbers:
        raise argument_error(path.name, "at least one row of data", "a header alone")
    x = np.array(values).reshape(len(numbers), len(names))
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        row, column = bad[0]
        place = f"{path.name}, line {numbers[row]}, {names[column]!r}"
        raise argument_error(place, "a finite number", f"{x[row, column]}", "drop or impute it")
    result = _checked(path, x, None if where is None else _labels(labels))
    return result._replace(columns=None if columns is None else names)


def _text_error(place: str, cells: list[str], names: Sequence[str]) -> ValueError:
    """The error for the first cell that is not a number."""
    name, cell = next((name, cell) for name, cell in zip(names, cells) if not _is_number(cell))
    if not cell.strip():
        return argument_error(f"{place}, {name!r}", "a number", "an empty cell", "drop or impute it")
    remedy = "encode the column as numbers, drop it, or pass its name as label="
    return argument_error(f"{place}, {name!r}", "a number", f"the text {cell!r}", remedy)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _labels(cells: list[str]) -> np.ndarray:
    """Integers if all cells are, else numbers if all are, else text."""
    for dtype in (np.int64, np.float64):
        with contextlib.suppress(ValueError):
            return np.array(cells).astype(dtype)
    return np.array(cells)


def write_array(
    path: str | os.PathLike[str],
    x: np.ndarray,
    y: np.ndarray | None = None,
    columns: Sequence[str] | None = None,
    label: str = "label",
) -> None:
    """Writes data (and labels) for `read_array` to give back exactly; the file appears whole or not at all.

    Args:
        path: ``.npy`` (no labels), ``.npz`` (keys ``x`` and ``y``) or ``.csv`` (tables only).
        x: Data, ``(N, ...)``; for a csv ``(N, columns)``.
        y: Labels, ``(N,)``.
        columns: Names of the columns in a csv.
        label: Name of the column of the labels in a csv.

    Raises:
        ValueError: Unknown suffix, objects, other than two dimensions in a csv, labels in a ``.npy``, column
            names or labels of another number.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "digits.npz")
        >>> write_array(path, np.zeros((3, 8, 8)), y=np.arange(3))
        >>> read_array(path).y
        array([0, 1, 2])
    """
    path = Path(path)
    suffix = _suffix(path)
    x = np.asarray(x)
    y = None if y is None else np.asarray(y)
    for name, value in (("x", x), ("y", y)):
        if value is not None and value.dtype.hasobject:
            raise argument_error(name, "an array of numbers", value, "reading objects back would run code")
    _checked(path, x, y)
    if suffix != ".csv" and columns is not None:
        raise argument_error("columns", f"None for a {suffix} file", str(tuple(columns)), "use .csv")
    if suffix == ".npy":
        if y is not None:
            raise argument_error("y", "None for a .npy file, which holds one array", y, "use .npz")
        write_file(path, lambda file: np.save(file, x, allow_pickle=False))
    elif suffix == ".npz":
        arrays = {"x": x} if y is None else {"x": x, "y": y}
        write_file(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]
    else:
        text = _csv_text(x, y, columns, label)
        write_file(path, lambda file: file.write(text.encode()))


def _csv_text(x: np.ndarray, y: np.ndarray | None, columns: Sequence[str] | None, label: str) -> str:
    if x.ndim != 2:
        raise argument_error("x", "a table of shape (N, columns) for a csv file", x, "use .npz")
    if columns is None:
        columns = [f"x{i}" for i in range(x.shape[1])]
    if len(columns) != x.shape[1]:
        raise argument_error("columns", f"{x.shape[1]} names", f"{len(columns)}")
    header = [*columns, label] if y is not None else list(columns)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    rows = x.tolist()  # Python's repr of a float is the shortest text that reads back exactly
    writer.writerows(rows if y is None else ([*row, value] for row, value in zip(rows, y.tolist())))
    return buffer.getvalue()


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes JSON at one stroke; numbers that are not finite become null.

    Args:
        path: The file.
        content: What to write.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> write_json(os.path.join(folder, "a.json"), {"khat": math.nan})
        >>> Path(folder, "a.json").read_text().split()
        ['{', '"khat":', 'null', '}']
    """
    text = json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(path, lambda file: file.write(text.encode()))


def _finite(value: Any) -> Any:
    """The value with null in place of numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
