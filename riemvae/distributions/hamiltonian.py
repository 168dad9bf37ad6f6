"""The extended posterior of a (Riemannian) Hamiltonian VAE as a distribution over positions and momenta."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution, TransformedDistribution, constraints
from torch import Tensor

from riemvae._checks import argument_error
from riemvae.distributions.momentum import MomentumNormal
from riemvae.distributions.transforms import Leapfrog, RiemannianLeapfrog
from riemvae.geometry import EuclideanMetric, Metric, Potential


class PhaseSpace(TorchDistribution):
    """Positions from ``position``, momenta from ``N(0, G(z))`` given them: ``(z, v)`` in one event ``(2d,)``.

    Args:
        position: A distribution of ``z`` with event ``(d,)``.
        metric: ``G``; the flat one if not given.

    Example:
        >>> import pyro.distributions as dist
        >>> PhaseSpace(dist.Normal(torch.zeros(2), 1.0).to_event(1)).sample((3,)).shape
        torch.Size([3, 4])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(self, position: TorchDistribution, metric: Metric | None = None) -> None:
        if len(position.event_shape) != 1:
            raise argument_error(
                "position",
                "a distribution with event shape (d,)",
                f"event shape {tuple(position.event_shape)}",
                "use .to_event(1)",
            )
        d = position.event_shape[0]
        metric = EuclideanMetric(d) if metric is None else metric
        if metric.latent_dim != d:
            raise argument_error("metric", f"a metric of latent dimension {d}", f"one of {metric.latent_dim}")
        self.position, self.metric = position, metric
        super().__init__(position.batch_shape, torch.Size([2 * d]), validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return bool(self.position.has_rsample)

    def expand(self, batch_shape: Any, _instance: object = None) -> PhaseSpace:
        return PhaseSpace(self.position.expand(torch.Size(batch_shape)), self.metric)

    def _with_momentum(self, z: Tensor) -> Tensor:
        return torch.cat([z, MomentumNormal(self.metric, z).rsample()], -1)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self._with_momentum(self.position.rsample(sample_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self._with_momentum(self.position.sample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        z, v = value.chunk(2, -1)
        return self.position.log_prob(z) + MomentumNormal(self.metric, z).log_prob(v)


class HamiltonianPosterior(TransformedDistribution):
    """The distribution of ``(z_K, v_K)`` after ``K`` Hamiltonian steps.

    They start from ``z_0 ~ position`` and ``γ ~ N(0, G(z_0))``.
    Its density is ``q(z_0) N(γ; 0, G(z_0))`` at the point that flows there: the scaling ``v_0 = γ/√β_0`` and
    the tempering cancel. With ``log p(x, z) = -potential(z)``,

    ``log ŵ = log p(x, z_K) + log N(v_K; 0, G(z_K)) - log_prob((z_K, v_K))``

    is an unbiased weight of ``p(x)``. Draws carry their log density (the transform keeps its last input), so
    that nothing is inverted.

    Args:
        position: A distribution of ``z_0`` with event ``(d,)``.
        potential: ``U = -log p(x, z)``: ``z (..., d) -> (...)``, or an object with ``value_and_gradient``.
        metric: ``G``; None is the flat metric with the explicit leapfrog.
        step_size: ``ε``.
        num_steps: ``K >= 0``.
        tempering: ``√β_0``; 1 is none.
        fixed_point_steps: Iterations of each implicit half step, for a metric.
        tolerance: Iterate to this residual instead, for a metric.

    Source: thesis, section 1.3.2, without the factor ``β_0^{-d/2}`` of its eq. 1.6, which belongs with the
    density of the scaled momentum; Caterini et al. (2018).

    Example:
        >>> import pyro.distributions as dist
        >>> position = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> def potential(z):
        ...     return 0.5 * ((z - 1) ** 2).sum(-1)
        >>> q = HamiltonianPosterior(position, potential, step_size=0.1, num_steps=3)
        >>> q.rsample((5,)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        position: TorchDistribution,
        potential: Potential,
        metric: Metric | None = None,
        *,
        step_size: float | Tensor,
        num_steps: int,
        tempering: float | Tensor = 1.0,
        fixed_point_steps: int = 3,
        tolerance: float | None = None,
    ) -> None:
        options = {"step_size": step_size, "num_steps": num_steps, "tempering": tempering}
        self.flow: Leapfrog | RiemannianLeapfrog
        if metric is None:
            self.flow = Leapfrog(potential, **options)  # type: ignore[arg-type]
        else:
            self.flow = RiemannianLeapfrog(
                potential,
                metric,
                fixed_point_steps=fixed_point_steps,
                tolerance=tolerance,
                **options,  # type: ignore[arg-type]
            )
        super().__init__(PhaseSpace(position, metric), [self.flow], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> HamiltonianPosterior:
        new = self._get_checked_instance(HamiltonianPosterior, _instance)
        new.flow = self.flow
        return super().expand(torch.Size(batch_shape), _instance=new)  # type: ignore[no-any-return]
