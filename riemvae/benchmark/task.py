"""One training and its likelihoods."""

from __future__ import annotations

import math
import os
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from riemvae import persistence
from riemvae._seeding import forked
from riemvae._tasks import Tell
from riemvae.benchmark.models import SHAPE, Pair, build
from riemvae.benchmark.settings import TITLES, Settings
from riemvae.data import DynamicBinarization, binarize, write_json
from riemvae.guides import HamiltonianGuide, RiemannianHamiltonianGuide
from riemvae.inference import LogLikelihood, fit, log_likelihood

# Of the draws of an estimate: the same for all models.
EVALUATION_SEED = 1_000


def read_images(path: str | os.PathLike[str], settings: Settings) -> tuple[Tensor, Tensor]:
    """Training images as bytes, and binary test images, each ``(N, 1, 28, 28)``.

    Raises:
        ValueError: A file without ``x_train`` and ``x_test`` of 28x28 bytes, or with too few of them.
    """
    with np.load(path, allow_pickle=False) as file:
        missing = {"x_train", "x_test"} - set(file.files)
        if missing:
            raise ValueError(
                f"--data: expected a .npz with x_train and x_test, got {path} without {sorted(missing)}; "
                "write MNIST into such a file."
            )
        arrays = {}
        for name, count in (("x_train", settings.num_train), ("x_test", settings.num_test)):
            array = file[name]
            if array.dtype != np.uint8 or array.shape[1:] != SHAPE[1:]:
                raise ValueError(
                    f"--data: expected {name} as unsigned bytes (N, 28, 28), got {array.dtype} {array.shape}."
                )
            if len(array) < count:
                raise ValueError(f"--data: expected {count} images in {name}, got {len(array)}.")
            arrays[name] = torch.from_numpy(array[:count]).reshape(-1, *SHAPE)
    return arrays["x_train"], binarize(arrays["x_test"], settings.binarization_seed)


def train_and_measure(
    name: str, latent_dim: int, seed: int, settings: Settings, data: str, folder: str, device: str, tell: Tell
) -> dict[str, Any]:
    """Trains one model, estimates its likelihoods, and keeps both in ``folder``.

    Args:
        name: The model.
        latent_dim: ``d``.
        seed: Of weights and training.
        settings: All numbers.
        data: The file of images.
        folder: Gets ``results/NAME.json`` and ``models/NAME``.
        device: Torch's name of a device.
        tell: Gets one line.

    Returns:
        The result, as written.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    grey, test = read_images(data, settings)
    images = DynamicBinarization(grey.to(device))
    with forked(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k̂ and residuals are among the numbers of the result
        pair = build(name, latent_dim, settings, binarize(grey, seed))
        since = time.perf_counter()
        loss = train(pair, images, settings, seed, device)
        seconds = time.perf_counter() - since
        result: dict[str, Any] = {
            "model": name,
            "latent_dim": latent_dim,
            "seed": seed,
            "digest": settings.digest(),
            "training_seconds": seconds,
            "epochs": sum(stage.epochs for stage in pair.stages),
            "parameters": sum(p.numel() for p in _parameters(pair)),
            "last_training_loss": loss,
            "peer_offset": peer_offset(pair, latent_dim),
        }
        if isinstance(pair.guide, RiemannianHamiltonianGuide):
            centroids = binarize(grey, seed)
            pair.guide.freeze_metric(
                centroids.to(device), batch_size=settings.batch_size, max_centroids=settings.num_centroids
            )
        many = test[: settings.num_test_many]
        for key, x, count in (
            ("few", test, settings.num_samples),
            ("many", many, settings.num_samples_many),
        ):
            since = time.perf_counter()
            estimate = log_likelihood(pair.model, pair.guide, x, count, seed=EVALUATION_SEED)
            result[key] = {**_numbers(estimate), "seconds": time.perf_counter() - since}
    label = label_of(name, latent_dim, seed)
    persistence.save(Path(folder) / "models" / label, pair.model.cpu(), pair.guide.cpu())
    write_json(Path(folder) / "results" / f"{label}.json", result)
    tell(f"{TITLES[name]}, d = {latent_dim}, seed {seed}: {result['few']['log_prob']:.2f} nats")
    return result


def label_of(name: str, latent_dim: int, seed: int) -> str:
    """The name of the files of one training."""
    return f"{name}_d{latent_dim}_seed{seed}"


def peer_offset(pair: Pair, latent_dim: int) -> float:
    """What ``get_nll`` of the peer library adds to a Hamiltonian model's ``log ŵ``: ``(d/2) log(1/β_0)``.

    The factor ``β_0^{-d/2}`` belongs with the density of the scaled momentum ``v_0 = γ/√β_0``; the peer keeps
    it beside the density of ``γ``, and it cancels against nothing.
    """
    if not isinstance(pair.guide, HamiltonianGuide):
        return 0.0
    return -latent_dim * math.log(float(pair.guide.tempering))


def _parameters(pair: Pair) -> set[torch.nn.Parameter]:
    return {*pair.model.parameters(), *pair.guide.parameters()}


def train(pair: Pair, images: DynamicBinarization, settings: Settings, seed: int, device: str) -> float:
    """Trains a pair through its stages and leaves it on ``device``; the last epoch's loss."""
    for stage in pair.stages:
        trained = fit(
            pair.model,
            pair.guide,
            images.loader(settings.batch_size),
            stage.objective,
            max_epochs=stage.epochs,
            learning_rate=stage.learning_rate,
            scheduler=partial(CosineAnnealingLR, T_max=stage.epochs),
            gradient_clip=settings.gradient_clip,
            restore_best=False,
            accelerator="cpu" if device == "cpu" else "gpu",
            progress=False,
            seed=seed,
        )
    for module in (pair.model, pair.guide):
        module.eval().to(device)
    return float(trained.history["train_loss"][-1])


def _numbers(estimate: LogLikelihood) -> dict[str, Any]:
    """An estimate in numbers of a report; arrays are what paired differences need."""
    summary = estimate.summary()
    return {
        "log_prob": summary["mean"],
        "stderr_images": summary["stderr"],
        "monte_carlo_error": summary["mcse"],
        "elbo": summary["elbo"],
        "kl_gap": summary["kl_gap"],
        "share_khat_above_0.7": summary["share_khat_above_0.7"],
        "diverged_share": summary["diverged_share"],
        "num_data": len(estimate),
        "num_samples": estimate.num_samples,
        "log_prob_by_image": [round(value, 4) for value in estimate.log_prob.tolist()],
    }
