"""Generation along the learned geometry: draws from the inverse volume element."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from riemvae._checks import check_choice, check_count
from riemvae._recipe import recipe
from riemvae.distributions.inverse_volume import InverseVolume, WeightedDraws
from riemvae.geometry import Metric
from riemvae.sampling.chain_sampler import ADAPTING_CHAINS, ChainSampler
from riemvae.sampling.kernel import HMC


@recipe
class ManifoldSampler(ChainSampler):
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
        keep_trace: keeps every transition of the last call in :attr:`trace`.

    Attributes:
        report: the :class:`SamplingReport` of the last call of :meth:`sample`; ``None`` before it.
        trace: the whole chains of the last call, a :class:`~riemvae.sampling.ChainResult` with samples
            ``(num_steps, n, d)``; ``None`` where it was not kept.

    Raises:
        ValueError: on arguments out of range, or a metric without centroids when ``radius`` or ``start`` are
            missing.

    Source: Chadebec, Thibeau-Sutre, Burgos and Allassonnière (2022), section 1.3.2 and appendix 1.8.2 of the
        thesis.

    Example:
        >>> from riemvae.geometry import CentroidMetric
        >>> _ = torch.manual_seed(0)
        >>> metric = CentroidMetric(torch.randn(20, 2), 0.3 * torch.eye(2).expand(20, 2, 2), temperature=0.8)
        >>> sampler = ManifoldSampler(metric, num_steps=20)
        >>> sampler.sample(50).shape, sampler.report.divergences
        (torch.Size([50, 2]), 0)
    """

    _without_centroids = "pass start= or mode='exact'"

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
        keep_trace: bool = False,
    ) -> None:
        self.mode = check_choice("mode", mode, ["chains", "exact"])
        density = InverseVolume(metric, radius)
        super().__init__(
            metric,
            density,
            num_steps=num_steps,
            step_size=step_size,
            start=start,
            needs_pool=mode == "chains",
            warmup=warmup,
            block_size=block_size,
            progress=progress,
            keep_trace=keep_trace,
        )
        self.radius = density.radius
        self.num_leapfrog = check_count("num_leapfrog", num_leapfrog)
        self.num_proposals = check_count("num_proposals", num_proposals)

    def _kernel(self) -> tuple[HMC, bool]:
        density = self.density
        kernel = HMC(
            density.log_density_and_gradient, 0.03, self.num_leapfrog, gradient=density.log_density_gradient
        )
        adapting = self.step_size == "adapt" or (self.step_size is None and self.mode == "exact")
        # A jittered step breaks the periodic orbits that a long trajectory in one bump would follow.
        return (replace(kernel, jitter=0.1) if adapting else kernel), adapting

    def _starts(self, n: int) -> tuple[Tensor, Tensor, float | None]:
        """Starts for the draws and for the adaptation, and how many draws the proposals are worth."""
        if self.mode == "chains":
            return super()._starts(n)
        draws = self.density.importance_sample(max(self.num_proposals, 10 * n))
        effective = draws.effective_size
        if effective < 100:
            warnings.warn(
                f"the starts of the exact mode are worth only {effective:.0f} independent draws: "
                "raise num_proposals",
                stacklevel=4,
            )
        return _resample(draws, n), _resample(draws, ADAPTING_CHAINS), effective


def _resample(draws: WeightedDraws, n: int) -> Tensor:
    """``n`` of the points by systematic resampling, in random order."""
    total = draws.log_weight.double().softmax(0).cumsum(0)
    ticks = (torch.arange(n, device=total.device) + torch.rand(1, device=total.device, dtype=total.dtype)) / n
    index = torch.searchsorted(total, ticks * total[-1]).clamp(max=len(total) - 1)
    return draws.points[index[torch.randperm(n, device=index.device)]]
