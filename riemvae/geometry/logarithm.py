"""The logarithm of a metric: the velocity whose geodesic leads from one point to another, by shooting."""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_count, check_positive
from riemvae.geometry.exponential import (
    broadcast_tangent,
    differentiated,
    exponential_map,
    exponential_map_and_jacobian,
    in_chunks,
)
from riemvae.geometry.geodesics import Geodesic, geodesic
from riemvae.geometry.metric import Metric

_HALVINGS = 8  # of a Newton step before a pair is given up
_LINE_NODES = 17
_MARGIN = 0.01  # that a geodesic may be longer than the discretised shortest path
_RESOLVED = 1e-2  # the largest energy drift of a geodesic with enough steps: half of it, of its length
_ROUNDING = 64.0  # times the machine's epsilon and the size of the coordinates: shooting resolves no more


class LogMap(NamedTuple):
    """Logarithms, and how they were reached.

    Attributes:
        velocity: ``Log_{z1}(z2) (..., d)``; NaN where the pair did not converge.
        converged: Whether shooting reached ``z2`` to the tolerance, by a geodesic that may be the shortest
            and that the steps resolve, ``(...)``.
        residual: The largest coordinate of ``Exp_{z1}(velocity) - z2`` (for a pair that did not converge:
            at the last velocity tried), ``(...)``.
        iterations: Newton steps taken, ``(...)``, of type ``int64``.
        energy_drift: Of the geodesic that was shot, as in :class:`~riemvae.geometry.ExponentialMap`; NaN
            where none reached ``z2``, ``(...)``.
    """

    velocity: Tensor
    converged: Tensor
    residual: Tensor
    iterations: Tensor
    energy_drift: Tensor


@overload
def log_map(
    metric: Metric,
    z1: Tensor,
    z2: Tensor,
    num_steps: int = 20,
    *,
    tolerance: float | None = None,
    max_iterations: int = 30,
    start: Tensor | None = None,
    full: Literal[False] = False,
) -> Tensor: ...


@overload
def log_map(
    metric: Metric,
    z1: Tensor,
    z2: Tensor,
    num_steps: int = 20,
    *,
    tolerance: float | None = None,
    max_iterations: int = 30,
    start: Tensor | None = None,
    full: Literal[True],
) -> LogMap: ...


def log_map(
    metric: Metric,
    z1: Tensor,
    z2: Tensor,
    num_steps: int = 20,
    *,
    tolerance: float | None = None,
    max_iterations: int = 30,
    start: Tensor | None = None,
    full: bool = False,
) -> Tensor | LogMap:
    r"""The velocity ``v = Log_{z1}(z2)``, with ``Exp_{z1}(v) = z2``.

    Newton's method on ``Exp_{z1}(v) - z2``, all pairs at once, with the exact derivative of the map that
    :func:`~riemvae.geometry.exponential_map` computes. Steps are halved until the correction shrinks (natural
    monotonicity: measured as velocities, so that it does not depend on the chart). Finished pairs are
    dropped.

    A pair starts from ``start``, or else from the discretised shortest path of
    :func:`~riemvae.geometry.geodesic`, and from the straight line if that fails. What is found is refused
    where it is not the shortest: past a conjugate point (a derivative with a negative determinant) or longer
    than that path (which is not asked for when ``start`` is given). What changes its energy by more than a
    hundredth is refused too: it joins the points, but with so few steps it is no geodesic.

    Gradients with respect to the points and the metric flow by the implicit function theorem: first
    derivatives are exact, and the Newton iterations keep no graph.

    Args:
        metric: The metric, twice differentiable.
        z1: Points ``(..., d)``.
        z2: Points ``(..., d)``, broadcast against ``z1``.
        num_steps: Steps of each exponential map (RK4).
        tolerance: Of ``Exp_{z1}(v) - z2`` in its largest coordinate, relative to that of ``z2 - z1``; None:
            1e-9 in double precision, 1e-4 in single. Rounding of the coordinates is allowed for.
        max_iterations: Newton steps a start.
        start: Velocities ``(..., d)`` to start from in place of the two starts above.
        full: Whether to return convergence, residuals and iterations too.

    Returns:
        The velocities ``(..., d)``, or a :class:`LogMap`. Coincident points give zero. A pair that does not
        converge gives NaN, and a warning counts such pairs.

    Raises:
        ValueError: Shapes that do not fit, or numbers out of range.

    Source: Deuflhard (2011), Newton Methods for Nonlinear Problems, section 3.3 (natural monotonicity).

    Example:
        >>> from riemvae.geometry import Metric
        >>> class HalfPlane(Metric):
        ...     latent_dim = 2
        ...     def inverse(self, z):
        ...         return z[..., 1, None, None] ** 2 * torch.eye(2)
        >>> log_map(HalfPlane(), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0])).round(decimals=3)
        tensor([0.0000, 0.6930])
    """
    z1, z2 = broadcast_tangent(metric, z1, z2, "z2")
    check_count("num_steps", num_steps)
    check_count("max_iterations", max_iterations)
    if tolerance is None:
        tolerance = 1e-9 if z1.dtype == torch.float64 else 1e-4
    check_positive("tolerance", tolerance)
    if start is not None:
        start = _checked_start(start, z1)
    d = z1.shape[-1]
    flat1, flat2 = z1.reshape(-1, d), z2.reshape(-1, d)
    with torch.no_grad():
        found = _Pairs(metric, flat1.detach(), flat2.detach(), num_steps, tolerance, max_iterations)
        found.solve(None if start is None else start.detach().reshape(-1, d))
        velocity = found.velocity.masked_fill(~found.converged[:, None], torch.nan)
    if differentiated(metric, z1, z2):
        velocity = _with_gradient(metric, flat1, flat2, velocity, found, num_steps)
    failed = int((~found.converged).sum())
    if failed:
        warnings.warn(
            f"log_map: {failed} of {len(flat1)} pairs did not converge and give NaN; take more steps or "
            "iterations, or pass a start",
            RuntimeWarning,
            stacklevel=2,
        )
    velocity = velocity.reshape(z1.shape)
    if not full:
        return velocity
    batch = z1.shape[:-1]
    rest = (found.converged, found.residual, found.iterations, found.energy_drift)
    return LogMap(velocity, *(x.reshape(batch) for x in rest))


def _checked_start(start: Tensor, z: Tensor) -> Tensor:
    try:
        return start.to(z.dtype).expand(z.shape)
    except RuntimeError:
        raise argument_error(
            "start", f"velocities that broadcast to the shape of the pairs, {tuple(z.shape)}", start
        ) from None


def _with_gradient(
    metric: Metric, z1: Tensor, z2: Tensor, velocity: Tensor, found: _Pairs, num_steps: int
) -> Tensor:
    """One more Newton step that is connected to the points and the metric.

    At the solution its derivative is that of the implicit function: ``dv = -J⁻¹ (∂Exp - dz2)``.
    """
    rows = found.converged.nonzero().squeeze(-1)
    v = velocity[rows]
    end = exponential_map(metric, z1[rows], v, num_steps)
    correction = torch.linalg.solve(found.jacobian[rows], (z2[rows] - end).unsqueeze(-1)).squeeze(-1)
    return velocity.index_put((rows,), v + correction)


class _Pairs:
    """The pairs ``(n, d)`` of one call, and what is known of each."""

    def __init__(
        self,
        metric: Metric,
        z1: Tensor,
        z2: Tensor,
        num_steps: int,
        tolerance: float,
        max_iterations: int,
    ) -> None:
        self.metric, self.z1, self.z2 = metric, z1, z2
        self.num_steps, self.max_iterations = num_steps, max_iterations
        span = (z2 - z1).abs().amax(-1)
        size = torch.maximum(z1.abs().amax(-1), z2.abs().amax(-1))
        self.limit = tolerance * span + _ROUNDING * torch.finfo(z1.dtype).eps * size
        self.longest = torch.full_like(span, torch.inf)
        self.converged = span == 0
        self.velocity = torch.zeros_like(z1)
        self.residual = torch.where(torch.isfinite(span), torch.zeros_like(span), torch.nan)
        self.iterations = torch.zeros(len(z1), dtype=torch.long, device=z1.device)
        d = z1.shape[-1]
        self.jacobian = torch.eye(d, dtype=z1.dtype, device=z1.device).repeat(len(z1), 1, 1)
        self.solvable = torch.isfinite(span)
        self.energy_drift = torch.where(self.converged, 0.0, torch.nan).to(span)

    def solve(self, start: Tensor | None) -> None:
        """Shoots all pairs and refuses what the steps do not resolve."""
        rows = self._open()
        if start is None:
            self._shoot(rows)
        else:
            self._newton(rows, start[rows])
        rows = rows[self.converged[rows]]
        drift = in_chunks(self.metric, self.z1[rows], self.velocity[rows], self.num_steps, full=True)[3]
        self.energy_drift[rows], self.converged[rows] = drift, drift <= _RESOLVED

    def _shoot(self, rows: Tensor) -> None:
        if len(rows) == 0:
            return
        curves = _shortest_paths(self.metric, self.z1[rows], self.z2[rows])
        self.longest[rows] = curves.length * (1.0 + _MARGIN + 2.0 * curves.discretisation_error)
        self._newton(rows, curves.initial_velocity)
        rows = self._open()
        self._newton(rows, _along_line(self.metric, self.z1[rows], self.z2[rows]))

    def _open(self) -> Tensor:
        return (self.solvable & ~self.converged).nonzero().squeeze(-1)

    def _newton(self, rows: Tensor, v: Tensor) -> None:
        """Damped Newton iterations of the pairs ``rows`` from velocities ``v``."""
        for iteration in range(self.max_iterations + 1):
            if len(rows) == 0:
                return
            z1, z2 = self.z1[rows], self.z2[rows]
            end, jacobian = exponential_map_and_jacobian(self.metric, z1, v, self.num_steps)
            missing = z2 - end
            residual = missing.abs().amax(-1)
            self.velocity[rows], self.jacobian[rows], self.residual[rows] = v, jacobian, residual
            going = ~(residual <= self.limit[rows])
            # What is past a conjugate point, or longer than a curve that is known, is not the shortest.
            shortest = (torch.linalg.det(jacobian) > 0) & (self.metric.norm(z1, v) <= self.longest[rows])
            self.converged[rows] = ~going & shortest
            if iteration == self.max_iterations:
                return
            rows = rows[going]
            self.iterations[rows] += 1
            moved, v = _damped_step(
                self.metric, z1[going], z2[going], v[going], jacobian[going], missing[going], self.num_steps
            )
            rows = rows[moved]


def _damped_step(
    metric: Metric, z1: Tensor, z2: Tensor, v: Tensor, jacobian: Tensor, missing: Tensor, num_steps: int
) -> tuple[Tensor, Tensor]:
    """Newton's step, halved for each pair until the correction after it is smaller.

    Returns:
        Indices of the pairs for which there is such a step, and their new velocities.
    """
    inverse, _ = torch.linalg.inv_ex(jacobian)
    tensor = metric.tensor(z1)
    step = _times(inverse, missing)
    size = _length(tensor, step)
    result = v.clone()
    # Where even the end point is not finite, the velocity is too long to tell a direction.
    moved = ~torch.isfinite(missing).all(-1)
    result[moved] = 0.25 * v[moved]
    open_ = torch.isfinite(size).nonzero().squeeze(-1)
    share = 1.0
    for _ in range(_HALVINGS):
        if len(open_) == 0:
            break
        trial = v[open_] + share * step[open_]
        (end,) = in_chunks(metric, z1[open_], trial, num_steps)
        after = _length(tensor[open_], _times(inverse[open_], z2[open_] - end))
        good = after <= (1.0 - 0.25 * share) * size[open_]
        result[open_[good]], moved[open_[good]] = trial[good], True
        open_, share = open_[~good], 0.5 * share
    return moved.nonzero().squeeze(-1), result[moved]


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _length(tensor: Tensor, v: Tensor) -> Tensor:
    return (v * _times(tensor, v)).sum(-1).sqrt()


# -- starts ------------------------------------------------------------------------------------------------


def _shortest_paths(metric: Metric, z1: Tensor, z2: Tensor) -> Geodesic:
    """Discretised shortest paths; that one may be good enough to start from only need not be told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return geodesic(metric, z1, z2, refine=True)


def _along_line(metric: Metric, z1: Tensor, z2: Tensor) -> Tensor:
    """The direction of the straight line, with the line's length."""
    u = z2 - z1
    times = torch.linspace(0.0, 1.0, _LINE_NODES, dtype=u.dtype, device=u.device)
    norms = metric.norm(z1 + times[:, None, None] * u, u)
    return u * (torch.trapezoid(norms, times, dim=0) / norms[0]).unsqueeze(-1)
