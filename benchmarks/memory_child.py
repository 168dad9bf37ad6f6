"""Measures one metric gradient in this process; started by ``memory.py``, prints JSON."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import riemvae as rv

MIB = 2.0**20
POINTS, LATENT_DIM = 100, 10


def main(work: str, count: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    z, v = torch.randn(POINTS, LATENT_DIM), torch.randn(POINTS, LATENT_DIM)

    def metric(n: int) -> rv.geometry.CentroidMetric:
        factors = 0.3 * torch.eye(LATENT_DIM).expand(n, -1, -1).clone()
        return rv.geometry.CentroidMetric(torch.randn(n, LATENT_DIM), factors, temperature=0.8)

    def gradient(of: rv.geometry.CentroidMetric) -> object:
        if work == "kinetic_gradient":
            return of.at(z).kinetic_gradient(v)
        return of.log_volume_and_gradient(z)

    figures = {}
    with torch.no_grad():
        gradient(metric(500))  # what torch itself sets up at its first matrix products
        once = metric(count)
        figures["first process"] = process_peak(lambda: gradient(once))
        figures["later process"] = process_peak(lambda: gradient(once))
        again = metric(count)
        figures["first tensors"], figures["kept tensors"] = tensor_peak(lambda: gradient(again))
        figures["later tensors"], _ = tensor_peak(lambda: gradient(again))
    print(json.dumps(figures))


def process_peak(call: Callable[[], object]) -> float | None:
    """MiB of peak resident size above what was resident before; None where the system cannot tell."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present size
        before = _status("VmRSS")
        call()
        return (_status("VmHWM") - before) / 1024
    except OSError:
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(field)


def tensor_peak(call: Callable[[], object]) -> tuple[float, float]:
    """MiB that torch's allocator held at most during the call, and still held after it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    del kept
    return peak / MIB, held / MIB


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
