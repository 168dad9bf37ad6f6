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

Where the metric changes by orders of magnitude between neighbours that part dominates. Curves that the chain
does not bring home go on from a Gauss-Newton model: with ``e_k = u_kᵀ G u_k`` and the changes ``δ_k`` of
``u_k`` and ``μ_k`` of ``m_k``, the energy is ``K Σ_k ‖r_k‖²`` with ``‖r_k‖² = e_k``,
and its Hessian is nearly::

    2K Σ_k [δ_kᵀ (G_k - w_k w_kᵀ / e_k) δ_k + (w_k·δ_k + ½ p_k·μ_k)² / e_k]

(exactly so for a conformal metric), which is block tridiagonal and positive semi-definite, by Cauchy and
Schwarz.
Nodes are kept as offsets from the straight line between the ends, so that differences of neighbours are not
rounded at the size of their coordinates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from riemvae.geometry.hermite import chunk_size
from riemvae.geometry.metric import Metric, inverse_and_log_det

_MEMORY = 8  # steps that the quasi-Newton iteration remembers
_SUFFICIENT = 1e-4  # of the decrease that the slope promises, for a step to be taken
# No node moves further at once than this share of its curve: a longer jump may pass through a wall.
_LONGEST_MOVE = 0.1
# A quasi-Newton model foresees the remaining decrease only roughly: stop at this share of the tolerance.
_SAFETY = 0.2
# Energies that agree to rounding so many times in a row say nothing more, and an excess of so many machine
# epsilons is then as good as none.
_IDLE = 5
_FLOOR = 64
# Iterations with the cheap model of the Hessian, before the one that knows how the metric changes.
_CHAIN = 15
# Stiffness of a stretch of the curve, which the second model has none for; share of the metric.
_STRETCH = 1e-3
_SMALLEST_STEP = 1e-8


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


class _Line(NamedTuple):
    """Where curves are measured from, so that rounding is relative to their extent, not to their place."""

    start: Tensor  # (B, d)
    chord: Tensor  # (B, d)

    @classmethod
    def of(cls, points: Tensor) -> _Line:
        return cls(points[:, 0], points[:, -1] - points[:, 0])

    def at(self, index: Tensor) -> _Line:
        return _Line(self.start[index], self.chord[index])

    def points(self, t: Tensor) -> Tensor:
        """``(B, T, d)``."""
        return torch.addcmul(self.start.unsqueeze(1), t.unsqueeze(-1), self.chord.unsqueeze(1))


class _State(NamedTuple):
    """Curves and their energy, each with the batch first."""

    line: _Line
    offset: Tensor  # of the nodes from the line (B, K+1, d)
    energy: Tensor  # (B,)
    gradient: Tensor  # (B, K-1, d)
    inverse: Tensor  # G⁻¹ at the midpoints (B, K, d, d)
    tensor: Tensor  # G there
    momenta: Tensor  # w = G u (B, K, d)
    forces: Tensor  # p = ∂ (uᵀ G u) (B, K, d)

    def at(self, index: Tensor) -> _State:
        return _State(self.line.at(index), *(a[index] for a in self[1:]))

    def replaced(self, which: Tensor, other: _State) -> _State:
        """``other`` where ``which (B,)`` holds: the same lines."""
        pairs = zip(self[1:], other[1:])
        return _State(
            self.line, *(torch.where(which.reshape(-1, *[1] * (a.dim() - 1)), b, a) for a, b in pairs)
        )

    def steps(self) -> Tensor:
        """``u (B, K, d)``."""
        return self.line.chord.unsqueeze(1) / self.momenta.shape[1] + self.offset.diff(dim=1)


class _Step(NamedTuple):
    """A step that was taken, and how it changed the gradient; ``curvature`` is 0 where none was."""

    step: Tensor  # s (B, K-1, d)
    change: Tensor  # y (B, K-1, d)
    curvature: Tensor  # 1 / sᵀy (B,)

    def at(self, index: Tensor) -> _Step:
        return _Step(*(a[index] for a in self))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-1, -2))


def _times(segments: int, like: Tensor) -> Tensor:
    return torch.linspace(0.0, 1.0, 2 * segments + 1, dtype=like.dtype, device=like.device)


def _energy(metric: Metric, line: _Line, offset: Tensor) -> _State:
    batch, nodes, d = offset.shape
    segments = nodes - 1
    u = (line.chord.unsqueeze(1) / segments + offset.diff(dim=1)).reshape(-1, d)
    middle = line.points(_times(segments, offset)[1::2]) + 0.5 * (offset[:, 1:] + offset[:, :-1])
    size = chunk_size(offset)
    parts = []
    for du, m in zip(u.split(size), middle.reshape(-1, d).split(size)):
        local = metric.at(m)
        tensor, inverse = local.tensor, local.inverse
        w = (tensor @ du.unsqueeze(-1)).squeeze(-1)
        force = local.pullback(w.unsqueeze(-1) * w.unsqueeze(-2))
        parts.append((w, -force, inverse.expand(*m.shape, d), tensor.expand(*m.shape, d)))
    w, p, inverse, tensor = (torch.cat(a).unflatten(0, (batch, segments)) for a in zip(*parts))
    energy = segments * _dot(u.reshape(w.shape), w)
    gradient = segments * (2.0 * (w[:, :-1] - w[:, 1:]) + 0.5 * (p[:, :-1] + p[:, 1:]))
    finite = torch.isfinite(gradient).all(-1).all(-1) & (energy >= 0)
    energy = torch.where(finite, energy, torch.inf)
    return _State(line, offset, energy, gradient, inverse, tensor, w, p)


def initial_velocity(metric: Metric, points: Tensor) -> Tensor:
    """``c'(0) (B, d)`` of minimal curves, up to their speed: ``G⁻¹(x_0)`` times the momentum ``-∂E/∂x_0``.

    The discrete Legendre transform; its error is a fraction of that of a difference between nodes.
    """
    u = points[:, 1] - points[:, 0]
    local = metric.at(0.5 * (points[:, 1] + points[:, 0]))
    w = (local.tensor @ u.unsqueeze(-1)).squeeze(-1)
    momentum = w + 0.25 * local.pullback(w.unsqueeze(-1) * w.unsqueeze(-2))
    return metric.at(points[:, 0]).velocity(momentum)


def _chain(state: _State, gradient: Tensor) -> Tensor:
    """``P⁻¹ g`` of the chain (see the top of this file), shape ``(B, K-1, d)``."""
    inverse = state.inverse
    segments = inverse.shape[1]
    c = torch.cat([torch.zeros_like(gradient[:, :1]), gradient.cumsum(1)], 1) / (2 * segments)
    y = (inverse @ c.unsqueeze(-1)).squeeze(-1)
    start = torch.linalg.solve_ex(inverse.sum(1), y.sum(1).unsqueeze(-1))[0]
    delta = (inverse @ start.unsqueeze(1)).squeeze(-1) - y
    return delta.cumsum(1)[:, :-1]


class _GaussNewton:
    """The Gauss-Newton Hessian, factorised by elimination along the curve (see the top of this file)."""

    def __init__(self, state: _State) -> None:
        w, p, u = state.momenta, state.forces, state.steps()
        self._scale = 2.0 * w.shape[1]
        energy = (u * w).sum(-1, keepdim=True)
        root = torch.where(energy > 0, energy, torch.inf).rsqrt()
        w, p = root * w, 0.25 * root * p
        left, right = p - w, p + w
        # A stretch of the curve has no stiffness of its own here: a little of it is left.
        stiff = (1.0 + _STRETCH) * state.tensor - w.unsqueeze(-1) * w.unsqueeze(-2)
        diagonal = (
            stiff[:, :-1]
            + stiff[:, 1:]
            + right[:, :-1].unsqueeze(-1) * right[:, :-1].unsqueeze(-2)
            + left[:, 1:].unsqueeze(-1) * left[:, 1:].unsqueeze(-2)
        )
        beside = left.unsqueeze(-1) * right.unsqueeze(-2) - stiff  # row: node k, column: node k + 1
        self._inverses, self._factors = [inverse_and_log_det(diagonal[:, 0])[0]], []
        for k in range(1, diagonal.shape[1]):
            factor = beside[:, k].mT @ self._inverses[-1]
            self._factors.append(factor)
            self._inverses.append(inverse_and_log_det(diagonal[:, k] - factor @ beside[:, k])[0])

    def __call__(self, gradient: Tensor) -> Tensor:
        """``H⁻¹ g (B, K-1, d)``."""
        rows = list(gradient.unsqueeze(-1).unbind(1))
        for k, factor in enumerate(self._factors):
            rows[k + 1] = rows[k + 1] - factor @ rows[k]
        rows = [inverse @ row for inverse, row in zip(self._inverses, rows)]
        for k in range(len(rows) - 2, -1, -1):
            rows[k] = rows[k] - self._factors[k].mT @ rows[k + 1]
        return torch.stack(rows, 1).squeeze(-1) / self._scale


def _direction(state: _State, memory: list[_Step], stiff: bool = False) -> Tensor:
    """The quasi-Newton direction, by the two loops of limited-memory BFGS (Nocedal, 1980)."""
    q, factors = state.gradient, []
    for step in reversed(memory):
        a = step.curvature * _dot(step.step, q)
        q = q - a[:, None, None] * step.change
        factors.append(a)
    r = _GaussNewton(state)(q) if stiff else _chain(state, q)
    for step, a in zip(memory, reversed(factors)):
        b = step.curvature * _dot(step.change, r)
        r = r + (a - b)[:, None, None] * step.step
    return -r


def _first_size(state: _State, direction: Tensor) -> Tensor:
    """1, or as far as no node moves further than its curve allows, ``(B,)``."""
    allowed = _LONGEST_MOVE * state.steps().norm(dim=-1).sum(-1)
    furthest = direction.norm(dim=-1).amax(-1)
    return torch.where(furthest > allowed, allowed / furthest, torch.ones_like(allowed))


def minimise_energy(metric: Metric, points: Tensor, tolerance: float, max_iterations: int) -> Minimum:
    """Moves the inner nodes of each curve to a minimum of its midpoint energy.

    Each curve has its own step size; one that is done leaves the batch.

    Args:
        metric: The metric.
        points: Nodes ``(B, K+1, d)``; a curve with midpoints where the metric is not finite is left as it is.
        tolerance: Relative excess of the length over that of the discrete minimum at which a curve is done.
            A curve whose energy no longer changes by more than rounding is done where the excess is below
            64 machine epsilons.
        max_iterations: Evaluations of the energy a curve.
    """
    result = points.clone()
    converged = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    line = _Line.of(points)
    knots = _times(points.shape[1] - 1, points)[::2]
    state = _energy(metric, line, points - line.points(knots))
    state.offset[:, 0], state.offset[:, -1] = 0.0, 0.0
    energy = state.energy.clone()
    if points.shape[1] <= 2:
        return Minimum(result, energy, torch.isfinite(energy))
    index = torch.arange(len(points), device=points.device)
    memory: list[_Step] = []
    direction = _direction(state, memory)
    size = _first_size(state, direction)
    idle = torch.zeros_like(index)
    eps = torch.finfo(points.dtype).eps
    rounding = 16 * eps

    def leave(which: Tensor) -> None:
        inner = (state.line.points(knots) + state.offset)[which, 1:-1]
        result[index[which], 1:-1], energy[index[which]] = inner, state.energy[which]

    for iteration in range(max_iterations):
        slope = _dot(state.gradient, direction)
        # The model's decrease of the energy is -slope/2; of the length, relative, half of that over E.
        left = -slope
        finite = torch.isfinite(state.energy)
        resolved = (idle >= _IDLE) & (left <= 4.0 * _FLOOR * eps * state.energy)
        done = finite & ((left <= 4.0 * _SAFETY * tolerance * state.energy) | resolved)
        lost = ~finite | ~torch.isfinite(slope) | (size < _SMALLEST_STEP)
        leaving = done | lost
        if bool(leaving.any()):
            leave(leaving)
            converged[index[done]] = True
            keep = (~leaving).nonzero().squeeze(-1)
            if len(keep) == 0:
                return Minimum(result, energy, converged)
            index, direction, size, slope = index[keep], direction[keep], size[keep], slope[keep]
            idle = idle[keep]
            state, memory = state.at(keep), [step.at(keep) for step in memory]
        step = size[:, None, None] * direction
        moved = state.offset + torch.nn.functional.pad(step, (0, 0, 1, 1))
        trial = _energy(metric, state.line, moved)
        promised = size * slope
        taken = trial.energy <= state.energy * (1.0 + rounding) + _SUFFICIENT * promised
        idle = torch.where((state.energy - trial.energy).abs() <= rounding * state.energy, idle + 1, 0)
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
        renewed = _direction(state, memory, stiff=iteration >= _CHAIN)
        direction = torch.where(taken[:, None, None], renewed, direction)
        size = torch.where(taken, _first_size(state, direction), shorter)
    leave(torch.ones_like(idle, dtype=torch.bool))
    return Minimum(result, energy, converged)
