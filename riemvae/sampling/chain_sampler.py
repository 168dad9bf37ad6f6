"""Latent points as the ends of finite chains: what every sampler along a geometry shares."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_choice, check_count, check_finite, check_positive
from riemvae.geometry import Metric
from riemvae.sampling.adaptation import step_field, warm_up
from riemvae.sampling.chains import ChainResult, check_support, run_chains
from riemvae.sampling.far import far_share, has_bumps
from riemvae.sampling.kernel import TransitionInfo

ADAPTING_CHAINS = 256


class SamplingReport(NamedTuple):
    """What happened in one call of a sampler's ``sample``.

    Attributes:
        mode: ``"chains"`` (finite chains) or ``"exact"``.
        acceptance: mean acceptance probability over chains and transitions.
        divergences: number of divergent transitions.
        step_size: leapfrog step used, or the scale of a random walk.
        far_share: share of the draws beyond ``2T`` of all centroids, as
            :func:`~riemvae.sampling.far_share`; NaN where the metric has none.
        effective_starts: effective number of independent start points in mode ``"exact"``; ``None``
            elsewhere.
        not_converged: number of proposals refused because an implicit step was not solved.
    """

    mode: str
    acceptance: float
    divergences: int
    step_size: float
    far_share: float
    effective_starts: float | None
    not_converged: int = 0


class ChainSampler(ABC):
    """A sampler whose every draw is the end of a finite chain of its own.

    A subclass says which kernel (:meth:`_kernel`), and where chains start if not at random centroids
    (:meth:`_starts`).

    Args:
        metric: the frozen metric.
        density: what the chains are to sample, with ``support`` and ``log_density``.
        num_steps: transitions of each chain.
        step_size: of the kernel (a random walk's scale); ``None`` is the kernel's own, ``"adapt"`` adapts it.
        start: points ``(k, d)`` to start from at random, in place of the centroids.
        needs_pool: whether there must be centroids or ``start``.
        warmup: transitions that adapt the step size, on chains of their own.
        block_size: chains that run at once; bounds the memory.
        progress: shows a bar.
        keep_trace: keeps every transition of the last call in :attr:`trace`.

    Attributes:
        report: the :class:`SamplingReport` of the last call of :meth:`sample`; ``None`` before it.
        trace: the whole chains of the last call, a :class:`~riemvae.sampling.ChainResult` with samples
            ``(num_steps, n, d)``; ``None`` where it was not kept.

    Raises:
        ValueError: on arguments out of range, or a metric without centroids when ``start`` is missing.
    """

    mode = "chains"
    _step_name = "step_size"
    _without_centroids = "pass start="

    def __init__(
        self,
        metric: Metric,
        density: Any,
        *,
        num_steps: int,
        step_size: float | str | None,
        start: Tensor | None,
        needs_pool: bool = True,
        warmup: int,
        block_size: int,
        progress: bool,
        keep_trace: bool,
    ) -> None:
        self.metric, self.density = metric, density
        self.num_steps = check_count("num_steps", num_steps)
        if isinstance(step_size, str):
            check_choice(self._step_name, step_size, ["adapt"])
        elif step_size is not None:
            check_positive(self._step_name, step_size)
        self.step_size = step_size
        if needs_pool and start is None and getattr(metric, "centroids", None) is None:
            raise argument_error(
                "start",
                f"points to start from, since {type(metric).__name__} has no centroids",
                None,
                self._without_centroids,
            )
        if start is not None:
            self._check_points(start)
        self.start = start
        self.warmup = check_count("warmup", warmup)
        self.block_size = check_count("block_size", block_size)
        self.progress, self.keep_trace = bool(progress), bool(keep_trace)
        self.report: SamplingReport | None = None
        self.trace: ChainResult | None = None

    @abstractmethod
    def _kernel(self) -> tuple[Any, bool]:
        """The kernel with its own step size, and whether to adapt that."""

    def __call__(self, n: int) -> Tensor:
        """The same as :meth:`sample`."""
        return self.sample(n)

    @torch.no_grad()
    def sample(self, n: int, start: Tensor | None = None) -> Tensor:
        """``n`` draws of shape ``(n, d)``; :attr:`report` then says how they came about.

        Args:
            n: number of draws.
            start: points ``(n, d)`` of the support, one for each draw, in place of the sampler's own starts.

        Raises:
            ValueError: when a start has the wrong shape, is not finite, or lies outside the support.
        """
        n = check_count("n", n)
        effective = None
        if start is not None:
            self._check_points(start)
            if len(start) != n:
                raise argument_error("start", f"{n} points, one for each draw", start)
            tuning = start[torch.randperm(n, device=start.device)[:ADAPTING_CHAINS]]
        else:
            start, tuning, effective = self._starts(n)
        kernel, adapting = self._kernel()
        if adapting:
            state = kernel.init(tuning)
            check_support(state)
            kernel = warm_up(kernel, state, self.warmup)[0]
        elif self.step_size is not None:
            kernel = replace(kernel, **{step_field(kernel): self.step_size})
        draws, thin = (self.num_steps, 1) if self.keep_trace else (1, self.num_steps)
        results = []
        for block in start.split(self.block_size):
            state = kernel.init(block)
            check_support(state)
            results.append(run_chains(kernel, state, draws, thin=thin, progress=self.progress))
        result = _side_by_side(results)
        z = result.state.position
        self.trace = result if self.keep_trace else None
        self.report = SamplingReport(
            self.mode,
            float(result.acceptance.mean()),
            int(result.divergences.sum()),
            float(result.step_size),
            far_share(self.metric, z) if has_bumps(self.metric) else math.nan,
            effective,
            0 if result.not_converged is None else int(result.not_converged.sum()),
        )
        return z

    def _check_points(self, start: Tensor) -> None:
        if start.dim() != 2 or start.shape[-1] != self.metric.latent_dim or not len(start):
            raise argument_error("start", f"a tensor of shape (n, {self.metric.latent_dim})", start)
        check_finite("start", start)

    def _starts(self, n: int) -> tuple[Tensor, Tensor, float | None]:
        """Starts of the draws and of the adaptation, and how many independent ones they are worth."""
        return self._pool(n), self._pool(ADAPTING_CHAINS), None

    def _pool(self, n: int) -> Tensor:
        """``n`` random centroids, or points of ``start``, among those in the support."""
        pool: Tensor = self.metric.centroids if self.start is None else self.start  # type: ignore[assignment]
        pool = pool.detach()[self.density.support.check(pool)]
        if not len(pool):
            raise argument_error(
                "radius",
                "a ball that holds a start point",
                f"{self.density.radius:g}, with none inside",
                "enlarge the radius",
            )
        return pool[torch.randint(len(pool), (n,), device=pool.device)]


def _side_by_side(results: list[ChainResult]) -> ChainResult:
    """The chains of several blocks as those of one run."""
    if len(results) == 1:
        return results[0]

    def join(parts: Iterable[Any], dim: int = 0) -> Any:
        parts = list(parts)
        return None if parts[0] is None else torch.cat(parts, dim)

    return ChainResult(
        join((r.samples for r in results), 1),
        join((r.log_density for r in results), 1),
        join(r.acceptance for r in results),
        join(r.divergences for r in results),
        results[0].step_size,
        type(results[0].state)(*map(join, zip(*(r.state for r in results)))),
        join(r.not_converged for r in results),
        TransitionInfo(
            *[join(column, 1) for column in zip(*(r.trace for r in results if r.trace is not None))]
        ),
    )
