"""What chapter 5 does with a trained model: codes, a mixture of them, synthetic patients, other times."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution

from riemvae._checks import argument_error, check_count, summary
from riemvae._modes import in_evaluation_mode
from riemvae._seeding import forked
from riemvae.longitudinal.counterfactual import as_like
from riemvae.longitudinal.linear_trajectory import LinearTrajectory
from riemvae.longitudinal.model import LongitudinalVAE


class SyntheticTrajectories(NamedTuple):
    """Sequences that nobody has.

    Attributes:
        x: The likelihood's means, or draws of it, ``(n, T, *shape)``.
        z_0: The subjects' latents ``(η, τ, λ)``, ``(n, d + 1)``.
    """

    x: Tensor
    z_0: Tensor

    def __repr__(self) -> str:
        return summary(self)


@torch.no_grad()
def trajectory_codes(guide: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The posterior means of ``(η, τ, λ)`` given the observed visits.

    Args:
        guide: A guide with ``posterior``, such as ``GaussianGuide(model, TrajectoryEncoder(...),
            latent=dynamics.site)``.
        args: The model's arguments: ``x, observed, pixel_mask, times, covariates``.
        kwargs: The same by name.

    Returns:
        ``(B, d + 1)``.
    """
    with poutine.block(), in_evaluation_mode(guide):
        return guide.posterior(*args, **kwargs).mean  # type: ignore[no-any-return]


@torch.no_grad()
def sample_trajectories(
    model: LongitudinalVAE,
    times: Tensor,
    spatial: Distribution | Tensor | None = None,
    *,
    size: int | None = None,
    noise: bool = False,
    seed: int | None = None,
) -> SyntheticTrajectories:
    """Synthetic patients: ``η`` and ``τ`` from the prior, ``λ`` from wherever it is wanted from.

    Args:
        model: A model with a :class:`LinearTrajectory`, whose prior has ``λ`` independent of ``η`` and ``τ``.
        times: At which to look at them: ``(T,)`` or ``(1, T)`` for all, or ``(n, T)``.
        spatial: A distribution with event ``(d - 1,)``, such as that of ``MixturePrior.from_codes``; or
            values ``(n, d - 1)``, such as those of the first visit of real subjects, whose possible courses
            are then drawn (one row for each draw: repeat rows for several courses of one subject). With
            ``d + 1`` coordinates they are ``η`` and ``τ`` too. None is the prior.
        size: ``n``; None is the number of rows in ``spatial`` or ``times``.
        noise: Draws with observation noise in place of the likelihood's means.
        seed: Makes the draws reproducible; None draws from torch's generator.

    Returns:
        The sequences and the latents.

    Raises:
        ValueError: Another dynamics, sizes that do not fit.

    Source: Chadebec (thesis), section 5.4, "Trajectory generation".

    Example:
        >>> from riemvae.longitudinal.linear_trajectory import LinearTrajectory, trajectory_prior
        >>> model = LongitudinalVAE(torch.nn.Linear(3, 8), LinearTrajectory(3), trajectory_prior(3))
        >>> sample_trajectories(model, torch.linspace(-1, 1, 5), size=4).x.shape
        torch.Size([4, 5, 8])
    """
    dynamics: Any = model.dynamics
    if not isinstance(dynamics, LinearTrajectory):
        raise argument_error("model", "a model with a LinearTrajectory", type(dynamics).__name__)
    times = times.unsqueeze(0) if times.dim() == 1 else times
    if times.dim() != 2:
        raise argument_error("times", "(T,) or (n, T)", times)
    if size is None:
        size = len(spatial) if isinstance(spatial, Tensor) else len(times)
    check_count("size", size)
    if len(times) not in (1, size):
        raise argument_error("times", f"(T,) or ({size}, T), as many rows as draws", times)
    times = times.expand(size, -1)
    with forked(seed), poutine.block(), in_evaluation_mode(model):
        prior = model.prior_of(times)
        z_0 = prior.sample() if prior.batch_shape else prior.sample((size,))  # type: ignore[no-untyped-call]
        if spatial is not None:
            values = spatial.sample((size,)) if isinstance(spatial, Distribution) else spatial  # type: ignore[no-untyped-call]
            spatial_dim, whole = dynamics.base_dim - 2, dynamics.base_dim
            if values.dim() != 2 or len(values) != size or values.shape[1] not in (spatial_dim, whole):
                raise argument_error(
                    "spatial", f"values ({size}, {spatial_dim}) or ({size}, {whole})", values
                )
            z_0 = torch.cat([z_0[:, : whole - values.shape[1]], values.to(z_0)], -1)
        parameters = model.decode(model.trajectory(z_0, times))
        x = model.likelihood(parameters, 2).sample() if noise else model.likelihood.mean(parameters)
        return SyntheticTrajectories(x.transpose(0, 1), z_0)


@torch.no_grad()
def extrapolate(
    model: LongitudinalVAE,
    guide: Any,
    new_times: Any,
    x: Tensor,
    observed: Tensor | None = None,
    pixel_mask: Tensor | None = None,
    times: Tensor | None = None,
    covariates: Tensor | None = None,
    *,
    num_samples: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """What subjects look like at other times than those of their visits, before, between or after.

    Args:
        model: A model whose dynamics takes any times.
        guide: A guide with ``posterior``.
        new_times: ``(T',)`` for all subjects, or ``(B, T')``.
        x: ``(B, T, *shape)``.
        observed: ``(B, T)``.
        pixel_mask: ``(B, T, *shape)``.
        times: ``(B, T)`` of the visits.
        covariates: ``(B, c)``.
        num_samples: How many draws of the latent; None decodes the posterior mean instead, which a mixture
            of anchors does not have.
        seed: Makes the draws reproducible.

    Returns:
        The likelihood's means, ``(B, T', *shape)``, or ``(num_samples, B, T', *shape)``.

    Raises:
        ValueError: A model of numbered visits, or one whose visits have a latent each: there, impute visits
            that are not observed. New times that do not fit the subjects; a guide without a mean and no
            number of draws.

    Source: Chadebec (thesis), section 5.2.2, case 3.

    Example:
        >>> from riemvae.guides import GaussianGuide
        >>> from riemvae.longitudinal.linear_trajectory import LinearTrajectory, TrajectoryEncoder
        >>> model = LongitudinalVAE(torch.nn.Linear(3, 8), LinearTrajectory(3))
        >>> encoder = TrajectoryEncoder(torch.nn.Flatten(), 3, num_features=8, hidden_size=16)
        >>> guide = GaussianGuide(model, encoder, latent="z_0")
        >>> x, times = torch.randn(5, 4, 8), torch.arange(4.0).expand(5, 4)
        >>> extrapolate(model, guide, torch.tensor([5.0, 6.0]), x, times=times, num_samples=3).shape
        torch.Size([3, 5, 2, 8])
    """
    if model.dynamics.num_visits is not None or model.dynamics.base_dim is None:
        raise argument_error(
            "model",
            "one whose latents are a function of time, of a subject's latent",
            type(model.dynamics).__name__,
            "impute the visits in question: sequences with observed=False there",
        )
    new_times = as_like(new_times, x if x.is_floating_point() else torch.empty(0))
    if new_times.dim() == 1:
        new_times = new_times.expand(len(x), -1)
    if new_times.dim() != 2 or len(new_times) != len(x):
        raise argument_error("new_times", f"(T',) or ({len(x)}, T')", new_times)
    with forked(seed), poutine.block(), in_evaluation_mode(model, guide):
        posterior = guide.posterior(x, observed, pixel_mask, times, covariates)
        if num_samples is None:
            try:
                mean = posterior.mean
            except NotImplementedError:
                raise argument_error(
                    "num_samples",
                    f"a number of draws, as {type(posterior).__name__} has no mean in closed form",
                    None,
                ) from None
            return _decoded(model, mean, new_times, covariates)
        z_0 = posterior.sample((check_count("num_samples", num_samples),))
        return _decoded(model, z_0, new_times, covariates)


def _decoded(model: LongitudinalVAE, z_0: Tensor, times: Tensor, covariates: Tensor | None = None) -> Tensor:
    """The means at the times, ``z_0 (..., B, k) -> (..., B, T, *shape)``."""
    lead = z_0.dim() - 1
    x = model.decoder_mean(model.trajectory(z_0, times, covariates))
    return x.movedim(lead - 1, lead)
