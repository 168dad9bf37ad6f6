"""Step size adaptation by dual averaging."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from riemvae._checks import argument_error, check_positive
from riemvae.sampling.kernel import HMC, ChainState


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


def reasonable_step_size(kernel: HMC, state: ChainState, max_step_size: float = math.inf) -> float:
    """A first step size: doubled or halved until the mean acceptance of one leapfrog step crosses one half.

    The batched form of Hoffman & Gelman (2014), algorithm 4. At most 50 doublings are tried: a density that
    is flat everywhere has no scale of its own.

    Args:
        kernel: whose step size, a number, is the first guess.
        state: where the chains are.
        max_step_size: the largest step returned.
    """
    step = min(float(kernel.step_size), max_step_size)

    def acceptance(step_size: float) -> float:
        _, info = replace(kernel, step_size=step_size, num_steps=1, jitter=0.0)(state)
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
    kernel: HMC, state: ChainState, num_steps: int, rule: DualAveraging | None = None
) -> tuple[HMC, ChainState]:
    """Runs ``num_steps`` transitions while the step size adapts; returns the kernel with its step frozen.

    Args:
        kernel: its step size, a number, is the first guess.
        state: where the chains start.
        num_steps: transitions; 0 leaves the kernel as it is.
        rule: the adaptation, ``DualAveraging()`` by default.

    Returns:
        The kernel with the adapted step size, and the state of the chains after the warm-up.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> kernel = HMC(lambda z: (-0.5 * z.square().sum(-1), -z), step_size=1e-3, num_steps=5)
        >>> kernel, state = warm_up(kernel, kernel.init(torch.zeros(50, 2)), 200)
        >>> _, info = kernel(state)
        >>> bool(info.acceptance.mean() > 0.9)
        True
    """
    if num_steps == 0:
        return kernel, state
    rule = rule or DualAveraging()
    adapting = rule.init(reasonable_step_size(kernel, state, rule.max_step_size))
    for _ in range(num_steps):
        state, info = replace(kernel, step_size=adapting.step_size)(state)
        adapting = rule.update(adapting, float(info.acceptance.mean()))
    return replace(kernel, step_size=adapting.averaged), state
