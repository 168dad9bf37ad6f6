"""rotMNIST: digits that turn by a fixed angle from visit to visit."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_choice, check_count, check_finite
from riemvae.data.generators.digits import load_digit_images
from riemvae.data.generators.pixels import as_pixels, check_dtype, chunks, grey_images, turned
from riemvae.data.sequences import SPLITS, Sequences


class SequenceSplit(NamedTuple):
    """Sequences to train on, to choose by and to judge by."""

    train: Sequences
    val: Sequences
    test: Sequences


def rotated_digits(
    images: Any,
    num_visits: int = 8,
    degrees: float = 45.0,
    labels: Any = None,
    dtype: torch.dtype = torch.float32,
) -> Sequences:
    """Each image turned by ``k · degrees`` at visit ``k``, counterclockwise.

    Bilinear sampling about the centre, zero padding, ``align_corners=False``. Nothing is drawn.

    Args:
        images: ``(N, H, W)``, unsigned bytes or values in [0, 1].
        num_visits: ``T``.
        degrees: From one visit to the next.
        labels: Of the images, ``(N,)``.
        dtype: Of the pixels: floating point in [0, 1], or ``torch.uint8``.

    Returns:
        Sequences ``(N, T, 1, H, W)``, all visits observed; truth: ``degrees (N, T)``.

    Raises:
        ValueError: Images of another shape or range.

    Source: Chadebec (thesis), section 6.5.1.

    Example:
        >>> rotated_digits(torch.zeros(3, 28, 28)).x.shape
        torch.Size([3, 8, 1, 28, 28])
    """
    x = grey_images("images", images)
    check_count("num_visits", num_visits)
    check_finite("degrees", torch.tensor(float(degrees)))
    check_dtype(dtype)
    angles = torch.arange(num_visits, dtype=torch.float64) * float(degrees)
    out = torch.empty((len(x), num_visits, *x.shape[1:]), dtype=dtype, device=x.device)
    for part in chunks(len(x), x[0].numel() * num_visits):
        repeated = x[part].repeat_interleave(num_visits, 0)
        frames = turned(repeated, angles.repeat(len(repeated) // num_visits))
        out[part] = as_pixels(frames.clamp(0, 1), dtype).view(out[part].shape)
    return Sequences(
        x=out,
        observed=torch.ones(out.shape[:2], dtype=torch.bool, device=x.device),
        labels=None if labels is None else torch.as_tensor(labels, device=x.device),
        truth={"degrees": angles.to(x).expand(len(x), -1).contiguous()},
        visit_truth=("degrees",),
    )


def rot_mnist(
    path: str | os.PathLike[str] | None = None,
    size: str = "small",
    num_visits: int = 8,
    degrees: float = 45.0,
    dtype: torch.dtype = torch.float32,
) -> SequenceSplit:
    """The fixed split of rotMNIST, from MNIST's file or, for the small split, from scikit-learn's digits.

    Small: ``x_train[:1000]``, ``x_train[1000:1200]`` and ``x_test[:500]``. Full: ``x_train[:9000]``,
    ``x_train[9000:10000]`` and all of ``x_test``.

    Args:
        path: MNIST as an ``.npz`` (see `load_digit_images`); None: scikit-learn's digits, small split only.
        size: ``"small"`` or ``"full"``.
        num_visits: ``T``.
        degrees: From one visit to the next.
        dtype: Of the pixels: floating point in [0, 1], or ``torch.uint8``.

    Returns:
        Three parts, with the digits as labels.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another size, too few images in the file.

    Source: Chadebec (thesis), table 6.3.

    Example:
        >>> [len(part) for part in rot_mnist(num_visits=2)]
        [1000, 200, 500]
    """
    check_choice("size", size, ("small", "full"))
    digits = load_digit_images(path)
    train, val, test = SPLITS["rotmnist" if size == "full" else "rotmnist-small"]
    if len(digits.x_train) < train + val or len(digits.x_test) < test:
        got = f"{len(digits.x_train)} and {len(digits.x_test)}"
        remedy = "pass the path of MNIST" if path is None else "use size='small'"
        raise argument_error("size", f"{train + val} training and {test} test images", got, remedy)

    def made(x: Tensor, y: Tensor) -> Sequences:
        return rotated_digits(x, num_visits, degrees, labels=y, dtype=dtype)

    return SequenceSplit(
        made(digits.x_train[:train], digits.y_train[:train]),
        made(digits.x_train[train : train + val], digits.y_train[train : train + val]),
        made(digits.x_test[:test], digits.y_test[:test]),
    )
