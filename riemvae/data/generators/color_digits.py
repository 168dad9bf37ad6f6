"""colorMNIST: coloured digits that change their colour, or grow, or turn."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_choice, check_count
from riemvae._seeding import forked
from riemvae.data.generators.digits import load_digit_images
from riemvae.data.generators.pixels import as_pixels, check_dtype, chunks, grey_images, turned
from riemvae.data.generators.rotated_digits import SequenceSplit
from riemvae.data.sequences import SPLITS, Sequences

TRANSFORMATIONS = ("color", "scale", "rotation")
SCALES = (0.6, 1.26)  # Keller and Welling's smallest and largest


def color_digits(
    images: Any,
    num_visits: int = 12,
    start: str = "random",
    seed: int | None = 0,
    labels: Any = None,
    dtype: torch.dtype = torch.float32,
) -> Sequences:
    """Coloured digits of which one property changes in time: the colour, the size or the angle.

    Each property has ``T`` states in a circle: colours evenly from turquoise over green to yellow, scales
    evenly from 0.6 to 1.26, angles evenly over 360 degrees. A sequence runs once through the states of one
    property, drawn at random, and keeps the others; so an image alone does not tell how it goes on.

    Args:
        images: ``(N, H, W)``, unsigned bytes or values in [0, 1].
        num_visits: ``T``; the thesis has 12, Keller and Welling 18.
        start: ``"random"``: all three start in random states, and the one that changes goes round (Keller
            and Welling's). ``"first"``: it runs from its first state to its last, and digits that do not turn
            stand upright, as in the thesis's pictures.
        seed: Of the draws; None draws from torch's global generator.
        labels: Of the images, ``(N,)``.
        dtype: Of the pixels: floating point in [0, 1], or ``torch.uint8`` (a quarter of the memory).

    Returns:
        Sequences ``(N, T, 3, H, W)``, all visits observed; truth: ``transformation (N,)`` (0 colour, 1 scale,
        2 rotation) and the states ``color``, ``scale`` and ``rotation``, integers ``(N, T)``.

    Raises:
        ValueError: Images of another shape or range, another start.

    Source: Keller and Welling (2021), appendix; Chadebec (thesis), section 6.5.1.

    Example:
        >>> data = color_digits(torch.ones(2, 28, 28))
        >>> data.x.shape, sorted(data.truth)
        (torch.Size([2, 12, 3, 28, 28]), ['color', 'rotation', 'scale', 'transformation'])
    """
    x = grey_images("images", images)
    check_count("num_visits", num_visits)
    check_choice("start", start, ("random", "first"))
    check_dtype(dtype)
    number = len(x)
    with forked(seed):
        chosen = torch.randint(3, (number,))
        states = torch.randint(num_visits, (number, 3))
    if start == "first":
        changes = torch.arange(3) == chosen[:, None]
        upright = torch.tensor([False, False, True])
        states = torch.where(changes | upright, 0, states)
    steps = torch.arange(num_visits) * (torch.arange(3) == chosen[:, None])[..., None]
    color, scale, rotation = ((states[..., None] + steps) % num_visits).unbind(1)  # (N, T) each
    last = max(1, num_visits - 1)
    tints = _tint(color / last).to(x)  # (N, T, 3)
    zooms = SCALES[0] + (SCALES[1] - SCALES[0]) * scale / last
    angles = rotation * (360.0 / num_visits)
    out = torch.empty((number, num_visits, 3, *x.shape[2:]), dtype=dtype, device=x.device)
    for part in chunks(number, 3 * x[0].numel() * num_visits):
        frames = turned(
            x[part].repeat_interleave(num_visits, 0), angles[part].flatten(), zooms[part].flatten()
        )
        frames = frames.view(-1, num_visits, 1, *x.shape[2:]) * tints[part, :, :, None, None]
        out[part] = as_pixels(frames.clamp(0, 1), dtype)
    return Sequences(
        x=out,
        observed=torch.ones(number, num_visits, dtype=torch.bool, device=x.device),
        labels=None if labels is None else torch.as_tensor(labels, device=x.device),
        truth={
            name: value.to(x.device)
            for name, value in (
                ("transformation", chosen),
                ("color", color),
                ("scale", scale),
                ("rotation", rotation),
            )
        },
        visit_truth=("color", "scale", "rotation"),
    )


def _tint(share: Tensor) -> Tensor:
    """Red, green and blue from turquoise (0) over green (1/2) to yellow (1), ``(..., 3)``."""
    red, blue = (2 * share - 1).clamp_min(0), (1 - 2 * share).clamp_min(0)
    return torch.stack([red, torch.ones_like(share), blue], -1)


def color_mnist(
    path: str | os.PathLike[str],
    num_visits: int = 12,
    start: str = "first",
    seed: int | None = 0,
    dtype: torch.dtype = torch.uint8,
) -> SequenceSplit:
    """The full split of colorMNIST: 48,000, 12,000 and 10,000 sequences of MNIST's digits.

    The last 12,000 training images are the validation part. As unsigned bytes they take 2 GB.

    Args:
        path: MNIST as an ``.npz`` (see `load_digit_images`).
        num_visits: ``T``.
        start: See `color_digits`; we read the thesis as "first" ("a starting turquoise 6").
        seed: Of the draws; the parts have draws of their own.
        dtype: Of the pixels.

    Returns:
        Three parts, with the digits as labels.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Too few images in the file.

    Source: Chadebec (thesis), table 6.3.
    """
    digits = load_digit_images(path)
    sizes = SPLITS["colormnist"]
    if len(digits.x_train) < sizes.train + sizes.val or len(digits.x_test) < sizes.test:
        got = f"{len(digits.x_train)} and {len(digits.x_test)}"
        raise argument_error(
            "path",
            f"{sizes.train + sizes.val} training and {sizes.test} test images",
            got,
            "use color_digits",
        )
    with forked(seed):
        seeds = torch.randint(2**31, (3,)).tolist()
    until = sizes.train + sizes.val
    return SequenceSplit(
        *(
            color_digits(x, num_visits, start, part_seed, y, dtype)
            for x, y, part_seed in (
                (digits.x_train[: sizes.train], digits.y_train[: sizes.train], seeds[0]),
                (digits.x_train[sizes.train : until], digits.y_train[sizes.train : until], seeds[1]),
                (digits.x_test[: sizes.test], digits.y_test[: sizes.test], seeds[2]),
            )
        )
    )
