"""Missing visits and pixels filled in, with intervals, and the error of that."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_choice, check_count
from riemvae.inference.weights import weighted_sum
from riemvae.longitudinal.model import LongitudinalVAE
from riemvae.longitudinal.posterior_draws import DrawOptions, LatentDraws, draws_of, for_each_subject
from riemvae.longitudinal.subject_batch import SubjectBatch

INTERVALS = ("value", "mean")

# Predictive draws of which intervals are order statistics, at least.
_PREDICTIVE = 200


@dataclass(frozen=True, repr=False)
class Imputation:
    """Sequences whose missing values are filled in.

    Visits without a finite time are NaN wherever they are not seen: nothing is known of when they were.

    Attributes:
        filled: ``(B, T, *shape)``: seen values as they were given, the others the posterior mean.
        mean: The posterior mean of the decoder's mean at all visits, ``(B, T, *shape)``.
        variance: The posterior variance of the decoder's mean, without observation noise.
        missing: Which values were filled in, ``(B, T, *shape)``.
        method: How the latents were drawn.
        ess: The effective number of draws of each subject by their weights, ``(B,)``.
        level: Of the intervals.
        lower: The lower end of each value's predictive interval; None where none was asked for.
        upper: The upper end.
        draws: ``(S, B, T, *shape)``, sequences with the missing values drawn and the seen ones as given; None
            where none were asked for.
        rhat: Of Hamiltonian chains, the largest split R-hat of each subject, ``(B,)``.
    """

    filled: Tensor
    mean: Tensor
    variance: Tensor
    missing: Tensor
    method: str
    ess: Tensor
    level: float | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None
    draws: Tensor | None = None
    rhat: Tensor | None = None

    def __len__(self) -> int:
        return len(self.filled)

    def map(self, function: Callable[[Tensor], Tensor]) -> Imputation:
        """On another scale: ``function`` of all values, increasing in each, such as undone preprocessing.

        The variance is carried by the width of one deviation, which is exact where ``function`` is affine.
        """

        def moved(values: Tensor | None) -> Tensor | None:
            return None if values is None else function(values)

        width = function(self.mean + self.variance.sqrt()) - function(self.mean)
        return replace(
            self,
            filled=function(self.filled),
            mean=function(self.mean),
            variance=width.square(),
            lower=moved(self.lower),
            upper=moved(self.upper),
            draws=moved(self.draws),
        )

    def __repr__(self) -> str:
        share = float(self.missing.double().mean())
        return (
            f"Imputation({len(self)} sequences, {100 * share:.0f} % of their values filled in, "
            f"{self.method}, median ESS {float(self.ess.median()):.1f})"
        )


def impute(
    model: LongitudinalVAE,
    guide: Callable[..., Any],
    data: Any,
    method: str = "importance",
    num_draws: int = 100,
    *,
    noise: bool = False,
    level: float | None = 0.9,
    interval: str = "value",
    keep_draws: int = 0,
    chunk_size: int | None = None,
    seed: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Imputation:
    """Fills in missing visits and missing values of visits from the posterior of each subject's latent.

    ``filled`` is the posterior mean, which has the smallest squared error. Intervals are quantiles of at
    least 200 predictive draws, at positions that make the coverage the level's where the model is true. They
    are of the *values*, with observation noise, unless ``interval="mean"`` asks for those of the decoder's
    mean. Under ``method="map"`` the latent is one point, and the intervals hold nothing but the noise.

    Args:
        model: A :class:`LongitudinalVAE`.
        guide: Its guide.
        data: As for :func:`draw_posterior`: ``(x, observed)``, a mapping by the model's names, and so on.
            With times, those of unobserved visits are the times to predict at.
        method: As for :func:`draw_posterior`.
        num_draws: Of the latents of a subject.
        noise: Whether ``draws`` hold observation noise too, as multiple imputation needs it.
        level: Of the intervals; None leaves them out, which is faster.
        interval: ``"value"`` or ``"mean"``.
        keep_draws: How many filled sequences a subject to keep, which count equally.
        chunk_size: Visits decoded at once; None is about 2,000. Memory holds at least the draws of one
            subject.
        seed: Of the draws; the caller's generator is left as it was.
        progress: Shows a bar.
        **options: Of the method, as for :func:`draw_posterior`.

    Returns:
        An :class:`Imputation`.

    Raises:
        ValueError: As :func:`draw_posterior`; a level out of range.

    Source: Chadebec (thesis), section 6.3.3; intervals: order statistics of exchangeable draws.

    Example:
        >>> from torch.distributions import AffineTransform
        >>> from riemvae.longitudinal import AnchoredGuide, FlowChain
        >>> model = LongitudinalVAE(torch.nn.Linear(2, 5), FlowChain([AffineTransform(0.0, 2.0)], 2))
        >>> guide = AnchoredGuide(model, lambda x: (x[:, :2], torch.ones(len(x), 2)))
        >>> x, observed = torch.randn(4, 2, 5), torch.tensor([[True, False]] * 4)
        >>> result = impute(model, guide, (x, observed), seed=0)
        >>> bool((result.filled[:, 0] == x[:, 0]).all()), bool((result.lower < result.upper).all())
        (True, True)
    """
    chosen = DrawOptions(method, num_draws, **options)
    check_choice("interval", interval, INTERVALS)
    check_count("keep_draws", keep_draws, 0)
    if level is not None and not 0.0 < level < 1.0:
        raise argument_error("level", "a number between 0 and 1, or None", level)

    def estimate(batch: SubjectBatch) -> dict[str, Tensor]:
        draws = draws_of(batch, chosen)
        predicted = 0 if level is None else max(_PREDICTIVE, len(draws))
        step = max(1, batch.pairs // max(len(draws), predicted, keep_draws))
        parts = [
            _filled(
                batch.rows(rows),
                _columns(draws, rows),
                predicted,
                level or 0.0,
                interval == "value",
                keep_draws,
                noise,
            )
            for rows in (slice(start, start + step) for start in range(0, batch.size, step))
        ]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        found["ess"] = draws.ess
        if draws.rhat is not None:
            found["rhat"] = draws.rhat
        return found

    found = for_each_subject(
        model, guide, data, estimate, chosen, chunk_size=chunk_size, seed=seed, progress=progress
    )
    if "draws" in found:
        found["draws"] = found["draws"].transpose(0, 1)
    return Imputation(method=method, level=level, **found)  # type: ignore[arg-type]


def _columns(draws: LatentDraws, rows: slice) -> LatentDraws:
    return LatentDraws(draws.z_0[:, rows], draws.log_weights[:, rows], method=draws.method)


def _filled(
    batch: SubjectBatch,
    draws: LatentDraws,
    num_predicted: int,
    level: float,
    of_values: bool,
    num_kept: int,
    noise: bool,
) -> dict[str, Tensor]:
    """What a batch of an :class:`Imputation` holds; subjects first."""
    likelihood = batch.model.likelihood
    parameters = batch.decode(draws.z_0)
    means = likelihood.mean(parameters)  # (S, T, B, *shape)
    weights = draws.weights.unsqueeze(1).expand(means.shape[:3])
    mean = weighted_sum(weights, means)
    variance = weighted_sum(weights, (means - mean).square())
    result = {"mean": batch.dated(mean.transpose(0, 1)), "variance": batch.dated(variance.transpose(0, 1))}
    # What is filled in may lie between the integers that were seen.
    x = batch.data.x if batch.data.x.is_floating_point() else batch.data.x.to(means.dtype)
    result["missing"] = ~batch.values
    result["filled"] = torch.where(batch.values, x, result["mean"].to(x.dtype))

    def predictive(num: int, noisy: bool) -> Tensor:
        index = draws.index(num)
        taken = _map_tensors(parameters, lambda p: _rows(p, index)) if noisy else _rows(means, index)
        drawn = likelihood(taken, 3).sample() if noisy else taken
        return drawn.to(means.dtype)  # type: ignore[no-any-return]

    if num_predicted:
        low, high = central_interval(predictive(num_predicted, of_values), level)
        result["lower"] = batch.dated(low.transpose(0, 1))
        result["upper"] = batch.dated(high.transpose(0, 1))
    if num_kept:
        sequences = batch.dated(predictive(num_kept, noise).transpose(1, 2)).transpose(0, 1)
        result["draws"] = torch.where(batch.values.unsqueeze(1), x.unsqueeze(1), sequences.to(x.dtype))
    return result


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Draws ``index (n, B)`` of ``(S, T, B, ...)``."""
    visits = torch.arange(values.shape[1], device=index.device)[:, None]
    subjects = torch.arange(values.shape[2], device=index.device)
    return values[index.unsqueeze(1), visits, subjects]


def _map_tensors(parameters: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return tuple(map(function, parameters)) if isinstance(parameters, tuple) else function(parameters)


def central_interval(draws: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """The central interval of ``(n, ...)`` equally weighted draws: order statistics at ``p (n + 1)``.

    A further draw of the same distribution lies in it with probability ``level`` exactly, whatever that
    distribution is, as far as ``n`` allows: beyond the extreme draws there is nothing to go by.

    Example:
        >>> low, high = central_interval(torch.arange(1.0, 20.0), 0.9)  # 19 draws
        >>> float(low), float(high)
        (1.0, 19.0)
    """
    num = len(draws)
    position = min(max(0.5 * (1.0 - level) * (num + 1), 1.0), num)
    below, share = int(position), position - int(position)
    count = min(below + 1, num)
    rows = draws.movedim(0, -1).contiguous()
    ends = []
    for largest in (False, True):
        extreme = rows.topk(count, -1, largest=largest).values
        # The second of the two order statistics is the last of the extreme ones.
        ends.append(extreme[..., below - 1].lerp(extreme[..., count - 1], share))
    return ends[0], ends[1]


@dataclass(frozen=True)
class ImputationError:
    """Squared errors of filled-in values, per value, over all missing ones.

    Attributes:
        of_draws: The mean over draws of each draw's mean squared error, without observation noise.
        of_mean: That of the posterior mean.
        subject_of_draws: The first for each subject, ``(B,)``; NaN where nothing is missing.
        subject_of_mean: The second for each subject.
        num_values: How many values each subject lacks, ``(B,)``.
    """

    of_draws: float
    of_mean: float
    subject_of_draws: Tensor
    subject_of_mean: Tensor
    num_values: Tensor


def imputation_error(
    imputation: Imputation | Tensor, x_true: Tensor, missing: Tensor | None = None
) -> ImputationError:
    """The mean squared error per value over all missing values, of the draws and of their mean.

    The error of a draw is on average that of the posterior mean plus the posterior variance, so an imputer
    that draws is judged by ``of_draws``, and one that fills in the mean by ``of_mean``. Neither has
    observation noise, whatever draws the imputation keeps.

    Args:
        imputation: An :class:`Imputation`, or draws ``(S, B, T, *shape)``, or one filled set
            ``(B, T, *shape)``.
        x_true: ``(B, T, *shape)``; what is not missing may hold anything.
        missing: ``(B, T)`` visits or ``(B, T, *shape)`` values to count; None: what the imputation filled in.

    Raises:
        ValueError: Shapes that do not fit, draws without ``missing``, a true value that is not finite where
            it counts, nothing missing.

    Example:
        >>> draws = torch.tensor([0.0, 2.0]).reshape(2, 1, 1, 1)
        >>> error = imputation_error(draws, torch.zeros(1, 1, 1), torch.tensor([[True]]))
        >>> error.of_draws, error.of_mean
        (2.0, 1.0)
    """
    if isinstance(imputation, Imputation):
        mean, variance = imputation.mean, imputation.variance
        missing = imputation.missing if missing is None else missing
    else:
        draws = imputation.unsqueeze(0) if imputation.dim() == x_true.dim() else imputation
        mean, variance = draws.mean(0), draws.var(0, correction=0)
    if mean.shape != x_true.shape:
        raise argument_error("x_true", f"a tensor of shape {tuple(mean.shape)}", x_true)
    if missing is None or missing.dtype != torch.bool or missing.shape != x_true.shape[: missing.dim()]:
        raise argument_error("missing", "a boolean mask (B, T) or (B, T, *shape)", missing)
    counted = missing.reshape(*missing.shape, *(1,) * (x_true.dim() - missing.dim())).expand_as(x_true)
    if not bool(torch.isfinite(x_true[counted]).all()):
        raise argument_error(
            "x_true", "finite values where they count", "NaN or infinities", "leave them out of missing="
        )
    number = counted.flatten(1).sum(1)
    if not bool(number.any()):
        raise argument_error("missing", "some missing values", "none")

    def per_subject(values: Tensor) -> Tensor:
        return torch.where(counted, values, 0.0).double().flatten(1).sum(1)

    square = torch.where(counted, mean - x_true, 0.0).square()
    of_mean = per_subject(square)
    of_draws = of_mean + per_subject(variance)
    total = int(number.sum())
    return ImputationError(
        float(of_draws.sum()) / total,
        float(of_mean.sum()) / total,
        torch.where(number > 0, of_draws / number, math.nan),
        torch.where(number > 0, of_mean / number, math.nan),
        number,
    )
