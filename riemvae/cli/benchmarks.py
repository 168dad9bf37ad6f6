"""The commands that measure published comparisons again: ``riemvae benchmark likelihood | longitudinal``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from riemvae.cli.arguments import count, names, seeds, shape_of

SEQUENCE_PRESETS = (
    "quick",
    "small",
    "full",
    "full_cpu",
    "colormnist",
    "colormnist_cpu",
    "missing",
    "missing_full",
    "irregular",
    "clusters",
)


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them: ``command(name, run, summary, description)`` makes the parser of one."""
    likelihood = command(
        "likelihood",
        _likelihood,
        "log p(x) of binary MNIST",
        "Trains VAE, HVAE, RHVAE and their variants with one architecture on binary MNIST and reports "
        "log p(x) of test images with all its errors, beside what was published. A run that was broken off "
        "goes on where it was.",
    )
    likelihood.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help=".npz of MNIST with x_train and x_test (bytes)",
    )
    likelihood.add_argument(
        "--preset",
        choices=("quick", "small", "full"),
        default="small",
        help="quick: seconds, the form only; small: ten minutes on two cores; full: all of MNIST, for a GPU",
    )
    likelihood.add_argument("--latent-dims", type=shape_of, metavar="D,D", help="default: the preset's")
    likelihood.add_argument("--seeds", type=count, metavar="N", help="trainings; default: the preset's")
    likelihood.add_argument(
        "--test-many", type=count, metavar="N", help="images with the larger number of samples"
    )
    _add_shared(likelihood)

    longitudinal = command(
        "longitudinal",
        _longitudinal,
        "models of sequences: likelihood, imputation, irregular times, clusters",
        "Trains the longitudinal VAE, its forms in continuous time and the models that it is compared with, "
        "and reports likelihoods, errors of imputation by each imputer, coverage, progression and clusters, "
        "with paired differences, beside what was published. A run that was broken off goes on where it "
        "was; models and seeds may be added to its folder.",
    )
    longitudinal.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help=".npz of MNIST with x_train, y_train, x_test and y_test (bytes), for small, full and "
        "colormnist; a rotmnist_visits.npz beside it says which visits of the small test sequences are seen",
    )
    longitudinal.add_argument(
        "--preset",
        choices=SEQUENCE_PRESETS,
        default="small",
        help="quick: a minute, the form only; small: rotMNIST of 1,000 sequences; full, colormnist: the "
        "published sizes, for a GPU (with _cpu: what two cores can do); missing, missing_full: missing "
        "visits and pixels; irregular: irregular times; clusters: two dynamics",
    )
    longitudinal.add_argument("--experiments", type=names, metavar="A,B", help="default: the preset's")
    longitudinal.add_argument(
        "--seeds", type=seeds, metavar="N,N", help="such as 0,1,2; default: the preset's"
    )
    _add_shared(longitudinal)


def _add_shared(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="report, tables and models")
    sub.add_argument("--models", type=names, metavar="A,B", help="default: the preset's")
    sub.add_argument("--epochs", type=count, metavar="N", help="default: the preset's")
    sub.add_argument("--jobs", "--workers", type=count, default=2, metavar="N", help="processes on a CPU")
    sub.add_argument("--device", help="torch's name; default: a GPU where there is one")


def _likelihood(arguments: argparse.Namespace) -> None:
    from riemvae.benchmark import PRESETS, run

    changes: dict[str, Any] = {}
    if arguments.models is not None:
        changes["models"] = arguments.models
    if arguments.latent_dims is not None:
        changes["latent_dims"] = arguments.latent_dims
    if arguments.seeds is not None:
        changes["seeds"] = tuple(range(arguments.seeds))
    if arguments.epochs is not None:
        changes["epochs"] = changes["best_epochs"] = arguments.epochs
    if arguments.test_many is not None:
        changes["num_test_many"] = arguments.test_many
    settings = PRESETS[arguments.preset].with_changes(**changes)
    run(arguments.data, settings, arguments.out, arguments.jobs, arguments.device)


def _longitudinal(arguments: argparse.Namespace) -> None:
    from riemvae.benchmark.longitudinal import PRESETS, run

    numbers = {} if arguments.epochs is None else {"epochs": arguments.epochs}
    settings = PRESETS[arguments.preset].with_changes(
        arguments.models, arguments.seeds, arguments.experiments, **numbers
    )
    run(arguments.data, settings, arguments.out, arguments.jobs, arguments.device)
