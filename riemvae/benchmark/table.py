"""Results over seeds as a table: in a terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from riemvae.benchmark.settings import PUBLISHED, TITLES, Settings

COLUMNS = (
    "model",
    "d",
    "log p, few",
    "± images",
    "log p, many",
    "bound",
    "KL gap",
    "k̂ > 0.7",
    "peer's formula",
    "published",
    "training, s",
    "estimates, s",
)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error over seeds; NaN for one value.

    Example:
        >>> mean_and_error([1.0, 3.0])
        (2.0, 1.0)
    """
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a model and ``d``, in the order of the first seed: means and errors over seeds."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["model"], result["latent_dim"]), []).append(result)
    made = []
    for (name, latent_dim), members in groups.items():
        few, many = ([m[key] for m in members] for key in ("few", "many"))
        offset = members[0]["peer_offset"]
        log_few = mean_and_error([f["log_prob"] for f in few])
        made.append(
            {
                "model": name,
                "latent_dim": latent_dim,
                "seeds": [m["seed"] for m in members],
                "log_prob_few": log_few,
                "stderr_images": max(f["stderr_images"] for f in few),
                "log_prob_many": mean_and_error([m["log_prob"] for m in many]),
                "stderr_images_many": max(m["stderr_images"] for m in many),
                "log_prob_few_on_many": mean_and_error(
                    [_mean(f["log_prob_by_image"][: m["num_data"]]) for f, m in zip(few, many)]
                ),
                "elbo": mean_and_error([f["elbo"] for f in few]),
                "kl_gap": mean_and_error([m["kl_gap"] for m in many]),
                "share_khat_above_0.7": _mean([f["share_khat_above_0.7"] for f in few]),
                "diverged_share": max(f["diverged_share"] for f in few),
                "peer_formula": (log_few[0] + offset, log_few[1]) if offset else None,
                "peer_offset": offset,
                "published": PUBLISHED.get(name),
                "training_seconds": _mean([m["training_seconds"] for m in members]),
                "few_seconds": _mean([f["seconds"] for f in few]),
                "many_seconds": _mean([m["seconds"] for m in many]),
            }
        )
    return made


def _mean(values: Sequence[float | None]) -> float:
    # A kept result has null for NaN, as of k̂ with too few samples.
    return sum(math.nan if value is None else value for value in values) / len(values)


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row as text, in the order of :data:`COLUMNS`."""
    published = row["published"]
    return [
        TITLES[row["model"]],
        str(row["latent_dim"]),
        _with_error(row["log_prob_few"]),
        f"{row['stderr_images']:.2f}",
        _with_error(row["log_prob_many"]),
        _with_error(row["elbo"]),
        _with_error(row["kl_gap"]),
        f"{100 * row['share_khat_above_0.7']:.0f} %",
        "" if row["peer_formula"] is None else _with_error(row["peer_formula"]),
        "" if published is None else f"{published[0]:.2f}",
        f"{row['training_seconds']:.0f}",
        f"{row['few_seconds']:.1f} / {row['many_seconds']:.1f}",
    ]


def _with_error(pair: tuple[float, float]) -> str:
    mean, error = pair
    return f"{mean:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


def conditions(settings: Settings) -> str:
    """How the numbers came about, in a paragraph."""
    s = settings
    widths = "-".join(map(str, s.hidden))
    sentences = (
        "Binary MNIST.",
        f"Training: the first {s.num_train:,} training images, binarised anew each time they are looked at "
        "(Bernoulli draws of the grey values);",
        f"{s.epochs} epochs, batches of {s.batch_size},",
        f"Adam from {s.learning_rate:g} to zero as a cosine, gradients clipped at {s.gradient_clip:g}, the "
        "last weights.",
        f"Test: the first {s.num_test:,} test images, one fixed Bernoulli draw with seed "
        f"{s.binarization_seed}.",
        f"Networks 784-{widths}-d and back, ReLU.",
        *_best(s),
        f"Hamiltonian guides: {s.num_steps} steps of {s.step_size:g}, √β₀ = {s.tempering:g};",
        f"metric: T = {s.temperature:g}, λ = {s.regularization:g}, frozen with {s.num_centroids:,} "
        "centroids.",
        f"'log p, few' and the bound are over all test images with {s.num_samples} importance samples a "
        f"datum; 'log p, many' and the KL gap over the first {s.num_test_many:,} with "
        f"{s.num_samples_many:,}.",
        f"± is one standard error over {len(s.seeds)} trainings, '± images' one over test images.",
        "For Hamiltonian guides bound and gap are those of positions and momenta together.",
        '"Peer\'s formula" adds the (d/2) log(1/β₀) that get_nll of the peer library adds, a constant that '
        "no likelihood has.",
        "'Published' is table 1.1 of Chadebec (2023).",
        "'estimates, s' is few / many, of one process.",
    )
    return " ".join(sentences)


def _best(s: Settings) -> tuple[str, ...]:
    if "best" not in s.models:
        return ()
    widths = "-".join(map(str, s.best_hidden))
    last = f", then {s.best_last_epochs} with IWAE of {s.best_last_samples} draws" * bool(s.best_last_epochs)
    return (
        f"Best composition: gated networks 784-{widths}-d, masked autoregressive flow as the prior, "
        f"{s.best_epochs} epochs with a warm-up{last}.",
    )


def markdown(table: Sequence[Mapping[str, Any]], settings: Settings) -> str:
    """The table and its conditions."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * 2 + " ---: |" * (len(COLUMNS) - 2)]
    lines += [f"| {' | '.join(cells(row))} |" for row in table]
    return "\n".join([*lines, "", conditions(settings), ""])


# What is shown where the whole table would be cut to pieces.
_NARROW = ("model", "d", "log p, few", "log p, many", "KL gap", "published")
_WIDE = 170


def screen(table: Sequence[Mapping[str, Any]], width: int) -> Table:
    """The table for a terminal of ``width`` characters: the main columns of a narrow one."""
    chosen = COLUMNS if width >= _WIDE else _NARROW
    title = "log p(x) of binary MNIST, nats an image"
    if chosen is _NARROW:
        title += "; all columns: table.md"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in chosen:
        shown.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in table:
        text = dict(zip(COLUMNS, cells(row), strict=True))
        shown.add_row(*(text[column] for column in chosen))
    return shown
