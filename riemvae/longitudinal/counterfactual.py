"""The same subjects under other covariates: trajectories from one latent, and their paired differences."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_count, summary
from riemvae.longitudinal.imputation import central_interval


def one_hot(values: Sequence[Hashable] | Tensor, categories: Sequence[Hashable] | None = None) -> Tensor:
    """A categorical covariate (a site, a diagnosis, a treatment) as indicators.

    Keep the categories with the model: those of new data must be coded in the same order. Several covariates
    stand side by side, ``torch.cat([age[:, None], one_hot(sites, SITES)], 1)``; a missing value may be a
    category of its own.

    Args:
        values: ``B`` values, such as strings, or a vector of integers.
        categories: All ``K`` of them in the order of the columns; None: those that occur, sorted, with a
            missing value (None) last.

    Returns:
        ``(B, K)`` of zeros and ones, in torch's default dtype.

    Raises:
        ValueError: A category twice, a value that is in none, or, without ``categories``, values that have no
            order.

    Example:
        >>> one_hot(["B", "A", "B"], categories=["A", "B", "C"]).tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    items: list[Any] = values.tolist() if isinstance(values, Tensor) else list(values)
    known: list[Any] = _sorted(items) if categories is None else list(categories)
    columns = {category: column for column, category in enumerate(known)}
    if len(columns) < len(known):
        raise argument_error("categories", "each category once", str(known))
    unknown = [item for item in items if item not in columns]
    if unknown:
        raise argument_error("values", f"some of {known}", f"{len(unknown)} others such as {unknown[0]!r}")
    device = values.device if isinstance(values, Tensor) else None
    codes = torch.tensor([columns[item] for item in items], dtype=torch.long, device=device)
    return torch.nn.functional.one_hot(codes, len(known)).to(torch.get_default_dtype())


def _sorted(items: list[Any]) -> list[Any]:
    """The values that occur, None last."""
    found = set(items)
    try:
        return [*sorted(found - {None}), *({None} & found)]
    except TypeError as error:
        raise argument_error("values", "values of one kind", str(error), "pass categories=") from error


def counterfactual(
    model: Any,
    z_base: Tensor,
    times: Any = None,
    covariates: Any = None,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Decoded trajectories of the subjects with latents ``z_base``, at any times and under any covariates.

    With draws of ``z_base`` given a subject's data under its own covariates, the trajectories under others
    are what the model says would have been seen. They are causal only as far as the model is: its latent
    must not depend on the covariates, and nothing that the model does not know may act on covariates and
    data. Values are those that the model sees: a preprocessing is the caller's to undo.

    Args:
        model: A ``LongitudinalVAE``, or what has its ``dynamics`` and ``decoder_mean``.
        z_base: ``(..., B, k)``, values of the model's latent site.
        times: ``(B, T)``, or ``(T,)`` for all subjects; None where the visits are numbered.
        covariates: ``(B, c)``, or ``(c,)`` for all subjects, or None.
        chunk_size: How many latents are decoded at a time; None: all.

    Returns:
        The decoder's means, ``(..., B, T, *shape)``.

    Raises:
        ValueError: A model without these parts, shapes that do not fit.

    Source: the abduction, action and prediction of Pearl (2009), section 7.1, with the latent for the noise.

    Example:
        >>> from types import SimpleNamespace
        >>> from riemvae.longitudinal.time_flow import time_flow
        >>> model = SimpleNamespace(dynamics=time_flow(2, covariates=1), decoder_mean=lambda z: z)
        >>> u = torch.randn(100, 5, 2)  # 100 draws for 5 subjects
        >>> counterfactual(model, u, torch.linspace(0.0, 1.0, 4), torch.ones(1)).shape
        torch.Size([100, 5, 4, 2])
    """
    if not (hasattr(model, "dynamics") and hasattr(model, "decoder_mean")):
        raise argument_error("model", "a LongitudinalVAE", model)
    size = z_base.shape[-1] if z_base.dim() else None
    if z_base.dim() < 2 or size != model.dynamics.base_dim:
        raise argument_error("z_base", f"a tensor (..., B, {model.dynamics.base_dim})", z_base)
    subjects = z_base.shape[-2]
    if covariates is not None and getattr(model.dynamics, "covariates", None) == 0:
        raise argument_error(
            "covariates",
            "None for a model that takes none",
            covariates,
            "build it with covariates=, or there is no effect that it could show",
        )
    times, covariates = (None if v is None else as_like(v, z_base) for v in (times, covariates))
    z = model.dynamics.unroll(
        z_base,
        None if times is None else _of_each_subject("times", times, subjects),
        None if covariates is None else _of_each_subject("covariates", covariates, subjects),
    ).z
    rows = z.transpose(-3, -2)  # subjects before visits
    flat = rows.reshape(-1, rows.shape[-1])
    size = len(flat) if chunk_size is None else check_count("chunk_size", chunk_size)
    means = torch.cat([model.decoder_mean(part) for part in flat.split(max(size, 1))])
    return means.unflatten(0, rows.shape[:-1])


class Contrast(NamedTuple):
    """Trajectories of the same draws under two settings of the covariates.

    Attributes:
        first: Under the first setting, ``(S, B, T, *shape)``.
        second: Under the second.
    """

    first: Tensor
    second: Tensor

    def __repr__(self) -> str:
        return summary(self)

    @property
    def difference(self) -> Tensor:
        """Second minus first, draw by draw, ``(S, B, T, *shape)``."""
        return self.second - self.first

    @property
    def mean(self) -> Tensor:
        """The mean difference over the draws, ``(B, T, *shape)``."""
        return self.difference.mean(0)

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """The central interval of the difference over the draws, each end ``(B, T, *shape)``.

        The draws are paired, so what is uncertain about a subject and cancels in the difference does not
        widen it. They are draws of the latent alone: that the model's weights are estimates, and that it may
        be wrong, is not in the interval.

        Raises:
            ValueError: A level that is not between 0 and 1.
        """
        if not 0.0 < level < 1.0:
            raise argument_error("level", "a number between 0 and 1", level)
        return central_interval(self.difference, level)


def contrast(
    model: Any,
    z_base: Tensor,
    times: Any,
    first: Any,
    second: Any,
    *,
    chunk_size: int | None = None,
) -> Contrast:
    """Trajectories under two settings of the covariates, from the same draws of the latent.

    Args:
        model: As for :func:`counterfactual`.
        z_base: Draws ``(S, B, k)``.
        times: ``(B, T)``, ``(T,)`` or None.
        first: One setting, ``(B, c)`` or ``(c,)``.
        second: The other.
        chunk_size: How many latents are decoded at a time.

    Raises:
        ValueError: As for :func:`counterfactual`; latents without draws.

    Example:
        >>> from types import SimpleNamespace
        >>> from riemvae.longitudinal.time_flow import time_flow
        >>> model = SimpleNamespace(dynamics=time_flow(2, covariates=1), decoder_mean=lambda z: z)
        >>> effect = contrast(model, torch.randn(100, 5, 2), torch.zeros(4), torch.zeros(1), torch.ones(1))
        >>> effect.mean.shape, effect.interval(0.9)[0].shape
        (torch.Size([5, 4, 2]), torch.Size([5, 4, 2]))
    """
    if z_base.dim() != 3 or len(z_base) == 0:
        raise argument_error("z_base", "draws (S, B, k)", z_base, "one draw is z_base[None]")
    return Contrast(
        counterfactual(model, z_base, times, first, chunk_size=chunk_size),
        counterfactual(model, z_base, times, second, chunk_size=chunk_size),
    )


def as_like(values: Any, like: Tensor) -> Tensor:
    """A list, array or tensor as a tensor beside ``like``: floating-point ones keep their precision."""
    tensor = torch.as_tensor(values, device=like.device)
    return tensor if tensor.is_floating_point() else tensor.to(like.dtype)


def _of_each_subject(name: str, values: Tensor, subjects: int) -> Tensor:
    """``(B, n)`` from ``(B, n)``, ``(1, n)`` or ``(n,)``."""
    rows = values.unsqueeze(0) if values.dim() == 1 else values
    if rows.dim() != 2 or rows.shape[0] not in (1, subjects):
        raise argument_error(name, f"a tensor ({subjects}, n), or (n,) for all subjects", values)
    return rows.expand(subjects, -1)
