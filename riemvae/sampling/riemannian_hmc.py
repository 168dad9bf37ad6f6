"""Riemannian manifold Hamiltonian Monte Carlo, with the metric as the mass matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_count, check_positive
from riemvae.geometry import LocalMetric, Metric, generalized_leapfrog
from riemvae.geometry.potential import GradientPotential
from riemvae.sampling.kernel import (
    DIVERGENCE,
    ChainState,
    DensityAndGradient,
    TransitionInfo,
    check_position,
    column,
    jittered,
    metropolis,
)

# How often the fixed points of a step are iterated; a trajectory that needed the larger number keeps to it.
_ITERATIONS: tuple[int, ...] = (6, 16)


class Trajectory(NamedTuple):
    """Where an implicit integrator led each chain.

    Attributes:
        position, momentum: ``(C, d)``; of a failed chain, any finite point.
        local: the metric at ``position``.
        failed: a fixed point was not reached, or a number is not finite, ``(C,)``.
        not_finite: the second of these.
    """

    position: Tensor
    momentum: Tensor
    local: LocalMetric
    failed: Tensor
    not_finite: Tensor


def default_tolerance(dtype: torch.dtype) -> float:
    """The residual to which fixed points are solved: ``ε^(3/4)``, above what rounding leaves of them."""
    return float(torch.finfo(dtype).eps ** 0.75)


def implicit_trajectory(
    potential: GradientPotential,
    metric: Metric,
    start: LocalMetric,
    momentum: Tensor,
    step_size: float | Tensor,
    num_steps: int,
    tolerance: float,
) -> Trajectory:
    """The generalized leapfrog, step by step: a chain that fails is put back, and holds nobody up.

    Fixed points are iterated a few times and, where that does not solve all of them, once more with the
    larger number. What that does not solve contracts so slowly that it is near steps with several solutions:
    more iterations for all chains are not worth the few proposals gained.

    Args:
        potential: as :func:`~riemvae.geometry.generalized_leapfrog` takes it.
        metric: the metric.
        start: ``metric.at(position)`` at the starts.
        momentum: ``(C, d)``.
        step_size: a number or a tensor ``(C, 1)``.
        num_steps: number of steps.
        tolerance: residual of the fixed points.
    """
    z, v, local = start.z, momentum, start
    failed = torch.zeros_like(z[..., 0], dtype=torch.bool)
    not_finite = failed
    iterations = _ITERATIONS
    for _ in range(num_steps):
        for count in iterations:
            new_z, new_v, info = generalized_leapfrog(
                potential, metric, z, v, step_size, 1, fixed_point_steps=count, start=local
            )
            unsolved = ~(info.residual <= tolerance)
            if not bool((unsolved & ~failed).any()):
                break
            iterations = _ITERATIONS[-1:]
        z, v, local = new_z, new_v, metric.at(new_z) if info.local is None else info.local
        lost = ~torch.isfinite(z).all(-1) | ~torch.isfinite(v).all(-1)
        failed = failed | lost | unsolved
        not_finite = not_finite | lost
        if bool(failed.any()):
            put_back = failed.unsqueeze(-1)
            z = torch.where(put_back, start.z, z)
            v = torch.where(put_back, torch.zeros_like(v), v)
            local = metric.at(z)
    return Trajectory(z, v, local, failed, not_finite)


def reverses(
    end: Trajectory, back: Trajectory, position: Tensor, momentum: Tensor, tolerance: float
) -> Tensor:
    """Whether the way back from ``end`` with its momentum turned round ended at the start, ``(C,)``.

    To the square root of the tolerance: an error of the fixed points may grow along the way, but another
    solution of theirs is farther off than that.
    """
    within = tolerance**0.5
    there = (back.position - position).abs().amax(-1) <= within * (1 + position.abs().amax(-1))
    turned = (back.momentum + momentum).abs().amax(-1) <= within * (1 + momentum.abs().amax(-1))
    return there & turned & ~back.failed & ~end.failed


@dataclass(frozen=True, eq=False)
class RiemannianHMC:
    r"""Riemannian manifold HMC (Girolami and Calderhead, 2011) on many chains at once.

    A momentum ``v ~ N(0, G(z))`` is drawn, ``num_steps`` generalized leapfrog steps follow the energy

    .. math:: H(z, v) = -\log p(z) + \tfrac12 \log\det G(z) + \tfrac12 v^\top G^{-1}(z) v,

    and the end is accepted with probability :math:`\min(1, \exp(H_0 - H_1))`. The density is one with respect
    to Lebesgue measure, as for :class:`HMC`; the metric is only the mass, and need not belong to it.

    The implicit steps are reversible and preserve volume where their fixed points are solved. They are
    iterated to a tolerance, and a proposal for which one is not reached is refused and counted in
    ``info.not_converged``. At steps so large that several fixed points exist, the way back may find another
    one: one proposal in a hundred that does not come back biases a chain visibly. So by default the way back
    is made (twice the work) and those proposals are refused and counted too, which makes the kernel exact
    whatever the step. Where steps are small (nothing is refused), ``check_reversal=False`` saves it.

    Args:
        log_density_and_gradient: ``z (C, d) -> (log density (C,), gradient (C, d))``, as for :class:`HMC`.
        metric: ``G``.
        step_size: leapfrog step, a number or a tensor of shape ``()`` or ``(C,)``; in units of the metric's
            length.
        num_steps: leapfrog steps of a trajectory.
        jitter: the step of each trajectory of each chain is multiplied by a uniform draw from
            ``[1 - jitter, 1 + jitter]``.
        gradient: ``z (C, d) -> gradient (C, d)`` alone, where it is had for less.
        tolerance: residual of the fixed points, relative to ``1 + max|coordinate|``; ``None`` is the number
            type's ``ε^(3/4)``.
        check_reversal: makes the way back, and refuses proposals that do not come back.

    Raises:
        ValueError: on numbers out of range.

    Example:
        >>> from riemvae.geometry import EuclideanMetric
        >>> _ = torch.manual_seed(0)
        >>> def normal(z):
        ...     return -0.5 * z.square().sum(-1), -z
        >>> kernel = RiemannianHMC(normal, EuclideanMetric(2), step_size=0.3, num_steps=5)
        >>> state, info = kernel(kernel.init(torch.randn(100, 2)))
        >>> state.position.shape, bool(info.acceptance.mean() > 0.9), int(info.not_converged.sum())
        (torch.Size([100, 2]), True, 0)
    """

    log_density_and_gradient: DensityAndGradient
    metric: Metric
    step_size: float | Tensor
    num_steps: int
    jitter: float = 0.0
    gradient: Callable[[Tensor], Tensor] | None = None
    tolerance: float | None = None
    check_reversal: bool = True

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_count("num_steps", self.num_steps)
        if not 0.0 <= self.jitter < 1.0:
            raise argument_error("jitter", "a number in [0, 1)", self.jitter)
        if self.tolerance is not None:
            check_positive("tolerance", self.tolerance)

    @torch.no_grad()
    def init(self, position: Tensor) -> ChainState:
        """The state of chains at ``position`` of shape ``(C, d)``."""
        return ChainState(check_position(position), *self.log_density_and_gradient(position))

    @torch.no_grad()
    def trajectory(
        self, state: ChainState, momentum: Tensor, step_size: float | Tensor | None = None
    ) -> tuple[ChainState, Trajectory]:
        """The end of the deterministic part, without acceptance: its state and its phase-space point.

        Args:
            state: where the chains start.
            momentum: of shape ``(C, d)``.
            step_size: in place of the kernel's own.
        """
        return self._follow(state, self.metric.at(state.position), momentum, step_size)

    def _follow(
        self, state: ChainState, start: LocalMetric, momentum: Tensor, step_size: float | Tensor | None
    ) -> tuple[ChainState, Trajectory]:
        step = column(self.step_size if step_size is None else step_size)
        potential = _Potential(self, state)
        end = implicit_trajectory(
            potential, self.metric, start, momentum, step, self.num_steps, self._tolerance(momentum)
        )
        return ChainState(end.position, *potential.density_at(end.position)), end

    @torch.no_grad()
    def __call__(self, state: ChainState) -> tuple[ChainState, TransitionInfo]:
        """One transition of every chain."""
        start = self.metric.at(state.position)
        momentum = start.momentum(torch.randn_like(state.position))
        step = jittered(self.step_size, self.jitter, state.log_density)
        proposal, end = self._follow(state, start, momentum, step)
        failed = end.failed
        if self.check_reversal:
            _, back = self._follow(proposal, end.local, -end.momentum, step)
            failed = ~reverses(end, back, state.position, momentum, self._tolerance(momentum))

        error = (state.log_density - proposal.log_density) + (
            end.local.kinetic_energy(end.momentum) - start.kinetic_energy(momentum)
        )
        outside = torch.isneginf(proposal.log_density)
        diverged = end.not_finite | (~outside & ~failed & ~(error < DIVERGENCE))
        return metropolis(state, proposal, error, diverged, failed & ~diverged)

    def _tolerance(self, like: Tensor) -> float:
        return default_tolerance(like.dtype) if self.tolerance is None else self.tolerance


class _Potential:
    """``-log p`` for an integrator that asks for one step at a time; each position is evaluated once."""

    def __init__(self, kernel: RiemannianHMC, start: ChainState) -> None:
        self._kernel, self._state = kernel, start

    def __call__(self, z: Tensor) -> Tensor:
        return -self.density_at(z)[0]

    def density_at(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The log density and its gradient at ``z``; those of the last position asked for are kept."""
        if z is not self._state.position:
            self._state = ChainState(z, *self._kernel.log_density_and_gradient(z))
        return self._state.log_density, self._state.gradient

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = self.density_at(z)
        return -value, -gradient

    def gradient(self, z: Tensor) -> Tensor:
        return -self.density_at(z)[1]
