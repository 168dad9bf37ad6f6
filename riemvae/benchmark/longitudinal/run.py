"""Runs the benchmark of sequences, going on from what an earlier run left."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from riemvae._atomic import write_file
from riemvae._checks import argument_error, check_count
from riemvae._tasks import Task, progress_lines, run_tasks
from riemvae.benchmark.longitudinal.data import check_digits
from riemvae.benchmark.longitudinal.figure import draw
from riemvae.benchmark.longitudinal.models import MODELS
from riemvae.benchmark.longitudinal.settings import Experiment, Settings
from riemvae.benchmark.longitudinal.table import (
    differences,
    differences_csv,
    markdown,
    numbers_csv,
    rows,
    screen,
)
from riemvae.benchmark.longitudinal.task import label_of, train_and_measure
from riemvae.data import write_json

KIND = "riemvae benchmark longitudinal"

Key = tuple[Experiment, str, int]


def run(
    data: str | os.PathLike[str] | None,
    settings: Settings,
    out: str | os.PathLike[str],
    jobs: int = 2,
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains every model of every experiment with every seed, and reports what is measured of them.

    What is finished is kept in ``out`` at once, and trainings are kept as they go: a run that was broken off
    goes on from there. More models or seeds may be added to a folder; a result of other numbers is refused.

    Args:
        data: MNIST as a ``.npz``, for the experiments with digits; None takes scikit-learn's, of which there
            are fewer. Beside it may stand ``rotmnist_visits.npz``, which visits of the test sequences are
            seen.
        settings: All numbers.
        out: Folder of ``report.json``, ``table.md``, ``table.csv``, ``differences.csv``, ``figure.png``,
            ``results/``, ``models/``.
        jobs: Processes on a CPU, each of one thread; a GPU takes one.
        device: None is a GPU where there is one.
        console: Where to show it; None is the terminal.

    Returns:
        The report.

    Raises:
        ValueError: A folder of other things or of other numbers, a bad file.
    """
    check_count("jobs", jobs)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console() if console is None else console
    folder = Path(out)
    path = None if data is None else os.fspath(data)
    wanted: list[Key] = [
        (experiment, model, seed)
        for seed in settings.seeds
        for experiment in settings.experiments
        for model in experiment.models
    ]
    done = {_label(key): _kept(folder, key, settings) for key in wanted}
    for experiment in settings.experiments:
        if experiment.data.name in ("rotmnist", "colormnist"):
            check_digits(experiment.data, path)  # find out now whether it can be read
    _prepare(folder)
    since = time.perf_counter()
    missing = [key for key in wanted if done[_label(key)] is None]
    missing.sort(key=_cost, reverse=True)  # so that no process waits for another at the end
    console.print(
        f"{len(wanted)} trainings, {len(wanted) - len(missing)} of them done before; on {device}.",
        highlight=False,
    )
    tasks: list[Task] = [(train_and_measure, (*key, settings, path, str(folder), device)) for key in missing]
    if tasks:
        with progress_lines(console, len(tasks)) as tell:
            results = run_tasks(tasks, jobs if device == "cpu" else 1, tell)
        done.update(zip(map(_label, missing), results, strict=True))
    finished: list[Mapping[str, Any]] = [r for r in done.values() if r is not None and "failed" not in r]
    failures = [r for r in done.values() if r is not None and "failed" in r]
    # Experiments and models in the order of the settings, and within them seeds.
    place = {(e.name, m): n for n, (e, m, _) in enumerate(wanted)}
    finished.sort(key=lambda r: (place[r["experiment"], r["model"]], r["seed"]))
    table = rows(finished)
    compared = [d for e in settings.experiments for d in differences(e, finished)]
    report = {
        "kind": KIND,
        "settings": settings.describe(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "machines": _machines(finished),
        "seconds": time.perf_counter() - since,
        "table": [row._asdict() for row in table],
        "differences": [d._asdict() for d in compared],
        "failures": failures,
    }
    write_json(folder / "report.json", report)
    for name, text in (
        ("table.md", markdown(settings, table, compared, failures)),
        ("table.csv", numbers_csv(table)),
        ("differences.csv", differences_csv(compared)),
    ):
        _write(folder / name, text)
    draw(settings, table, folder / "figure.png")
    for experiment in settings.experiments:
        console.print(screen(experiment, table))
    if failures:
        console.print(f"{len(failures)} trainings failed: {folder / 'failures'}", highlight=False)
    console.print(f"Report, tables, figure and models: {folder}", highlight=False, soft_wrap=True)
    console.print(f"{report['seconds']:.0f} seconds.", highlight=False)
    return report


def _machines(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where the results were computed, by which versions, each once."""
    found: list[dict[str, Any]] = []
    for result in results:
        machine = {name: result[name] for name in ("device", "versions")}
        if machine not in found:
            found.append(machine)
    return found


def _write(path: Path, text: str) -> None:
    content = text.encode()
    write_file(path, lambda file: file.write(content))


def _label(key: Key) -> str:
    return label_of(key[0].name, key[1], key[2])


def _cost(key: Key) -> float:
    """How long a training takes, about."""
    experiment, model, _ = key
    data = experiment.data
    return MODELS[model].cost * experiment.epochs * data.sizes[0] * data.num_visits


def _prepare(folder: Path) -> None:
    """Makes the folder, or finds it to be an earlier run."""
    kept = folder / "benchmark.json"
    if folder.is_dir() and any(folder.iterdir()):
        try:
            earlier = json.loads(kept.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            earlier = None
        if not isinstance(earlier, dict) or earlier.get("kind") != KIND:
            raise argument_error("out", "a new folder or an earlier run of this benchmark", str(folder))
    elif folder.exists() and not folder.is_dir():
        raise argument_error("out", "a folder", f"the file {folder}")
    for part in ("results", "models", "trainings", "checkpoints", "failures"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_json(kept, {"kind": KIND})


def _kept(folder: Path, key: Key, settings: Settings) -> dict[str, Any] | None:
    """An earlier result; a damaged file is made again.

    Raises:
        ValueError: One of other numbers.
    """
    experiment, model, _ = key
    try:
        result = json.loads((folder / "results" / f"{_label(key)}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(result, dict) or result.get("digest") != settings.digest(experiment, model):
        raise argument_error(
            "out",
            "an earlier run of the same numbers",
            f"{folder}, where {_label(key)} is of others",
            "pass another folder",
        )
    return result
