"""What the benchmark of sequences trains and measures, in forms from seconds to a GPU's day."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from riemvae._checks import argument_error, check_choice, check_count
from riemvae.benchmark.longitudinal.models import MODELS

MEASURES = ("likelihood", "imputation", "held_out", "progression", "clusters")
# Measures whose definition has changed since there are results: an older result of theirs is refused.
REVISIONS = {"clusters": 2}
DATA = ("rotmnist", "colormnist", "starmen", "sprites", "irregular", "arms", "turns")

# Chadebec (thesis), table 6.1: negative log joint likelihood divided by the number of visits.
PUBLISHED: dict[str, dict[str, float]] = {
    "rotmnist": {
        "visit_vae": 741.03,
        "visit_vamp": 740.82,
        "topographic_none": 748.18,
        "topographic_short": 744.07,
        "topographic_part": 739.53,
        "topographic_half": 745.55,
        "bubble_vae": 742.66,
        "gp_vae_cauchy": 740.05,
        "gp_vae_rbf": 745.58,
        "gp_vae_diffusion": 740.26,
        "gp_vae_matern": 739.68,
        "lvae": 735.71,
        "lvae_vamp": 736.15,
        "lvae_iaf": 735.27,
    },
    "colormnist": {
        "visit_vae": 2179.88,
        "visit_vamp": 2179.60,
        "topographic_none": 2185.40,
        "topographic_short": 2175.54,
        "topographic_part": 2174.19,
        "topographic_half": 2173.58,
        "bubble_vae": 2174.74,
        "gp_vae_cauchy": 2177.21,
        "gp_vae_rbf": 2187.15,
        "gp_vae_diffusion": 2178.63,
        "gp_vae_matern": 2176.63,
        "lvae": 2173.16,
        "lvae_vamp": 2173.00,
        "lvae_iaf": 2172.85,
    },
}

# Measured with the code that was published with the model, on the small rotMNIST.
REFERENCES: dict[str, dict[str, dict[str, float]]] = {
    "rotmnist_small": {
        "peer's code, true bound": {
            "nll": 738.91,
            "nll_tight": 738.28,
            "mse_naive": 0.0465,
            "mse_best": 0.0448,
        },
        "peer's code, as shipped": {"nll": 743.05, "mse_best": 0.0581},
    }
}


@dataclass(frozen=True)
class Data:
    """A data set, and what of it is missing.

    Attributes:
        name: One of :data:`DATA`.
        sizes: Sequences to train on, to choose by and to judge by.
        size: Pixels a side of the figures that are drawn; digits have 28.
        num_visits: ``T``.
        missing_visits: The probability that a visit is missing, in all three parts.
        missing_pixels: The probability that a pixel of a seen visit is missing, likewise.
        seen_visits: Least and most seen visits of a subject with irregular times.
    """

    name: str
    sizes: tuple[int, int, int]
    size: int = 64
    num_visits: int = 8
    missing_visits: float = 0.0
    missing_pixels: float = 0.0
    seen_visits: tuple[int, int] = (3, 8)

    def __post_init__(self) -> None:
        check_choice("data", self.name, list(DATA))

    @property
    def cyclic(self) -> bool:
        """Whether the last visit leads back to the first."""
        return self.name in ("rotmnist", "colormnist", "sprites")


@dataclass(frozen=True)
class Experiment:
    """Models trained and judged alike on one data set.

    Attributes:
        name: Of its files.
        title: Of its table.
        data: The data.
        models: Names, keys of :data:`~riemvae.benchmark.longitudinal.models.MODELS`.
        measures: Among :data:`MEASURES`.
        ours: The model that the others are compared with.
        methods: Imputers to measure; ``"naive"`` and ``"best"`` are of models with anchors, ``"guide"`` of
            those without.
        group: Experiments of one group share a figure, over ``share``.
        share: What is missing, the abscissa in that figure.
        latent_dim: ``d``.
        architecture: Of encoder and decoder. ``"table_6_4"`` is fully connected below 64 pixels a side, with
            a sigmoid at its end.
        hidden: Hidden layers of a fully connected encoder (reversed, of its decoder); None is the usual.
        scale: Of the Gaussian likelihood: a number, ``"learned"``, or ``"pixel"``, one learned a pixel.
        epochs: At most; the weights are those of the best validation loss.
        batch_size: Sequences a step.
        learning_rate: Of Adam.
        milestones: Epochs after which the learning rate is multiplied by ``decay``.
        decay: See there.
        components: Pseudo-inputs of VampPriors.
        num_bins: Of models of numbered visits on irregular times.
        num_clusters: Components of the mixture for clusters.
        cluster_epochs: Epochs of training with it.
    """

    name: str
    title: str
    data: Data
    models: tuple[str, ...]
    measures: tuple[str, ...]
    ours: str = "lvae_mixture"
    methods: tuple[str, ...] = ("naive", "best", "guide", "importance", "map", "hmc")
    group: str = ""
    share: float = 0.0
    latent_dim: int = 16
    architecture: str = "table_6_4"
    hidden: tuple[int, ...] | None = None
    scale: float | str = 1.0
    epochs: int = 200
    batch_size: int = 128
    learning_rate: float = 1e-3
    milestones: tuple[int, ...] = ()
    decay: float = 0.5
    components: int = 500
    num_bins: int = 20
    num_clusters: int = 2
    cluster_epochs: int = 0

    def __post_init__(self) -> None:
        for name in self.models:
            check_choice("models", name, list(MODELS))
        for name in self.measures:
            check_choice("measures", name, list(MEASURES))
        if not self.models or not self.measures:
            raise argument_error("models", "at least one, and one measure", "none")
        check_count("epochs", self.epochs)


@dataclass(frozen=True)
class Settings:
    """All numbers of a run.

    Attributes:
        experiments: What is trained and measured.
        seeds: Of weights and training; the data and their masks are the same for all.
        num_samples: Importance samples a sequence, from one random anchor where a model has anchors.
        num_mixture: Importance samples a sequence over all anchors.
        num_draws: Draws a subject of the imputers ``naive`` and ``best``.
        num_importance: Those of the imputers ``importance`` and ``guide``.
        num_starts: Starts of the imputer ``map``.
        max_steps: Its steps at most.
        num_chains: Hamiltonian chains a subject.
        num_hmc: Draws a subject from them.
        hmc_warmup: Transitions of each chain before them.
        num_leapfrog: Leapfrog steps of a transition.
        level: Of intervals.
        keep_models: Whether trained models stay in the folder.
    """

    experiments: tuple[Experiment, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    num_samples: int = 100
    num_mixture: int = 96
    num_draws: int = 5
    num_importance: int = 200
    num_starts: int = 2
    max_steps: int = 100
    num_chains: int = 2
    num_hmc: int = 10
    hmc_warmup: int = 20
    num_leapfrog: int = 5
    level: float = 0.9
    keep_models: bool = True

    def __post_init__(self) -> None:
        for name in ("experiments", "seeds"):
            if not getattr(self, name):
                raise argument_error(name, "at least one", "none")
        for seed in self.seeds:
            check_count("seeds", seed, 0)

    def with_changes(
        self,
        models: tuple[str, ...] | None = None,
        seeds: tuple[int, ...] | None = None,
        experiments: tuple[str, ...] | None = None,
        **numbers: Any,
    ) -> Settings:
        """A copy with fewer models or experiments, other seeds or other numbers.

        Args:
            models: Those to train, in each experiment that has them.
            seeds: In place of the preset's.
            experiments: Names of those to keep.
            numbers: Attributes of the settings, or of all experiments (``epochs``, ``batch_size``...).

        Raises:
            ValueError: A model or experiment that there is not, a number of another name.
        """
        kept = list(self.experiments)
        if experiments is not None:
            for name in experiments:
                check_choice("experiments", name, [e.name for e in kept])
            kept = [e for e in kept if e.name in experiments]
        if models is not None:
            there = list(dict.fromkeys(name for e in kept for name in e.models))
            for name in models:
                check_choice("models", name, there)
            chosen = [
                replace(e, models=tuple(m for m in e.models if m in models)) for e in kept if _any(e, models)
            ]
            kept = chosen
        shared = {key: value for key, value in numbers.items() if key in _NUMBERS}
        each = {key: value for key, value in numbers.items() if key not in _NUMBERS}
        for key in each:
            check_choice("numbers", key, [f.name for f in fields(Experiment)])
        kept = [replace(e, **each) for e in kept]
        return replace(self, experiments=tuple(kept), seeds=self.seeds if seeds is None else seeds, **shared)

    def describe(self) -> dict[str, Any]:
        """All numbers by name."""
        return asdict(self)

    def numbers(self) -> dict[str, Any]:
        """Those that are the same for all experiments and that results depend on."""
        return {key: getattr(self, key) for key in _NUMBERS if key != "keep_models"}

    def digest(self, experiment: Experiment, model: str) -> str:
        """A fingerprint of all that one model's result depends on, but its seed."""
        about = asdict(experiment)
        for key in ("models", "title", "ours", "group", "share"):
            del about[key]
        content: list[Any] = [about, MODELS[model]._asdict(), self.numbers()]
        revised = {name: REVISIONS[name] for name in experiment.measures if name in REVISIONS}
        if revised:
            content.append(revised)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _any(experiment: Experiment, models: tuple[str, ...]) -> bool:
    return any(name in models for name in experiment.models)


_NUMBERS = [f.name for f in fields(Settings) if f.name not in ("experiments", "seeds")]

# -- presets -------------------------------------------------------------------------------------------------

OURS = ("lvae", "lvae_mixture", "lvae_vamp", "lvae_iaf", "continuous_lvae")
BASELINES = (
    "visit_vae",
    "visit_vamp",
    "gp_vae_rbf",
    "gp_vae_cauchy",
    "gp_vae_diffusion",
    "gp_vae_matern",
    "topographic_none",
    "topographic_short",
    "topographic_part",
    "topographic_half",
    "bubble_vae",
)
IRREGULAR = ("continuous_lvae", "continuous_ode", "lvae_bins", "latent_ode", "line")
UNANCHORED = ("lvae_set", "continuous_set", "latent_ode")
CLUSTERED = ("lvae_mixture", *UNANCHORED)

_ANNEALED = ("continuous_annealed", "visit_vae_annealed")
_FULL = (*OURS, "lvae_mixture_iaf", "lvae_mixture_vamp", *BASELINES)

# Section 6.7.3: the learning rate all but ends there ("by a factor 1e-4"); halving it is what is meant here.
_ROT_MILESTONES, _COLOR_MILESTONES = (50, 75, 100, 125, 150), (50, 100, 150, 200)

# The shares of figure 6.3: of missing visits with all pixels, of missing pixels with half of the visits.
_MISSING = ((0.2, 0.0), (0.4, 0.0), (0.6, 0.0), (0.7, 0.0), (0.5, 0.2), (0.5, 0.4), (0.5, 0.6))


def _missing(
    sizes: dict[str, tuple[int, int, int]],
    size: int,
    shares: tuple[tuple[float, float], ...] = _MISSING,
    **options: Any,
) -> tuple[Experiment, ...]:
    """Figure 6.3's protocol."""
    made = []
    for figure, counts in sizes.items():
        visits = 10 if figure == "starmen" else 8
        for share, pixels in shares:
            what = f"visits {share:g}" + (f", pixels {pixels:g}" if pixels else "")
            made.append(
                Experiment(
                    name=f"{figure}_visits{round(100 * share)}_pixels{round(100 * pixels)}",
                    title=f"{figure}, missing: {what}",
                    data=Data(figure, counts, size, visits, share, pixels),
                    measures=("imputation",),
                    group=f"{figure}, "
                    + ("pixels missing, half of the visits too" if pixels else "visits missing"),
                    share=pixels or share,
                    **{"models": (*OURS, *BASELINES), **options},
                )
            )
    return tuple(made)


def _clusters(
    sizes: tuple[int, int, int], size: int, turns: tuple[int, int, int], **options: Any
) -> tuple[Experiment, ...]:
    common = {"models": CLUSTERED, "measures": ("clusters",), **options}
    # Of vectors, each epoch a third of the time; what no visit shows, no anchor can tell.
    points = {"latent_dim": 4, "architecture": "mlp", "hidden": (64, 64), "scale": "learned"}
    points |= {
        "epochs": 3 * options["epochs"],
        "models": tuple(m for m in common["models"] if m in UNANCHORED),
    }
    return (
        Experiment(
            name="arms",
            title="two dynamics: starmen that raise one arm or lower the other",
            data=Data("arms", sizes, size, 10, 0.3),
            **common,
        ),
        Experiment(
            name="turns",
            title="two dynamics: points that turn one way or the other, no visit of which tells them apart",
            data=Data("turns", turns, 12, 8, 0.3),
            **{**common, **points, "ours": "lvae_set"},
        ),
    )


_QUICK: dict[str, Any] = {
    "latent_dim": 4,
    "hidden": (32,),
    "epochs": 2,
    "batch_size": 16,
    "components": 10,
}
_TINY = (24, 8, 12)

PRESETS: dict[str, Settings] = {
    # Seconds, to show the form and not the numbers.
    "quick": Settings(
        experiments=(
            Experiment(
                name="rotmnist_quick",
                title="rotated digits",
                data=Data("rotmnist", _TINY),
                models=("lvae", "lvae_mixture", "lvae_mixture_scale", "visit_vae", "gp_vae_cauchy"),
                measures=("likelihood", "imputation"),
                **_QUICK,
            ),
            *_missing(
                {"starmen": _TINY},
                16,
                ((0.4, 0.0), (0.5, 0.4)),
                models=("lvae_mixture", "topographic_part"),
                methods=("best", "guide", "importance"),
                **_QUICK,
            ),
            Experiment(
                name="irregular_quick",
                title="starmen at irregular times",
                data=Data("irregular", _TINY, 16, 10),
                models=("continuous_lvae", "lvae_bins", "line"),
                measures=("held_out", "progression"),
                ours="continuous_lvae",
                scale="learned",
                num_bins=6,
                **_QUICK,
            ),
            *_clusters(_TINY, 16, (40, 8, 20), cluster_epochs=1, **{**_QUICK, "models": ("lvae_set",)})[1:],
        ),
        seeds=(0, 1),
        num_samples=10,
        num_mixture=8,
        num_draws=2,
        num_importance=10,
        num_starts=1,
        max_steps=3,
        num_chains=1,
        num_hmc=2,
        hmc_warmup=4,
        num_leapfrog=2,
    ),
    "small": Settings(
        experiments=(
            Experiment(
                name="rotmnist_small",
                title="small rotMNIST: 1,000 training sequences of 8 rotations",
                data=Data("rotmnist", (1_000, 200, 500)),
                models=("lvae_averaged", *OURS, "lvae_mixture_scale", *BASELINES, "gp_vae_learned"),
                measures=("likelihood", "imputation"),
            ),
        )
    ),
    "full": Settings(
        experiments=(
            Experiment(
                name="rotmnist_full",
                title="rotMNIST of table 6.3",
                data=Data("rotmnist", (9_000, 1_000, 10_000)),
                models=_FULL,
                measures=("likelihood", "imputation"),
                methods=("naive", "best", "guide", "importance"),
                milestones=_ROT_MILESTONES,
            ),
        )
    ),
    # All data; of the table's epochs a third.
    "full_cpu": Settings(
        experiments=(
            Experiment(
                name="rotmnist_full_cpu",
                title="rotMNIST of table 6.3, 60 epochs",
                data=Data("rotmnist", (9_000, 1_000, 10_000)),
                models=("lvae", "lvae_mixture", "lvae_iaf", "visit_vae"),
                measures=("likelihood",),
                epochs=60,
                milestones=(30, 40, 50),
            ),
        ),
        seeds=(0,),
    ),
    "colormnist": Settings(
        experiments=(
            Experiment(
                name="colormnist",
                title="colorMNIST of table 6.3",
                data=Data("colormnist", (48_000, 12_000, 10_000), 28, 12),
                models=(*_FULL, *_ANNEALED),
                measures=("likelihood",),
                epochs=250,
                milestones=_COLOR_MILESTONES,
            ),
        )
    ),
    "colormnist_cpu": Settings(
        experiments=(
            Experiment(
                name="colormnist_cpu",
                title="colorMNIST, 24,000 sequences, 16 epochs",
                data=Data("colormnist", (24_000, 1_000, 1_000), 28, 12),
                models=("lvae", "lvae_mixture", "visit_vae", *_ANNEALED),
                ours="continuous_annealed",
                measures=("likelihood",),
                epochs=16,
                batch_size=16,
                milestones=(9, 12, 14),
            ),
        ),
        seeds=(0,),
    ),
    # Pictures of a quarter of the pixels, each of which counts fourfold: as unit variance of the large ones.
    "missing": Settings(
        experiments=_missing(
            {"starmen": (300, 100, 100), "sprites": (300, 100, 100)},
            32,
            models=("lvae", "lvae_mixture", *BASELINES),
            methods=("naive", "best", "guide", "importance", "map"),
            hidden=(512, 128),
            scale=0.5,
            epochs=60,
            batch_size=64,
        ),
        seeds=(0, 1),
        keep_models=False,
    ),
    "missing_full": Settings(
        experiments=_missing(
            {"starmen": (700, 200, 100), "sprites": (8_000, 1_000, 2_664)},
            64,
            methods=("naive", "best", "guide", "importance", "map"),
            epochs=200,
            batch_size=64,
            milestones=(50, 100, 125, 150),
        ),
        keep_models=False,
    ),
    "irregular": Settings(
        experiments=(
            Experiment(
                name="irregular",
                title="starmen at irregular times, 3 to 8 seen visits of 10",
                data=Data("irregular", (600, 100, 200), 32, 10),
                models=IRREGULAR,
                measures=("held_out", "progression"),
                ours="continuous_lvae",
                hidden=(512, 128),
                scale="learned",
                epochs=150,
                batch_size=64,
            ),
        )
    ),
    "clusters": Settings(
        experiments=_clusters(
            (600, 100, 200),
            32,
            (600, 100, 200),
            hidden=(512, 128),
            scale="learned",
            epochs=100,
            cluster_epochs=20,
            batch_size=64,
        )
    ),
}
