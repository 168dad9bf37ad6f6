"""What the recipes share: networks by name or the user's own, and the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from riemvae import networks
from riemvae._checks import argument_error, check_count
from riemvae.autoencoder import VAE, Prior
from riemvae.likelihoods import ContinuousBernoulli, Likelihood


class Bricks(NamedTuple):
    """The parts of a model that its guide is laid on."""

    model: VAE
    encoder: nn.Module
    input_shape: tuple[int, ...]
    architecture: str
    network_options: dict[str, Any]


def lay(
    input_shape: int | Sequence[int],
    latent_dim: int,
    likelihood: str | Likelihood | None,
    prior: Prior,
    architecture: str,
    encoder: nn.Module | None,
    decoder: nn.Module | None,
    network_options: dict[str, tuple[int, ...]],
) -> Bricks:
    """Builds the model and the encoder of a recipe."""
    shape = (input_shape,) if isinstance(input_shape, int) else tuple(input_shape)
    if not shape:
        raise argument_error("input_shape", "the shape of one datum, such as (1, 28, 28)", input_shape)
    for size in shape:
        check_count("input_shape", size)
    check_count("latent_dim", latent_dim)
    if encoder is None:
        encoder = networks.encoder(architecture, shape, latent_dim, **network_options)
    if decoder is None:
        mirrored = {name: tuple(reversed(sizes)) for name, sizes in network_options.items()}
        decoder = networks.decoder(architecture, latent_dim, shape, **mirrored)
    # Until fit has seen data: a density for all of [0, 1].
    model = VAE(decoder, latent_dim, prior, ContinuousBernoulli() if likelihood is None else likelihood)
    return Bricks(model, encoder, shape, architecture, network_options)
