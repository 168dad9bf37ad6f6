"""Where geodesics start from: straight lines, arcs round what is in the way, paths through a graph."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import csgraph_from_dense, dijkstra, floyd_warshall, minimum_spanning_tree
from torch import Tensor

from riemvae.geometry.hermite import measure, resample, squared_norms
from riemvae.geometry.metric import Metric
from riemvae.geometry.polygons import along

_NEIGHBOURS = 10  # of a node in the graph
_ATTACHED = 5  # nodes that an end of a curve is joined to
_MOST_NODES = 1000
_ARC_HEIGHTS = (0.05, 0.2, 0.6)  # as shares of the distance of the ends
_ARC_DIRECTIONS = 8
# An arc's energy may grow so much when it is looked at closely; more means that it passes through a wall.
_RESOLVED = 1.5
# Three-point Gauss-Legendre nodes and weights of [0, 1].
_GAUSS = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))


def straight_lines(z1: Tensor, z2: Tensor, num_segments: int) -> Tensor:
    """Nodes ``(B, K+1, d)`` of the straight lines from ``z1`` to ``z2 (B, d)``."""
    t = torch.linspace(0.0, 1.0, num_segments + 1, dtype=z1.dtype, device=z1.device).unsqueeze(-1)
    return torch.lerp(z1.unsqueeze(1), z2.unsqueeze(1), t)


def chord_lengths(metric: Metric, z1: Tensor, z2: Tensor) -> Tensor:
    """The length of the lines from ``z1`` to ``z2 (..., d)``, ``inf`` where the metric is not finite."""
    u = z2 - z1
    squares = torch.stack([squared_norms(metric, z1 + node * u, u) for node, _ in _GAUSS])
    weights = torch.tensor([weight for _, weight in _GAUSS], dtype=u.dtype, device=u.device)
    length = torch.einsum("q,q...->...", weights, squares.sqrt())
    return torch.where(torch.isfinite(length), length, torch.inf)


def best_arcs(metric: Metric, z1: Tensor, z2: Tensor, num_segments: int) -> Tensor:
    """Of arcs to several sides of each straight line, the one of least energy, or the line itself.

    A straight line over the top of a hill is a saddle of the energy: the gradient does not say to go round.
    """
    line = straight_lines(z1, z2, num_segments)
    u = z2 - z1
    d = u.shape[-1]
    best, least = line.clone(), measure(metric, line)[0]
    # The reflection that takes u/‖u‖ to ∓e_1: its other columns are a basis across the line.
    unit = torch.nn.functional.normalize(u, dim=-1)
    sign = torch.where(unit[:, :1] < 0, -1.0, 1.0).to(u)
    normal = torch.nn.functional.normalize(
        unit + sign * torch.eye(d, dtype=u.dtype, device=u.device)[0], dim=-1
    )
    bump = torch.linspace(0.0, torch.pi, num_segments + 1, dtype=u.dtype, device=u.device).sin().unsqueeze(-1)
    for column in range(1, min(d, _ARC_DIRECTIONS + 1)):
        across = -2.0 * normal * normal[:, column : column + 1]
        across[:, column] += 1.0
        across = across * u.norm(dim=-1, keepdim=True)
        for height in (side * h for h in _ARC_HEIGHTS for side in (1.0, -1.0)):
            arc = line + height * across.unsqueeze(1) * bump
            energy, _ = measure(metric, arc)
            closely, _ = measure(metric, resample(arc, 4 * num_segments))
            better = (energy < least) & (closely < _RESOLVED * energy)
            best = torch.where(better[:, None, None], arc, best)
            least = torch.where(better, energy, least)
    return best


class Attachment(NamedTuple):
    """Points joined to a graph.

    Attributes:
        points: ``(B, d)``.
        nodes: the nearest nodes of each, ``(B, k)``.
        lengths: of the straight lines to them, ``(B, k)``.
    """

    points: Tensor
    nodes: Tensor
    lengths: Tensor

    def at(self, index: Tensor) -> Attachment:
        """Some of the points."""
        return Attachment(*(a[index] for a in self))


class PointGraph:
    """The shortest paths among points along straight edges, measured with a metric.

    The edges join each point to its nearest ones, in coordinates; the edges of the Euclidean minimum spanning
    tree join what that leaves apart, so that the graph is connected. Edges where the metric is not finite are
    left out.

    Args:
        metric: The metric.
        nodes: Points ``(M, d)``; more than a thousand are thinned out evenly.
    """

    def __init__(self, metric: Metric, nodes: Tensor) -> None:
        stride = -(-len(nodes) // _MOST_NODES)
        nodes = torch.unique(nodes[::stride], dim=0)
        self.metric, self.nodes = metric, nodes
        count = len(nodes)
        separation = torch.cdist(nodes, nodes)
        near = separation.topk(min(_NEIGHBOURS + 1, count), largest=False).indices
        tree = minimum_spanning_tree(separation.double().cpu().numpy()).tocoo()
        rows = torch.arange(count, device=nodes.device).unsqueeze(-1).expand_as(near)
        joining = torch.from_numpy(np.stack([tree.row, tree.col])).to(near)
        edges = torch.cat([torch.stack([rows.reshape(-1), near.reshape(-1)]), joining], 1)
        edges = torch.unique(edges.sort(0).values, dim=1)
        edges = edges[:, edges[0] != edges[1]]
        lengths = chord_lengths(metric, nodes[edges[0]], nodes[edges[1]])
        passable = torch.isfinite(lengths)
        row, column = edges[:, passable].cpu().numpy()
        weights = lengths[passable].double().cpu().numpy()
        matrix = coo_matrix((weights, (row, column)), shape=(count, count)).tocsr()
        distances, predecessors = dijkstra(matrix, directed=False, return_predecessors=True)
        self._distances = torch.from_numpy(distances).to(nodes)
        self._predecessors = torch.from_numpy(predecessors).to(nodes.device).long()

    def attach(self, z: Tensor) -> Attachment:
        """Joins points ``(B, d)`` to their nearest nodes."""
        nodes = torch.cdist(z, self.nodes).topk(min(_ATTACHED, len(self.nodes)), largest=False).indices
        lengths = chord_lengths(self.metric, z.unsqueeze(1).expand(*nodes.shape, -1), self.nodes[nodes])
        return Attachment(z, nodes, lengths)

    def paths(self, start: Attachment, end: Attachment, num_segments: int) -> Tensor:
        """The shortest paths from ``start`` to ``end``: nodes ``(B, K+1, d)`` at equal distances along them.

        A straight line where no path leads.
        """
        ways = (
            start.lengths.unsqueeze(-1)
            + self._distances[start.nodes.unsqueeze(-1), end.nodes.unsqueeze(-2)]
            + end.lengths.unsqueeze(-2)
        )
        best = ways.flatten(1).argmin(-1, keepdim=True)
        first = best // end.nodes.shape[-1]
        last = best % end.nodes.shape[-1]
        node, target = start.nodes.gather(1, first).squeeze(-1), end.nodes.gather(1, last).squeeze(-1)
        trail, lengths = [node], [start.lengths.gather(1, first).squeeze(-1)]
        while bool((node != target).any()):
            following = self._predecessors[target, node]  # the graph is undirected: a step nearer the target
            following = torch.where(following < 0, target, following)  # there already, or no way
            lengths.append(self._distances[node, following])
            trail.append(following)
            node = following
        lengths.append(end.lengths.gather(1, last).squeeze(-1))
        corners = torch.cat(
            [start.points.unsqueeze(1), self.nodes[torch.stack(trail, 1)], end.points.unsqueeze(1)], 1
        )
        path = equally_spaced(corners, torch.stack(lengths, 1), num_segments)
        reached = torch.isfinite(ways.flatten(1).amin(-1))[:, None, None]
        return torch.where(reached, path, straight_lines(start.points, end.points, num_segments))


def shortest_ways(distances: Tensor) -> tuple[Tensor, Tensor]:
    """The shortest ways between all nodes of a graph, given by its ``distances (N, N)``, ``inf`` for none.

    Returns:
        Their lengths ``(N, N)``, and the nodes before the last ones, ``(N, N)``: negative where no way leads.
    """
    dense = distances.detach().double().cpu().numpy()
    # Not a dense array: in that a distance of zero, of coincident points, would be no edge.
    graph = csgraph_from_dense(dense, null_value=np.inf)
    lengths, before = floyd_warshall(graph, directed=False, return_predecessors=True)
    return torch.from_numpy(lengths).to(distances), torch.from_numpy(before).to(distances.device).long()


def stations(before: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The nodes of ways from ``start`` to ``end (B,)``, ``(B, H+1)``; shorter ways end in repetitions."""
    trail = [end]
    while bool((trail[-1] != start).any()):
        trail.append(torch.where(trail[-1] == start, start, before[start, trail[-1]]))
    return torch.stack(trail, 1)  # the graph is undirected: from the end, which is as good


def equally_spaced(corners: Tensor, lengths: Tensor, num_segments: int) -> Tensor:
    """Points at equal distances along lines with ``corners (B, H+1, d)`` and edges of ``lengths (B, H)``."""
    t = torch.linspace(0.0, 1.0, num_segments + 1, dtype=lengths.dtype, device=lengths.device)
    nodes = along(corners, lengths, t)
    nodes[:, 0], nodes[:, -1] = corners[:, 0], corners[:, -1]
    return nodes
