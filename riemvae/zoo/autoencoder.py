"""A model, its guide and all that a practitioner does with them: fit, sample, encode, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from riemvae._checks import argument_error, check_choice, check_count
from riemvae._recipe import recipe
from riemvae._seeding import forked
from riemvae.autoencoder import VAE
from riemvae.data import Preprocessing, as_tensor, in_memory
from riemvae.data.gathering import batch_size_of
from riemvae.evaluation import OverfittingCheck, overfitting_check
from riemvae.geometry import CentroidMetric, Metric, PosteriorMetric, VolumeWeightedMetric, geodesic
from riemvae.guides import AmortizedGuide, RiemannianHamiltonianGuide
from riemvae.inference import LogLikelihood, fit, log_likelihood
from riemvae.likelihoods import Bernoulli, ContinuousBernoulli, Gaussian, Likelihood
from riemvae.sampling import (
    ManifoldSampler,
    PriorSampler,
    RandomWalkSampler,
    RiemannianHMCSampler,
    UniformSampler,
    decode,
)
from riemvae.zoo.codes import PosteriorCodes, gaussian_parameters
from riemvae.zoo.trained import Trained

# Posteriors of the training data that are kept for the geometry of the latent space.
MAXIMUM_CODES = 5_000

# Data encoded at a time for them.
_ENCODED = 1_024

# Relative excess of the squared length of a curve that is looked at.
_DRAWN = 1e-4

# Samplers along the metric of eq. 1.7, learned or made of the posterior covariances.
_ALONG_THE_METRIC: dict[str, Callable[..., Any]] = {
    "manifold": ManifoldSampler,
    "random_walk": RandomWalkSampler,
    "riemannian_hmc": RiemannianHMCSampler,
}
SAMPLERS = ("prior", *_ALONG_THE_METRIC, "uniform")


def choose_likelihood(x: Tensor) -> Likelihood:
    """The likelihood whose support the data call for: binary, in [0, 1], or real with a learned scale.

    Example:
        >>> type(choose_likelihood(torch.tensor([0.0, 0.5, 1.0]))).__name__
        'ContinuousBernoulli'
    """
    if bool(((x == 0) | (x == 1)).all()):
        return Bernoulli()
    if bool(((x >= 0) & (x <= 1)).all()):
        return ContinuousBernoulli()
    return Gaussian(scale="learned")


@recipe
class Autoencoder(Trained):
    """A trained or trainable pair of a model and its guide, with the preprocessing of its data.

    Data are arrays or tensors ``(N, *input_shape)``, or any shape with as many numbers a datum. Images of
    unsigned bytes are
    divided by 255; what is sampled or reconstructed comes back on the scale of the data. Attributes that
    training sets end
    in an underscore: ``history_``, ``fit_``; ``sampling_report_`` is the last sampler's.

    Args:
        model: The generative model.
        guide: Its guide.
        input_shape: The shape of one datum.
        objective: What ``fit`` maximises; None is the evidence lower bound.
        preprocessing: None: found at the first ``fit`` and kept.
        infer_likelihood: Choose the likelihood from the data at the first ``fit``: Bernoulli for binary
            data, continuous
            Bernoulli for values in [0, 1], a Gaussian with a learned scale for others.
        default_sampler: What ``sample`` uses if it is not told, a name of :meth:`sampler`.
        codes: The posteriors of the training data, which ``fit`` keeps: what the geometry of a model without
            a learned metric is read from.

    Example:
        >>> from riemvae import zoo
        >>> ae = zoo.build("vae", input_shape=(8,), latent_dim=2, seed=0)
        >>> x = (torch.rand(20, 8, generator=torch.Generator().manual_seed(0)) < 0.3).float()
        >>> ae.fit(x, max_epochs=2, seed=0, progress=False).sample(5).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        model: VAE,
        guide: AmortizedGuide,
        input_shape: Sequence[int],
        objective: Any = None,
        preprocessing: Preprocessing | None = None,
        infer_likelihood: bool = False,
        default_sampler: str = "prior",
        codes: PosteriorCodes | None = None,
    ) -> None:
        super().__init__(model, guide, input_shape, objective, preprocessing)
        self.infer_likelihood = infer_likelihood
        self.default_sampler = default_sampler
        self.codes = codes
        self.sampling_report_: Any = None

    @property
    def metric(self) -> Metric:
        """The metric of the latent space whose geodesics keep to data (eq. 1.7).

        The one that the guide learned; else the one with the posterior covariances of the training data as
        its matrices, :meth:`covariance_metric`.
        """
        if isinstance(self.guide, RiemannianHamiltonianGuide):
            return self.guide.metric
        return self.covariance_metric()

    def _known_codes(self) -> PosteriorCodes:
        if self.codes is None:
            raise RuntimeError(
                "the geometry of the latent space is read from the posteriors of the training data, and this "
                "model keeps none: call fit(x), or read_geometry(x) on a model that is trained already"
            )
        return self.codes

    def covariance_metric(
        self, temperature: float | None = None, regularization: float | None = None
    ) -> CentroidMetric:
        """Eq. 1.7 with the posterior covariances ``A_i = Σ_i`` of the training data: small volume near data.

        See :meth:`PosteriorCodes.covariance_metric`.
        """
        return self._known_codes().covariance_metric(temperature, regularization)

    def posterior_metric(self, num_centroids: int | None = None, **options: Any) -> PosteriorMetric:
        """Eq. 3.6, the posterior precisions of the training data as a metric: large volume near data.

        See :meth:`PosteriorCodes.posterior_metric`; ``options`` are those of
        :class:`~riemvae.geometry.PosteriorMetric`.
        """
        return self._known_codes().posterior_metric(num_centroids, **options)

    def read_geometry(self, x: Any, max_codes: int = MAXIMUM_CODES) -> Autoencoder:
        """Keeps the posteriors of training data ``x``, or of ``max_codes`` random ones of them.

        :meth:`fit` does so; this is for a model that was trained elsewhere.

        Raises:
            ValueError: The guide's posterior is not Gaussian.
        """
        data = self._shaped(x)
        if max_codes < len(data):
            data = data[torch.randperm(len(data))[:max_codes].to(data.device)]
        parts = [PosteriorCodes.of(self.posterior(part)) for part in data.split(_ENCODED)]
        self.codes = PosteriorCodes(
            torch.cat([part.loc for part in parts]), torch.cat([part.scale for part in parts])
        )
        return self

    # -- data ----------------------------------------------------------------------------------------------

    def _shaped(self, x: Any, name: str = "x") -> Tensor:
        given = in_memory(x, name)
        if given is not x and not isinstance(given, Tensor):
            raise argument_error(
                name, "data alone", f"items of {len(given)} parts", "leave out labels and the like"
            )
        tensor = as_tensor(given, name)
        numbers = torch.Size(self.input_shape).numel()
        if tensor.dim() == 0 or len(tensor) == 0 or tensor[0].numel() != numbers:
            raise argument_error(
                name,
                f"data of shape (N, {', '.join(map(str, self.input_shape))}), N >= 1",
                tensor,
                f"each datum has {numbers} numbers for this model",
            )
        return tensor.reshape(len(tensor), *self.input_shape)

    def _prepared(self, x: Any, name: str = "x") -> Tensor:
        return self._processed(self._shaped(x, name))

    # -- training ------------------------------------------------------------------------------------------

    def fit(
        self, x: Any, *, val_data: Any = None, freeze_batch_size: int | None = None, **options: Any
    ) -> Autoencoder:
        """Trains, and freezes a learned metric on the training set afterwards.

        Args:
            x: Training data; a ``Dataset`` or ``DataLoader`` is read into memory.
            val_data: Held-out data, whose bound is then monitored.
            freeze_batch_size: Minibatch size that the frozen metric is scaled for; None is the one trained
                with.
            options: Those of :func:`riemvae.fit`: ``max_epochs``, ``batch_size``, ``learning_rate``,
                ``patience``, ``seed``... The batch size of a loader is its own unless it is given.

        Returns:
            Itself.
        """
        options.setdefault("batch_size", batch_size_of(x))
        x = self._shaped(x)
        data = self._processed(x)
        val = None if val_data is None else self._prepared(val_data, "val_data")
        if self.infer_likelihood:
            self.model.likelihood = choose_likelihood(data).to(data)
            self.infer_likelihood = False  # trained from here on: a second fit goes on with it
        self.model.likelihood.validate(data)
        guide = self.guide
        learned = isinstance(guide, RiemannianHamiltonianGuide)
        if learned:
            guide.unfreeze_metric()
        self.fit_ = fit(self.model, guide, data, self.objective, val_data=val, **options)
        if learned:
            guide.freeze_metric(data.to(self.device), batch_size=freeze_batch_size)
        self.eval()
        self.codes = None
        if gaussian_parameters(self.posterior(x[:1])) is not None:
            self.read_geometry(x)
        return self

    # -- latent space --------------------------------------------------------------------------------------

    @torch.no_grad()
    def posterior(self, x: Any) -> Distribution:
        """The encoder's distribution ``q(z_0 | x)``, batch shape ``(N,)``."""
        return self.guide.encoder_distribution(self._prepared(x))

    def encode(self, x: Any) -> Tensor:
        """The encoder's means ``(N, d)``."""
        return self.posterior(x).mean

    @torch.no_grad()
    def decode(self, z: Tensor, *, noise: bool = False, batch_size: int = 1024) -> Tensor:
        """Decoder means at ``z (n, d)``, ``(n, *input_shape)``; with ``noise``, draws of ``p(x|z)``."""
        if z.dim() != 2 or z.shape[-1] != self.latent_dim or len(z) == 0:
            raise argument_error("z", f"points of shape (n, {self.latent_dim})", z)
        model = self.model

        def observe(part: Tensor) -> Tensor:
            return model.likelihood(model.decode(part), 1).sample() if noise else model.decoder_mean(part)

        with self._evaluating():
            x = decode(observe, z.to(self.device), batch_size)
        return self._undone(x).reshape(len(z), *self.input_shape)

    def reconstruct(self, x: Any) -> Tensor:
        """Decoder means at the encoder's means, ``(N, *input_shape)``."""
        return self.decode(self.encode(x))

    def interpolate(self, x1: Any, x2: Any, num: int = 10, curve: str = "straight") -> Tensor:
        """Decoded curves from the codes of ``x1`` to those of ``x2``: ``(N, num, *input_shape)``.

        Args:
            x1: Data ``(N, *input_shape)``.
            x2: As many.
            num: Points of each curve, at equal steps of its length in coordinates. (At equal steps of a
                geodesic's own length most would lie where the metric is large, in the gaps of the data.)
            curve: ``"straight"``; ``"geodesic"``, of :attr:`metric`; or ``"volume"``, which minimises the
                integral of ``1/√det G`` along the curve under :meth:`posterior_metric` (eq. 3.8).
        """
        check_count("num", num, minimum=2)
        check_choice("curve", curve, ["straight", "geodesic", "volume"])
        z1, z2 = self.encode(x1), self.encode(x2)
        if z1.shape != z2.shape:
            raise argument_error("x2", f"as many data as x1, {len(z1)}", f"{len(z2)}")
        t = torch.linspace(0.0, 1.0, num, dtype=z1.dtype, device=z1.device)
        if curve == "straight":
            path = z1[:, None] + t[:, None] * (z2 - z1)[:, None]
        else:
            metric = self.metric if curve == "geodesic" else VolumeWeightedMetric(self.posterior_metric())
            path = geodesic(metric, z1, z2, tolerance=_DRAWN).evenly(t).movedim(0, 1)
        return self.decode(path.flatten(0, 1)).reshape(len(z1), num, *self.input_shape)

    # -- generation ----------------------------------------------------------------------------------------

    def sampler(self, name: str | None = None, metric: Metric | None = None, **options: Any) -> Any:
        """A sampler of latent points by name.

        - ``"prior"``: the model's own prior (``y=`` for one that is conditioned on it).
        - ``"manifold"``: finite chains of Hamiltonian Monte Carlo on ``√det G⁻¹`` (chapter 1).
        - ``"random_walk"``: the Riemannian random walk (chapter 2).
        - ``"riemannian_hmc"``: Riemannian Hamiltonian Monte Carlo on ``√det G⁻¹``, the metric as its mass.
        - ``"uniform"``: the Riemannian uniform distribution ``√det G`` of the posterior metric (chapter 3).

        The second to fourth follow :attr:`metric`, the last :meth:`posterior_metric`, so all but the first
        need a model that was fitted; any works on any model with a Gaussian posterior.

        Args:
            name: One of the above; None is the model's own default.
            metric: In place of the model's.
            options: Those of :class:`~riemvae.sampling.PriorSampler`,
                :class:`~riemvae.sampling.ManifoldSampler`, :class:`~riemvae.sampling.RandomWalkSampler`,
                :class:`~riemvae.sampling.RiemannianHMCSampler` or :class:`~riemvae.sampling.UniformSampler`.
        """
        name = check_choice("sampler", self.default_sampler if name is None else name, list(SAMPLERS))
        if name == "prior":
            return PriorSampler(self.model.prior, **options)
        if name == "uniform":
            metric = self.posterior_metric() if metric is None else metric
            centroids = getattr(metric, "centroids", None)
            if centroids is not None and not getattr(metric, "decay", 0.0):
                radius = 2 * float(torch.linalg.vector_norm(centroids, dim=-1).max())
                options = {"radius": radius, **options}
            return UniformSampler(metric, **options)
        return _ALONG_THE_METRIC[name](self.metric if metric is None else metric, **options)

    def sample(
        self,
        n: int,
        sampler: str | Callable[[int], Tensor] | Distribution | Any = None,
        *,
        noise: bool = False,
        return_latents: bool = False,
        return_trace: bool = False,
        seed: int | None = None,
        **options: Any,
    ) -> Any:
        """Synthetic data ``(n, *input_shape)``: decoder means, or draws with observation noise.

        Args:
            n: How many.
            sampler: A name (see :meth:`sampler`), a distribution of ``z``, a callable ``n -> z (n, d)`` or
                an object with
                ``sample(n)``. None is this model's own: ``"manifold"`` where a metric is learned, else
                ``"prior"``.
            noise: Draw from ``p(x|z)`` in place of its mean.
            return_latents: Return ``(x, z)``.
            return_trace: Return the whole chains as well, ``(..., trace)``: a
                :class:`~riemvae.sampling.ChainResult` with samples ``(steps, n, d)``, from a sampler that
                runs chains.
            seed: Of the draws; the caller's generator is then left as it was.
            options: Of a sampler given by name.

        The sampler's report (acceptance, divergences, share of draws far from all centroids) is kept in
        ``sampling_report_``.
        """
        check_count("n", n)
        with forked(seed):
            if sampler is None or isinstance(sampler, str):
                if return_trace:
                    options["keep_trace"] = True
                source = self.sampler(sampler, **options)
            else:
                source = sampler
            if isinstance(source, Distribution):
                z = source.sample(torch.Size([n]))
            else:
                z = source.sample(n) if hasattr(source, "sample") else source(n)
            self.sampling_report_ = getattr(source, "report", None)
            x = self.decode(z, noise=noise)
        parts = [x]
        if return_latents:
            parts.append(z)
        if return_trace:
            parts.append(self._trace(source))
        return tuple(parts) if len(parts) > 1 else x

    @staticmethod
    def _trace(source: Any) -> Any:
        trace = getattr(source, "trace", None)
        if trace is None:
            raise argument_error(
                "sampler",
                "one that runs chains and keeps them, for return_trace=True",
                type(source).__name__,
                "pass a sampler by name, or one that was built with keep_trace=True",
            )
        return trace

    def overfitting_check(self, generated: Any, x: Any) -> OverfittingCheck:
        """Whether generated data copy the training data ``x``: nearest neighbours, as in figure 3.3.

        See :func:`riemvae.evaluation.overfitting_check`.
        """
        train = self._shaped(x).float()
        return overfitting_check(self._shaped(generated, "generated").float(), train, self.reconstruct(x))

    # -- likelihood and files
    # ------------------------------------------------------------------------------------------

    def log_likelihood(
        self,
        x: Any,
        num_samples: int = 100,
        chunk_size: int | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> LogLikelihood:
        """``log p̂(x)`` a datum, on the preprocessed scale; see :func:`riemvae.log_likelihood` for options."""
        with self._evaluating():
            data = self._prepared(x)
            return log_likelihood(self.model, self.guide, data, num_samples, chunk_size, seed, **options)
