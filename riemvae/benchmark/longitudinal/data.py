"""The data sets of the benchmark of sequences, with what is hidden of them."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from riemvae._checks import argument_error
from riemvae._seeding import forked
from riemvae.benchmark.longitudinal.settings import Data
from riemvae.data.generators import (
    DigitImages,
    color_digits,
    load_digit_images,
    rotated_digits,
    sprites,
    starmen,
)
from riemvae.data.sequences import Sequences

# Of data and masks, which are the same for all models and trainings.
DATA_SEED, VISIT_SEED, PIXEL_SEED = 11, 12, 13

# Beside the file of MNIST: which visits of the small test sequences are seen, under "test".
VISITS_FILE = "rotmnist_visits.npz"


class Material(NamedTuple):
    """What a training and its measures take.

    Attributes:
        train: To train on, with what is missing.
        val: To choose by, likewise.
        test: To judge by, complete.
        hidden: The same sequences with what is to be filled in.
    """

    train: Sequences
    val: Sequences
    test: Sequences
    hidden: Sequences


@functools.lru_cache(maxsize=1)  # one training after another takes them
def load(data: Data, path: str | os.PathLike[str] | None = None) -> Material:
    """The data of an experiment; the same at each call.

    Args:
        data: Which.
        path: MNIST as an ``.npz``, for digits; None takes those of scikit-learn, of which there are fewer.

    Raises:
        ValueError: A file of something else, or too few images in it.
    """
    if data.name in ("rotmnist", "colormnist"):
        return _digits(data, path)
    total = sum(data.sizes)
    if data.name == "sprites":
        every = sprites(total, data.num_visits, data.size, seed=DATA_SEED)
    elif data.name == "turns":
        every = turns(total, data.num_visits, data.size)
    elif data.name == "irregular":
        every = starmen(total, data.num_visits, data.size, irregular=data.seen_visits, seed=DATA_SEED)
    else:
        figures = 2 if data.name == "arms" else 1
        every = starmen(total, data.num_visits, data.size, dynamics=figures, seed=DATA_SEED)
    every = with_times(every)
    masked = every
    if data.missing_visits:
        masked = masked.drop_visits(data.missing_visits, seed=VISIT_SEED)
    if data.missing_pixels:
        masked = masked.drop_pixels(data.missing_pixels, seed=PIXEL_SEED)
    train, val, hidden = masked.split(data.sizes)
    test = every.split(data.sizes)[2]
    return Material(train, val, complete(test), hidden)


def complete(data: Sequences) -> Sequences:
    """The same sequences with all that there is of them."""
    return replace(data, observed=torch.ones_like(data.observed), pixel_mask=None)


def with_times(data: Sequences) -> Sequences:
    """The number of the visit as its time where there is none; else times of mean 0 and deviation 1."""
    if data.times is None:
        order = torch.arange(float(data.num_visits), device=data.x.device)
        return replace(data, times=order.expand(len(data), -1).contiguous())
    seen = data.times[data.observed]
    return replace(data, times=(data.times - seen.mean()) / seen.std())


def check_digits(data: Data, path: str | os.PathLike[str] | None) -> DigitImages:
    """The digits of a file, of which there are enough.

    Raises:
        ValueError: A file of something else, or too few images in it.
    """
    images = load_digit_images(path)
    train, val, test = data.sizes
    if len(images.x_train) < train + val or len(images.x_test) < test:
        got = f"{len(images.x_train)} and {len(images.x_test)}"
        remedy = "pass the file of MNIST, --data" if path is None else None
        raise argument_error("data", f"{train + val} training and {test} test images", got, remedy)
    return images


def _digits(data: Data, path: str | os.PathLike[str] | None) -> Material:
    images = check_digits(data, path)
    train, val, test = data.sizes
    parts = []
    for number, x in enumerate(
        (images.x_train[:train], images.x_train[train : train + val], images.x_test[:test])
    ):
        if data.name == "rotmnist":
            made = rotated_digits(x, data.num_visits, 360.0 / data.num_visits)
        else:  # as bytes, a quarter of the memory
            made = color_digits(x, data.num_visits, "first", seed=DATA_SEED + number, dtype=torch.uint8)
        parts.append(with_times(made))
    seen = _published_visits(path, parts[2].observed) if data.name == "rotmnist" else None
    if seen is None:
        hidden = parts[2].drop_visits(0.5, seed=VISIT_SEED, keep_at_least=2)
    else:
        hidden = replace(parts[2], observed=seen)
    return Material(parts[0], parts[1], parts[2], hidden)


def _published_visits(path: str | os.PathLike[str] | None, like: Tensor) -> Tensor | None:
    """Which visits are seen, by a file beside that of the images; None without one for as many sequences."""
    file = None if path is None else Path(path).with_name(VISITS_FILE)
    if file is None or not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as arrays:
        if "test" not in arrays.files:
            raise argument_error("data", f"an array 'test' in {VISITS_FILE}", f"{arrays.files}")
        seen = torch.from_numpy(arrays["test"]) > 0
    return seen if seen.shape == like.shape else None


def turns(number: int, num_visits: int, size: int) -> Sequences:
    """Points on a circle that turn one way (label 0) or the other (label 1), seen through ``size`` features.

    Where a point starts and how far out it is are the same law for both: no single visit tells them apart.
    """
    with forked(DATA_SEED):
        start = 2.0 * math.pi * torch.rand(number, 1)
        radius = 0.8 + 0.4 * torch.rand(number, 1)
        labels = torch.randint(2, (number,))
        features = torch.linalg.qr(torch.randn(size, 2)).Q.T * math.sqrt(size / 2)
        noise = 0.1 * torch.randn(number, num_visits, size)
    way = (1.0 - 2.0 * labels)[:, None]
    angle = start + way * torch.arange(num_visits) * (2.0 * math.pi / num_visits)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    return Sequences(
        x=points @ features + noise,
        observed=torch.ones(number, num_visits, dtype=torch.bool),
        labels=labels,
        truth={"angle": angle},
        visit_truth=("angle",),
    )
