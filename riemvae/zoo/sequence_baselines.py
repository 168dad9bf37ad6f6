"""The models that chapter 6 is compared with, as recipes of the same bricks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from riemvae._checks import check_choice
from riemvae.guides import GaussianGuide
from riemvae.longitudinal import LongitudinalVAE
from riemvae.longitudinal.ode import OdeFlow, VectorField
from riemvae.longitudinal.time_features import TimeFeatures
from riemvae.longitudinal.topographic import TopographicLatents, coherence_length
from riemvae.longitudinal.visit_encoders import GaussianProcessEncoder, TopographicEncoder, VisitEncoder
from riemvae.longitudinal.visits import RepeatedPrior, VisitLatents
from riemvae.priors import StandardNormal
from riemvae.priors.gaussian_process import GaussianProcessPrior
from riemvae.zoo.sequence_bricks import SequenceBricks, sequence_encoder, visit_prior
from riemvae.zoo.sequences import SequenceAutoencoder


def visit_vae(bricks: SequenceBricks, *, prior: Any = "normal", components: int = 500) -> SequenceAutoencoder:
    """A VAE of single visits: what a sequence is when its order and its subject are forgotten.

    ``prior`` is ``"normal"``, ``"vamp"`` or a brick, of each visit's latent. It imputes by the mean of all
    images.

    Source: Kingma and Welling (2014); Tomczak and Welling (2018).
    """
    every = visit_prior(prior, bricks, components)
    repeated = RepeatedPrior(StandardNormal(bricks.latent_dim) if every is None else every, bricks.num_visits)
    unseen = None if every is None else repeated.prior
    dynamics = VisitLatents(bricks.num_visits, bricks.latent_dim)
    model = LongitudinalVAE(bricks.decoder, dynamics, repeated, bricks.likelihood)
    guide = GaussianGuide(model, VisitEncoder(bricks.encoder, unseen), latent=model.site)
    return SequenceAutoencoder(model, guide, bricks.input_shape)


def gp_vae(
    bricks: SequenceBricks,
    *,
    kernel: str = "cauchy",
    lengthscale: float | None = None,
    learn_lengthscale: bool = False,
    max_scale: float | None = 3.0,
) -> SequenceAutoencoder:
    """A VAE whose visits' latents are Gaussian processes in time.

    ``kernel`` is a name of :class:`~riemvae.priors.GaussianProcessPrior`: ``"rbf"``, ``"cauchy"``,
    ``"diffusion"``, ``"matern"``... The posterior is the process given the encoder's Gaussians as
    observations, so that missing visits follow from their neighbours; ``max_scale`` bounds their
    deviations, without which the posterior may collapse to the prior.

    Source: Fortuin, Baranchuk, Rätsch and Mandt (2020); posterior: Pearce (2020).
    """
    prior = GaussianProcessPrior(
        bricks.num_visits, bricks.latent_dim, kernel, lengthscale, learn=learn_lengthscale
    )
    dynamics = VisitLatents(bricks.num_visits, bricks.latent_dim)
    model = LongitudinalVAE(bricks.decoder, dynamics, prior, bricks.likelihood)
    guide = GaussianGuide(model, GaussianProcessEncoder(bricks.encoder, prior, max_scale), latent=model.site)
    return SequenceAutoencoder(model, guide, bricks.input_shape)


def topographic_vae(
    bricks: SequenceBricks,
    *,
    coherence: int | str = "part",
    capsules: int = 1,
    neighbours: int = 1,
    cyclic: bool = False,
    roll: bool = True,
) -> SequenceAutoencoder:
    """The topographic VAE: activities that move along a capsule from visit to visit.

    ``coherence`` is ``L``, or ``"none"``, ``"short"``, ``"part"`` or ``"half"`` of the sequence.

    Source: Keller and Welling (2021).
    """
    visits = bricks.visits
    length = coherence_length(coherence, visits) if isinstance(coherence, str) else coherence
    dynamics = TopographicLatents(
        visits, bricks.latent_dim, length, capsules=capsules, neighbours=neighbours, cyclic=cyclic, roll=roll
    )
    model = LongitudinalVAE(bricks.decoder, dynamics, None, bricks.likelihood)
    encoder = TopographicEncoder(bricks.encoder, _another(bricks.encoder))
    return SequenceAutoencoder(model, GaussianGuide(model, encoder, latent=model.site), bricks.input_shape)


def bubble_vae(
    bricks: SequenceBricks, *, coherence: int | str = "part", cyclic: bool = False
) -> SequenceAutoencoder:
    """The bubble VAE: variances that last for a few visits, without a capsule to move along.

    Source: Hyvärinen, Hurri and Väyrynen (2004), in the form of Keller and Welling (2021).
    """
    return topographic_vae(bricks, coherence=coherence, neighbours=0, cyclic=cyclic, roll=False)


def latent_ode(
    bricks: SequenceBricks,
    *,
    hidden_field: Sequence[int] = (128, 128),
    covariates: int = 0,
    autonomous: bool = True,
    reference_time: float | None = None,
    inference: str = "recurrent",
) -> SequenceAutoencoder:
    """The latent ODE: a first state from a backward recurrent network, moved by a differential equation.

    ``reference_time`` is when the first state is that of the visit; None is the earliest training time.

    Source: Chen, Rubanova, Bettencourt and Duvenaud (2018); Rubanova, Chen and Duvenaud (2019).
    """
    check_choice("inference", inference, ["recurrent", "set", "experts"])
    bricks.refuse_visits("latent_ode")
    field = VectorField(
        bricks.latent_dim,
        covariates,
        tuple(hidden_field),
        time_features=None if autonomous else TimeFeatures(),
        autonomous=autonomous,
    )
    dynamics = OdeFlow(field, bricks.latent_dim, reference_time)
    model = LongitudinalVAE(bricks.decoder, dynamics, None, bricks.likelihood)
    encoder = sequence_encoder(inference, bricks, bricks.latent_dim, covariates)
    return SequenceAutoencoder(model, GaussianGuide(model, encoder, latent=model.site), bricks.input_shape)


def _another(encoder: Any) -> Any:
    """A network of the same kind with weights of its own."""
    other = copy.deepcopy(encoder)
    for module in other.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return other
