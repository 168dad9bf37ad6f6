"""All geodesic distances of a set of points, against the peer's solver, and how they grow."""

from __future__ import annotations

import torch
from measure import Result, Row, Timing, alternate, bounded, clock
from models import REGULARIZATION, TEMPERATURE, centroid_cloud
from stochman.manifold import Manifold
from torch import Tensor

import riemvae as rv
from riemvae.geometry.geodesics import distance_matrix

TITLE = "geodesic distances, 16 segments, optimiser tolerance 1e-5"
SECONDS, FACTOR = 6.0, 60.0
POINTS, SEGMENTS, TOLERANCE = 180, 16, 1e-5
SAMPLE = 192  # pairs that the peer solves
BATCH = 64  # pairs in one call of the peer, where it takes batches: about its fastest
VARIED = {
    "pairs": ("points", (45, 90, 180, 360)),
    "d": ("latent dimension d", (2, 4, 8, 16, 32)),
    "N": ("centroids N", (180, 720, 2880)),
}


class PeerManifold(Manifold):
    """The peer's manifold with our metric, through whose closed-form gradient its solver then goes back."""

    def __init__(self, metric: rv.geometry.Metric) -> None:
        self._metric = metric

    def metric(self, points: Tensor) -> Tensor:
        return self._metric.tensor(points)


def run(quick: bool) -> Result:
    metric, points = _metric(POINTS, 2)
    sample = _sample(SAMPLE // 4 if quick else SAMPLE)
    manifold = PeerManifold(metric)
    singles, batches = [], []

    def one_by_one() -> None:
        singles[:] = [manifold.connecting_geodesic(points[i], points[j])[0] for i, j in sample.tolist()]

    def batched() -> None:
        batches[:] = [
            manifold.connecting_geodesic(points[part[:, 0]], points[part[:, 1]])[0]
            for part in sample.split(BATCH)
        ]

    sides = {
        "ours": lambda: distance_matrix(metric, points, num_segments=SEGMENTS, tolerance=TOLERANCE),
        "single": one_by_one,
        "batched": batched,
    }
    timings = alternate(sides, 2 if quick else 5)
    result = distance_matrix(metric, points, num_segments=SEGMENTS, tolerance=TOLERANCE, full=True)
    pairs = POINTS * (POINTS - 1) // 2
    ours = timings["ours"]
    values = {
        "ours, s": ours.median,
        "ours quartiles": [ours.low, ours.high],
        "discretisation error, mean": float(result.discretisation_error.mean()),
        "discretisation error, largest": float(result.discretisation_error.max()),
        "converged": float(result.converged.double().mean()),
    }
    rows = [bounded(f"{pairs:,} pairs of {POINTS} points, d = 2", ours.median, SECONDS, " s", values)]
    lengths = result.distance[sample[:, 0], sample[:, 1]]
    for name, curves, label in (
        ("single", singles, "pair by pair"),
        ("batched", batches, f"in batches of {BATCH}"),
    ):
        rows.append(_compared(label, ours, timings[name], lengths, _lengths(metric, curves), pairs))
    for key, (label, settings) in VARIED.items():
        for setting in settings[:2] if quick else settings:
            rows.append(_grown(key, label, setting))
    method = (
        "riemvae's distance_matrix in float32, centroids = points, T = 0.8, λ = 1e-3. The peer is stochman "
        "0.3.0's connecting_geodesic (cubic spline, Adam, up to 150 steps: its defaults) on "
        f"{len(sample)} of the pairs, its time scaled to all; it evaluates riemvae's metric. Excess: the "
        "peer's length over ours, the mean over those pairs, both measured finely. Growth: one thing varied, "
        "the others at 180 points, d = 2, N = 180; the error is the stated discretisation error, its mean."
    )
    return Result(TITLE, method, rows, ("ours, s", "peer, s", "excess of the peer", "us a pair", "error"))


def _metric(count: int, d: int) -> tuple[rv.geometry.CentroidMetric, Tensor]:
    centroids, factors = centroid_cloud(count, d)
    # Bumps of T = 0.8 overlap at d = 2; their width grows as the distance of neighbours does.
    temperature = TEMPERATURE * (d / 2) ** 0.5
    return rv.geometry.CentroidMetric(centroids, factors, temperature, REGULARIZATION), centroids


def _sample(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.triu_indices(POINTS, POINTS, 1).mT
    return pairs[torch.randperm(len(pairs), generator=generator)[:count]]


@torch.no_grad()
def _lengths(metric: rv.geometry.Metric, curves: list[torch.nn.Module]) -> Tensor:
    """The lengths of the peer's splines, by the midpoint rule with 512 segments."""
    t = torch.linspace(0, 1, 513)
    points = torch.cat([p if p.dim() == 3 else p.unsqueeze(0) for p in (curve(t) for curve in curves)])
    middle = 0.5 * (points[:, 1:] + points[:, :-1])
    return metric.norm(middle, points.diff(dim=1)).sum(-1)


def _compared(label: str, ours: Timing, peer: Timing, lengths: Tensor, theirs: Tensor, pairs: int) -> Row:
    scale = pairs / len(lengths)
    factor = scale * peer.median / ours.median
    values = {
        "ours, s": ours.median,
        "peer, s": scale * peer.median,
        "excess of the peer": float((theirs / lengths).mean() - 1),
        "peer's paths shorter than ours by 1e-3": int((theirs < lengths * (1 - 1e-3)).sum()),
        "pairs solved by the peer": len(lengths),
        "peer's seconds": peer.median,
    }
    met = factor >= FACTOR and values["excess of the peer"] >= -TOLERANCE
    return Row(f"stochman {label}", values, f"{factor:.0f}x", f">= {FACTOR:g}x", met)


def _grown(key: str, label: str, setting: int) -> Row:
    size = {"pairs": POINTS, "d": 2, "N": POINTS} | {key: setting}
    metric, _ = _metric(size["N"], size["d"])
    points, _ = centroid_cloud(size["pairs"], size["d"])
    start = clock()
    result = distance_matrix(metric, points, num_segments=SEGMENTS, tolerance=TOLERANCE, full=True)
    seconds = clock() - start
    pairs = len(points) * (len(points) - 1) // 2
    values = {
        "varied": key,
        "setting": setting,
        "ours, s": seconds,
        "us a pair": 1e6 * seconds / pairs,
        "error": float(result.discretisation_error.mean()),
        "converged": float(result.converged.double().mean()),
    }
    return Row(f"{label} = {setting:,}", values)
