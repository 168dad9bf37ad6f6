"""Minimises the energy of many discrete curves at once: the optimiser behind geodesics.

A curve from ``x_0`` to ``x_K`` has the midpoint energy ``E = K Σ_k u_kᵀ G(m_k) u_k`` with
``u_k = x_{k+1} - x_k`` and ``m_k`` the midpoints. With ``w_k = G(m_k) u_k`` its gradient is::

    ∂E/∂x_j = K [2 (w_{j-1} - w_j) + ½ (p_{j-1} + p_j)],    p_k = ∂_m (u_kᵀ G u_k) = -w_kᵀ ∂(G⁻¹) w_k

which is one ``pullback`` of ``w wᵀ``, in closed form where the metric has one.

With ``G`` held fixed the Hessian is block tridiagonal, ``P = 2K Dᵀ diag(G) D`` with ``D`` the differences
between neighbours. Such a system is a chain of resistors, and needs no elimination along the chain: for
``P s = g`` the differences ``δ_k = s_{k+1} - s_k`` obey ``G_k δ_k = q_0 - c_k`` with
``c_k = Σ_{j<=k} g_j / 2K``, and ``Σ_k δ_k = 0`` gives ``q_0`` from one ``d x d`` system. It takes the inverse
metric only. ``P⁻¹`` starts a limited-memory BFGS iteration, which learns the part of the Hessian that the
metric's derivatives bring.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from riemvae.geometry.hermite import chunk_size
from riemvae.geometry.metric import Metric

_MEMORY = 8  # steps that the quasi-Newton iteration remembers
_SUFFICIENT = 1e-4  # of the decrease that the slope promises, for a step to be taken
_SMALLEST_STEP = 1e-8
# No node moves further at once than this share of its curve: a longer jump may pass through a wall.
_LONGEST_MOVE = 0.1
# A quasi-Newton model foresees the remaining decrease only roughly: stop at this share of the tolerance.
_SAFETY = 0.2


class Minimum(NamedTuple):
    """Curves that were optimised.

    Attributes:
        points: nodes ``(B, K+1, d)``.
        energy: their midpoint energy ``(B,)``, ``inf`` where the metric is not finite.
        converged: whether the length's remaining relative excess is below the tolerance, ``(B,)``.
    """

    points: Tensor
    energy: Tensor
    converged: Tensor


class _State(NamedTuple):
    """Curves and their energy, each with the batch first."""

    points: Tensor  # (B, K+1, d)
    energy: Tensor  # (B,)
    gradient: Tensor  # (B, K-1, d)
    inverse: Tensor  # (B, K, d, d) G⁻¹ at the midpoints

    def at(self, index: Tensor) -> _State:
        return _State(*(a[index] for a in self))

    def replaced(self, which: Tensor, other: _State) -> _State:
        """``other`` where ``which (B,)`` holds."""
        pairs = zip(self, other)
        return _State(*(torch.where(which.reshape(-1, *[1] * (a.dim() - 1)), b, a) for a, b in pairs))


class _Step(NamedTuple):
    """A step that was taken, and how it changed the gradient; ``curvature`` is 0 where none was."""

    step: Tensor  # s (B, K-1, d)
    change: Tensor  # y (B, K-1, d)
    curvature: Tensor  # 1 / sᵀy (B,)

    def at(self, index: Tensor) -> _Step:
        return _Step(*(a[index] for a in self))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-1, -2))


def _energy(metric: Metric, points: Tensor) -> _State:
    batch, nodes, d = points.shape
    segments = nodes - 1
    u = points.diff(dim=1).reshape(-1, d)
    middle = (0.5 * (points[:, 1:] + points[:, :-1])).reshape(-1, d)
    size = chunk_size(points)
    momenta, forces, inverses = [], [], []
    for du, m in zip(u.split(size), middle.split(size)):
        local = metric.at(m)
        w = (local.tensor @ du.unsqueeze(-1)).squeeze(-1)
        momenta.append(w)
        forces.append(local.pullback(w.unsqueeze(-1) * w.unsqueeze(-2)))
        inverses.append(local.inverse.expand(*m.shape, d))
    w = torch.cat(momenta).reshape(batch, segments, d)
    p = torch.cat(forces).reshape(batch, segments, d)
    energy = segments * _dot(u.reshape(w.shape), w)
    gradient = segments * (2.0 * (w[:, :-1] - w[:, 1:]) - 0.5 * (p[:, :-1] + p[:, 1:]))
    finite = torch.isfinite(gradient).all(-1).all(-1) & (energy >= 0)
    energy = torch.where(finite, energy, torch.inf)
    return _State(points, energy, gradient, torch.cat(inverses).reshape(batch, segments, d, d))


def initial_velocity(metric: Metric, points: Tensor) -> Tensor:
    """``c'(0) (B, d)`` of minimal curves, up to their speed: ``G⁻¹(x_0)`` times the momentum ``-∂E/∂x_0``.

    The discrete Legendre transform; its error is a fraction of that of a difference between nodes.
    """
    u = points[:, 1] - points[:, 0]
    local = metric.at(0.5 * (points[:, 1] + points[:, 0]))
    w = (local.tensor @ u.unsqueeze(-1)).squeeze(-1)
    momentum = w + 0.25 * local.pullback(w.unsqueeze(-1) * w.unsqueeze(-2))
    return metric.at(points[:, 0]).velocity(momentum)


def _precondition(inverse: Tensor, gradient: Tensor) -> Tensor:
    """``P⁻¹ g`` of the chain (see the top of this file), shape ``(B, K-1, d)``."""
    segments = inverse.shape[1]
    c = torch.cat([torch.zeros_like(gradient[:, :1]), gradient.cumsum(1)], 1) / (2 * segments)
    y = (inverse @ c.unsqueeze(-1)).squeeze(-1)
    start = torch.linalg.solve_ex(inverse.sum(1), y.sum(1).unsqueeze(-1))[0]
    delta = (inverse @ start.unsqueeze(1)).squeeze(-1) - y
    return delta.cumsum(1)[:, :-1]


def _direction(state: _State, memory: list[_Step]) -> Tensor:
    """The quasi-Newton direction, by the two loops of limited-memory BFGS (Nocedal, 1980)."""
    q, factors = state.gradient, []
    for step in reversed(memory):
        a = step.curvature * _dot(step.step, q)
        q = q - a[:, None, None] * step.change
        factors.append(a)
    r = _precondition(state.inverse, q)
    for step, a in zip(memory, reversed(factors)):
        b = step.curvature * _dot(step.change, r)
        r = r + (a - b)[:, None, None] * step.step
    return -r


def _first_size(points: Tensor, direction: Tensor) -> Tensor:
    """1, or as far as no node moves further than its curve allows, ``(B,)``."""
    allowed = _LONGEST_MOVE * points.diff(dim=1).norm(dim=-1).sum(-1)
    furthest = direction.norm(dim=-1).amax(-1)
    return torch.where(furthest > allowed, allowed / furthest, torch.ones_like(allowed))


def minimise_energy(metric: Metric, points: Tensor, tolerance: float, max_iterations: int) -> Minimum:
    """Moves the inner nodes of each curve to a minimum of its midpoint energy.

    Each curve has its own step size; one that is done leaves the batch.

    Args:
        metric: The metric.
        points: Nodes ``(B, K+1, d)``; a curve with midpoints where the metric is not finite is left as it is.
        tolerance: Relative excess of the length over that of the discrete minimum at which a curve is done.
        max_iterations: Evaluations of the energy a curve.
    """
    result = points.clone()
    converged = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    state = _energy(metric, points)
    energy = state.energy.clone()
    if points.shape[1] <= 2:
        return Minimum(result, energy, torch.isfinite(energy))
    index = torch.arange(len(points), device=points.device)
    memory: list[_Step] = []
    direction = _direction(state, memory)
    size = _first_size(points, direction)
    rounding = 16 * torch.finfo(points.dtype).eps
    for _ in range(max_iterations):
        slope = _dot(state.gradient, direction)
        # The model's decrease of the energy is -slope/2; of the length, relative, half of that over E.
        done = (-slope <= 4.0 * _SAFETY * tolerance * state.energy) & torch.isfinite(state.energy)
        lost = ~torch.isfinite(state.energy) | ~torch.isfinite(slope) | (size < _SMALLEST_STEP)
        leaving = done | lost
        if bool(leaving.any()):
            result[index[leaving]], energy[index[leaving]] = state.points[leaving], state.energy[leaving]
            converged[index[done]] = True
            keep = (~leaving).nonzero().squeeze(-1)
            if len(keep) == 0:
                return Minimum(result, energy, converged)
            index, direction, size, slope = index[keep], direction[keep], size[keep], slope[keep]
            state, memory = state.at(keep), [step.at(keep) for step in memory]
        step = size[:, None, None] * direction
        moved = torch.cat([state.points[:, :1], state.points[:, 1:-1] + step, state.points[:, -1:]], 1)
        trial = _energy(metric, moved)
        promised = size * slope
        taken = trial.energy <= state.energy * (1.0 + rounding) + _SUFFICIENT * promised
        change = trial.gradient - state.gradient
        product = _dot(step, change)
        # Only a positive curvature keeps the model positive definite.
        used = taken & (product > -1e-4 * promised)
        zero = torch.zeros_like(step)
        memory.append(
            _Step(
                torch.where(used[:, None, None], step, zero),
                torch.where(used[:, None, None], change, zero),
                torch.where(used, 1.0 / product, torch.zeros_like(product)),
            )
        )
        del memory[:-_MEMORY]
        # The minimum of the parabola through what is known, where the step was too long.
        parabola = (-0.5 * promised / (trial.energy - state.energy - promised)).nan_to_num(0.0) * size
        shorter = parabola.clamp(0.1 * size, 0.5 * size)
        state = state.replaced(taken, trial)
        direction = torch.where(taken[:, None, None], _direction(state, memory), direction)
        size = torch.where(taken, _first_size(state.points, direction), shorter)
    result[index], energy[index] = state.points, state.energy
    return Minimum(result, energy, converged)
