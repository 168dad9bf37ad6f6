"""Generation along the learned geometry: draws from the inverse volume element, and how far they go."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_choice, check_count, check_finite, check_positive
from riemvae._recipe import recipe
from riemvae.distributions.inverse_volume import InverseVolume, WeightedDraws, bumps_of
from riemvae.geometry import CentroidMetric, Metric
from riemvae.sampling.adaptation import DualAveraging, warm_up
from riemvae.sampling.chains import check_support, run_chains
from riemvae.sampling.kernel import HMC

FAR = 2.0
"""A point is far when it lies beyond this many temperatures from every centroid."""

_PAIRS = 1 << 22  # points times centroids held at once
_ADAPTING_CHAINS = 256


class SamplingReport(NamedTuple):
    """What happened in one call of :meth:`ManifoldSampler.sample`.

    Attributes:
        mode: ``"chains"`` or ``"exact"``.
        acceptance: mean acceptance probability over chains and transitions.
        divergences: number of divergent transitions.
        step_size: leapfrog step used.
        far_share: share of the draws beyond ``2T`` of all centroids; NaN where the metric has none.
        effective_starts: effective number of independent start points in mode ``"exact"``; ``None``
            elsewhere.
    """

    mode: str
    acceptance: float
    divergences: int
    step_size: float
    far_share: float
    effective_starts: float | None


class Estimate(NamedTuple):
    """A Monte Carlo estimate with its standard error."""

    value: float
    stderr: float


class RegularizationChoice(NamedTuple):
    """What :func:`choose_regularization` found.

    Attributes:
        regularization: the λ chosen.
        far_share: share of the exact target's mass beyond ``2T`` of all centroids at this λ.
        stderr: its standard error.
    """

    regularization: float
    far_share: float
    stderr: float


@recipe
class ManifoldSampler:
    r"""Draws latent points from ``√det G⁻¹`` on a ball (eq. 1.8) with Hamiltonian Monte Carlo.

    There are two modes, because in high dimensions the density puts most of its mass far from data: its value
    there, ``λ^{d/2}``, is small, but it fills a large ball.

    - ``"chains"``, the default, is what the thesis does: every draw is the end of a finite chain started from
      a random centroid (100 to 300 transitions of 10 to 15 leapfrog steps of 0.01 to 0.05). The chains do not
      reach equilibrium, and stay near data for that reason. How far they go is part of what this sampler is,
      so the step size is fixed (0.03 by default); an adapted one would make the draws depend on the
      acceptance rate.
    - ``"exact"`` draws from the density itself. Its modes are separated, and no local chain crosses between
      them or finds the share of the far mass. So starts are drawn by sampling-importance-resampling from a
      mixture that covers near and far (:meth:`~riemvae.distributions.InverseVolume.importance_sample`), and
      then moved by HMC transitions, with an adapted step, that leave the density invariant. The starts are
      exact up to the finite number of proposals; ``report.effective_starts`` says how many of them are worth
      an independent draw.

    Args:
        metric: the frozen metric.
        mode: ``"chains"`` or ``"exact"``.
        num_steps: transitions of each chain.
        num_leapfrog: leapfrog steps of a transition.
        step_size: leapfrog step; ``None`` is 0.03 for ``"chains"`` and adapted for ``"exact"``; ``"adapt"``
            adapts it to an acceptance of 0.95.
        radius: of the ball; ``None`` is twice the largest norm of the centroids.
        start: points ``(k, d)`` from which mode ``"chains"`` starts at random, in place of the centroids.
        num_proposals: proposals of the resampling in mode ``"exact"``; at least ten a draw are taken.
        warmup: transitions that adapt the step size, on chains of their own.
        block_size: chains that run at once; bounds the memory.
        progress: shows a bar.

    Attributes:
        report: the :class:`SamplingReport` of the last call of :meth:`sample`; ``None`` before it.

    Raises:
        ValueError: on arguments out of range, or a metric without centroids when ``radius`` or ``start`` are
            missing.

    Source: Chadebec, Thibeau-Sutre, Burgos and Allassonnière (2022), section 1.3.2 and appendix 1.8.2 of the
        thesis.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> metric = CentroidMetric(torch.randn(20, 2), 0.3 * torch.eye(2).expand(20, 2, 2), temperature=0.8)
        >>> sampler = ManifoldSampler(metric, num_steps=20)
        >>> sampler.sample(50).shape, sampler.report.divergences
        (torch.Size([50, 2]), 0)
    """

    def __init__(
        self,
        metric: Metric,
        mode: str = "chains",
        *,
        num_steps: int = 100,
        num_leapfrog: int = 15,
        step_size: float | str | None = None,
        radius: float | None = None,
        start: Tensor | None = None,
        num_proposals: int = 20_000,
        warmup: int = 200,
        block_size: int = 2_000,
        progress: bool = False,
    ) -> None:
        self.metric = metric
        self.mode = check_choice("mode", mode, ["chains", "exact"])
        self.num_steps = check_count("num_steps", num_steps)
        self.num_leapfrog = check_count("num_leapfrog", num_leapfrog)
        if isinstance(step_size, str):
            check_choice("step_size", step_size, ["adapt"])
        elif step_size is not None:
            check_positive("step_size", step_size)
        self.step_size = step_size
        self.density = InverseVolume(metric, radius)
        self.radius = self.density.radius
        self.start = start
        if mode == "chains" and start is None and getattr(metric, "centroids", None) is None:
            raise argument_error(
                "start",
                f"points to start from, since {type(metric).__name__} has no centroids",
                None,
                "pass start= or mode='exact'",
            )
        if start is not None:
            self._check_points(start)
        self.num_proposals = check_count("num_proposals", num_proposals)
        self.warmup = check_count("warmup", warmup)
        self.block_size = check_count("block_size", block_size)
        self.progress = progress
        self.report: SamplingReport | None = None

    def __call__(self, n: int) -> Tensor:
        """The same as :meth:`sample`."""
        return self.sample(n)

    @torch.no_grad()
    def sample(self, n: int, start: Tensor | None = None) -> Tensor:
        """``n`` draws of shape ``(n, d)``; :attr:`report` then says how they came about.

        Args:
            n: number of draws.
            start: points ``(n, d)`` of the ball, one for each draw, in place of the mode's own starts.

        Raises:
            ValueError: when a start has the wrong shape, is not finite, or lies outside the ball.
        """
        n = check_count("n", n)
        effective = None
        if start is not None:
            self._check_points(start)
            if len(start) != n:
                raise argument_error("start", f"{n} points, one for each draw", start)
            tuning = start[torch.randperm(n, device=start.device)[:_ADAPTING_CHAINS]]
        elif self.mode == "chains":
            start, tuning = self._pool(n), self._pool(_ADAPTING_CHAINS)
        else:
            start, tuning, effective = self._resampled(n)
        kernel = self._kernel(tuning)

        ends, acceptance, divergences = [], 0.0, 0
        for block in start.split(self.block_size):
            state = kernel.init(block)
            check_support(state)
            result = run_chains(kernel, state, 1, thin=self.num_steps, progress=self.progress)
            ends.append(result.state.position)
            acceptance += float(result.acceptance.sum())
            divergences += int(result.divergences.sum())
        z = torch.cat(ends)
        share = math.nan if bumps_of(self.metric) is None else far_share(self.metric, z)
        self.report = SamplingReport(
            self.mode, acceptance / n, divergences, float(kernel.step_size), share, effective
        )
        return z

    def _check_points(self, start: Tensor) -> None:
        if start.dim() != 2 or start.shape[-1] != self.metric.latent_dim or not len(start):
            raise argument_error("start", f"a tensor of shape (n, {self.metric.latent_dim})", start)
        check_finite("start", start)

    def _pool(self, n: int) -> Tensor:
        """``n`` random centroids, or points of ``start``, among those in the ball."""
        pool: Tensor = self.metric.centroids if self.start is None else self.start  # type: ignore[assignment]
        pool = pool.detach()[self.density.support.check(pool)]
        if not len(pool):
            raise argument_error(
                "radius",
                "a ball that holds a start point",
                f"{self.radius:g}, with none inside",
                "enlarge the radius",
            )
        return pool[torch.randint(len(pool), (n,), device=pool.device)]

    def _kernel(self, tuning: Tensor) -> HMC:
        density = self.density
        kernel = HMC(
            density.log_density_and_gradient, 0.03, self.num_leapfrog, gradient=density.log_density_gradient
        )
        if self.step_size is None and self.mode == "chains":
            return kernel
        if self.step_size is None or isinstance(self.step_size, str):
            # A jittered step breaks the periodic orbits that a long trajectory in one bump would follow.
            kernel = replace(kernel, jitter=0.1)
            state = kernel.init(tuning)
            check_support(state)
            return warm_up(kernel, state, self.warmup, DualAveraging())[0]
        return replace(kernel, step_size=self.step_size)

    def _resampled(self, n: int) -> tuple[Tensor, Tensor, float]:
        """Starts for the draws and for the adaptation, and how many draws the proposals are worth."""
        draws = self.density.importance_sample(max(self.num_proposals, 10 * n))
        effective = draws.effective_size
        if effective < 100:
            warnings.warn(
                f"the starts of the exact mode are worth only {effective:.0f} independent draws: "
                "raise num_proposals",
                stacklevel=3,
            )
        return _resample(draws, n), _resample(draws, _ADAPTING_CHAINS), effective


def _resample(draws: WeightedDraws, n: int) -> Tensor:
    """``n`` of the points by systematic resampling, in random order."""
    total = draws.log_weight.double().softmax(0).cumsum(0)
    ticks = (torch.arange(n, device=total.device) + torch.rand(1, device=total.device, dtype=total.dtype)) / n
    index = torch.searchsorted(total, ticks * total[-1]).clamp(max=len(total) - 1)
    return draws.points[index[torch.randperm(n, device=index.device)]]


def _bumps(metric: Metric) -> tuple[Tensor, float]:
    bumps = bumps_of(metric)
    if bumps is None:
        raise argument_error(
            "metric",
            "a metric with centroids and a temperature",
            type(metric).__name__,
            "without them nothing is far",
        )
    return bumps


def _far(metric: Metric, z: Tensor) -> Tensor:
    """Whether each point of ``(n, d)`` lies beyond ``2T`` of all centroids."""
    centroids, temperature = _bumps(metric)
    middle = centroids.mean(0)
    parts = (z - middle).split(max(1, _PAIRS // len(centroids)))
    nearest = torch.cat([torch.cdist(part, centroids - middle).amin(-1) for part in parts])
    return nearest > FAR * temperature


def far_share(metric: Metric, z: Tensor) -> float:
    """The share of points ``z (..., d)`` that lie beyond ``2T`` of all centroids of the metric.

    There the metric knows nothing but its regularization.

    Raises:
        ValueError: when the metric has no centroids.

    Example:
        >>> metric = CentroidMetric(torch.zeros(1, 2), torch.eye(2)[None], temperature=1.0)
        >>> far_share(metric, torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
        0.5
    """
    return float(_far(metric, z.reshape(-1, z.shape[-1])).double().mean())


@torch.no_grad()
def exact_far_share(
    metric: Metric,
    radius: float | None = None,
    regularization: float | None = None,
    num_samples: int = 20_000,
) -> Estimate:
    """The share of the mass of ``InverseVolume(metric, radius)`` beyond ``2T`` of all centroids.

    A self-normalised importance estimate with random numbers of its own: the same arguments give the same
    estimate, and the caller's generator is left alone.

    Args:
        metric: a metric with centroids and a temperature.
        radius: of the ball; ``None`` is twice the largest norm of the centroids.
        regularization: λ in place of the metric's own (``CentroidMetric`` only).
        num_samples: importance draws.

    Returns:
        An :class:`Estimate`.

    Raises:
        ValueError: when the metric has no centroids, or a regularization is given for another kind of metric.

    Example:
        >>> metric = CentroidMetric(torch.zeros(1, 2), torch.eye(2)[None], temperature=1, regularization=0.01)
        >>> share = exact_far_share(metric, radius=4.0)
        >>> bool(abs(share.value - 0.1192) < 0.01)
        True
    """
    if regularization is not None:
        metric = _regularized(metric, regularization)
    density = InverseVolume(metric, radius)
    generator = torch.Generator(_bumps(metric)[0].device).manual_seed(0)
    points, log_weight = density.importance_sample(num_samples, generator)
    return _share(log_weight.double(), _far(metric, points))


@torch.no_grad()
def choose_regularization(
    metric: CentroidMetric,
    share: float = 0.05,
    radius: float | None = None,
    *,
    num_samples: int = 20_000,
    bounds: tuple[float, float] = (1e-8, 1e2),
) -> RegularizationChoice:
    """The largest λ at which at most ``share`` of the exact mass lies beyond ``2T`` of all centroids.

    Bisection over log λ. With ``S = Σ_i w_i A_i``, whose eigenvalues ``e`` are computed once for each draw,
    the density at any λ is ``Π (e + λ)^{1/2}``, so the same weighted draws serve every λ of a bisection. The
    proposal is then fitted again at the λ found, until that no longer moves.

    The metric itself is not changed: build ``CentroidMetric(..., regularization=result.regularization)``.

    Args:
        metric: the metric.
        share: largest share of far mass.
        radius: of the ball; ``None`` is twice the largest norm of the centroids.
        num_samples: importance draws of each round.
        bounds: range of λ that is searched. When even its upper end keeps the share, that end is returned.

    Returns:
        A :class:`RegularizationChoice`, with the share reached and its standard error.

    Raises:
        ValueError: for another kind of metric, a share outside (0, 1), or when no λ in the bounds keeps the
            share.

    Example:
        >>> metric = CentroidMetric(torch.zeros(1, 2), torch.eye(2)[None], temperature=1, regularization=1)
        >>> choice = choose_regularization(metric, share=0.10, radius=4.0)
        >>> bool(abs(choice.regularization - 0.00785) < 0.0005)
        True
    """
    if not isinstance(share, float) or not 0.0 < share < 1.0:
        raise argument_error("share", "a number strictly between 0 and 1", share)
    low, high = (math.log(b) for b in bounds)
    start = (
        metric.regularization if getattr(metric, "regularization", 0) else math.sqrt(bounds[0] * bounds[1])
    )
    current = min(max(math.log(start), low), high)
    for _ in range(8):
        reached = _regularized(metric, math.exp(current))
        estimate = _ShareOfRegularization(reached, radius, num_samples)
        if estimate(high).value <= share:
            found = high
        else:
            lower, found = low, high
            for _ in range(40):
                middle = 0.5 * (lower + found)
                lower, found = (middle, found) if estimate(middle).value <= share else (lower, middle)
            found = lower
        # Far from the λ of the proposal the weights degenerate: go there by bounded strides.
        settled = abs(found - current) < 0.1
        current = found if settled else current + min(max(found - current, -4.0), 4.0)
        if settled:
            break
    value, stderr = estimate(current)
    if value > share:
        raise argument_error(
            "share",
            f"a share that some regularization in {bounds} reaches",
            f"{share} (at {math.exp(current):.3g} it is {value:.3g})",
            "raise the temperature or lower the radius",
        )
    return RegularizationChoice(math.exp(current), value, stderr)


class _ShareOfRegularization:
    """The far share as a function of log λ, over one set of weighted draws."""

    def __init__(self, metric: CentroidMetric, radius: float | None, num_samples: int) -> None:
        density = InverseVolume(metric, radius)
        generator = torch.Generator(_bumps(metric)[0].device).manual_seed(0)
        points, log_weight = density.importance_sample(num_samples, generator)
        inverse = torch.cat([metric.inverse(part) for part in points.split(1 << 14)]).double()
        eigenvalues = torch.linalg.eigvalsh(inverse)
        self.scale = (eigenvalues - metric.regularization).clamp(min=0)
        self.log_weight = log_weight.double() - 0.5 * eigenvalues.log().sum(-1)
        self.far = _far(metric, points)

    def __call__(self, log_regularization: float) -> Estimate:
        log_density = 0.5 * (self.scale + math.exp(log_regularization)).log().sum(-1)
        return _share(self.log_weight + log_density, self.far)


def _share(log_weight: Tensor, far: Tensor) -> Estimate:
    """Self-normalised share of the weight on ``far``, with the standard error of the delta method."""
    weight = log_weight.softmax(0)
    value = weight[far].sum()
    return Estimate(float(value), float((weight * (far.to(weight) - value)).square().sum().sqrt()))


def _regularized(metric: Metric, regularization: float) -> CentroidMetric:
    if not isinstance(metric, CentroidMetric):
        raise argument_error(
            "metric", "a CentroidMetric, whose regularization can be replaced", type(metric).__name__
        )
    return CentroidMetric(
        metric.centroids.detach(),
        metric.factors.detach(),
        temperature=metric.temperature,
        regularization=regularization,
    )
