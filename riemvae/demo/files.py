"""Where the demo's report is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from riemvae._atomic import new_folder
from riemvae.data import write_json
from riemvae.demo.experiment import TRAINING_SETS
from riemvae.demo.report import KIND
from riemvae.demo.settings import CLASSIFIERS, MODELS

REPORT, ARRAYS, FIGURE, MODEL = "report.json", "arrays.npz", "figure.png", "model"


def check_folder(folder: Path) -> None:
    """Refuses a folder that holds anything else than an earlier report, before the work is done.

    Raises:
        ValueError: It is a file, or a folder of other things.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        kind = json.loads((folder / REPORT).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None
    if kind != KIND or {entry.name for entry in folder.iterdir()} - {REPORT, ARRAYS, FIGURE, MODEL}:
        raise ValueError(
            f"--out: expected a new folder or an earlier demo report, got {folder}; pass another path, "
            "nothing was written."
        )


def write_folder(
    folder: Path, report: Mapping[str, Any], outcomes: Sequence[Mapping[str, Any]], figure: Any
) -> None:
    """Writes report, predictions, figure and the first seed's RHVAE; the folder appears whole or not."""
    check_folder(folder)
    with new_folder(folder) as new:
        write_json(new / REPORT, report)
        np.savez_compressed(new / ARRAYS, **arrays(outcomes))  # type: ignore[arg-type]
        figure.savefig(new / FIGURE, dpi=110)
        outcomes[0]["autoencoder"].save(new / MODEL)


def arrays(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """What every number of the report can be computed from again.

    ``y_test (seeds, n)``; ``predicted (training sets, classifiers, seeds, n)`` in the report's order; for
    each model ``log_prob_NAME``, ``mcse_NAME``, ``khat_NAME``, ``own_guide_NAME``, ``(seeds, images)``.
    """
    predicted = [
        [[o["predicted"][name][kind] for o in outcomes] for kind in CLASSIFIERS] for name in TRAINING_SETS
    ]
    result = {
        "y_test": np.stack([o["y_test"] for o in outcomes]).astype(np.uint8),
        "predicted": np.array(predicted).astype(np.uint8),
        "training_sets": np.array(TRAINING_SETS),
        "classifiers": np.array(CLASSIFIERS),
    }
    for name in MODELS:
        for key in ("log_prob", "mcse", "khat", "own_guide"):
            result[f"{key}_{name}"] = np.stack([o["likelihood"][name][key] for o in outcomes])
    return result
