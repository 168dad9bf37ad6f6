"""Sequences without gaps, filled in or drawn, as arrays, tables and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from riemvae._atomic import write_file
from riemvae._checks import repeated
from riemvae.cli.layout import Layout

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from riemvae.data.sequences import Sequences
    from riemvae.longitudinal import Imputation

_MOST_SCORES = 6  # in a picture, each with an axis of its own


@dataclass(frozen=True)
class Filled:
    """Sequences and what of them was filled in.

    Attributes:
        data: As they were.
        there: Which visits are part of the result, ``(N, T)``.
        missing: Which values were filled in, ``(N, T, *shape)``.
        x: All values; NaN at visits that are not there.
        lower: Lower ends of their intervals; NaN where nothing was filled in.
        upper: Upper ends.
    """

    data: Sequences
    there: Tensor
    missing: Tensor
    x: Tensor
    lower: Tensor
    upper: Tensor

    @staticmethod
    def of(data: Sequences, found: Imputation, there: Tensor | None) -> Filled:
        """An imputation of the data, with what was seen as it was read, to the last digit."""
        import torch

        event = (1,) * (data.x.dim() - 2)
        visits = torch.ones_like(data.observed) if there is None else there
        inside = visits.reshape(*visits.shape, *event)
        values = found.filled.cpu()
        kind = data.x.dtype if data.x.is_floating_point() else values.dtype
        x = torch.where(data.seen, data.x.to(kind), values.to(kind))
        missing = ~data.seen & inside

        def within(mask: Tensor, side: Tensor | None) -> Tensor:
            nothing = torch.full((), torch.nan, dtype=kind if side is None else side.dtype)
            return nothing.expand(x.shape) if side is None else torch.where(mask, side.cpu(), nothing)

        return Filled(
            data,
            visits,
            missing,
            within(inside, x),
            within(missing, found.lower),
            within(missing, found.upper),
        )

    @staticmethod
    def complete(data: Sequences) -> Filled:
        """Data of which nothing is missing."""
        import torch

        nothing = torch.full((), torch.nan).expand(data.x.shape)
        return Filled(data, data.observed, ~data.seen, data.x, nothing, nothing)

    @property
    def num_visits(self) -> int:
        """Visits of which nothing was seen, filled in."""
        return int((self.there & ~self.data.observed).sum())

    def write(self, path: Path) -> None:
        """A ``.npz`` of ``x``, ``missing``, ``lower``, ``upper``, times and what is known of the subjects."""
        from riemvae.data.sequence_files import write_arrays

        data = self.data
        named = {
            "x": self.x,
            "missing": self.missing,
            "lower": self.lower,
            "upper": self.upper,
            "times": data.times,
            "covariates": data.covariates,
        }
        arrays = {name: value.numpy() for name, value in named.items() if value is not None}
        if data.labels is not None:
            arrays["labels"] = _labels(data)
        if data.subjects is not None:
            import numpy as np

            arrays["subjects"] = np.array(data.subjects)
        write_arrays(path, arrays)


def write_table(path: Path, layout: Layout, filled: Filled) -> None:
    """One row a visit: values, whether any was filled in, and the intervals of those that were.

    ``riemvae.data.sequence_table.read_long_table`` reads it back by the columns of the layout.

    Raises:
        ValueError: Two columns of one name.
    """
    data = filled.data
    size = data.shape[0]
    features = layout.names_of(size)
    width = 0 if data.covariates is None else data.covariates.shape[1]
    covariates = layout.covariates if len(layout.covariates) == width else [f"c{i}" for i in range(width)]
    header = [layout.subject, layout.time, *features, *covariates]
    asked = bool(filled.missing.any())
    if asked:
        header += ["filled", *(f"{name}_{end}" for name in features for end in ("lower", "upper"))]
    if twice := repeated(header):
        raise ValueError(f"--out: expected columns of different names, got {twice!r} twice; use a .npz.")
    subjects = data.subjects or tuple(str(i) for i in range(len(data)))
    x, lower, upper = (values.numpy() for values in (filled.x, filled.lower, filled.upper))
    times = None if data.times is None else data.times.numpy()
    known = None if data.covariates is None else data.covariates.numpy()
    computed = filled.missing.numpy()
    rows = []
    for i, j in filled.there.nonzero().tolist():
        # What was computed has no more digits than the model.
        cells = [v.astype(lower.dtype) if c else v for v, c in zip(x[i, j], computed[i, j])]
        row = [subjects[i], str(j) if times is None else _number(times[i, j]), *map(_number, cells)]
        row += [] if known is None else map(_number, known[i])
        if asked:
            row.append(str(int(filled.missing[i, j].any())))
            row += [_number(end[i, j, k]) for k in range(size) for end in (lower, upper)]
        rows.append(row)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_file(path, lambda file: file.write(buffer.getvalue().encode()))


def _number(value: np.floating[Any]) -> str:
    """The shortest text that reads back as the same number; whole ones without a point, NaN as nothing."""
    if value != value:
        return ""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else str(value)


def _labels(data: Sequences) -> Any:
    import numpy as np

    codes: Any = data.labels
    return codes.numpy() if data.label_names is None else np.array(data.label_names)[codes.numpy()]


def check_drawable(shape: Sequence[int]) -> None:
    """Refuses visits of which there is no picture."""
    if (
        len(shape) in (1, 2)
        or (len(shape) == 3 and shape[0] in (1, 3))
        or (len(shape) == 4 and shape[0] == 1)
    ):
        return
    raise ValueError(
        "--picture: expected features, images (H, W) or (1 or 3, H, W), or volumes (1, D, H, W), got visits "
        f"of shape {tuple(shape)}; leave it out."
    )


def draw_filled(
    path: Path, layout: Layout, filled: Filled, shown: int, limits: tuple[float, float] | None = None
) -> str:
    """Some subjects, those with missing visits first: as given and filled in, or lines with intervals.

    Args:
        path: The file to write.
        layout: Where features have their names.
        filled: The sequences.
        shown: How many of them.
        limits: The values drawn black and white; None is by the data.

    Returns:
        The path, and what was left out of the picture.
    """
    import torch

    from riemvae.evaluation.pictures.longitudinal import draw_score_intervals
    from riemvae.evaluation.pictures.sequences import draw_sequences

    data = filled.data
    lacking = filled.missing.flatten(1).any(1)
    rows = torch.argsort((~lacking).to(torch.uint8), stable=True)[:shown]
    subjects = data.subjects or tuple(str(i) for i in range(len(data)))
    labels = [subjects[i] for i in rows.tolist()]
    there = filled.there[rows]
    last = int(there.sum(0).nonzero().max()) + 1 if bool(there.any()) else 1  # nobody is there afterwards

    def part(values: Tensor) -> Tensor:
        return values[rows, :last]

    there, observed, seen, x = map(part, (filled.there, data.observed, data.seen, filled.x))
    times = None if data.times is None else part(data.times)
    if len(data.shape) == 1:
        size = min(_MOST_SCORES, data.shape[0])
        lines = x[..., :size]
        lower, upper = (
            torch.where(e.isnan(), x, e)[..., :size] for e in map(part, (filled.lower, filled.upper))
        )
        known = torch.where(seen, x, torch.nan)[..., :size]
        draw_score_intervals(
            torch.arange(x.shape[1]) if times is None else times,
            known,
            lines,
            lower,
            upper,
            observed,
            names=labels,
            score_names=list(layout.features[:size]) if layout.features else None,
            by="score",
            path=path,
        )
        return f"{path}" + f" (the first {size} of {data.shape[0]} scores)" * (size < data.shape[0])
    clock = None if times is None else times[0] if bool((times == times[0]).all()) else times
    if limits is None and data.x.dtype == torch.uint8:
        limits = (0.0, 255.0)
    if not bool(filled.missing.any()):
        draw_sequences(x, present=there, row_labels=labels, times=clock, limits=limits, path=path)
        return f"{path}"
    given = torch.where(seen, x, torch.nan)
    draw_sequences(
        [given, x],
        [observed, observed],
        present=[there, there],
        row_labels=labels * 2,
        names=["given", "filled in"],
        times=None if clock is None else [clock, clock],
        limits=limits,
        path=path,
    )
    return f"{path}"
