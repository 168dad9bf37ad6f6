"""Pictures made of images: decoded strips along curves, draws beside their nearest neighbours."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from riemvae._checks import argument_error, check_count
from riemvae.evaluation.overfitting import OverfittingCheck
from riemvae.evaluation.pictures import canvas
from riemvae.geometry.geodesics import Geodesic

_GAP = 1  # pixels between images


def as_pictures(images: Any) -> np.ndarray:
    """Images as ``(n, height, width)`` or ``(n, height, width, 3)``.

    Images may be ``(n, H, W)``, ``(n, 1, H, W)`` or ``(n, 3, H, W)``; of volumes ``(n, 1, D, H, W)`` the
    middle slice is taken.

    Raises:
        ValueError: anything else.
    """
    x = canvas.array(images)
    if x.ndim == 5 and x.shape[1] == 1:
        x = x[:, 0, x.shape[2] // 2]
    if x.ndim == 4 and x.shape[1] == 1:
        x = x[:, 0]
    if x.ndim == 4 and x.shape[1] == 3:
        x = x.transpose(0, 2, 3, 1)
    elif x.ndim != 3:
        raise argument_error(
            "images", "(n, H, W), (n, 1 or 3, H, W) or (n, 1, D, H, W)", x, "reshape flat data to images"
        )
    return x.astype(np.float64)


def mosaic(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of equally many images ``(n, H, W[, 3])`` as one image, NaN between them."""
    height, width = rows[0].shape[1:3]
    shape = (len(rows) * (height + _GAP) - _GAP, len(rows[0]) * (width + _GAP) - _GAP, *rows[0].shape[3:])
    result = np.full(shape, np.nan)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (height + _GAP), j * (width + _GAP)
            result[top : top + height, left : left + width] = image
    return result


def draw_rows(
    rows: Sequence[tuple[str, Any]],
    columns: Sequence[str] | None = None,
    *,
    ax: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Named rows of images, as one picture of one gray scale.

    Args:
        rows: a name and equally many images each, in any form that :func:`as_pictures` takes.
        columns: a text under each column.
        ax: axes to draw on; ``None`` makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes; ``ax.images[0]`` holds the pixels.

    Raises:
        ValueError: no rows, or rows of different sizes.

    Example:
        >>> ax = draw_rows([("ones", torch.ones(3, 1, 4, 4)), ("zeros", torch.zeros(3, 1, 4, 4))])
        >>> ax.images[0].get_array().shape
        (9, 14)
    """
    pictures = [as_pictures(images) for _, images in rows]
    if not pictures or any(p.shape != pictures[0].shape for p in pictures) or not len(pictures[0]):
        raise argument_error(
            "rows", "rows of equally many images of one size", f"{[p.shape for p in pictures]}"
        )
    count, height, width = pictures[0].shape[:3]
    whole = mosaic(pictures)
    low, high = float(np.nanmin(whole)), float(np.nanmax(whole))
    if whole.ndim == 3:
        whole = np.nan_to_num((whole - low) / (high - low or 1.0), nan=1.0)
    new = ax is None
    ax = canvas.axes(ax, (max(3.0, 0.75 * count + 1.2), 0.4 + 0.75 * len(rows) * height / width))
    ax.imshow(whole, cmap="gray", vmin=low, vmax=high if high > low else low + 1, interpolation="nearest")
    ax.set_yticks(
        [i * (height + _GAP) + height / 2 - 0.5 for i in range(len(rows))], [name for name, _ in rows]
    )
    middles = [j * (width + _GAP) + width / 2 - 0.5 for j in range(count)]
    ax.set_xticks(middles if columns is not None else [], list(columns) if columns is not None else [])
    ax.tick_params(length=0, labelsize="small" if new else None)
    for side in ax.spines.values():
        side.set_visible(False)
    return canvas.finish(ax, path)


def draw_strip(
    decode: Callable[[Tensor], Tensor],
    curve: Geodesic | Callable[[Tensor], Tensor],
    num: int = 10,
    *,
    straight: bool = False,
    ax: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """The images decoded at even steps along curves, a row each.

    Args:
        decode: ``z (n, d) -> images``, ``(n, C, H, W)`` or what else ``draw_rows`` shows; for instance the
            decoder's means.
        curve: a ``Geodesic`` of any batch, drawn at equal steps of its Euclidean length, or another function
            of times, ``t (T,) -> z (T, ..., d)``, drawn at equal times.
        num: images along a curve, both ends included.
        straight: adds a row for the straight line between the ends of each curve.
        ax: axes to draw on; ``None`` makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes.

    Raises:
        ValueError: fewer than two images, or a decoder whose values are no images.

    Source: figures 1.2 and 3.1 of the thesis.

    Example:
        >>> from riemvae.geometry import EuclideanMetric
        >>> from riemvae.geometry.geodesics import geodesic
        >>> curve = geodesic(EuclideanMetric(2), torch.zeros(2), torch.ones(2))
        >>> ax = draw_strip(lambda z: z[:, :1, None].expand(-1, 4, 4), curve, 5)
        >>> ax.images[0].get_array()[0, ::5].tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    check_count("num", num, 2)
    times = torch.linspace(0, 1, num)
    points = curve.evenly(times) if isinstance(curve, Geodesic) else curve(times)
    points = points.reshape(num, -1, points.shape[-1]).transpose(0, 1)  # (curves, num, d)
    share = times.to(points)[:, None]
    rows = []
    with torch.no_grad():
        for k, z in enumerate(points):
            which = f" {k + 1}" if len(points) > 1 else ""
            rows.append((f"curve{which}", decode(z)))
            if straight:
                rows.append((f"line{which}", decode(z[:1] + share * (z[-1:] - z[:1]))))
    return draw_rows(rows, [f"{t:.2g}" for t in times.tolist()], ax=ax, path=path)


def draw_overfitting(
    check: OverfittingCheck,
    generated: Any,
    train: Any,
    reconstructions: Any | None = None,
    *,
    num: int = 8,
    ax: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Draws above their nearest training image and their nearest reconstruction.

    Under each column stands the distance to the training image, as a multiple of the median distance that
    training images have to their nearest other one: far below 1 is a copy.

    Args:
        check: what ``overfitting_check`` said of the same images.
        generated: ``(n, ...)`` images; the first are shown.
        train: ``(N, ...)``.
        reconstructions: ``(R, ...)``, as given to ``overfitting_check``; ``None`` leaves their row out.
        num: draws to show.
        ax: axes to draw on; ``None`` makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes.

    Raises:
        ValueError: images of another number than the check's, or reconstructions without their distances.

    Source: figure 3.3 of the thesis.

    Example:
        >>> from riemvae.evaluation.overfitting import overfitting_check
        >>> train = torch.rand(9, 1, 4, 4)
        >>> ax = draw_overfitting(overfitting_check(train[:3], train), train[:3], train)
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['generated', 'nearest training']
    """
    check_count("num", num)
    for name, images, size in (
        ("generated", generated, len(check.train_distances)),
        ("train", train, len(check.leave_one_out)),
    ):
        if len(images) != size:
            raise argument_error(name, f"the {size} images that were checked", f"{len(images)}")
    num = min(num, len(generated))
    rows = [
        ("generated", canvas.array(generated)[:num]),
        ("nearest training", canvas.array(train)[canvas.array(check.train_indices[:num])]),
    ]
    if reconstructions is not None:
        if check.reconstruction_indices is None:
            raise argument_error("reconstructions", "None: the check was made without", reconstructions)
        index = canvas.array(check.reconstruction_indices[:num])
        rows.append(("nearest reconstruction", canvas.array(reconstructions)[index]))
    scale = float(check.leave_one_out.median())
    texts = [f"{float(distance) / (scale or 1.0):.2f}" for distance in check.train_distances[:num]]
    ax = draw_rows(rows, texts, ax=ax)
    unit = " / median among training images" if scale else ""  # 0 where most have an identical twin
    ax.set_xlabel(f"distance to the nearest training image{unit}", fontsize="small")
    return canvas.finish(ax, path)


def draw_overfitting_distances(
    check: OverfittingCheck,
    *,
    bins: int = 30,
    ax: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Histograms of the draws' distances to the training set, and of the training data's to each other.

    Args:
        check: what ``overfitting_check`` said.
        bins: of both.
        ax: axes to draw on; ``None`` makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes.

    Example:
        >>> from riemvae.evaluation.overfitting import overfitting_check
        >>> ax = draw_overfitting_distances(overfitting_check(torch.randn(20, 2), torch.randn(30, 2)))
        >>> ax.get_xlabel()
        'distance to the nearest training datum'
    """
    check_count("bins", bins)
    draws, others = canvas.array(check.train_distances), canvas.array(check.leave_one_out)
    edges = np.histogram_bin_edges(np.concatenate([draws, others]), bins)
    ax = canvas.axes(ax)
    ax.hist(others, edges, density=True, alpha=0.5, color="tab:gray", label="training data, one left out")
    ax.hist(draws, edges, density=True, histtype="step", color="tab:red", linewidth=1.5, label="draws")
    ax.set_xlabel("distance to the nearest training datum")
    ax.set_ylabel("density")
    ax.set_title(f"a draw is closer with chance {check.closer:.2f}", fontsize="medium")
    ax.legend(fontsize="small")
    return canvas.finish(ax, path)
