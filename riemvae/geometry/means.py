"""Means of points on a manifold, and k-means around them."""

from __future__ import annotations

import warnings
from typing import NamedTuple, cast

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
from riemvae.geometry.clustering import k_medoids
from riemvae.geometry.exponential import exponential_map
from riemvae.geometry.geodesics import Distances, distance_matrix, geodesic
from riemvae.geometry.logarithm import log_map
from riemvae.geometry.metric import Metric

_METHODS = ("curves", "shooting")
_SMALLEST_STEP = 1e-3
# Variances carry the error of the logarithms that they are made of.
_VARIANCE_SLACK = 1e-3


class KarcherMean(NamedTuple):
    """Means of points on a manifold, and whether they are ones.

    Attributes:
        mean: the point ``(..., d)``.
        variance: weighted mean of the squared distances to it, ``(...)``.
        gradient_norm: length of ``Σ_i w_i Log_μ(z_i)``, which is 0 at the mean, ``(...)``.
        converged: whether that is at most ``tolerance`` times the root of the variance, and every logarithm
            was solved, ``(...)``.
        unsolved: number of points whose logarithm was not solved; they are left out, ``(...)``.
    """

    mean: Tensor
    variance: Tensor
    gradient_norm: Tensor
    converged: Tensor
    unsolved: Tensor


class RiemannianKMeans(NamedTuple):
    """A clustering around means.

    Attributes:
        labels: cluster of each point, ``(N,)``.
        centers: the Karcher mean of each cluster, ``(k, d)``.
        loss: sum of the squared geodesic distances of the points to their centers.
        converged: whether no point changes its cluster any more, and every mean and distance was solved.
        num_iterations: rounds of means and assignments.
    """

    labels: Tensor
    centers: Tensor
    loss: float
    converged: bool
    num_iterations: int


def karcher_mean(
    metric: Metric,
    points: Tensor,
    weights: Tensor | None = None,
    *,
    start: Tensor | None = None,
    method: str = "curves",
    tolerance: float = 1e-4,
    max_iterations: int = 50,
) -> KarcherMean:
    r"""The points ``μ`` that minimise the weighted mean of squared geodesic distances ``Σ_i w_i d(μ, z_i)²``.

    Gradient descent: ``μ ← Exp_μ(s Σ_i w_i Log_μ(z_i))`` with ``s = 1``, halved where a step does not
    decrease the variance or the gradient. All means, and the logarithms of all their points, go in one batch;
    finished means leave it. The result is a local minimum. It is *the* mean where the points lie in a ball
    that is small against the curvature (everywhere on a space of negative curvature); points around a hole of
    a learned metric may have several, or none where the gradient vanishes: the cut locus moves with ``μ``.

    Args:
        metric: the metric, with a closed-form ``pullback`` or differentiable.
        points: ``(..., N, d)``: sets of ``N`` points.
        weights: ``(..., N)`` or ``(N,)``, non-negative and not all zero in a set; ``None`` is equal weights.
            Points of weight 0 cost nothing.
        start: where to start, ``(..., d)``; ``None`` is the point nearest to the Euclidean mean, which does
            not lie in a hole of the data as the mean itself may.
        method: where the logarithms come from. ``"curves"`` takes them from discretised geodesics: nearly
            always solved, with an error of some 1e-3 of their length (1e-4 in the mean, on spaces of constant
            curvature 1 and spread 1). ``"shooting"`` takes :func:`~riemvae.geometry.log_map`: exact, many
            times the work, and not solved for points far apart on a rough metric.
        tolerance: length of the gradient, relative to the root of the variance, at which a mean is found.
        max_iterations: steps of descent.

    Returns:
        A :class:`KarcherMean`; nothing in it carries gradients.

    Raises:
        ValueError: shapes that do not fit, NaN, or weights that are negative or all zero.

    Source: Karcher (1977); Pennec (2006), Intrinsic Statistics on Riemannian Manifolds, section 4.

    Example:
        >>> from riemvae.geometry import Metric
        >>> class HalfPlane(Metric):
        ...     latent_dim = 2
        ...     def inverse(self, z):
        ...         return z[..., 1, None, None] ** 2 * torch.eye(2)
        >>> result = karcher_mean(HalfPlane(), torch.tensor([[0.0, 0.5], [0.0, 1.0], [0.0, 4.0]]))
        >>> result.mean, result.converged  # (0, exp of the mean of log heights)
        (tensor([0.0000, 1.2599]), tensor(True))
    """
    check_last_dim("points", points, metric.latent_dim, "points have the metric's latent dimension last")
    if points.dim() < 2 or points.shape[-2] == 0:
        raise argument_error("points", "a tensor (..., N, d) with at least one point", points)
    check_finite("points", points)
    check_choice("method", method, _METHODS)
    check_positive("tolerance", tolerance)
    check_count("max_iterations", max_iterations)
    weights = points.new_ones(points.shape[:-1]) if weights is None else weights.to(points)
    if weights.shape != points.shape[:-1] and tuple(weights.shape) != (points.shape[-2],):
        raise argument_error("weights", f"a tensor {tuple(points.shape[:-1])}, one weight a point", weights)
    check_finite("weights", weights)
    if bool((weights < 0).any()) or bool((weights.sum(-1) <= 0).any()):
        raise argument_error("weights", "non-negative weights, not all zero", "others")
    batch, (n, d) = points.shape[:-2], points.shape[-2:]
    with torch.no_grad():
        flat = points.reshape(-1, n, d)
        weight = weights.expand(points.shape[:-1]).reshape(-1, n)
        if start is None:
            rows = torch.arange(len(flat), device=flat.device)
            middle = (weight / weight.sum(-1, keepdim=True)).unsqueeze(-2) @ flat
            away = (flat - middle).square().sum(-1).masked_fill(weight == 0, torch.inf)
            center = flat[rows, away.argmin(-1)]
        elif tuple(start.shape) != (*batch, d):
            raise argument_error("start", f"a tensor {(*batch, d)}, one start a set", start)
        else:
            check_finite("start", start)
            center = start.to(points).reshape(-1, d)
        group = torch.arange(len(flat), device=flat.device).repeat_interleave(n)
        used = weight.reshape(-1) > 0
        found = _descend(
            metric,
            flat.reshape(-1, d)[used],
            weight.reshape(-1)[used],
            group[used],
            center,
            method,
            tolerance,
            max_iterations,
        )
    return KarcherMean(*(part.reshape((*batch, *part.shape[1:])) for part in found))


def riemannian_k_means(
    points: Tensor,
    k: int,
    metric: Metric,
    *,
    start: Tensor | None = None,
    distances: Tensor | None = None,
    seed: int | None = None,
    method: str = "curves",
    tolerance: float = 1e-3,
    max_iterations: int = 30,
) -> RiemannianKMeans:
    r"""Clusters points around ``k`` Karcher means by Lloyd's algorithm.

    It goes down in ``Σ_i min_j d(z_i, μ_j)²``, ``d`` the geodesic distance, from the best k-medoids
    clustering under squared distances. With a flat metric it is ordinary k-means. The means are points of the
    manifold, not data: compare :func:`~riemvae.geometry.k_medoids`, which needs no logarithms.

    Args:
        points: ``(N, d)``.
        k: number of clusters, ``1 <= k <= N``.
        metric: the metric.
        start: centers ``(k, d)`` to start from, in place of medoids (which take all ``N²/2`` distances).
        distances: geodesic distances ``(N, N)`` computed before, for the medoids.
        seed: of the search for medoids; ``None`` follows torch's global generator.
        method: where the logarithms of the means come from, see :func:`karcher_mean`.
        tolerance: of the means, see :func:`karcher_mean`.
        max_iterations: rounds of means and assignments.

    Returns:
        A :class:`RiemannianKMeans`.

    Raises:
        ValueError: ``k`` below 1 or above ``N``, shapes that do not fit, or NaN.

    Warns:
        UserWarning: when some means or distances could not be solved, or clusters still change after
            ``max_iterations``.

    Source: Lloyd (1982); Karcher (1977).

    Example:
        >>> from riemvae.geometry import EuclideanMetric
        >>> points = torch.tensor([[0.0, 0.0], [0.0, 1.0], [5.0, 0.0], [5.0, 1.0]])
        >>> result = riemannian_k_means(points, 2, EuclideanMetric(2), seed=0)
        >>> result.labels, result.centers, result.loss
        (tensor([0, 0, 1, 1]), tensor([[0.0000, 0.5000], [5.0000, 0.5000]]), 1.0)
    """
    if points.dim() != 2 or len(points) == 0:
        raise argument_error("points", "a tensor (N, d) with at least one point", points)
    check_last_dim("points", points, metric.latent_dim, "points have the metric's latent dimension last")
    check_finite("points", points)
    check_count("k", k)
    check_choice("method", method, _METHODS)
    check_positive("tolerance", tolerance)
    check_count("max_iterations", max_iterations)
    if k > len(points):
        raise argument_error("k", f"at most the number of points, {len(points)}", k, "ask for fewer clusters")
    with torch.no_grad():
        if start is None:
            if distances is None:
                distances = cast(Tensor, distance_matrix(metric, points))
            centers = points[k_medoids(points, k, distances=distances.square(), seed=seed).medoids]
        elif tuple(start.shape) != (k, points.shape[1]):
            raise argument_error("start", f"centers {(k, points.shape[1])}", start)
        else:
            check_finite("start", start)
            centers = start.to(points)
        return _lloyd(metric, points, centers, method, tolerance, max_iterations)


def _lloyd(
    metric: Metric, points: Tensor, centers: Tensor, method: str, tolerance: float, max_iterations: int
) -> RiemannianKMeans:
    labels, squared, solved = _assign(metric, points, centers)
    stable, rounds = False, 0
    while not stable and rounds < max_iterations:
        rounds += 1
        labels = _without_empty(labels, squared, len(centers))
        ones = points.new_ones(len(points))
        means = _descend(metric, points, ones, labels, centers, method, tolerance, max_iterations=50)
        centers = means.mean
        previous = labels
        labels, squared, solved = _assign(metric, points, centers)
        solved = solved and bool(means.converged.all())
        stable = torch.equal(labels, previous)
    if not (stable and solved):
        what = "some means or distances were not solved" if stable else "clusters still change"
        warnings.warn(f"riemannian_k_means: {what} after {rounds} rounds", UserWarning, stacklevel=3)
    return RiemannianKMeans(labels, centers, float(squared.double().sum()), stable and solved, rounds)


def _assign(metric: Metric, points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The nearest center of each point, its squared distance, and whether all distances were solved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not solved is in the result
        found = cast(Distances, distance_matrix(metric, points, centers, full=True))
    nearest = found.distance.square().min(1)
    solved = found.converged | _near(points[:, None], centers)
    return nearest.indices, nearest.values, bool(solved.all())


def _without_empty(labels: Tensor, squared: Tensor, k: int) -> Tensor:
    """Gives each empty cluster the point that is farthest from its center."""
    for j in (torch.bincount(labels, minlength=k) == 0).nonzero().flatten().tolist():
        alone = torch.bincount(labels, minlength=k)[labels] == 1
        farthest = squared.masked_fill(alone, -1.0).argmax()
        labels = labels.index_fill(0, farthest, j)
        squared = squared.index_fill(0, farthest, 0.0)
    return labels


class _At(NamedTuple):
    """Means and what is known there, each ``(groups, ...)``."""

    center: Tensor
    direction: Tensor  # Σ w Log
    variance: Tensor
    gradient_norm: Tensor
    unsolved: Tensor

    def replaced(self, which: Tensor, index: Tensor, other: _At) -> _At:
        """``other[which]`` in the places ``index[which]``."""
        return _At(*(a.index_copy(0, index[which], b[which]) for a, b in zip(self, other)))


def _near(a: Tensor, b: Tensor) -> Tensor:
    """Whether points are so near that the rounding of coordinates governs what lies between them."""
    size = torch.maximum(a.abs().amax(-1), b.abs().amax(-1))
    return (a - b).abs().amax(-1) <= torch.finfo(a.dtype).eps ** 0.5 * size


def _by_curves(metric: Metric, base: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tolerance = max(1e-8, 0.03 * torch.finfo(base.dtype).eps ** 0.5)
    curves = geodesic(metric, base, points, tolerance=tolerance)
    near = _near(base, points)
    chord = points - base
    velocity = torch.where(near[:, None], chord, curves.initial_velocity)
    squared = torch.where(near, metric.inner(base, chord, chord), curves.length.square())
    return velocity, squared, curves.converged | near


def _by_shooting(
    metric: Metric, base: Tensor, points: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    found = log_map(metric, base, points, start=start, full=True)
    velocity, solved = found.velocity, found.converged
    again = (~solved).nonzero().flatten()
    if start is not None and len(again):
        found = log_map(metric, base[again], points[again], full=True)
        velocity = velocity.index_copy(0, again, found.velocity)
        solved = solved.index_copy(0, again, found.converged)
    return velocity, metric.inner(base, velocity, velocity), solved


def _at(
    metric: Metric,
    points: Tensor,
    weights: Tensor,
    group: Tensor,
    center: Tensor,
    method: str,
    guess: Tensor | None = None,
) -> tuple[_At, Tensor]:
    """What is known at ``center``, and the logarithms of the points, 0 where they were not solved."""
    base = center[group]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not solved is counted
        if method == "curves":
            velocity, squared, solved = _by_curves(metric, base, points)
        else:
            velocity, squared, solved = _by_shooting(metric, base, points, guess)
    solved = solved & torch.isfinite(velocity).all(-1) & torch.isfinite(squared)
    velocity, squared = velocity.masked_fill(~solved[:, None], 0.0), squared.masked_fill(~solved, 0.0)
    weight = weights * solved
    total = weights.new_zeros(len(center)).index_add(0, group, weight).clamp(min=1e-30)
    weight = weight / total[group]
    direction = torch.zeros_like(center).index_add(0, group, weight[:, None] * velocity)
    variance = torch.zeros_like(total).index_add(0, group, weight * squared)
    unsolved = group.new_zeros(len(center)).index_add(0, group, (~solved).long())
    return _At(center, direction, variance, metric.norm(center, direction), unsolved), velocity


def _is_flat(metric: Metric, at: _At, tolerance: float, size: Tensor) -> Tensor:
    """Whether the gradient is as small as asked for, or as coordinates rounded at this size allow."""
    rounding = 8 * torch.finfo(size.dtype).eps * metric.norm(at.center, size.expand_as(at.center))
    return at.gradient_norm <= tolerance * at.variance.sqrt() + rounding


def _descend(
    metric: Metric,
    points: Tensor,
    weights: Tensor,
    group: Tensor,
    start: Tensor,
    method: str,
    tolerance: float,
    max_iterations: int,
) -> KarcherMean:
    """The mean of each group of points ``(M, d)``; ``group (M,)`` says which. From ``start (groups, d)``."""
    now, velocity = _at(metric, points, weights, group, start, method)
    step = torch.ones_like(now.variance)
    size = points.abs().amax(0)
    found = _is_flat(metric, now, tolerance, size)
    for _ in range(max_iterations):
        active = (~found & (step > _SMALLEST_STEP)).nonzero().flatten()
        if not len(active):
            break
        place = torch.full_like(group[:1], -1).repeat(len(step))
        place[active] = torch.arange(len(active), device=place.device)
        mine = (place[group] >= 0).nonzero().flatten()
        move = step[active, None] * now.direction[active]
        shot = exponential_map(metric, now.center[active], move, full=True)
        moved = torch.where(shot.finite[:, None], shot.end, now.center[active])
        own = place[group[mine]]
        # Near enough the logarithm at the new center for Newton's method, in a flat space exactly.
        guess = velocity[mine] - move[own]
        trial, new_velocity = _at(metric, points[mine], weights[mine], own, moved, method, guess)
        before, after = now.variance[active], trial.variance
        # Near the mean the variance no longer tells steps apart, and the gradient does.
        flatter = trial.gradient_norm < 0.9 * now.gradient_norm[active]
        better = (after < before) | (flatter & (after <= (1 + _VARIANCE_SLACK) * before))
        better &= shot.finite & (trial.unsolved <= now.unsolved[active])
        now = now.replaced(better, active, trial)
        velocity[mine] = torch.where(better[own, None], new_velocity, velocity[mine])
        step[active] = torch.where(better, (2 * step[active]).clamp(max=1.0), 0.5 * step[active])
        found = _is_flat(metric, now, tolerance, size)
    converged = found & (now.unsolved == 0)
    return KarcherMean(now.center, now.variance, now.gradient_norm, converged, now.unsolved)
