"""Small real data sets that need no download."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from riemvae._checks import argument_error, check_count


class DigitsSplit(NamedTuple):
    """Images ``(N, 1, 8, 8)`` in [0, 1] (float32) and labels ``(N,)`` (int64) of three disjoint parts."""

    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor


def load_digits_split(per_class: int = 5, seed: int = 0, val_per_class: int = 0) -> DigitsSplit:
    """scikit-learn's handwritten digits (1797 of 8x8 pixels), a few a class to train on, the others held out.

    The images (Alpaydin and Kaynak, 1998, UCI) have 17 grey levels, divided by 16.

    Args:
        per_class: Training images of each of the ten classes.
        seed: Seed of the draw; torch's and numpy's global generators are not touched.
        val_per_class: Validation images of each class.

    Returns:
        Training, validation (maybe empty) and test parts; within a part the classes are mixed.

    Raises:
        ValueError: A count is not an integer, or a class has too few images to leave one for the test.

    Example:
        >>> digits = load_digits_split(per_class=5)
        >>> digits.x_train.shape, digits.x_test.shape
        (torch.Size([50, 1, 8, 8]), torch.Size([1747, 1, 8, 8]))
    """
    from sklearn.datasets import load_digits

    check_count("per_class", per_class)
    check_count("val_per_class", val_per_class, 0)
    images, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[], [], []]
    for digit in range(10):
        members = generator.permutation(np.flatnonzero(labels == digit))
        if per_class + val_per_class >= len(members):
            raise argument_error(
                "per_class",
                f"fewer than {len(members)} images of digit {digit} in all",
                per_class + val_per_class,
            )
        for part, chosen in zip(parts, np.split(members, [per_class, per_class + val_per_class])):
            part.append(chosen)
    x = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(labels, dtype=torch.int64)
    tensors: list[Tensor] = []
    for part in parts:
        index = torch.from_numpy(generator.permutation(np.concatenate(part)))
        tensors += [x[index], y[index]]
    return DigitsSplit(*tensors)
