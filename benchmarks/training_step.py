"""The training step: forward, backward and Adam, against the peer's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from measure import Result, Row, alternate, bounded, compared, ratio
from models import KINDS, cycle, images, our_pair, our_step, peer_model, peer_step

TITLE = "training step, d = 10, MLP 784-400-d, 3 leapfrog steps"
TARGETS = {("rhvae", 100): 3.5, ("rhvae", 400): 12.0, ("hvae", 100): 1.0}


def run(quick: bool) -> Result:
    rounds = 5 if quick else 25
    rows: list[Row] = []
    for batch_size in (100, 400):
        x = images(2000)
        sides: dict[str, Callable[[], float]] = {}
        for kind in KINDS:
            torch.manual_seed(0)
            pair = our_pair(kind)
            peer = peer_model(kind, like=pair)
            sides[f"our {kind}"] = our_step(*pair, cycle(x, batch_size))
            sides[f"peer {kind}"] = peer_step(peer, cycle(x, batch_size))
        timings = alternate(sides, rounds)
        for name, step in sides.items():
            if not math.isfinite(step()):
                raise RuntimeError(f"{name}: the loss is not finite, so the comparison means nothing")
        for kind in KINDS:
            ours, theirs = timings[f"our {kind}"], timings[f"peer {kind}"]
            rows.append(
                compared(f"{kind}, batch {batch_size}", ours, theirs, TARGETS.get((kind, batch_size)))
            )
        if batch_size == 100:
            times = ratio(timings["our rhvae"], timings["our vae"])
            values = {"ours, ms": timings["our rhvae"].median * 1e3}
            rows.append(bounded("our rhvae over our vae, batch 100", times, 7.0, "x", values))
    method = (
        "The same networks, initial weights, batches and settings on both sides; ours is "
        "ELBO().differentiable_loss, backward, Adam. The peer's HVAE cuts the gradient through the "
        "leapfrog forces, ours does not. The learning rate is 1e-7, so that the peer's loss stays finite."
    )
    return Result(TITLE, method, rows, ("ours, ms", "peer, ms"))
