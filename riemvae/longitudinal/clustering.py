"""Clusters of trajectories: which component of a mixture a subject's latent belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_count
from riemvae._seeding import forked
from riemvae.inference.estimation import for_each_batch
from riemvae.inference.weights import DEFAULT_CHUNK, draw_weights, weighted_sum
from riemvae.longitudinal.motion import MotionMixture, best_mixture
from riemvae.longitudinal.subject_batch import named
from riemvae.priors import MixturePrior


class TrajectoryClusters(NamedTuple):
    """A clustering of subjects.

    Attributes:
        labels: The likeliest component of each subject, ``(N,)``.
        responsibilities: ``p(k | x)``, ``(N, K)``.
    """

    labels: Tensor
    responsibilities: Tensor


def responsibilities(mixture: Any, z: Tensor, log_weights: Tensor | None = None) -> Tensor:
    r"""``p(k | x)`` from draws of the latents given ``x``: ``p(k | z)`` averaged over them.

    .. math:: p(k|x) = E_{p(z|x)}[p(k|z)] \approx \sum_s \bar w_{sb} \, p(k | z_{sb}),
              \quad \bar w_{sb} = w_{sb} / \sum_{s'} w_{s'b}

    Args:
        mixture: A mixture as a prior or distribution, with ``responsibilities(z)``, or a fitted model of
            scikit-learn's kind, with ``predict_proba(z)``.
        z: Draws ``(S, B, k)``, or the latents themselves ``(B, k)``.
        log_weights: Unnormalised log importance weights ``(S, B)``; None where the draws are those of the
            posterior, or are taken for it.

    Returns:
        ``(B, K)``.

    Raises:
        ValueError: What is no mixture, shapes that do not fit.

    Example:
        >>> prior = MixturePrior(1, 2, locs=torch.tensor([[-3.0], [3.0]]))
        >>> responsibilities(prior, torch.tensor([[-2.0], [0.0]])).round(decimals=2).tolist()
        [[1.0, 0.0], [0.5, 0.5]]
    """
    if z.dim() == 2:
        z = z.unsqueeze(0)
    if z.dim() != 3:
        raise argument_error("z", "draws (S, B, k)", z)
    if hasattr(mixture, "responsibilities"):
        of_draws = mixture.responsibilities(z)
    elif hasattr(mixture, "predict_proba"):
        table = mixture.predict_proba(z.detach().flatten(0, 1).cpu().numpy())
        of_draws = torch.as_tensor(table).to(z).reshape(*z.shape[:2], -1)
    else:
        raise argument_error(
            "mixture",
            "a mixture, with responsibilities(z) or predict_proba(z)",
            type(mixture).__name__,
            "build the model with prior=MixturePrior(...), or pass mixture=",
        )
    if log_weights is None:
        return of_draws.mean(0)  # type: ignore[no-any-return]
    if log_weights.shape != z.shape[:2]:
        raise argument_error("log_weights", f"shape {tuple(z.shape[:2])}, one a draw", log_weights)
    return weighted_sum(_normalised(log_weights), of_draws)


def _normalised(log_weights: Tensor) -> Tensor:
    """Weights that sum to one over draws; equal ones where no draw has any."""
    weights = log_weights.softmax(0)
    return torch.where(torch.isfinite(weights), weights, 1.0 / len(weights))


def cluster_trajectories(
    model: Any,
    guide: Callable[..., Any],
    data: Any,
    num_samples: int = 100,
    *,
    mixture: Any = None,
    weighted: bool = True,
    batch_size: int | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> TrajectoryClusters:
    """Which component of the prior's mixture each subject belongs to, given all its observed visits.

    Args:
        model: A model of sequences, whose prior of ``z_0`` or ``u`` is a mixture.
        guide: Its guide.
        data: Tensor or array, tuple or mapping as for :func:`riemvae.fit`.
        num_samples: Draws of the guide a subject.
        mixture: Another mixture than the model's prior, such as one that scikit-learn fitted to posterior
            means; see :func:`responsibilities`.
        weighted: Whether draws count by their importance weights, so that the average is one over the
            posterior rather than the guide.
        batch_size: Subjects at a time; None lets about 2,000 draws through the decoder at once.
        seed: Of the draws; None takes torch's generator.
        progress: Whether to show a bar.

    Raises:
        ValueError: A prior that is no mixture.

    Source: Jiang et al. (2017), Variational deep embedding, who take ``p(k|z)`` at draws of the guide.

    Example:
        >>> import riemvae as rv
        >>> from riemvae.longitudinal import LongitudinalVAE
        >>> from riemvae.longitudinal.visit_encoders import VisitEncoder
        >>> from riemvae.longitudinal.visits import VisitLatents
        >>> model = LongitudinalVAE(torch.nn.Linear(2, 5), VisitLatents(3, 2), MixturePrior(6, 4))
        >>> encoder = VisitEncoder(rv.networks.MLPEncoder(5, 2))
        >>> guide = rv.guides.GaussianGuide(model, encoder, latent="z_0")
        >>> x, observed = torch.randn(7, 3, 5), torch.rand(7, 3) < 0.5
        >>> cluster_trajectories(model, guide, (x, observed)).responsibilities.shape
        torch.Size([7, 4])
    """
    chosen = model.prior if mixture is None else mixture

    def estimate(z: Tensor, log_weights: Tensor | None) -> Tensor:
        return responsibilities(chosen, z, log_weights)

    how: dict[str, Any] = {"weighted": weighted, "batch_size": batch_size, "seed": seed, "progress": progress}
    found = _over_draws(model, guide, data, num_samples, estimate, **how)
    of_subjects = found["value"]
    return TrajectoryClusters(of_subjects.argmax(-1), of_subjects)


def posterior_means(
    model: Any,
    guide: Callable[..., Any],
    data: Any,
    num_samples: int = 100,
    *,
    weighted: bool = True,
    batch_size: int | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> Tensor:
    """The mean of each subject's latent given its observed visits, ``(N, k)``.

    Args:
        model: A model of sequences.
        guide: Its guide.
        data: Tensor or array, tuple or mapping as for :func:`riemvae.fit`.
        num_samples: Draws of the guide a subject.
        weighted: Whether draws count by their importance weights.
        batch_size: Subjects at a time; None lets about 2,000 draws through the decoder at once.
        seed: Of the draws; None takes torch's generator.
        progress: Whether to show a bar.

    Example:
        >>> import riemvae as rv
        >>> from riemvae.longitudinal import LongitudinalVAE
        >>> from riemvae.longitudinal.visit_encoders import VisitEncoder
        >>> from riemvae.longitudinal.visits import VisitLatents
        >>> model = LongitudinalVAE(torch.nn.Linear(2, 5), VisitLatents(3, 2))
        >>> encoder = VisitEncoder(rv.networks.MLPEncoder(5, 2))
        >>> guide = rv.guides.GaussianGuide(model, encoder, latent="z_0")
        >>> x, observed = torch.randn(7, 3, 5), torch.rand(7, 3) < 0.5
        >>> posterior_means(model, guide, (x, observed)).shape
        torch.Size([7, 6])
    """
    how: dict[str, Any] = {"weighted": weighted, "batch_size": batch_size, "seed": seed, "progress": progress}
    return _means(model, guide, data, num_samples, **how)["value"]


def _means(
    model: Any, guide: Callable[..., Any], data: Any, num_samples: int, **how: Any
) -> dict[str, Tensor]:
    """Posterior means, and of which subjects anything is seen."""

    def estimate(z: Tensor, log_weights: Tensor | None) -> Tensor:
        return z.mean(0) if log_weights is None else weighted_sum(_normalised(log_weights), z)

    return _over_draws(model, guide, data, num_samples, estimate, **how)


def _known_means(*args: Any, **how: Any) -> Tensor:
    """The means of those of whom anything is seen: of the others they are the prior's, and no group."""
    found = _means(*args, **how)
    return found["value"][found["known"]]


def fit_mixture(
    model: Any,
    guide: Callable[..., Any],
    data: Any,
    num_components: int,
    *,
    groups: Any = None,
    learn: bool = True,
    full: bool = False,
    num_starts: int = 12,
    num_samples: int = 100,
    weighted: bool = True,
    batch_size: int | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> MixturePrior:
    """A mixture fitted to the posterior means of the training subjects: where a mixture prior should start.

    Trained from means that coincide or lie at random, a mixture collapses on one component. So first train
    with the standard normal prior, then set ``model.prior = fit_mixture(model, guide, data, K)``, and train
    on. The mixture is that of the means, which lie closer together than the latents themselves: training
    widens it.

    The groups are whatever makes groups in ``z_0``, which may be what subjects look like. With ``groups=``
    the components have the moments of groups that are already known, such as those of :func:`fit_motions`.

    Args:
        model: A trained model of sequences.
        guide: Its guide.
        data: Training data, tensor or array, tuple or mapping as for :func:`riemvae.fit`. Subjects of whom
            nothing is seen do not count.
        num_components: ``K``.
        groups: None, or a mixture of ``K`` components as :func:`responsibilities` takes one.
        learn: Whether the mixture is trained further.
        full: Whether covariances are full.
        num_starts: Fits by expectation maximisation, from k-means and from random groups in turn; the
            likeliest is kept. With ``groups`` there are none.
        num_samples: Draws of the guide a subject.
        weighted: Whether draws count by their importance weights.
        batch_size: Subjects at a time; None lets about 2,000 draws through the decoder at once.
        seed: Of draws and starts; None takes torch's generator.
        progress: Whether to show a bar.

    Raises:
        ValueError: Fewer subjects than components, groups of another number.

    Source: Jiang et al. (2017), Variational deep embedding, for such a start.

    Example:
        >>> import riemvae as rv
        >>> from riemvae.longitudinal import LongitudinalVAE
        >>> from riemvae.longitudinal.visit_encoders import VisitEncoder
        >>> from riemvae.longitudinal.visits import VisitLatents
        >>> model = LongitudinalVAE(torch.nn.Linear(2, 5), VisitLatents(3, 2))
        >>> encoder = VisitEncoder(rv.networks.MLPEncoder(5, 2))
        >>> guide = rv.guides.GaussianGuide(model, encoder, latent="z_0")
        >>> model.prior = fit_mixture(model, guide, torch.randn(50, 3, 5), 2)
        >>> model.prior.locs.shape
        torch.Size([2, 6])
    """
    how: dict[str, Any] = {"weighted": weighted, "batch_size": batch_size, "progress": progress}
    with forked(seed):
        means = _known_means(model, guide, data, num_samples, **how)
        if groups is None:
            return best_mixture(means, num_components, num_starts, learn=learn, full=full)
    shares = responsibilities(groups, means)
    if shares.shape[1] != num_components:
        raise argument_error("groups", f"a mixture of {num_components} components", f"{shares.shape[1]}")
    return MixturePrior.from_responsibilities(means, shares, learn, full).to(means.device)


def fit_motions(
    model: Any,
    guide: Callable[..., Any],
    data: Any,
    num_components: int,
    *,
    times: Tensor | None = None,
    covariates: Tensor | None = None,
    num_features: int = 6,
    num_starts: int = 12,
    num_samples: int = 100,
    weighted: bool = True,
    batch_size: int | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> MotionMixture:
    """A mixture fitted to how the training subjects change, whatever they look like.

    Pass it to :func:`cluster_trajectories` as ``mixture=``, or to :func:`fit_mixture` as ``groups=``.

    Args:
        model: A trained model of sequences.
        guide: Its guide.
        data: Training data, tensor or array, tuple or mapping as for :func:`riemvae.fit`. Subjects of whom
            nothing is seen do not count.
        num_components: ``K``.
        times: At which motions are compared, ``(T,)``, for models in continuous time.
        covariates: Under which they are compared, ``(c,)``, for models with covariates.
        num_features: Principal axes of the motions that count.
        num_starts: Fits by expectation maximisation, from k-means and from random groups in turn; the
            likeliest is kept.
        num_samples: Draws of the guide a subject.
        weighted: Whether draws count by their importance weights.
        batch_size: Subjects at a time; None lets about 2,000 draws through the decoder at once.
        seed: Of draws and starts; None takes torch's generator.
        progress: Whether to show a bar.

    Raises:
        ValueError: Fewer subjects than components; what the dynamics raises without times.

    Example:
        >>> import riemvae as rv
        >>> ae = rv.zoo.build("lvae", (5,), 2, num_visits=3, inference="set", seed=0)
        >>> x = torch.randn(50, 3, 5)
        >>> motions = fit_motions(ae.model, ae.guide, x, 2, num_samples=5, seed=0)
        >>> cluster_trajectories(ae.model, ae.guide, x, 5, mixture=motions).labels.shape
        torch.Size([50])
    """
    how: dict[str, Any] = {"weighted": weighted, "batch_size": batch_size, "progress": progress}
    with forked(seed):
        means = _known_means(model, guide, data, num_samples, **how)
        return MotionMixture.of_latents(
            model,
            means,
            num_components,
            times=times,
            covariates=covariates,
            num_features=num_features,
            num_starts=num_starts,
        )


def _over_draws(
    model: Any,
    guide: Callable[..., Any],
    data: Any,
    num_samples: int,
    estimate: Callable[[Tensor, Tensor | None], Tensor],
    weighted: bool,
    batch_size: int | None,
    progress: bool,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """``estimate(z (S, B, k), log_weights (S, B) or None)`` of each subject, joined over batches: ``value``.

    ``known (N,)`` says of which subjects anything is seen.
    """
    check_count("num_samples", num_samples)
    size = (
        max(1, DEFAULT_CHUNK // num_samples) if batch_size is None else check_count("batch_size", batch_size)
    )

    def of_batch(
        args: tuple[Any, ...], kwargs: dict[str, Any], count: int, shared: dict[str, Tensor]
    ) -> Mapping[str, Tensor]:
        draw = draw_weights(model, guide, args, kwargs, num_samples, shared)
        z: Any = draw.guide_trace.nodes[model.site]["value"]
        log_weights = torch.where(torch.isnan(draw.log_weights), -torch.inf, draw.log_weights)
        z = z.expand(num_samples, *z.shape[1:]).reshape(num_samples, count, -1)
        given = named(args, kwargs)
        data = model.seen_part(*(given.get(name) for name in ("x", "observed", "pixel_mask", "times")))
        return {"value": estimate(z, log_weights if weighted else None), "known": data.observed.any(1)}

    return for_each_batch(
        model,
        guide,
        data,
        of_batch,
        batch_size=size,
        seed=seed,
        progress=progress,
        description="trajectories",
    )
