"""Models of sequences by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from riemvae._checks import argument_error, check_choice, check_count
from riemvae._seeding import forked
from riemvae.data import Preprocessing
from riemvae.likelihoods import Likelihood
from riemvae.zoo.longitudinal import continuous_lvae, lvae
from riemvae.zoo.sequence_baselines import bubble_vae, gp_vae, latent_ode, topographic_vae, visit_vae
from riemvae.zoo.sequence_bricks import lay_sequences
from riemvae.zoo.sequences import SequenceAutoencoder
from riemvae.zoo.trajectories import linear_trajectory

RECIPES: dict[str, Callable[..., SequenceAutoencoder]] = {
    "lvae": lvae,
    "continuous_lvae": continuous_lvae,
    "visit_vae": visit_vae,
    "gp_vae": gp_vae,
    "topographic_vae": topographic_vae,
    "bubble_vae": bubble_vae,
    "latent_ode": latent_ode,
    "linear_trajectory": linear_trajectory,
}


def build_sequences(
    name: str,
    input_shape: int | Sequence[int],
    latent_dim: int,
    num_visits: int | None = None,
    *,
    likelihood: str | Likelihood | None = None,
    architecture: str | None = None,
    hidden: Sequence[int] | None = None,
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    objective: Any = None,
    preprocessing: Preprocessing | None = None,
    seed: int | None = None,
    **options: Any,
) -> SequenceAutoencoder:
    """A model of sequences by name; :func:`riemvae.zoo.build` calls it. See there for the arguments."""
    recipe = RECIPES[check_choice("name", name, list(RECIPES))]
    known = list(inspect.signature(recipe).parameters)[1:]
    for option in options:
        if option not in known:
            raise argument_error(
                option, f"an option of {name!r}: num_visits, {', '.join(known)}", options[option]
            )
    shape = (input_shape,) if isinstance(input_shape, int) else tuple(input_shape)
    if num_visits is not None:
        check_count("num_visits", num_visits)
    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        raise argument_error(
            "preprocessing",
            "None or a riemvae.data.Preprocessing, such as a fitted Standardize",
            preprocessing,
        )
    if recipe is linear_trajectory and len(shape) == 1:
        for part, given in (("encoder", encoder), ("decoder", decoder)):
            if given is not None:
                raise argument_error(
                    part, "None for scores, whose lines are their own features", given, "see mapping_hidden="
                )
    with forked(seed):
        bricks = lay_sequences(
            shape, latent_dim, num_visits, likelihood, architecture, hidden, encoder, decoder
        )
        built = recipe(bricks, **options)
    if objective is not None:
        built.objective = objective
    built.preprocessing = preprocessing
    return built
