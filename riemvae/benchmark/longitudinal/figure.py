"""The results as pictures."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from riemvae.benchmark.longitudinal.columns import COLUMNS
from riemvae.benchmark.longitudinal.models import MODELS
from riemvae.benchmark.longitudinal.settings import Settings
from riemvae.benchmark.longitudinal.table import Row, best_imputer, our_imputer
from riemvae.evaluation.pictures.canvas import write_figure
from riemvae.evaluation.pictures.longitudinal import draw_imputation_error

_WIDTH, _PANEL = 6.0, 3.8


def draw(settings: Settings, table: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """A panel a group of experiments (error against the share missing), and a panel a number of the others.

    Bars are one standard error over seeds.
    """
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(e.group for e in settings.experiments if e.group))
    single = [
        (e, name)
        for e in settings.experiments
        if not e.group
        for name in (
            "nll_tight",
            "nll_held_out",
            "mse_held_out_mean",
            "ari_motion",
            "ari",
            "filled",
            "spearman_time",
        )
        if any(row.experiment == e.name and _number(row, name, e.ours) is not None for row in table)
    ]
    count = len(groups) + len(single)
    if not count:
        return
    columns = min(2, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(_WIDTH * columns, _PANEL * lines), layout="constrained")
    panels = iter(figure.subplots(lines, columns, squeeze=False).ravel())
    handles: dict[str, Any] = {}
    for group in groups:
        ax = next(panels)
        _against_share(ax, group, settings, table)
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
    if handles:  # one for all panels, under them: their lines leave no room
        figure.legend(
            [*handles.values()],
            [*handles],
            loc="outside lower center",
            ncols=4,
            frameon=False,
            fontsize="small",
        )
    for experiment, name in single:
        _by_model(
            next(panels),
            experiment.title,
            name,
            [r for r in table if r.experiment == experiment.name],
            experiment.ours,
        )
    for ax in panels:
        ax.axis("off")
    write_figure(figure, path)


def _number(row: Row, name: str, ours: str) -> tuple[float, float] | None:
    """Mean and error; ``"filled"`` is the error of what a model fills in."""
    if name == "filled":
        chosen = our_imputer(row) if row.model == ours else best_imputer(row)
        return None if chosen is None else row.numbers[chosen]
    return row.numbers.get(name)


def _against_share(ax: Any, group: str, settings: Settings, table: Sequence[Row]) -> None:
    errors: dict[str, dict[float, tuple[float, float]]] = {}
    for experiment in settings.experiments:
        if experiment.group != group:
            continue
        for row in table:
            pair = _number(row, "filled", experiment.ours) if row.experiment == experiment.name else None
            if pair is not None:
                errors.setdefault(MODELS[row.model].title, {})[experiment.share] = pair
    if errors:
        draw_imputation_error(errors, legend=False, ax=ax)
    ax.set_title(group, fontsize="medium", loc="left")


def _by_model(ax: Any, title: str, name: str, table: Sequence[Row], ours: str) -> None:
    shown = [(row, pair) for row in table if (pair := _number(row, name, ours)) is not None]
    if name.startswith("nll"):  # of another model of the noise: on another scale
        shown = [(row, pair) for row, pair in shown if MODELS[row.model].scale is None]
    places = np.arange(len(shown))[::-1]
    for place, (row, (mean, error)) in zip(places, shown):
        color = "tab:red" if row.model == ours else "0.25"
        ax.errorbar(mean, place, xerr=None if np.isnan(error) else error, fmt="o", color=color, capsize=2.5)
    ax.set_yticks(places, [MODELS[row.model].title for row, _ in shown], fontsize="small")
    ax.set_xlabel("MSE of what is filled in" if name == "filled" else COLUMNS[name].heading)
    ax.set_title(textwrap.shorten(title, 60, placeholder="…"), fontsize="medium", loc="left")
    ax.grid(axis="x", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
