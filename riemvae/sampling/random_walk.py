"""Random walks along geodesics: the thesis's heuristic, and one that leaves its target invariant."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_choice, check_count, check_positive
from riemvae.distributions.inverse_volume import InverseVolume
from riemvae.geometry import LocalMetric, Metric
from riemvae.geometry.exponential import exponential_map
from riemvae.sampling.kernel import (
    ChainState,
    TransitionInfo,
    check_position,
    column,
    log_density_of,
    metropolis,
)
from riemvae.sampling.riemannian_hmc import Trajectory, default_tolerance, implicit_trajectory, reverses


def check_covariance(covariance: Tensor, d: int) -> None:
    """Refuses what is not a symmetric positive-definite matrix ``(d, d)``."""
    expected = f"a symmetric positive-definite matrix ({d}, {d})"
    if not isinstance(covariance, Tensor) or tuple(covariance.shape) != (d, d):
        raise argument_error("covariance", expected, covariance)
    symmetric = torch.allclose(covariance, covariance.mT, rtol=1e-4, atol=1e-6)
    if not symmetric or int(torch.linalg.cholesky_ex(covariance.detach())[1]) > 0:
        raise argument_error("covariance", expected, "one that is not")


@dataclass(frozen=True, eq=False)
class HeuristicRandomWalk:
    r"""The Riemannian random walk of the thesis's algorithm 3, as written: a heuristic.

    A velocity ``v ~ N(0, Σ)`` is drawn in coordinates, and ``z̃ = Exp_z(v)`` is accepted with probability

    .. math:: \alpha(\tilde z, z) = \min\left(1,
        \frac{\sqrt{\det G^{-1}(\tilde z)}}{\sqrt{\det G^{-1}(z)}}\right).

    **What it samples is not** :math:`\sqrt{\det G^{-1}}`, not even as :math:`Σ \to 0`: the proposal is not
    symmetric, and its density is left out of the ratio. To second order in ``v`` the walk is a diffusion with
    drift :math:`\tfrac12 Σ^{kl} ∂_l \log\sqrt{\det G^{-1}} - \tfrac12 Γ^k_{ij} Σ^{ij}`, the second term from
    the bending of geodesics. In one dimension it is stationary for :math:`\det G^{-1}`, the *square* of what
    is aimed at; for a conformal metric :math:`G = g I` and Σ = I in dimension d, for
    :math:`g^{-1} = (\det G^{-1})^{1/d}` (which is the aim at d = 2 only). :class:`RiemannianRandomWalk` is
    the exact one.

    The state's ``log_density`` is :math:`\log\sqrt{\det G^{-1}}`, its ``gradient`` is unused (zeros).

    Args:
        metric: ``G``.
        scale: factor of the velocities, a number or a tensor of shape ``()`` or ``(C,)``.
        covariance: Σ, of shape ``(d, d)``; ``None`` is the identity.
        radius: of the ball S of eq. 2.2, outside of which the density is zero; ``None`` is no bound.
        num_steps: steps of the integration of a geodesic.
        method: as :func:`~riemvae.geometry.exponential.exponential_map` takes it.

    Raises:
        ValueError: on numbers out of range, or a covariance that is not a symmetric positive-definite matrix.

    Source: Chadebec and Allassonnière (2023), algorithm 3 of the thesis.

    Example:
        >>> from riemvae.geometry import CentroidMetric
        >>> _ = torch.manual_seed(0)
        >>> metric = CentroidMetric(torch.randn(5, 2), torch.eye(2).expand(5, 2, 2))
        >>> kernel = HeuristicRandomWalk(metric, scale=0.3)
        >>> state, info = kernel(kernel.init(torch.zeros(10, 2)))
        >>> state.position.shape
        torch.Size([10, 2])
    """

    metric: Metric
    scale: float | Tensor = 1.0
    covariance: Tensor | None = None
    radius: float | None = None
    num_steps: int = 20
    method: str = "rk4"

    target_acceptance: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)
        if self.covariance is not None:
            check_covariance(self.covariance, self.metric.latent_dim)
        if self.radius is not None:
            check_positive("radius", self.radius)
        check_count("num_steps", self.num_steps)

    @torch.no_grad()
    def init(self, position: Tensor) -> ChainState:
        """The state of chains at ``position`` of shape ``(C, d)``."""
        return ChainState(check_position(position), self._log_density(position), torch.zeros_like(position))

    def _log_density(self, z: Tensor) -> Tensor:
        log_density = -self.metric.log_volume(z)
        if self.radius is None:
            return log_density
        return log_density.masked_fill(torch.linalg.vector_norm(z, dim=-1) > self.radius, -math.inf)

    @torch.no_grad()
    def __call__(self, state: ChainState) -> tuple[ChainState, TransitionInfo]:
        """One transition of every chain."""
        velocity = torch.randn_like(state.position)
        if self.covariance is not None:
            velocity = velocity @ torch.linalg.cholesky(self.covariance.to(velocity)).mT
        velocity = column(self.scale) * velocity
        with warnings.catch_warnings():  # points that are lost are counted here
            warnings.filterwarnings("ignore", message="exponential_map: .*not finite")
            position = exponential_map(
                self.metric, state.position, velocity, self.num_steps, method=self.method
            )
        diverged = ~torch.isfinite(position).all(-1)
        position = torch.where(diverged.unsqueeze(-1), state.position, position)
        proposal = ChainState(position, self._log_density(position), state.gradient)
        return metropolis(state, proposal, state.log_density - proposal.log_density, diverged)


@dataclass(frozen=True, eq=False)
class RiemannianRandomWalk:
    r"""A random walk along geodesics that leaves a density exactly invariant.

    A momentum ``p`` is drawn, the geodesic flow of :math:`\tfrac12 p^\top G^{-1}(z) p` takes ``(z, p)`` to
    ``(z̃, p̃)`` in unit time, and ``z̃`` is accepted with probability

    .. math:: \min\left(1, \frac{\pi(\tilde z)\, q(\tilde p \mid \tilde z)}{\pi(z)\, q(p \mid z)}\right).

    The flow is followed by the generalized leapfrog, which preserves volume in phase space and, with the
    momentum turned round, is its own inverse; and ``q`` is even in ``p``. So this ratio is the exact one
    (Metropolis, Hastings and Green), integration error included.

    The law of the velocities :math:`v = G^{-1} p` is the thesis's open question of Σ "adapted to G":

    - ``covariance="metric"``: ``v ~ N(0, scale² G⁻¹(z))``, a round Gaussian in an orthonormal frame of the
      tangent space, ``p ~ N(0, scale² G(z))``. The proposal is symmetric for the Riemannian volume: with
      the exact flow, kinetic energy is conserved and the ratio is
      :math:`\frac{\pi(\tilde z)}{\pi(z)} \sqrt{\det G^{-1}(\tilde z) / \det G^{-1}(z)}`, which for
      :math:`\pi = \sqrt{\det G^{-1}}` is :math:`\det G^{-1}(\tilde z) / \det G^{-1}(z)`: no logarithm map
      is needed.
    - ``covariance=Σ``: ``v ~ N(0, scale² Σ)`` in coordinates, as in algorithm 3, the same everywhere:
      ``p ~ N(0, scale² G Σ G)``, whose density counts at both ends.

    The state's ``gradient`` is unused (zeros). A proposal for which an implicit step is not solved is refused
    and counted in ``info.not_converged``.

    Args:
        log_density: of the target π with respect to Lebesgue measure, up to a constant: a callable
            ``z (C, d) -> (C,)``, an object with such a method ``log_density`` (as ``InverseVolume``), or a
            distribution. ``None`` is ``InverseVolume(metric)``.
        metric: ``G``.
        scale: factor of the velocities, a number or a tensor of shape ``()`` or ``(C,)``.
        covariance: ``"metric"``, or Σ of shape ``(d, d)``.
        num_steps: leapfrog steps of a geodesic.
        tolerance: residual of the fixed points; ``None`` is the number type's ``ε^(3/4)``.
        check_reversal: makes the way back (twice the work), and refuses proposals that do not come back, as
            for :class:`RiemannianHMC`.

    Raises:
        ValueError: on numbers out of range, or a covariance that is neither.

    Example:
        >>> from riemvae.geometry import CentroidMetric
        >>> _ = torch.manual_seed(0)
        >>> metric = CentroidMetric(torch.randn(5, 2), torch.eye(2).expand(5, 2, 2))
        >>> kernel = RiemannianRandomWalk(None, metric, scale=0.3)
        >>> state, info = kernel(kernel.init(torch.zeros(10, 2)))
        >>> state.position.shape, int(info.not_converged.sum())
        (torch.Size([10, 2]), 0)
    """

    log_density: Any
    metric: Metric
    scale: float | Tensor = 1.0
    covariance: Tensor | str = "metric"
    num_steps: int = 5
    tolerance: float | None = None
    check_reversal: bool = True

    _target: Callable[[Tensor], Tensor] = field(init=False, repr=False)
    _flow: _GeodesicFlow = field(init=False, repr=False)

    target_acceptance: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)
        if isinstance(self.covariance, Tensor):
            check_covariance(self.covariance, self.metric.latent_dim)
        else:
            check_choice("covariance", self.covariance, ["metric"])
        check_count("num_steps", self.num_steps)
        if self.tolerance is not None:
            check_positive("tolerance", self.tolerance)
        if self.log_density is None:
            object.__setattr__(self, "log_density", InverseVolume(self.metric))
        object.__setattr__(self, "_target", log_density_of(self.log_density))
        object.__setattr__(self, "_flow", _GeodesicFlow(self.metric))

    @torch.no_grad()
    def init(self, position: Tensor) -> ChainState:
        """The state of chains at ``position`` of shape ``(C, d)``."""
        return ChainState(check_position(position), self._target(position), torch.zeros_like(position))

    def draw_momentum(self, local: LocalMetric) -> Tensor:
        """A momentum ``p = G v`` of the kernel's law at the points of ``local``, ``(C, d)``."""
        noise = torch.randn_like(local.z)
        if not isinstance(self.covariance, Tensor):
            return column(self.scale) * local.momentum(noise)
        velocity = column(self.scale) * (noise @ torch.linalg.cholesky(self.covariance.to(noise)).mT)
        return (local.tensor @ velocity.unsqueeze(-1)).squeeze(-1)

    def momentum_log_density(self, local: LocalMetric, momentum: Tensor) -> Tensor:
        """The log density of a momentum at the points of ``local`` up to a constant, ``(C,)``."""
        velocity = local.velocity(momentum)
        if not isinstance(self.covariance, Tensor):
            square = (momentum * velocity).sum(-1)
            return -0.5 * square / self.scale**2 - local.log_volume
        factor = torch.linalg.cholesky(self.covariance.to(velocity))
        standard = torch.linalg.solve_triangular(factor, velocity.unsqueeze(-1), upper=False).squeeze(-1)
        # det (G Σ G)^(-1/2): the volume element counts twice.
        return -0.5 * standard.square().sum(-1) / self.scale**2 - 2 * local.log_volume

    @torch.no_grad()
    def geodesic(self, position: Tensor, momentum: Tensor) -> Trajectory:
        """The end of the flow after unit time, a reversible map that preserves volume in phase space.

        Args:
            position: ``(C, d)``.
            momentum: ``(C, d)``, covectors.
        """
        return self._follow(self.metric.at(position), momentum)

    def _follow(self, start: LocalMetric, momentum: Tensor) -> Trajectory:
        end = implicit_trajectory(
            _Nothing(),
            self._flow,
            _Kinetic(start),
            momentum,
            1 / self.num_steps,
            self.num_steps,
            self._solved(momentum),
        )
        return end._replace(local=end.local.plain)  # type: ignore[attr-defined]

    def _solved(self, like: Tensor) -> float:
        return default_tolerance(like.dtype) if self.tolerance is None else self.tolerance

    @torch.no_grad()
    def __call__(self, state: ChainState) -> tuple[ChainState, TransitionInfo]:
        """One transition of every chain."""
        start = self.metric.at(state.position)
        momentum = self.draw_momentum(start)
        end = self._follow(start, momentum)
        failed = end.failed
        if self.check_reversal:
            back = self._follow(end.local, -end.momentum)
            failed = ~reverses(end, back, state.position, momentum, self._solved(momentum))
        proposal = ChainState(end.position, self._target(end.position), state.gradient)
        error = (state.log_density - proposal.log_density) + (
            self.momentum_log_density(start, momentum) - self.momentum_log_density(end.local, end.momentum)
        )
        diverged = end.not_finite | torch.isnan(error)
        return metropolis(state, proposal, error, diverged, failed & ~diverged)


class _Kinetic(LocalMetric):
    """The local metric of the Hamiltonian ``½ pᵀ G⁻¹ p`` alone, without the volume that a Gaussian adds.

    It is what the generalized leapfrog gets with the potential ``-½ log det G``, for less.
    """

    def __init__(self, plain: LocalMetric) -> None:
        super().__init__(plain.metric, plain.z)
        self.plain = plain

    def velocity(self, v: Tensor) -> Tensor:
        return self.plain.velocity(v)

    def kinetic_gradient(self, v: Tensor) -> Tensor:
        return self.plain.pullback(0.5 * v.unsqueeze(-1) * v.unsqueeze(-2))


class _GeodesicFlow(Metric):
    """A metric as its geodesic flow sees it."""

    def __init__(self, metric: Metric) -> None:
        super().__init__(metric.latent_dim)
        self.metric = metric

    def at(self, z: Tensor) -> LocalMetric:
        return _Kinetic(self.metric.at(z))


class _Nothing:
    """The potential 0."""

    def __call__(self, z: Tensor) -> Tensor:
        return z.new_zeros(z.shape[:-1])

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self(z), torch.zeros_like(z)

    def gradient(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)
