"""Nearest neighbours in data space, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_count, check_finite

_TILE_ELEMENTS = 1 << 22  # squared distances, or values of data, held at once
_TILE_ROWS = 1 << 10


class Nearest(NamedTuple):
    """The nearest reference of each point.

    Attributes:
        distances: Euclidean distances, shape ``(n,)``, or ``(n, k)`` ascending when ``k`` was given.
        indices: which references these are, of the same shape.
    """

    distances: Tensor
    indices: Tensor


def nearest(x: Any, reference: Any, k: int | None = None, *, skip_self: bool = False) -> Nearest:
    """The nearest of the ``reference`` data to each datum of ``x``, by the Euclidean distance of all values.

    Data may be images: everything after the first dimension is one vector. The search is exact: squared
    distances by matrix products in float64 after centring, and those of the winners once more by differences.
    Memory stays bounded for any number of data.

    Args:
        x: ``(n, *shape)``.
        reference: ``(N, *shape)``.
        k: how many neighbours; ``None`` is one, without a dimension for it.
        skip_self: ``x`` is the reference itself, and a datum is not its own neighbour (leave one out). An
            equal datum at another index is one.

    Returns:
        A :class:`Nearest` on the device of ``x``, distances in its dtype.

    Raises:
        ValueError: shapes that differ, NaN, no datum, or fewer references than neighbours.

    Example:
        >>> near = nearest(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> near.distances, near.indices
        (tensor([1.0000, 4.0000]), tensor([1, 0]))
        >>> nearest(torch.eye(3), torch.eye(3), skip_self=True).distances
        tensor([1.4142, 1.4142, 1.4142])
    """
    x, reference = flat_data("x", x), flat_data("reference", reference)
    reference = reference.to(x.device)
    if reference.shape[1] != x.shape[1]:
        raise argument_error("reference", f"data of {x.shape[1]} values, as in x", reference)
    if skip_self and len(x) != len(reference):
        raise argument_error("skip_self", "False where x and reference differ", True)
    count = 1 if k is None else check_count("k", k)
    if count + skip_self > len(reference):
        raise argument_error(
            "k", f"at most the number of other references, {len(reference) - skip_self}", count
        )
    best, indices = [], []
    for rows in row_slices(x, reference, count):
        part = x[rows]
        found = part.new_zeros(len(part), 0, dtype=torch.long)
        smallest = part.new_zeros(len(part), 0, dtype=torch.float64)
        for columns, squared in squared_distance_tiles(part, reference):
            if skip_self:
                own = torch.arange(rows.start, rows.stop, device=x.device)
                here = (own >= columns.start) & (own < columns.stop)
                squared[here, own[here] - columns.start] = torch.inf
            top = squared.topk(min(count, squared.shape[1]), largest=False)
            smallest, order = torch.cat([smallest, top.values], -1).sort(dim=-1)
            found = torch.cat([found, top.indices + columns.start], -1).gather(-1, order)[:, :count]
            smallest = smallest[:, :count]
        exact = (part[:, None].double() - reference[found].double()).square().sum(-1).sqrt()
        exact, order = exact.sort(dim=-1)
        best.append(exact)
        indices.append(found.gather(-1, order))
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    result = Nearest(torch.cat(best).to(dtype), torch.cat(indices))
    return result if k is not None else Nearest(*(part.squeeze(-1) for part in result))


def flat_data(name: str, data: Any) -> Tensor:
    """Data ``(n, *shape)``, arrays or tensors, as vectors ``(n, D)``."""
    tensor = torch.as_tensor(data).detach()
    if tensor.dim() < 1 or len(tensor) == 0:
        raise argument_error(name, "data (n, *shape) with at least one datum", tensor)
    check_finite(name, tensor)
    return tensor.reshape(len(tensor), -1)


def row_slices(x: Tensor, reference: Tensor, k: int = 1) -> Iterator[slice]:
    """Cuts ``x (n, D)`` into parts whose distances to a tile, and ``k`` neighbours a datum, fit memory."""
    size = max(1, min(_TILE_ROWS, _TILE_ELEMENTS // (k * reference.shape[1])))
    for start in range(0, len(x), size):
        yield slice(start, min(start + size, len(x)))


def squared_distance_tiles(x: Tensor, reference: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Columns of references ``(N, D)`` and the squared distances of all ``x (n, D)`` to them, in float64."""
    # Centred: |x|² + |r|² - 2 x·r cancels where data are far from the origin.
    centre = x.double().mean(0)
    x = x.double() - centre
    norms = x.square().sum(-1, keepdim=True)
    size = max(1, _TILE_ELEMENTS // max(_TILE_ROWS, x.shape[1]))
    for start in range(0, len(reference), size):
        columns = slice(start, min(start + size, len(reference)))
        part = reference[columns].double() - centre
        squared = torch.addmm(part.square().sum(-1), x, part.mT, alpha=-2.0).add_(norms)
        yield columns, squared.clamp_(min=0)
