"""The numbers of the benchmark of sequences: their headings and what they mean."""

from __future__ import annotations

from typing import NamedTuple


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        heading: Over it.
        digits: After the point.
        meaning: In a sentence, below the table.
        compared: Whether models are compared by it, subject by subject; smaller is better then.
    """

    heading: str
    digits: int
    meaning: str
    compared: bool = False


_METHODS = {
    "naive": ("naive", "the posterior of one random seen visit, carried along (algorithm 6)"),
    "best": (
        "algorithm 7",
        "a draw from each seen visit, of which the one is kept under which what is seen is likeliest",
    ),
    "guide": ("guide", "draws of a guide that sees all visits"),
    "importance": ("importance", "draws of all seen visits' posteriors, weighed against each other"),
    "map": ("MAP", "the mode of the posterior given all that is seen, one point"),
    "hmc": ("HMC", "Hamiltonian chains at the posterior given all that is seen"),
    "held_out": ("held out", "of visits that are not seen, at their times, by the model's own imputer"),
}


_ERROR = "squared error per value over all that is missing"


def _imputers() -> dict[str, Column]:
    made = {}
    for name, (heading, meaning) in _METHODS.items():
        compared = name == "held_out"
        if name != "map":
            text = f"{_ERROR}, mean over draws of each draw's error: {meaning}"
            made[f"mse_{name}"] = Column(f"MSE, {heading}, draws", 4, text)
            text = "the same of the mean of these draws (by their weights), which is what is filled in"
            made[f"mse_{name}_mean"] = Column(f"MSE, {heading}, mean", 4, text, compared)
        else:
            made["mse_map"] = Column(f"MSE, {heading}", 4, f"{_ERROR}: {meaning}")
    return made


COLUMNS: dict[str, Column] = {
    "nll": Column(
        "NLL",
        2,
        "negative log joint likelihood of complete test sequences divided by the number of visits, nats, all "
        "constants included, by importance samples from one random anchor a sequence (of models without "
        "anchors from their guide of all visits): the published estimator",
        True,
    ),
    "nll_tight": Column(
        "NLL, tighter",
        2,
        "the same by samples from all anchors with the balance heuristic; of VAEs of visits by samples of "
        "each visit on its own, which a likelihood that is a product allows; of the others as before",
        True,
    ),
    "bound": Column("bound", 2, "the negative evidence lower bound divided by the number of visits"),
    "published": Column("published", 2, "NLL of table 6.1 of Chadebec (thesis)"),
    **_imputers(),
    "nll_seen": Column(
        "NLL, seen", 2, "negative log-likelihood of the seen visits, divided by their number", True
    ),
    "nll_held_out": Column(
        "NLL, held out",
        2,
        "that of the other visits at their times given the seen ones, divided by their number: the "
        "difference of two importance-sampled log-likelihoods",
        True,
    ),
    "coverage": Column(
        "coverage", 3, "share of the unseen visits' values inside their central predictive intervals"
    ),
    "coverage_changing": Column(
        "coverage, changing", 3, "the same over pixels whose deviation over the training images is above 0.05"
    ),
    "spearman_time": Column(
        "ρ, time",
        3,
        "Spearman correlation over the seen test visits of t* with a score that is not told t*: the ridge "
        "regression of the training visits' times on their latents z_t (posterior means), at the test "
        "visits' latents, that is the time at which a subject usually looks so",
    ),
    "spearman_probe": Column(
        "ρ, probe",
        3,
        "the same of the ridge regression of the training visits' true t*: how well z_t holds it",
    ),
    "spearman_line": Column("ρ, line", 3, "the same of the model's own exp(η)(t - τ), posterior mean"),
    "ari_motion": Column(
        "ARI, motion",
        3,
        "adjusted Rand index on test subjects of a mixture of how the training subjects move",
    ),
    "ari_start": Column(
        "ARI, latent", 3, "the same of a mixture of the latents, with the moments of these groups"
    ),
    "ari": Column("ARI, trained", 3, "the same after training on with that mixture as the prior"),
    "epoch_cpu_seconds": Column("s/epoch, CPU", 2, "processor seconds an epoch, validation included"),
    "epoch_wall_seconds": Column("s/epoch, wall", 2, "wall seconds an epoch, with whatever ran beside"),
    "best_epoch": Column("best epoch", 0, "that of the weights, by the validation loss, after the warm-up"),
}
