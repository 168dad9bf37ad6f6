"""Geodesics between points and the distances that they give, for any metric, many pairs at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_count, check_finite, check_last_dim, check_positive
from riemvae.geometry.conformal import VolumeWeightedMetric
from riemvae.geometry.curve_solver import initial_velocity, minimise_energy
from riemvae.geometry.curve_starts import (
    Attachment,
    PointGraph,
    best_arcs,
    equally_spaced,
    shortest_ways,
    stations,
    straight_lines,
)
from riemvae.geometry.hermite import hermite, measure, resample, squared_norms
from riemvae.geometry.metric import Metric
from riemvae.geometry.polygons import along

# Coordinates of the curves that are optimised at once: some ten arrays of this size are held.
_BLOCK = 1 << 18
# Relative error that `refine=True` asks for, and where doubling the segments ends.
_REFINED = 1e-4
_MOST_SEGMENTS = 1024
# How well curves from different starts are optimised before the best is chosen.
_CHOICE = 1e-3
# Halving the segments multiplies the points' error, of second order, by 4: the difference is 3 errors. Half
# of it, not a third, leaves a margin where the segments are few.
_RICHARDSON = 0.5
# Energies of curves from different starts that agree to this are of one curve.
_SAME = 1e-2
# A minimum has a constant speed, so that its energy is its squared length. One whose energy exceeds that by
# so much may jump over a wall of the metric between its nodes, or through infinity: it is looked at closely.
_UNEVEN = 1.2
_CLOSELY = 8
# A length that changes by this share under the closer look is none, and the pair is tried with more segments.
_UNRESOLVED = 0.1
_RETRY = 4
# A distance that a way through other points undercuts by this share is that of a wrong valley. How often
# such pairs are solved anew, each time with twice the segments.
_UNDERCUT = 1e-3
_ROUNDS = 3
# Chords of a segment by which the Euclidean length of a curve is measured.
_FINE = 16


@dataclass(frozen=True)
class Geodesic:
    """Shortest curves ``c: [0, 1] → ℝᵈ`` of constant speed, a batch of them.

    A curve is the cubic Hermite interpolant of its nodes: once differentiable, with an error of third order
    between the nodes, below that of the nodes.

    Attributes:
        points: nodes ``c(k/K)``, ``(..., K+1, d)``.
        length: ``∫ ‖c'‖ dt (...)`` of the curve: the distance of its ends. Where gradients are enabled it is
            differentiable with respect to the ends and the metric.
        energy: ``∫ ‖c'‖² dt (...)``, which for a constant speed is the squared length.
        converged: whether the optimiser reached its tolerance, or what the dtype resolves, ``(...)``.
        initial_velocity: ``c'(0) (..., d)``, of norm ``length``: the logarithm of the end at the start, up to
            the discretisation.
        discretisation_error: estimate of the relative error of ``length`` that finitely many segments leave,
            ``(...)``: how much half as many change it, a cautious figure.
        point_error: estimate of the distance of ``points`` to the exact geodesic at the same times, over its
            length, ``(...)``. The optimiser leaves about the square root of its tolerance beside it.
    """

    points: Tensor
    length: Tensor
    energy: Tensor
    converged: Tensor
    initial_velocity: Tensor
    discretisation_error: Tensor
    point_error: Tensor

    def __call__(self, t: float | Tensor) -> Tensor:
        """Points at times in ``[0, 1]``: ``(..., d)`` for a number, ``(T, ..., d)`` for ``t (T,)``."""
        return self._evaluated(t, 0)

    def velocity(self, t: float | Tensor) -> Tensor:
        """``dc/dt`` at times, in the shapes of the points."""
        return self._evaluated(t, 1)

    def evenly(self, t: float | Tensor) -> Tensor:
        """Points at shares ``t`` of the curve's *Euclidean* length, in the shapes of a call.

        A geodesic has constant Riemannian speed, so equal times crowd where the metric is large: under eq.
        1.7 that is in the gaps of the data. For pictures along a curve, even steps in the coordinates show
        more.

        Example:
            >>> from riemvae.geometry import EuclideanMetric
            >>> curve = geodesic(EuclideanMetric(2), torch.zeros(2), torch.ones(2))
            >>> curve.evenly(torch.tensor([0.0, 0.5])).round(decimals=4)
            tensor([[0.0000, 0.0000],
                    [0.5000, 0.5000]])
        """
        shares = self._times(t)
        fine = _FINE * (self.points.shape[-2] - 1)
        nodes = resample(self.points, fine).reshape(-1, fine + 1, self.points.shape[-1])
        lengths = torch.linalg.vector_norm(nodes.diff(dim=-2), dim=-1)
        points = along(nodes, lengths, shares.reshape(-1)).reshape(
            *self.points.shape[:-2], -1, nodes.shape[-1]
        )
        return points[..., 0, :] if shares.dim() == 0 else points.movedim(-2, 0)

    def _times(self, t: float | Tensor) -> Tensor:
        times = torch.as_tensor(t, dtype=self.points.dtype, device=self.points.device)
        if times.dim() > 1 or not bool(((times >= 0) & (times <= 1)).all()):
            raise argument_error("t", "a number or a tensor (T,) of times in [0, 1]", t)
        return times

    def _evaluated(self, t: float | Tensor, which: int) -> Tensor:
        times = self._times(t)
        value = hermite(self.points, times.reshape(-1))[which]
        return value[..., 0, :] if times.dim() == 0 else value.movedim(-2, 0)


class Distances(NamedTuple):
    """Distances and how far they can be trusted.

    Attributes:
        distance: ``(N, N)``, or ``(N, M)`` to other points.
        converged: whether the optimiser reached its tolerance, of that shape.
        discretisation_error: estimate of the relative error that finitely many segments leave, of that shape.
    """

    distance: Tensor
    converged: Tensor
    discretisation_error: Tensor


class _Settings(NamedTuple):
    num_segments: int
    tolerance: float
    max_iterations: int
    target: float | None  # relative discretisation error to refine to
    target_points: bool  # whether that holds for the points as well as for the length


class _Curves(NamedTuple):
    """Optimised curves and what is known of them, the batch first."""

    points: Tensor
    energy: Tensor
    length: Tensor
    converged: Tensor
    length_error: Tensor
    point_error: Tensor


# -- the public face -----------------------------------------------------------------------------------------


def geodesic(
    metric: Metric,
    z1: Tensor,
    z2: Tensor,
    *,
    num_segments: int = 16,
    tolerance: float = 1e-8,
    max_iterations: int = 300,
    graph: Tensor | None = None,
    refine: bool | float = False,
    progress: bool = False,
) -> Geodesic:
    """The shortest curves from ``z1`` to ``z2``, for any metric.

    The midpoint energy ``K Σ_k u_kᵀ G(m_k) u_k`` of a curve with ``K`` segments ``u_k`` is minimised by a
    quasi-Newton iteration, all pairs at once, from the best of several starts: the straight line, and the
    shortest path through a graph of points, or an arc round what is in the way where there is no graph. The
    minimum is a local one: it may be that no start is in the valley of the shortest curve.

    Args:
        metric: The metric.
        z1: Starts ``(..., d)``.
        z2: Ends ``(..., d)``, broadcast against ``z1``.
        num_segments: ``K``.
        tolerance: Relative excess of the length over the discrete minimum, at which the optimiser stops;
            where rounding hides what is left, at 64 machine epsilons.
        max_iterations: Evaluations of the energy at each number of segments.
        graph: Points ``(M, d)`` to route starts through; ``None``: the metric's centroids, if it has any.
        refine: ``True`` doubles the segments of a pair until the estimated discretisation errors of its
            length and points are at most 1e-4 of its length; a number asks for that error.
        progress: Shows a bar.

    Returns:
        The curves, callable at times. Points that coincide have a curve of length 0. A pair that did not
        converge is marked and counted in a warning; a pair that no curve of finite length was found for has
        length ``inf``.

    Raises:
        ValueError: Points of another dimension than the metric's, not finite, or where the metric is not
            positive definite; numbers out of range.

    Example:
        >>> from riemvae.geometry import Metric
        >>> class HalfPlane(Metric):
        ...     latent_dim = 2
        ...     def inverse(self, z):
        ...         return z[..., 1, None, None] ** 2 * torch.eye(2)
        >>> c = geodesic(HalfPlane(), torch.tensor([-0.6, 0.8]), torch.tensor([0.6, 0.8]), num_segments=32)
        >>> c(0.5).round(decimals=2)  # the top of the unit circle
        tensor([0.0000, 1.0000])
        >>> round(float(c.length), 2)  # 2 artanh(0.6)
        1.39
    """
    settings = _settings(num_segments, tolerance, max_iterations, refine, target_points=True)
    _check_points(metric, z1=z1, z2=z2)
    start, end = torch.broadcast_tensors(z1.detach(), z2.detach())
    shape, d = start.shape[:-1], start.shape[-1]
    start, end = start.reshape(-1, d), end.reshape(-1, d)
    with torch.no_grad():
        scaled, factor = _rescaled(metric, torch.cat([start, end]))
        routes = _routes(scaled, graph)
        begin, finish = (routes.attach(start), routes.attach(end)) if routes else (None, None)
        parts = []
        for index in _blocks(len(start), settings.num_segments * d, start.device, progress):
            attached = None if begin is None or finish is None else (begin.at(index), finish.at(index))
            curves = _solved(scaled, start[index], end[index], routes, attached, settings)
            parts.append(curves)
        result = _joined(parts, start, settings.num_segments)
        _warn(result.converged, result.length_error, result.point_error, settings)
        slope = initial_velocity(scaled, result.points)
        norm = squared_norms(scaled, start, slope).sqrt()
        velocity = slope * torch.where(norm > 0, result.length / norm, torch.zeros_like(norm)).unsqueeze(-1)
        length, energy = factor * result.length, factor * factor * result.energy
    length = _differentiable(metric, scaled, factor, length.reshape(shape), z1, z2, result.points)
    return Geodesic(
        result.points.reshape(*shape, *result.points.shape[1:]),
        length,
        energy.reshape(shape),
        result.converged.reshape(shape),
        velocity.reshape(*shape, d),
        result.length_error.reshape(shape),
        result.point_error.reshape(shape),
    )


def distance(
    metric: Metric,
    z1: Tensor,
    z2: Tensor,
    *,
    num_segments: int = 16,
    tolerance: float = 1e-8,
    max_iterations: int = 300,
    graph: Tensor | None = None,
    refine: bool | float = False,
) -> Tensor:
    """The geodesic distance of ``z1`` and ``z2 (..., d)``, shape ``(...)``: the length of :func:`geodesic`.

    Example:
        >>> from riemvae.geometry import EuclideanMetric
        >>> distance(EuclideanMetric(2), torch.zeros(2), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([5., 0.])
    """
    options = {"num_segments": num_segments, "tolerance": tolerance, "max_iterations": max_iterations}
    return geodesic(metric, z1, z2, graph=graph, refine=refine, **options).length  # type: ignore[arg-type]


def distance_matrix(
    metric: Metric,
    z: Tensor,
    other: Tensor | None = None,
    *,
    num_segments: int = 16,
    tolerance: float = 1e-5,
    max_iterations: int = 300,
    graph: Tensor | None = None,
    refine: bool | float = False,
    full: bool = False,
    progress: bool = False,
) -> Tensor | Distances:
    """The geodesic distances of all pairs of points.

    As :func:`geodesic`, with starts through the graph of the points themselves and the metric's centroids.
    Pairs are taken in blocks of bounded memory. Distances carry no gradient.

    Within one set of points, a distance that exceeds a way through other points by a thousandth is solved
    again from that way, until none does: the triangle inequality holds up to that. Where no curve as short is
    found, the length of the way is the distance, and the error says how far the curve was from it.

    Args:
        metric: The metric.
        z: Points ``(N, d)``.
        other: Points ``(M, d)`` to measure to; ``None`` measures within ``z``.
        num_segments: Segments of a curve.
        tolerance: Relative excess of a length over the discrete minimum, at which the optimiser stops.
        max_iterations: Evaluations of the energy at each number of segments.
        graph: Points ``(G, d)`` to route starts through; ``None`` takes the points and the centroids.
        refine: ``True`` doubles the segments of a pair until the estimated discretisation error of its length
            is at most 1e-4; a number asks for that relative error.
        full: Returns the convergence and the discretisation errors as well.
        progress: Shows a bar.

    Returns:
        ``(N, N)``, symmetric, zero on the diagonal, or ``(N, M)``; with ``full``, :class:`Distances`.

    Raises:
        ValueError: As :func:`geodesic`.

    Example:
        >>> from riemvae.geometry import EuclideanMetric
        >>> distance_matrix(EuclideanMetric(1), torch.tensor([[0.0], [2.0], [5.0]]))
        tensor([[0., 2., 5.],
                [2., 0., 3.],
                [5., 3., 0.]])
    """
    settings = _settings(num_segments, tolerance, max_iterations, refine, target_points=False)
    sides = {"z": z} if other is None else {"z": z, "other": other}
    for name, points in sides.items():
        if points.dim() != 2 or len(points) == 0:
            raise argument_error(name, "a tensor (N, d) of at least one point", points)
    _check_points(metric, **sides)
    with torch.no_grad():
        rows = z.detach()
        columns = rows if other is None else other.detach()
        everything = rows if other is None else torch.cat([rows, columns])
        scaled, factor = _rescaled(metric, everything)
        routes = _routes(scaled, graph, everything)
        begin = routes.attach(rows) if routes else None
        finish = begin if other is None else routes.attach(columns) if routes else None
        if other is None:
            i, j = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
        else:
            pairs = torch.arange(len(rows) * len(columns), device=rows.device)
            i, j = pairs // len(columns), pairs % len(columns)
        shape = (len(rows), len(columns))
        lengths, errors = rows.new_zeros(shape), rows.new_zeros(shape)
        converged = torch.ones(shape, dtype=torch.bool, device=rows.device)
        for index in _blocks(len(i), settings.num_segments * rows.shape[1], rows.device, progress):
            a, b = i[index], j[index]
            attached = None if begin is None or finish is None else (begin.at(a), finish.at(b))
            curves = _solved(scaled, rows[a], columns[b], routes, attached, settings)
            lengths[a, b], errors[a, b], converged[a, b] = (
                factor * curves.length,
                curves.length_error,
                curves.converged,
            )
        if other is None:
            lengths, errors = lengths + lengths.mT, errors + errors.mT
            converged = converged & converged.mT
            found = Distances(lengths / factor, converged, errors)
            lengths, converged, errors = _closed(scaled, rows, found, routes, begin, settings)
            lengths = factor * lengths
            above = torch.ones_like(converged).triu(1)
            _warn(converged[above], errors[above], None, settings)
        else:
            _warn(converged, errors, None, settings)
    return Distances(lengths, converged, errors) if full else lengths


# -- arguments -----------------------------------------------------------------------------------------------


def _settings(
    num_segments: int, tolerance: float, max_iterations: int, refine: bool | float, target_points: bool
) -> _Settings:
    check_count("num_segments", num_segments, 2)
    check_positive("tolerance", tolerance)
    check_count("max_iterations", max_iterations)
    if refine is not False and refine is not True:
        check_positive("refine", refine, "pass True, False or a relative error such as 1e-4")
    target = None if refine is False else _REFINED if refine is True else float(refine)
    if target is not None and target_points:
        # The excess length is of second order in the distance to the minimum.
        tolerance = min(tolerance, 0.1 * target**2)
    return _Settings(num_segments, tolerance, max_iterations, target, target_points)


def _check_points(metric: Metric, **named: Tensor) -> None:
    for name, z in named.items():
        check_last_dim(name, z, metric.latent_dim, "points have the metric's latent dimension last")
        check_finite(name, z)
        with torch.no_grad():
            bad = int((~torch.isfinite(metric.log_volume(z))).sum())
        if bad:
            raise argument_error(
                name,
                "points where the metric is finite and positive definite",
                f"{bad} of {z[..., 0].numel()} where it is not",
                "project the points onto the metric's domain, or mend its tensor",
            )


def _rescaled(metric: Metric, z: Tensor) -> tuple[Metric, float]:
    """A metric of the same geodesics whose lengths are of moderate size, and the factor from its lengths."""
    if not isinstance(metric, VolumeWeightedMetric) or len(z) == 0:
        return metric, 1.0
    scaled = metric.rescaled(z)
    return scaled, float(torch.tensor(0.5 * (scaled.log_scale - metric.log_scale), dtype=torch.float64).exp())


def _routes(metric: Metric, graph: Tensor | None, points: Tensor | None = None) -> PointGraph | None:
    """The graph that starts are routed through, if there is anything to build it of."""
    if graph is not None:
        if graph.dim() != 2 or len(graph) == 0:
            raise argument_error("graph", "a tensor (M, d) of at least one point", graph)
        _check_points(metric, graph=graph)
        return PointGraph(metric, graph)
    centroids = getattr(metric, "centroids", None)
    known = [p.detach() for p in (points, centroids) if isinstance(p, Tensor)]
    # A single point is no graph to go round anything by.
    return PointGraph(metric, torch.cat(known)) if sum(map(len, known)) > 2 else None


def _blocks(count: int, coordinates: int, device: torch.device, progress: bool) -> Iterable[Tensor]:
    """Indices of the pairs, in blocks of bounded memory."""
    size = max(1, _BLOCK // coordinates)
    blocks = torch.arange(count, device=device).split(size) if count else ()
    if not progress:
        return blocks
    from rich.progress import track

    return track(blocks, description="geodesics")


def _warn(converged: Tensor, length_error: Tensor, point_error: Tensor | None, settings: _Settings) -> None:
    missed, total = int((~converged).sum()), converged.numel()
    if missed:
        warnings.warn(
            f"{missed} of {total} geodesics did not reach the tolerance {settings.tolerance:g} in "
            f"{settings.max_iterations} iterations; see `converged`, raise max_iterations or num_segments",
            stacklevel=3,
        )
    if settings.target is not None:
        error = length_error if point_error is None else torch.maximum(length_error, point_error)
        coarse = int((converged & (error > settings.target)).sum())
        if coarse:
            warnings.warn(
                f"{coarse} of {total} geodesics keep a discretisation error above {settings.target:g} "
                f"with {_MOST_SEGMENTS} segments",
                stacklevel=3,
            )


# -- one block of pairs --------------------------------------------------------------------------------------


def _solved(
    metric: Metric,
    z1: Tensor,
    z2: Tensor,
    routes: PointGraph | None,
    attached: tuple[Attachment, Attachment] | None,
    settings: _Settings,
    retry: bool = True,
) -> _Curves:
    """The geodesics of some pairs: with half the segments, with all, then with more where that is asked."""
    segments = settings.num_segments
    half = max(segments // 2, 1)
    starts = [straight_lines(z1, z2, half)]
    if routes is not None and attached is not None:
        starts.append(routes.paths(*attached, half))
    elif z1.shape[-1] > 1 and half > 1:
        starts.append(best_arcs(metric, z1, z2, half))
    curves = _relaxed(metric, _best(metric, starts, settings), segments, settings)
    failed = (~curves.converged).nonzero().squeeze(-1)
    if len(failed) and retry:
        more = settings._replace(num_segments=_RETRY * segments, target=None)
        again = None if attached is None else (attached[0].at(failed), attached[1].at(failed))
        tried = _solved(metric, z1[failed], z2[failed], routes, again, more, retry=False)
        good = tried.converged.nonzero().squeeze(-1)
        curves = _put(curves, failed[good], _Curves(*(a[good] for a in tried)))
        segments = curves.points.shape[1] - 1
    while settings.target is not None and segments < _MOST_SEGMENTS:
        error = curves.length_error
        if settings.target_points:
            error = torch.maximum(error, curves.point_error)
        coarse = (curves.converged & (error > settings.target)).nonzero().squeeze(-1)
        if len(coarse) == 0:
            break
        segments = 2 * segments
        finer = [
            _refined(metric, curves.points[index], curves.length[index], segments, settings)
            for index in coarse.split(max(1, _BLOCK // (segments * z1.shape[-1])))
        ]
        curves = _put(curves, coarse, _Curves(*map(torch.cat, zip(*finer))))
    return curves


def _relaxed(metric: Metric, start: Tensor, segments: int, settings: _Settings) -> _Curves:
    """The geodesics that ``start``, of half the segments, leads to."""
    first = minimise_energy(metric, start, settings.tolerance, settings.max_iterations)
    return _refined(metric, first.points, measure(metric, first.points)[1], segments, settings)


def _put(curves: _Curves, index: Tensor, finer: _Curves) -> _Curves:
    """``curves`` at as many nodes as ``finer``, which replace those at ``index``."""
    if len(index) == 0:
        return curves
    result = []
    for whole, part in zip(curves, finer):
        if whole.dim() > 1:
            whole = resample(whole, part.shape[1] - 1)
        result.append(whole.index_put((index,), part))
    return _Curves(*result)


def _best(metric: Metric, starts: Sequence[Tensor], settings: _Settings) -> Tensor:
    """Of the curves that several starts lead to, the one of least energy, a pair."""
    if len(starts) == 1:
        return starts[0]
    tolerance = max(settings.tolerance, _CHOICE)
    tried = minimise_energy(metric, torch.cat(list(starts)), tolerance, settings.max_iterations)
    points, energy = tried.points.unflatten(0, (len(starts), -1)), tried.energy.reshape(len(starts), -1)
    # Looked at closely, a curve that jumps over a wall of the metric, or through infinity, is a long one.
    unlike = (~(energy.amax(0) <= (1.0 + _SAME) * energy.amin(0))).nonzero().squeeze(-1)
    close = resample(points[:, unlike].flatten(0, 1), _CLOSELY * (points.shape[2] - 1))
    energy[:, unlike] = measure(metric, close)[0].reshape(len(starts), -1)
    choice = energy.argmin(0)
    return points[choice, torch.arange(len(choice), device=choice.device)]


def _refined(
    metric: Metric, coarse: Tensor, coarse_length: Tensor, segments: int, settings: _Settings
) -> _Curves:
    """The geodesics near ``coarse``, of twice as many segments, with the errors that the change betrays."""
    points, _, converged = minimise_energy(
        metric, resample(coarse, segments), settings.tolerance, settings.max_iterations
    )
    energy, length = measure(metric, points)
    uneven = (~(energy <= _UNEVEN * length.square())).nonzero().squeeze(-1)
    closely = length.clone()
    closely[uneven] = measure(metric, resample(points[uneven], _CLOSELY * segments))[1]
    positive = torch.where(closely > 0, closely, torch.ones_like(length))
    change = (length - closely).abs() / positive
    length = closely
    moved = resample(points, coarse.shape[1] - 1) - coarse
    shift = squared_norms(metric, coarse, moved).clamp(min=0).sqrt().amax(-1) / positive
    # The length is stationary, so that its error is of second order in that of the points. Where the change
    # of the length is smaller, two errors cancel: the curve's, which lengthens, and the quadrature's.
    length_error = torch.maximum((length - coarse_length).abs() / positive, shift.square())
    length_error = torch.maximum(length_error, change)
    infinite = ~torch.isfinite(length)
    return _Curves(
        points,
        energy,
        length,
        converged & ~infinite & (change <= _UNRESOLVED),
        length_error.masked_fill(infinite, torch.inf),
        (_RICHARDSON * shift).masked_fill(infinite, torch.inf),
    )


def _closed(
    metric: Metric,
    z: Tensor,
    found: Distances,
    routes: PointGraph | None,
    attached: Attachment | None,
    settings: _Settings,
) -> Distances:
    """Distances that no way through other points undercuts, the symmetric ``(N, N)`` ones given."""
    lengths, converged, errors = (a.clone() for a in found)
    count, d = z.shape
    above = torch.ones_like(converged).triu(1)
    pairs = torch.empty(2, 0, dtype=torch.long, device=z.device)
    known: dict[tuple[int, int], Tensor] = {}  # curves that were found on a way, from the lesser index
    for attempt in range(_ROUNDS + 1):
        ways, before = shortest_ways(lengths)
        pairs = (above & ~(lengths <= (1.0 + _UNDERCUT) * ways)).nonzero().mT
        pairs = pairs[:, torch.isfinite(ways[pairs[0], pairs[1]])]
        if pairs.shape[1] == 0 or attempt == _ROUNDS:
            break
        segments = settings.num_segments << attempt
        half = max(segments // 2, 1)
        for part in pairs.split(max(1, _BLOCK // (_CLOSELY * segments * d)), dim=1):
            trail = stations(before, part[0], part[1])
            edges = torch.stack([trail[:, 1:], trail[:, :-1]])
            edges = edges.sort(0).values
            codes, which = torch.unique(edges[0] * count + edges[1], return_inverse=True)
            a, b = codes // count, codes % count
            ends = None if attached is None else (attached.at(a), attached.at(b))
            pieces = _solved(metric, z[a], z[b], routes, ends, settings).points
            for e, key in enumerate(zip(a.tolist(), b.tolist())):
                if key in known:
                    pieces[e] = resample(known[key], pieces.shape[1] - 1)
            forward = (trail[:, :-1] < trail[:, 1:])[..., None, None]
            pieces = torch.where(forward, pieces[which], pieces[which].flip(-2))  # (B, H, K+1, d)
            corners = torch.cat([pieces[:, :, :-1].flatten(1, 2), pieces[:, -1, -1:]], 1)
            steps = pieces.shape[2] - 1
            hops = lengths[trail[:, :-1], trail[:, 1:]] / steps
            start = equally_spaced(corners, hops.repeat_interleave(steps, dim=1), half).flip(1)
            curves = _relaxed(metric, start, segments, settings)
            i, j = part
            better = curves.length < lengths[i, j]
            i, j, curves = i[better], j[better], _Curves(*(a[better] for a in curves))
            for rows, columns in ((i, j), (j, i)):
                lengths[rows, columns], errors[rows, columns] = curves.length, curves.length_error
                converged[rows, columns] = curves.converged
            known.update(zip(zip(i.tolist(), j.tolist()), curves.points))
    i, j = pairs
    excess = lengths[i, j] / ways[i, j] - 1.0
    for rows, columns in ((i, j), (j, i)):
        errors[rows, columns] = torch.maximum(errors[rows, columns], excess)
        lengths[rows, columns] = ways[i, j]
    return Distances(lengths, converged, errors)


def _joined(parts: list[_Curves], start: Tensor, num_segments: int) -> _Curves:
    """The blocks as one, at as many nodes as the finest of them."""
    if not parts:
        none = start.new_zeros(0)
        points = start.new_zeros(0, num_segments + 1, start.shape[-1])
        return _Curves(points, none, none, none.bool(), none, none)
    finest = max(part.points.shape[1] for part in parts) - 1
    parts = [_Curves(resample(part.points, finest), *part[1:]) for part in parts]
    return _Curves(*map(torch.cat, zip(*parts)))


def _differentiable(
    metric: Metric, scaled: Metric, factor: float, length: Tensor, z1: Tensor, z2: Tensor, points: Tensor
) -> Tensor:
    """``length`` with its gradient: at a minimum, that of the discrete length with the inner nodes fixed."""
    wanted = z1.requires_grad or z2.requires_grad or any(p.requires_grad for p in metric.parameters())
    if not (wanted and torch.is_grad_enabled()):
        return length
    a, b = torch.broadcast_tensors(z1, z2)
    nodes = points.reshape(*length.shape, *points.shape[1:])
    nodes = torch.cat([a.unsqueeze(-2), nodes[..., 1:-1, :], b.unsqueeze(-2)], -2)
    u, middle = nodes.diff(dim=-2), 0.5 * (nodes[..., 1:, :] + nodes[..., :-1, :])
    energy = u.shape[-2] * (u * (scaled.tensor(middle) @ u.unsqueeze(-1)).squeeze(-1)).sum((-1, -2))
    positive = energy > 0  # the distance has no gradient where the ends coincide
    discrete = factor * torch.where(positive, energy, torch.ones_like(energy)).sqrt() * positive
    return length + (discrete - discrete.detach())
