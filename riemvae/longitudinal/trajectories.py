"""Trajectories that the observed visits of a subject leave possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from riemvae._checks import summary
from riemvae.longitudinal.model import LongitudinalVAE
from riemvae.longitudinal.posterior_draws import DrawOptions, draws_of, for_each_subject
from riemvae.longitudinal.subject_batch import SubjectBatch


class ConditionalTrajectories(NamedTuple):
    """Possible trajectories of ``B`` subjects.

    Attributes:
        means: The decoder's means at all visits, ``(S, B, T, *shape)``.
        log_likelihood: ``log p(what is seen | z_0)`` of each, ``(S, B)``.
        log_weights: What each counts, ``(S, B)``, as of :class:`LatentDraws`.
        z_0: Their latents, ``(S, B, k)``.
        anchor: The visit that each comes from, ``(S, B)``, or None.
    """

    means: Tensor
    log_likelihood: Tensor
    log_weights: Tensor
    z_0: Tensor
    anchor: Tensor | None = None

    def __repr__(self) -> str:
        return summary(self)

    def ranked(self) -> ConditionalTrajectories:
        """The trajectories of each subject by the likelihood of what is seen, the best first (eq. 6.8)."""
        order = self.log_likelihood.argsort(0, descending=True)
        subjects = torch.arange(order.shape[1], device=order.device)
        parts: list[Any] = [part if part is None else part[order, subjects] for part in self]
        return ConditionalTrajectories(*parts)


def conditional_trajectories(
    model: LongitudinalVAE,
    guide: Callable[..., Any],
    data: Any,
    num_draws: int = 5,
    method: str = "guide",
    *,
    chunk_size: int | None = None,
    seed: int | None = None,
    progress: bool = False,
    **options: Any,
) -> ConditionalTrajectories:
    """Trajectories that one or several observed visits leave possible (figure 6.4).

    The seen visits are decoded too, not copied. To condition on one visit alone, mark that one alone as
    observed; :meth:`ConditionalTrajectories.ranked` sorts by the likelihood of what is seen.

    Args:
        model: A :class:`LongitudinalVAE`.
        guide: Its guide.
        data: As for :func:`draw_posterior`.
        num_draws: ``S``.
        method: As for :func:`draw_posterior`.
        chunk_size: Visits decoded at once; None is about 2,000.
        seed: Of the draws; the caller's generator is left as it was.
        progress: Shows a bar.
        **options: Of the method.

    Raises:
        ValueError: As :func:`draw_posterior`.

    Example:
        >>> from torch.distributions import AffineTransform
        >>> from riemvae.longitudinal import AnchoredGuide, FlowChain
        >>> model = LongitudinalVAE(torch.nn.Linear(2, 5), FlowChain([AffineTransform(0.0, 2.0)], 2))
        >>> guide = AnchoredGuide(model, lambda x: (x[:, :2], torch.ones(len(x), 2)))
        >>> x, observed = torch.randn(4, 2, 5), torch.tensor([[True, False]] * 4)
        >>> found = conditional_trajectories(model, guide, (x, observed), 3, seed=0).ranked()
        >>> found.means.shape, bool((found.log_likelihood.diff(dim=0) <= 0).all())
        (torch.Size([3, 4, 2, 5]), True)
    """
    chosen = DrawOptions(method, num_draws, **options)

    def estimate(batch: SubjectBatch) -> dict[str, Tensor]:
        draws = draws_of(batch, chosen)
        parts = draws.z_0.split([*batch.chunks(len(draws))])
        means = torch.cat([batch.model.likelihood.mean(batch.decode(z)).transpose(1, 2) for z in parts])
        found = {
            "means": batch.dated(means),
            "log_likelihood": torch.cat([batch.log_likelihood(z) for z in parts]),
            "log_weights": draws.log_weights,
            "z_0": draws.z_0,
            "anchor": draws.anchor,
        }
        return {name: value.transpose(0, 1) for name, value in found.items() if value is not None}

    found = for_each_subject(
        model, guide, data, estimate, chosen, chunk_size=chunk_size, seed=seed, progress=progress
    )
    return ConditionalTrajectories(**{name: value.transpose(0, 1) for name, value in found.items()})
