"""What a training recorded, one row an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload


class History(Sequence):
    """The rows of a training, read by epoch or by column.

    An integer gives the row (a dictionary) of that epoch, a slice a list of rows, and a name the column as a
    list, with ``None`` where a row has no such entry. Losses are means per datum in nats.

    Args:
        rows: dictionaries with ``"epoch"``, ``"train_loss"``, ``"learning_rate"``, ``"seconds"`` and, where
            they exist, ``"val_loss"`` and ``"num_diverged"``.

    Raises:
        KeyError: if no row has the column that is asked for.

    Example:
        >>> history = History([{"epoch": 0, "train_loss": 3.0}, {"epoch": 1, "train_loss": 2.5}])
        >>> history["train_loss"]
        [3.0, 2.5]
        >>> history[-1]["epoch"], len(history), history.columns
        (1, 2, ['epoch', 'train_loss'])
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        self._rows = [dict(row) for row in rows]

    @property
    def columns(self) -> list[str]:
        """The names that at least one row has, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self._rows for name in row))

    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, key: slice) -> list[dict[str, Any]]: ...

    @overload
    def __getitem__(self, key: str) -> list[Any]: ...

    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, str):
            if key not in self.columns:
                raise KeyError(f"{key!r} is not in the history; its columns are {self.columns}")
            return [row.get(key) for row in self._rows]
        return self._rows[key]

    def __len__(self) -> int:
        return len(self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, History) and self._rows == other._rows

    def __repr__(self) -> str:
        if not self._rows:
            return "History(no epochs)"
        last = ", ".join(f"{k}={v:.6g}" for k, v in self._rows[-1].items() if isinstance(v, (int, float)))
        return f"History({len(self)} epochs; last: {last})"

    def append(self, row: dict[str, Any]) -> None:
        """Adds the row of one more epoch."""
        self._rows.append(dict(row))
