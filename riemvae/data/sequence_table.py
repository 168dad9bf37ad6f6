"""Longitudinal data as tables with one row a visit: subject, time, and features or the path of an image."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from riemvae._atomic import write_file
from riemvae._checks import argument_error, repeated
from riemvae.data.files import read_array, write_array
from riemvae.data.sequences import Sequences

MISSING = frozenset({"", "na", "nan", "null", "<na>"})
# In place of a number or a path; as a label or a name these may be words.
NO_NUMBER = MISSING | {"n/a", "none"}
ARRAY_SUFFIXES = (".npy", ".npz", ".csv")


def read_long_table(
    source: Any,
    subject: str,
    time: str,
    features: Sequence[str] | None = None,
    image: str | None = None,
    covariates: Sequence[str] = (),
    label: str | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Sequences:
    r"""Sequences from a table with one row a visit, in any order.

    Subjects come in the order in which they first appear, their visits in the order of time, numbered from
    0; `Sequences.on_grid` moves them to common visits. Empty cells and ``NA``, ``NaN``, ``null`` (of numbers
    and paths ``n/a`` and ``none`` too) are missing: single features give a pixel mask, a row without any an
    unobserved visit at its time.

    Args:
        source: A csv file (commas, semicolons or tabs; with a header), a pandas table, or, with pandas
            installed, another file that pandas reads (``.parquet``, ``.xlsx``, ``.feather``).
        subject: Column of the subjects' names.
        time: Column of the times, numbers.
        features: Columns of the values; either these or ``image``.
        image: Column of paths: arrays (``.npy``, ``.npz``, ``.csv``), or pictures, grey or in colour.
        covariates: Columns that are numbers and the same in all rows of a subject (empty cells aside).
        label: A column that is the same in all rows of a subject: integers, or text to be numbered.
        folder: That the paths start from; None: the folder of the file, or the current one.

    Returns:
        Features as ``x (N, T, len(features))``, images as ``(N, T, C, H, W)``, unsigned bytes where all
        files have them; with times (in double precision), subjects, covariates and labels.

    Raises:
        FileNotFoundError: There is no such table or image.
        ImportError: A file that needs pandas, which is not installed.
        ValueError: No such column; a missing subject or time; text in place of a number; two rows of one
            subject and time; a covariate or label that changes; images of different shapes. The message
            names the row (the first one after the header is 1).

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "visits.csv"
        >>> _ = path.write_text("id,age,score,arm\nb,70,1.5,0\na,61,,1\na,60,2.5,1\n")
        >>> data = read_long_table(path, "id", "age", features=["score"], covariates=["arm"])
        >>> data.subjects, data.observed.tolist(), data.times.tolist()
        (('b', 'a'), [[True, False], [True, False]], [[70.0, 70.0], [60.0, 61.0]])
    """
    if (features is None) == (image is None):
        raise argument_error(
            "features", "either features= or image=", "both" if features is not None else "neither"
        )
    if features is not None and (isinstance(features, str) or len(features) == 0):
        raise argument_error("features", "a list of column names", str(features))
    for option, given in (("features", features), ("covariates", covariates)):
        _check_header(option, list(given or ()))
    columns, start = _columns(source)
    wanted = [subject, time, *(features or []), *([image] if image else []), *covariates]
    for name in [*wanted, *([label] if label else [])]:
        if name not in columns:
            raise argument_error(f"column {name!r}", f"one of {', '.join(map(repr, columns))}", "none such")
    names = [_text(cell, MISSING) for cell in columns[subject]]
    if not names:
        raise argument_error("source", "at least one row", "a header alone")
    if "" in names:
        raise argument_error(f"row {names.index('') + 1}, {subject!r}", "a subject", "an empty cell")
    times = _numbers(columns[time], time)
    if np.isnan(times).any():
        row = int(np.isnan(times).argmax()) + 1
        raise argument_error(
            f"row {row}, {time!r}", "a time", "an empty cell", "drop the row or give it a time"
        )
    subjects = list(dict.fromkeys(names))
    number_of = {name: index for index, name in enumerate(subjects)}
    owner = np.array([number_of[name] for name in names])
    order = np.lexsort((times, owner))
    same = (np.diff(owner[order]) == 0) & (np.diff(times[order]) == 0)
    if same.any():
        at = int(same.argmax())
        rows = sorted(int(row) + 1 for row in order[at : at + 2])
        raise argument_error(
            f"rows {rows[0]} and {rows[1]}",
            "one row a subject and time",
            f"two of {names[order[at]]!r} at {times[order[at]]:g}",
            "merge them, or correct the times",
        )
    if features is not None:
        values = np.stack([_numbers(columns[name], name) for name in features], 1)
        seen = ~np.isnan(values)
    else:
        start = Path(folder) if folder is not None else start
        values, seen = _images([_text(cell) for cell in columns[str(image)]], start, str(image))
    counts = np.bincount(owner, minlength=len(subjects))
    ends = np.cumsum(counts)[:-1]

    def by_subject(rows: np.ndarray) -> list[np.ndarray]:
        return np.split(rows[order], ends)

    made = Sequences.of(
        by_subject(values),
        pixel_mask=by_subject(seen) if not bool(seen.all()) else None,
        times=by_subject(times),
        covariates=_constant(columns, covariates, owner, subjects) if covariates else None,
        labels=None if label is None else _labels(columns[label], label, owner, subjects),
        subjects=subjects,
    )
    # Times keep their digits: dates as numbers have more of them than single precision.
    usual = torch.get_default_dtype()
    fixed = None if made.covariates is None else made.covariates.to(usual)
    return replace(made, x=made.x.to(usual) if made.x.is_floating_point() else made.x, covariates=fixed)


def _columns(source: Any) -> tuple[dict[str, Sequence[Any]], Path]:
    """The cells of each column, and the folder of the file."""
    if hasattr(source, "columns") and hasattr(source, "dtypes"):
        _check_header("source", [str(name) for name in source.columns])
        return {str(name): source[name].tolist() for name in source.columns}, Path()
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"source: expected a table, got {str(path)!r}, which does not exist.")
    if path.suffix.lower() not in (".csv", ".tsv", ".txt"):
        return _columns(_by_pandas(path))[0], path.parent
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise argument_error(
            path.name, "a text file in UTF-8", str(error), "save it as csv, UTF-8"
        ) from error
    first = text.partition("\n")[0]
    # The sign that cuts the header into most columns: a name in quotes may hold another.
    delimiter = max((",", ";", "\t"), key=lambda sign: len(next(csv.reader([first], delimiter=sign), ())))
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
    if not rows:
        raise argument_error(path.name, "a header and rows", "an empty file")
    header = [cell.strip() for cell in rows[0]]
    _check_header(f"header of {path.name}", header)
    for number, row in enumerate(rows[1:], 1):
        if len(row) != len(header):
            raise argument_error(f"row {number} of {path.name}", f"{len(header)} cells", f"{len(row)}")
    return {name: [row[i] for row in rows[1:]] for i, name in enumerate(header)}, path.parent


def _check_header(name: str, header: Sequence[str]) -> None:
    """Refuses a column that occurs twice."""
    if twice := repeated(header):
        raise argument_error(name, "each column once", f"{twice!r} twice")


def _by_pandas(path: Path) -> Any:
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(
            f"{path.name}: only pandas reads such files; pip install 'riemvae[tables]', or save as csv."
        ) from error
    readers = {
        ".parquet": pd.read_parquet,
        ".feather": pd.read_feather,
        ".xlsx": pd.read_excel,
        ".xls": pd.read_excel,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        known = ", ".join([".csv", ".tsv", ".txt", *readers])
        raise argument_error(f"suffix of {path.name}", f"one of {known}", repr(path.suffix))
    return reader(path)


def _text(cell: Any, missing: frozenset[str] = NO_NUMBER) -> str:
    """A cell as text, whole numbers without a decimal point; empty where it is missing."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    text = str(cell).strip()
    return "" if text.lower() in missing else text


def _numbers(cells: Sequence[Any], name: str) -> np.ndarray:
    """Numbers, NaN where a cell is missing."""
    out = np.empty(len(cells))
    for row, cell in enumerate(cells):
        if isinstance(cell, (int, float, np.number)):
            out[row] = cell
            continue
        text = _text(cell)
        try:
            out[row] = float(text) if text else math.nan
        except ValueError:
            remedy = "turn dates into numbers, such as years since the first visit; encode text as numbers"
            if re.fullmatch(r"[+-]?\d+,\d+", text):
                remedy = "write decimals with a point"
            elif not any(letter.isalnum() for letter in text):
                remedy = "leave the cells of missing values empty"
            raise argument_error(f"row {row + 1}, {name!r}", "a number", f"{text!r}", remedy) from None
    if np.isinf(out).any():
        row = int(np.isinf(out).argmax()) + 1
        raise argument_error(f"row {row}, {name!r}", "a finite number", "an infinite one")
    return out


def _images(paths: Sequence[str], folder: Path, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(rows, C, H, W)``, zeros where there is no path, and which values were seen."""
    found: dict[int, np.ndarray] = {}
    for row, text in enumerate(paths):
        if text:
            found[row] = _image(folder / text, f"row {row + 1}, {column!r}")
    if not found:
        raise argument_error(f"column {column!r}", "paths of images", "empty cells alone")
    first_row, first = next(iter(found.items()))
    for row, image in found.items():
        if image.shape != first.shape:
            got = f"{image.shape} ({paths[row]}) after {first.shape} ({paths[first_row]})"
            raise argument_error(
                f"row {row + 1}, {column!r}", "images of one shape", got, "resize them first"
            )
    dtype = np.result_type(*{image.dtype for image in found.values()})
    values = np.zeros((len(paths), *first.shape), dtype=dtype)
    seen = np.zeros(values.shape, dtype=bool)
    for row, image in found.items():
        values[row] = image
        seen[row] = ~np.isnan(image) if image.dtype.kind == "f" else True
    return values, seen


def _image(path: Path, place: str) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{place}: expected an image, got {str(path)!r}, which does not exist.")
    if path.suffix.lower() in ARRAY_SUFFIXES:
        image = read_array(path).x
        return image[None] if image.ndim == 2 else image
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):
                image = np.asarray(picture, dtype=np.float32)
            else:
                image = np.asarray(picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB"))
    except UnidentifiedImageError as error:
        raise argument_error(place, "an array or a picture", path.name, "use .npy or .png") from error
    except OSError as error:  # PIL's word for a picture that breaks off
        raise argument_error(place, "a whole picture", f"{path.name}: {error}") from error
    return image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)


def _one_each(
    known: Sequence[bool], values: Sequence[Any], name: str, owner: np.ndarray, subjects: Sequence[str]
) -> list[Any]:
    """The value of each subject, which all its rows that have one agree on."""
    found: dict[int, Any] = {}
    for row, (index, value) in enumerate(zip(owner.tolist(), values)):
        if not known[row]:
            continue
        if found.setdefault(index, value) != value:
            got = f"{found[index]} and then {value} for {subjects[index]!r}"
            remedy = "what changes in time belongs among the features"
            raise argument_error(f"row {row + 1}, {name!r}", "one value a subject", got, remedy)
    for index, subject in enumerate(subjects):
        if index not in found:
            raise argument_error(f"column {name!r}", f"a value for {subject!r}", "empty cells", "impute it")
    return [found[index] for index in range(len(subjects))]


def _constant(
    columns: Mapping[str, Sequence[Any]], names: Sequence[str], owner: np.ndarray, subjects: Sequence[str]
) -> np.ndarray:
    found = []
    for name in names:
        values = _numbers(columns[name], name)
        found.append(_one_each((~np.isnan(values)).tolist(), values.tolist(), name, owner, subjects))
    return np.array(found).T


def _labels(cells: Sequence[Any], name: str, owner: np.ndarray, subjects: Sequence[str]) -> np.ndarray:
    values = [_text(cell, MISSING) for cell in cells]
    found = _one_each([value != "" for value in values], values, name, owner, subjects)
    try:
        return np.array(found).astype(np.int64)
    except ValueError:
        return np.array(found)


def write_long_table(
    path: str | os.PathLike[str],
    data: Sequences,
    features: Sequence[str] | None = None,
    image: str | None = None,
    covariates: Sequence[str] | None = None,
    subject: str = "subject",
    time: str = "time",
    label: str = "label",
) -> None:
    """Writes one row for each observed visit, for `read_long_table` to read back.

    Images are written one a file, as ``.npy``, into a folder beside the table, named after it. Values under
    a pixel mask become empty cells, or NaN in images. A subject without an observed visit has one empty row.

    Args:
        path: The csv file.
        data: What to write; without times, visits are numbered from 0.
        features: Names of the columns of values ``(N, T, D)``; None: ``x0, x1, ...``.
        image: Name of the column of paths for other shapes; None: ``image``.
        covariates: Names of those columns; None: ``c0, c1, ...``.
        subject: Name of the column of subjects.
        time: Name of the column of times.
        label: Name of the column of labels, where the data have any.

    Raises:
        ValueError: Another number of names, names twice, ``image`` for plain columns; a subject or label
            whose name would be read as missing.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "visits.csv"
        >>> write_long_table(path, Sequences.of([[[1.5], [2.5]], [[3.0]]]), features=["score"])
        >>> path.read_text().split()
        ['subject,time,score', '0,0,1.5', '0,1,2.5', '1,0,3.0']
    """
    path = Path(path)
    is_table = len(data.shape) == 1 and image is None
    if not is_table and features is not None:
        raise argument_error("features", "None for images", ", ".join(features), "pass image=")
    if image is not None and len(data.shape) == 1:
        raise argument_error("image", "None for plain columns", image, "pass features=")
    width = 0 if data.covariates is None else data.covariates.shape[1]
    value_names = _names("features", features, "x", data.shape[0]) if is_table else [image or "image"]
    covariate_names = _names("covariates", covariates, "c", width)
    header = [subject, time, *value_names, *covariate_names, *([] if data.labels is None else [label])]
    if len(set(header)) < len(header):
        raise argument_error("features", "names that differ", ", ".join(header))
    subjects = data.subjects or tuple(str(i) for i in range(len(data)))
    _check_names(subject, subjects)
    _check_names(label, data.label_names or ())
    times = None if data.times is None else data.times.tolist()
    seen = data.seen.cpu()
    values = data.x.detach().cpu()
    rows = []
    pictures = path.parent / f"{path.stem}_images"
    if not is_table:
        pictures.mkdir(parents=True, exist_ok=True)
    for i, observed in enumerate(data.observed.cpu()):
        fixed = [] if data.covariates is None else data.covariates[i].tolist()
        if data.labels is not None:
            code = data.labels[i].item()
            fixed.append(code if data.label_names is None else data.label_names[int(code)])
        visits = observed.nonzero().flatten().tolist()
        for j in visits or [0]:
            if not visits:
                cells: list[Any] = [""] * len(value_names)
            elif is_table:
                pairs = zip(values[i, j].tolist(), seen[i, j].tolist())
                cells = [value if known else "" for value, known in pairs]
            else:
                file = pictures / f"{i}_{j}.npy"
                write_array(file, _masked(values[i, j], seen[i, j]))
                cells = [file.relative_to(path.parent).as_posix()]
            rows.append([subjects[i], j if times is None else times[i][j], *cells, *fixed])
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_file(path, lambda file: file.write(buffer.getvalue().encode()))


def _check_names(column: str, names: Sequence[str]) -> None:
    for name in names:
        if _text(name, MISSING) == "":
            raise argument_error(
                f"column {column!r}", "names that a table can hold", repr(name), "it would be read as missing"
            )


def _names(argument: str, names: Sequence[str] | None, prefix: str, number: int) -> list[str]:
    if names is None:
        return [f"{prefix}{i}" for i in range(number)]
    if len(names) != number:
        raise argument_error(argument, f"{number} names", f"{len(names)}")
    return list(names)


def _masked(values: torch.Tensor, seen: torch.Tensor) -> np.ndarray:
    """Values as an array, NaN (and floating point) where some were not seen."""
    if bool(seen.all()):
        return values.numpy()
    if not values.is_floating_point():
        values = values.float()
    return torch.where(seen, values, torch.nan).numpy()
