"""Log-likelihoods of each datum at draws of the global latents, those of each datum integrated out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from riemvae._checks import argument_error
from riemvae.guides.log_joint import prototype
from riemvae.inference.resampling import (
    local_latents,
    log_probs,
    observed_sites,
    run_at,
    structure_of,
)
from riemvae.inference.weights import DEFAULT_CHUNK, log_mean_exp, weight_chunks


def pointwise_log_likelihood(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    values: Mapping[str, Tensor],
    num_samples: int = 100,
    pairs: int = DEFAULT_CHUNK,
) -> dict[str, Tensor]:
    """``log p(x_b | θ_g)`` at ``G`` draws of the global latents ``θ``, ``(G, B)``.

    A model without local latents gives one array for each observed site. Where it has local latents, its one
    array is ``log p̂(x_b | θ_g) = log mean_s w_s`` by ``num_samples`` draws of the guide at ``θ_g``, which is
    what leave-one-out over the draws of ``θ`` needs; at the drawn local latents it would be conditional.

    Without local latents the draws go through the model in chunks, where that gives the same numbers as one
    at a time (the first and last of the first chunk are computed both ways); a model that does not broadcast
    over them takes them one at a time.

    Args:
        model: The model itself.
        guide: A guide of the local latents; its ``given=`` is replaced by each draw. None for a model without
            local latents.
        args: The model's arguments.
        kwargs: Its keyword arguments.
        size: ``B``.
        values: Draws of all global latents by site, ``(G, *batch, *event)``.
        num_samples: Draws of the guide for each ``θ_g``.
        pairs: Data times draws evaluated at once.

    Raises:
        ValueError: Local latents and no guide.
    """
    first = {name: value[0] for name, value in values.items()}
    trace, plate, nesting = structure_of(poutine.condition(model, first), args, kwargs)
    local = local_latents(trace, plate)
    if local and guide is None:
        raise argument_error(
            "guide",
            f"a guide of the local latents {sorted(local)}, to integrate them out",
            None,
            "az.loo at their drawn values would be conditional, and mislead",
        )
    data = list(observed_sites(trace, plate))
    num = len(next(iter(values.values())))
    if local and guide is not None:
        name = data[0] if len(data) == 1 else "data"
        estimates = [
            log_mean_exp(torch.cat(list(parts)).double())
            for parts in (
                weight_chunks(
                    *(model, guide, args, kwargs, size, num_samples, pairs),
                    {site: value[index] for site, value in values.items()},
                )
                for index in range(num)
            )
        ]
        return {name: torch.stack(estimates)}

    def one(index: int) -> dict[str, Tensor]:
        at = {name: value[index] for name, value in values.items()}
        return log_probs(prototype(poutine.condition(model, at), args, kwargs), data, nesting, 1, size)

    held = {name: _broadcast(value, trace.nodes[name], nesting) for name, value in values.items()}
    step = max(1, pairs // size)
    parts: list[dict[str, Tensor]] = []
    for start in range(0, num, step):
        part = {name: value[start : start + step] for name, value in held.items()}
        count = min(step, num - start)
        try:
            drawn = run_at(model, args, kwargs, part, count, nesting)
            parts.append(log_probs(drawn, data, nesting, count, size))
        except (RuntimeError, ValueError, IndexError):
            break  # it does not broadcast over draws
        if start == 0 and not all(_same(parts[0], row, one(row)) for row in {0, count - 1}):
            break  # it broadcasts to something else
    else:
        return _joined(parts)
    return _joined([one(index) for index in range(num)])


def _same(parts: Mapping[str, Tensor], row: int, alone: Mapping[str, Tensor]) -> bool:
    return all(torch.allclose(part[row], alone[name][0], 1e-4, 1e-5) for name, part in parts.items())


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _broadcast(value: Tensor, site: Mapping[str, Any], nesting: int) -> Tensor:
    """Draws ``(G, *batch, *event)`` of a site with all plates' dimensions between."""
    event = len(site["fn"].event_shape)
    batch = value.dim() - 1 - event
    return value.reshape(value.shape[:1] + (1,) * (nesting - batch) + value.shape[1:])
