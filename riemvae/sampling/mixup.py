"""Draws between samples of a class: mix-up along geodesics."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from riemvae._checks import (
    argument_error,
    check_choice,
    check_count,
    check_finite,
    check_last_dim,
    check_positive,
)
from riemvae._recipe import recipe
from riemvae.geometry.conformal import VolumeWeightedMetric
from riemvae.geometry.geodesics import geodesic
from riemvae.geometry.hermite import resample
from riemvae.geometry.metric import Metric
from riemvae.geometry.polygons import along

_FINER = 4  # nodes of a polygon a node of the solver
_BLOCK = 1 << 14  # points given to a metric at once


class MixupReport(NamedTuple):
    """What happened in one call of :meth:`GeodesicMixup.sample`.

    Attributes:
        num_curves: curves that were solved.
        unconverged: how many of them the solver did not finish. Their points lie on a curve between the two
            data all the same, which is not quite the shortest.
        mean_length: mean length of the curves, in the metric that they are geodesics of.
    """

    num_curves: int
    unconverged: int
    mean_length: float


@recipe
class GeodesicMixup:
    r"""Draws latent points on geodesics between two data of one class.

    A draw takes a datum uniformly at random, a second one of the same class, a share
    :math:`t \sim \mathrm{Beta}(a, a)`, and the point at ``t`` of the arc length of the geodesic between them.
    Where mix-up takes the straight line, which may cross regions that decode to nothing, the geodesic stays
    where the metric's data are. A class of one datum yields that datum.

    Args:
        metric: the metric.
        z: latent data ``(N, d)``, such as posterior means.
        labels: the class of each, integers ``(N,)``; ``None`` takes all as one class.
        concentration: ``a > 0``: 1 is uniform along the curve, smaller values stay near the data.
        curves: ``"geodesic"``, of ``metric``, for metrics whose volume is small near data (eq. 1.7);
            ``"volume"``, the interpolation of eq. 3.8 (``VolumeWeightedMetric``), for metrics whose volume is
            large near data (eq. 3.6).
        num_segments: segments of each curve.
        progress: shows a bar.

    Attributes:
        report: the :class:`MixupReport` of the last call of :meth:`sample`; ``None`` before it.

    Raises:
        ValueError: shapes that do not fit, NaN, or numbers out of range.

    Source: Zhang, Cisse, Dauphin and Lopez-Paz (2018), mixup, along the curves of Chadebec, Thibeau-Sutre,
    Burgos and Allassonnière (2022).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> from riemvae.geometry import EuclideanMetric
        >>> z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0], [5.0, 6.0]])
        >>> mixup = GeodesicMixup(EuclideanMetric(2), z, torch.tensor([0, 0, 1, 1]))
        >>> points, labels = mixup.sample_with_labels(100)
        >>> points.shape, bool((points[labels == 1, 0] == 5).all())
        (torch.Size([100, 2]), True)
    """

    def __init__(
        self,
        metric: Metric,
        z: Tensor,
        labels: Tensor | None = None,
        *,
        concentration: float = 1.0,
        curves: str = "geodesic",
        num_segments: int = 16,
        progress: bool = False,
    ) -> None:
        if z.dim() != 2 or len(z) == 0:
            raise argument_error("z", "a tensor (N, d) with at least one point", z)
        check_last_dim("z", z, metric.latent_dim, "points have the metric's latent dimension last")
        check_finite("z", z)
        if labels is not None and (tuple(labels.shape) != (len(z),) or labels.is_floating_point()):
            raise argument_error("labels", f"integers of shape ({len(z)},), one a point", labels)
        check_positive("concentration", concentration)
        self.metric, self.z, self.labels = metric, z.detach(), labels
        self.concentration = float(concentration)
        self.curves = check_choice("curves", curves, ["geodesic", "volume"])
        self.num_segments = check_count("num_segments", num_segments, 2)
        self.progress = progress
        self.report: MixupReport | None = None

    def sample(self, n: int) -> Tensor:
        """``n`` latent points ``(n, d)``."""
        return self._drawn(n)[0]

    def sample_with_labels(self, n: int) -> tuple[Tensor, Tensor]:
        """``n`` latent points ``(n, d)`` and their classes ``(n,)``; class 0 where there are no labels."""
        points, first = self._drawn(n)
        labels = torch.zeros(len(self.z), dtype=torch.long) if self.labels is None else self.labels
        return points, labels.to(first.device)[first]

    def _drawn(self, n: int) -> tuple[Tensor, Tensor]:
        check_count("n", n)
        first, second = self._pairs(n)
        share = torch.full((n,), self.concentration, dtype=torch.float64)
        t = torch.distributions.Beta(share, share).sample().to(self.z)
        # A pair that comes twice, in either order, has one curve.
        ends, which = torch.stack([first, second]).sort(0).values.unique(dim=1, return_inverse=True)
        t = torch.where(first <= second, t, 1 - t)
        metric = VolumeWeightedMetric(self.metric) if self.curves == "volume" else self.metric
        apart = (ends[0] != ends[1]).nonzero().flatten()
        start, end = self.z[ends[0]], self.z[ends[1]]
        nodes = start[:, None].repeat(1, _FINER * self.num_segments + 1, 1)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one warning below, for the call
            found = geodesic(
                metric, start[apart], end[apart], num_segments=self.num_segments, progress=self.progress
            )
            nodes[apart] = resample(found.points, _FINER * self.num_segments)
            points = at_arc_length(metric, nodes[which], t)
        unconverged = int((~found.converged).sum())
        mean_length = float(found.length.mean()) if len(apart) else 0.0
        self.report = MixupReport(len(apart), unconverged, mean_length)
        if unconverged:
            warnings.warn(
                f"GeodesicMixup: {unconverged} of {len(apart)} curves were not finished by the solver and "
                "are not quite geodesics; take more num_segments",
                UserWarning,
                stacklevel=3,
            )
        return points, first

    def _pairs(self, n: int) -> tuple[Tensor, Tensor]:
        """Indices of two data of one class, different ones where the class has them."""
        device = self.z.device
        if self.labels is None:
            klass = torch.zeros(len(self.z), dtype=torch.long, device=device)
        else:
            klass = self.labels.to(device).unique(return_inverse=True)[1]
        count = torch.bincount(klass)
        # Data sorted by class: the members of class c stand from begin[c] on.
        order, begin = klass.argsort(stable=True), count.cumsum(0) - count
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=device)
        first = torch.randint(len(self.z), (n,), device=device)
        size = count[klass[first]]
        others = (size - 1).clamp(min=1)
        step = (torch.rand(n, dtype=torch.float64, device=device) * others).long().clamp(max=others - 1) + 1
        own = begin[klass[first]]
        return first, order[own + (place[first] - own + step) % size]


def at_arc_length(metric: Metric, nodes: Tensor, t: Tensor) -> Tensor:
    """The points of polygons at shares of their arc lengths.

    Args:
        metric: the metric that measures lengths, at the middle of each segment.
        nodes: ``(B, K+1, d)``.
        t: a share in ``[0, 1]`` for each, ``(B,)``.

    Returns:
        Points ``(B, d)``; where a polygon has no length, its first node.

    Example:
        >>> from riemvae.geometry import EuclideanMetric
        >>> nodes = torch.tensor([[[0.0], [1.0], [4.0]]])
        >>> at_arc_length(EuclideanMetric(1), nodes, torch.tensor([0.5]))
        tensor([[2.]])
    """
    step, middle = nodes.diff(dim=-2), 0.5 * (nodes[:, 1:] + nodes[:, :-1])
    d = nodes.shape[-1]
    parts = zip(middle.reshape(-1, d).split(_BLOCK), step.reshape(-1, d).split(_BLOCK))
    lengths = torch.cat([metric.norm(*part) for part in parts]).reshape(step.shape[:-1])
    return along(nodes, lengths, t[:, None]).squeeze(1)
