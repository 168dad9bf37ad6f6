"""The training loss of chapter 6 as published: the reconstruction averaged over each subject's visits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine

from riemvae._recipe import recipe
from riemvae.guides.log_joint import BATCH_DIM, data_plate, in_batch, is_subsample
from riemvae.inference.elbo import ELBO
from riemvae.inference.schedules import Schedule

_PARTICLES = "num_particles_vectorized"  # Pyro's name for the plate of vectorised particles


@recipe
class LengthAveraged(ELBO):
    r"""Algorithm 6's loss: the reconstruction of a subject divided by its number of observed visits.

    .. math:: L_b = -\frac{1}{n_b} \sum_{l} \log p(x_l | z_l) + \log q(z_0 | x) - \log p(z_0)

    This is **no bound** on ``log p(x)``: for sequences of one length ``n`` it is the β-VAE with ``β = n``,
    divided by ``n``, and its posterior collapses on small sets. It is here for comparison with published
    numbers; train on :class:`~riemvae.ELBO`, and report a likelihood by :func:`riemvae.log_likelihood`.

    Args:
        free_bits: As for :class:`~riemvae.ELBO`, and so the others.
        num_particles: Draws a subject.
        vectorize_particles: Draw them at once.
        beta: A further weight on the KL part.
        capacity: Of the KL part.

    Raises:
        ValueError: As for :class:`~riemvae.ELBO`.

    Source: Chadebec (thesis), section 6.3.2, algorithm 6.

    Example:
        >>> from torch.distributions import AffineTransform
        >>> from riemvae.longitudinal import AnchoredGuide, FlowChain, LongitudinalVAE
        >>> model = LongitudinalVAE(torch.nn.Linear(2, 5), FlowChain([AffineTransform(0.0, 2.0)], 2))
        >>> guide = AnchoredGuide(model, lambda x: (x[:, :2], torch.ones(len(x), 2)))
        >>> LengthAveraged().differentiable_loss(model, guide, torch.randn(4, 2, 5)).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        free_bits: float | None = None,
        num_particles: int = 1,
        vectorize_particles: bool = False,
        beta: float | Schedule = 1.0,
        capacity: float | Schedule | None = None,
    ) -> None:
        super().__init__(
            free_bits=free_bits,
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            beta=beta,
            capacity=capacity,
        )

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[poutine.Trace, poutine.Trace]:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        plate = data_plate(model_trace)
        sites: list[Any] = list(model_trace.nodes.values())
        for site in sites:
            if site["type"] == "sample" and site["is_observed"] and not is_subsample(site):
                if in_batch(site, plate):
                    _average_over_visits(site)
        return model_trace, guide_trace


def _average_over_visits(site: Any) -> None:
    """Divides an observed site's term of each subject by how many visits its mask leaves."""
    log_prob = site["log_prob"]
    inner = [
        frame.dim
        for frame in site["cond_indep_stack"]
        if frame.dim is not None and frame.dim < BATCH_DIM and frame.name != _PARTICLES
    ]
    mask = site["mask"]
    seen = (
        torch.ones_like(log_prob) if mask is None else torch.as_tensor(mask).to(log_prob).expand_as(log_prob)
    )
    count = seen.sum(inner, keepdim=True) if inner else seen
    site["log_prob"] = log_prob / count.clamp_min(1.0)
    site["log_prob_sum"] = site["log_prob"].sum()
