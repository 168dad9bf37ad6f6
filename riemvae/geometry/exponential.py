"""The exponential map of a metric: geodesics shot from points with velocities, in Hamiltonian form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_choice, check_count, check_last_dim, check_positive
from riemvae.geometry.metric import LocalMetric, Metric

State = tuple[Tensor, ...]
Slope = Callable[[State], State]

# Where nothing is differentiated so many points are integrated at a time: the bumps of a few hundred
# centroids then stay in cache, and memory does not grow with the number of points.
_CHUNK = 2048
# Derivatives keep several arrays a point.
_DERIVATIVE_CHUNK = 512
_MAXIMUM_STEPS = 500  # of the adaptive integrator between two times

METHODS = ("rk4", "rk2", "adaptive")


class ExponentialMap(NamedTuple):
    """Geodesics that were shot, and how well.

    Attributes:
        end: ``Exp_z(v) (..., d)``; NaN or infinite where the integration left the numbers.
        path: The geodesic at the times ``k/T``, ``(T + 1, ..., d)``.
        velocity: The velocity at the end, ``(..., d)``: of the same length as ``v``.
        energy_drift: The largest relative change of ``½ vᵀ G v`` at those times, ``(...)``; 0 for a velocity
            of zero. The exact flow conserves it: it tells whether there are enough steps.
    """

    end: Tensor
    path: Tensor
    velocity: Tensor
    energy_drift: Tensor

    @property
    def finite(self) -> Tensor:
        """Whether the end point and its velocity are finite, ``(...)``."""
        return torch.isfinite(self.end).all(-1) & torch.isfinite(self.velocity).all(-1)


@overload
def exponential_map(
    metric: Metric,
    z: Tensor,
    v: Tensor,
    num_steps: int = 20,
    *,
    method: str = "rk4",
    full: Literal[False] = False,
    rtol: float | None = None,
    atol: float | None = None,
) -> Tensor: ...


@overload
def exponential_map(
    metric: Metric,
    z: Tensor,
    v: Tensor,
    num_steps: int = 20,
    *,
    method: str = "rk4",
    full: Literal[True],
    rtol: float | None = None,
    atol: float | None = None,
) -> ExponentialMap: ...


def exponential_map(
    metric: Metric,
    z: Tensor,
    v: Tensor,
    num_steps: int = 20,
    *,
    method: str = "rk4",
    full: bool = False,
    rtol: float | None = None,
    atol: float | None = None,
) -> Tensor | ExponentialMap:
    r"""The point ``Exp_z(v)`` that the geodesic from ``z`` with velocity ``v`` reaches at time 1.

    Hamilton's equations of ``H(p, q) = ½ qᵀ G⁻¹(p) q`` are integrated from ``p = z``, ``q = G(z) v``:

    .. math:: \dot p = G^{-1}(p)\, q, \qquad \dot q = -\tfrac12\, \partial_p \bigl(q^\top G^{-1}(p)\, q\bigr)

    Gradients with respect to ``z``, ``v`` and what the metric is made of flow through the integration. Where
    nothing is to be differentiated no graph is built and points are taken in chunks.

    Args:
        metric: The metric; a closed-form ``pullback`` is used, any other is differentiated automatically.
        z: Starting points ``(..., d)``.
        v: Velocities ``(..., d)`` (vectors, not momenta), broadcast against ``z``.
        num_steps: ``T``, the number of steps of size ``1/T``. With ``"adaptive"`` it only sets the times of
            ``path``.
        method: ``"rk4"``, Runge and Kutta's of order 4; ``"rk2"``, the midpoint rule, as algorithm 2 has it;
            ``"adaptive"``, Dormand and Prince's of order 5 with error control (needs ``torchdiffeq``).
        full: Whether to return the path, the velocity and the energy drift too.
        rtol: Relative tolerance of ``"adaptive"``, held for the worst point; None: 1e-8 in double precision,
            1e-4 in single.
        atol: Absolute tolerance of ``"adaptive"``; None: a hundredth of ``rtol``.

    Returns:
        The end points ``(..., d)``, or an :class:`ExponentialMap`. A point whose integration diverges is NaN
        or infinite and leaves the others alone; with ``full=False`` a warning counts such points.

    Raises:
        ValueError: Shapes that do not fit, an unknown method, or numbers out of range.
        ImportError: ``"adaptive"`` without ``torchdiffeq``.

    Source: thesis, section 2.2 and algorithm 2; Louis (2019). RK4 with 20 steps costs less than the midpoint
    rule with 100 and is more exact.

    Example:
        >>> from riemvae.geometry import Metric
        >>> class HalfPlane(Metric):
        ...     latent_dim = 2
        ...     def inverse(self, z):
        ...         return z[..., 1, None, None] ** 2 * torch.eye(2)
        >>> exponential_map(HalfPlane(), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))  # (0, e)
        tensor([0.0000, 2.7183])
    """
    z, v = broadcast_tangent(metric, z, v)
    check_count("num_steps", num_steps)
    check_choice("method", method, METHODS)
    tolerances = _tolerances(z.dtype, rtol, atol)
    flat_z, flat_v = z.reshape(-1, z.shape[-1]), v.reshape(-1, z.shape[-1])
    if differentiated(metric, z, v):
        shot = _shoot(metric, flat_z, flat_v, num_steps, method, full, tolerances)
    else:
        with torch.no_grad():
            shot = in_chunks(metric, flat_z, flat_v, num_steps, method, full, tolerances)
    end = shot[0].reshape(z.shape)
    if not full:
        warn_if_not_finite(end, "exponential_map")
        return end
    _, path, velocity, drift = shot
    return ExponentialMap(
        end, path.reshape(-1, *z.shape), velocity.reshape(z.shape), drift.reshape(z.shape[:-1])
    )


def exponential_map_and_jacobian(
    metric: Metric, z: Tensor, v: Tensor, num_steps: int = 20, *, method: str = "rk4"
) -> tuple[Tensor, Tensor]:
    """``Exp_z(v)`` and its derivative ``∂Exp_z(v)/∂v``.

    The variational equations are integrated beside Hamilton's by the same scheme: the result is the exact
    derivative of the map that :func:`exponential_map` computes, not an approximation of the true map's, for
    any metric. No graph of the path is kept, so that memory does not grow with ``num_steps``. Both results
    can be differentiated themselves, with respect to ``z``, ``v`` and the metric; a graph is then kept.

    Args:
        metric: The metric, twice differentiable.
        z: Starting points ``(..., d)``.
        v: Velocities ``(..., d)``, broadcast against ``z``.
        num_steps: Number of steps.
        method: ``"rk4"`` or ``"rk2"``.

    Returns:
        ``(end, jacobian)`` of shapes ``(..., d)`` and ``(..., d, d)``: ``jacobian[..., i, j] = ∂end_i/∂v_j``.

    Raises:
        ValueError: As :func:`exponential_map`.

    Example:
        >>> from riemvae.geometry import EuclideanMetric
        >>> end, jacobian = exponential_map_and_jacobian(EuclideanMetric(2), torch.zeros(2), torch.ones(2))
        >>> jacobian.round(decimals=4)
        tensor([[1., 0.],
                [0., 1.]])
    """
    z, v = broadcast_tangent(metric, z, v)
    check_count("num_steps", num_steps)
    check_choice("method", method, METHODS[:2])
    flat_z, flat_v = z.reshape(-1, z.shape[-1]), v.reshape(-1, z.shape[-1])
    if differentiated(metric, z, v):
        end, jacobian = _sensitivities(metric, flat_z, flat_v, num_steps, method, True)
    else:
        with torch.no_grad():
            parts = [
                _sensitivities(metric, *pair, num_steps, method, False)
                for pair in zip(flat_z.split(_DERIVATIVE_CHUNK), flat_v.split(_DERIVATIVE_CHUNK))
            ]
        end, jacobian = (torch.cat(column) for column in zip(*parts))
    return end.reshape(z.shape), jacobian.reshape(*z.shape, z.shape[-1])


# -- shared with the logarithm and the transport -----------------------------------------------------------


def broadcast_tangent(metric: Metric, z: Tensor, v: Tensor, name: str = "v") -> tuple[Tensor, Tensor]:
    """Points and vectors ``(..., d)`` in one shape and dtype; refuses what does not fit."""
    d = metric.latent_dim
    for label, value in (("z", z), (name, v)):
        check_last_dim(label, value, d, "points and vectors have the metric's latent dimension last")
        if not value.is_floating_point():
            raise argument_error(label, "a tensor of floating-point numbers", value)
    try:
        shape = torch.broadcast_shapes(z.shape, v.shape)
    except RuntimeError:
        raise argument_error(
            name, f"a shape that broadcasts against that of z, {tuple(z.shape)}", v
        ) from None
    dtype = torch.promote_types(z.dtype, v.dtype)
    return z.to(dtype).expand(shape), v.to(dtype).expand(shape)


def differentiated(metric: Metric, *tensors: Tensor) -> bool:
    """Whether a gradient may be asked of what is computed from ``metric`` at these tensors."""
    if torch._C._are_functorch_transforms_active():
        return True
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    if any(t.requires_grad for t in tensors):
        return True
    # Parameters, tensors kept as plain attributes, closures: the matrix at one point tells for all of them.
    probe = tensors[0].detach().reshape(-1, metric.latent_dim)[:1]
    matrix = metric.inverse(probe) if metric.gives_inverse else metric.tensor(probe)
    return matrix.requires_grad


def outer(a: Tensor, b: Tensor) -> Tensor:
    """``a bᵀ``."""
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def hamiltonian_slope(local: LocalMetric, q: Tensor) -> State:
    """``(ṗ, q̇)`` of the geodesic flow."""
    return local.velocity(q), local.pullback(outer(-0.5 * q, q))


def lowered(local: LocalMetric, v: Tensor) -> Tensor:
    """The momentum ``G v`` of a velocity."""
    return (local.tensor @ v.unsqueeze(-1)).squeeze(-1)


def runge_kutta_step(slope: Slope, state: State, first: State, step: float, method: str) -> State:
    """One step of ``"rk4"`` or of ``"rk2"`` (the midpoint rule); ``first`` is the slope at ``state``."""
    middle = slope(_moved(state, first, 0.5 * step))
    if method == "rk2":
        return _moved(state, middle, step)
    third = slope(_moved(state, middle, 0.5 * step))
    fourth = slope(_moved(state, third, step))
    total = tuple(a + d + 2.0 * (b + c) for a, b, c, d in zip(first, middle, third, fourth))
    return _moved(state, total, step / 6.0)


def _moved(state: State, slope: State, step: float) -> State:
    return tuple(torch.add(x, k, alpha=step) for x, k in zip(state, slope))


def warn_if_not_finite(end: Tensor, name: str) -> None:
    """Counts the points ``(..., d)`` that are not finite in a warning, on behalf of the caller's caller."""
    if torch._C._are_functorch_transforms_active():
        return  # values cannot be inspected there
    bad = int((~torch.isfinite(end.detach())).any(-1).sum())
    if bad:
        warnings.warn(
            f"{name}: {bad} of {math.prod(end.shape[:-1])} results are not finite: the integration diverged, "
            "or a start point or velocity was not finite; take more steps, or shorter velocities",
            RuntimeWarning,
            stacklevel=3,
        )


# -- integration -------------------------------------------------------------------------------------------

_NO_TOLERANCES = (0.0, 0.0)


def in_chunks(
    metric: Metric,
    z: Tensor,
    v: Tensor,
    num_steps: int,
    method: str = "rk4",
    full: bool = False,
    tolerances: tuple[float, float] = _NO_TOLERANCES,
) -> tuple[Tensor, ...]:
    """The end points of ``z``, ``v (n, d)``, and with ``full`` all else, so many at a time and silently."""
    parts = [
        _shoot(metric, *pair, num_steps, method, full, tolerances)
        for pair in zip(z.split(_CHUNK), v.split(_CHUNK))
    ]
    return tuple(torch.cat(column, dim) for column, dim in zip(zip(*parts), (0, 1, 0, 0)))


def _shoot(
    metric: Metric,
    z: Tensor,
    v: Tensor,
    num_steps: int,
    method: str,
    full: bool,
    tolerances: tuple[float, float],
) -> tuple[Tensor, ...]:
    if method == "adaptive":
        return _adaptive(metric, z, v, num_steps if full else 1, *tolerances, full)
    return _fixed(metric, z, v, num_steps, method, full)


def _fixed(
    metric: Metric, z: Tensor, v: Tensor, num_steps: int, method: str, full: bool
) -> tuple[Tensor, ...]:
    """``num_steps`` equal steps from points ``(n, d)``: the end, and with ``full`` all else."""

    def slope(state: State) -> State:
        p, q = state
        return hamiltonian_slope(metric.at(p), q)

    local = metric.at(z)
    p, q = z, lowered(local, v)
    path, speeds = [p], []
    for _ in range(num_steps):
        first = hamiltonian_slope(local, q)
        if full:
            speeds.append((q * first[0]).sum(-1))
        p, q = runge_kutta_step(slope, (p, q), first, 1.0 / num_steps, method)
        if full:
            path.append(p)
        local = metric.at(p)
    if not full:
        return (p,)
    velocity = local.velocity(q)
    speeds.append((q * velocity).sum(-1))
    return p, torch.stack(path), velocity, _drift(torch.stack(speeds))


def _drift(speeds: Tensor) -> Tensor:
    """The largest relative change of squared speeds ``(T + 1, n)``; NaN where one is."""
    start = speeds[0]
    return (speeds - start).abs().amax(0) / start.clamp(min=torch.finfo(start.dtype).tiny)


def _tolerances(dtype: torch.dtype, rtol: float | None, atol: float | None) -> tuple[float, float]:
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None:
            check_positive(name, value)
    rtol = (1e-8 if dtype == torch.float64 else 1e-4) if rtol is None else rtol
    return rtol, 1e-2 * rtol if atol is None else atol


def _adaptive(
    metric: Metric, z: Tensor, v: Tensor, num_steps: int, rtol: float, atol: float, full: bool
) -> tuple[Tensor, ...]:
    """Dormand and Prince's method from points ``(n, d)``, with one step size for all of them."""
    d = z.shape[-1]

    def slope(_: Tensor, state: Tensor) -> Tensor:
        p, q = state.split(d, -1)
        return torch.cat(hamiltonian_slope(metric.at(p), q), -1)

    times = torch.linspace(0.0, 1.0, num_steps + 1, dtype=z.dtype, device=z.device)
    start = torch.cat([z, lowered(metric.at(z), v)], -1)
    states = _solved(slope, start, times, rtol, atol)
    path, momenta = states.split(d, -1)
    if not full:
        return (path[-1],)
    velocities = metric.at(path).velocity(momenta)
    return path[-1], path, velocities[-1], _drift((momenta * velocities).sum(-1))


def _solved(
    slope: Callable[[Tensor, Tensor], Tensor], start: Tensor, times: Tensor, rtol: float, atol: float
) -> Tensor:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(
            "exponential_map: method 'adaptive' needs torchdiffeq: pip install riemvae[ode], or use 'rk4'"
        ) from error
    if len(start) == 0:
        return start.expand(len(times), *start.shape)
    options = {"norm": _worst_point, "max_num_steps": _MAXIMUM_STEPS}
    try:
        return odeint(slope, start, times, rtol=rtol, atol=atol, method="dopri5", options=options)  # type: ignore[no-any-return]
    except AssertionError:  # how the solver says that its step size has vanished or its steps are used up
        if len(start) == 1:
            return torch.cat([start[None], torch.full_like(start, math.nan).expand(len(times) - 1, 1, -1)])
    # One point has spoiled the step size of all: it is found by halving.
    half = len(start) // 2
    parts = [_solved(slope, part, times, rtol, atol) for part in (start[:half], start[half:])]
    return torch.cat(parts, 1)


def _worst_point(error: Tensor) -> Tensor:
    """The largest root mean square of a point's error: a mean over points would let one of many be wrong."""
    if error.dim() < 2:
        return error.square().mean().sqrt()
    return error.square().mean(-1).sqrt().max()


# -- sensitivities -----------------------------------------------------------------------------------------


def _sensitivities(
    metric: Metric, z: Tensor, v: Tensor, num_steps: int, method: str, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """``Exp_z(v)`` and its Jacobian in ``v`` at points ``(n, d)``.

    A state holds ``(p, q)`` and their derivatives ``(δp, δq)``, each ``(d, n, d)``, along the ``d``
    directions of ``v``. The derivative of the field ``(∂_q H, -∂_p H)`` along a direction is, because the
    Hessian of ``H`` is symmetric, the gradient of ``∂_p H · δp + ∂_q H · δq``: one pass a direction through
    one graph.
    """

    def slope(state: State) -> State:
        p, q, dp, dq = state
        with torch.inference_mode(False), torch.enable_grad():
            # Aliases: q may have been computed from p, and the derivatives are partial ones.
            p, q = (x.clone() if create_graph else x.detach().clone().requires_grad_() for x in (p, q))
            if create_graph:
                p, q = (x if x.requires_grad else x.requires_grad_() for x in (p, q))
            by_p, by_q = _hamiltonian_gradient(metric, p, q)
            seconds = [_second(by_p, by_q, p, q, *pair, create_graph) for pair in zip(dp, dq)]
        if not create_graph:
            by_p, by_q = by_p.detach(), by_q.detach()
        through_p, through_q = (torch.stack(column) for column in zip(*seconds))
        return by_q, -by_p, through_q, -through_p

    local = metric.at(z)
    tensor = local.tensor
    d = z.shape[-1]
    dq = tensor.movedim(-1, 0)  # q = G v: the derivative along v_j is the column j
    state: State = (z, lowered(local, v), torch.zeros_like(dq), dq)
    for _ in range(num_steps):
        state = runge_kutta_step(slope, state, slope(state), 1.0 / num_steps, method)
    return state[0], state[2].movedim(0, -1).reshape(-1, d, d)


def _hamiltonian_gradient(metric: Metric, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    local = metric.at(p)
    velocity, force = hamiltonian_slope(local, q)
    return -force, velocity


def _second(
    by_p: Tensor, by_q: Tensor, p: Tensor, q: Tensor, dp: Tensor, dq: Tensor, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """The Hessian of ``H`` times ``(δp, δq)``."""
    outputs = [(by, d) for by, d in ((by_p, dp), (by_q, dq)) if by.requires_grad]
    gradients = torch.autograd.grad(
        [by for by, _ in outputs],
        (p, q),
        [d for _, d in outputs],
        create_graph=create_graph,
        retain_graph=True,
        allow_unused=True,
    )
    through_p, through_q = (torch.zeros_like(x) if g is None else g for x, g in zip((p, q), gradients))
    return through_p, through_q
