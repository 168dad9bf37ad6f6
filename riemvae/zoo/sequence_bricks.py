"""What the recipes of sequence models share: networks of a visit, flows and priors by name, guides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from riemvae import likelihoods, networks
from riemvae._checks import argument_error, check_choice, check_count
from riemvae.autoencoder import Prior
from riemvae.flows import IAF, MAF, NSF, RealNVP, SplineCoupling
from riemvae.guides import GaussianGuide
from riemvae.likelihoods import Gaussian, Likelihood
from riemvae.longitudinal import AnchoredGuide, LongitudinalVAE
from riemvae.longitudinal.time_features import TimeFeatures
from riemvae.networks import EncoderFeatures
from riemvae.networks.experts import ProductOfExperts
from riemvae.networks.recurrent import RecurrentEncoder
from riemvae.networks.set_encoder import SetEncoder
from riemvae.priors import VampPrior

FLOWS: dict[str, Callable[..., nn.Module]] = {
    "iaf": IAF,
    "maf": MAF,
    "nsf": NSF,
    "coupling": RealNVP,
    "spline_coupling": SplineCoupling,
}
# Those whose scales can be bounded.
AFFINE_FLOWS = ("iaf", "maf", "coupling")
POSTERIORS = ("normal", "iaf")


class SequenceBricks(NamedTuple):
    """What the recipes of sequence models share.

    Attributes:
        encoder: Of one visit, ``x (n, *input_shape) -> (loc, scale)``.
        decoder: ``z (n, d) ->`` the likelihood's parameters.
        likelihood: Of one visit; the standard Gaussian where none was chosen.
        chosen: Whether the likelihood was.
        input_shape: Of one visit.
        num_visits: ``T``, or None where visits have times.
        latent_dim: ``d``.
    """

    encoder: nn.Module
    decoder: nn.Module
    likelihood: Likelihood
    chosen: bool
    input_shape: tuple[int, ...]
    num_visits: int | None
    latent_dim: int

    @property
    def visits(self) -> int:
        """``T``, which this recipe needs."""
        if self.num_visits is None:
            raise argument_error(
                "num_visits",
                "the number of visits, for a model of numbered visits",
                None,
                "pass num_visits=T",
            )
        return self.num_visits

    def refuse_visits(self, name: str) -> None:
        """Refuses a number of visits, for a recipe of visits at any times."""
        if self.num_visits is not None:
            raise argument_error(
                "num_visits",
                f"None: {name!r} is a function of time",
                self.num_visits,
                "leave it out, and pass times= to fit",
            )


def flow_by_name(name: str, latent_dim: int, transforms: int, hidden: Sequence[int], **options: Any) -> Any:
    """A flow over ``ℝᵈ`` by name: ``"iaf"``, ``"maf"``, ``"nsf"``, ``"coupling"``, ``"spline_coupling"``."""
    build = FLOWS[check_choice("flow", name, list(FLOWS))]
    return build(latent_dim, transforms=transforms, hidden=tuple(hidden), **options)


def visit_prior(prior: Any, bricks: SequenceBricks, components: int) -> Prior:
    """A prior of ``ℝᵈ`` by name, ``"normal"`` or ``"vamp"``, or one of the user's own."""
    if not isinstance(prior, str):
        return prior  # type: ignore[no-any-return]
    if check_choice("prior", prior, ["normal", "vamp"]) == "normal":
        return None
    check_count("components", components)
    return VampPrior(bricks.encoder, torch.rand(components, *bricks.input_shape), learn_pseudo_inputs=True)


def posterior_flow(posterior: str, bricks: SequenceBricks) -> dict[str, Any]:
    """The flow of an enriched posterior of one visit, and its context where the encoder offers features."""
    if check_choice("posterior", posterior, list(POSTERIORS)) == "normal":
        return {}
    if not hasattr(bricks.encoder, "num_features"):
        return {"flow": IAF(bricks.latent_dim, transforms=3, hidden=(128, 128))}
    context = EncoderFeatures(bricks.encoder)
    flow = IAF(bricks.latent_dim, context=context.num_features, transforms=3, hidden=(128, 128))
    return {"flow": flow, "context": context}


ANCHORED = ("anchor", "mixture")
INFERENCES = (*ANCHORED, "experts", "set", "recurrent")


def sequence_guide(
    inference: str,
    model: LongitudinalVAE,
    bricks: SequenceBricks,
    posterior: str = "normal",
    covariates: int = 0,
) -> Any:
    """A guide by name: of one visit carried back, or of all visits at once.

    ``"anchor"`` and ``"mixture"`` are an :class:`AnchoredGuide` with random anchors and with all of them;
    ``"experts"``, ``"set"`` and ``"recurrent"`` a Gaussian by a network of all observed visits.
    """
    check_choice("inference", inference, list(INFERENCES))
    if inference in ANCHORED:
        anchors = "random" if inference == "anchor" else "mixture"
        return AnchoredGuide(model, bricks.encoder, **posterior_flow(posterior, bricks), anchors=anchors)
    if posterior != "normal":
        raise argument_error("posterior", f"'normal' with inference={inference!r}", posterior)
    encoder = sequence_encoder(inference, bricks, model.dynamics.base_dim, covariates)
    return GaussianGuide(model, encoder, latent=model.site)


def sequence_encoder(name: str, bricks: SequenceBricks, size: int, covariates: int = 0) -> nn.Module:
    """An encoder of all observed visits by name, on the features of the visit encoder."""
    features = bricks.encoder
    options: dict[str, Any] = {"covariates": covariates}
    if not hasattr(features, "num_features"):
        raise argument_error(
            "encoder",
            "an encoder with features and num_features, such as riemvae's, for an encoder of all visits",
            type(features).__name__,
            "build the guide yourself: GaussianGuide(model, sequence_encoder)",
        )
    if bricks.num_visits is None:
        options["time_features"] = TimeFeatures()
    if name == "experts":
        return ProductOfExperts(features, size, **options)
    if name == "set":
        return SetEncoder(features, size, **options)
    return RecurrentEncoder(features, size, cell="gru", num_layers=1, backward=True, **options)


def lay_sequences(
    shape: tuple[int, ...],
    latent_dim: int,
    num_visits: int | None,
    likelihood: str | Likelihood | None,
    architecture: str | None,
    hidden: Sequence[int] | None,
    encoder: nn.Module | None,
    decoder: nn.Module | None,
) -> SequenceBricks:
    """The networks and the likelihood of a recipe, by name or the user's own."""
    check_count("latent_dim", latent_dim)
    for size in shape:
        check_count("input_shape", size)
    if not shape:
        raise argument_error("input_shape", "the shape of one visit, such as (1, 28, 28)", shape)
    chosen = likelihood is not None
    if likelihood is None:
        likelihood = Gaussian()
    elif isinstance(likelihood, str):
        likelihood = likelihoods.by_name(likelihood)
    elif not isinstance(likelihood, Likelihood):
        raise argument_error("likelihood", "a name or a riemvae.likelihoods.Likelihood", likelihood)
    if hidden is not None and not isinstance(hidden, Sequence):
        raise argument_error("hidden", "widths of layers, such as (512, 128)", hidden)
    architecture = ("table_6_4" if len(shape) == 3 else "mlp") if architecture is None else architecture
    sizes = {} if hidden is None else {"hidden": tuple(hidden)}
    if encoder is None:
        encoder = networks.encoder(architecture, shape, latent_dim, **sizes)
    if decoder is None:
        mirrored: dict[str, Any] = {key: tuple(reversed(value)) for key, value in sizes.items()}
        if architecture == "table_6_4":  # a sigmoid of pixels' means; the other kinds take logits
            mirrored["output"] = "sigmoid" if isinstance(likelihood, Gaussian) else "linear"
        decoder = networks.decoder(architecture, latent_dim, shape, **mirrored)
    return SequenceBricks(encoder, decoder, likelihood, chosen, shape, num_visits, latent_dim)
