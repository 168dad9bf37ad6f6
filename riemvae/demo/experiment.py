"""What the demo computes for one draw of the training images, and for the picture."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from riemvae import zoo
from riemvae._seeding import forked
from riemvae._tasks import Tell
from riemvae.data import DigitsSplit, load_digits_split
from riemvae.demo.picture import Plane, look_at_plane
from riemvae.demo.settings import CLASSIFIERS, MODELS, NUM_DIGITS, Settings, classifiers
from riemvae.guides import GaussianGuide
from riemvae.inference import IWAE, LogLikelihood, fit, log_likelihood
from riemvae.likelihoods import Gaussian
from riemvae.zoo import Autoencoder

IMAGE_SHAPE = (1, 8, 8)
# Training sets of the classifiers. The control takes no model: the real images, repeated as often, with
# independent noise of the likelihood's scale.
TRAINING_SETS = ("real", "real + prior", "real + manifold", "prior", "manifold", "real + noise")


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of other libraries between the progress lines; what matters is counted in the report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train(name: str, x: Tensor, latent_dim: int, epochs: int, settings: Settings, seed: int) -> Autoencoder:
    """One model on all images at once."""
    autoencoder = zoo.build(
        name,
        IMAGE_SHAPE,
        latent_dim,
        likelihood=Gaussian(scale=settings.scale),
        hidden=settings.hidden,
        seed=seed,
    )
    return autoencoder.fit(
        x, max_epochs=epochs, learning_rate=settings.learning_rate, seed=seed, progress=False
    )


def clipped(autoencoder: Autoencoder, z: Tensor) -> Tensor:
    """Draws of ``p(x|z)``, with its noise, cut to the grey levels that exist."""
    return autoencoder.decode(z, noise=True).clamp(0.0, 1.0)


def along_geometry(
    autoencoder: Autoencoder, x: Tensor, y: Tensor, num: int, settings: Settings
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """``num`` latent draws a class along the learned metric, their labels, and how they came about.

    The start of a finite chain is the code of a training image, and gives the draw its label. Draws whose
    nearest code has that label too are preferred among twice as many as are needed.
    """
    codes = autoencoder.encode(x)
    sampler = autoencoder.sampler(
        "manifold",
        num_steps=settings.chain_steps,
        num_leapfrog=settings.num_leapfrog,
        step_size=settings.step_size,
    )
    label = torch.arange(NUM_DIGITS).repeat_interleave(2 * num)
    start = torch.cat([cycled(codes[y == digit], 2 * num) for digit in range(NUM_DIGITS)])
    z = sampler.sample(len(start), start=start)
    stays = nearest_label(z, codes, y) == label
    kept = torch.cat([torch.argsort(~part, stable=True)[:num] for part in stays.split(2 * num)])
    index = kept + torch.arange(NUM_DIGITS).repeat_interleave(num) * 2 * num
    report = {
        "acceptance": sampler.report.acceptance,
        "divergences": sampler.report.divergences,
        "far_share": sampler.report.far_share,
        "share_near_own_class": float(stays.double().mean()),
        "share_near_own_class_of_used": float(stays[index].double().mean()),
        "mean_distance_moved": float((z - start).norm(dim=-1).mean()),
    }
    return z[index], label[index], report


def from_prior(autoencoder: Autoencoder, x: Tensor, y: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """``10 num`` latent draws of the prior, each with the label of the nearest code of a training image."""
    z = autoencoder.sampler("prior").sample(NUM_DIGITS * num)
    return z, nearest_label(z, autoencoder.encode(x), y)


def nearest_label(z: Tensor, codes: Tensor, y: Tensor) -> Tensor:
    """The label of the code nearest to each point."""
    return y[torch.cdist(z, codes).argmin(-1)]


def cycled(rows: Tensor, num: int) -> Tensor:
    """The first ``num`` of the rows, repeated."""
    return rows[torch.arange(num) % len(rows)]


def run_seed(settings: Settings, seed: int, tell: Tell) -> dict[str, Any]:
    """Everything for one draw of the training images.

    Args:
        settings: The numbers of the run.
        seed: Of the split, the weights, the training, the draws and the classifiers.
        tell: Is given a line after each stage.

    Returns:
        Plain numbers and arrays: ``training``, ``likelihood``, ``sampling``, ``predicted`` and ``y_test``;
        the ``images`` to show, and the RHVAE itself (``autoencoder``).
    """
    torch.set_num_threads(1)
    with forked(seed), quiet():
        digits = load_digits_split(settings.per_class, seed)
        models, training = {}, {}
        for name in MODELS:
            since = time.perf_counter()
            models[name] = train(name, digits.x_train, settings.latent_dim, settings.epochs, settings, seed)
            seconds = time.perf_counter() - since
            training[name] = {"seconds": seconds}
            tell(f"seed {seed}: {name.upper()} trained ({seconds:.0f} s)")
        held_out = digits.x_test[: settings.num_held_out]
        likelihood = {}
        for name, model in models.items():
            estimate = refitted_likelihood(model, held_out, settings, seed)
            likelihood[name] = {
                key: getattr(estimate, key).double().numpy() for key in ("log_prob", "mcse", "khat")
            }
            own = model.log_likelihood(held_out, settings.num_samples, seed=seed)
            likelihood[name]["own_guide"] = own.log_prob.double().numpy()
        tell(f"seed {seed}: likelihoods estimated")
        sets, sampling, images = training_sets(models["rhvae"], digits, settings)
        predicted = classify(sets, digits, settings, seed)
        tell(f"seed {seed}: classifiers trained")
    return {
        "seed": seed,
        "training": training,
        "likelihood": likelihood,
        "sampling": sampling,
        "predicted": predicted,
        "y_test": digits.y_test.numpy(),
        "images": images,
        "autoencoder": models["rhvae"],
    }


def refitted_likelihood(autoencoder: Autoencoder, x: Tensor, settings: Settings, seed: int) -> LogLikelihood:
    """``log p̂(x)`` of the model, which stays as it is, with a Gaussian guide fitted to these very images.

    An encoder of so few training images misses the posteriors of others, and importance sampling from it is
    too low by nats. A guide is a proposal and no part of ``p(x)``, so it may be fitted to the images that are
    scored. All models get the same kind of guide, trained alike.
    """
    model = copy.deepcopy(autoencoder.model).requires_grad_(False)
    guide = GaussianGuide(model, copy.deepcopy(autoencoder.guide.encoder))
    fit(
        model,
        guide,
        x,
        IWAE(settings.refit_particles),
        max_epochs=settings.refit_epochs,
        learning_rate=settings.learning_rate,
        seed=seed,
        progress=False,
    )
    return log_likelihood(model, guide, x, settings.num_samples, seed=seed)


def training_sets(
    autoencoder: Autoencoder, digits: DigitsSplit, settings: Settings
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Any], dict[str, np.ndarray]]:
    """Images and labels of every set to train classifiers on, the report on the chains, and images to show.

    Classifiers are given draws with observation noise; shown are the means of the decoder.
    """
    x, y, num = digits.x_train, digits.y_train, settings.num_synthetic
    z, labels, report = along_geometry(autoencoder, x, y, num, settings)
    manifold = clipped(autoencoder, z), labels
    means = {"real": by_digit(x, y, settings.per_class)}
    means["manifold"] = by_digit(autoencoder.decode(z), labels, settings.per_class)
    z, labels = from_prior(autoencoder, x, y, num)
    prior = clipped(autoencoder, z), labels
    means["prior"] = by_digit(autoencoder.decode(z), labels, settings.per_class)
    repeated = torch.cat([cycled(x[y == digit], num) for digit in range(NUM_DIGITS)])
    noisy = (repeated + settings.scale * torch.randn_like(repeated)).clamp(0.0, 1.0)
    noise = noisy, torch.arange(NUM_DIGITS).repeat_interleave(num)
    sets = {"real": (x, y), "prior": prior, "manifold": manifold}
    for name, (images, labels) in (("prior", prior), ("manifold", manifold), ("noise", noise)):
        sets[f"real + {name}"] = torch.cat([x, images]), torch.cat([y, labels])
    return sets, report, means


def classify(
    sets: dict[str, tuple[Tensor, Tensor]], digits: DigitsSplit, settings: Settings, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """The predicted digits of the held-out images, by training set and classifier."""
    test = digits.x_test.flatten(1).numpy()
    kinds = classifiers(settings, seed)
    return {
        name: {
            kind: kinds[kind]().fit(sets[name][0].flatten(1).numpy(), sets[name][1].numpy()).predict(test)
            for kind in CLASSIFIERS
        }
        for name in TRAINING_SETS
    }


def by_digit(images: Tensor, labels: Tensor, num: int) -> np.ndarray:
    """``num`` images of each digit ``(10 num, 8, 8)``, digit by digit; blank where a digit has fewer."""
    result = np.zeros((NUM_DIGITS, num, *IMAGE_SHAPE[1:]), dtype=np.float32)
    for digit in range(NUM_DIGITS):
        own = images[labels == digit][:num, 0].numpy()
        result[digit, : len(own)] = own
    return result.reshape(-1, *IMAGE_SHAPE[1:])


def run_plane(settings: Settings, seed: int, tell: Tell) -> Plane:
    """The latent plane of an RHVAE with two dimensions, trained on the first draw of the images."""
    torch.set_num_threads(1)
    with forked(seed), quiet():
        digits = load_digits_split(settings.per_class, seed)
        slower = replace(settings, learning_rate=settings.plane_learning_rate)
        autoencoder = train("rhvae", digits.x_train, 2, settings.plane_epochs, slower, seed)
        plane = look_at_plane(autoencoder, digits.x_train, digits.y_train, settings.plane_draws)
    tell("latent plane computed")
    return plane
