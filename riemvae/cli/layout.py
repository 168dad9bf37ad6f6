"""How a table becomes sequences: its columns and its visits, kept beside the model that was trained on it."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from riemvae.cli.arguments import names, numbers

if TYPE_CHECKING:
    from riemvae.data.sequences import Sequences

FILE = "columns.json"
TABLES = (".csv", ".tsv", ".txt")

# Of a table's visits on common times: more distinct times than this, of the most that a subject has, are no
# common visits.
_MOST_TIMES = 2


@dataclass(frozen=True)
class Layout:
    """Which columns hold what, and the times of numbered visits.

    Attributes:
        subject: Column of the subjects.
        time: Column of the times.
        features: Columns of the values; empty for images.
        image: Column of the images' paths.
        covariates: Columns of a subject's covariates.
        grid: The times of numbered visits; empty where visits are numbered as they come, or have times.
    """

    subject: str = "subject"
    time: str = "time"
    features: tuple[str, ...] = ()
    image: str | None = None
    covariates: tuple[str, ...] = ()
    grid: tuple[float, ...] = ()

    # -- where it is kept ----------------------------------------------------------------------------------

    @staticmethod
    def load(folder: Path) -> Layout:
        """The one that a model was trained on, or the default one.

        Raises:
            ValueError: A file that is no layout.
        """
        path = folder / FILE
        if not path.is_file():
            return Layout()
        try:
            content = json.loads(path.read_bytes())
            found = {f.name: content[f.name] for f in fields(Layout)}
            lists = {name: tuple(found[name]) for name in ("features", "covariates", "grid")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: altered or truncated ({error!r}); fit the model again.") from None
        return Layout(**{**found, **lists})

    def save(self, folder: Path) -> None:
        """Writes it into the folder of a model."""
        from riemvae.data import write_json

        write_json(folder / FILE, asdict(self))

    def names_of(self, number: int) -> tuple[str, ...]:
        """The names of so many features, ``x0, x1, ...`` where they have none."""
        return self.features if len(self.features) == number else tuple(f"x{i}" for i in range(number))

    # -- what the arguments change -------------------------------------------------------------------------

    def changed(self, arguments: argparse.Namespace) -> Layout:
        """With what the command line says otherwise."""
        given = {f.name: getattr(arguments, f.name, None) for f in fields(Layout)}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if "features" in changes and "image" in changes:
            raise ValueError("--features: expected either --features or --image, got both.")
        if "features" in changes:
            changes["image"] = None
        elif "image" in changes:
            changes["features"] = ()
        grid = changes.get("grid", (0.0,))
        if any(after <= before for before, after in itertools.pairwise(grid)):
            raise ValueError(f"--grid: expected increasing times, got {', '.join(f'{t:g}' for t in grid)}.")
        return replace(self, **changes)

    # -- reading -------------------------------------------------------------------------------------------

    def read(self, path: Path, arguments: argparse.Namespace, numbered: bool) -> tuple[Sequences, Layout]:
        """The sequences of a file, and the layout with the times of their visits.

        Args:
            path: A table, or arrays.
            arguments: Of the command, for errors about tables' columns and ``key``.
            numbered: Whether visits are to be numbered, by ``grid`` or else by the table's common times.
        """
        if arguments.grid is not None and not numbered:
            raise ValueError("--grid: expected none, for a model that is a function of time; leave it out.")
        if path.suffix.lower() not in TABLES:
            return self._read_arrays(path, arguments, numbered), self
        if arguments.key is not None:
            raise ValueError(f"--key: expected none for a table, got {arguments.key!r}; pass --features.")
        if not self.features and self.image is None:
            raise ValueError(
                f"--features: expected the columns of the values of {path.name}, got none; pass "
                "--features A,B,C or --image COLUMN."
            )
        from riemvae.data.sequence_table import read_long_table

        with _double():  # times and values of more than seven digits as they are
            data = read_long_table(
                path,
                self.subject,
                self.time,
                features=list(self.features) or None,
                image=self.image,
                covariates=self.covariates,
            )
        if not numbered:
            return data, self
        layout = self if self.grid else replace(self, grid=_common_times(path, data))
        return _on_grid(path, data, layout.grid), layout

    def _read_arrays(self, path: Path, arguments: argparse.Namespace, numbered: bool) -> Sequences:
        for name in ("subject", "time", "features", "image", "covariates"):
            value = getattr(arguments, name, None)
            if value is not None:
                raise ValueError(
                    f"--{name}: expected a table such as a .csv for it, got {path.name}; leave it out."
                )
        from riemvae.data.sequence_files import read_sequences

        data = read_sequences(path, arguments.key)
        if arguments.grid is not None and data.times is None:
            raise ValueError(f"--grid: expected visits with times, got {path.name} without; leave it out.")
        if numbered and self.grid and data.times is not None:
            return _on_grid(path, data, self.grid)
        return data


def add_layout_options(sub: argparse.ArgumentParser, trained: bool) -> None:
    """The options that say how a file is read."""
    group = sub.add_argument_group(
        "data",
        "A .npz with x (N, T, *shape) and, where there are such, observed (N, T), pixel_mask, times (N, T) "
        "and covariates (N, c); a .npy with x; or a .csv with one row a visit. NaN and empty cells are "
        "missing." + (" Columns and visits are by default those that the model was fitted on." * trained),
    )
    group.add_argument("--key", metavar="NAME", help="name of the values in a .npz, if it is not x")
    group.add_argument("--subject", metavar="COLUMN", help="of a table; default: subject")
    group.add_argument("--time", metavar="COLUMN", help="of a table; default: time")
    group.add_argument("--features", type=names, metavar="A,B,C", help="columns of a table's values")
    group.add_argument("--image", metavar="COLUMN", help="of a table: paths of images or arrays")
    group.add_argument(
        "--covariates", type=names, metavar="A,B", help="columns of a table, one value a subject"
    )
    group.add_argument(
        "--grid",
        type=numbers,
        metavar="T,T,T",
        help="times of numbered visits: each visit goes to the nearest; default: those of a table, where "
        "subjects share them",
    )


@contextmanager
def _double() -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _common_times(path: Path, data: Sequences) -> tuple[float, ...]:
    """The distinct times of a table whose subjects were seen at common ones."""
    there = data.present
    every: Any = data.times
    times = every[there].unique().tolist()
    most = int(there.sum(1).max())
    if len(times) > _MOST_TIMES * most:
        raise ValueError(
            f"--grid: expected the times of the numbered visits, got a table {path.name} with {len(times)} "
            f"different times and at most {most} visits of a subject; pass --grid 0,1,2 (each visit goes to "
            "the nearest), or fit a model in continuous time such as --model continuous_lvae."
        )
    return tuple(times)


def _on_grid(path: Path, data: Sequences, grid: Sequence[float]) -> Sequences:
    """The visits on the grid; none lies farther beyond its ends than half a step."""
    import torch

    times: Any = data.times
    bins = torch.tensor(grid, dtype=times.dtype)
    if len(bins) > 1:
        first, last = bins[0] - 0.5 * (bins[1] - bins[0]), bins[-1] + 0.5 * (bins[-1] - bins[-2])
        # Empty rows too: they ask for an imputation, which such a model has on its grid alone.
        outside = data.present & ((times < first) | (times > last))
        if bool(outside.any()):
            row, visit = (int(i) for i in outside.nonzero()[0])
            who = f"subject {row}" if data.subjects is None else f"subject {data.subjects[row]!r}"
            raise ValueError(
                f"--grid: expected visits near the times {grid[0]:g} to {grid[-1]:g}, got one of {who} at "
                f"{times[row, visit].item():g} in {path.name}; pass a longer --grid to fit, or leave it out."
            )
    try:
        return data.on_grid(bins)
    except ValueError as error:  # two visits of a subject share a bin
        said = str(error).replace("bins", "--grid", 1).partition(";")[0]
        raise ValueError(f"{said}; pass a finer --grid.") from None
