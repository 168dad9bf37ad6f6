"""Pictures of estimates and of what they are worth: k̂, comparisons, calibration, predictive checks."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from riemvae._checks import argument_error, check_count
from riemvae.evaluation.pictures import canvas
from riemvae.inference.calibration import Calibration
from riemvae.inference.comparison import Comparison
from riemvae.inference.likelihood import KHAT_LIMIT, LogLikelihood
from riemvae.inference.predictive import PredictiveCheck

# Below the first the estimate converges fast, above the second it is not to be trusted (Vehtari et al.).
_KHAT_GOOD = 0.5
_COLOURS = {"good": "C0", "fair": "C1", "bad": "C3"}
_AXES_WIDTH = 6.4  # inches, of a comparison, without long names
_LONGEST = 30  # letters of a name below the axes
_MOST = 12  # quantities in one figure
# Below this a tail is as good as none: drawn there, so that one exact datum does not set the scale.
_LOWEST = -1.0


def draw_khat(
    estimates: LogLikelihood, *, axs: Any | None = None, path: str | os.PathLike[str] | None = None
) -> np.ndarray:
    """The Pareto ``k̂`` of each datum with the limits 0.5 and 0.7, and beside it against the sample size.

    Above 0.7 an estimate and its error are not to be trusted. Data without a known k̂ are left out and
    counted.

    Args:
        estimates: The result of ``log_likelihood``.
        axs: Two axes to draw on; None makes a figure.
        path: A file to write the figure to.

    Returns:
        The two axes: ``k̂`` by datum, and the effective sample size by ``k̂``.

    Raises:
        ValueError: Where no k̂ is known, because there were too few samples.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry (2024), section 3.

    Example:
        >>> import torch
        >>> from riemvae.inference import LogLikelihood
        >>> one = torch.ones(50)
        >>> ll = LogLikelihood(-one, 0.1 * one, 30 * one, torch.rand(50), 100, 0 * one, 4)
        >>> draw_khat(ll).shape
        (2,)
    """
    khat, ess = canvas.array(estimates.khat), canvas.array(estimates.ess)
    known = ~np.isnan(khat)
    if not known.any():
        raise argument_error("estimates", "k̂ of some data", "none", "take 25 samples or more")
    shown = np.clip(khat, _LOWEST, None)
    top = float(np.max(shown[known & np.isfinite(shown)], initial=KHAT_LIMIT))
    shown = np.where(np.isposinf(shown), top + 0.3, shown)
    groups = {
        f"$\\hat{{k}} \\leq {_KHAT_GOOD}$": (known & (khat <= _KHAT_GOOD), "good"),
        f"up to {KHAT_LIMIT}": (known & (khat > _KHAT_GOOD) & (khat <= KHAT_LIMIT), "fair"),
        f"above {KHAT_LIMIT}": (known & (khat > KHAT_LIMIT), "bad"),
    }
    left, right = _pair(axs)
    index = np.arange(len(khat))
    size = float(np.clip(2000.0 / len(khat), 3.0, 18.0))
    for label, (rows, colour) in groups.items():
        if rows.any():
            text = f"{label}: {100.0 * rows.sum() / known.sum():.1f} %"
            style = {"s": size, "color": _COLOURS[colour], "linewidths": 0}
            left.scatter(index[rows], shown[rows], label=text, **style)
            right.scatter(shown[rows], ess[rows], **style)
    for limit, colour in ((_KHAT_GOOD, "fair"), (KHAT_LIMIT, "bad")):
        left.axhline(limit, color=_COLOURS[colour], linewidth=0.9, linestyle="--", zorder=0.5)
        right.axvline(limit, color=_COLOURS[colour], linewidth=0.9, linestyle="--", zorder=0.5)
    unknown = int((~known).sum())
    left.set_xlabel("datum" + (f" ({unknown} without $\\hat{{k}}$)" if unknown else ""))
    left.set_ylabel("$\\hat{k}$")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize="small", frameon=False)
    right.set_xlabel("$\\hat{k}$")
    right.set_ylabel(f"effective sample size of {estimates.num_samples}")
    right.set_yscale("log")
    right.set_ylim(0.8, 1.25 * estimates.num_samples)
    canvas.finish(left, path)
    return np.array([left, right])


def draw_comparison(
    comparison: Comparison, *, ax: Any | None = None, path: str | os.PathLike[str] | None = None
) -> Any:
    """Each model's mean difference to the best one, its 95 % interval, and Monte Carlo's part of it, thick.

    Models with estimates above ``k̂ = 0.7`` are marked: theirs are too low by an unknown amount.

    Args:
        comparison: The result of ``compare``.
        ax: Axes to draw on; None makes a figure.
        path: A file to write the figure to.

    Returns:
        The axes, the best model on top.

    Example:
        >>> import torch
        >>> from riemvae.inference.comparison import compare
        >>> ax = draw_comparison(compare({"a": torch.randn(50), "b": torch.randn(50) - 1}))
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['a', 'b']
    """
    rows = comparison.rows
    if ax is None:
        ax = canvas.axes(None, (_AXES_WIDTH, 1.2 + 0.42 * len(rows)))
        _widen(ax.figure, [row.name for row in rows])
    for place, row in enumerate(rows):
        doubtful = row.khat_share > 0
        colour = _COLOURS["bad"] if doubtful else "0.15" if place == 0 else _COLOURS["good"]
        if place:
            ax.plot(row.interval, (place, place), color=colour, linewidth=1.4, solid_capstyle="butt")
            if math.isfinite(row.mcse):
                ends = (row.difference - 1.96 * row.mcse, row.difference + 1.96 * row.mcse)
                ax.plot(ends, (place, place), color=colour, linewidth=4.5, alpha=0.45, solid_capstyle="butt")
        ax.plot(row.difference, place, "o", color=colour, markersize=5)
        text = f"{row.mean:.2f}" if place == 0 else f"{row.difference:+.2f} ± {row.stderr:.2f}"
        if doubtful:
            text += f"   $\\hat{{k}}>{KHAT_LIMIT}$: {100 * row.khat_share:.1f} %"
        ax.annotate(
            text,
            (row.difference, place),
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    ax.axvline(0.0, color="0.6", linewidth=0.8, zorder=0.5)
    ax.set_yticks(range(len(rows)), [row.name for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.75)
    ax.margins(x=0.12)
    ax.set_xlabel(
        f"difference in $\\log p(x)$ to {_shortened(comparison.best)!r}, nats a datum "
        f"({comparison.num_data} data)"
    )
    return canvas.finish(ax, path)


def draw_calibration(
    calibration: Calibration, *, most: int = _MOST, path: str | os.PathLike[str] | None = None
) -> np.ndarray:
    """Histograms of ranks, and below each the ECDF minus the diagonal in the band of uniform ranks.

    A curve that leaves the band is not uniform at the calibration's level; red quantities are rejected by
    Holm's method over all. The band of a histogram is that of a single bin.

    Args:
        calibration: The result of ``simulation_based_calibration``.
        most: Quantities drawn at most; of more, those with the smallest p-values.
        path: A file to write the figure to.

    Returns:
        The axes, two rows.

    Source: Säilynoja, Bürkner and Vehtari (2022), figure 1; Talts et al. (2018) for the histogram.

    Example:
        >>> import torch
        >>> from riemvae.inference.calibration import Calibration, CalibratedQuantity
        >>> fine = CalibratedQuantity("z[0]", 0.5, 0.5, 0.5, 0.1, 0.2, "as uniform")
        >>> ranks = torch.randint(20, (200, 1))
        >>> draw_calibration(Calibration(ranks, 19, 10, 0.05, (fine,), torch.zeros(200))).shape
        (2, 1)
    """
    from matplotlib import pyplot
    from scipy import stats

    check_count("most", most)
    quantities = calibration.quantities
    chosen = sorted(range(len(quantities)), key=lambda i: quantities[i].adjusted)[:most]
    columns = sorted(chosen)
    figure, axs = pyplot.subplots(
        2,
        len(columns),
        figsize=(0.6 + 2.5 * len(columns), 4.4),
        layout="constrained",
        squeeze=False,
        sharey="row",
    )
    counts, num = canvas.array(calibration.histogram()), len(calibration)
    law = stats.binom(num, 1.0 / calibration.num_bins)
    low, high = law.ppf(0.5 * calibration.level), law.ppf(1.0 - 0.5 * calibration.level)
    places, ecdf, lower, upper = (canvas.array(values) for values in calibration.ecdf())
    middles = (np.arange(calibration.num_bins) + 0.5) / calibration.num_bins
    ends = np.concatenate([[0.0], places, [1.0]])
    for column, index in enumerate(columns):
        quantity = quantities[index]
        colour = _COLOURS["bad"] if quantity.adjusted < calibration.level else _COLOURS["good"]
        top, bottom = axs[:, column]
        top.axhspan(low, high, color="0.88", zorder=0.4)
        top.axhline(num / calibration.num_bins, color="0.6", linewidth=0.8, zorder=0.5)
        top.bar(middles, counts[:, index], 0.92 / calibration.num_bins, color=colour, alpha=0.75)
        top.set_title(f"{quantity.name}\np = {quantity.p_value:.2g}", fontsize="medium")
        difference = np.concatenate([[0.0], ecdf[:, index] - places, [0.0]])
        band = [np.concatenate([[0.0], side - places, [0.0]]) for side in (lower, upper)]
        bottom.fill_between(ends, *band, color="0.88", zorder=0.4)
        bottom.axhline(0.0, color="0.6", linewidth=0.8, zorder=0.5)
        bottom.plot(ends, difference, color=colour, linewidth=1.5)
        bottom.set_xlabel("rank of the truth / draws")
        for ax in (top, bottom):
            ax.set_xlim(0.0, 1.0)
            ax.set_xticks([0.0, 0.5, 1.0], ["0", "½", "1"])
    axs[0, 0].set_ylabel("simulations")
    axs[1, 0].set_ylabel("ECDF - uniform")
    if path is not None:
        canvas.write_figure(figure, path)
    return axs  # type: ignore[no-any-return]


def draw_predictive_check(
    check: PredictiveCheck, *, axs: Any | None = None, path: str | os.PathLike[str] | None = None
) -> np.ndarray:
    """The statistic over the set as predicted and as observed, and each datum's tail probability.

    Args:
        check: The result of ``predictive_check``.
        axs: Two axes to draw on; None makes a figure.
        path: A file to write the figure to.

    Returns:
        The two axes.

    Source: Gelman et al. (2013), figure 6.5.

    Example:
        >>> import torch
        >>> from riemvae.inference.predictive import PredictiveCheck
        >>> check = PredictiveCheck(torch.randn(50), torch.randn(100, 50), torch.rand(50), 0.4, "x")
        >>> draw_predictive_check(check).shape
        (2,)
    """
    predicted = canvas.array(check.predicted).mean(1)
    observed = np.atleast_2d(canvas.array(check.observed)).mean(1)
    left, right = _pair(axs)
    bins = np.histogram_bin_edges(
        np.concatenate([predicted, observed]), bins=min(40, 5 + len(predicted) // 10)
    )
    left.hist(predicted, bins=bins, color=_COLOURS["good"], alpha=0.75, label="predicted")
    if len(observed) == 1:
        left.axvline(observed[0], color="0.1", linewidth=1.8, label="observed")
    else:
        left.hist(observed, bins=bins, color="0.1", histtype="step", linewidth=1.5, label="observed")
    left.set_xlabel(f"mean of the statistic of {check.name!r} over {len(check)} data")
    left.set_ylabel("draws")
    left.set_title(f"$P(T(\\tilde{{x}}) \\geq T(x))$ = {check.set_p_value:.3f}", fontsize="medium")
    left.legend(loc="best", fontsize="small", framealpha=0.9)
    values = canvas.array(check.p_value)
    right.hist(values, bins=np.linspace(0.0, 1.0, 21), color=_COLOURS["good"], alpha=0.75)
    right.axhline(len(check) / 20, color="0.6", linewidth=0.8, zorder=0.5)
    right.set_xlim(0.0, 1.0)
    right.set_xlabel("tail probability of a datum")
    right.set_ylabel("data")
    right.set_title(f"{100 * check.extreme:.0f} % of the data in the outer 5 %", fontsize="medium")
    canvas.finish(left, path)
    return np.array([left, right])


def _widen(figure: Any, names: Sequence[str]) -> None:
    """Gives names of more than a few letters room of their own beside the axes."""
    from matplotlib import rcParams
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    widths = []
    for name in names:
        text = Text(text=name, fontsize=rcParams["ytick.labelsize"])
        text.set_figure(figure)
        widths.append(text.get_window_extent(renderer).width / figure.dpi)
    figure.set_figwidth(_AXES_WIDTH + max(0.0, max(widths) - 0.3))


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def _pair(axs: Any | None) -> tuple[Any, Any]:
    """Two axes: as given, or of a new figure."""
    if axs is not None:
        given = list(np.ravel(axs))
        if len(given) != 2:
            raise argument_error("axs", "two axes", f"{len(given)} of them")
        return given[0], given[1]
    from matplotlib import pyplot

    left, right = pyplot.subplots(1, 2, figsize=(9.4, 3.9), layout="constrained")[1]
    return left, right
