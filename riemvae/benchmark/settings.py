"""What the benchmark of likelihoods trains and measures, in a small and a full form."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from riemvae._checks import argument_error, check_choice

# As published in table 1.1 of Chadebec (2023): log p(x), bound, gap, each in nats.
PUBLISHED = {"vae": (-92.94, -100.06, 7.12), "hvae": (-85.33, -88.93, 3.61), "rhvae": (-82.64, -86.21, 3.57)}

TITLES = {
    "vae": "VAE",
    "hvae": "HVAE",
    "rhvae": "RHVAE",
    "vae_iaf": "VAE + IAF",
    "vae_vamp": "VAE + VampPrior",
    "rhvae_vamp": "RHVAE + VampPrior",
    "best": "best composition",
}


@dataclass(frozen=True)
class Settings:
    """All numbers of a run; what is published beside a result.

    Attributes:
        models: Names of models, keys of :data:`TITLES`.
        latent_dims: ``d`` of all but ``"best"``.
        seeds: Of weights, order, noise of training; one training each.
        num_train: Training images, the first of the file.
        num_test: Test images with ``num_samples`` samples each, the first of the file.
        num_samples: Importance samples.
        num_test_many: Test images with ``num_samples_many`` samples each.
        num_samples_many: The larger number of importance samples.
        binarization_seed: Of the one Bernoulli draw of the test images.
        epochs: Passes over the training images; the learning rate falls to zero over them as a cosine.
        batch_size: Images a step.
        learning_rate: Of Adam, at the start.
        gradient_clip: Largest norm of the gradient of the sum over a batch.
        hidden: Hidden layers of encoder (and, reversed, decoder) and of the metric network.
        num_steps: Leapfrog steps of the Hamiltonian guides.
        step_size: Their step size.
        tempering: ``√β_0``.
        temperature: Of the metric.
        regularization: Of the metric.
        num_centroids: Training images whose codes are the frozen metric's centroids.
        flow_transforms: Transforms of the inverse autoregressive flow.
        flow_hidden: Hidden layers of each.
        num_pseudo_inputs: Of the VampPrior.
        best_latent_dim: ``d`` of ``"best"``.
        best_hidden: Hidden layers of its encoder (and, reversed, decoder), which are gated.
        best_flow_hidden: Hidden layers of each transform of its prior, a masked autoregressive flow.
        best_epochs: Its own passes with the evidence lower bound, whose KL part is warmed up over a
            twentieth of them.
        best_last_epochs: Passes after these with the importance-weighted bound, from a fifth of the learning
            rate.
        best_last_samples: Draws a datum of that bound.
    """

    models: tuple[str, ...] = ("vae", "hvae", "rhvae", "vae_iaf", "vae_vamp", "rhvae_vamp")
    latent_dims: tuple[int, ...] = (10,)
    seeds: tuple[int, ...] = (0, 1, 2)
    num_train: int = 10_000
    num_test: int = 500
    num_samples: int = 100
    num_test_many: int = 50
    num_samples_many: int = 5_000
    binarization_seed: int = 0
    epochs: int = 15
    batch_size: int = 100
    learning_rate: float = 1.5e-3
    gradient_clip: float = 1e4
    hidden: tuple[int, ...] = (400,)
    num_steps: int = 3
    step_size: float = 1e-2
    tempering: float = 0.3
    temperature: float = 1.5
    regularization: float = 1e-3
    num_centroids: int = 500
    flow_transforms: int = 2
    flow_hidden: tuple[int, ...] = (128,)
    num_pseudo_inputs: int = 200
    best_latent_dim: int = 40
    best_hidden: tuple[int, ...] = (400, 400)
    best_flow_hidden: tuple[int, ...] = (200,)
    best_epochs: int = 15
    best_last_epochs: int = 0
    best_last_samples: int = 5

    def __post_init__(self) -> None:
        for name in self.models:
            check_choice("models", name, list(TITLES))
        for name in ("models", "latent_dims", "seeds"):
            if not getattr(self, name):
                raise argument_error(name, "at least one", "none")

    def with_changes(self, **changes: Any) -> Settings:
        """A copy with other numbers."""
        return replace(self, **changes)

    def describe(self) -> dict[str, Any]:
        """All numbers by name."""
        return asdict(self)

    def digest(self) -> str:
        """A fingerprint of the numbers that one model's result depends on."""
        skipped = ("models", "latent_dims", "seeds")
        kept = {k: v for k, v in self.describe().items() if k not in skipped}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


PRESETS = {
    # Seconds, to show the form and not the numbers.
    "quick": Settings(
        seeds=(0, 1),
        num_train=600,
        num_test=30,
        num_samples=20,
        num_test_many=10,
        num_samples_many=100,
        epochs=1,
        hidden=(64,),
        num_centroids=50,
        flow_hidden=(32,),
        num_pseudo_inputs=20,
        best_latent_dim=10,
        best_hidden=(64,),
        best_flow_hidden=(32,),
        best_epochs=1,
        best_last_epochs=1,
        best_last_samples=2,
    ),
    "small": Settings(),
    "full": Settings(
        models=tuple(TITLES),
        latent_dims=(10, 32),
        num_train=60_000,
        num_test=10_000,
        num_test_many=10_000,
        epochs=200,
        hidden=(400, 400),
        num_centroids=2_000,
        flow_hidden=(400,),
        num_pseudo_inputs=500,
        best_epochs=150,
        best_last_epochs=40,
    ),
}
