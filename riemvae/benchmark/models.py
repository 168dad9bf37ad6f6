"""The models of the benchmark: one architecture, and the bricks in which they differ."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from riemvae.autoencoder import VAE
from riemvae.benchmark.settings import Settings
from riemvae.flows import IAF, MAF
from riemvae.guides import (
    AmortizedGuide,
    FlowGuide,
    GaussianGuide,
    HamiltonianGuide,
    RiemannianHamiltonianGuide,
)
from riemvae.inference import ELBO, IWAE
from riemvae.inference.schedules import Linear
from riemvae.likelihoods import Bernoulli
from riemvae.networks import CentroidMetricNetwork, EncoderFeatures, MLPDecoder, MLPEncoder, MLPMetric
from riemvae.priors import FlowPrior, VampPrior

SHAPE = (1, 28, 28)


class Stage(NamedTuple):
    """A part of a training: its learning rate falls to zero as a cosine."""

    objective: Any
    epochs: int
    learning_rate: float


class Pair(NamedTuple):
    """A model, its guide and how they are trained."""

    model: VAE
    guide: AmortizedGuide
    stages: tuple[Stage, ...]


def build(name: str, latent_dim: int, settings: Settings, x: Tensor) -> Pair:
    """A pair with fresh weights, drawn by torch's generator.

    Args:
        name: One of :data:`~riemvae.benchmark.settings.TITLES`.
        latent_dim: ``d``.
        settings: All numbers.
        x: Binary training images ``(N, 1, 28, 28)``, for pseudo-inputs.
    """
    best = name == "best"
    hidden = settings.best_hidden if best else settings.hidden
    activation = "gated" if best else "relu"
    encoder = MLPEncoder(SHAPE, latent_dim, hidden, len(hidden), activation)
    decoder = MLPDecoder(latent_dim, SHAPE, hidden[::-1], activation)
    prior: Any = None
    if name.endswith("_vamp"):
        rows = torch.randperm(len(x))[: settings.num_pseudo_inputs]
        prior = VampPrior(encoder, x[rows], support="unit_interval")
    elif best:
        prior = FlowPrior(MAF(latent_dim, transforms=2, hidden=settings.best_flow_hidden))
    model = VAE(decoder, latent_dim, prior, Bernoulli())
    guide = _guide(name, model, encoder, latent_dim, settings)
    rate = settings.learning_rate
    if not best:
        return Pair(model, guide, (Stage(ELBO(), settings.epochs, rate),))
    # A warm-up, so that no latent dimension is given up at the start; several draws at the end.
    warm = Linear(0.0, 1.0, max(1, settings.best_epochs // 20))
    stages = [Stage(ELBO(beta=warm), settings.best_epochs, rate)]
    if settings.best_last_epochs:
        last = IWAE(settings.best_last_samples, gradient="doubly")
        stages.append(Stage(last, settings.best_last_epochs, 0.2 * rate))
    return Pair(model, guide, tuple(stages))


def _guide(name: str, model: VAE, encoder: MLPEncoder, latent_dim: int, settings: Settings) -> AmortizedGuide:
    if name in ("vae", "vae_vamp", "best"):
        return GaussianGuide(model, encoder)
    if name == "vae_iaf":
        flow = IAF(
            latent_dim,
            context=encoder.num_features,
            transforms=settings.flow_transforms,
            hidden=settings.flow_hidden,
        )
        return FlowGuide(model, encoder, flow, context=EncoderFeatures(encoder))
    options: dict[str, Any] = {
        "num_steps": settings.num_steps,
        "step_size": settings.step_size,
        "tempering": settings.tempering,
    }
    if name == "hvae":
        return HamiltonianGuide(model, encoder, **options)
    metric = CentroidMetricNetwork(
        MLPMetric(SHAPE, latent_dim, settings.hidden), settings.temperature, settings.regularization
    )
    return RiemannianHamiltonianGuide(model, encoder, metric, **options)
