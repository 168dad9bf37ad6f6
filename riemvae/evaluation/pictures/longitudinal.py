"""Curves of sequences: latent paths, intervals over time, errors against the share missing."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from riemvae._checks import argument_error, check_choice
from riemvae.evaluation.pictures import canvas
from riemvae.evaluation.pictures.latent import _LEGEND_CLASSES, _colors

_MOST_SERIES = 12  # lines in one panel
_COLUMNS = 3  # panels side by side
_NAME_WIDTH = 32  # letters over a panel
_MARKERS = "osD^vP*X"


def draw_latent_trajectories(
    z: Any,
    labels: Any | None = None,
    *,
    times: Any | None = None,
    observed: Any | None = None,
    present: Any | None = None,
    plane: Sequence[int] | None = None,
    ax: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """The latent paths of subjects, an arrow from each visit to the next.

    Coloured by the subjects' labels (by their value where they are more than twelve numbers), or else by
    time. A ring is a subject's first visit. More than two dimensions are projected on the two principal axes
    of all points; the axes say how much of the variance they have.

    Args:
        z: ``(T, B, d)``, as ``LongitudinalVAE.trajectory`` returns it; ``d`` of at least 2. Those of an
            autoencoder of the zoo are ``(B, T, d)``: ``z.transpose(0, 1)``.
        labels: ``(B,)``; None colours by time.
        times: ``(T,)`` or ``(B, T)``, what arrows are coloured by, each by the time it starts; None is the
            number of the visit.
        observed: ``(B, T)`` boolean: unseen visits become small crosses; None draws none of them apart.
        present: ``(B, T)`` boolean, which visits are there at all (``Sequences.present``): paths leave out
            the others, which pad shorter sequences; None is all of them.
        plane: two coordinates to draw in place of principal axes.
        ax: axes to draw on; None makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes.

    Raises:
        ValueError: shapes that do not fit, a single visit, values that are not finite.

    Source: Chadebec (2023), figure 5.2.

    Example:
        >>> import torch
        >>> ax = draw_latent_trajectories(torch.randn(5, 3, 4).cumsum(0))
        >>> ax.get_xlabel().startswith("principal axis 1")
        True
    """
    points = canvas.array(z)
    if points.ndim != 3 or points.shape[0] < 2 or points.shape[2] < 2 or not points.size:
        raise argument_error("z", "paths (T, B, d) of two visits and two dimensions or more", points)
    if not np.isfinite(points).all():
        raise argument_error("z", "finite values", "NaN or infinite ones")
    visits, subjects, dim = points.shape
    clock = np.arange(visits) if times is None else canvas.array(times)
    if clock.shape not in ((visits,), (subjects, visits)):
        swapped = clock.shape in ((subjects,), (visits, subjects))
        hint = "z is (T, B, d): transpose(0, 1)" if swapped else ""
        raise argument_error("times", f"({visits},) or ({subjects}, {visits})", clock, hint)
    clock = np.broadcast_to(clock, (subjects, visits))
    classes = None if labels is None else canvas.array(labels)
    if classes is not None and classes.shape != (subjects,):
        hint = "z is (T, B, d): transpose(0, 1)" if classes.shape == (visits,) else ""
        raise argument_error("labels", f"one a subject, ({subjects},)", classes, hint)
    flat, texts = _flat(points, plane, dim)
    ax = canvas.axes(ax)
    start, step = flat[:-1].transpose(1, 0, 2), np.diff(flat, axis=0).transpose(1, 0, 2)  # (B, T - 1, 2)
    style = {
        "angles": "xy",
        "scale_units": "xy",
        "scale": 1.0,
        "units": "dots",
        "width": 1.6,
        "headwidth": 5.0,
        "headlength": 6.0,
        "headaxislength": 5.0,
        "minlength": 0.0,
        "zorder": 2.5,
    }
    there = np.ones((subjects, visits), bool) if present is None else canvas.array(present)
    check_mask("present", there, (subjects, visits))
    whole = there[:, :-1] & there[:, 1:]  # from each visit to the next
    arrows = (*start[whole].T, *step[whole].T)
    kinds = None if classes is None else np.unique(classes)
    if classes is None or kinds is None or (len(kinds) > _LEGEND_CLASSES and classes.dtype.kind in "iuf"):
        shown = clock if classes is None else np.broadcast_to(classes[:, None], clock.shape)
        drawn = ax.quiver(*arrows, shown[:, :-1][whole], cmap="viridis", **style)
        drawn.set_clim(float(shown.min()), float(shown.max()))
        name = "label" if classes is not None else "visit" if times is None else "time"
        canvas.colorbar(ax, drawn, name)
        rings = drawn.cmap(drawn.norm(shown[:, 0]))
    else:
        colors = np.array(_colors(len(kinds)))
        rings = colors[np.searchsorted(kinds, classes)]
        ax.quiver(*arrows, color=np.repeat(rings, whole.sum(1), 0), **style)
        for kind, color in zip(kinds, colors):
            ax.plot([], [], color=color, linewidth=2, label=f"{kind}")
    first = there[:, 0]
    ax.scatter(*flat[0, first].T, s=26, facecolors="white", edgecolors=rings[first], linewidths=1.3, zorder=3)
    if observed is not None:
        seen = canvas.array(observed)
        check_mask("observed", seen, (subjects, visits))
        places = flat.transpose(1, 0, 2)[~seen & there]
        style = {"s": 14, "marker": "x", "c": "0.25", "linewidths": 0.9, "zorder": 3.5}
        ax.scatter(*places.T, label="unseen", **style)
    if ax.get_legend_handles_labels()[0]:  # above: the search for the best place sees no arrows
        above = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
        ax.legend(ncols=6, fontsize="small", frameon=False, handlelength=1.2, columnspacing=1.2, **above)
    # A quiver does not tell the axes where its arrows end.
    ax.update_datalim(flat.reshape(-1, 2))
    ax.autoscale_view()
    ax.set_xlabel(texts[0])
    ax.set_ylabel(texts[1])
    ax.set_aspect("equal", adjustable="datalim")
    return canvas.finish(ax, path)


def draw_score_intervals(
    times: Any,
    scores: Any | None,
    mean: Any,
    lower: Any,
    upper: Any,
    observed: Any,
    *,
    names: Sequence[str] | None = None,
    score_names: Sequence[str] | None = None,
    by: str = "subject",
    axs: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """Posterior means and intervals of scores over time, a panel a subject, or a subject and score.

    Disks are the scores that the model was given, rings those that it was not. Over a panel stands how many
    of the latter their intervals hold.

    Args:
        times: ``(R, T)``, or ``(T,)`` for all.
        scores: what was measured, ``(R, T, f)`` or ``(R, T)`` of one score; NaN where it was not; None draws
            no points.
        mean: of the posterior, the shape of `scores`.
        lower: lower end of the interval, the same shape.
        upper: its upper end.
        observed: ``(R, T)`` boolean, which visits were given.
        names: of the subjects.
        score_names: of the scores.
        by: ``"subject"``: all its scores in one panel; ``"score"``: a row of panels a subject, a column a
            score with its own axis, for scores in units of their own.
        axs: axes to draw on, as many as are returned; None makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes, one a subject, or one a subject and score, subject by subject.

    Raises:
        ValueError: shapes that do not fit, or more than twelve scores.

    Example:
        >>> import torch
        >>> times, seen = torch.arange(4.0), torch.tensor([[True, False, True, False]])
        >>> mean = torch.zeros(1, 4)
        >>> axs = draw_score_intervals(times, mean + 0.5, mean, mean - 1, mean + 1, seen, names=["a"])
        >>> axs[0].get_title(loc="left"), axs[0].get_title(loc="right")
        ('a', '2 of 2 unseen inside')
    """
    middle, seen, clock = canvas.array(mean), canvas.array(observed), canvas.array(times)
    if middle.ndim not in (2, 3) or 0 in middle.shape:
        raise argument_error("mean", "scores (R, T) or (R, T, f)", middle)
    parts = {"lower": canvas.array(lower), "upper": canvas.array(upper)}
    if scores is not None:
        parts["scores"] = canvas.array(scores)
    for name, value in parts.items():
        if value.shape != middle.shape:
            raise argument_error(name, f"the shape of mean, {middle.shape}", value)
    if middle.ndim == 2:
        middle = middle[..., None]
        parts = {name: value[..., None] for name, value in parts.items()}
    shape = middle.shape[:2]
    check_mask("observed", seen, shape)
    if clock.shape not in (shape, shape[1:]):
        raise argument_error("times", f"({shape[1]},) or {shape}", clock)
    clock = np.broadcast_to(clock, shape)
    truth = parts.get("scores", np.full(middle.shape, np.nan))
    given = np.broadcast_to(seen[..., None], middle.shape)
    count = middle.shape[2]
    check_choice("by", by, ["subject", "score"])
    check_texts("names", names, shape[0], "names")
    check_texts("score_names", score_names, count, "names")
    whole = (truth, given, middle, parts["lower"], parts["upper"])
    cuts = [slice(None)] if by == "subject" else [slice(i, i + 1) for i in range(count)]
    panels = [Series(clock[r], *(part[r][:, cut] for part in whole)) for r in range(shape[0]) for cut in cuts]
    if by == "subject":
        axes = draw_series(panels, names, score_names, axs)
    else:
        pairs = [
            ", ".join(texts[i] for texts, i in ((names, r), (score_names, k)) if texts is not None)
            for r in range(shape[0])
            for k in range(count)
        ]
        axes = draw_series(panels, pairs if any(pairs) else None, None, axs, columns=count)
    if axs is None:
        axes[0].figure.supxlabel("time", fontsize="medium")
    canvas.finish(axes[0], path)
    return axes


def draw_imputation_error(
    errors: Mapping[str, Mapping[Any, Any]] | Iterable[Sequence[Any]],
    *,
    ylabel: str = "mean squared error of what is missing",
    xlabel: str = "share missing",
    log: bool = False,
    legend: bool = True,
    ax: Any | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Errors of imputation against the share missing, with intervals, a line a method.

    Args:
        errors: for each method ``{share: (mean, half width of the interval)}``, a number alone having no
            interval; or rows ``(method, share, mean, half width)``. Shares are numbers, or names of settings,
            which are drawn at even steps in the order in which they first come.
        ylabel: of the error.
        xlabel: of the shares.
        log: draws the errors on a logarithmic scale.
        legend: names the methods on the axes; False leaves that to a figure of several panels.
        ax: axes to draw on; None makes a figure.
        path: a file to write the figure to.

    Returns:
        The axes; ``ax.containers`` are the methods.

    Raises:
        ValueError: no method, a method without a share, or an entry that is no number or pair of numbers.

    Source: Chadebec (2023), figures 6.3 and 6.13.

    Example:
        >>> errors = {"flows": {0.2: (0.02, 0.001), 0.6: (0.03, 0.002)}, "VAE": {0.2: 0.05, 0.6: 0.08}}
        >>> ax = draw_imputation_error(errors)
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['flows', 'VAE']
    """
    table = _table(errors)
    shares = list(dict.fromkeys(share for entries in table.values() for share in entries))
    numbers = all(isinstance(share, (int, float)) for share in shares)
    places = {share: float(share) if numbers else float(k) for k, share in enumerate(shares)}
    known = sorted(places.values())
    apart = min(np.diff(known), default=1.0)
    # Side by side by a little, so that intervals do not hide each other.
    shift = 0.03 * apart if len(table) < 6 else 0.18 * apart / len(table)
    ax = canvas.axes(ax, (5.6, 3.8))
    for k, (method, entries) in enumerate(table.items()):
        order = sorted(entries, key=lambda share: places[share])
        x = np.array([places[share] for share in order]) + (k - (len(table) - 1) / 2) * shift
        mean, width = np.array([entries[share] for share in order]).T
        ax.errorbar(
            x,
            mean,
            yerr=None if np.isnan(width).all() else np.nan_to_num(width),
            color=_colors(len(table))[k],
            marker=_MARKERS[k % len(_MARKERS)],
            markersize=4.5,
            linewidth=1.4,
            capsize=2.5,
            label=method,
        )
    texts = [f"{share:g}" for share in sorted(shares)] if numbers else shares
    ax.set_xticks(known, texts)
    if len(known) == 1:  # methods stay side by side there
        ax.set_xlim(known[0] - 0.5 * apart, known[0] + 0.5 * apart)
    if not numbers and max(len(str(share)) for share in shares) > 12:
        ax.tick_params(axis="x", rotation=25)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    if log:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0.0)
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if legend:
        ax.legend(fontsize="small", frameon=False)
    return canvas.finish(ax, path)


class Series(NamedTuple):
    """What one panel shows of a subject.

    Attributes:
        times: ``(T,)``.
        points: ``(T, f)``, disks where seen and rings where not; NaN draws none.
        seen: ``(T, f)``.
        line: ``(T, f)``.
        lower: ``(T, f)``, lower end of a band, or None.
        upper: Its upper end.
    """

    times: np.ndarray
    points: np.ndarray
    seen: np.ndarray
    line: np.ndarray
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None


def draw_series(
    panels: Sequence[Series],
    names: Sequence[str] | None = None,
    score_names: Sequence[str] | None = None,
    axs: Any | None = None,
    columns: int | None = None,
) -> np.ndarray:
    """Lines over time with points and bands, a panel each; the axes.

    Panels share their vertical axis, or with ``columns`` those of a column do.
    """
    size = max(panel.line.shape[1] for panel in panels)
    if size > _MOST_SERIES:
        raise argument_error(
            "scores", f"at most {_MOST_SERIES} of them", f"{size}", "reshape images, or draw some of them"
        )
    check_texts("names", names, len(panels), "names")
    check_texts("score_names", score_names, size, "names")
    axes = _panels(len(panels), axs, columns)
    colors = _colors(size)
    for k, (ax, panel) in enumerate(zip(axes, panels)):
        order = np.argsort(panel.times, kind="stable")
        times = panel.times[order]
        for i in range(panel.line.shape[1]):
            points, seen = panel.points[order, i], panel.seen[order, i]
            if panel.lower is not None and panel.upper is not None:
                band = panel.lower[order, i], panel.upper[order, i]
                ax.fill_between(times, *band, color=colors[i], alpha=0.18, linewidth=0, zorder=1)
            label = score_names[i] if score_names is not None else None
            alone = np.flatnonzero(np.isfinite(panel.line[order, i]))
            if len(alone) == 1:  # of one point there is no line and no band
                _bar(ax, panel, order[alone], i, colors[i])
            ax.plot(times, panel.line[order, i], color=colors[i], linewidth=1.4, zorder=2, label=label)
            for group, face in ((seen, colors[i]), (~seen, "white")):
                ax.scatter(
                    times[group],
                    points[group],
                    s=24,
                    facecolors=[face],
                    edgecolors=[colors[i]],
                    linewidths=1.2,
                    zorder=3,
                )
        name = "" if names is None else textwrap.fill(names[k], _NAME_WIDTH)
        if panel.lower is not None and panel.upper is not None:
            inside = (panel.points >= panel.lower) & (panel.points <= panel.upper)
            asked = ~np.isnan(panel.points) & ~panel.seen
            if asked.any():
                text = f"{(inside & asked).sum()} of {asked.sum()} unseen inside"
                ax.set_title(text, fontsize="small", loc="right", color="0.35")
                if len(name) + len(text) > _NAME_WIDTH:  # one under the other
                    name += "\n"
        if name.strip():
            ax.set_title(name, fontsize="medium", loc="left")
    _legend(axes[0], panels, score_names is not None, beside=axs is None)
    return axes


def _bar(ax: Any, panel: Series, at: np.ndarray, i: int, color: Any) -> None:
    """The only value of a line, with its interval as a bar."""
    value, width = panel.line[at, i], None
    if panel.lower is not None and panel.upper is not None:
        width = np.stack([value - panel.lower[at, i], panel.upper[at, i] - value]).clip(0.0)
    ax.errorbar(panel.times[at], value, yerr=width, fmt="_", color=color, capsize=2.5, zorder=2)


def _legend(ax: Any, panels: Sequence[Series], named: bool, beside: bool) -> None:
    """Says which line is which score, and which points were seen where some were not.

    It stands beside the panels of a figure of our own, and in the first of given axes.
    """
    from matplotlib.lines import Line2D

    handles: list[Any] = ax.get_legend_handles_labels()[0] if named else []
    if any((np.isfinite(panel.points) & ~panel.seen).any() for panel in panels):
        style: dict[str, Any] = {
            "marker": "o",
            "linestyle": "none",
            "markeredgecolor": "0.3",
            "markersize": 5,
        }
        handles += [
            Line2D([], [], markerfacecolor="0.3", label="seen", **style),
            Line2D([], [], markerfacecolor="white", label="unseen", **style),
        ]
    if handles and beside:
        ax.figure.legend(handles=handles, fontsize="small", frameon=False, loc="outside right center")
    elif handles:
        ax.legend(handles=handles, fontsize="small", framealpha=0.8, edgecolor="none")


def _panels(count: int, axs: Any | None, columns: int | None) -> np.ndarray:
    if axs is not None:
        axes = np.ravel(axs)
        if len(axes) != count:
            raise argument_error("axs", f"{count} axes", f"{len(axes)} of them")
        return axes
    from matplotlib import pyplot

    shared: Any = True if columns is None else "col"
    columns = columns or (2 if count == 4 else min(count, _COLUMNS))
    rows = -(-count // columns)
    _, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(0.5 + 3.1 * columns, 0.4 + 2.2 * rows),
        layout="constrained",
        squeeze=False,
        sharey=shared,
    )
    for ax in grid.ravel():  # years as they are, and not as differences from one
        ax.ticklabel_format(axis="x", useOffset=False)
    for spare in grid.ravel()[count:]:
        spare.remove()
    return grid.ravel()[:count]  # type: ignore[no-any-return]


def _flat(points: np.ndarray, plane: Sequence[int] | None, dim: int) -> tuple[np.ndarray, tuple[str, str]]:
    """Points ``(..., d)`` in the plane, and what its axes are called."""
    if plane is not None or dim == 2:
        where = canvas.Plane(dim, plane)
        i, j = where.coordinates
        return where.project(points), (f"$z_{{{i + 1}}}$", f"$z_{{{j + 1}}}$")
    rows = points.reshape(-1, dim).astype(np.float64)
    centred = rows - rows.mean(0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    # Signs are chosen by the largest weight, so that the same paths give the same picture.
    axes = axes[:2]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    share = 100.0 * values[:2] ** 2 / max(float((values**2).sum()), np.finfo(float).tiny)
    texts = (f"principal axis 1 ({share[0]:.0f} %)", f"principal axis 2 ({share[1]:.0f} %)")
    return (centred @ axes.T).reshape(*points.shape[:2], 2), texts


def _table(errors: Any) -> dict[str, dict[Any, tuple[float, float]]]:
    table: dict[str, dict[Any, tuple[float, float]]] = {}
    if isinstance(errors, Mapping):
        rows = [
            (method, share, *np.atleast_1d(canvas.array(entry)).tolist())
            for method, entries in errors.items()
            for share, entry in entries.items()
        ]
        empty = [str(method) for method, entries in errors.items() if not entries]
    else:
        rows, empty = [tuple(row) for row in errors], []
    if not rows or empty:
        raise argument_error(
            "errors", "one share missing or more of each method", f"none of {empty or 'any'}"
        )
    for row in rows:
        numbers = row[2:]
        if len(numbers) not in (1, 2) or not all(np.isscalar(v) and np.isreal(v) for v in numbers):
            raise argument_error("errors", "a mean and a half width", f"{numbers} of {row[:2]}")
        width = float(numbers[1]) if len(numbers) == 2 else float("nan")
        table.setdefault(str(row[0]), {})[row[1]] = (float(numbers[0]), width)
    return table


def check_texts(name: str, texts: Sequence[str] | None, count: int, kind: str = "texts") -> None:
    """Refuses another number of texts."""
    if texts is not None and len(texts) != count:
        raise argument_error(name, f"{count} {kind}", f"{len(texts)}")


def check_mask(name: str, mask: np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuses what is no boolean mask of this shape."""
    if mask.dtype != np.bool_ or mask.shape != tuple(shape):
        raise argument_error(name, f"a boolean mask {tuple(shape)}", mask)
