"""Runs the benchmark of likelihoods, going on from what an earlier run left."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from riemvae._atomic import write_file
from riemvae._checks import argument_error, check_count
from riemvae._tasks import Task, progress_lines, run_tasks
from riemvae.benchmark.settings import Settings
from riemvae.benchmark.table import conditions, markdown, rows, screen
from riemvae.benchmark.task import label_of, read_images, train_and_measure
from riemvae.data import write_json

KIND = "riemvae benchmark likelihood"

# Long trainings first, so that no process waits for another at the end.
_LONGEST_FIRST = ("best", "rhvae_vamp", "rhvae", "hvae", "vae_vamp", "vae_iaf", "vae")


def run(
    data: str | os.PathLike[str],
    settings: Settings,
    out: str | os.PathLike[str],
    jobs: int = 2,
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains every model with every seed and reports log-likelihoods of test images.

    What is finished is kept in ``out`` at once: a run that was broken off goes on from there, and results of
    other settings are refused.

    Args:
        data: MNIST as a ``.npz`` with ``x_train`` and ``x_test``, unsigned bytes ``(N, 28, 28)``.
        settings: All numbers.
        out: Folder of ``report.json``, ``table.md``, ``results/`` and ``models/``.
        jobs: Processes on a CPU, each of one thread; a GPU takes one.
        device: None is a GPU where there is one.
        console: Where to show it; None is the terminal.

    Returns:
        The report.

    Raises:
        ValueError: A folder of other things or of other settings, a bad file.
    """
    check_count("jobs", jobs)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console() if console is None else console
    folder = Path(out)
    _prepare(folder, settings)
    read_images(data, settings)  # find out now whether it can be read
    since = time.perf_counter()
    wanted = [
        (name, d, seed)
        for seed in settings.seeds
        for name in settings.models
        for d in ((settings.best_latent_dim,) if name == "best" else settings.latent_dims)
    ]
    done = {key: _kept(folder, key, settings) for key in wanted}
    missing = [key for key in wanted if done[key] is None]
    missing.sort(key=lambda key: _LONGEST_FIRST.index(key[0]))
    console.print(
        f"{len(wanted)} trainings, {len(wanted) - len(missing)} of them done before; on {device}.",
        highlight=False,
    )
    tasks: list[Task] = [
        (train_and_measure, (*key, settings, os.fspath(data), str(folder), device)) for key in missing
    ]
    if tasks:
        with progress_lines(console, len(tasks)) as tell:
            results = run_tasks(tasks, jobs if device == "cpu" else 1, tell)
        done.update(zip(missing, results, strict=True))
    order = {name: i for i, name in enumerate(settings.models)}
    finished: list[Mapping[str, Any]] = [result for result in done.values() if result is not None]
    table = rows(sorted(finished, key=lambda r: (r["latent_dim"], order[r["model"]], r["seed"])))
    report = {
        "kind": KIND,
        "settings": settings.describe(),
        "conditions": conditions(settings),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "seconds": time.perf_counter() - since,
        "table": table,
    }
    write_json(folder / "report.json", report)
    text = markdown(table, settings).encode()
    write_file(folder / "table.md", lambda file: file.write(text))
    console.print(screen(table, console.width))
    console.print(conditions(settings), highlight=False)
    console.print(f"Report, table and models: {folder}", highlight=False, soft_wrap=True)
    console.print(f"{report['seconds']:.0f} seconds.", highlight=False)
    return report


def _prepare(folder: Path, settings: Settings) -> None:
    """Makes the folder, or finds it to be an earlier run of the same numbers."""
    kept = folder / "settings.json"
    if folder.is_dir() and any(folder.iterdir()):
        try:
            earlier = json.loads(kept.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            earlier = None
        if not isinstance(earlier, dict) or earlier.get("kind") != KIND:
            raise argument_error("out", "a new folder or an earlier run of this benchmark", str(folder))
        if earlier.get("digest") != settings.digest():
            raise argument_error(
                "out", "an earlier run of the same settings", f"{folder} of others", "pass another folder"
            )
    elif folder.exists() and not folder.is_dir():
        raise argument_error("out", "a folder", f"the file {folder}")
    for part in ("results", "models"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_json(kept, {"kind": KIND, "digest": settings.digest(), **settings.describe()})


def _kept(folder: Path, key: tuple[str, int, int], settings: Settings) -> dict[str, Any] | None:
    """An earlier result of these settings; a damaged file is made again."""
    try:
        result = json.loads((folder / "results" / f"{label_of(*key)}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("digest") == settings.digest() else None
