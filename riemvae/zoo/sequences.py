"""A model of sequences, its guide and all that a practitioner does with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from riemvae._checks import argument_error, check_choice, check_count, check_finite
from riemvae._recipe import recipe
from riemvae._seeding import forked
from riemvae.data import Preprocessing, in_memory
from riemvae.data.gathering import batch_size_of
from riemvae.data.sequences import Sequences
from riemvae.guides import GaussianGuide
from riemvae.inference import ELBO, LogLikelihood, Schedule, fit, log_likelihood
from riemvae.inference.batches import takes_missing
from riemvae.inference.fit import Fit
from riemvae.longitudinal import AnchoredGuide, FlowChain, LongitudinalVAE, TimeFeatures
from riemvae.longitudinal.anchored import anchorable_visits, random_visits
from riemvae.longitudinal.generation import generate
from riemvae.longitudinal.imputation import Imputation, impute
from riemvae.longitudinal.linear_trajectory import TrajectoryEncoder
from riemvae.longitudinal.posterior_draws import METHODS, LatentDraws, draw_posterior
from riemvae.longitudinal.subject_batch import anchored, arguments
from riemvae.networks.sequence import SequenceEncoder
from riemvae.priors import StandardNormal
from riemvae.zoo.trained import Trained

# Of all epochs, at most this share are spent on the warm-up.
_WARMUP_SHARE = 0.2

ESTIMATORS = ("mixture", "single")


@recipe
class SequenceAutoencoder(Trained):
    """A trained or trainable model of sequences, with the preprocessing of its data.

    Data are sequences ``(N, T, *input_shape)``, ragged lists of ``(t_i, *input_shape)``,
    :class:`~riemvae.data.Sequences`, or a ``Dataset`` or ``DataLoader`` whose items are the arguments of the
    model in their order, which is read into memory; NaN is missing, as is what ``observed (N, T)`` and
    ``pixel_mask`` say. Images of unsigned bytes are divided by 255; what is imputed or sampled comes back on
    the scale of the data. ``history_`` and ``fit_`` are of the last training, ``warmup_fit_`` of its warm-up.

    Args:
        model: The generative model.
        guide: Its guide.
        input_shape: The shape of one visit.
        objective: What ``fit`` maximises; None is the evidence lower bound of the whole sequence.
        preprocessing: None: found at the first ``fit`` and kept.
        warmup: Epochs of training in which encoder and decoder are those of a plain VAE of single visits, so
            that the flows start from a latent space that means something. For anchored guides and encoders
            of all visits, which then see one at a time; never more than a fifth of all epochs. Its weight
            ``β`` of the Kullback-Leibler divergence is the one that the objective starts with.
        times_known: Whether the dynamics has its unit of time, which the first ``fit`` takes from the data.

    Example:
        >>> from riemvae import zoo
        >>> ae = zoo.build("lvae", input_shape=(6,), num_visits=3, latent_dim=2, seed=0)
        >>> x = torch.randn(20, 3, 6, generator=torch.Generator().manual_seed(0))
        >>> x[0, 1] = float("nan")
        >>> ae.fit(x, max_epochs=2, seed=0, progress=False).impute(x, num_draws=8).isnan().any()
        tensor(False)
        >>> ae.sample(5).shape
        torch.Size([5, 3, 6])
    """

    def __init__(
        self,
        model: LongitudinalVAE,
        guide: Any,
        input_shape: Sequence[int],
        objective: Any = None,
        preprocessing: Preprocessing | None = None,
        warmup: int = 0,
        times_known: bool = False,
    ) -> None:
        super().__init__(model, guide, input_shape, objective, preprocessing)
        self.times_known = times_known
        self.warmup = check_count("warmup", warmup, minimum=0)
        self.warmup_fit_: Fit | None = None

    @property
    def num_visits(self) -> int | None:
        """``T`` where visits are numbered; None where they have times."""
        return self.model.dynamics.num_visits  # type: ignore[no-any-return]

    @property
    def num_covariates(self) -> int:
        """``c``, the covariates of a subject that it takes; 0 where it takes none."""
        return max(int(getattr(part, "covariates", 0)) for part in self._parts())

    # -- data ----------------------------------------------------------------------------------------------

    def _raw(self, x: Any, name: str = "x", **given: Any) -> Sequences:
        """The data on their own scale, checked against the model."""
        changes = {key: value for key, value in given.items() if value is not None}
        if (found := in_memory(x, name)) is not x:
            x = arguments(found)
        if isinstance(x, Sequences):
            data = x
            if changes:
                known = {key: getattr(x, key) for key in given}
                data = Sequences.of(x.x, **{**known, **changes}, labels=x.labels, subjects=x.subjects)
        elif isinstance(x, dict):
            data = Sequences.of(**{**x, **changes})
        elif isinstance(x, tuple) and len(x) == 2 and _is_mask(*x) and "observed" not in changes:
            data = Sequences.of(x[0], observed=x[1], **changes)
        else:
            data = Sequences.of(x, **changes)
        if tuple(data.x.shape[2:]) != self.input_shape:
            raise argument_error(name, f"sequences (N, T, {', '.join(map(str, self.input_shape))})", data.x)
        expected = self.num_visits
        if expected is not None and data.x.shape[1] != expected:
            raise argument_error(
                name,
                f"{expected} visits, as the model has",
                f"{data.x.shape[1]}",
                "leave missing visits in, as NaN or by observed=; irregular times: Sequences.on_grid, or a "
                "model in continuous time",
            )
        if expected is None and data.times is None:
            raise argument_error(
                "times", "the times of the visits, (N, T)", None, "this model is a function of time"
            )
        self._check_covariates(given.get("covariates"), *self._parts())
        wanted = self.num_covariates
        if wanted and (data.covariates is None or data.covariates.shape[-1] != wanted):
            raise argument_error(
                "covariates", f"a tensor ({len(data)}, {wanted}), as the model was built", data.covariates
            )
        return data

    def _parts(self) -> list[Any]:
        """What may take covariates; an anchored guide's encoder sees single visits."""
        parts = [self.model.dynamics]
        if not isinstance(self.guide, AnchoredGuide):
            parts.append(getattr(self.guide, "encoder", None))
        return parts

    def _prepared(self, raw: Sequences) -> Sequences:
        weight = self._weight
        if raw.times is not None:
            distances, rounded = (t[:, :, None] - t[:, None] for t in (raw.times, raw.times.to(weight.dtype)))
            pairs = raw.observed[:, :, None] & raw.observed[:, None]
            if bool((pairs & (distances != 0) & (rounded == 0)).any()):
                raise argument_error(
                    "times",
                    f"times of a subject that {weight.dtype} can tell apart",
                    raw.times,
                    "count them from a common beginning, or in larger units: years rather than seconds",
                )
        return replace(raw, x=self._processed(raw.x)).to(weight.device, weight.dtype)

    def sequences(
        self,
        x: Any,
        observed: Any = None,
        pixel_mask: Any = None,
        times: Any = None,
        covariates: Any = None,
        name: str = "x",
    ) -> Sequences:
        """The data as the model sees them: checked, preprocessed, on its device.

        Args:
            x: Sequences as an array, a ragged list, a mapping of these arguments, a pair ``(x, observed)``,
                or :class:`~riemvae.data.Sequences`.
            observed: ``(N, T)``.
            pixel_mask: As ``x``.
            times: ``(N, T)``.
            covariates: ``(N, c)``.
            name: Of ``x``, for errors.

        Raises:
            ValueError: Shapes or masks that do not fit, another number of visits than the model's, no times
                for a model that needs them.
        """
        given = {"observed": observed, "pixel_mask": pixel_mask, "times": times, "covariates": covariates}
        return self._prepared(self._raw(x, name, **given))

    def _batch(self, data: Sequences) -> dict[str, Tensor]:
        """The model's arguments; times only where it is a function of them."""
        batch = data.batch()
        if self.num_visits is not None:
            batch.pop("times", None)
        return batch

    # -- training ------------------------------------------------------------------------------------------

    def fit(
        self,
        x: Any,
        observed: Any = None,
        *,
        pixel_mask: Any = None,
        times: Any = None,
        covariates: Any = None,
        val_data: Any = None,
        max_epochs: int = 100,
        warmup: int | None = None,
        **options: Any,
    ) -> SequenceAutoencoder:
        """Trains: the warm-up first, then the model of sequences.

        Args:
            x: Training sequences.
            observed: ``(N, T)``, True where a visit is seen.
            pixel_mask: As ``x``, True where a value is seen.
            times: ``(N, T)``, for models in continuous time.
            covariates: ``(N, c)``, for models that take them.
            val_data: Held-out sequences, whose bound is then monitored: an array, a list or
                :class:`~riemvae.data.Sequences`, which bring their masks, times and covariates.
            max_epochs: Of both parts together.
            warmup: In place of the model's own.
            options: Those of :func:`riemvae.fit`: ``batch_size``, ``learning_rate``, ``patience``,
                ``seed``... The scheduler, the callbacks and the checkpoint are of the second part.

        Returns:
            Itself. A training that is interrupted ends with the part that it was in, which ``fit_`` then
            tells of.
        """
        options.setdefault("batch_size", batch_size_of(x))
        data, val = self._training_data(x, observed, pixel_mask, times, covariates, val_data)
        epochs = self._warmup_epochs(check_count("max_epochs", max_epochs), warmup)
        if epochs and options.get("resume") is None:
            self.warmup_fit_ = self.fit_ = self._warm_up(data, epochs, options)
            if self.fit_.interrupted:
                self.eval()
                return self
        self._fit_sequences(data, val, max_epochs - epochs, options)
        self.eval()
        return self

    def _training_data(
        self, x: Any, observed: Any, pixel_mask: Any, times: Any, covariates: Any, val_data: Any
    ) -> tuple[Sequences, Sequences | None]:
        """What a training needs, as the model sees it; the first one's times give the unit of time."""
        data = self.sequences(x, observed, pixel_mask, times, covariates)
        val = None if val_data is None else self.sequences(val_data, name="val_data")
        seen = data.seen
        if not bool(seen.any()):
            raise argument_error("observed", "at least one visit to train on", "none that is seen")
        if val is not None and not bool(val.observed.any()):
            raise argument_error("val_data", "at least one visit to judge by", "none that is seen")
        self.model.likelihood.validate(torch.where(seen, data.x, torch.zeros_like(data.x)))
        self._fit_times(data)
        return data, val

    def _fit_sequences(
        self, data: Sequences, val: Sequences | None, epochs: int, options: dict[str, Any]
    ) -> None:
        """The training of model and guide, from data that are prepared."""
        if not self._knows_unseen:  # who would pull on the prior
            data, val = self._informative(data), None if val is None else self._informative(val)
        self.fit_ = fit(
            self.model,
            self.guide,
            self._batch(data),
            self.objective,
            val_data=None if val is None else self._batch(val),
            max_epochs=epochs,
            **options,
        )

    def _fit_times(self, data: Sequences) -> None:
        """Takes the unit of time from the first training data: another one would be another model."""
        if self.times_known or data.times is None or self.num_visits is not None:
            return
        self.model.dynamics.fit_times(data.times, data.observed)
        for module in self.guide.modules():
            if isinstance(module, TimeFeatures):
                module.fit(data.times, data.observed)
        self.times_known = True

    def _warmup_epochs(self, max_epochs: int, warmup: int | None) -> int:
        warmup = self.warmup if warmup is None else check_count("warmup", warmup, minimum=0)
        return min(warmup, int(_WARMUP_SHARE * max_epochs)) if self._can_warm_up else 0

    @property
    def _can_warm_up(self) -> bool:
        """Whether the guide has a posterior of a sequence of one visit, in the decoder's latent space."""
        if isinstance(self.guide, AnchoredGuide):
            return True
        encoder = getattr(self.guide, "encoder", None)
        return isinstance(encoder, SequenceEncoder) and encoder.latent_dim == self.model.latent_dim

    def _warmup_objective(self) -> ELBO:
        """The bound with the weight that the objective's schedule starts with."""
        objective = self.objective
        if not isinstance(objective, ELBO) or objective.capacity is not None:
            return ELBO()
        return ELBO(beta=objective.beta(0) if isinstance(objective.beta, Schedule) else objective.beta)

    def _warm_up(self, data: Sequences, epochs: int, options: dict[str, Any]) -> Fit:
        """Trains encoder and decoder on single visits: the same model with one visit a sequence."""
        guide = self.guide
        single = LongitudinalVAE(
            self.model.decoder,
            FlowChain([], self.model.latent_dim),
            self.model.prior,
            self.model.likelihood,
        )
        if isinstance(guide, AnchoredGuide):
            single_guide: Any = AnchoredGuide(single, guide.encoder, guide.flow, context=guide.context)
            visits = single_visits(data)
        else:
            single_guide = GaussianGuide(single, guide.encoder, latent=single.site)
            visits = single_visits(
                data, times=self.num_visits is None, covariates=guide.encoder.covariates > 0
            )
        kept = ("learning_rate", "optimizer", "gradient_clip", "seed", "accelerator", "devices", "progress")
        chosen = {key: options[key] for key in kept if key in options}
        size = options.get("batch_size")
        if size is not None:  # as many visits a step as the sequences have
            size = max(1, round(size * len(visits["x"]) / len(data)))
        return fit(
            single,
            single_guide,
            visits,
            self._warmup_objective(),
            max_epochs=epochs,
            batch_size=size,
            restore_best=False,
            **chosen,
        )

    # -- likelihood ----------------------------------------------------------------------------------------

    @contextmanager
    def _anchors(self, estimator: str | None) -> Iterator[None]:
        """Anchored guides take the estimator's anchors within; others have none."""
        if estimator is not None:
            check_choice("estimator", estimator, list(ESTIMATORS))
        guide = self.guide
        if not isinstance(guide, AnchoredGuide):
            if estimator == "single":
                raise argument_error(
                    "estimator", "None: this guide sees all visits and has no anchors", estimator
                )
            yield
            return
        before = guide.anchors
        guide.anchors = "random" if estimator == "single" else "mixture"
        try:
            yield
        finally:
            guide.anchors = before

    def log_likelihood(
        self,
        x: Any,
        observed: Any = None,
        num_samples: int = 100,
        chunk_size: int | None = None,
        seed: int | None = None,
        *,
        pixel_mask: Any = None,
        times: Any = None,
        covariates: Any = None,
        estimator: str | None = None,
        **options: Any,
    ) -> LogLikelihood:
        """``log p̂(x)`` of the seen part of each sequence, on the preprocessed scale; all constants included.

        Args:
            x: Sequences.
            observed: ``(N, T)``.
            num_samples: ``S``, spread over the anchors.
            chunk_size: Subjects times samples at once.
            seed: Of the draws.
            pixel_mask: As ``x``.
            times: ``(N, T)``.
            covariates: ``(N, c)``.
            estimator: Of an anchored guide: ``"mixture"`` (the default), all observed anchors with the
                balance heuristic; ``"single"``, one random anchor a subject, as published. Published numbers
                are divided by the number of visits.
            options: Those of :func:`riemvae.log_likelihood`.
        """
        data = self.sequences(x, observed, pixel_mask, times, covariates)
        known = None if self._knows_unseen else data.observed.any(1)
        if known is not None:
            data = self._informative(data)
        batch: dict[str, Any] = self._batch(data)
        model, guide = self.model, self.guide
        with self._evaluating(), self._anchors(estimator):
            if isinstance(guide, AnchoredGuide) and guide.anchors == "random":
                # Beside the data, so that draws in several parts are of one anchor.
                with forked(seed):
                    batch["anchor"] = random_visits(anchorable_visits(data.observed))
                    seed = None if seed is None else int(torch.randint(2**31, ()))
                model, guide = WithAnchor(model), WithAnchor(guide)
            result = log_likelihood(model, guide, batch, num_samples, chunk_size, seed, **options)
        return result if known is None else _certain(result, known)

    @property
    def _knows_unseen(self) -> bool:
        """Whether the guide gives the prior to subjects of whom nothing is seen.

        Anchored guides ask the model for it; encoders of all visits take it to be ``N(0, I)``, and the one of
        trajectories has the deviations of its own.
        """
        encoder = getattr(self.guide, "encoder", None)
        if isinstance(self.guide, AnchoredGuide) or not isinstance(encoder, SequenceEncoder):
            return True
        return isinstance(encoder, TrajectoryEncoder) or isinstance(self.model.prior, StandardNormal)

    def _informative(self, data: Sequences) -> Sequences:
        """The subjects of whom anything is seen; all where there are none of them."""
        known = data.observed.any(1)
        return data[known] if bool(known.any() & ~known.all()) else data

    # -- latent space, imputation --------------------------------------------------------------------------

    def posterior_draws(
        self,
        x: Any,
        observed: Any = None,
        *,
        method: str | None = None,
        num_draws: int = 100,
        pixel_mask: Any = None,
        times: Any = None,
        covariates: Any = None,
        **options: Any,
    ) -> LatentDraws:
        """Draws of the subjects' latent given what is seen.

        See :func:`riemvae.longitudinal.draw_posterior`.
        """
        with self._evaluating():
            batch = self._batch(self.sequences(x, observed, pixel_mask, times, covariates))
            return draw_posterior(
                self.model, self.guide, batch, num_draws, method=self._method(method), **options
            )

    def _method(self, method: str | None) -> str:
        if method is None:
            return "importance" if isinstance(self.guide, AnchoredGuide) else "guide"
        self.check_method(method)
        return method

    def check_method(self, method: str) -> None:
        """Refuses a method of imputation that this model does not have.

        Raises:
            ValueError: An unknown one; ``"naive"`` or ``"best"`` where the guide has no anchors.
        """
        check_choice("method", method, METHODS)
        if method in ("naive", "best"):
            anchored(self.guide)

    @torch.no_grad()
    def encode(self, x: Any, observed: Any = None, **options: Any) -> Tensor:
        """Posterior means of the subjects' latent, ``(N, k)``; options as of :meth:`posterior_draws`."""
        return self.posterior_draws(x, observed, **options).mean

    @torch.no_grad()
    def trajectory(self, z_0: Tensor, times: Any = None, covariates: Any = None) -> Tensor:
        """The latents of all visits, ``z_0 (n, k) -> (n, T, d)``."""
        rows = [self._rows("times", times, len(z_0)), self._rows("covariates", covariates, len(z_0))]
        z: Tensor = self.model.trajectory(z_0.to(self._weight), *rows)
        return z.transpose(0, 1)

    def reconstruct(self, x: Any, observed: Any = None, **options: Any) -> Tensor:
        """Decoder means of all visits, seen or not, ``(N, T, *input_shape)``: ``imputation(...).mean``."""
        return self.imputation(x, observed, **options).mean

    def imputation(
        self,
        x: Any,
        observed: Any = None,
        *,
        method: str | None = None,
        num_draws: int = 100,
        pixel_mask: Any = None,
        times: Any = None,
        covariates: Any = None,
        **options: Any,
    ) -> Imputation:
        """Filled sequences with intervals.

        See :func:`riemvae.longitudinal.impute` for methods and options. The default is ``"importance"``
        over all anchors, or the guide's own draws where it sees all visits.
        """
        given = {"observed": observed, "pixel_mask": pixel_mask, "times": times, "covariates": covariates}
        raw = self._raw(x, **given)
        with self._evaluating():
            result = impute(
                self.model,
                self.guide,
                self._batch(self._prepared(raw)),
                method=self._method(method),
                num_draws=num_draws,
                **options,
            ).map(self._undone)
        # Seen values bit for bit, double precision too: undoing a preprocessing rounds.
        kind = torch.promote_types(result.filled.dtype, raw.x.dtype)
        seen_values = raw.x.to(result.filled.device, kind)

        def restored(values: Tensor) -> Tensor:
            return torch.where(result.missing, values.to(kind), seen_values)

        draws = None if result.draws is None else restored(result.draws)
        return replace(result, filled=restored(result.filled), draws=draws)

    def impute(self, x: Any, observed: Any = None, **options: Any) -> Tensor:
        """``(N, T, *input_shape)``: what was seen as given, what was not by the posterior mean.

        Options are those of :meth:`imputation`, which also gives intervals.
        """
        return self.imputation(x, observed, **options).filled

    # -- generation ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        times: Any = None,
        covariates: Any = None,
        noise: bool = False,
        seed: int | None = None,
    ) -> Tensor:
        """Synthetic sequences ``(n, T, *input_shape)``: decoder means, or draws with observation noise.

        Args:
            n: How many.
            times: ``(T,)`` or ``(n, T)``, for models in continuous time.
            covariates: ``(c,)`` or ``(n, c)``, for models that take them.
            noise: Draw from ``p(x|z)`` in place of its mean.
            seed: Of the draws; the caller's generator is then left as it was.
        """
        check_count("n", n)
        self._check_covariates(covariates, self.model.dynamics)
        rows = [self._rows("times", times, n), self._rows("covariates", covariates, n)]
        with self._evaluating(), forked(seed):
            return self._undone(generate(self.model, n, *rows, noise=noise))

    def _check_covariates(self, given: Any, *parts: Any) -> None:
        """Refuses covariates that none of the parts would take, where these say so."""
        if given is not None and all(getattr(part, "covariates", None) == 0 for part in parts):
            raise argument_error(
                "covariates",
                "None for a model that takes none",
                given,
                "build it with covariates=, where its recipe has them",
            )

    def _rows(self, name: str, value: Any, n: int) -> Any:
        """Numbers ``(n, k)`` of each of ``n`` subjects, or of all alike; None stays."""
        if value is None:
            return None
        try:
            tensor = torch.as_tensor(value).to(self._weight)
        except (TypeError, ValueError) as error:
            raise argument_error(name, "numbers", value, "dates as years, texts by one_hot") from error
        check_finite(name, tensor)
        return tensor.expand(n, -1) if tensor.dim() == 1 else tensor


def _certain(result: LogLikelihood, known: Tensor) -> LogLikelihood:
    """The estimates of the known subjects among all; of whom nothing is seen ``log p`` is 0."""
    exact = {"ess": float(result.num_samples), "khat": -torch.inf, "samples": result.num_samples}
    changes: dict[str, Any] = {}
    for part in fields(result):
        value = getattr(result, part.name)
        if isinstance(value, Tensor):
            changes[part.name] = value.new_full(known.shape, exact.get(part.name, 0))
            if bool(known.any()):
                changes[part.name][known.to(value.device)] = value
    return replace(result, **changes)


def _is_mask(x: Any, value: Any) -> bool:
    """Whether a second array is which visits of the first were observed, rather than another sequence."""
    if str(getattr(value, "dtype", None)) in ("bool", "torch.bool") and value.ndim == 2:
        return True
    shape = getattr(x, "shape", ())
    if len(shape) < 3:
        return False
    try:
        return np.shape(value) == tuple(shape[:2])
    except ValueError:  # ragged
        return False


class WithAnchor(nn.Module):
    """A model or a guide whose data name the visit that each subject is anchored at.

    Args:
        part: The model, or its anchored guide.
    """

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.takes_missing = takes_missing(part)

    def forward(self, anchor: Tensor, **arguments: Any) -> Any:
        """The part on the other arguments."""
        if not isinstance(self.part, AnchoredGuide):
            return self.part(**arguments)
        with self.part.anchored_at(anchor):
            return self.part(**arguments)


def single_visits(data: Sequences, times: bool = False, covariates: bool = False) -> dict[str, Tensor]:
    """Every observed visit as a sequence of one: arguments of a model with ``T = 1``.

    Args:
        data: Sequences.
        times: Whether with its time, where the data have times.
        covariates: Whether with its subject's covariates, where the data have any.
    """
    visits = {"x": data.x[data.observed].unsqueeze(1)}
    if data.pixel_mask is not None:
        visits["pixel_mask"] = data.pixel_mask[data.observed].unsqueeze(1)
    if times and data.times is not None:
        visits["times"] = data.times[data.observed].unsqueeze(1)
    if covariates and data.covariates is not None:
        visits["covariates"] = data.covariates[data.observed.nonzero(as_tuple=True)[0]]
    return visits
