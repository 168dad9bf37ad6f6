"""What a learned geometry is worth: curves, samples, chains and clusters, over several seeds.

It does not time; it measures the claims of chapters 2 and 3 on small sets, every seed kept.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Result, Row, clock
from sklearn.datasets import load_digits
from torch import Tensor

import riemvae as rv
from riemvae.distributions import InverseVolume, RiemannianUniform
from riemvae.evaluation import clustering_f1, nearest, precision_recall
from riemvae.geometry import (
    CentroidMetric,
    Metric,
    VolumeWeightedMetric,
    distance_matrix,
    geodesic,
    k_medoids,
)
from riemvae.sampling import HMC, BatchedMCMC, RiemannianHMC, RiemannianRandomWalk

TITLE = "curves, samples, chains and clusters of two-dimensional latent spaces"
SEEDS = (0, 1, 2)

# 180 disks and rings
SHAPES_MODEL = {"step_size": 5e-4, "temperature": 0.4, "regularization": 1e-4}
SHAPES_EPOCHS = 800
PAIRS, INNER_POINTS = 200, 10
DRAWS, DRAW_SEEDS = 180, 5
SAMPLERS = ("prior", "manifold", "uniform")

# chains
CHAINS, WARMUP, KEPT, THIN = 16, 500, 1000, 40
MIXED = 1.01
RAISED, FILLED = 1e-2, 10.0  # floors of the learned and of the posterior metric

# Chosen on subsets of seeds 100 to 106 (digits) and 100 to 104 (MNIST); the seeds here were not looked at.
CLUSTER_MODEL = {"step_size": 2e-3}
CLUSTER_EPOCHS = 400
CLASSES, PER_CLASS = 3, 40
CLUSTER_STARTS = 3


def run(quick: bool, data_folder: str | None = None) -> Result:
    """The four measurements; those of a set whose file is not in the folder are left out."""
    named = data_folder or os.environ.get("RIEMVAE_DATA")
    folder = Path(named) if named else None
    seeds = SEEDS[:1] if quick else SEEDS
    rows: list[Row] = []
    x = _shapes(folder)
    if x is not None:
        for seed in seeds:
            ae = shapes_model(x, seed, 20 if quick else SHAPES_EPOCHS)
            rows += interpolation(ae, x, f"training seed {seed}")
            rows += generation(ae, x, f"training seed {seed}", 2 if quick else DRAW_SEEDS)
            if seed == 0:
                rows += mixing(ae, 20 if quick else KEPT, 20 if quick else WARMUP)
    rows += clustering(folder, seeds, 20 if quick else CLUSTER_EPOCHS)
    method = (
        "Shapes: 180 disks and rings, RHVAE at d = 2. Nearest is the distance of a decoded image to the "
        f"nearest training image. Curves: the mean of {INNER_POINTS} inner points of {PAIRS} random pairs, "
        f"the difference to straight lines paired. Samples: {DRAWS} draws of {DRAW_SEEDS} seeds, the "
        "difference to the prior's paired by seed; recall and coverage must gain as well. Chains: the "
        f"largest rank-normalised split R-hat of {CHAINS} chains from exact starts. Clusters: macro F1 in "
        f"percent of {CLASSES}-medoids on {PER_CLASS} images of each class, a model for each subset; the "
        "geodesic distances are those of the metric of the posterior covariances."
    )
    if x is None:
        method += " The shapes were not measured (no file shapes180.npz in the data folder)."
    return Result(TITLE, method, rows, ("nearest", "recall", "coverage", "linear", "geodesic", "r_hat"))


# -- shapes ------------------------------------------------------------------------------------------------


def _shapes(folder: Path | None) -> Tensor | None:
    if folder is None or not (folder / "shapes180.npz").is_file():
        return None
    with np.load(folder / "shapes180.npz") as file:
        return torch.from_numpy(file["x"] > 127).float().unsqueeze(1)


def shapes_model(x: Tensor, seed: int, epochs: int = SHAPES_EPOCHS) -> rv.zoo.Autoencoder:
    """The RHVAE of the shapes."""
    ae = rv.zoo.build("rhvae", x.shape[1:], 2, likelihood="bernoulli", seed=seed, **SHAPES_MODEL)
    return ae.fit(x, max_epochs=epochs, batch_size=len(x), learning_rate=1e-3, seed=seed, progress=False)


def interpolation(ae: rv.zoo.Autoencoder, x: Tensor, name: str) -> list[Row]:
    """Nearest training image along straight lines and along two kinds of curves, the same pairs."""
    z = ae.encode(x)
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(len(z), (PAIRS,), generator=generator)
    second = (first + 1 + torch.randint(len(z) - 1, (PAIRS,), generator=generator)) % len(z)
    t = torch.linspace(0, 1, INNER_POINTS + 2)[1:-1]
    straight = _along(ae, x, z[first] + t[:, None, None] * (z[second] - z[first]))
    metrics = {
        "geodesics": ae.metric,
        "curves of eq. 3.8": VolumeWeightedMetric(ae.posterior_metric()),
    }
    values = {"nearest": float(straight.mean())}
    rows = [Row(f"straight lines, {name}", values, f"{straight.mean():.2f}")]
    for kind, metric in metrics.items():
        curves = geodesic(metric, z[first], z[second], tolerance=1e-4)
        score = _along(ae, x, curves.evenly(t))
        gain = straight - score
        values = {
            "nearest": float(score.mean()),
            "gain": float(gain.mean()),
            "standard error": _error(gain),
            "share of pairs that gain": float((gain > 0).double().mean()),
            "converged": float(curves.converged.double().mean()),
        }
        # Two standard errors below the gain: above what chance gives.
        clear = values["gain"] > 2 * values["standard error"]
        rows.append(_gain(f"{kind}, {name}", values, clear))
    return rows


def _along(ae: rv.zoo.Autoencoder, x: Tensor, points: Tensor) -> Tensor:
    """Mean distance to the nearest training image along each curve of ``points (T, n, d)``, ``(n,)``."""
    decoded = ae.decode(points.flatten(0, 1))
    return nearest(decoded, x).distances.reshape(points.shape[:-1]).mean(0)


def generation(ae: rv.zoo.Autoencoder, x: Tensor, name: str, draw_seeds: int = DRAW_SEEDS) -> list[Row]:
    """Nearest training image, recall and coverage of samples; each draw seed compared with the prior's."""
    rows: list[Row] = []
    prior: dict[str, Tensor] = {}
    for sampler in SAMPLERS:
        scores: dict[str, list[float]] = {"nearest": [], "recall": [], "coverage": []}
        for seed in range(draw_seeds):
            drawn = ae.sample(DRAWS, sampler, seed=seed)
            reach = precision_recall(x, drawn)
            scores["nearest"].append(float(nearest(drawn, x).distances.mean()))
            scores["recall"].append(reach.recall)
            scores["coverage"].append(reach.coverage)
        figures = {key: torch.tensor(value) for key, value in scores.items()}
        prior = prior or figures
        values: dict[str, Any] = {key: float(value.mean()) for key, value in figures.items()}
        values["all"] = scores
        if sampler == "prior":
            rows.append(Row(f"{sampler} samples, {name}", values, f"{values['nearest']:.2f}"))
            continue
        better = {
            "nearest": prior["nearest"] - figures["nearest"],
            "recall": figures["recall"] - prior["recall"],
            "coverage": figures["coverage"] - prior["coverage"],
        }
        values["gain"], values["standard error"] = float(better["nearest"].mean()), _error(better["nearest"])
        values |= {f"gain in {key}": [float(gain.mean()), _error(gain)] for key, gain in better.items()}
        clear = all(float(gain.mean()) > 2 * _error(gain) for gain in better.values())
        rows.append(_gain(f"{sampler} samples, {name}", values, clear))
    return rows


def _gain(name: str, values: dict[str, Any], clear: bool) -> Row:
    return Row(name, values, f"{values['gain']:.3f} ± {values['standard error']:.3f}", "> 2 errors", clear)


def _error(values: Tensor) -> float:
    """Standard error of the mean."""
    return float(values.std() / math.sqrt(len(values)))


# -- chains ------------------------------------------------------------------------------------------------


def mixing(ae: rv.zoo.Autoencoder, kept: int = KEPT, warmup: int = WARMUP) -> list[Row]:
    """R-hat of every exact kernel on the densities of the learned and of the posterior metric."""
    rows = []
    for name, (kernel, target, thin, acceptance) in kernels(ae).items():
        torch.manual_seed(0)
        begin = clock()
        mcmc = BatchedMCMC(
            kernel, kept, warmup, start=target.sample((CHAINS,)), thin=thin, target_accept=acceptance
        )
        mcmc.run()
        diagnostics = mcmc.diagnostics()["z"]
        r_hat = float(diagnostics["r_hat"].max())
        values = {
            "r_hat": r_hat,
            "effective": float(diagnostics["n_eff"].min()),
            "transitions": warmup + kept * thin,
            "seconds": clock() - begin,
        }
        rows.append(Row(name, values, f"{r_hat:.4f}", f"< {MIXED}", r_hat < MIXED))
    return rows


def kernels(ae: rv.zoo.Autoencoder) -> dict[str, tuple[Any, Any, int, float]]:
    """Kernel, target, transitions a draw, and the acceptance that the warm-up aims at.

    Both densities as they are, whose modes are far apart; and with a floor that brings their values near and
    far from data closer together.
    """
    learned = ae.metric
    raised = CentroidMetric(learned.centroids, learned.factors, learned.temperature, RAISED)
    posterior = ae.posterior_metric()
    filled = ae.posterior_metric(regularization=FILLED)
    radius = float(torch.linalg.vector_norm(posterior.centroids, dim=-1).max())
    inverse, inverse_raised = InverseVolume(learned), InverseVolume(raised)
    uniform = RiemannianUniform(posterior, 2 * radius)
    uniform_filled = RiemannianUniform(filled, 1.2 * radius)
    return {
        "HMC, inverse volume": (_hmc(inverse, 30), inverse, THIN, 0.8),
        "HMC, uniform": (_hmc(uniform, 20), uniform, THIN, 0.8),
        f"HMC, uniform, regularization {FILLED:g}": (_hmc(uniform_filled, 20), uniform_filled, THIN, 0.8),
        "Riemannian HMC, inverse volume": (_riemannian(inverse, learned), inverse, 1, 0.8),
        f"Riemannian HMC, λ = {RAISED:g}": (_riemannian(inverse_raised, raised), inverse_raised, 2, 0.8),
        "exact walk, inverse volume": (RiemannianRandomWalk(inverse, learned), inverse, 1, 0.4),
        f"exact walk, λ = {RAISED:g}": (RiemannianRandomWalk(inverse_raised, raised), inverse_raised, 2, 0.4),
    }


def _riemannian(density: InverseVolume, metric: Metric) -> RiemannianHMC:
    return RiemannianHMC(density.log_density_and_gradient, metric, 0.1, 5, jitter=0.2)


def _hmc(density: InverseVolume | RiemannianUniform, num_steps: int) -> HMC:
    return HMC(
        density.log_density_and_gradient, 0.05, num_steps, jitter=0.2, gradient=density.log_density_gradient
    )


# -- clusters ----------------------------------------------------------------------------------------------


def clustering(folder: Path | None, seeds: Iterable[int], epochs: int = CLUSTER_EPOCHS) -> list[Row]:
    """F1 of medoids on linear and on geodesic distances, for each subset of each set."""
    sets: dict[str, Callable[[int], tuple[Tensor, np.ndarray]]] = {"digits": digits_subset}
    if folder is not None and (folder / "mnist.npz").is_file():
        with np.load(folder / "mnist.npz") as file:
            x, y = file["x_train"], file["y_train"]
        sets["MNIST"] = lambda seed: mnist_subset(x, y, seed)
    rows: list[Row] = []
    for name, subset in sets.items():
        scores = [(seed, *cluster_scores(*subset(seed), epochs)) for seed in seeds]
        for seed, linear, along in scores:
            values = {"linear": linear, "geodesic": along}
            rows.append(Row(f"{name}, subset {seed}", values, f"{along - linear:+.2f}"))
        linear = statistics.fmean(score[1] for score in scores)
        along = statistics.fmean(score[2] for score in scores)
        values = {"linear": linear, "geodesic": along}
        rows.append(Row(f"{name}, mean", values, f"{along - linear:+.2f}", ">= 0", along >= linear))
    if folder is not None and (folder / "mnist120.npz").is_file():
        with np.load(folder / "mnist120.npz") as file:
            linear, along = cluster_scores(_binary(file["x"], 127), file["y"], epochs)
        values = {"linear": linear, "geodesic": along}
        rows.append(Row("reduced MNIST of chapter 2", values, f"{along - linear:+.2f}"))
    return rows


def digits_subset(seed: int) -> tuple[Tensor, np.ndarray]:
    """Three random classes of the 8 by 8 digits, 40 images of each."""
    digits = load_digits()
    generator = np.random.default_rng(seed)
    classes = generator.choice(10, CLASSES, replace=False)
    index = _chosen(digits.target, classes, generator)
    return _binary(digits.images[index], 7), digits.target[index]


def mnist_subset(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[Tensor, np.ndarray]:
    """40 images of each of the classes 0, 1 and 2."""
    index = _chosen(y, range(CLASSES), np.random.default_rng(seed))
    return _binary(x[index], 127), y[index]


def _chosen(y: np.ndarray, classes: Iterable[int], generator: np.random.Generator) -> np.ndarray:
    parts = [generator.choice(np.flatnonzero(y == c), PER_CLASS, replace=False) for c in classes]
    return np.concatenate(parts)


def _binary(images: np.ndarray, threshold: int) -> Tensor:
    return torch.from_numpy(images > threshold).float().unsqueeze(1)


def cluster_scores(x: Tensor, y: np.ndarray, epochs: int = CLUSTER_EPOCHS) -> tuple[float, float]:
    """F1 in percent with linear and with geodesic distances of the same codes."""
    ae = rv.zoo.build("rhvae", x.shape[1:], 2, likelihood="bernoulli", seed=0, **CLUSTER_MODEL)
    ae.fit(x, max_epochs=epochs, batch_size=len(x), learning_rate=1e-3, seed=0, progress=False)
    z = ae.encode(x)
    along = distance_matrix(ae.covariance_metric(), z)
    return _f1(torch.cdist(z, z), y), _f1(along, y)


def _f1(distances: Tensor, y: np.ndarray) -> float:
    found = [k_medoids(None, CLASSES, distances=distances, seed=seed) for seed in range(CLUSTER_STARTS)]
    return 100 * statistics.fmean(clustering_f1(clusters.labels, y) for clusters in found)
