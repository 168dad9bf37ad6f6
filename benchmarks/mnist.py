"""Seconds an epoch on MNIST with the networks of table 1.10."""

from __future__ import annotations

import os
import statistics

import numpy as np
import torch
from measure import Result, Row, clock
from models import KINDS, SHAPE, images, our_pair

import riemvae as rv

TITLE = "an epoch of rv.fit, networks of table 1.10, d = 10, batch 100"
BATCH = 100


def load(path: str | None, count: int) -> tuple[torch.Tensor, str]:
    """Binary images: MNIST above half its range, or discs where there is no file."""
    path = path or os.environ.get("RIEMVAE_MNIST")
    if not path:
        return images(count), f"{count:,} synthetic binary images (no MNIST file was given)"
    with np.load(path) as file:
        x = torch.from_numpy(file["x_train"][:count] > 127).float()
    return x.reshape(-1, *SHAPE), f"{len(x):,} training images of MNIST, binarised at half range"


def run(quick: bool, path: str | None = None) -> Result:
    count, repeats = (6_000, 1) if quick else (60_000, 3)
    x, source = load(path, count)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    losses: dict[str, float] = {}
    for kind in KINDS:  # imports Lightning, builds caches
        rv.fit(*our_pair(kind), x[: 2 * BATCH], max_epochs=1, batch_size=BATCH, progress=False)
    for _ in range(repeats):
        for kind in KINDS:
            torch.manual_seed(0)
            pair = our_pair(kind)
            start = clock()
            result = rv.fit(*pair, x, max_epochs=1, batch_size=BATCH, progress=False)
            seconds[kind].append(clock() - start)
            losses[kind] = float(result.history["train_loss"][0])
    rows = []
    for kind in KINDS:
        median = statistics.median(seconds[kind]) * 60_000 / len(x)
        values = {"ms a step": 1e3 * median / 600, "loss, nats": losses[kind], "all, s": seconds[kind]}
        rows.append(Row(kind, values, f"{median:.2f} s"))
    method = f"{source}; the median of {repeats} calls of one epoch, measured in full" + (
        "." if len(x) == 60_000 else ", extrapolated to 60,000 images."
    )
    return Result(TITLE, method, rows, ("ms a step", "loss, nats"))
