"""Parallel transport along the geodesics of a metric."""

from __future__ import annotations

import torch
from torch import Tensor

from riemvae._checks import check_choice, check_count
from riemvae.geometry.exponential import (
    METHODS,
    State,
    broadcast_tangent,
    differentiated,
    hamiltonian_slope,
    lowered,
    outer,
    runge_kutta_step,
)
from riemvae.geometry.metric import LocalMetric, Metric

_CHUNK = 1024  # points integrated at a time where nothing is differentiated


def parallel_transport(
    metric: Metric, z: Tensor, v: Tensor, w: Tensor, num_steps: int = 20, *, method: str = "rk4"
) -> Tensor:
    r"""Transports the vectors ``w`` at ``z`` along the geodesic ``t -> Exp_z(t v)`` to its end.

    The transport equation is integrated for the covector ``α = G w`` beside Hamilton's equations. With the
    velocity ``u = G⁻¹ q`` of the geodesic and ``w = G⁻¹ α``, ``∂_u`` the derivative along ``u``, it reads

    .. math:: \dot α = \tfrac12 G \bigl[(\partial_w G^{-1})\, q - (\partial_u G^{-1})\, α\bigr]
              - \tfrac12\, \partial_z (α^\top G^{-1} q)

    which is the usual one, ``ẇᵏ = -Γᵏ_ij uⁱ wʲ``, without the ``d³`` Christoffel symbols. Lengths and angles
    are preserved up to the error of the integration; ``v`` itself is transported to the velocity at the end
    exactly.

    Args:
        metric: The metric.
        z: Points ``(..., d)``.
        v: Velocities ``(..., d)`` of the geodesics, broadcast against ``z``.
        w: Vectors ``(..., d)`` to transport; further leading dimensions are several vectors a geodesic, which
            is integrated once.
        num_steps: Number of steps.
        method: ``"rk4"`` or ``"rk2"``, as for :func:`~riemvae.geometry.exponential_map`.

    Returns:
        Vectors at ``Exp_z(v)``, of the broadcast shape. Differentiable in all arguments.

    Raises:
        ValueError: Shapes that do not fit, or numbers out of range.

    Example:
        >>> from riemvae.geometry import Metric
        >>> class HalfPlane(Metric):
        ...     latent_dim = 2
        ...     def inverse(self, z):
        ...         return z[..., 1, None, None] ** 2 * torch.eye(2)
        >>> z, v = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])  # upwards to (0, e)
        >>> parallel_transport(HalfPlane(), z, v, torch.tensor([1.0, 0.0])).round(decimals=3)
        tensor([2.7180, 0.0000])
    """
    return exponential_map_and_transport(metric, z, v, w, num_steps, method=method)[1]


def exponential_map_and_transport(
    metric: Metric, z: Tensor, v: Tensor, w: Tensor, num_steps: int = 20, *, method: str = "rk4"
) -> tuple[Tensor, Tensor]:
    """``Exp_z(v)`` and the vectors ``w`` transported there, by one integration.

    Args:
        metric: The metric.
        z: Points ``(..., d)``.
        v: Velocities ``(..., d)``, broadcast against ``z``.
        w: Vectors as for :func:`parallel_transport`.
        num_steps: Number of steps.
        method: ``"rk4"`` or ``"rk2"``.

    Returns:
        The end points ``(..., d)``, in the shape of ``z`` and ``v``, and the vectors.

    Raises:
        ValueError: As :func:`parallel_transport`.

    Example:
        >>> from riemvae.geometry import EuclideanMetric
        >>> z, v = torch.zeros(2), torch.ones(2)
        >>> exponential_map_and_transport(EuclideanMetric(2), z, v, torch.eye(2), 1)[1]
        tensor([[1., 0.],
                [0., 1.]])
    """
    z, v = broadcast_tangent(metric, z, v)
    check_count("num_steps", num_steps)
    check_choice("method", method, METHODS[:2])
    _, w = broadcast_tangent(metric, z, w, "w")
    z, v = z.to(w.dtype), v.to(w.dtype)
    several = w.shape[: w.dim() - z.dim()]
    if w.shape[len(several) :] != z.shape:  # w has more points than there are geodesics
        z, v = (x.expand(w.shape[len(several) :]) for x in (z, v))
    d = z.shape[-1]
    flat_z, flat_v = z.reshape(-1, d), v.reshape(-1, d)
    vectors = w.reshape(several.numel(), -1, d)
    if differentiated(metric, z, v, w):
        end, moved = _transported(metric, flat_z, flat_v, vectors, num_steps, method, True)
    else:
        with torch.no_grad():
            parts = [
                _transported(metric, *chunk, num_steps, method, False)
                for chunk in zip(flat_z.split(_CHUNK), flat_v.split(_CHUNK), vectors.split(_CHUNK, 1))
            ]
        ends, vectors_there = zip(*parts)
        end, moved = torch.cat(ends), torch.cat(vectors_there, 1)
    return end.reshape(z.shape), moved.reshape(w.shape)


def _transported(
    metric: Metric, z: Tensor, v: Tensor, w: Tensor, num_steps: int, method: str, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """From points ``(n, d)`` along ``v (n, d)``: vectors ``w (m, n, d)``."""

    def slope(state: State) -> State:
        with torch.inference_mode(False), torch.enable_grad():
            p, q, *covectors = state if create_graph else (x.detach().clone() for x in state)
            local = metric.at(p)
            velocity, force = hamiltonian_slope(local, q)
            vectors = [local.velocity(a) for a in covectors]
            along, *across = _derivatives_along(local, [velocity, *vectors], create_graph)
            # What of α̇ is not symmetric in (u, q) and (w, α) vanishes for w = u.
            twists = [
                _times(local.tensor, _times(c, q) - _times(along, a)) for a, c in zip(covectors, across)
            ]
            pulled = [local.pullback(0.5 * (outer(a, q) + outer(q, a))) for a in covectors]
            rates = [0.5 * (twist - pull) for twist, pull in zip(twists, pulled)]
        slopes = (velocity, force, *rates)
        return slopes if create_graph else tuple(x.detach() for x in slopes)

    local = metric.at(z)
    state: State = (z, lowered(local, v), *(lowered(local, x) for x in w))
    for _ in range(num_steps):
        state = runge_kutta_step(slope, state, slope(state), 1.0 / num_steps, method)
    end, _, *covectors = state
    at_end = metric.at(end)
    if not covectors:
        return end, w
    return end, torch.stack([at_end.velocity(a) for a in covectors])


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _derivatives_along(local: LocalMetric, directions: list[Tensor], create_graph: bool) -> list[Tensor]:
    """``Σ_c u_c ∂(G⁻¹)/∂z_c (..., d, d)`` for each direction ``u (..., d)``.

    The pullback is linear in its matrix, ``M ↦ Σ_ab M_ab ∂(G⁻¹)_ab/∂z``: these are values of its transpose.
    """
    z = local.z
    matrix = z.new_zeros(*z.shape, z.shape[-1]).requires_grad_()
    pulled = local.pullback(0.5 * (matrix + matrix.mT))
    if not pulled.requires_grad:  # a constant metric
        return [torch.zeros_like(matrix)] * len(directions)
    return [
        torch.autograd.grad(pulled, matrix, u, create_graph=create_graph, retain_graph=True)[0]
        for u in directions
    ]
