"""Nearest sequences, also to sequences with missing visits."""

from __future__ import annotations

from typing import Any

import torch

from riemvae._checks import argument_error
from riemvae.evaluation.neighbours import Nearest, nearest

_TILE_ELEMENTS = 1 << 22  # squared distances, or values of sequences, held at once
_TILE_ROWS = 1 << 10


def nearest_sequences(generated: Any, train: Any, observed: Any | None = None) -> Nearest:
    """The nearest training sequence of each generated one, by the Euclidean distance of all values.

    With missing visits the distance is taken over a training sequence's observed ones, and scaled to all
    visits: ``√(T / T_seen · Σ_seen ‖·‖²)``. What lies in the others is not looked at. Memory stays bounded
    for any number of sequences.

    Args:
        generated: ``(n, T, *shape)``.
        train: ``(N, T, *shape)``.
        observed: Which visits of `train` were seen, ``(N, T)`` boolean; None: all. A sequence without an
            observed visit is nobody's neighbour.

    Returns:
        Distances ``(n,)`` and indices into `train` ``(n,)``.

    Raises:
        ValueError: Shapes that differ, a mask that is not boolean or empty, NaN where values were observed.

    Source: Chadebec (2023), section 6.7.2; the scaling is that of Dixon (1979).

    Example:
        >>> train = torch.tensor([[[0.0], [0.0]], [[3.0], [9.0]]])
        >>> seen = torch.tensor([[True, True], [True, False]])
        >>> nearest_sequences(torch.tensor([[[3.0], [4.0]]]), train, seen).indices
        tensor([1])
    """
    generated, train = torch.as_tensor(generated).detach(), torch.as_tensor(train).detach()
    if generated.dim() < 3 or generated.shape[1:] != train.shape[1:]:
        raise argument_error(
            "generated", f"sequences (n, T, *shape) like train, {tuple(train.shape)}", generated
        )
    if observed is None:
        return nearest(generated, train)
    seen = torch.as_tensor(observed)
    if seen.dtype != torch.bool or seen.shape != train.shape[:2]:
        raise argument_error("observed", f"a boolean tensor {tuple(train.shape[:2])}", seen)
    seen = seen.to(generated.device)
    train = train.to(generated.device)
    kept = seen.any(1).nonzero().squeeze(1)
    if not len(kept):
        raise argument_error("observed", "a training sequence with an observed visit", "none")
    visits = generated.shape[1]
    mask = seen.reshape(*seen.shape, *([1] * (train.dim() - 2)))
    filled = torch.where(mask, train, torch.zeros_like(train))
    for name, values in (("generated", generated), ("train", filled)):
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise argument_error(name, "finite values where they were observed", "NaN or infinite ones")
    centre = generated.flatten(1).double().mean(0)
    rows = generated.flatten(1).double() - centre
    values = rows.shape[1] // visits  # of one visit
    best = rows.new_full((len(rows),), torch.inf)
    indices = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    # Σ_t m_t ‖g_t - x_t‖² = Σ_t m_t ‖g_t‖² + Σ_t m_t ‖x_t‖² - 2 g·(m x): two matrix products a tile.
    norms = rows.reshape(len(rows), visits, values).square().sum(-1)
    size = max(1, _TILE_ELEMENTS // max(_TILE_ROWS, rows.shape[1]))
    for columns in kept.split(size):
        m = seen[columns].double()
        x = (filled[columns].flatten(1).double() - centre) * m.repeat_interleave(values, 1)
        own, scale = x.square().sum(-1), visits / m.sum(1)
        for part in torch.arange(len(rows), device=rows.device).split(_TILE_ROWS):
            squared = (norms[part] @ m.mT + own - 2.0 * rows[part] @ x.mT) * scale
            least, where = squared.min(1)
            better = least < best[part]
            best[part] = torch.where(better, least, best[part])
            indices[part] = torch.where(better, columns[where], indices[part])
    # The winners once more by differences, which do not cancel.
    exact = rows.new_empty(len(rows))
    for part in torch.arange(len(rows), device=rows.device).split(max(1, _TILE_ELEMENTS // rows.shape[1])):
        chosen = indices[part]
        gap = (generated[part].double() - filled[chosen].double()) * mask[chosen]
        exact[part] = (gap.flatten(1).square().sum(1) * visits / seen[chosen].sum(1)).sqrt()
    dtype = generated.dtype if generated.is_floating_point() else torch.get_default_dtype()
    return Nearest(exact.to(dtype), indices)
