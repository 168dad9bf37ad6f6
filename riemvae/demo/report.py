"""The report of the demo: its numbers and what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from riemvae.demo.experiment import TRAINING_SETS
from riemvae.demo.settings import CLASSIFIERS, MODELS, Settings
from riemvae.demo.statistics import difference, summary

KIND = "riemvae demo"
FORMAT_VERSION = 1
KHAT_LIMIT = 0.7

# New against old training sets whose differences are reported.
COMPARISONS = (
    ("real + prior", "real"),
    ("real + manifold", "real"),
    ("real + noise", "real"),
    ("prior", "real"),
    ("manifold", "real"),
    ("real + manifold", "real + prior"),
    ("real + manifold", "real + noise"),
)


def compile_report(
    settings: Settings, outcomes: Sequence[Mapping[str, Any]], seconds: float
) -> dict[str, Any]:
    """The report from the outcomes of all seeds, as plain numbers and text.

    Args:
        settings: The numbers of the run.
        outcomes: One of :func:`~riemvae.demo.experiment.run_seed` a seed.
        seconds: What the run took.
    """
    report = {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "settings": asdict(settings),
        "data": "scikit-learn's handwritten digits, 8x8 pixels in [0, 1]; held-out ones are never trained on",
        "seconds": seconds,
        "likelihood": _likelihood(settings, outcomes),
        "sampling": {key: summary([o["sampling"][key] for o in outcomes]) for key in outcomes[0]["sampling"]},
        "training_seconds": {
            name: summary([o["training"][name]["seconds"] for o in outcomes])["mean"] for name in MODELS
        },
        "accuracy": _accuracy(outcomes),
        "differences": _differences(outcomes),
    }
    report["findings"] = findings(report)
    return report


def _likelihood(settings: Settings, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def means(name: str) -> list[float]:
        return [float(o["likelihood"][name]["log_prob"].mean()) for o in outcomes]

    models = {}
    for name in MODELS:
        parts = [o["likelihood"][name] for o in outcomes]
        khat = np.concatenate([part["khat"] for part in parts])
        khat = khat[~np.isnan(khat)]
        models[name] = {
            **summary(means(name)),
            # Over held-out images, for each seed: how the mean would vary with other images.
            "stderr_images_by_seed": [
                float(part["log_prob"].std(ddof=1) / math.sqrt(len(part["log_prob"]))) for part in parts
            ],
            "monte_carlo_error_by_seed": [
                float(np.sqrt(np.square(part["mcse"]).sum()) / len(part["mcse"])) for part in parts
            ],
            "mean_with_own_guide": summary([float(part["own_guide"].mean()) for part in parts])["mean"],
            "share_khat_above_0.7": float((khat > KHAT_LIMIT).mean()) if len(khat) else math.nan,
        }
    return {
        "unit": "nats an image; density of 64 pixels with respect to Lebesgue measure, constants included",
        "likelihood": f"Gaussian, scale {settings.scale:g}, the same for all models",
        "estimate": "importance sampling from a Gaussian guide fitted to the held-out images, the model "
        "being fixed; still too low where k̂ > 0.7",
        "models": models,
        "differences": {
            f"{name} - vae": {
                **difference(means(name), means("vae")),
                "stderr_images_by_seed": [
                    _stderr(o["likelihood"][name]["log_prob"] - o["likelihood"]["vae"]["log_prob"])
                    for o in outcomes
                ],
            }
            for name in MODELS[1:]
        },
    }


def _stderr(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def accuracies(outcomes: Sequence[Mapping[str, Any]], name: str, kind: str) -> list[float]:
    """Per cent of the held-out digits that a classifier gets right, by seed."""
    return [100 * float((o["predicted"][name][kind] == o["y_test"]).mean()) for o in outcomes]


def _accuracy(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        kind: {name: summary(accuracies(outcomes, name, kind)) for name in TRAINING_SETS}
        for kind in CLASSIFIERS
    }


def _differences(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        f"{new} against {old}": {
            kind: difference(accuracies(outcomes, new, kind), accuracies(outcomes, old, kind))
            for kind in CLASSIFIERS
        }
        for new, old in COMPARISONS
    }


# -- what the numbers say ------------------------------------------------------------------------------------


def findings(report: Mapping[str, Any]) -> list[str]:
    """Sentences computed from the verdicts of the report, for people."""
    lines = [_likelihood_sentence(report["likelihood"]["differences"])]
    names = {
        "real + manifold against real": "Synthetic digits along the geometry, added to the real ones",
        "real + prior against real": "Synthetic digits from the prior, added to the real ones",
        "manifold against real": "Synthetic digits along the geometry in place of the real ones",
        "prior against real": "Synthetic digits from the prior in place of the real ones",
        "real + manifold against real + prior": "Along the geometry rather than from the prior",
        "real + noise against real": "Control without a model, real digits repeated with pixel noise",
        "real + manifold against real + noise": "Along the geometry rather than that control",
    }
    lines += [f"{text}: {verdicts(report['differences'][key])}." for key, text in names.items()]
    comparisons = sum(map(len, report["differences"].values()))
    seeds = len(report["settings"]["seeds"])
    lines.append(
        f"Points of accuracy on held-out digits, mean and standard error over {seeds} paired draws of the "
        "training images. 'Better' and 'worse' leave zero outside Student's 95 % interval, one comparison at "
        f"a time: of {comparisons} without any effect, about {comparisons / 20:.0f} would be."
    )
    return lines


def verdicts(by_kind: Mapping[str, Mapping[str, Any]]) -> str:
    """What one comparison says of each classifier."""
    words = {
        "better": "better for",
        "worse": "worse for",
        "unclear": "no clear difference for",
        "one seed": "one seed alone, no error known, for",
    }
    parts = []
    for verdict, text in words.items():
        kinds = [
            f"{kind} ({_signed(result)})" for kind, result in by_kind.items() if result["verdict"] == verdict
        ]
        if kinds:
            parts.append(f"{text} {', '.join(kinds)}")
    return "; ".join(parts)


def _likelihood_sentence(differences: Mapping[str, Mapping[str, Any]]) -> str:
    words = {
        "better": "better than",
        "worse": "worse than",
        "unclear": "not clearly different from",
        "one seed": "compared on one seed with",
    }
    parts = [
        f"{key.split()[0].upper()} is {words[result['verdict']]} the VAE ({_signed(result, 2)} nats)"
        for key, result in differences.items()
    ]
    return f"Log-likelihood of held-out digits: {', '.join(parts)}."


def _signed(result: Mapping[str, Any], digits: int = 1) -> str:
    error = "" if math.isnan(result["stderr"]) else f" ± {result['stderr']:.{digits}f}"
    return f"{result['mean']:+.{digits}f}{error}"
