"""Samplers of latent points along a metric: uniform, random walk, and Riemannian HMC."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from riemvae._checks import argument_error, check_count
from riemvae._recipe import recipe
from riemvae.distributions.inverse_volume import InverseVolume
from riemvae.distributions.riemannian_uniform import RiemannianUniform
from riemvae.geometry import Metric
from riemvae.sampling.chain_sampler import ChainSampler
from riemvae.sampling.kernel import HMC
from riemvae.sampling.random_walk import HeuristicRandomWalk, RiemannianRandomWalk
from riemvae.sampling.riemannian_hmc import RiemannianHMC


@recipe
class UniformSampler(ChainSampler):
    r"""Draws latent points from the Riemannian uniform distribution ``√det G`` (chapter 3, algorithm 5).

    It is for a metric whose volume element is *large* near data (eq. 3.6,
    :class:`~riemvae.geometry.PosteriorMetric`): points are uniform for the metric's own volume. Every draw
    is the end of a finite chain of HMC started from a random centroid, with the thesis's settings by
    default: 100 transitions of 10 leapfrog steps of 0.01. The chains do not reach equilibrium, which keeps
    them near data.

    Args:
        metric: the frozen metric.
        num_steps: transitions of each chain.
        num_leapfrog: leapfrog steps of a transition.
        step_size: leapfrog step; ``"adapt"`` adapts it to an acceptance of 0.95.
        radius: of a ball to keep to, as :class:`~riemvae.distributions.RiemannianUniform` takes it; needed
            where the metric does not decay.
        start: points ``(k, d)`` to start from at random, in place of the centroids.
        warmup: transitions that adapt the step size, on chains of their own.
        block_size: chains that run at once; bounds the memory.
        progress: shows a bar.
        keep_trace: keeps every transition of the last call in :attr:`trace`.

    Attributes:
        report: the :class:`~riemvae.sampling.SamplingReport` of the last call; ``None`` before it.
        trace: the whole chains of the last call, samples ``(num_steps, n, d)``; ``None`` where it was not
            kept.

    Raises:
        ValueError: on arguments out of range, an improper density (no radius and no decay), or no start
            points.

    Source: Chadebec and Allassonnière (2022), algorithm 5 of the thesis.

    Example:
        >>> import torch
        >>> from riemvae.geometry import EuclideanMetric
        >>> _ = torch.manual_seed(0)
        >>> sampler = UniformSampler(EuclideanMetric(2), radius=1.0, start=torch.zeros(1, 2), step_size=0.1)
        >>> z = sampler.sample(500)
        >>> bool(abs(z.square().sum(-1).mean() - 0.5) < 0.06)  # uniform on the disc
        True
    """

    def __init__(
        self,
        metric: Metric,
        *,
        num_steps: int = 100,
        num_leapfrog: int = 10,
        step_size: float | str = 0.01,
        radius: float | None = None,
        start: Tensor | None = None,
        warmup: int = 200,
        block_size: int = 2_000,
        progress: bool = False,
        keep_trace: bool = False,
    ) -> None:
        super().__init__(
            metric,
            RiemannianUniform(metric, radius),
            num_steps=num_steps,
            step_size=step_size,
            start=start,
            warmup=warmup,
            block_size=block_size,
            progress=progress,
            keep_trace=keep_trace,
        )
        self.radius = radius
        self.num_leapfrog = check_count("num_leapfrog", num_leapfrog)

    def _kernel(self) -> tuple[HMC, bool]:
        density, adapting = self.density, self.step_size == "adapt"
        kernel = HMC(
            density.log_density_and_gradient,
            0.01,
            self.num_leapfrog,
            jitter=0.1 if adapting else 0.0,
            gradient=density.log_density_gradient,
        )
        return kernel, adapting


@recipe
class RandomWalkSampler(ChainSampler):
    r"""Draws latent points from ``√det G⁻¹`` on a ball by a random walk along geodesics (chapter 2).

    Every draw is the end of a finite walk started from a random centroid. By default the walk is the exact
    one, :class:`~riemvae.sampling.random_walk.RiemannianRandomWalk`, which leaves the density invariant;
    ``heuristic=True`` is the thesis's algorithm 3 as written, which does not (see
    :class:`~riemvae.sampling.random_walk.HeuristicRandomWalk` for what it samples).

    Args:
        metric: the frozen metric.
        heuristic: algorithm 3 as written, in place of the exact walk.
        num_steps: transitions of each chain; the thesis takes 200.
        scale: factor of the velocities; ``"adapt"`` adapts it to an acceptance of 0.5.
        covariance: Σ of the velocities in coordinates, ``(d, d)``; ``"metric"`` adapts it to ``G⁻¹(z)``, for
            the exact walk only. ``None`` is the identity for the heuristic and ``"metric"`` for the exact
            walk.
        num_geodesic_steps: integration steps of a geodesic; ``None`` is the kernel's own.
        radius: of the ball; ``None`` is twice the largest norm of the centroids.
        start: points ``(k, d)`` to start from at random, in place of the centroids.
        warmup: transitions that adapt the scale, on chains of their own.
        block_size: chains that run at once; bounds the memory.
        progress: shows a bar.
        keep_trace: keeps every transition of the last call in :attr:`trace`.

    Attributes:
        report: the :class:`~riemvae.sampling.SamplingReport` of the last call; ``None`` before it.
        trace: the whole chains of the last call, samples ``(num_steps, n, d)``; ``None`` where it was not
            kept.

    Raises:
        ValueError: on arguments out of range, no radius, or no start points.

    Source: Chadebec and Allassonnière (2023), section 2.3 and algorithm 3 of the thesis.

    Example:
        >>> import torch
        >>> from riemvae.geometry import CentroidMetric
        >>> _ = torch.manual_seed(0)
        >>> metric = CentroidMetric(torch.randn(20, 2), 0.3 * torch.eye(2).expand(20, 2, 2), temperature=0.8)
        >>> sampler = RandomWalkSampler(metric, num_steps=20)
        >>> sampler.sample(50).shape, sampler.report.not_converged
        (torch.Size([50, 2]), 0)
    """

    _step_name = "scale"

    def __init__(
        self,
        metric: Metric,
        *,
        heuristic: bool = False,
        num_steps: int = 200,
        scale: float | str = 1.0,
        covariance: Tensor | str | None = None,
        num_geodesic_steps: int | None = None,
        radius: float | None = None,
        start: Tensor | None = None,
        warmup: int = 200,
        block_size: int = 2_000,
        progress: bool = False,
        keep_trace: bool = False,
    ) -> None:
        density = InverseVolume(metric, radius)
        super().__init__(
            metric,
            density,
            num_steps=num_steps,
            step_size=scale,
            start=start,
            warmup=warmup,
            block_size=block_size,
            progress=progress,
            keep_trace=keep_trace,
        )
        if heuristic and isinstance(covariance, str):
            raise argument_error(
                "covariance",
                "a matrix (d, d) or None for the heuristic walk",
                covariance,
                "pass heuristic=False to adapt it to the metric",
            )
        self.heuristic = bool(heuristic)
        self.scale, self.covariance = scale, covariance
        self.num_geodesic_steps = num_geodesic_steps
        self.radius = density.radius
        self._kernel()  # refuses what the kernel refuses, now

    def _kernel(self) -> tuple[HeuristicRandomWalk | RiemannianRandomWalk, bool]:
        options: dict[str, Any] = {}
        if self.num_geodesic_steps is not None:
            options["num_steps"] = self.num_geodesic_steps
        if self.covariance is not None:
            options["covariance"] = self.covariance
        adapting = self.scale == "adapt"
        if self.heuristic:
            return HeuristicRandomWalk(self.metric, radius=self.radius, **options), adapting
        return RiemannianRandomWalk(self.density, self.metric, **options), adapting


@recipe
class RiemannianHMCSampler(ChainSampler):
    r"""Draws latent points from ``√det G⁻¹`` on a ball with the metric itself as the mass.

    Where :class:`~riemvae.sampling.ManifoldSampler` moves by the same step everywhere, a step here is long
    where the metric is small (near data) and short where it is large (far away). Every draw is the end of a
    finite chain of :class:`~riemvae.sampling.riemannian_hmc.RiemannianHMC` started from a random centroid.

    Args:
        metric: the frozen metric.
        num_steps: transitions of each chain.
        num_leapfrog: generalized leapfrog steps of a transition.
        step_size: leapfrog step, in units of the metric's length; ``"adapt"`` adapts it to an acceptance of
            0.95.
        radius: of the ball; ``None`` is twice the largest norm of the centroids.
        start: points ``(k, d)`` to start from at random, in place of the centroids.
        check_reversal: as for the kernel.
        warmup: transitions that adapt the step size, on chains of their own.
        block_size: chains that run at once; bounds the memory.
        progress: shows a bar.
        keep_trace: keeps every transition of the last call in :attr:`trace`.

    Attributes:
        report: the :class:`~riemvae.sampling.SamplingReport` of the last call; ``None`` before it.
        trace: the whole chains of the last call, samples ``(num_steps, n, d)``; ``None`` where it was not
            kept.

    Raises:
        ValueError: on arguments out of range, no radius, or no start points.

    Source: Girolami and Calderhead (2011), on eq. 1.8 of the thesis.

    Example:
        >>> import torch
        >>> from riemvae.geometry import CentroidMetric
        >>> _ = torch.manual_seed(0)
        >>> metric = CentroidMetric(torch.randn(20, 2), 0.3 * torch.eye(2).expand(20, 2, 2), temperature=0.8)
        >>> sampler = RiemannianHMCSampler(metric, num_steps=20)
        >>> sampler.sample(50).shape, sampler.report.divergences
        (torch.Size([50, 2]), 0)
    """

    def __init__(
        self,
        metric: Metric,
        *,
        num_steps: int = 100,
        num_leapfrog: int = 10,
        step_size: float | str = 0.1,
        radius: float | None = None,
        start: Tensor | None = None,
        check_reversal: bool = True,
        warmup: int = 200,
        block_size: int = 2_000,
        progress: bool = False,
        keep_trace: bool = False,
    ) -> None:
        density = InverseVolume(metric, radius)
        super().__init__(
            metric,
            density,
            num_steps=num_steps,
            step_size=step_size,
            start=start,
            warmup=warmup,
            block_size=block_size,
            progress=progress,
            keep_trace=keep_trace,
        )
        self.radius = density.radius
        self.num_leapfrog = check_count("num_leapfrog", num_leapfrog)
        self.check_reversal = bool(check_reversal)

    def _kernel(self) -> tuple[RiemannianHMC, bool]:
        density, adapting = self.density, self.step_size == "adapt"
        kernel = RiemannianHMC(
            density.log_density_and_gradient,
            self.metric,
            0.1,
            self.num_leapfrog,
            jitter=0.1 if adapting else 0.0,
            check_reversal=self.check_reversal,
        )
        return kernel, adapting
