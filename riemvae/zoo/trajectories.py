"""Chapter 5: linear trajectories of the features of a VAE, or of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from riemvae._checks import argument_error, check_choice, check_count
from riemvae._recipe import recipe
from riemvae._seeding import forked
from riemvae.data import Preprocessing
from riemvae.data.gathering import batch_size_of
from riemvae.data.sequences import Sequences
from riemvae.guides import GaussianGuide
from riemvae.inference import ELBO, fit
from riemvae.inference.fit import Fit
from riemvae.likelihoods import Gaussian
from riemvae.longitudinal import (
    AnchoredGuide,
    FeatureDecoder,
    FlowChain,
    LinearTrajectory,
    LongitudinalVAE,
    TimeFeatures,
    TrajectoryEncoder,
    encode_features,
    trajectory_prior,
)
from riemvae.longitudinal.features import OnFeatures
from riemvae.longitudinal.linear_trajectory import TrajectoryParameters
from riemvae.longitudinal.trajectory_samples import sample_trajectories
from riemvae.networks import MLPDecoder
from riemvae.priors import MixturePrior
from riemvae.zoo.sequence_bricks import SequenceBricks
from riemvae.zoo.sequences import SequenceAutoencoder, single_visits

SPATIAL_SAMPLERS = ("mixture", "joint", "prior")

# What belongs to one training, that of the trajectories, and not to the steps before and after it.
_OF_ONE_STEP = ("scheduler", "callbacks", "checkpoint", "checkpoint_interval", "resume", "logger")


@recipe
class MaskedScores(nn.Module):
    """Scores and which of them were seen, as an encoder of sequences takes them: a missing one is no zero.

    Args:
        num_scores: How many.

    Example:
        >>> scores, seen = torch.tensor([[0.5, 0.0]]), torch.tensor([[True, False]])
        >>> MaskedScores(2)(scores, seen).tolist()
        [[0.5, 0.0, 1.0, 0.0]]
    """

    def __init__(self, num_scores: int) -> None:
        super().__init__()
        self.num_scores = check_count("num_scores", num_scores)
        self.num_features = 2 * self.num_scores

    def forward(self, x: Tensor, pixel_mask: Tensor) -> Tensor:
        """``(n, f)`` twice ``-> (n, 2 f)``."""
        return torch.cat([x, pixel_mask.to(x)], -1)


@recipe
class TrajectoryAutoencoder(SequenceAutoencoder):
    """Subjects on straight lines: a speed, a delay and where the line lies, each with a posterior.

    :meth:`fit` has two steps for images, as published: a VAE of single visits, whose means are the features,
    and then the model of their trajectories with the VAE held fixed; a third one, of everything together, is
    an option. Scores are their own features. Trajectories are drawn with ``λ`` from a mixture fitted to the
    training subjects (``spatial``), or from the prior.

    Args:
        model: Of the data: a :class:`~riemvae.longitudinal.LinearTrajectory`, decoded.
        guide: Its guide.
        input_shape: The shape of one visit.
        objective: Of the trajectories; None is the evidence lower bound.
        preprocessing: None: found at the first ``fit`` and kept.
        times_known: Whether the unit of time is known, which the first ``fit`` takes from the data.
        features: The model of feature trajectories for images, with its guide, as a list of the two; None for
            scores.
        num_components: Of the mixtures.
        spatial: That mixture, which ``fit`` sets.
        lines: A mixture of ``(η, τ, λ)`` together, which ``fit`` sets too.

    Example:
        >>> from riemvae import zoo
        >>> ae = zoo.build("linear_trajectory", input_shape=(4,), latent_dim=3, seed=0)
        >>> g = torch.Generator().manual_seed(0)
        >>> x, times = torch.randn(30, 5, 4, generator=g), torch.arange(5.0).expand(30, 5)
        >>> ae.fit(x, times=times, max_epochs=2, seed=0, progress=False).sample(3, times=[0.0, 8.0]).shape
        torch.Size([3, 2, 4])
        >>> ae.parameters_of(x, times=times).log_speed.shape
        torch.Size([30])
    """

    def __init__(
        self,
        model: LongitudinalVAE,
        guide: Any,
        input_shape: Sequence[int],
        objective: Any = None,
        preprocessing: Preprocessing | None = None,
        times_known: bool = False,
        features: nn.ModuleList | None = None,
        num_components: int = 10,
        spatial: MixturePrior | None = None,
        lines: MixturePrior | None = None,
    ) -> None:
        super().__init__(model, guide, input_shape, objective, preprocessing, 0, times_known)
        self.features = features
        self.num_components = check_count("num_components", num_components)
        self.spatial, self.lines = spatial, lines
        self.feature_fit_: Fit | None = None

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
        feature_epochs: int | None = None,
        joint_epochs: int = 0,
        **options: Any,
    ) -> TrajectoryAutoencoder:
        """Trains the VAE of single visits, then the trajectories of its features, then both on request.

        Args:
            x: Training sequences.
            observed: ``(N, T)``.
            pixel_mask: As ``x``.
            times: ``(N, T)``.
            covariates: Not used.
            val_data: Held-out sequences.
            max_epochs: Of the trajectories.
            warmup: Not used.
            feature_epochs: Of the VAE; None is as many as ``max_epochs``. 0 keeps a VAE that is trained.
            joint_epochs: Of everything together afterwards.
            options: Those of :func:`riemvae.fit`, for all steps; scheduler, callbacks, logger and checkpoint
                are of the trajectories' alone. Other rates for the steps are two calls, the second with
                ``feature_epochs=0``.

        Returns:
            Itself. A training that is interrupted ends with the step that it was in, which ``fit_`` then
            tells of; mixtures are fitted to what there is.

        Raises:
            ValueError: As the base class; to resume a training of trajectories with another VAE's features.
        """
        options.setdefault("batch_size", batch_size_of(x))
        data, val = self._training_data(x, observed, pixel_mask, times, covariates, val_data)
        if self.features is None:
            self._fit_sequences(data, val, max_epochs, options)
        else:
            check_count("joint_epochs", joint_epochs, minimum=0)
            epochs = max_epochs if feature_epochs is None else feature_epochs
            others = {name: value for name, value in options.items() if name not in _OF_ONE_STEP}
            going = True
            if check_count("feature_epochs", epochs, minimum=0):
                if options.get("resume") is not None:
                    raise argument_error(
                        "resume",
                        "None where the VAE is trained too",
                        options["resume"],
                        "its checkpoint is of the trajectories: load a saved model and pass feature_epochs=0",
                    )
                done = self.feature_fit_ = self._fit_visits(data, val, epochs, others)
                going = not done.interrupted
            if going:
                done = self._fit_features(data, val, max_epochs, options)
                going = not done.interrupted
            self.fit_ = done
            if going and joint_epochs:
                self._fit_sequences(data, val, joint_epochs, others)
        self.eval()
        self._fit_mixtures(data, options.get("seed"))
        return self

    @torch.no_grad()
    def _fit_mixtures(self, data: Sequences, seed: int | None) -> None:
        """Of ``λ``, of posterior means as published; of whole lines, of posterior draws.

        Of subjects of whom anything is seen; from fewer than two there are none, and synthetic patients come
        from the prior.
        """
        self.spatial = self.lines = None
        data = data[data.observed.any(1)]
        if len(data) < 2:
            return
        with self._evaluating(), forked(seed):
            posterior = self.guide.posterior(**self._batch(data))
            mean, drawn = posterior.mean, posterior.sample()
        components = min(self.num_components, max(1, len(mean) // 10))
        options: dict[str, Any] = {"learn": False, "full": True, "seed": seed}
        dynamics: Any = self.model.dynamics
        spatial = dynamics.split(mean).spatial
        if spatial.shape[-1]:
            self.spatial = MixturePrior.from_codes(spatial, components, **options)
        self.lines = MixturePrior.from_codes(drawn, components, **options)

    def _visit_encoder(self) -> nn.Module:
        encoder: Any = self.guide.encoder
        return encoder.encoder  # type: ignore[no-any-return]

    def _fit_visits(
        self, data: Sequences, val: Sequences | None, epochs: int, options: dict[str, Any]
    ) -> Fit:
        """The VAE of single visits (chapter 5, step 1), which knows no time."""
        decoder: Any = self.model.decoder
        encoder = self._visit_encoder()
        single = LongitudinalVAE(
            decoder.decoder, FlowChain([], self.latent_dim), likelihood=self.model.likelihood
        )
        return fit(
            single,
            AnchoredGuide(single, encoder),
            single_visits(data),
            val_data=None if val is None else single_visits(val),
            max_epochs=epochs,
            **options,
        )

    def _fit_features(
        self, data: Sequences, val: Sequences | None, epochs: int, options: dict[str, Any]
    ) -> Fit:
        """The trajectories of the features (step 2): the VAE has no part in it."""
        model, guide = self.features  # type: ignore[misc]

        def batch(part: Sequences) -> dict[str, Tensor]:
            codes = encode_features(self._visit_encoder(), part.x, part.observed, part.pixel_mask)
            arguments = {**self._batch(part), "x": codes}
            arguments.pop("pixel_mask", None)
            return arguments

        return fit(
            model,
            guide,
            batch(data),
            self.objective,
            val_data=None if val is None else batch(val),
            max_epochs=epochs,
            **options,
        )

    @torch.no_grad()
    def _codes(self, data: Sequences) -> TrajectoryParameters:
        with self._evaluating():
            mean = self.guide.posterior(**self._batch(data)).mean
        dynamics: Any = self.model.dynamics
        return dynamics.split(mean)  # type: ignore[no-any-return]

    def parameters_of(
        self, x: Any, observed: Any = None, *, times: Any = None, pixel_mask: Any = None
    ) -> TrajectoryParameters:
        """Posterior means of ``η (N,)``, ``τ (N,)`` and ``λ (N, d - 1)``, in the model's unit of time."""
        return self._codes(self.sequences(x, observed, pixel_mask, times))

    @torch.no_grad()
    def progression(
        self, x: Any, observed: Any = None, *, times: Any = None, pixel_mask: Any = None
    ) -> Tensor:
        """``exp(η)(t - τ)`` of every visit at posterior means, ``(N, T)``: subjects' times on one scale."""
        data = self.sequences(x, observed, pixel_mask, times)
        with self._evaluating():
            mean = self.guide.posterior(**self._batch(data)).mean
        dynamics: Any = self.model.dynamics
        return dynamics.progression(mean, data.times)  # type: ignore[no-any-return]

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        times: Any = None,
        covariates: Any = None,
        noise: bool = False,
        seed: int | None = None,
        spatial: str | Tensor | None = None,
    ) -> Tensor:
        """Synthetic patients ``(n, T, *input_shape)``.

        Args:
            n: How many.
            times: ``(T,)`` or ``(n, T)``.
            covariates: Not used.
            noise: Draw from ``p(x|z)`` in place of its mean.
            seed: Of the draws; the caller's generator is then left as it was.
            spatial: Where ``λ`` comes from: ``"mixture"`` (the default of a fitted model), ``"prior"``, or
                values ``(n, d - 1)``, such as those of real patients, whose possible courses are then drawn;
                ``η`` and ``τ`` come from the prior. ``"joint"`` takes all three from one mixture, fitted to
                posterior draws of the training subjects: for a population whose speeds and delays are not
                centred and independent as the prior has them.
        """
        check_count("n", n)
        self._check_covariates(covariates, *self._parts())
        if times is None:
            raise argument_error("times", "the times to draw at, (T,) or (n, T)", None)
        source: Any = spatial
        if not isinstance(spatial, Tensor):
            chosen = ("prior" if self.spatial is None else "mixture") if spatial is None else spatial
            fitted = {"mixture": self.spatial, "joint": self.lines}
            if check_choice("spatial", chosen, list(SPATIAL_SAMPLERS)) == "prior":
                source = None
            else:
                mixture = fitted[chosen]
                if mixture is None:
                    raise RuntimeError(f"the mixture of spatial={chosen!r} is fitted by fit(x)")
                source = mixture()
        with self._evaluating(), forked(seed):
            rows = self._rows("times", times, n)
            drawn = sample_trajectories(self.model, rows, source, size=n, noise=noise)
            return self._undone(drawn.x)


def linear_trajectory(
    bricks: SequenceBricks,
    *,
    sigma_eta: float = 0.5,
    sigma_tau: float = 1.0,
    spatial: str = "first",
    cell: str = "gru",
    hidden_size: int = 128,
    num_layers: int = 1,
    mapping_hidden: Sequence[int] = (512,),
    beta: float = 1.0,
    num_components: int = 10,
) -> TrajectoryAutoencoder:
    """Chapter 5: each subject a straight line, by its speed, its delay and where it lies.

    An image has ``d`` features; scores are their own. ``sigma_eta`` and ``sigma_tau`` are the prior's
    deviations of log speed and delay, in units of the standardised time; ``spatial`` is ``"first"`` (``λ``
    from the first observed visit, as published) or ``"all"``. The network of the visits is a GRU of one
    layer; table 5.4's is ``cell="elman"``, ``num_layers=3``, ``hidden_size=512``. ``beta=0.1`` weighs the KL
    part as published. The scale of the features' noise is learned, and so is that of scores unless a
    likelihood is given. For scores the networks of a visit are not used.

    Source: Chadebec, Huijben, Pluim, Allassonnière and van Eijnatten (2022); thesis, chapter 5.
    """
    bricks.refuse_visits("linear_trajectory")
    images = len(bricks.input_shape) > 1
    d = bricks.latent_dim
    size = d if images else bricks.input_shape[0]
    dynamics = LinearTrajectory(d)
    prior = trajectory_prior(d, sigma_eta, sigma_tau)
    mapping = MLPDecoder(d, size, tuple(mapping_hidden))
    lines = TrajectoryEncoder(
        nn.Flatten() if images else MaskedScores(size),
        d,
        spatial,
        hidden_size=hidden_size,
        num_layers=num_layers,
        cell=cell,
        sigma_eta=sigma_eta,
        sigma_tau=sigma_tau,
        time_features=TimeFeatures(frequencies=0),
        num_features=size if images else 2 * size,
    )
    noise = Gaussian(scale="learned")
    objective = ELBO(beta=beta)
    if not images:
        model = LongitudinalVAE(mapping, dynamics, prior, bricks.likelihood if bricks.chosen else noise)
        guide = GaussianGuide(model, lines, latent=model.site)
        return TrajectoryAutoencoder(
            model, guide, bricks.input_shape, objective, num_components=num_components
        )
    inner = LongitudinalVAE(mapping, dynamics, prior, noise)
    decoder = FeatureDecoder(mapping, bricks.decoder, frozen=False)
    model = LongitudinalVAE(decoder, dynamics, prior, bricks.likelihood)
    guide = GaussianGuide(model, OnFeatures(bricks.encoder, lines), latent=model.site)
    features = nn.ModuleList([inner, GaussianGuide(inner, lines, latent=inner.site)])
    return TrajectoryAutoencoder(
        model, guide, bricks.input_shape, objective, features=features, num_components=num_components
    )
