"""Hamiltonian integrators: leapfrog, and the generalized leapfrog of a Hamiltonian with a curved metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_count, check_positive
from riemvae.geometry import potential as potentials
from riemvae.geometry.metric import LocalMetric, Metric
from riemvae.geometry.potential import Potential

# With a tolerance, a fixed point that has not been reached after so many iterations is reported as not
# converged.
MAXIMUM_ITERATIONS = 50


class IntegratorInfo(NamedTuple):
    """What an integration reports, each per datum ``(...)``.

    Attributes:
        residual: The largest change that the last fixed-point iteration of any step made, in any coordinate,
            relative to ``1 + max|coordinate|``. Zero for an explicit integrator.
        converged: With a tolerance: every fixed point was reached. Without: nothing is known but that it is
            finite.
        diverged: A position, momentum or potential is not finite.
        potential: ``U(z_K)`` at the end.
        iterations: The largest number of fixed-point iterations that a half step took (an ``int``).
        local: The metric at ``z_K``, evaluated already; None for an integrator without a metric.
    """

    residual: Tensor
    converged: Tensor
    diverged: Tensor
    potential: Tensor
    iterations: int
    local: LocalMetric | None = None


def inverse_temperatures(tempering: float | Tensor, num_steps: int) -> list[float | Tensor]:
    """The quadratic tempering schedule ``√β_0, …, √β_K`` from ``√β_0 = tempering`` to ``√β_K = 1``.

    ``√β_k = ((1 - 1/√β_0) k²/K² + 1/√β_0)⁻¹``. Without a step there is nothing to temper: ``K = 0`` forces
    ``β_0 = 1``.

    Source: Caterini, Doucet and Sejdinovic (2018); thesis, section 1.3.2.

    Example:
        >>> [round(value, 3) for value in inverse_temperatures(0.3, 3)]
        [0.3, 0.325, 0.435, 1.0]
    """
    if num_steps == 0:
        return [1.0]
    start = 1.0 / tempering
    return [1.0 / ((1.0 - start) * (k * k / num_steps**2) + start) for k in range(num_steps)] + [1.0]


def _check(
    z: Tensor, v: Tensor, step_size: float | Tensor, num_steps: int, tempering: float | Tensor
) -> None:
    if z.shape != v.shape or z.dim() == 0:
        raise argument_error("v", f"a momentum of the shape of z, {tuple(z.shape)}", v)
    check_count("num_steps", num_steps, minimum=0)
    # Tensors are not inspected: that would wait for the device at every call, and a learned value may be a
    # function's output.
    if not isinstance(step_size, Tensor):
        check_positive("step_size", step_size)
    if not isinstance(tempering, Tensor):
        check_positive("tempering", tempering)


def _potential_at(potential: Potential, z: Tensor, with_value: bool) -> tuple[Tensor, Tensor]:
    """The gradient at ``z``, and the value where it is the last position: only that one is reported."""
    if with_value:
        return potentials.value_and_gradient(potential, z)
    gradient = potentials.gradient(potential, z)
    return gradient, gradient


def _is_one(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) and value == 1.0


def leapfrog(
    potential: Potential,
    z: Tensor,
    v: Tensor,
    step_size: float | Tensor,
    num_steps: int,
    *,
    tempering: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor, IntegratorInfo]:
    """Integrates ``H(z, v) = U(z) + ½ vᵀ v`` by the leapfrog (Störmer-Verlet) scheme.

    Reversible, volume preserving and of second order. The gradient of the potential is evaluated ``num_steps
    + 1`` times: neighbouring half steps share it.

    With tempering the given momentum is divided by ``√β_0`` at the start and multiplied by ``√(β_{k-1}/β_k)``
    after step ``k``: the factors cancel, so that the whole map still preserves volume.

    Args:
        potential: ``U``: ``z (..., d) -> (...)``, or an object with a ``value_and_gradient``.
        z: Positions ``(..., d)``.
        v: Momenta (covectors) ``(..., d)``.
        step_size: ``ε > 0``, a number or a tensor that broadcasts against ``z`` (one step a coordinate, say).
        num_steps: ``K >= 0``.
        tempering: ``√β_0 > 0``; 1 is none.

    Returns:
        ``(z, v, info)`` after ``K`` steps.

    Raises:
        ValueError: Shapes that differ, or a step size, number of steps or tempering out of range.

    Source: thesis, eq. 1.9; Neal (2011); Caterini et al. (2018) for tempering.

    Example:
        >>> z, v = torch.tensor([1.0]), torch.tensor([0.0])
        >>> with torch.no_grad():
        ...     z, v, info = leapfrog(lambda z: 0.5 * (z**2).sum(-1), z, v, step_size=0.01, num_steps=100)
        >>> z.round(decimals=3)  # cos(1)
        tensor([0.5400])
    """
    _check(z, v, step_size, num_steps, tempering)
    value, gradient = _potential_at(potential, z, num_steps == 0)
    schedule = inverse_temperatures(tempering, num_steps)
    if not _is_one(schedule[0]):
        v = v / schedule[0]
    half = 0.5 * step_size
    for k in range(num_steps):
        v = v - half * gradient
        z = z + step_size * v
        value, gradient = _potential_at(potential, z, k == num_steps - 1)
        v = v - half * gradient
        if not _is_one(tempering):
            v = v * (schedule[k] / schedule[k + 1])
    diverged = _not_finite(z, v, value)
    return z, v, IntegratorInfo(z.new_zeros(z.shape[:-1]), ~diverged, diverged, value, 0)


def _not_finite(z: Tensor, v: Tensor, value: Tensor) -> Tensor:
    with torch.no_grad():
        return ~(torch.isfinite(z).all(-1) & torch.isfinite(v).all(-1) & torch.isfinite(value))


class _FixedPoint:
    """Iterates ``x <- update(x)``, a fixed number of times or until no datum moves more than a tolerance."""

    def __init__(self, steps: int, tolerance: float | None) -> None:
        self.steps, self.tolerance = steps, tolerance
        self.residual: Tensor | None = None
        self.iterations = 0

    def __call__(self, update: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.tolerance is None:
            for _ in range(self.steps - 1):
                x = update(x)
            new = update(x)
            self._record(self._change(new, x), self.steps)
            return new
        for iteration in range(1, max(self.steps, MAXIMUM_ITERATIONS) + 1):
            new = update(x)
            change = self._change(new, x)
            x = new
            # A datum that has become NaN will not come back, and does not hold up the others.
            if iteration >= self.steps and not bool((change > self.tolerance).any()):
                break
        self._record(change, iteration)
        return x

    @staticmethod
    def _change(new: Tensor, old: Tensor) -> Tensor:
        with torch.no_grad():
            return (new - old).abs().amax(-1) / (1.0 + new.abs().amax(-1))

    def _record(self, change: Tensor, iterations: int) -> None:
        self.residual = change if self.residual is None else torch.maximum(self.residual, change)
        self.iterations = max(self.iterations, iterations)


def generalized_leapfrog(
    potential: Potential,
    metric: Metric,
    z: Tensor,
    v: Tensor,
    step_size: float | Tensor,
    num_steps: int,
    fixed_point_steps: int = 3,
    tolerance: float | None = None,
    *,
    tempering: float | Tensor = 1.0,
    start: LocalMetric | None = None,
) -> tuple[Tensor, Tensor, IntegratorInfo]:
    """Integrates ``H(z, v) = U(z) + ½ log det G(z) + ½ vᵀ G⁻¹(z) v`` by the generalized leapfrog scheme.

    The first half step is implicit in ``v`` and the position step is implicit in ``z`` (the metric is
    evaluated again at each iterate); at converged fixed points the map is reversible and preserves volume.
    Derivatives of ``H`` in ``z`` are partial ones, at fixed ``v``. The potential's gradient does not depend
    on ``v``: it is evaluated ``num_steps + 1`` times and only the kinetic part is iterated.

    Args:
        potential: ``U``: ``z (..., d) -> (...)``, or an object with a ``value_and_gradient``.
        metric: ``G``; a metric with closed-form derivatives is used in closed form, any other by autodiff.
        z: Positions ``(..., d)``.
        v: Momenta (covectors) ``(..., d)``.
        step_size: ``ε > 0``, a number or a tensor that broadcasts against ``z``.
        num_steps: ``K >= 0``.
        fixed_point_steps: Iterations of each implicit half step; with a tolerance, at least so many.
        tolerance: Iterate until the residual of every datum is at most this, or 50 times.
        tempering: ``√β_0 > 0`` as in :func:`leapfrog`; 1 is none.
        start: ``metric.at(z)``, if it is known already.

    Returns:
        ``(z, v, info)``; ``info`` tells per datum the residual, and whether it converged or diverged.

    Raises:
        ValueError: Shapes that differ, or a number out of range.

    Source: thesis, eq. 1.5; Girolami and Calderhead (2011).

    Example:
        >>> from riemvae.geometry import EuclideanMetric
        >>> z, v = torch.tensor([1.0]), torch.tensor([0.0])
        >>> def potential(z):
        ...     return 0.5 * (z**2).sum(-1)
        >>> with torch.no_grad():
        ...     z, v, info = generalized_leapfrog(potential, EuclideanMetric(1), z, v, 0.01, 100)
        >>> z.round(decimals=3), bool(info.diverged)
        (tensor([0.5400]), False)
    """
    _check(z, v, step_size, num_steps, tempering)
    check_count("fixed_point_steps", fixed_point_steps)
    if tolerance is not None:
        check_positive("tolerance", tolerance)
    value, gradient = _potential_at(potential, z, num_steps == 0)
    schedule = inverse_temperatures(tempering, num_steps)
    if not _is_one(schedule[0]):
        v = v / schedule[0]
    half = 0.5 * step_size
    solve = _FixedPoint(fixed_point_steps, tolerance)
    local = metric.at(z) if start is None else start
    for k in range(num_steps):
        pushed = v - half * gradient
        v = solve(lambda w: pushed - half * local.kinetic_gradient(w), v)  # noqa: B023 - called before the next step
        # The first iterate of the position step starts from the metric that is known already.
        velocity = local.velocity(v)
        origin = z + half * velocity

        def advance(
            x: Tensor, z: Tensor = z, v: Tensor = v, origin: Tensor = origin, known: Tensor = velocity
        ) -> Tensor:
            return origin + half * (known if x is z else metric.at(x).velocity(v))

        z = solve(advance, z)
        local = metric.at(z)
        value, gradient = _potential_at(potential, z, k == num_steps - 1)
        v = v - half * (gradient + local.kinetic_gradient(v))
        if not _is_one(tempering):
            v = v * (schedule[k] / schedule[k + 1])
    residual = z.new_zeros(z.shape[:-1]) if solve.residual is None else solve.residual
    diverged = _not_finite(z, v, value)
    converged = ~diverged if tolerance is None else ~diverged & (residual <= tolerance)
    return z, v, IntegratorInfo(residual, converged, diverged, value, solve.iterations, local)
