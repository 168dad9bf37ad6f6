"""Peak memory of one gradient of the centroid metric, each in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import Result, Row, bounded

TITLE = "peak memory of one metric gradient, N = 50,000, d = 10, 100 points"
LIMIT = 50.0  # MiB
WORKS = ("log_volume_and_gradient", "kinetic_gradient")


def run(quick: bool) -> Result:
    count = 5_000 if quick else 50_000
    rows: list[Row] = []
    for work in WORKS:
        runs = [_measured(work, count) for _ in range(1 if quick else 3)]
        figures = {key: _median([run[key] for run in runs]) for key in runs[0]}
        for call in ("first", "later"):
            values = {"process, MiB": figures[f"{call} process"], "tensors, MiB": figures[f"{call} tensors"]}
            values["kept, MiB"] = figures["kept tensors"] if call == "first" else None
            worst = max(v for v in values.values() if v is not None)
            rows.append(bounded(f"{work}, {call} call", worst, LIMIT, " MiB", values))
    method = (
        f"N = {count:,}. 'process' is the growth of the peak resident size (VmHWM, reset before the call; "
        "median of three processes) over the resident size before it; 'tensors' the peak of what torch's "
        "allocator handed out during the call, added up from the events of torch.profiler. The first "
        "call also derives what later ones reuse ('kept'). The larger of the two counts. The centroids "
        "and factors themselves (21 MiB at N = 50,000) are there before."
    )
    return Result(TITLE, method, rows, ("process, MiB", "tensors, MiB", "kept, MiB"))


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _measured(work: str, count: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("memory_child.py")), work, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
