"""Pictures of sequences: a row of images each, what was seen and what was filled in told by its frame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from riemvae._checks import argument_error
from riemvae.evaluation.pictures import canvas
from riemvae.evaluation.pictures.images import as_pictures
from riemvae.evaluation.pictures.longitudinal import Series, check_mask, check_texts, draw_series

_EMPTY = (0.98, 0.91, 0.84)  # pixels that are not known: no gray
SEEN, UNSEEN = "#1f77b4", "#ff7f0e"
_INCH = 0.72  # of an image
_GAP = 0.10  # between images, of their height
_ERROR_MAP = "inferno"
_MOST_DECIMALS = 4


def draw_sequences(
    x: Any,
    observed: Any | None = None,
    *,
    present: Any | None = None,
    row_labels: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    score_names: Sequence[str] | None = None,
    times: Any | None = None,
    limits: tuple[float, float] | None = None,
    seen_color: Any = SEEN,
    unseen_color: Any = UNSEEN,
    axs: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """Sequences of images, a row each: seen visits framed in one colour, unseen ones in another.

    Pixels that are NaN are left empty. Vectors ``(R, T, f)`` of a few numbers are drawn as lines, a panel a
    sequence: disks where a visit was seen, rings where it was not.

    Args:
        x: ``(R, T, *shape)``, images ``(H, W)``, ``(1, H, W)``, ``(3, H, W)``, volumes ``(1, D, H, W)``
            (their middle slice) or vectors ``(f,)``; or a list of these, groups drawn one under the other.
        observed: ``(R, T)`` boolean, or a list of these (an entry may be None); None draws no frames.
        present: likewise, which visits are there at all (``Sequences.present``): nothing is drawn in place of
            the others, which pad shorter sequences. None is all of them.
        row_labels: a name each row, of all groups in their order.
        names: a title each group.
        score_names: of the numbers of vectors.
        times: ``(T,)``, written under the columns; ``(R, T)``, written over each image; or a list of these.
        limits: the values drawn black and white, in all images alike; None is ``(0, 1)`` for values in it,
            (0, 255) for bytes, and else the least and the largest of all.
        seen_color: of the frames of seen visits.
        unseen_color: of the others.
        axs: axes to draw on, as many as are returned; None makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes: one a group for images, whose ``ax.images`` are the images row by row and ``ax.patches``
        their frames, and one a sequence for vectors.

    Raises:
        ValueError: shapes that do not fit, or vectors of more than twelve numbers.

    Source: Chadebec (2023), figures 6.2, 6.4 and 6.5.

    Example:
        >>> import torch
        >>> axs = draw_sequences(torch.rand(2, 5, 1, 8, 8), torch.rand(2, 5) < 0.5, row_labels=["a", "b"])
        >>> len(axs[0].images), len(axs[0].patches)
        (10, 10)
    """
    single = not isinstance(x, (list, tuple))
    groups = [canvas.array(x)] if single else [canvas.array(group) for group in x]
    masks = _per_group("observed", observed, len(groups), single)
    there = _per_group("present", present, len(groups), single)
    clocks = _per_group("times", times, len(groups), single)
    if not groups or any(g.ndim < 3 or 0 in g.shape for g in groups):
        raise argument_error(
            "x", "sequences (R, T, *shape), or a list of these", f"{[g.shape for g in groups]}"
        )
    for group, mask, known, clock in zip(groups, masks, there, clocks):
        if mask is not None:
            check_mask("observed", mask, group.shape[:2])
        if known is not None:
            check_mask("present", known, group.shape[:2])
        if clock is not None and clock.shape not in (group.shape[:2], group.shape[1:2]):
            raise argument_error("times", f"{group.shape[1:2]} or {group.shape[:2]}", clock)
    count = sum(len(group) for group in groups)
    check_texts("row_labels", row_labels, count)
    check_texts("names", names, len(groups))
    if all(group.ndim == 3 for group in groups):
        groups = [g if p is None else np.where(p[..., None], g, np.nan) for g, p in zip(groups, there)]
        return _lines(groups, masks, clocks, row_labels, names, score_names, axs, path)
    first = 0
    blocks = []
    span = _limits(limits, *groups)
    for k, (group, mask, known, clock) in enumerate(zip(groups, masks, there, clocks)):
        labels = None if row_labels is None else row_labels[first : first + len(group)]
        first += len(group)
        rows = [
            Row(
                "" if labels is None else labels[r],
                as_pictures(group[r]),
                None if mask is None else mask[r],
                span,
                texts=None if clock is None or clock.ndim == 1 else _texts(clock[r]),
                present=None if known is None else known[r],
            )
            for r in range(len(group))
        ]
        columns = None if clock is None or clock.ndim == 2 else _texts(clock)
        blocks.append(Block(rows, columns, None if names is None else names[k]))
    return paint(blocks, (seen_color, unseen_color), axs, path)


def draw_imputation(
    x: Any,
    imputed: Any,
    observed: Any,
    lower: Any | None = None,
    upper: Any | None = None,
    *,
    pixel_mask: Any | None = None,
    names: Sequence[str] | None = None,
    score_names: Sequence[str] | None = None,
    times: Any | None = None,
    limits: tuple[float, float] | None = None,
    seen_color: Any = SEEN,
    unseen_color: Any = UNSEEN,
    axs: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """What was there, what a model saw of it, what it filled in, and by how much that is wrong.

    Under each other: truth, seen (the rest empty), imputed (seen visits blue, unseen ones orange), the
    absolute error, and, where an interval is given, its width, both from black at 0 to the largest value,
    which stands beside. Over an image of the error stands the visit's root mean square one. Vectors ``(T,
    f)`` are drawn as lines in their intervals, as by ``draw_score_intervals``.

    Args:
        x: the truth, ``(T, *shape)`` of one subject or ``(R, T, *shape)`` of several; NaN where it is not
            known.
        imputed: the same shape.
        observed: ``(T,)`` or ``(R, T)``, boolean.
        lower: lower end of an interval of each value, of the shape of `x`.
        upper: its upper end.
        pixel_mask: which pixels of the seen visits were seen, of the shape of `x`, boolean; None: all.
        names: of the subjects.
        score_names: of the numbers of vectors.
        times: ``(T,)`` or ``(R, T)``, written under the columns.
        limits: the values drawn black and white, as in ``draw_sequences``.
        seen_color: of the frames of seen visits.
        unseen_color: of the others.
        axs: axes to draw on, one a subject; None makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes, one a subject; ``ax.images`` are the images row by row.

    Raises:
        ValueError: shapes that do not fit, one end of an interval without the other, or vectors of more than
            twelve numbers.

    Source: Chadebec (2023), figures 5.4 and 6.4.

    Example:
        >>> import torch
        >>> x = torch.rand(4, 1, 8, 8)
        >>> axs = draw_imputation(x, 0 * x, torch.tensor([True, False, True, False]))
        >>> [label.get_text()[:7] for label in axs[0].get_yticklabels()[:3]]
        ['truth', 'seen', 'imputed']
    """
    truth, seen = canvas.array(x), canvas.array(observed)
    if seen.ndim not in (1, 2) or truth.ndim <= seen.ndim:
        raise argument_error("observed", "a boolean mask (T,) or (R, T) of x (..., *shape)", seen)
    check_mask("observed", seen, truth.shape[: seen.ndim])
    if (lower is None) != (upper is None):
        raise argument_error("lower", "both ends of an interval or none", "one of them", "pass upper too")
    rest = {"imputed": imputed, "lower": lower, "upper": upper, "pixel_mask": pixel_mask}
    values = {name: canvas.array(value) for name, value in rest.items() if value is not None}
    for name, value in values.items():
        if value.shape != truth.shape:
            raise argument_error(name, f"the shape of x, {truth.shape}", value)
    clock = None if times is None else canvas.array(times)
    if clock is not None and clock.shape not in (seen.shape, seen.shape[-1:]):
        raise argument_error("times", f"the shape of observed, {seen.shape}, or one row of it", clock)
    if seen.ndim == 1:
        truth, seen = truth[None], seen[None]
        values = {name: value[None] for name, value in values.items()}
    count = len(truth)
    check_texts("names", names, count)
    if clock is not None:
        clock = np.broadcast_to(clock, seen.shape)
    known = np.broadcast_to(seen.reshape(*seen.shape, *([1] * (truth.ndim - 2))), truth.shape)
    if "pixel_mask" in values:
        check_mask("pixel_mask", values["pixel_mask"], truth.shape)
        known = known & values["pixel_mask"]
    if truth.ndim == 3:
        number = np.broadcast_to(np.arange(truth.shape[1]), seen.shape) if clock is None else clock
        band = [values.get("lower", [None] * count), values.get("upper", [None] * count)]
        panels = [Series(*parts) for parts in zip(number, truth, known, values["imputed"], *band)]
        return _series(panels, names, score_names, clock is not None, axs, path)
    blocks = []
    span = _limits(limits, truth, values["imputed"])
    for r in range(count):
        true = as_pictures(truth[r])
        given = as_pictures(np.where(known[r], truth[r].astype(float), np.nan))
        filled = as_pictures(values["imputed"][r])
        error = np.abs(filled - true)
        error = error.mean(-1) if error.ndim == 4 else error
        # Of all channels and slices, not only of what is drawn.
        square = (values["imputed"][r].astype(float) - truth[r]) ** 2
        typical = np.sqrt(square.reshape(len(square), -1).mean(1))
        top = _top(error)
        rows = [
            Row("truth", true, seen[r], span),
            Row("seen", given, seen[r], span),
            Row("imputed", filled, seen[r], span),
            Row(
                f"error\n(to {_short(top)})",
                error,
                None,
                (0.0, top),
                _ERROR_MAP,
                [_short(v) for v in typical],
            ),
        ]
        if "lower" in values:
            width = as_pictures(values["upper"][r]) - as_pictures(values["lower"][r])
            width = width.mean(-1) if width.ndim == 4 else width
            top = _top(width)
            rows.append(Row(f"interval\n(to {_short(top)})", width, None, (0.0, top), _ERROR_MAP))
        columns = None if clock is None else _texts(clock[r])
        blocks.append(Block(rows, columns, None if names is None else names[r]))
    return paint(blocks, (seen_color, unseen_color), axs, path)


def draw_generated_neighbours(
    generated: Any,
    nearest: Any,
    distances: Any | None = None,
    *,
    names: tuple[str, str] = ("generated", "nearest"),
    limits: tuple[float, float] | None = None,
    axs: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """Generated sequences, each over the training sequence that is nearest to it.

    A model that has learnt training sequences by heart shows them twice.

    Args:
        generated: ``(R, T, *shape)`` images.
        nearest: ``(R, T, *shape)``, such as ``train[nearest_sequences(generated, train).indices]``.
        distances: ``(R,)``, written over each pair.
        names: of the two rows of a pair.
        limits: the values drawn black and white, as in ``draw_sequences``.
        axs: axes to draw on, one a pair; None makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes, one a pair.

    Raises:
        ValueError: shapes that do not fit.

    Source: Chadebec (2023), figures 6.6 and 6.12.

    Example:
        >>> import torch
        >>> from riemvae.evaluation.sequence_neighbours import nearest_sequences
        >>> new, train = torch.rand(2, 3, 1, 8, 8), torch.rand(9, 3, 1, 8, 8)
        >>> near = nearest_sequences(new, train)
        >>> axs = draw_generated_neighbours(new, train[near.indices], near.distances)
        >>> len(axs), len(axs[0].images)
        (2, 6)
    """
    new, old = canvas.array(generated), canvas.array(nearest)
    if new.ndim < 4 or new.shape != old.shape or 0 in new.shape:
        raise argument_error("nearest", f"images of the shape of generated, {new.shape}", old)
    if len(names) != 2:
        raise argument_error("names", "two, of generated and nearest", f"{len(names)}")
    gaps = None if distances is None else canvas.array(distances)
    if gaps is not None and gaps.shape != (len(new),):
        raise argument_error("distances", f"one a pair, ({len(new)},)", gaps)
    span = _limits(limits, new, old)
    blocks = []
    for r, pair in enumerate(zip(new, old)):
        rows = [Row(name, as_pictures(images), None, span) for name, images in zip(names, pair)]
        blocks.append(Block(rows, None, None if gaps is None else f"distance {_short(gaps[r])}"))
    return paint(blocks, (SEEN, UNSEEN), axs, path)


class Row(NamedTuple):
    """A row of images.

    Attributes:
        name: Written beside it.
        images: ``(T, H, W)`` or ``(T, H, W, 3)``.
        seen: ``(T,)``, which frame each gets; None: no frame.
        limits: The values at the ends of the colours.
        colors: Name of a colour map, of images without colours of their own; None: gray.
        texts: ``T`` of them, over the images.
        present: ``(T,)``, which are drawn; None: all.
    """

    name: str
    images: np.ndarray
    seen: np.ndarray | None
    limits: tuple[float, float]
    colors: str | None = None
    texts: Sequence[str] | None = None
    present: np.ndarray | None = None


class Block(NamedTuple):
    """Rows that share their columns: their texts, and a title."""

    rows: Sequence[Row]
    columns: Sequence[str] | None
    title: str | None


def paint(
    blocks: Sequence[Block], frames: tuple[Any, Any], axs: Any | None, path: str | os.PathLike[str] | None
) -> np.ndarray:
    """Blocks under each other, one axes each, and a legend of the frames over the first."""
    from matplotlib.patches import Rectangle

    heights = [_height(block) for block in blocks]
    if axs is None:
        axes = _figure(blocks, heights)
    else:
        axes = np.ravel(axs)
        if len(axes) != len(blocks):
            raise argument_error("axs", f"{len(blocks)} axes", f"{len(axes)} of them")
    widest = max(_width(block) for block in blocks)
    for ax, block, height in zip(axes, blocks, heights):
        _paint_block(ax, block, (widest, height), frames)
    drawn = [
        seen if row.present is None else seen[row.present]
        for block in blocks
        for row in block.rows
        if (seen := row.seen) is not None
    ]
    if drawn:
        kinds = [kind for kind in (True, False) if any((seen == kind).any() for seen in drawn)]
        handles = [
            Rectangle((0, 0), 1, 1, fill=False, edgecolor=frames[0 if kind else 1], linewidth=1.8)
            for kind in kinds
        ]
        title = axes[0].get_title(loc="left")
        axes[0].legend(
            handles,
            ["seen" if kind else "unseen" for kind in kinds],
            loc="lower right" if title else "lower left",
            bbox_to_anchor=(1.0 if title else 0.0, 1.0),
            ncols=2,
            fontsize="small",
            frameon=False,
            borderaxespad=0.1,
            handlelength=1.0,
            handleheight=1.0,
        )
    canvas.finish(axes[0], path)
    return axes


# An image is one unit high; a row is that, a gap, and a line of text where it has texts.
_TEXT = 0.2


def _aspect(block: Block) -> float:
    height, width = block.rows[0].images.shape[1:3]
    return float(width / height)


def _width(block: Block) -> float:
    return len(block.rows[0].images) * (_aspect(block) + _GAP) - _GAP


def _height(block: Block) -> float:
    return sum(1.0 + _GAP + (_TEXT if row.texts is not None else 0.0) for row in block.rows) - _GAP


def _figure(blocks: Sequence[Block], heights: Sequence[float]) -> np.ndarray:
    from matplotlib import pyplot

    widest = max(_width(block) for block in blocks)
    letters = max(len(line) for block in blocks for row in block.rows for line in row.name.split("\n"))
    extra = [0.12 + 0.22 * (b.title is not None) + 0.2 * (b.columns is not None) for b in blocks]
    inches = [_INCH * height + more for height, more in zip(heights, extra)]
    _, axes = pyplot.subplots(
        len(blocks),
        1,
        figsize=(max(2.4, _INCH * widest + 0.2 + 0.075 * letters), 0.3 + sum(inches)),
        height_ratios=inches,
        layout="constrained",
        squeeze=False,
    )
    return axes[:, 0]  # type: ignore[no-any-return]


def _paint_block(ax: Any, block: Block, size: tuple[float, float], frames: tuple[Any, Any]) -> None:
    from matplotlib.patches import Rectangle

    width, count = _aspect(block), len(block.rows[0].images)
    lefts = [t * (width + _GAP) for t in range(count)]
    top, middles = 0.0, []
    for row in block.rows:
        if row.texts is not None:
            top += _TEXT
        for t, (left, picture) in enumerate(zip(lefts, _colored(row))):
            if row.present is not None and not row.present[t]:
                continue
            ax.imshow(picture, extent=(left, left + width, top + 1.0, top), interpolation="nearest")
            if row.seen is not None:
                color = frames[0 if row.seen[t] else 1]
                frame = Rectangle((left, top), width, 1.0, fill=False, edgecolor=color, linewidth=1.8)
                ax.add_patch(frame)
            if row.texts is not None:
                ax.text(left + width / 2, top, row.texts[t], ha="center", va="bottom", fontsize=6.5)
        middles.append(top + 0.5)
        top += 1.0 + _GAP
    ax.set_xlim(-0.04, size[0] + 0.04)  # of the widest block, so that all have one scale
    ax.set_ylim(size[1] + 0.04, -0.04)
    ax.set_aspect("equal")
    ax.set_yticks(middles, [row.name for row in block.rows])
    places = [left + width / 2 for left in lefts]
    ax.set_xticks(places if block.columns is not None else [], block.columns or [])
    ax.tick_params(length=0, labelsize="small")
    for side in ax.spines.values():
        side.set_visible(False)
    if block.title is not None:
        ax.set_title(block.title, fontsize="medium", loc="left")


def _colored(row: Row) -> np.ndarray:
    """The images of a row in red, green and blue, ``(T, H, W, 3)``, those of ``_EMPTY`` where NaN."""
    from matplotlib import colormaps

    low, high = row.limits
    share = np.clip((row.images - low) / (high - low), 0.0, 1.0)
    if share.ndim == 4 or row.colors is None:
        share = share if share.ndim == 4 else np.repeat(share[..., None], 3, -1)
        return np.where(np.isnan(share).any(-1, keepdims=True), np.array(_EMPTY), share)
    unknown = np.isnan(share)
    colors = colormaps[row.colors](np.where(unknown, 0.0, share))[..., :3]
    return np.where(unknown[..., None], np.array(_EMPTY), colors)


def _limits(limits: tuple[float, float] | None, *images: np.ndarray) -> tuple[float, float]:
    """The values drawn black and white in images that are compared."""
    if limits is not None:
        low, high = (float(limit) for limit in limits)
        if not low < high:
            raise argument_error("limits", "(low, high), low below high", str(tuple(limits)))
        return low, high
    if images[0].dtype == np.uint8:
        return 0.0, 255.0
    known = np.concatenate([a[np.isfinite(a)] for a in images])
    if not known.size or (known.min() >= 0.0 and known.max() <= 1.0):
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    return low, high if high > low else low + 1.0


def _top(values: np.ndarray) -> float:
    """The largest of values at least 0, or 1 where there is none above it."""
    known = values[np.isfinite(values)]
    return float(known.max()) if known.size and known.max() > 0 else 1.0


def _texts(times: np.ndarray) -> list[str]:
    """Times with as many decimals as tell them apart well: to a hundredth of their smallest distance."""
    known = times[np.isfinite(times)].astype(np.float64)
    distances = np.diff(np.unique(known))
    apart = float(distances.min()) if distances.size else 1.0
    for decimals in range(_MOST_DECIMALS + 1):
        if np.abs(known.round(decimals) - known).max(initial=0.0) <= 0.01 * apart:
            break
    texts = [f"{time:.{decimals}f}" for time in times.tolist()]
    return [text.rstrip("0").rstrip(".") if "." in text else text for text in texts]


def _short(value: float) -> str:
    if np.isnan(value):
        return ""
    return f"{value:.0f}" if 100 <= abs(value) < 1e5 else f"{value:.2g}"


def _per_group(name: str, values: Any, count: int, single: bool) -> list[np.ndarray | None]:
    if values is None:
        return [None] * count
    if single:
        return [canvas.array(values)]
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise argument_error(name, f"a list of {count}, one a group", values)
    return [None if value is None else canvas.array(value) for value in values]


def _lines(
    groups: Sequence[np.ndarray],
    masks: Sequence[np.ndarray | None],
    clocks: Sequence[np.ndarray | None],
    labels: Sequence[str] | None,
    names: Sequence[str] | None,
    score_names: Sequence[str] | None,
    axs: Any | None,
    path: str | os.PathLike[str] | None,
) -> np.ndarray:
    """Vectors as lines, a panel a sequence."""
    panels, titles = [], []
    for k, (group, mask, clock) in enumerate(zip(groups, masks, clocks)):
        seen = np.broadcast_to(True if mask is None else mask[..., None], group.shape)
        number = np.broadcast_to(np.arange(group.shape[1]) if clock is None else clock, group.shape[:2])
        panels += [Series(number[r], group[r], seen[r], group[r]) for r in range(len(group))]
        titles += [f"{names[k]} {r + 1}" if names is not None else "" for r in range(len(group))]
    timed = any(clock is not None for clock in clocks)
    return _series(panels, titles if labels is None else labels, score_names, timed, axs, path)


def _series(
    panels: Sequence[Series],
    names: Sequence[str] | None,
    score_names: Sequence[str] | None,
    timed: bool,
    axs: Any | None,
    path: str | os.PathLike[str] | None,
) -> np.ndarray:
    """Panels of lines, over times or numbers of visits."""
    axes = draw_series(panels, names, score_names, axs)
    if axs is None:
        axes[0].figure.supxlabel("time" if timed else "visit", fontsize="medium")
    canvas.finish(axes[0], path)
    return axes
