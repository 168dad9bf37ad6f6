"""The models of the benchmark of sequences: recipes of the zoo with the options in which they differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from riemvae import zoo
from riemvae._seeding import forked
from riemvae.benchmark.longitudinal.bins import NearestBins
from riemvae.guides import GaussianGuide
from riemvae.inference import ELBO, Linear
from riemvae.likelihoods import Gaussian
from riemvae.longitudinal import AnchoredGuide, LongitudinalVAE
from riemvae.longitudinal.linear_trajectory import LinearTrajectory, TrajectoryEncoder, trajectory_prior
from riemvae.zoo.sequences import SequenceAutoencoder

if TYPE_CHECKING:
    from riemvae.benchmark.longitudinal.settings import Experiment


class Model(NamedTuple):
    """A model of the benchmark.

    Attributes:
        title: In tables.
        recipe: Of the zoo.
        options: Of the recipe; ``annealing`` is start, end and epochs of the weight of the Kullback-Leibler
            divergence, whose start is that of the warm-up too.
        timed: Whether it is a function of time rather than of numbered visits.
        scale: Of the likelihood, in place of the experiment's.
        kind: ``""``, ``"bins"`` (numbered visits at the nearest of even times) or ``"line"`` (chapter 5).
        cost: Seconds an epoch beside those of a VAE of single visits, to run long trainings first.
    """

    title: str
    recipe: str
    options: Mapping[str, Any]
    timed: bool = False
    scale: float | str | None = None
    kind: str = ""
    cost: float = 1.0


_MIXTURE = {"inference": "mixture", "flow": "coupling", "flow_transforms": 4, "flow_hidden": (128, 128)}
_SET = {**_MIXTURE, "inference": "set"}
# The recipe's default, said so that results of before it have another fingerprint.
_BOUND = {"max_scale": 3.0}

MODELS: dict[str, Model] = {
    "lvae": Model("LVAE, published form", "lvae", {}, cost=2.0),
    "lvae_averaged": Model("LVAE, loss averaged over visits", "lvae", {"length_averaged": True}, cost=2.0),
    "lvae_vamp": Model("LVAE + VampPrior", "lvae", {"prior": "vamp"}, cost=2.3),
    "lvae_iaf": Model("LVAE + IAF posterior", "lvae", {"posterior": "iaf"}, cost=2.1),
    "lvae_mixture": Model("LVAE, all anchors, couplings", "lvae", _MIXTURE, cost=1.8),
    "lvae_mixture_iaf": Model(
        "LVAE, all anchors, couplings + IAF posterior", "lvae", {**_MIXTURE, "posterior": "iaf"}, cost=4.5
    ),
    "lvae_mixture_vamp": Model(
        "LVAE, all anchors, couplings + VampPrior", "lvae", {**_MIXTURE, "prior": "vamp"}, cost=2.4
    ),
    "lvae_mixture_scale": Model(
        "LVAE, all anchors, couplings, learned scale", "lvae", _MIXTURE, scale="learned", cost=1.8
    ),
    "lvae_set": Model("LVAE, set encoder, couplings", "lvae", _SET, cost=1.6),
    "lvae_bins": Model("LVAE on nearest bins", "lvae", _MIXTURE, timed=True, kind="bins", cost=4.0),
    "continuous_lvae": Model("LVAE in continuous time, flow", "continuous_lvae", {}, timed=True, cost=1.3),
    "continuous_ode": Model(
        "LVAE in continuous time, ODE", "continuous_lvae", {"dynamics": "ode"}, timed=True, cost=8.0
    ),
    "continuous_set": Model(
        "LVAE in continuous time, flow, set encoder",
        "continuous_lvae",
        {"inference": "set"},
        timed=True,
        cost=1.3,
    ),
    "continuous_annealed": Model(
        "LVAE in continuous time, set encoder, annealed",
        "continuous_lvae",
        {
            "inference": "set",
            "flow_transforms": 6,
            "flow_hidden": (256, 256),
            "warmup": 2,
            "annealing": (0.1, 1.0, 4),
        },
        timed=True,
        cost=1.5,
    ),
    "visit_vae": Model("VAE of visits", "visit_vae", {}),
    "visit_vae_annealed": Model("VAE of visits, annealed", "visit_vae", {"annealing": (0.1, 1.0, 4)}),
    "visit_vamp": Model("VAE of visits + VampPrior", "visit_vae", {"prior": "vamp"}, cost=1.3),
    "gp_vae_rbf": Model("GP-VAE, RBF", "gp_vae", {"kernel": "rbf", **_BOUND}, cost=1.1),
    "gp_vae_cauchy": Model("GP-VAE, Cauchy", "gp_vae", {"kernel": "cauchy", **_BOUND}, cost=1.1),
    "gp_vae_diffusion": Model("GP-VAE, diffusion", "gp_vae", {"kernel": "diffusion", **_BOUND}, cost=1.1),
    "gp_vae_matern": Model("GP-VAE, Matérn", "gp_vae", {"kernel": "matern", **_BOUND}, cost=1.1),
    "gp_vae_learned": Model(
        "GP-VAE, Cauchy, learned lengths",
        "gp_vae",
        {"kernel": "cauchy", "learn_lengthscale": True, **_BOUND},
        cost=1.2,
    ),
    "topographic_none": Model("topographic VAE, none", "topographic_vae", {"coherence": "none"}, cost=1.4),
    "topographic_short": Model("topographic VAE, short", "topographic_vae", {"coherence": "short"}, cost=1.4),
    "topographic_part": Model("topographic VAE, part", "topographic_vae", {"coherence": "part"}, cost=1.4),
    "topographic_half": Model("topographic VAE, half", "topographic_vae", {"coherence": "half"}, cost=1.4),
    "bubble_vae": Model("BubbleVAE", "bubble_vae", {}, cost=1.3),
    "latent_ode": Model("latent ODE", "latent_ode", {}, timed=True, cost=1.4),
    "line": Model("linear trajectories", "lvae", {}, timed=True, kind="line", cost=2.0),
}


def build(
    name: str, experiment: Experiment, shape: tuple[int, ...], num_visits: int, times: Tensor, seed: int
) -> SequenceAutoencoder:
    """A model with fresh weights.

    Args:
        name: A key of :data:`MODELS`.
        experiment: All numbers.
        shape: Of one visit.
        num_visits: ``T``.
        times: Of the seen training visits, for bins.
        seed: Of the weights.
    """
    model = MODELS[name]
    options = dict(model.options)
    if options.get("prior") == "vamp":
        options["components"] = experiment.components
    if "annealing" in options:
        options["objective"] = ELBO(beta=Linear(*options.pop("annealing")))
    if model.recipe in ("topographic_vae", "bubble_vae"):
        options["cyclic"] = experiment.data.cyclic
    visits = None if model.timed else num_visits
    if model.kind == "bins":
        visits = experiment.num_bins
    elif model.kind == "line":
        visits = 1
    made: SequenceAutoencoder = zoo.build(
        model.recipe,
        shape,
        experiment.latent_dim,
        num_visits=visits,
        likelihood=gaussian(experiment.scale if model.scale is None else model.scale, shape),
        architecture=experiment.architecture,
        hidden=experiment.hidden,
        seed=seed,
        **options,
    )
    if model.kind == "bins":
        return _on_bins(made, times)
    if model.kind == "line":
        return _on_lines(made, experiment, seed)
    return made


def gaussian(scale: float | str, shape: tuple[int, ...]) -> Gaussian:
    """A Gaussian likelihood of a number, of one learned scale or of one learned a pixel."""
    if scale == "pixel":
        return Gaussian("learned", scale_shape=shape, floor=0.01)
    return Gaussian(scale)


def _on_bins(made: SequenceAutoencoder, times: Tensor) -> SequenceAutoencoder:
    """A model of numbered visits as one of times: each visit at the nearest of as many even times."""
    model, guide = made.model, made.guide
    count = model.dynamics.num_visits
    ends = [float(times.min()), float(times.max())]
    bins = tuple(ends[0] + (ends[1] - ends[0]) * (k + 0.5) / count for k in range(count))
    binned = LongitudinalVAE(model.decoder, NearestBins(model.dynamics, bins), model.prior, model.likelihood)
    anchored = AnchoredGuide(binned, guide.encoder, guide.flow, context=guide.context, anchors=guide.anchors)
    return SequenceAutoencoder(binned, anchored, made.input_shape, warmup=made.warmup)


def _on_lines(made: SequenceAutoencoder, experiment: Experiment, seed: int) -> SequenceAutoencoder:
    """Chapter 5's model of trajectories, trained with encoder and decoder from the start."""
    size = experiment.latent_dim
    model = LongitudinalVAE(
        made.model.decoder, LinearTrajectory(size), trajectory_prior(size), made.model.likelihood
    )
    with forked(seed):
        encoder = TrajectoryEncoder(
            made.guide.encoder,
            size,
            spatial="all",
            spatial_hidden=(128,),
            hidden_size=128,
            num_layers=1,
            cell="gru",
        )
    guide = GaussianGuide(model, encoder, latent=model.site)
    return SequenceAutoencoder(model, guide, made.input_shape)
