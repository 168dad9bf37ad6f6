"""The published models as recipes: what each lays on the shared bricks is its guide."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from riemvae import networks
from riemvae._checks import argument_error, check_choice
from riemvae._seeding import forked
from riemvae.autoencoder import Prior
from riemvae.data import Preprocessing
from riemvae.geometry import Metric
from riemvae.guides import AmortizedGuide, GaussianGuide, HamiltonianGuide, RiemannianHamiltonianGuide
from riemvae.likelihoods import Likelihood
from riemvae.zoo.autoencoder import Autoencoder
from riemvae.zoo.bricks import Bricks, lay
from riemvae.zoo.sequence_build import RECIPES, build_sequences


def vae(bricks: Bricks) -> AmortizedGuide:
    """The variational autoencoder: a Gaussian guide.

    Source: Kingma and Welling (2014).
    """
    return GaussianGuide(bricks.model, bricks.encoder)


def hvae(
    bricks: Bricks,
    *,
    num_steps: int = 3,
    step_size: float | Tensor = 1e-2,
    tempering: float = 0.3,
    learn_step_size: bool = False,
    learn_tempering: bool = False,
) -> AmortizedGuide:
    """The Hamiltonian VAE: leapfrog steps under a flat metric after the encoder's draw.

    Source: Caterini, Doucet and Sejdinovic (2018); numbers of the thesis, table 1.11.
    """
    return HamiltonianGuide(
        bricks.model,
        bricks.encoder,
        num_steps=num_steps,
        step_size=step_size,
        tempering=tempering,
        learn_step_size=learn_step_size,
        learn_tempering=learn_tempering,
    )


def rhvae(
    bricks: Bricks,
    *,
    metric: nn.Module | Metric | str | None = None,
    num_steps: int = 3,
    step_size: float | Tensor = 1e-2,
    tempering: float = 0.3,
    fixed_point_steps: int = 3,
    temperature: float | None = None,
    regularization: float = 1e-3,
    learn_step_size: bool = False,
    learn_tempering: bool = False,
) -> AmortizedGuide:
    """The Riemannian Hamiltonian VAE: a learned metric of the latent space, and generation along it.

    ``metric`` may be a network ``x -> L(x)`` for eq. 1.7, a fixed :class:`~riemvae.geometry.Metric`, or
    ``"posterior"``: the encoder's own covariances ``A_i = Σ_i``, a metric without parameters. The
    temperature is 0.8 up to two latent dimensions and 1.5 above, as in the thesis.

    Source: Chadebec, Thibeau-Sutre, Burgos and Allassonnière (2022); thesis, section 1.3.2, tables 1.11,
        1.15.
    """
    if not isinstance(metric, Metric):
        latent_dim = bricks.model.latent_dim
        if temperature is None:
            temperature = 0.8 if latent_dim <= 2 else 1.5
        if isinstance(metric, str):
            check_choice("metric", metric, ["posterior"])
            metric = networks.PosteriorCentroidNetwork(temperature, regularization)
        else:
            network = metric or networks.metric(
                bricks.architecture, bricks.input_shape, latent_dim, **bricks.network_options
            )
            metric = networks.CentroidMetricNetwork(network, temperature, regularization)
    return RiemannianHamiltonianGuide(
        bricks.model,
        bricks.encoder,
        metric,
        num_steps=num_steps,
        step_size=step_size,
        tempering=tempering,
        fixed_point_steps=fixed_point_steps,
        learn_step_size=learn_step_size,
        learn_tempering=learn_tempering,
    )


GUIDES: dict[str, Callable[..., AmortizedGuide]] = {"vae": vae, "hvae": hvae, "rhvae": rhvae}


def build(
    name: str,
    input_shape: int | Sequence[int],
    latent_dim: int | None = None,
    *,
    likelihood: str | Likelihood | None = None,
    prior: Prior | str = None,
    architecture: str | None = None,
    hidden: Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    objective: Any = None,
    preprocessing: Preprocessing | None = None,
    seed: int | None = None,
    **options: Any,
) -> Any:
    """A published model by name, ready to fit.

    Args:
        name: ``"vae"``, ``"hvae"`` or ``"rhvae"``; of sequences, those of :data:`riemvae.zoo.RECIPES`.
        input_shape: The shape of one datum, such as ``(1, 28, 28)``; of one visit for models of sequences.
        latent_dim: ``d``; 16 for models of sequences unless told.
        likelihood: A brick or its name. None: chosen from the data by the first ``fit``; for models of
            sequences the published Gaussian of scale 1. (``Gaussian(scale="learned")`` imputes better.)
        prior: A distribution, or a callable or module that returns one; None is the standard normal.
        architecture: ``"mlp"``, ``"conv"``, ``"table_1_10"``, ``"table_1_13"`` or ``"table_6_4"``, for all
            networks. None is ``"mlp"``; for sequences of images ``"table_6_4"``.
        hidden: Hidden layers of the MLP encoder; the decoder has them the other way round.
        channels: Channels of the convolutional encoder, likewise.
        encoder: A module of your own, ``x -> (loc, scale)``.
        decoder: A module of your own, ``z ->`` the likelihood's parameters.
        objective: What ``fit`` maximises; None is the evidence lower bound.
        preprocessing: None: found at the first ``fit``.
        seed: Of the initial weights; the caller's generator is then left as it was.
        options: Those of the recipe. Of sequences: ``num_visits`` and the keywords of the recipe of that name
            in :data:`riemvae.zoo.RECIPES`. ``"hvae"`` and ``"rhvae"``: ``num_steps``, ``step_size``,
            ``tempering``, ``learn_step_size``, ``learn_tempering``; ``"rhvae"`` also ``metric`` (a network, a
            fixed metric, or ``"posterior"``), ``temperature``, ``regularization``, ``fixed_point_steps``.

    Raises:
        ValueError: An unknown name, an option that the recipe does not have, or a bad value.

    Example:
        >>> ae = build("rhvae", input_shape=(1, 28, 28), latent_dim=10)
        >>> ae.latent_dim, ae.default_sampler
        (10, 'manifold')
    """
    check_choice("name", name, [*GUIDES, *RECIPES])
    if name in RECIPES:
        if prior is not None:
            options["prior"] = prior
        if channels is not None:
            options["channels"] = channels
        return build_sequences(
            name,
            input_shape,
            16 if latent_dim is None else latent_dim,
            likelihood=likelihood,
            architecture=architecture,
            hidden=hidden,
            encoder=encoder,
            decoder=decoder,
            objective=objective,
            preprocessing=preprocessing,
            seed=seed,
            **options,
        )
    if latent_dim is None:
        raise argument_error("latent_dim", "the dimension of the latent space", None)
    guide_of = GUIDES[name]
    known = list(inspect.signature(guide_of).parameters)[1:]
    for option in options:
        if option not in known:
            raise argument_error(
                option, f"an option of {name!r}: {', '.join(known) or 'it has none'}", options[option]
            )
    with forked(seed):
        network_options = {
            k: tuple(v) for k, v in (("hidden", hidden), ("channels", channels)) if v is not None
        }
        if isinstance(prior, str):
            raise argument_error(
                "prior", "a distribution, or a callable or module that returns one", prior, "or leave it out"
            )
        bricks = lay(
            input_shape,
            latent_dim,
            likelihood,
            prior,
            architecture or "mlp",
            encoder,
            decoder,
            network_options,
        )
        guide = guide_of(bricks, **options)
    return Autoencoder(
        bricks.model,
        guide,
        bricks.input_shape,
        objective,
        preprocessing,
        infer_likelihood=likelihood is None,
        default_sampler="manifold" if isinstance(guide, RiemannianHamiltonianGuide) else "prior",
    )
