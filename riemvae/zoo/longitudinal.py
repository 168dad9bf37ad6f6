"""The recipes of the longitudinal models: chapter 6, in discrete and in continuous time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from riemvae._checks import argument_error, check_choice
from riemvae.longitudinal import FlowChain, LengthAveraged, LongitudinalVAE
from riemvae.longitudinal.ode import OdeFlow, VectorField
from riemvae.longitudinal.time_features import TimeFeatures
from riemvae.longitudinal.time_flow import time_flow
from riemvae.zoo.sequence_bricks import (
    AFFINE_FLOWS,
    ANCHORED,
    SequenceBricks,
    flow_by_name,
    sequence_guide,
    visit_prior,
)
from riemvae.zoo.sequences import SequenceAutoencoder

_WARMUP = 10  # epochs on single visits, of models with anchors: section 6.7.3


def lvae(
    bricks: SequenceBricks,
    *,
    prior: Any = "normal",
    posterior: str = "normal",
    transitions: Sequence[Any] | None = None,
    flow: str = "iaf",
    flow_transforms: int = 2,
    flow_hidden: Sequence[int] = (128, 128, 128),
    inference: str = "anchor",
    components: int = 500,
    length_averaged: bool = False,
    warmup: int | None = None,
    max_log_scale: float | None = None,
) -> SequenceAutoencoder:
    """The longitudinal VAE: numbered visits linked by normalizing flows.

    ``prior`` is ``"normal"``, ``"vamp"`` (with ``components`` pseudo-visits) or a brick; ``posterior``
    ``"normal"`` or ``"iaf"``, three inverse autoregressive transforms on the encoder's normal.
    ``transitions`` are ``T - 1`` transforms or flows of your own, each from one visit's latent to the next's;
    else each is a ``flow`` by name. ``inference`` is ``"anchor"``, algorithm 6 with an anchor a subject;
    ``"mixture"``, all observed visits as anchors at once, a tighter bound; or ``"experts"``, ``"set"`` or
    ``"recurrent"``, a posterior by a network of all observed visits. ``length_averaged`` divides the
    reconstruction by the number of visits as published: no bound, for comparison only. ``max_log_scale``
    bounds the log scales of affine flows; None is 1 for a posterior of all visits, which starts with running
    all flows on latents that nothing ties to the later visits, and zuko's own with anchors. ``warmup`` epochs
    train encoder and decoder on single visits first; None is 10 with anchors and 0 with networks of all
    visits.

    Source: Chadebec (thesis), chapter 6: algorithm 6, section 6.7.3.
    """
    affine = transitions is None and flow in AFFINE_FLOWS
    if max_log_scale is not None and not affine:
        raise argument_error(
            "max_log_scale",
            f"None with {'transitions= of your own' if transitions is not None else f'flow={flow!r}'}",
            max_log_scale,
            f"it bounds the log scales of the affine flows: {', '.join(AFFINE_FLOWS)}",
        )
    if transitions is None:
        options = {}
        if affine and (max_log_scale is not None or inference not in ANCHORED):
            options["max_log_scale"] = 1.0 if max_log_scale is None else max_log_scale
        transitions = [
            flow_by_name(flow, bricks.latent_dim, flow_transforms, flow_hidden, **options)
            for _ in range(bricks.visits - 1)
        ]
    elif not hasattr(transitions, "__len__"):
        raise argument_error("transitions", "a list of transforms or flows", transitions)
    elif len(transitions) != bricks.visits - 1:
        raise argument_error(
            "transitions",
            f"{bricks.visits - 1} of them, one from each of {bricks.visits} visits to the next",
            f"{len(transitions)}",
        )
    dynamics = FlowChain(transitions, bricks.latent_dim)
    model = LongitudinalVAE(
        bricks.decoder, dynamics, visit_prior(prior, bricks, components), bricks.likelihood
    )
    guide = sequence_guide(inference, model, bricks, posterior)
    return SequenceAutoencoder(
        model,
        guide,
        bricks.input_shape,
        LengthAveraged() if length_averaged else None,
        warmup=_warmup_epochs(warmup, inference),
    )


def _warmup_epochs(warmup: int | None, inference: str) -> int:
    if warmup is None:
        return _WARMUP if inference in ANCHORED else 0
    return warmup


def continuous_lvae(
    bricks: SequenceBricks,
    *,
    prior: Any = "normal",
    posterior: str = "normal",
    dynamics: str = "flow",
    flow: str = "coupling",
    flow_transforms: int = 4,
    flow_hidden: Sequence[int] = (128, 128),
    covariates: int = 0,
    reference_time: float | None = None,
    inference: str = "mixture",
    components: int = 500,
    warmup: int | None = None,
) -> SequenceAutoencoder:
    """The longitudinal VAE in continuous time: ``u ~ p(u)``, ``z_t = T(u; t, c)``, at any times.

    ``dynamics`` is ``"flow"``, a conditional flow whose maps from time to time form a group exactly, or
    ``"ode"``, a continuous normalizing flow. ``covariates`` is the number of a subject's covariates;
    ``reference_time`` the time at which ``u`` is the visit's latent itself (of an ``"ode"`` the earliest
    training time where it is None). ``inference`` is that of
    :func:`lvae`, with ``"mixture"`` as the default, as is ``warmup``.

    Source: the question that Chadebec (thesis), section 6.6 leaves open; Papamakarios et al. (2021) on
    conditional flows, Chen et al. (2018) on continuous ones.
    """
    check_choice("dynamics", dynamics, ["flow", "ode"])
    bricks.refuse_visits("continuous_lvae")
    if dynamics == "flow":
        change: Any = time_flow(
            bricks.latent_dim,
            flow,
            covariates=covariates,
            transforms=flow_transforms,
            hidden=tuple(flow_hidden),
            reference_time=reference_time,
        )
    else:
        field = VectorField(bricks.latent_dim, covariates, tuple(flow_hidden), time_features=TimeFeatures())
        change = OdeFlow(field, bricks.latent_dim, reference_time)
    model = LongitudinalVAE(bricks.decoder, change, visit_prior(prior, bricks, components), bricks.likelihood)
    guide = sequence_guide(inference, model, bricks, posterior, covariates)
    return SequenceAutoencoder(model, guide, bricks.input_shape, warmup=_warmup_epochs(warmup, inference))
