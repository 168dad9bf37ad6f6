"""Mixtures that cover a volume element: one wide part, Gaussians around bumps, and one that is fitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from riemvae.geometry import Metric
from riemvae.geometry.posterior import PosteriorMetric

_PAIRS = 1 << 22  # points times centres held at once


class Bumps(NamedTuple):
    """Terms ``exp(-(z-c_i)ᵀ(L_i L_iᵀ)⁻¹(z-c_i))`` that a metric is a sum of.

    Attributes:
        centers: ``c (N, d)``.
        factors: ``L``, standard deviations ``(N, d)`` or lower triangular ``(N, d, d)``.
    """

    centers: Tensor
    factors: Tensor

    def chosen(self, index: Tensor) -> Bumps:
        """Those of the index."""
        return Bumps(self.centers[index], self.factors[index])

    @property
    def log_det(self) -> Tensor:
        """``log det L_i``, ``(N,)``."""
        diagonal = self.factors if self.factors.dim() == 2 else self.factors.diagonal(dim1=-2, dim2=-1)
        return diagonal.log().sum(-1)

    @property
    def widths(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest width of each, ``(N,)``."""
        if self.factors.dim() == 2:
            return self.factors.amin(-1), self.factors.amax(-1)
        singular = torch.linalg.svdvals(self.factors)
        return singular[:, -1], singular[:, 0]

    def scaled(self, index: Tensor, noise: Tensor) -> Tensor:
        """``L_i noise`` for each row of ``noise (n, d)``."""
        if self.factors.dim() == 2:
            return self.factors[index] * noise
        return (self.factors[index] @ noise.unsqueeze(-1)).squeeze(-1)

    def covaried(self, vectors: Tensor) -> Tensor:
        """``L_i L_iᵀ`` times the ``i``-th of ``vectors (N, d)``."""
        if self.factors.dim() == 2:
            return self.factors**2 * vectors
        return (self.factors @ (self.factors.mT @ vectors.unsqueeze(-1))).squeeze(-1)

    def square_chunks(self, z: Tensor) -> Iterator[Tensor]:
        """``(z-c_i)ᵀ(L_i L_iᵀ)⁻¹(z-c_i)`` in chunks of ``z``, shapes ``(n, N)``.

        Centred and in double precision, or the square would cancel.
        """
        middle = self.centers.mean(0)
        centers, factors = (self.centers - middle).double(), self.factors.double()
        diagonal = factors.dim() == 2
        if diagonal:
            precision = factors**-2
            moments = precision * centers
        else:
            precision = torch.cholesky_inverse(factors)
            moments = (precision @ centers.unsqueeze(-1)).squeeze(-1)
        weights = torch.cat([precision.flatten(1), -2 * moments], -1).mT
        norms = (moments * centers).sum(-1)
        for part in (z - middle).double().split(max(1, _PAIRS // len(centers))):
            outer = part * part if diagonal else (part.unsqueeze(-1) * part.unsqueeze(-2)).flatten(1)
            squares = torch.addmm(norms, torch.cat([outer, part], -1), weights)
            yield squares.clamp(min=0).to(z.dtype)


def bumps_of(metric: Metric) -> tuple[Tensor, float] | None:
    """Centroids ``(N, d)`` and temperature of a metric that is made of them, ``None`` for another."""
    centroids, temperature = getattr(metric, "centroids", None), getattr(metric, "temperature", None)
    if centroids is None or temperature is None:
        return None
    return centroids.detach(), float(temperature)


def terms_of(metric: Metric) -> Bumps | None:
    """The bumps of a metric with centroids, of one temperature or of a covariance each; None for another."""
    if isinstance(metric, PosteriorMetric):
        return Bumps(metric.centroids.detach(), metric.bandwidth * metric.scale.detach())
    bumps = bumps_of(metric)
    if bumps is None:
        return None
    return Bumps(bumps[0], torch.full_like(bumps[0], bumps[1]))


class UniformBall:
    """The uniform distribution on ``‖z‖ <= radius``."""

    def __init__(self, radius: float, dim: int) -> None:
        self.size, self.dim = radius, dim
        self.log_volume = 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim + 1) + dim * math.log(radius)

    def sample(self, noise: Tensor, **kind: Any) -> Tensor:
        """Draws with the directions of ``noise (n, d)``."""
        length = torch.rand(len(noise), 1, **kind) ** (1 / self.dim)
        return self.size * length * torch.nn.functional.normalize(noise, dim=-1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Shape ``(n,)``."""
        outside = torch.linalg.vector_norm(z, dim=-1) > self.size
        return z.new_full((len(z),), -self.log_volume).masked_fill(outside, -math.inf)


class WideNormal:
    """The normal distribution ``N(0, s² I)``, which a decay ``exp(-‖z‖²/2s²)`` is proportional to.

    ``log_volume`` is the log of its integral.
    """

    def __init__(self, scale: float, dim: int, size: float) -> None:
        self.scale, self.dim, self.size = scale, dim, size
        self.log_volume = 0.5 * dim * math.log(2 * math.pi * scale**2)

    def sample(self, noise: Tensor, **kind: Any) -> Tensor:
        """``s`` times the standard normal ``noise (n, d)``."""
        return self.scale * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Shape ``(n,)``."""
        return -0.5 * (z / self.scale).square().sum(-1) - self.log_volume


class CoveringMixture:
    """A mixture of a wide part, Gaussians of a few widths around bumps, and one free Gaussian.

    Args:
        wide: the part that covers all of the support.
        bumps: the centres and shapes of the Gaussians.
        variances: the ``J`` factors of their covariances ``v L_i L_iᵀ``.
        log_center: log probabilities of the bumps for each factor, ``(J, N)``.
        log_share: log probabilities of the parts: wide, each factor, and the free Gaussian if there is one.
        free: mean and Cholesky factor of the free Gaussian.
    """

    def __init__(
        self,
        wide: UniformBall | WideNormal,
        bumps: Bumps,
        variances: list[float],
        log_center: Tensor,
        log_share: Tensor,
        free: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.wide, self.bumps, self.variances = wide, bumps, variances
        self.log_center, self.log_share, self.free = log_center, log_share, free

    def sample(
        self, count: int, generator: torch.Generator | None = None, stratified: bool = False
    ) -> Tensor:
        """Draws ``(count, d)`` in random order; ``stratified`` gives each part its exact share."""
        share, like = self.log_share.exp(), self.bumps.centers
        kind: dict[str, Any] = {"generator": generator, "device": like.device, "dtype": like.dtype}
        if stratified:
            # Systematic: the expected counts are exact, so the mixture density is what belongs below the
            # weights.
            ticks = (torch.arange(count, device=like.device) + torch.rand(1, **kind)) / count
            part = torch.searchsorted(share.cumsum(0), ticks).clamp(max=len(share) - 1)
        else:
            part = torch.multinomial(share, count, replacement=True, generator=generator)
        noise = torch.randn(count, like.shape[-1], **kind)
        z = torch.empty_like(noise)
        chosen = part == 0
        z[chosen] = self.wide.sample(noise[chosen], **kind)
        for j, variance in enumerate(self.variances):
            chosen = part == j + 1
            if bool(chosen.any()):
                index = torch.multinomial(
                    self.log_center[j].exp(), int(chosen.sum()), True, generator=generator
                )
                z[chosen] = like[index] + self.bumps.scaled(index, math.sqrt(variance) * noise[chosen])
        if self.free is not None:
            chosen = part == len(self.variances) + 1
            z[chosen] = self.free[0] + noise[chosen] @ self.free[1].mT
        return z[torch.randperm(count, generator=generator, device=like.device)]

    def part_log_probs(self, z: Tensor) -> Tensor:
        """Log density of each part at ``z (n, d)``, shape ``(n, parts)``."""
        d = z.shape[-1]
        parts = [self.wide.log_prob(z).unsqueeze(-1)]
        if self.variances:
            log_height = self.log_center - self.bumps.log_det  # (J, N)
            rows = []
            for square in self.bumps.square_chunks(z):
                columns = [
                    log_sum_exp(height - square / (2 * variance)) - 0.5 * d * math.log(2 * math.pi * variance)
                    for height, variance in zip(log_height, self.variances)
                ]
                rows.append(torch.stack(columns, -1))
            parts.append(torch.cat(rows))
        if self.free is not None:
            free = torch.distributions.MultivariateNormal(
                self.free[0], scale_tril=self.free[1], validate_args=False
            )
            parts.append(free.log_prob(z).unsqueeze(-1))
        return torch.cat(parts, -1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of the mixture, ``(n,)``."""
        return (self.part_log_probs(z) + self.log_share).logsumexp(-1)

    def adapted(
        self, log_density: Callable[[Tensor], Tensor], count: int, generator: torch.Generator | None
    ) -> CoveringMixture:
        """The mixture after one round of population Monte Carlo towards ``log_density``.

        The weights are flattened as far as they must to be worth a tenth of the draws: the first rounds, from
        a poor proposal, then go part of the way, and no single lucky draw decides.
        """
        z = self.sample(count, generator, stratified=True)
        parts = self.part_log_probs(z) + self.log_share
        weight = flattened(log_density(z) - parts.logsumexp(-1), 0.1 * count)
        kinds = parts.softmax(-1)
        share = weight @ kinds
        # The free Gaussian follows the mass that is not in the wide part.
        bulk = weight * (1 - kinds[:, 0]) if self.free is None else weight * kinds[:, -1]
        log_center, free = self.log_center, self.free
        if float(bulk.sum()) > 1e-3:
            free = _fitted_gaussian(z, bulk / bulk.sum(), self.wide.size)
        elif free is None:
            free = _fitted_gaussian(z, weight, self.wide.size)
        if self.free is None:
            share = torch.cat([share, share.new_full((1,), 0.2)])
        floor = torch.full_like(share, 0.01)
        floor[0] = 0.05
        share = floor + (1 - floor.sum()) * share / share.sum()
        return CoveringMixture(self.wide, self.bumps, self.variances, log_center, share.log(), free)


def log_sum_exp(values: Tensor) -> Tensor:
    """``log Σ exp`` over the last dimension, where most terms underflow: exp2 does not slow down there."""
    top = values.amax(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).min)
    scaled = (values - top) * (1.0 / math.log(2.0))
    return scaled.exp2_().sum(-1).log() + top.squeeze(-1)


def flattened(log_weight: Tensor, least: float) -> Tensor:
    """Normalised weights to the largest power up to one whose effective size is at least ``least``."""
    low, high = 0.0, 1.0
    log_weight = log_weight.nan_to_num(neginf=torch.finfo(log_weight.dtype).min)
    power = high
    for _ in range(20):
        weight = (power * log_weight).softmax(0)
        if float(1 / weight.square().sum()) >= least:
            low = power
        else:
            high = power
        if low == 1.0:
            break
        power = 0.5 * (low + high)
    return (low * log_weight).softmax(0)


def _fitted_gaussian(z: Tensor, weight: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Mean and Cholesky factor, wider than the moments by a fifth in variance: light tails are what hurts."""
    mean = weight @ z
    centred = z - mean
    covariance = 1.2 * (centred.mT * weight) @ centred
    ridge = 1e-6 * size**2 * torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return mean, torch.linalg.cholesky(covariance + ridge)
