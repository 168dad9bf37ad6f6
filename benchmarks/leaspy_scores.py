"""Chapter 5's model against leaspy's on synthetic clinical scores.

    python benchmarks/leaspy_scores.py [--leaspy PYTHON] [--quick] [--seeds 0 1 2] [--out FOLDER]

``PYTHON`` is an interpreter that has leaspy, which wants numpy before 2: that of an environment of its own,
or this one, where ``riemvae[leaspy]`` was installed.

Both are trained on the same subjects, told the early visits of others, and asked for the subjects' common
time and their later visits. Scores come from leaspy's own family of curves (``logistic``), and from curves
outside it, of which two turn back (``turning``).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import Result, Row, clock, console, show, write
from scipy.stats import spearmanr
from torch import Tensor

import riemvae as rv
from riemvae.longitudinal import VisitDropout

SEEDS = (0, 1, 2)
SUBJECTS, TEST_SUBJECTS, VISITS, SEEN, NOISE = 300, 200, 8, 4, 0.05
SIGMA_XI, SIGMA_TAU, GAP = 0.5, 1.5, 0.02
ITERATIONS, EPOCHS = 5000, 250
SIZES = {"logistic": 2, "turning": 2}  # d: the time and one spatial coordinate


class Scores(NamedTuple):
    """Visits in the order of time, all of them seen; ``truth`` without noise."""

    x: Tensor
    times: Tensor
    truth: Tensor
    progression: Tensor


def simulate(kind: str, size: int, seed: int) -> Scores:
    g = torch.Generator().manual_seed(seed)
    xi, tau, space = (
        torch.randn(3, size, 1, generator=g) * torch.tensor([SIGMA_XI, SIGMA_TAU, 1.0])[:, None, None]
    )
    # Six years of visits, at ages around the onset.
    start = 4 * torch.rand(size, 1, generator=g) - 5
    # A week apart at least: leaspy refuses two visits at one time.
    gaps = GAP * torch.arange(VISITS)
    times = start + (6 - gaps[-1]) * torch.sort(torch.rand(size, VISITS, generator=g), 1).values + gaps
    progression = xi.exp() * (times - tau)
    s = progression.unsqueeze(-1)
    speed, delay = torch.tensor([0.6, 0.5, 0.8, 0.4]), torch.tensor([-2.0, -0.5, 1.0, 2.5])
    shift = space.unsqueeze(-1) * torch.tensor([0.8, -0.8, 0.8, -0.8])
    truth = torch.sigmoid(speed * (s - delay) + shift)
    if kind == "turning":
        bump = torch.exp(-0.5 * ((s - delay - shift) / 2.0).square())
        truth = torch.cat([truth[..., :2], bump[..., 2:]], -1)
    return Scores(truth + NOISE * torch.randn(truth.shape, generator=g), times, truth, progression)


def ours(kind: str, train: Scores, test: Scores, seen: Tensor, seed: int, epochs: int) -> dict[str, Any]:
    model = rv.zoo.build(
        "linear_trajectory",
        input_shape=(4,),
        latent_dim=SIZES[kind],
        spatial="all",
        mapping_hidden=(64, 64),
        # Follow-ups of all lengths: the encoder is asked about short ones later.
        objective=VisitDropout(rv.IWAE(8)),
        seed=seed,
    )
    start = clock()
    model.fit(
        train.x,
        times=train.times,
        max_epochs=epochs,
        batch_size=50,
        learning_rate=5e-3,
        seed=seed,
        progress=False,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
    )
    trained = clock() - start
    start = clock()
    told = {"observed": seen, "times": test.times}
    drawn = model.imputation(test.x, **told, method="importance", num_draws=500, seed=seed)
    return {
        "progression": model.progression(test.x, **told).numpy(),
        "predicted": drawn.mean.numpy(),
        "seconds": [trained, clock() - start],
    }


def theirs(
    python: str, model: str, kind: str, train: Scores, test: Scores, seen: Tensor, seed: int, iterations: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(
            source,
            x=train.x,
            times=train.times + 70,  # ages, as leaspy is used with
            observed=np.ones(train.times.shape, bool),
            test_x=test.x,
            test_times=test.times + 70,
            test_seen=seen,
        )
        arguments = [source, target, model, SIZES[kind] - 1, iterations, seed]
        child = Path(__file__).with_name("leaspy_child.py")
        done = subprocess.run(
            [python, str(child), *map(str, arguments)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"leaspy failed:\n{done.stderr[-3000:]}")
        return dict(np.load(target))


def judge(result: dict[str, Any], test: Scores, seen: Tensor) -> dict[str, Any]:
    """Spearman over the seen visits, and each subject's mean squared error at the later ones."""
    seen_visits = seen.numpy()
    error = ((result["predicted"] - test.truth.numpy()) ** 2).mean(2)
    return {
        "spearman": spearmanr(result["progression"][seen_visits], test.progression.numpy()[seen_visits])[0],
        "error": np.where(~seen_visits, error, 0).sum(1) / (~seen_visits).sum(1),
        "seconds": [float(value) for value in result["seconds"]],
    }


def run(quick: bool, python: str, seeds: tuple[int, ...] = SEEDS, iterations: int = ITERATIONS) -> Result:
    """Both sides on both kinds of scores; errors are paired by subject."""
    iterations, epochs = (200, 5) if quick else (iterations, EPOCHS)
    seeds = seeds[:1] if quick else seeds
    rows, extra, release = [], {}, ""
    for kind in SIZES:
        runs = []
        for seed in seeds:
            train = simulate(kind, SUBJECTS, 1000 + seed)
            test = simulate(kind, TEST_SUBJECTS, 2000 + seed)
            seen = (torch.arange(VISITS) < SEEN).expand(TEST_SUBJECTS, -1)
            mine = judge(ours(kind, train, test, seen, seed, epochs), test, seen)
            peer = theirs(python, "logistic", kind, train, test, seen, seed, iterations)
            release = str(peer["leaspy"])
            peer = judge(peer, test, seen)
            runs.append((mine, peer))
            console.print(
                f"  {kind}, seed {seed}: {_line('ours', mine)}; {_line('leaspy', peer)}", style="dim"
            )
        rows += _rows(kind, runs)
        extra[kind] = [
            {side: {**r, "error": r["error"].tolist()} for side, r in zip(("ours", "leaspy"), pair)}
            for pair in runs
        ]
    method = (
        f"{SUBJECTS} subjects with {VISITS} visits to train on; {TEST_SUBJECTS} others, told of {SEEN} and "
        f"asked about the rest. Errors are root mean squares against the noiseless scores (noise {NOISE}). "
        f"leaspy {release}: logistic model, {iterations} iterations, scipy_minimize. Ours: {epochs} epochs "
        "of VisitDropout(IWAE(8)), importance draws. "
        f"{len(seeds)} seed(s); the interval is that of the paired difference of squared errors, two "
        "standard errors over subjects. Seconds of the processor, training and the others' parameters."
    )
    columns = ("ours", "leaspy")
    return Result("disease progression from scores, against leaspy", method, rows, columns, extra)


def _line(name: str, result: dict[str, Any]) -> str:
    error = float(np.sqrt(result["error"].mean()))
    return f"{name} spearman {result['spearman']:.3f}, error {error:.4f}, {sum(result['seconds']):.0f} s"


def _rows(kind: str, runs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[Row]:
    def mean(of: Any) -> dict[str, float]:
        return {
            side: statistics.fmean(of(pair[k]) for pair in runs) for k, side in enumerate(("ours", "leaspy"))
        }

    times = mean(lambda r: r["spearman"])
    errors = mean(lambda r: float(np.sqrt(r["error"].mean())))
    seconds = mean(lambda r: sum(r["seconds"]))
    paired = np.concatenate([mine["error"] - peer["error"] for mine, peer in runs])
    half = 2 * paired.std(ddof=1) / len(paired) ** 0.5
    interval = [float(paired.mean() - half), float(paired.mean() + half)]
    return [
        Row(f"{kind}: Spearman of the times", times, f"{times['ours'] - times['leaspy']:+.3f}"),
        Row(
            f"{kind}: error of later visits",
            {**errors, "paired difference of squares": float(paired.mean()), "interval": interval},
            f"{paired.mean():+.1e} [{interval[0]:+.1e}, {interval[1]:+.1e}]",
        ),
        Row(f"{kind}: seconds", seconds, f"{seconds['leaspy'] / seconds['ours']:.1f}x"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures chapter 5's model against leaspy's.")
    parser.add_argument(
        "--leaspy", default=sys.executable, metavar="PYTHON", help="an interpreter that has leaspy; this one"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of leaspy's training")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock.name = "cpu"
    result = run(arguments.quick, arguments.leaspy, tuple(arguments.seeds), arguments.iterations)
    show("leaspy_scores", result)
    if arguments.out is not None:
        write(arguments.out, "leaspy_scores", result, arguments.quick)


if __name__ == "__main__":
    main()
