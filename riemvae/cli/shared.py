"""What the commands share: where results may be written, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def refuse_folder(folder: Path) -> None:
    """Finds out before a long training that its result could not be written."""
    if folder.is_file():
        raise ValueError(f"--out: expected a folder to write, got the file {folder}; pass another path.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise ValueError(
            f"--out: expected a new folder or an earlier model, got {folder}; pass another path."
        )


def check_suffix(path: Path, suffixes: Sequence[str]) -> None:
    """Refuses a file of another kind, or in a folder that is not there."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: expected a file name that ends in {' or '.join(suffixes)}.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.absolute().parent}; make it first.")


def check_new(path: Path, data: Path) -> None:
    """Refuses to write a result over the data that it is made of."""
    if path.resolve() == data.resolve():
        raise ValueError(f"--out: expected another file than the data, got {path}, which would be lost.")


def print_table(title: str, rows: Mapping[str, Any]) -> None:
    """Names and values, a line each."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def print_columns(title: str, columns: Mapping[str, Mapping[str, float]]) -> None:
    """Named numbers, a line each, for several things side by side."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for name in next(iter(columns.values())):
        table.add_row(name.replace("_", " "), *(f"{column[name]:.4g}" for column in columns.values()))
    Console().print(table)
