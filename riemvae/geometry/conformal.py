"""The conformal metric whose geodesics interpolate where the volume of another metric is large."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from riemvae._checks import argument_error
from riemvae._recipe import recipe
from riemvae.geometry.metric import LocalMetric, Metric


class _ConformalLocal(LocalMetric):
    """``e^f I`` at given points, ``f = -log det G - log_scale``: all of it from the inner metric's volume."""

    metric: VolumeWeightedMetric

    @cached_property
    def _inner(self) -> LocalMetric:
        return self.metric.metric.at(self.z)

    @cached_property
    def _log_factor(self) -> Tensor:
        return -2.0 * self._inner.log_volume - self.metric.log_scale

    def _scalar(self, factor: Tensor) -> Tensor:
        eye = torch.eye(self.z.shape[-1], dtype=self.z.dtype, device=self.z.device)
        return factor[..., None, None] * eye

    @cached_property
    def _pair(self) -> tuple[Tensor, Tensor, Tensor]:
        f = self._log_factor
        return self._scalar((-f).exp()), self._scalar(f.exp()), self.z.shape[-1] * f

    def pullback(self, matrix: Tensor) -> Tensor:
        # ∂(e^{-f} I) = -e^{-f} ∂f I and ∂f = -2 ∂(½ log det G)
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        return (2.0 * trace * (-self._log_factor).exp()).unsqueeze(-1) * self._inner.log_volume_gradient

    def momentum(self, noise: Tensor) -> Tensor:
        return (0.5 * self._log_factor).exp().unsqueeze(-1) * noise


@recipe
class VolumeWeightedMetric(Metric):
    """The metric ``G̃(z) = det G(z)⁻¹ I``: short where the volume element of ``G`` is large.

    The length of a curve is ``∫ V(γ) ‖γ'‖ dt``, with ``V(z) = 1/√det G(z)`` and the Euclidean norm, so
    ``geodesic(VolumeWeightedMetric(metric), z1, z2)`` is the interpolation that stays where ``√det G`` is
    large. It is meant for a metric whose volume is large near data, whose own geodesics avoid data.

    ``det G`` may span hundreds of orders of magnitude: everything is computed from its logarithm, and
    ``log_scale`` takes a constant out of it, which leaves the geodesics as they are.

    Args:
        metric: ``G``.
        log_scale: ``s`` in ``G̃ = e^{-s} det G⁻¹ I``; lengths are then in units of ``e^{s/2}``.

    Raises:
        ValueError: ``metric`` is not a metric, or ``log_scale`` not a finite number.

    Source: eq. 3.8 of the thesis; after Chadebec and Allassonnière (2022).

    Example:
        >>> from riemvae.geometry.metric import ConstantMetric
        >>> m = VolumeWeightedMetric(ConstantMetric(torch.diag(torch.tensor([2.0, 8.0]))))
        >>> m.norm(torch.zeros(2), torch.tensor([3.0, 4.0]))  # 5 / √16
        tensor(1.2500)
    """

    def __init__(self, metric: Metric, log_scale: float = 0.0) -> None:
        if not isinstance(metric, Metric):
            raise argument_error("metric", "a Metric", metric)
        if not isinstance(log_scale, (int, float)) or not math.isfinite(log_scale):
            raise argument_error("log_scale", "a finite number", log_scale)
        super().__init__(metric.latent_dim)
        self.metric = metric
        self.log_scale = float(log_scale)

    @property
    def centroids(self) -> Tensor | None:
        """The centroids of the inner metric, where it has any."""
        return getattr(self.metric, "centroids", None)

    def rescaled(self, z: Tensor) -> VolumeWeightedMetric:
        """The same metric up to a constant, such that its factor is near 1 at points ``(..., d)``."""
        f = -2.0 * self.metric.log_volume(z)
        return VolumeWeightedMetric(self.metric, float(f.median()))

    def at(self, z: Tensor) -> LocalMetric:
        return _ConformalLocal(self, z)

    def inverse(self, z: Tensor) -> Tensor:
        return self.at(self._checked(z)).inverse

    def tensor(self, z: Tensor) -> Tensor:
        return self.at(self._checked(z)).tensor

    def log_volume(self, z: Tensor) -> Tensor:
        return self.at(self._checked(z)).log_volume

    def extra_repr(self) -> str:
        return f"log_scale={self.log_scale:g}"
