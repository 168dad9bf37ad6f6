"""Runs the demo and shows it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from riemvae._checks import check_count
from riemvae._tasks import Task, Tell, progress_lines, run_tasks
from riemvae.demo.experiment import run_plane, run_seed
from riemvae.demo.files import check_folder, write_folder
from riemvae.demo.picture import draw
from riemvae.demo.report import compile_report
from riemvae.demo.settings import CLASSIFIERS, FIRST_SEED, MODELS, Settings

STAGES = len(MODELS) + 2  # the lines that run_seed tells


def run(
    per_class: int = 5,
    seeds: int = 5,
    seed: int = FIRST_SEED,
    out: str | os.PathLike[str] | None = None,
    quick: bool = False,
    jobs: int = 2,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains, samples along the geometry, measures and reports.

    Args:
        per_class: Training images a class.
        seeds: Draws of the training images, each with models and classifiers of its own.
        seed: The first of these seeds; the others follow it.
        out: Folder that keeps ``report.json``, ``arrays.npz``, ``figure.png`` and ``model/``. It may not
            exist, be empty or hold an earlier demo, which is replaced.
        quick: A run of seconds that shows the form and not the numbers.
        jobs: Processes, each of one thread.
        console: Where to show it; None is the terminal.

    Returns:
        The report.

    Raises:
        ValueError: A count below one, or a folder of other things.
    """
    for name, value in (("per_class", per_class), ("seeds", seeds), ("jobs", jobs)):
        check_count(name, value)
    check_count("seed", seed, minimum=0)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_folder(folder)
    since = time.perf_counter()
    make = Settings.quick if quick else Settings
    settings = make(per_class, tuple(range(seed, seed + seeds)))
    console = Console() if console is None else console
    console.print(
        f"{10 * per_class} real digits to train on, {per_class} a class; {seeds} draws of them; "
        f"{jobs} processes.",
        highlight=False,
    )
    with progress_lines(console, STAGES * seeds + 1) as tell:
        outcomes, plane = _compute(settings, jobs, tell)
    report = compile_report(settings, outcomes, time.perf_counter() - since)
    show(report, console)
    if folder is not None:
        images = outcomes[0]["images"]
        figure = draw(images, plane, report["differences"])
        write_folder(folder, report, outcomes, figure)
        console.print(f"Report, predictions, figure and model: {folder}", highlight=False, soft_wrap=True)
    console.print(f"{time.perf_counter() - since:.0f} seconds.", highlight=False)
    return report


def _compute(settings: Settings, jobs: int, tell: Tell) -> tuple[list[dict[str, Any]], Any]:
    """The outcomes in the order of the seeds, and the plane."""
    tasks: list[Task] = [(run_plane, (settings, settings.seeds[0]))]
    tasks += [(run_seed, (settings, seed)) for seed in settings.seeds]
    plane, *outcomes = run_tasks(tasks, jobs, tell)
    return outcomes, plane


# -- what is shown -------------------------------------------------------------------------------------------


def show(report: Mapping[str, Any], console: Console) -> None:
    """Prints the tables and the findings of a report."""
    likelihood = report["likelihood"]
    table = Table(
        title=f"log p(x) of held-out digits, nats an image\n{likelihood['likelihood']}", title_justify="left"
    )
    for column in (
        "model",
        "mean",
        "less VAE's",
        "± images",
        "± MC",
        "k̂ > 0.7",
        "own guide",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in likelihood["models"].items():
        versus = likelihood["differences"].get(f"{name} - vae")
        table.add_row(
            name.upper(),
            _with_error(row, 2),
            "" if versus is None else _with_error(versus, 2, "+"),
            f"{max(row['stderr_images_by_seed']):.2f}",
            f"{max(row['monte_carlo_error_by_seed']):.3f}",
            f"{100 * row['share_khat_above_0.7']:.0f} %",
            f"{row['mean_with_own_guide']:.2f}",
        )
    console.print(table)
    console.print(
        "± one standard error over seeds; '± images' over held-out images and '± MC' of the estimate are the "
        "largest of all seeds. The guide is fitted to the held-out images; 'own guide' is the mean with the "
        "model's own.\n",
        highlight=False,
    )

    names = list(next(iter(report["accuracy"].values())))
    table = Table(title="accuracy on held-out real digits, per cent", title_justify="left")
    table.add_column("trained on")
    for kind in CLASSIFIERS:
        table.add_column(kind, justify="right")
    for name in names:
        style = "bold" if name == "real + manifold" else "dim" if name == "real + noise" else ""
        table.add_row(
            name, *(_with_error(report["accuracy"][kind][name], 1) for kind in CLASSIFIERS), style=style
        )
    console.print(table)
    console.print(
        "'real + noise' is a control that needs no model. ± one standard error over seeds.\n", highlight=False
    )
    for line in report["findings"]:
        console.print(f"- {line}", highlight=False)
    console.print()


def _with_error(row: Mapping[str, Any], digits: int, sign: str = "") -> str:
    error = row["stderr"]
    return f"{row['mean']:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if error == error else "")
