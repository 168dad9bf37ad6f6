"""Adaptation in a warm-up: the step size by dual averaging, a diagonal mass by the chains' variance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from riemvae._checks import argument_error, check_count, check_positive
from riemvae.sampling.kernel import ChainState, Kernel

K = TypeVar("K", bound=Kernel)


class DualAveragingState(NamedTuple):
    """The running sums of :class:`DualAveraging`.

    Attributes:
        step_size: the step to try next.
        averaged: the averaged step, to be kept when the adaptation ends.
        error: running mean of (target - acceptance).
        anchor: logarithm of the step towards which the iterates shrink.
        updates: updates so far.
    """

    step_size: float
    averaged: float
    error: float
    anchor: float
    updates: int


@dataclass(frozen=True)
class DualAveraging:
    r"""Nesterov's dual averaging of a log step size towards a target acceptance.

    Source: Hoffman & Gelman (2014), section 3.2.

    With :math:`\bar h_t` the weighted mean of (target - acceptance):
    :math:`\log ε_{t+1} = μ - \frac{\sqrt t}{γ} \bar h_t`, averaged with weights :math:`t^{-κ}`.

    One step size serves all chains, driven by their mean acceptance. A step per chain would follow the region
    where its chain happens to be during the warm-up, and be wrong for the others that it visits afterwards.

    Args:
        target: acceptance probability aimed at. 0.95 by default: above the 0.9 that results must keep,
            because chains may find sharper regions after the warm-up than during it.
        gamma, offset, kappa: γ, t_0 and κ of the source.
        max_step_size: the step never grows beyond this.

    Example:
        >>> rule = DualAveraging(target=0.8)
        >>> state = rule.update(rule.init(0.1), acceptance=1.0)
        >>> state.step_size > 0.1
        True
    """

    target: float = 0.95
    gamma: float = 0.05
    offset: float = 10.0
    kappa: float = 0.75
    max_step_size: float = math.inf

    def __post_init__(self) -> None:
        if not 0.0 < self.target < 1.0:
            raise argument_error("target", "a number strictly between 0 and 1", self.target)

    def init(self, step_size: float) -> DualAveragingState:
        """The state that starts from ``step_size``."""
        check_positive("step_size", step_size)
        step_size = min(step_size, self.max_step_size)
        return DualAveragingState(
            step_size, step_size, 0.0, math.log(min(10 * step_size, self.max_step_size)), 0
        )

    def update(self, state: DualAveragingState, acceptance: float) -> DualAveragingState:
        """The state after a transition with mean ``acceptance``."""
        count = state.updates + 1
        weight = 1 / (count + self.offset)
        error = (1 - weight) * state.error + weight * (self.target - acceptance)
        log_step = state.anchor - math.sqrt(count) / self.gamma * error
        log_step = min(log_step, math.log(self.max_step_size))
        share = count**-self.kappa
        averaged = math.exp(share * log_step + (1 - share) * math.log(state.averaged))
        return DualAveragingState(math.exp(log_step), averaged, error, state.anchor, count)


def steps_of(count: int, progress: bool, description: str) -> Iterable[int]:
    """``range(count)``, with a bar on request."""
    if not progress:
        return range(count)
    from rich.progress import track

    return track(range(count), description=description)


def step_field(kernel: Any) -> str:
    """The name of the field that an adaptation sets: ``"step_size"``, or the ``"scale"`` of a random walk.

    Raises:
        ValueError: when the kernel has neither.
    """
    names = [field.name for field in fields(kernel)]
    for name in ("step_size", "scale"):
        if name in names:
            return name
    raise argument_error("kernel", "a kernel with a field step_size or scale", kernel)


def default_target(kernel: Any) -> float:
    """The acceptance that a kernel is best run at: its ``target_acceptance``, 0.95 where it names none."""
    return float(getattr(kernel, "target_acceptance", DualAveraging.target))


def _with_step(kernel: K, step_size: float, **others: Any) -> K:
    return replace(kernel, **{step_field(kernel): step_size}, **others)  # type: ignore[type-var]


def reasonable_step_size(kernel: Kernel, state: ChainState, max_step_size: float = math.inf) -> float:
    """A first step size: doubled or halved until the mean acceptance of one leapfrog step crosses one half.

    The batched form of Hoffman & Gelman (2014), algorithm 4. At most 50 doublings are tried: a density that
    is flat everywhere has no scale of its own. For a random walk it is its scale, and one whole transition.

    Args:
        kernel: whose step size or scale, a number, is the first guess.
        state: where the chains are.
        max_step_size: the largest step returned.
    """
    field = step_field(kernel)
    step = min(float(getattr(kernel, field)), max_step_size)
    single = {"num_steps": 1, "jitter": 0.0} if field == "step_size" else {}

    def acceptance(step_size: float) -> float:
        _, info = _with_step(kernel, step_size, **single)(state)
        return float(info.acceptance.mean())

    growing = acceptance(step) > 0.5
    for _ in range(50):
        following = step * 2 if growing else step / 2
        if following > max_step_size or (growing and acceptance(following) <= 0.5):
            break
        step = following
        if not growing and acceptance(step) > 0.5:
            break
    return step


def warm_up(
    kernel: K,
    state: ChainState,
    num_steps: int,
    rule: DualAveraging | None = None,
    *,
    adapt_mass: bool = False,
    progress: bool = False,
) -> tuple[K, ChainState]:
    """Runs ``num_steps`` transitions while the step size adapts; returns the kernel with its step frozen.

    With ``adapt_mass`` the inverse of the mass's diagonal becomes the variance of the chains' positions, as
    in Stan (windows of doubling length, shrunk towards 1e-3), except that the variance is pooled over the
    chains. The step size is found again after each window.

    Args:
        kernel: its step size (or scale, for a random walk), a number, is the first guess.
        state: where the chains start.
        num_steps: transitions; 0 leaves the kernel as it is.
        rule: the adaptation; ``None`` aims at the kernel's ``target_acceptance``, or at 0.95 without one.
        adapt_mass: adapts the kernel's field ``mass`` too.
        progress: shows a bar.

    Returns:
        The kernel with the adapted step size, and the state of the chains after the warm-up.

    Raises:
        ValueError: for a kernel without a step size or scale, or without a mass that is to be adapted.

    Example:
        >>> import torch
        >>> from riemvae.sampling.kernel import HMC
        >>> _ = torch.manual_seed(0)
        >>> kernel = HMC(lambda z: (-0.5 * z.square().sum(-1), -z), step_size=1e-3, num_steps=5)
        >>> kernel, state = warm_up(kernel, kernel.init(torch.zeros(50, 2)), 200)
        >>> _, info = kernel(state)
        >>> bool(info.acceptance.mean() > 0.9)
        True
    """
    check_count("num_steps", num_steps, 0)
    step_field(kernel)
    if adapt_mass and "mass" not in [field.name for field in fields(kernel)]:  # type: ignore[arg-type]
        raise argument_error("adapt_mass", "False for a kernel without a field mass", True, "use HMC")
    if num_steps == 0:
        return kernel, state
    rule = rule or DualAveraging(default_target(kernel))
    windows = set(_windows(num_steps)) if adapt_mass else set()
    first, moments = (min(windows), _Moments()) if windows else (num_steps, None)
    adapting = rule.init(reasonable_step_size(kernel, state, rule.max_step_size))
    for k in steps_of(num_steps, progress, "warm-up"):
        state, info = _with_step(kernel, adapting.step_size)(state)
        adapting = rule.update(adapting, float(info.acceptance.mean()))
        if moments is None or k < first:
            continue
        if k in windows:
            if k > first:
                kernel = _with_step(kernel, adapting.averaged, mass=1 / moments.variance())
                adapting = rule.init(reasonable_step_size(kernel, state, rule.max_step_size))
            moments = None if k == max(windows) else _Moments()
        if moments is not None:
            moments.add(state.position)
    return _with_step(kernel, adapting.averaged), state


def _windows(num_steps: int) -> Iterator[int]:
    """Where the windows of a mass adaptation begin and end, between 15 % and 90 % of the warm-up."""
    edge, end, width = int(0.15 * num_steps), int(0.9 * num_steps), 25
    while edge < end:
        yield edge
        # A last window that would be shorter than the one before is joined to it.
        edge, width = (edge + width if edge + 3 * width <= end else end), 2 * width
    yield end


class _Moments:
    """Running mean and variance of the coordinates over chains and transitions (Chan, 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.square = 0, None, None

    mean: Tensor | None
    square: Tensor | None

    def add(self, position: Tensor) -> None:
        count, mean = len(position), position.mean(0)
        square = (position - mean).square().sum(0)
        if self.mean is None or self.square is None:
            self.count, self.mean, self.square = count, mean, square
            return
        total, shift = self.count + count, mean - self.mean
        self.square = self.square + square + shift.square() * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def variance(self) -> Tensor:
        """The variance, drawn towards 1e-3 by the weight of five draws (Stan's reference manual)."""
        if self.square is None or self.count < 2:
            raise argument_error(
                "num_steps", "a warm-up of at least 20 transitions to adapt the mass", "fewer"
            )
        n = self.count
        return self.square / (n - 1) * (n / (n + 5)) + 1e-3 * (5 / (n + 5))
