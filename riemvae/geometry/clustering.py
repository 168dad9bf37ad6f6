"""Clustering by medoids, on Euclidean or geodesic distances."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_choice, check_count, check_finite, check_last_dim
from riemvae.geometry.geodesics import distance_matrix
from riemvae.geometry.metric import Metric

_TILE_ELEMENTS = 1 << 24  # distances held at once where the whole matrix is not


class KMedoids(NamedTuple):
    """A clustering by medoids.

    Attributes:
        labels: the cluster of each point, ``0 .. k-1``, shape ``(N,)``; a medoid has its own, so that none is
            empty.
        medoids: indices of the medoids, ascending, shape ``(k,)``.
        loss: sum over the points of the distance to their medoid.
        distances: the ``(N, N)`` distances that were used; ``None`` where ``subsample`` did without them.
    """

    labels: Tensor
    medoids: Tensor
    loss: float
    distances: Tensor | None


def _fasterpam(distances: Any, k: int, seed: int) -> Any:
    import kmedoids

    return kmedoids.fasterpam(distances, k, max_iter=300, random_state=seed, n_cpu=1)


def _alternating(distances: Any, k: int, seed: int) -> Any:
    import kmedoids

    return kmedoids.alternating(distances, k, max_iter=300, random_state=seed)


def _pam(distances: Any, k: int, seed: int) -> Any:
    import kmedoids

    return kmedoids.pam(distances, k, max_iter=300, init="build")


_METHODS: dict[str, Callable[[Any, int, int], Any]] = {
    "fasterpam": _fasterpam,
    "alternating": _alternating,
    "pam": _pam,
}


def k_medoids(
    points: Tensor | None,
    k: int,
    metric: Metric | None = None,
    *,
    distances: Tensor | None = None,
    seed: int | None = None,
    num_init: int = 5,
    method: str = "fasterpam",
    subsample: int | None = None,
    progress: bool = False,
) -> KMedoids:
    r"""Clusters points around ``k`` of them, their medoids.

    It minimises ``Σ_i min_j d(z_i, z_{m_j})`` over the choice of the medoids ``m_1 .. m_k``. With a metric,
    ``d`` is the geodesic distance, which follows the data where the Euclidean one cuts across holes. The
    optimiser stops at a local minimum of swaps, so it starts ``num_init`` times and the best is kept.

    Args:
        points: ``(N, d)``; may be ``None`` when ``distances`` are given.
        k: number of clusters, ``1 <= k <= N``.
        metric: a Riemannian metric for geodesic distances (``distance_matrix(metric, points)``); ``None`` for
            Euclidean ones.
        distances: ``(N, N)`` dissimilarities computed before, in place of those of ``metric``: non-negative,
            finite, symmetric, zero on the diagonal. Any scale.
        seed: of the random starts; ``None`` follows torch's global generator.
        num_init: random starts of ``"fasterpam"`` and ``"alternating"``.
        method: ``"fasterpam"``; ``"alternating"``, which is the k-means of medoids (faster a step, worse
            minima); or ``"pam"``, the original with its greedy start, deterministic and ``O(N² k)`` a sweep.
        subsample: for many points under Euclidean distances: each start clusters a random part of this size
            only, and the medoids that serve all the points best are kept (FasterCLARA). Memory is then
            ``O(subsample² + N k)`` in place of ``O(N²)``. At least ``k``; 80 + 4k or more is advised.
        progress: shows the bar of the geodesic distances.

    Returns:
        A :class:`KMedoids`, labels and indices on the device of the points.

    Raises:
        ValueError: ``k`` below 1 or above the number of points, points with NaN, a matrix that is not one of
            distances, infinite distances (points that no curve connects), or ``subsample`` together with a
            metric or with distances.

    Source: Schubert and Rousseeuw (2021), Fast and Eager k-Medoids Clustering; the ``kmedoids`` package.

    Example:
        >>> points = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
        >>> result = k_medoids(points, 2, seed=0)
        >>> result.labels, result.medoids, round(result.loss, 3)
        (tensor([0, 0, 0, 1, 1, 1]), tensor([1, 4]), 0.4)
    """
    check_count("k", k)
    check_count("num_init", num_init)
    run = _METHODS[check_choice("method", method, list(_METHODS))]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if points is not None:
        _check_points(points)
    if subsample is not None:
        if points is None or metric is not None or distances is not None:
            raise argument_error(
                "subsample",
                "None with a metric or given distances",
                subsample,
                "draw a part of the points first",
            )
        check_count("subsample", subsample, k, "a part holds at least k points")
        _check_enough(k, len(points))
        if subsample < len(points):
            return _on_parts(points, k, run, num_init, subsample, generator)
    if distances is not None:
        _check_distances(distances, points)
    elif points is None:
        raise argument_error("points", "points (N, d), or distances=", None)
    else:
        _check_enough(k, len(points))
        distances = _distances(points, metric, progress)
    _check_enough(k, len(distances))
    medoids = _best(distances, k, run, 1 if method == "pam" else num_init, generator)
    labels, loss = _assign(distances[:, medoids])
    return KMedoids(_with_own(labels, medoids), medoids, loss, distances)


def _check_points(points: Tensor) -> None:
    if points.dim() != 2 or len(points) == 0 or not points.is_floating_point():
        raise argument_error("points", "a floating-point tensor (N, d) with at least one point", points)
    check_finite("points", points)


def _check_enough(k: int, n: int) -> None:
    if k > n:
        raise argument_error("k", f"at most the number of points, {n}", k, "ask for fewer clusters")


def _check_distances(distances: Tensor, points: Tensor | None) -> None:
    n = len(distances) if points is None else len(points)
    square = distances.dim() == 2 and n > 0 and tuple(distances.shape) == (n, n)
    if not square or not distances.is_floating_point():
        size = "(N, N)" if points is None else f"({n}, {n})"
        raise argument_error("distances", f"a floating-point matrix {size}", distances)
    _check_connected(distances)
    slack = 1e-3 * float(
        distances.abs().max()
    )  # those of a solver with a tolerance are not exactly symmetric
    if bool((distances < 0).any()) or bool((distances.diagonal().abs() > slack).any()):
        raise argument_error("distances", "non-negative values, zero on the diagonal", "others")
    if bool(((distances - distances.mT).abs() > slack).any()):
        raise argument_error("distances", "a symmetric matrix", "one that is not", "pass (D + D.mT) / 2")


def _check_connected(distances: Tensor) -> None:
    bad = int((~torch.isfinite(distances)).sum())
    if bad:
        raise argument_error(
            "distances",
            "finite distances between all pairs",
            f"{bad} of {distances.numel()} infinite or NaN",
            "points that no curve connects cannot share a cluster: cluster the connected parts one by one",
        )


def _distances(points: Tensor, metric: Metric | None, progress: bool) -> Tensor:
    with torch.no_grad():
        if metric is None:
            return _euclidean(points, points)
        check_last_dim("points", points, metric.latent_dim, "points have the metric's latent dimension last")
        distances = cast(Tensor, distance_matrix(metric, points, progress=progress))
    _check_connected(distances)
    return distances


def _euclidean(a: Tensor, b: Tensor) -> Tensor:
    # By differences: |a|² + |b|² - 2 a·b loses the distances of near points.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _best(
    distances: Tensor,
    k: int,
    run: Callable[[Any, int, int], Any],
    starts: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The medoids of the start with the smallest loss, ascending."""
    exact = distances.detach().to(
        "cpu", distances.dtype if distances.dtype == torch.float64 else torch.float32
    )
    array = exact.contiguous().numpy()
    seeds = torch.randint(2**31 - 1, (starts,), generator=generator).tolist()
    best = min((run(array, k, seed) for seed in seeds), key=lambda result: result.loss)
    return torch.as_tensor(best.medoids.astype("int64"), device=distances.device).sort().values


def _assign(to_medoids: Tensor) -> tuple[Tensor, float]:
    nearest = to_medoids.min(-1)
    return nearest.indices, float(nearest.values.double().sum())


def _with_own(labels: Tensor, medoids: Tensor) -> Tensor:
    # Medoids that coincide would leave a cluster empty.
    return labels.index_put((medoids,), torch.arange(len(medoids), device=labels.device))


def _on_parts(
    points: Tensor,
    k: int,
    run: Callable[[Any, int, int], Any],
    starts: int,
    size: int,
    generator: torch.Generator | None,
) -> KMedoids:
    """FasterCLARA: medoids of random parts, judged by what they cost on all the points."""
    best = KMedoids(torch.empty(0), torch.empty(0, dtype=torch.long), math.inf, None)
    for _ in range(starts):
        part = torch.randperm(len(points), generator=generator)
        # A part keeps the best medoids so far (Kaufman and Rousseeuw 1990).
        kept = best.medoids.cpu()
        part = torch.cat([kept, part[~torch.isin(part, kept)]])[:size].to(points.device)
        medoids = part[_best(_euclidean(points[part], points[part]), k, run, 1, generator)].sort().values
        pieces = points.detach().split(max(1, _TILE_ELEMENTS // k))
        assigned = [_assign(_euclidean(piece, points[medoids])) for piece in pieces]
        loss = sum(piece_loss for _, piece_loss in assigned)
        if loss < best.loss:
            labels = _with_own(torch.cat([piece_labels for piece_labels, _ in assigned]), medoids)
            best = KMedoids(labels, medoids, loss, None)
    return best
