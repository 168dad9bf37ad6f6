"""Hamiltonian flows as Pyro transforms over ``(z, v)``, concatenated in one event of size ``2d``."""

from __future__ import annotations

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor

from riemvae._checks import argument_error, check_count, check_positive
from riemvae.distributions.planar import Planar, Radial
from riemvae.geometry import (
    IntegratorInfo,
    Metric,
    Potential,
    generalized_leapfrog,
    inverse_temperatures,
    leapfrog,
)

__all__ = ["Leapfrog", "Planar", "Radial", "RiemannianLeapfrog"]


class _HamiltonianFlow(TransformModule):
    """What the two leapfrog transforms share: the split of the event, and the inverse by reversed momentum.

    Without tempering a reversible integrator is inverted by flipping the momentum, integrating and flipping
    back. With the tempering schedule the inverse runs step by step: undo the factor of step ``k``, then
    integrate one step backwards.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    autoregressive = False

    def __init__(
        self, potential: Potential, step_size: float | Tensor, num_steps: int, tempering: float | Tensor
    ) -> None:
        super().__init__(cache_size=1)
        if not isinstance(step_size, Tensor):
            check_positive("step_size", step_size)
        if not isinstance(tempering, Tensor):
            check_positive("tempering", tempering)
        # A potential that is a module registers, so that its parameters are found; any other callable is kept
        # as it is.
        self.potential = potential
        self.num_steps = check_count("num_steps", num_steps, minimum=0)
        self.step_size, self.tempering = step_size, tempering
        self.info: IntegratorInfo | None = None

    def _integrate(
        self, z: Tensor, v: Tensor, num_steps: int, tempering: float | Tensor
    ) -> tuple[Tensor, Tensor, IntegratorInfo]:
        raise NotImplementedError

    @staticmethod
    def _split(x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() == 0 or x.shape[-1] % 2:
            raise argument_error("x", "positions and momenta (z, v) in one last dimension 2d", x)
        z, v = x.chunk(2, -1)
        return z, v

    def _call(self, x: Tensor) -> Tensor:
        z, v, self.info = self._integrate(*self._split(x), self.num_steps, self.tempering)
        return torch.cat([z, v], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        schedule = inverse_temperatures(self.tempering, self.num_steps)
        z, v = self._split(y)
        self.info = None
        for k in reversed(range(self.num_steps)):
            z, v, info = self._integrate(z, -v * (schedule[k + 1] / schedule[k]), 1, 1.0)
            v = -v
            self.info = info if self.info is None else _worse(self.info, info)
        return torch.cat([z, v * schedule[0]], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Zero: each step preserves volume, and the factors of the tempering cancel over the whole map."""
        return x.new_zeros(x.shape[:-1])


def _worse(a: IntegratorInfo, b: IntegratorInfo) -> IntegratorInfo:
    """What two integrations in a row report together."""
    return b._replace(
        residual=torch.maximum(a.residual, b.residual),
        converged=a.converged & b.converged,
        diverged=a.diverged | b.diverged,
        iterations=max(a.iterations, b.iterations),
    )


class Leapfrog(_HamiltonianFlow):
    """``num_steps`` leapfrog steps of ``H = U(z) + ½ vᵀ v`` as a bijection of ``(z, v)``, event ``(2d,)``.

    The momentum that comes in is divided by ``√β_0``, and the tempering schedule gives the factor back step
    by step: the map preserves volume and its log-determinant is zero.

    Args:
        potential: ``U``: ``z (..., d) -> (...)``, or an object with ``value_and_gradient``.
        step_size: ``ε``, a number or a tensor that broadcasts against ``z``.
        num_steps: ``K >= 0``.
        tempering: ``√β_0``; 1 is none.

    Source: Caterini, Doucet and Sejdinovic (2018); thesis, eq. 1.9.

    Example:
        >>> flow = Leapfrog(lambda z: 0.5 * (z**2).sum(-1), step_size=0.1, num_steps=3, tempering=0.5)
        >>> x = torch.tensor([[1.0, -1.0, 0.3, 0.2]])
        >>> bool(torch.allclose(flow.inv(flow(x).clone()), x, atol=1e-5))
        True
    """

    def __init__(
        self,
        potential: Potential,
        *,
        step_size: float | Tensor,
        num_steps: int,
        tempering: float | Tensor = 1.0,
    ) -> None:
        super().__init__(potential, step_size, num_steps, tempering)

    def _integrate(
        self, z: Tensor, v: Tensor, num_steps: int, tempering: float | Tensor
    ) -> tuple[Tensor, Tensor, IntegratorInfo]:
        return leapfrog(self.potential, z, v, self.step_size, num_steps, tempering=tempering)


class RiemannianLeapfrog(_HamiltonianFlow):
    """``num_steps`` generalized leapfrog steps under a metric as a bijection of ``(z, v)``, event ``(2d,)``.

    At converged fixed points the map is reversible and its log-determinant is zero. With few iterations both
    hold up to an error that the metric's curvature decides; ``info`` of the last call reports the residual
    per datum.

    Args:
        potential: ``U``: ``z (..., d) -> (...)``, or an object with ``value_and_gradient``.
        metric: ``G``.
        step_size: ``ε``, a number or a tensor that broadcasts against ``z``.
        num_steps: ``K >= 0``.
        tempering: ``√β_0``; 1 is none.
        fixed_point_steps: Iterations of each implicit half step.
        tolerance: Iterate until the residual is at most this.

    Source: thesis, eq. 1.5; Girolami and Calderhead (2011).

    Example:
        >>> from riemvae.geometry import ConstantMetric
        >>> flow = RiemannianLeapfrog(
        ...     lambda z: 0.5 * (z**2).sum(-1), ConstantMetric(2 * torch.eye(1)), step_size=0.1, num_steps=3
        ... )
        >>> flow(torch.tensor([1.0, 0.0])).shape
        torch.Size([2])
    """

    def __init__(
        self,
        potential: Potential,
        metric: Metric,
        *,
        step_size: float | Tensor,
        num_steps: int,
        tempering: float | Tensor = 1.0,
        fixed_point_steps: int = 3,
        tolerance: float | None = None,
    ) -> None:
        super().__init__(potential, step_size, num_steps, tempering)
        self.metric = metric
        self.fixed_point_steps = check_count("fixed_point_steps", fixed_point_steps)
        self.tolerance = tolerance

    def _integrate(
        self, z: Tensor, v: Tensor, num_steps: int, tempering: float | Tensor
    ) -> tuple[Tensor, Tensor, IntegratorInfo]:
        return generalized_leapfrog(
            self.potential,
            self.metric,
            z,
            v,
            self.step_size,
            num_steps,
            self.fixed_point_steps,
            self.tolerance,
            tempering=tempering,
        )
