"""Handwritten digits: MNIST from a file, or the small digits of scikit-learn in its place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from riemvae._checks import argument_error
from riemvae.data.files import _load_numpy


class DigitImages(NamedTuple):
    """Images ``(N, 28, 28)`` of unsigned bytes and labels ``(N,)`` (int64), to train on and to test on."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load_digit_images(path: str | os.PathLike[str] | None = None) -> DigitImages:
    """Digits of 28x28 pixels: MNIST where its file is given, else scikit-learn's 1797 enlarged.

    scikit-learn's 8x8 digits are enlarged to 20x20 (bilinear) and framed with 4 black pixels, as MNIST's
    are; the first 1200 are for training and the other 597 for testing.

    Args:
        path: An ``.npz`` with ``x_train``, ``y_train``, ``x_test`` and ``y_test``; None: scikit-learn's.

    Returns:
        Images and labels.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It lacks an array, or one has another shape or type.

    Source: LeCun et al. (1998); Alpaydin and Kaynak (1998).

    Example:
        >>> load_digit_images().x_train.shape
        torch.Size([1200, 28, 28])
    """
    if path is None:
        return _small_digits()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"path: expected MNIST as an .npz file, got {str(path)!r}, which does not exist; "
            "path=None takes the digits of scikit-learn."
        )
    arrays = _load_numpy(path)
    parts = []
    for name in DigitImages._fields:
        if not isinstance(arrays, dict) or name not in arrays:
            raise argument_error(path.name, f"arrays {', '.join(DigitImages._fields)}", f"no {name}")
        parts.append(torch.from_numpy(arrays[name]))
    x_train, y_train, x_test, y_test = parts
    for name, images, labels in (("x_train", x_train, y_train), ("x_test", x_test, y_test)):
        if images.dtype != torch.uint8 or images.shape != (len(labels), 28, 28):
            raise argument_error(f"{name} in {path.name}", "bytes (N, 28, 28), one label an image", images)
    return DigitImages(x_train, y_train.long(), x_test, y_test.long())


def _small_digits() -> DigitImages:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    x = F.interpolate(x, size=(20, 20), mode="bilinear", align_corners=False)
    x = (F.pad(x, (4, 4, 4, 4))[:, 0] * 255).round().to(torch.uint8)
    y = torch.tensor(labels, dtype=torch.int64)
    return DigitImages(x[:1200], y[:1200], x[1200:], y[1200:])
