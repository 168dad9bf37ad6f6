"""How the Riemannian step and likelihood grow with latent dimension, batch, leapfrog steps and centroids."""

from __future__ import annotations

from pathlib import Path

import torch
from likelihood import our_likelihood, pair_for_likelihood, peer_likelihood
from measure import Result, Row, Timing, alternate, ratio
from models import cycle, images, our_pair, our_step, peer_model, peer_step

TITLE = "how RHVAE grows: one thing varied, the others at d = 10, batch 100, K = 3"
VARIED = {
    "d": ("latent dimension d", (2, 10, 20, 50)),
    "batch": ("batch size", (50, 100, 200, 400)),
    "K": ("leapfrog steps K", (1, 3, 5, 10)),
    "N": ("frozen centroids N", (100, 500, 2000, 8000)),
}
# The peer forms [batch, N, d, d] at each evaluation and keeps several: not beyond this size of one.
PEER_LIMIT = 300 * 2**20
MILLISECONDS = (5, 10, 20, 50, 100, 200, 500, 1000, 2000)  # ticks of the figure


def run(quick: bool) -> Result:
    rounds = 3 if quick else 5
    rows: list[Row] = []
    for key, (label, settings) in VARIED.items():
        for setting in settings:
            timings = _likelihoods(setting, rounds, quick) if key == "N" else _steps(key, setting, rounds)
            ours, peer = timings["ours"], timings.get("peer")
            what = "log_likelihood of a datum" if key == "N" else "training step"
            values = {"varied": key, "setting": setting, "what": what, "ours, ms": ours.median * 1e3}
            if peer is not None:
                values["peer, ms"] = peer.median * 1e3
            rows.append(
                Row(f"{what}, {label} = {setting}", values, f"{ratio(peer, ours):.1f}x" if peer else "")
            )
    method = (
        "Training steps (loss, backward, Adam) and log-likelihoods with 100 samples a datum; the figure "
        "is the ratio to the peer. The peer is left out where one of its [batch, N, d, d] tensors would "
        "pass 300 MiB."
    )
    return Result(TITLE, method, rows, ("ours, ms", "peer, ms"))


def _steps(key: str, setting: int, rounds: int) -> dict[str, Timing]:
    size = {"d": 10, "batch": 100, "K": 3} | {key: setting}
    torch.manual_seed(0)
    pair = our_pair("rhvae", size["d"], size["K"])
    x = images(2000)
    sides = {"ours": our_step(*pair, cycle(x, size["batch"]))}
    if 4 * size["batch"] ** 2 * size["d"] ** 2 <= PEER_LIMIT:
        peer = peer_model("rhvae", size["d"], size["K"], like=pair)
        sides["peer"] = peer_step(peer, cycle(x, size["batch"]))
    return alternate(sides, rounds)


def _likelihoods(count: int, rounds: int, quick: bool) -> dict[str, Timing]:
    data = 3 if quick else 10
    x = images(data, seed=1)
    ours, peer = pair_for_likelihood("rhvae", count)
    sides = {"ours": our_likelihood(*ours, x)}
    if 4 * 100 * count * 10**2 <= PEER_LIMIT:
        sides["peer"] = peer_likelihood(peer, x)
    timings = alternate(sides, min(rounds, 3))
    return {name: Timing.of([s / data for s in t.rounds]) for name, t in timings.items()}


def draw(result: Result, path: Path) -> None:
    """The figure: time against each varied thing, ours and the peer's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(VARIED), figsize=(13, 3.6), sharey=True, layout="constrained")
    for ax, (key, (label, _)) in zip(axes, VARIED.items()):
        rows = [row.values for row in result.rows if row.values["varied"] == key]
        for side, library, style in (("ours", "riemvae", "o-"), ("peer", "pythae", "s--")):
            points = [(r["setting"], r[f"{side}, ms"]) for r in rows if f"{side}, ms" in r]
            ax.plot(*zip(*points), style, label=library)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ticks = [r["setting"] for r in rows]
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
        ax.set_xlabel(label)
        ax.set_ylabel("ms a datum, 100 samples" if key == "N" else "ms a training step")
        ax.set_title("log-likelihood" if key == "N" else "training step", fontsize=10)
        ax.grid(alpha=0.3)
    axes[0].set_yticks(MILLISECONDS, [f"{t:,}" for t in MILLISECONDS])
    for ax in axes:
        ax.minorticks_off()
        ax.tick_params(labelleft=True)
    axes[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
