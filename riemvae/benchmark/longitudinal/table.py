"""Results over seeds: a table an experiment, paired differences, and all numbers as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table
from scipy.stats import t as student

from riemvae.benchmark.longitudinal.columns import COLUMNS
from riemvae.benchmark.longitudinal.models import MODELS
from riemvae.benchmark.longitudinal.settings import PUBLISHED, REFERENCES, Experiment, Settings
from riemvae.benchmark.table import mean_and_error
from riemvae.data.sequences import SPLITS

LEVEL = 0.95

_TIMES = ("epoch_cpu_seconds", "epoch_wall_seconds", "best_epoch")

Results = Sequence[Mapping[str, Any]]


class Row(NamedTuple):
    """One model's numbers in one experiment, over its seeds.

    Attributes:
        experiment: Its name.
        model: Its name.
        seeds: Those that have ended.
        numbers: Mean and standard error over seeds, by the names of :data:`COLUMNS`.
    """

    experiment: str
    model: str
    seeds: list[int]
    numbers: dict[str, tuple[float, float]]


class Difference(NamedTuple):
    """How much larger another model's number is than ours; above zero ours is the better.

    Attributes:
        experiment: Its name.
        model: The other.
        number: What is compared.
        of_model: Which number of the other: of imputation errors that of its best imputer on these very data.
        mean: The difference.
        subjects: A 95 % interval over test subjects, of the mean over seeds.
        seeds: A 95 % interval over seeds; NaN for fewer than two.
    """

    experiment: str
    model: str
    number: str
    of_model: str
    mean: float
    subjects: tuple[float, float]
    seeds: tuple[float, float]


def rows(results: Results) -> list[Row]:
    """One row a model and experiment, in the order in which they come."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["experiment"], result["model"]), []).append(result)
    made = []
    for (experiment, model), members in groups.items():
        numbers = {}
        for name in COLUMNS:
            values = [m[name] if name in _TIMES else m["numbers"].get(name) for m in members]
            # A kept result has null for NaN.
            present = [math.nan if value is None else float(value) for value in values]
            if any(not math.isnan(value) for value in present):
                numbers[name] = mean_and_error(present)
        made.append(Row(experiment, model, [m["seed"] for m in members], numbers))
    return made


def imputers(row: Row) -> dict[str, float]:
    """The errors of what each imputer of a model fills in."""
    found = {}
    for name, (mean, _) in row.numbers.items():
        filled = name == "mse_map" or (name.startswith("mse_") and name.endswith("_mean"))
        if filled and "held_out" not in name:
            found[name] = mean
    return found


def our_imputer(row: Row) -> str | None:
    """The imputer that stands for our model: the default one where it was measured, not its luckiest."""
    found = imputers(row)
    for name in ("mse_importance_mean", "mse_guide_mean"):
        if name in found:
            return name
    return next(iter(found), None)


def best_imputer(row: Row) -> str | None:
    """The imputer of a model with the smallest error on the test data themselves."""
    found = imputers(row)
    return min(found, key=lambda name: found[name]) if found else None


def differences(experiment: Experiment, results: Results) -> list[Difference]:
    """Our model against every other, subject by subject."""
    mine = [r for r in results if r["experiment"] == experiment.name]
    table = {row.model: row for row in rows(mine)}
    if experiment.ours not in table:
        return []
    ours = [r for r in mine if r["model"] == experiment.ours]
    made = []
    for model, row in table.items():
        if model == experiment.ours:
            continue
        theirs = [r for r in mine if r["model"] == model]
        pairs = [
            (name, name)
            for name, column in COLUMNS.items()
            if column.compared
            and name in row.numbers
            and not (name.startswith("nll") and _has_own_scale(model))
        ]
        names = our_imputer(table[experiment.ours]), best_imputer(row)
        if names[0] is not None and names[1] is not None:
            pairs.append((names[0], names[1]))
        made += [
            Difference(experiment.name, model, a, b, *_paired(ours, theirs, a, b))
            for a, b in pairs
            if all(a in r["subjects"] for r in ours)
        ]
    return made


def _has_own_scale(model: str) -> bool:
    return MODELS[model].scale is not None


def _paired(
    ours: Results, theirs: Results, our_name: str, their_name: str
) -> tuple[float, tuple[float, float], tuple[float, float]]:
    """The mean difference, and its intervals over subjects and over seeds."""
    mine = np.array([r["subjects"][our_name] for r in ours], float)
    other = np.array([r["subjects"][their_name] for r in theirs], float)
    weights = np.array(ours[0]["weights"].get(our_name, np.ones(mine.shape[1])), float)
    weights = weights / weights.sum()
    gap = other.mean(0) - mine.mean(0)
    mean = float(weights @ gap)
    # Of a weighted mean, by its influence on each subject.
    count = int((weights > 0).sum())
    error = math.sqrt(float(np.square(weights * (gap - mean)).sum()) * count / max(1, count - 1))
    seeds = math.nan, math.nan
    number = min(len(mine), len(other))
    if number > 1:
        spread = sum(np.var(part @ weights, ddof=1) / len(part) for part in (mine, other))
        seeds = _interval(mean, math.sqrt(spread), number - 1)
    return mean, _interval(mean, error, count - 1), seeds


def _interval(mean: float, error: float, freedom: int) -> tuple[float, float]:
    if freedom < 1:
        return math.nan, math.nan
    half = float(student.ppf(0.5 + 0.5 * LEVEL, freedom)) * error
    return mean - half, mean + half


# -- text ----------------------------------------------------------------------------------------------------


def headings(experiment: Experiment, table: Sequence[Row]) -> list[str]:
    """The numbers that any model of an experiment has."""
    there = {name for row in table if row.experiment == experiment.name for name in row.numbers}
    there |= {"published"} if _published(experiment) else set()
    return [name for name in COLUMNS if name in there]


def _published(experiment: Experiment) -> Mapping[str, float]:
    """What was published for as many training sequences."""
    data = experiment.data
    if "likelihood" not in experiment.measures or data.sizes[0] != SPLITS.get(data.name, (0,))[0]:
        return {}
    return PUBLISHED.get(data.name, {})


def cell(name: str, pair: tuple[float, float] | None) -> str:
    """A mean with its standard error over seeds, as text.

    Example:
        >>> cell("nll", (732.123, 0.456)), cell("mse_map", (0.02, float("nan"))), cell("nll", None)
        ('732.12 ± 0.46', '0.0200', '')
    """
    if pair is None or math.isnan(pair[0]):
        return ""
    digits = COLUMNS[name].digits
    error = "" if math.isnan(pair[1]) else f" ± {pair[1]:.{digits}f}"
    return f"{pair[0]:.{digits}f}{error}"


def table_rows(experiment: Experiment, table: Sequence[Row]) -> list[list[str]]:
    """Title, seeds and numbers of each model of an experiment as text, references last."""
    names = headings(experiment, table)
    published = _published(experiment)
    made = []
    for row in table:
        if row.experiment != experiment.name:
            continue
        numbers = dict(row.numbers)
        if row.model in published:
            numbers["published"] = published[row.model], math.nan
        cells = [cell(name, numbers.get(name)) for name in names]
        made.append([MODELS[row.model].title, str(len(row.seeds)), *cells])
    for title, values in REFERENCES.get(experiment.name, {}).items():
        cells = [cell(name, (values[name], math.nan) if name in values else None) for name in names]
        made.append([title, "", *cells])
    return made


def conditions(experiment: Experiment, settings: Settings) -> str:
    """How the numbers of an experiment came about, in a paragraph."""
    e, data = experiment, experiment.data
    train, val, test = data.sizes
    networks = f"{e.architecture} networks" + (f" {'-'.join(map(str, e.hidden))}" if e.hidden else "")
    scale = {"learned": "one learned scale", "pixel": "a learned scale a pixel"}
    rate = f"Adam {e.learning_rate:g}"
    if e.milestones:
        rate += f", times {e.decay:g} after epochs {', '.join(map(str, e.milestones))}"
    parts = [
        f"{train:,} training, {val:,} validation and {test:,} test sequences of {data.num_visits} visits;",
        f"{networks}, d = {e.latent_dim}, Gaussian of",
        f"{scale.get(str(e.scale), f'scale {e.scale:g}' if isinstance(e.scale, float) else '')};",
        f"{rate}, batches of {e.batch_size}, {e.epochs} epochs (the warm-up among them), the weights of the",
        "best validation loss.",
    ]
    if data.missing_visits or data.missing_pixels:
        parts.append(
            "Missing in all three parts, the same for all models: "
            f"visits {data.missing_visits:g}, pixels of seen visits {data.missing_pixels:g}; "
            "the objective is of what is seen."
        )
    if "likelihood" in e.measures:
        parts.append(
            f"NLL: {settings.num_samples} importance samples a sequence, "
            f"the tighter one {settings.num_mixture} over all anchors."
        )
    if "imputation" in e.measures:
        of_each = {
            "naive": f"naive and algorithm 7 {settings.num_draws} draws a subject",
            "importance": f"importance and guide {settings.num_importance}",
            "map": f"MAP {settings.num_starts} starts",
            "hmc": f"HMC {settings.num_chains} chains with {settings.num_hmc} draws in all after "
            f"{settings.hmc_warmup} transitions of {settings.num_leapfrog} steps each",
        }
        told = ", ".join(text for name, text in of_each.items() if name in e.methods)
        parts.append(f"Imputers: {told}; without observation noise.")
    if "held_out" in e.measures:
        parts.append(f"Intervals: {100 * settings.level:.0f} %. Times have mean 0 and deviation 1.")
    own = [MODELS[name].title for name in e.models if _has_own_scale(name)]
    if own:
        parts.append(
            f"{', '.join(own)}: a scale of its own; its likelihood is of another model of the noise and "
            "does not compare, its imputation does."
        )
    parts.append("± is one standard error over trainings with different seeds.")
    return " ".join(parts)


def markdown(
    settings: Settings, table: Sequence[Row], compared: Sequence[Difference], failures: Results = ()
) -> str:
    """Everything as Markdown: tables, conditions, what the columns mean, differences."""
    lines = []
    for experiment in settings.experiments:
        names = headings(experiment, table)
        body = table_rows(experiment, table)
        if not body:
            continue
        lines += [f"## {experiment.title}", ""]
        lines += _grid(["model", "seeds", *(COLUMNS[name].heading for name in names)], body)
        lines += ["", conditions(experiment, settings), ""]
        mine = [d for d in compared if d.experiment == experiment.name]
        if mine:
            ours = MODELS[experiment.ours].title
            lines += [
                f"Differences to {ours}; above zero it is the better one. Subject by subject on the same "
                "test data; intervals of 95 %. An imputation error is of what is filled in: "
                f"of {ours} by its default imputer, of another model by whichever of its imputers is best on "
                "these very test data.",
                "",
            ]
            lines += _grid(
                ["model", "number", "difference", "over subjects", "over seeds"], map(_shown, mine)
            )
            lines.append("")
    used = [name for name in COLUMNS if any(name in headings(e, table) for e in settings.experiments)]
    lines += ["## What the columns are", ""]
    lines += [f"- **{COLUMNS[name].heading}**: {COLUMNS[name].meaning}." for name in used]
    lines.append("")
    if failures:
        lines += ["## What failed", ""]
        lines += [
            f"- {f['experiment']}, {MODELS[f['model']].title}, seed {f['seed']}: {f['failed']}"
            for f in failures
        ]
        lines.append("")
    return "\n".join(lines)


def _grid(titles: Sequence[str], body: Any) -> list[str]:
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" + " ---: |" * (len(titles) - 1)]
    return lines + [f"| {' | '.join(row)} |" for row in body]


def _shown(d: Difference) -> list[str]:
    column = COLUMNS[d.number]
    name = column.heading if d.number == d.of_model else f"{column.heading} / {COLUMNS[d.of_model].heading}"

    def ends(pair: tuple[float, float]) -> str:
        return "" if math.isnan(pair[0]) else f"{pair[0]:.{column.digits}f} to {pair[1]:.{column.digits}f}"

    return [MODELS[d.model].title, name, f"{d.mean:.{column.digits}f}", ends(d.subjects), ends(d.seeds)]


def numbers_csv(table: Sequence[Row]) -> str:
    """All means and errors, one a line."""
    lines = [
        [row.experiment, row.model, name, mean, "" if math.isnan(error) else error, len(row.seeds)]
        for row in table
        for name, (mean, error) in row.numbers.items()
    ]
    return _csv(["experiment", "model", "number", "mean", "standard_error", "seeds"], lines)


def differences_csv(compared: Sequence[Difference]) -> str:
    """All differences, one a line."""
    names = ["experiment", "model", "number", "of_model", "difference", "subjects_low", "subjects_high"]
    lines = [[*d[:5], *d.subjects, *("" if math.isnan(end) else end for end in d.seeds)] for d in compared]
    return _csv([*names, "seeds_low", "seeds_high"], lines)


def _csv(names: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(lines)
    return buffer.getvalue()


# What a terminal has room for.
_MOST_COLUMNS = 4
_FIRST = (
    "nll",
    "nll_tight",
    "published",
    "mse_importance_mean",
    "mse_guide_mean",
    "mse_best_mean",
    "nll_held_out",
    "mse_held_out_mean",
    "coverage",
    "spearman_time",
    "spearman_line",
    "ari_motion",
    "ari_start",
    "ari",
)


def screen(experiment: Experiment, table: Sequence[Row]) -> Table:
    """The main columns of an experiment, for a terminal."""
    names = headings(experiment, table)
    chosen = [name for name in _FIRST if name in names][:_MOST_COLUMNS]
    chosen += ["epoch_cpu_seconds"]
    shown = Table(title=experiment.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    shown.add_column("model", overflow="fold")
    for name in chosen:
        shown.add_column(COLUMNS[name].heading, justify="right", overflow="fold")
    for row in table_rows(experiment, table):
        shown.add_row(row[0], *(row[2 + names.index(name)] for name in chosen))
    return shown
