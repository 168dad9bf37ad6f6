"""What an objective with schedules has beside its loss: the epoch it is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from riemvae._checks import check_count
from riemvae.inference.schedules import Schedule


class ScheduledObjective:
    """An objective whose weights may follow schedules.

    ``fit`` calls :meth:`begin_epoch` at each epoch, counted from the first one of a resumed training; with
    ``SVI`` the user does. Before the first call it is epoch 0.

    Attributes:
        epoch: The epoch that has begun.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self._ends = False
        self._schedules: dict[str, Schedule] = {}

    def begin_epoch(self, epoch: int) -> None:
        """Moves the schedules to ``epoch``, counted from 0.

        Raises:
            ValueError: Not an integer of at least 0.
        """
        self.epoch = check_count("epoch", epoch, 0)

    @property
    def settled(self) -> bool:
        """Whether all schedules have come to their end: losses compare from here on."""
        return all(self.epoch >= schedule.duration for schedule in self._schedules.values())

    @property
    def scheduled_values(self) -> dict[str, float]:
        """What the schedules that move say in this epoch."""
        return {name: self._now(name) for name, s in self._schedules.items() if s.duration > 0}

    def _now(self, name: str) -> float:
        schedule = self._schedules[name]
        return schedule.final if self._ends else schedule(self.epoch)

    @contextmanager
    def at_end(self) -> Iterator[None]:
        """Within it, the objective is what it will be when all schedules have ended."""
        before = self._ends
        self._ends = True
        try:
            yield
        finally:
            self._ends = before
