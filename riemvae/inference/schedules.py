"""Numbers that move with the epoch: the weight of a term of an objective, its capacity."""

from __future__ import annotations

import math

from riemvae._checks import argument_error, check_count, check_positive
from riemvae._recipe import recipe


def _check_number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise argument_error(name, "a finite number", value)
    return float(value)


class Schedule:
    """A number for each epoch, constant from some epoch on.

    A subclass gives ``__call__(epoch)``, ``duration`` and ``bounds``.
    """

    def __call__(self, epoch: int) -> float:
        """The value in ``epoch``, counted from 0."""
        raise NotImplementedError

    @property
    def duration(self) -> int:
        """The first epoch from which on the value no longer changes."""
        raise NotImplementedError

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        raise NotImplementedError

    @property
    def final(self) -> float:
        """The value at the end."""
        return self(self.duration)


@recipe
class Constant(Schedule):
    """The same number in every epoch.

    Args:
        value: The number.

    Raises:
        ValueError: Not a finite number.

    Example:
        >>> Constant(4.0)(0), Constant(4.0).duration
        (4.0, 0)
    """

    def __init__(self, value: float) -> None:
        self.value = _check_number("value", value)

    def __call__(self, epoch: int) -> float:
        return self.value

    @property
    def duration(self) -> int:
        """Zero."""
        return 0

    @property
    def bounds(self) -> tuple[float, float]:
        """The number, twice."""
        return self.value, self.value


class _Ramp(Schedule):
    """From ``start`` to ``end``, monotone or not, and ``end`` from then on."""

    start: float
    end: float

    def _between(self, share: float) -> float:
        return self.end if share >= 1.0 else self.start + (self.end - self.start) * share

    @property
    def bounds(self) -> tuple[float, float]:
        """The smaller and the larger of ``start`` and ``end``."""
        return min(self.start, self.end), max(self.start, self.end)


@recipe
class Linear(_Ramp):
    """``start + (end - start) t/T`` in epoch ``t < T``, then ``end``: warm-up.

    Args:
        start: The value in epoch 0.
        end: The value from epoch ``epochs`` on.
        epochs: ``T >= 1``.

    Raises:
        ValueError: Not finite numbers, or not a positive count.

    Source: Sønderby, Raiko, Maaløe, Sønderby and Winther (2016), section 2.3; the linear rise of a capacity:
    Burgess et al. (2018), section 5.

    Example:
        >>> warm_up = Linear(0.0, 1.0, epochs=4)
        >>> [warm_up(t) for t in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    def __init__(self, start: float, end: float, epochs: int) -> None:
        self.start, self.end = _check_number("start", start), _check_number("end", end)
        self.epochs = check_count("epochs", epochs)

    def __call__(self, epoch: int) -> float:
        return self._between(epoch / self.epochs)

    @property
    def duration(self) -> int:
        """``T``."""
        return self.epochs


@recipe
class Cyclical(_Ramp):
    """Several warm-ups, one after the other: linear over a part of each period, then ``end`` for its rest.

    In epoch ``t`` of a period of ``P`` epochs, with ``τ = (t mod P)/P``: ``start + (end - start) min(τ/R,
    1)``. From the top of the last cycle on it stays at ``end``.

    Args:
        start: The value at the start of each cycle.
        end: The value at its top.
        period: ``P``, epochs a cycle.
        cycles: How many.
        proportion: ``R`` in (0, 1], the part of a cycle in which the value rises.

    Raises:
        ValueError: Numbers out of range.

    Source: Fu, Li, Liu, Gao, Celikyilmaz and Carin (2019), eqs. 6 and 7.

    Example:
        >>> schedule = Cyclical(0.0, 1.0, period=4, cycles=2)
        >>> [schedule(t) for t in range(10)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    """

    def __init__(
        self, start: float, end: float, period: int, cycles: int = 4, proportion: float = 0.5
    ) -> None:
        self.start, self.end = _check_number("start", start), _check_number("end", end)
        self.period, self.cycles = check_count("period", period), check_count("cycles", cycles)
        check_positive("proportion", proportion)
        if proportion > 1.0:
            raise argument_error("proportion", "a number in (0, 1]", proportion)
        self.proportion = float(proportion)

    def __call__(self, epoch: int) -> float:
        if epoch >= self.period * self.cycles:
            return self.end
        return self._between((epoch % self.period) / (self.period * self.proportion))

    @property
    def duration(self) -> int:
        """The top of the last cycle."""
        return self.period * (self.cycles - 1) + math.ceil(self.period * self.proportion)


@recipe
class Sigmoid(_Ramp):
    """A logistic rise from ``start`` in epoch 0 to ``end`` in epoch ``T``, then ``end``.

    ``start + (end - start) (σ(k(t/T - ½)) - σ(-k/2)) / (σ(k/2) - σ(-k/2))``.

    Args:
        start: The value in epoch 0.
        end: The value from epoch ``epochs`` on.
        epochs: ``T >= 1``.
        steepness: ``k > 0``; the larger, the more of the rise lies in the middle.

    Raises:
        ValueError: Numbers out of range.

    Source: Bowman, Vilnis, Vinyals, Dai, Jozefowicz and Bengio (2016), section 3.1.

    Example:
        >>> schedule = Sigmoid(0.0, 1.0, epochs=10)
        >>> schedule(0), schedule(5), schedule(10)
        (0.0, 0.5, 1.0)
    """

    def __init__(self, start: float, end: float, epochs: int, steepness: float = 10.0) -> None:
        self.start, self.end = _check_number("start", start), _check_number("end", end)
        self.epochs = check_count("epochs", epochs)
        check_positive("steepness", steepness)
        self.steepness = float(steepness)

    def __call__(self, epoch: int) -> float:
        if epoch >= self.epochs:
            return self.end
        # σ(y) - σ(-k/2) over σ(k/2) - σ(-k/2), with σ(y) = (1 + tanh(y/2))/2.
        k = self.steepness
        middle, top = math.tanh(0.5 * k * (epoch / self.epochs - 0.5)), math.tanh(0.25 * k)
        return self._between(0.5 * (1.0 + middle / top))

    @property
    def duration(self) -> int:
        """``T``."""
        return self.epochs


def as_schedule(name: str, value: float | Schedule, low: float, high: float) -> Schedule:
    """``value`` as a schedule whose values lie in ``[low, high]``.

    Raises:
        ValueError: Not a number or a schedule, or values outside.

    Example:
        >>> as_schedule("beta", 2.0, 0.0, math.inf)(7)
        2.0
    """
    if isinstance(value, Schedule):
        schedule = value
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        schedule = Constant(value)
    else:
        raise argument_error(name, "a finite number or a schedule, such as Linear(0.0, 1.0, 10)", value)
    smallest, largest = schedule.bounds
    if smallest < low or largest > high:
        between = f"at least {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}]"
        values = f"{smallest:g}" if smallest == largest else f"{smallest:g} to {largest:g}"
        raise argument_error(name, f"values {between}", values)
    return schedule
