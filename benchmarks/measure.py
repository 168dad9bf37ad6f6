"""Timing side by side, targets, the machine, and the files that results are kept in."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

console = Console(width=max(110, Console().width))

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Clock:
    """What time is measured with.

    Everything runs in one thread, so that on an idle machine the two agree; on a busy one only the
    processor's time of this process tells anything, and that with care: caches and memory are shared.
    """

    name: str = "wall"

    def __call__(self) -> float:
        return CLOCKS[self.name]()


clock = Clock()


@dataclass
class Timing:
    """Seconds a call: the median over the rounds, and the quartiles."""

    median: float
    low: float
    high: float
    rounds: list[float] = field(repr=False)

    @classmethod
    def of(cls, rounds: list[float]) -> Timing:
        low, median, high = (
            statistics.quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else rounds * 3
        )
        return cls(median, low, high, rounds)


@dataclass
class Row:
    """One line of a result: a figure, and what it should be.

    Attributes:
        name: What was measured.
        values: Figures by name: seconds, ratios, bytes.
        value: The figure that the target is about, and how it is written, as in ``"4.2x"``.
        target: As in ``">= 3.5x"``; empty where nothing was promised.
        met: Whether it was reached; None without a target.
    """

    name: str
    values: dict[str, Any]
    value: str = ""
    target: str = ""
    met: bool | None = None


@dataclass
class Result:
    """What one benchmark gives: how it was done, its rows, and whatever else it keeps."""

    title: str
    method: str
    rows: list[Row]
    columns: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


def alternate(
    sides: Mapping[str, Callable[[], object]], rounds: int, block_seconds: float = 0.2
) -> dict[str, Timing]:
    """Times the sides in turn, round after round, so that what else the machine does falls on all of them.

    A round calls each side as often as fills ``block_seconds`` (once, if one call takes longer). The order
    within a round is reversed every other time.
    """
    calls = {name: _calls(side, block_seconds) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    for k in range(rounds):
        for name in list(sides) if k % 2 == 0 else reversed(list(sides)):
            side = sides[name]
            start = clock()
            for _ in range(calls[name]):
                side()
            seconds[name].append((clock() - start) / calls[name])
    return {name: Timing.of(values) for name, values in seconds.items()}


def _calls(side: Callable[[], object], block_seconds: float) -> int:
    side()  # the first call builds caches
    start = clock()
    side()
    return max(1, round(block_seconds / max(clock() - start, 1e-9)))


def ratio(slow: Timing, fast: Timing) -> float:
    """The median of the ratios of the rounds: each compares neighbours in time."""
    return statistics.median(a / b for a, b in zip(slow.rounds, fast.rounds))


def compared(
    name: str, ours: Timing, peer: Timing, at_least: float | None = None, *, unit: str = "ms"
) -> Row:
    """A row "the peer takes so many times as long", with the target in that unit."""
    factor = ratio(peer, ours)
    scale = {"ms": 1e3, "s": 1.0}[unit]
    values = {
        f"ours, {unit}": ours.median * scale,
        f"peer, {unit}": peer.median * scale,
        "ratio": factor,
        "ours quartiles": [ours.low * scale, ours.high * scale],
        "peer quartiles": [peer.low * scale, peer.high * scale],
        "rounds": len(ours.rounds),
    }
    if at_least is None:
        return Row(name, values, f"{factor:.2f}x")
    return Row(name, values, f"{factor:.2f}x", f">= {at_least:g}x", factor >= at_least)


def bounded(name: str, value: float, at_most: float, unit: str, values: dict[str, Any]) -> Row:
    """A row "at most so much"."""
    return Row(name, values, f"{value:.3g}{unit}", f"<= {at_most:g}{unit}", value <= at_most)


def machine() -> dict[str, Any]:
    """What the figures were measured on; nothing that names the machine."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": version("pyro-ppl"),
        "pythae": _version("pythae"),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "clock": clock.name,
        "load": _load(),
    }


def _version(name: str) -> str | None:
    """Of a peer, where it is installed: not every benchmark needs each."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _load() -> float | None:
    """Other work on the machine: the load average of the last minute, where the system tells."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _cpu() -> str:
    """The processor by its name, family and model, where Linux tells; else what Python knows."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{name} (family {family}, model {model})" if family and model else name


def show(name: str, result: Result) -> None:
    """Prints a result as a table."""
    console.print(f"\n[bold]{name}[/]: {result.title}")
    console.print(result.method, style="dim", markup=False, highlight=False)
    table = Table(show_edge=False)
    table.add_column("")
    for column in result.columns:
        table.add_column(column, justify="right")
    table.add_column("figure", justify="right")
    table.add_column("target", justify="right")
    table.add_column("met", justify="right")
    for row in result.rows:
        cells = [written(row.values.get(column)) for column in result.columns]
        table.add_row(row.name, *cells, row.value, row.target, met(row))
    console.print(table)


def met(row: Row) -> str:
    """``yes``, ``NO`` or nothing."""
    return "" if row.met is None else "yes" if row.met else "NO"


def written(value: Any) -> str:
    """A figure with three significant digits."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"


def write(folder: Path, name: str, result: Result, quick: bool) -> Path:
    """Keeps a result as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "quick": quick, "machine": machine(), **asdict(result)}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path
