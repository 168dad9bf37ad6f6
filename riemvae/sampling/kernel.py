"""Hamiltonian Monte Carlo as a pure function of the state, batched over chains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from riemvae._checks import argument_error, check_count, check_positive

DensityAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]

DIVERGENCE = 1000.0
"""A trajectory whose energy grows by more than this (in nats) is a divergence, as in Stan."""


class ChainState(NamedTuple):
    """Where ``C`` chains are, with what the next trajectory needs.

    Attributes:
        position: points of shape ``(C, d)``.
        log_density: log density at the points, up to a constant, of shape ``(C,)``.
        gradient: its gradient, of shape ``(C, d)``.
    """

    position: Tensor
    log_density: Tensor
    gradient: Tensor


class TransitionInfo(NamedTuple):
    """What one transition did, each of shape ``(C,)``.

    Attributes:
        acceptance: probability with which the proposal was accepted.
        accepted: whether it was.
        diverged: whether the trajectory met a non-finite number or its energy grew beyond bounds. A
            trajectory that merely ends outside the support is rejected and is no divergence.
        energy_error: energy at the end less energy at the start (``inf`` outside the support); for any
            kernel, minus the logarithm of the acceptance ratio.
        not_converged: whether an implicit integrator failed to solve its equations, for which the proposal
            was rejected; ``None`` for a kernel that solves none.
    """

    acceptance: Tensor
    accepted: Tensor
    diverged: Tensor
    energy_error: Tensor
    not_converged: Tensor | None = None


class Kernel(Protocol):
    """A transition of many chains at once: ``state, info = kernel(state)``, from ``kernel.init(position)``.

    A kernel is a frozen dataclass, so that ``dataclasses.replace`` makes one with another step. What a
    warm-up adapts is its field ``step_size``, or its field ``scale``.
    """

    def init(self, position: Tensor) -> ChainState:
        """The state of chains at ``position`` of shape ``(C, d)``."""
        ...

    def __call__(self, state: ChainState) -> tuple[ChainState, TransitionInfo]:
        """One transition of every chain."""
        ...


def check_position(position: Tensor) -> Tensor:
    """Refuses what is not ``(chains, d)``; returns it."""
    if not isinstance(position, Tensor) or position.dim() != 2:
        raise argument_error("position", "a tensor of shape (chains, d)", position)
    return position


def metropolis(
    state: ChainState,
    proposal: ChainState,
    energy_error: Tensor,
    diverged: Tensor,
    not_converged: Tensor | None = None,
) -> tuple[ChainState, TransitionInfo]:
    """Accepts each chain's proposal with probability ``min(1, exp(-energy_error))``, compared as logarithms.

    Args:
        state: where the chains are.
        proposal: where they would go.
        energy_error: minus the log acceptance ratio, ``(C,)``; NaN and ``inf`` are never accepted.
        diverged: proposals to refuse, ``(C,)``.
        not_converged: proposals to refuse because they were not computed, ``(C,)``.
    """
    energy_error = torch.where(torch.isnan(energy_error), torch.inf, energy_error)
    log_acceptance = (-energy_error).clamp(max=0.0)
    refused = diverged if not_converged is None else diverged | not_converged
    accepted = torch.rand_like(energy_error).log() < log_acceptance
    accepted = accepted & ~refused & torch.isfinite(proposal.gradient).all(-1)
    moved = accepted.unsqueeze(-1)
    new = ChainState(
        torch.where(moved, proposal.position, state.position),
        torch.where(accepted, proposal.log_density, state.log_density),
        torch.where(moved, proposal.gradient, state.gradient),
    )
    acceptance = log_acceptance.exp().masked_fill(refused, 0.0)
    return new, TransitionInfo(acceptance, accepted, diverged, energy_error, not_converged)


@dataclass(frozen=True, eq=False)
class HMC:
    r"""Hamiltonian Monte Carlo (Neal, 2011, algorithm 1) on many chains at once.

    A momentum ``v ~ N(0, mass)`` is drawn, ``num_steps`` leapfrog steps follow the energy
    :math:`H(z, v) = -\log p(z) + \tfrac12 v^\top \mathrm{mass}^{-1} v`, and the end is accepted with
    probability :math:`\min(1, \exp(H_0 - H_1))`. The energies are compared as logarithms. A leapfrog step
    costs one evaluation of the density: the gradient at the last position is carried by the state.

    A kernel is called as ``state, info = kernel(state)``; it changes nothing but torch's generator.

    Args:
        log_density_and_gradient: ``z (C, d) -> (log density (C,), gradient (C, d))``; :func:`with_gradient`
            makes one from any log density. Outside its support the log density is ``-inf`` and the gradient
            any finite function of the position: leapfrog preserves volume and reverses whatever the force is.
        step_size: leapfrog step, a number or a tensor of shape ``()`` or ``(C,)``.
        num_steps: leapfrog steps of a trajectory.
        mass: diagonal of the mass matrix, shape ``(d,)``; ``None`` is the identity.
        jitter: the step of each trajectory of each chain is multiplied by a uniform draw from
            ``[1 - jitter, 1 + jitter]``, which breaks periodic orbits.
        gradient: ``z (C, d) -> gradient (C, d)`` alone, where it is had for less; it serves inside a
            trajectory, where the density itself is not needed.

    Raises:
        ValueError: on a step size, mass or number of steps that is not positive, or a jitter outside ``[0,
            1)``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> kernel = HMC(lambda z: (-0.5 * z.square().sum(-1), -z), step_size=0.3, num_steps=5)
        >>> state, info = kernel(kernel.init(torch.randn(100, 2)))
        >>> state.position.shape, bool(info.acceptance.mean() > 0.9)
        (torch.Size([100, 2]), True)
    """

    log_density_and_gradient: DensityAndGradient
    step_size: float | Tensor
    num_steps: int
    mass: Tensor | None = None
    jitter: float = 0.0
    gradient: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_count("num_steps", self.num_steps)
        if self.mass is not None:
            check_positive("mass", self.mass)
        if not 0.0 <= self.jitter < 1.0:
            raise argument_error("jitter", "a number in [0, 1)", self.jitter)

    @torch.no_grad()
    def init(self, position: Tensor) -> ChainState:
        """The state of chains at ``position`` of shape ``(C, d)``."""
        check_position(position)
        return ChainState(position, *self.log_density_and_gradient(position))

    @torch.no_grad()
    def trajectory(
        self, state: ChainState, momentum: Tensor, step_size: float | Tensor | None = None
    ) -> tuple[ChainState, Tensor]:
        """The end ``(state, momentum)`` of the deterministic part, without acceptance.

        A chain that reaches a non-finite position goes on from its start, so that the others are not harmed,
        and ends with a log density of NaN.

        Args:
            state: where the chains start.
            momentum: of shape ``(C, d)``.
            step_size: in place of the kernel's own.
        """
        step = column(self.step_size if step_size is None else step_size)
        drift = step if self.mass is None else step / self.mass
        z, log_density, gradient = state
        lost = torch.zeros_like(log_density, dtype=torch.bool)
        v = momentum + 0.5 * step * gradient
        for k in range(self.num_steps):
            z = z + drift * v
            if not torch.isfinite(z).all():
                lost = lost | ~torch.isfinite(z).all(-1)
                z = torch.where(lost.unsqueeze(-1), state.position, z)
                v = torch.where(lost.unsqueeze(-1), momentum, v)
            last = k == self.num_steps - 1
            if last or self.gradient is None:
                log_density, gradient = self.log_density_and_gradient(z)
            else:
                gradient = self.gradient(z)
            v = v + (0.5 * step if last else step) * gradient
        return ChainState(z, log_density.masked_fill(lost, torch.nan), gradient), v

    def kinetic_energy(self, momentum: Tensor) -> Tensor:
        """``½ vᵀ mass⁻¹ v`` of shape ``(C,)``."""
        square = momentum.square()
        return 0.5 * (square if self.mass is None else square / self.mass).sum(-1)

    @torch.no_grad()
    def __call__(self, state: ChainState) -> tuple[ChainState, TransitionInfo]:
        """One transition of every chain."""
        momentum = torch.randn_like(state.position)
        if self.mass is not None:
            momentum = momentum * self.mass.sqrt()
        step = jittered(self.step_size, self.jitter, state.log_density)
        end, v = self.trajectory(state, momentum, step)

        # Difference by difference: the energies themselves may be so large that their own difference rounds
        # away.
        error = (state.log_density - end.log_density) + (
            self.kinetic_energy(v) - self.kinetic_energy(momentum)
        )
        # Outside the support the energy is +inf and all else finite; that is a rejection, not a failed
        # integration.
        outside = torch.isneginf(end.log_density) & torch.isfinite(v).all(-1)
        diverged = ~outside & ~(error < DIVERGENCE)
        return metropolis(state, end, error, diverged)


def column(value: float | Tensor) -> float | Tensor:
    """A step ``(C,)`` as ``(C, 1)``, so that it multiplies points ``(C, d)``; a number stays."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) and value.dim() else value


def jittered(step_size: float | Tensor, jitter: float, like: Tensor) -> float | Tensor:
    """The step of each chain's trajectory: times a uniform draw from ``[1 - jitter, 1 + jitter]``."""
    return step_size * (1 + jitter * (2 * torch.rand_like(like) - 1)) if jitter else step_size


def log_density_of(target: Any) -> Callable[[Tensor], Tensor]:
    """The log density of a target, which may be a distribution.

    Args:
        target: a callable ``z (C, d) -> (C,)``, an object with such a method ``log_density`` (as
            ``riemvae.distributions.InverseVolume``), or a distribution with ``log_prob``.

    Raises:
        ValueError: when it is none of these.

    Example:
        >>> normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
        >>> log_density_of(normal)(torch.zeros(1, 2))
        tensor([-1.8379])
    """
    own = getattr(target, "log_density", None)
    if own is not None:
        return own
    if isinstance(target, Distribution):  # of which Pyro's are callable too, to sample
        return target.log_prob
    if not callable(target):
        raise argument_error("log_density", "a callable z (chains, d) -> (chains,)", target)
    return target


def with_gradient(log_density: Callable[[Tensor], Tensor]) -> DensityAndGradient:
    """The log density and its gradient by automatic differentiation, from the log density alone.

    An object with its own ``log_density_and_gradient`` (such as ``riemvae.distributions.InverseVolume``)
    keeps it.

    Args:
        log_density: ``z (C, d) -> (C,)``, each row depending on its own point only, up to a constant.

    Example:
        >>> value, gradient = with_gradient(lambda z: -0.5 * z.square().sum(-1))(torch.ones(1, 2))
        >>> value, gradient
        (tensor([-1.]), tensor([[-1., -1.]]))
    """
    own = getattr(log_density, "log_density_and_gradient", None)
    if own is not None:
        return own
    log_density = log_density_of(log_density)

    def both(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            point = z.detach().clone().requires_grad_()
            value = log_density(point)
            if value.shape != z.shape[:-1]:
                raise argument_error(
                    "log_density",
                    f"a result of shape {tuple(z.shape[:-1])}",
                    value,
                    "sum over the last dimension only",
                )
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), gradient

    return both
