"""Sequences of new subjects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_count
from riemvae._modes import in_evaluation_mode
from riemvae._seeding import forked
from riemvae.inference.weights import DEFAULT_CHUNK, placement
from riemvae.longitudinal.model import LongitudinalVAE


@torch.no_grad()
def generate(
    model: LongitudinalVAE,
    num: int,
    times: Tensor | None = None,
    covariates: Tensor | None = None,
    *,
    noise: bool = False,
    chunk_size: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """New subjects: ``z_0`` from the prior, carried through all visits and decoded.

    Args:
        model: A :class:`LongitudinalVAE`.
        num: ``n``, how many.
        times: ``(n, T)``, or ``(T,)`` for all of them; None where visits are numbered.
        covariates: ``(n, c)``, or ``(c,)`` for all of them.
        noise: Draws with observation noise in place of the decoder's means.
        chunk_size: Visits decoded at once; None is about 2,000.
        seed: Of the draws; the caller's generator is left as it was.

    Returns:
        ``(n, T, *shape)``.

    Raises:
        ValueError: A model of another class, times or covariates of another number of subjects.

    Example:
        >>> from torch.distributions import AffineTransform
        >>> from riemvae.longitudinal import FlowChain
        >>> model = LongitudinalVAE(torch.nn.Linear(2, 5), FlowChain([AffineTransform(0.0, 2.0)], 2))
        >>> generate(model, 3, seed=0).shape
        torch.Size([3, 2, 5])
    """
    if not isinstance(model, LongitudinalVAE):
        raise argument_error("model", "a LongitudinalVAE", model)
    check_count("num", num)
    times, covariates = _of_each("times", times, num), _of_each("covariates", covariates, num)
    device, _ = placement(model)
    if device is not None:
        times = None if times is None else times.to(device)
        covariates = None if covariates is None else covariates.to(device)
    visits = DEFAULT_CHUNK if chunk_size is None else check_count("chunk_size", chunk_size)
    step = max(1, visits // model.dynamics.count_visits(times))
    parts = []
    with forked(seed), in_evaluation_mode(model):
        for start in range(0, num, step):
            rows = slice(start, min(start + step, num))
            some = None if times is None else times[rows]
            prior: Any = model.prior_of(some)
            size = rows.stop - rows.start
            z_0 = prior.sample(() if prior.batch_shape == (size,) else (size,))
            known = None if covariates is None else covariates[rows]
            parameters = model.decode(model.trajectory(z_0, some, known))
            found = model.likelihood(parameters, 2).sample() if noise else model.likelihood.mean(parameters)
            parts.append(found.transpose(0, 1))
    return torch.cat(parts)


def _of_each(name: str, values: Tensor | None, num: int) -> Tensor | None:
    if values is None:
        return None
    rows = values.unsqueeze(0) if values.dim() == 1 else values
    if rows.dim() != 2 or len(rows) not in (1, num):
        raise argument_error(name, f"a tensor ({num}, n), or (n,) for all subjects", values)
    return rows.expand(num, -1)
