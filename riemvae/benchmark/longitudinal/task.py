"""One training of a model of sequences, and all that is measured of it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shutil
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim.lr_scheduler import MultiStepLR

from riemvae import persistence
from riemvae._seeding import forked
from riemvae._tasks import Tell
from riemvae.benchmark.longitudinal.data import Material, load
from riemvae.benchmark.longitudinal.measures import Case, measure
from riemvae.benchmark.longitudinal.models import MODELS, build
from riemvae.benchmark.longitudinal.settings import Experiment, Settings
from riemvae.data import write_json
from riemvae.zoo.sequences import SequenceAutoencoder


class EpochClock(pl.Callback):
    """Epochs and processor seconds of a training, those of a part that was run before left out."""

    def __init__(self) -> None:
        self.epochs, self.cpu = 0, 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts."""
        self.cpu = -time.process_time()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Counts."""
        self.epochs += 1

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stops."""
        self.cpu += time.process_time()


def label_of(experiment: str, model: str, seed: int) -> str:
    """The name of the files of one training."""
    return f"{experiment}__{model}__seed{seed}"


def train_and_measure(
    experiment: Experiment,
    name: str,
    seed: int,
    settings: Settings,
    data: str | None,
    folder: str,
    device: str,
    tell: Tell,
) -> dict[str, Any]:
    """Trains one model, measures it, and keeps the result in ``folder``.

    A training that was broken off goes on from its last epoch; one that had ended is not run again where only
    its measures failed. An error becomes a result that says so, and is not kept.

    Args:
        experiment: What.
        name: Of the model.
        seed: Of weights and training.
        settings: All numbers.
        data: The file of MNIST, or None.
        folder: Gets ``results/LABEL.json``, ``trainings/LABEL.json``, ``models/LABEL`` and, while it trains,
            ``checkpoints/LABEL.ckpt``.
        device: Torch's name of a device.
        tell: Gets one line.

    Returns:
        The result, as written.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    out, label = Path(folder), label_of(experiment.name, name, seed)
    digest = settings.digest(experiment, name)
    about = {
        "experiment": experiment.name,
        "model": name,
        "seed": seed,
        "digest": digest,
    }
    try:
        with forked(seed):
            material = load(experiment.data, data)
            ae, training = _trained(experiment, name, seed, material, out, label, device, digest)
            result = {**about, **training, **_machine(device), "numbers": {}, "subjects": {}, "weights": {}}
            for kind in experiment.measures:
                found = measure(kind, Case(ae, material, experiment, settings, seed))
                for part, values in found._asdict().items():
                    result[part] |= values
    except Exception as error:
        # Of hundreds of trainings one may diverge: the others go on, and the table says which did not.
        text = f"{type(error).__name__}: {error}"
        write_json(
            out / "failures" / f"{label}.json", {**about, "error": text, "trace": traceback.format_exc()}
        )
        tell(f"{experiment.name}, {MODELS[name].title}, seed {seed}: failed, {text}")
        return {**about, "failed": text}
    write_json(out / "results" / f"{label}.json", result)
    (out / "failures" / f"{label}.json").unlink(missing_ok=True)
    if not settings.keep_models:
        (out / "trainings" / f"{label}.json").unlink(missing_ok=True)
        shutil.rmtree(out / "models" / label)
    tell(f"{experiment.name}, {MODELS[name].title}, seed {seed}: {_headline(result)}")
    return result


def _trained(
    experiment: Experiment,
    name: str,
    seed: int,
    material: Material,
    out: Path,
    label: str,
    device: str,
    digest: str,
) -> tuple[SequenceAutoencoder, dict[str, Any]]:
    """The trained model and what its training took; read from ``out`` where it had ended there."""
    kept, note = out / "models" / label, out / "trainings" / f"{label}.json"
    if note.is_file():
        training = json.loads(note.read_text(encoding="utf-8"))
        if training.pop("digest", None) == digest:
            loaded: SequenceAutoencoder = persistence.load(kept)
            return loaded.to(device).eval(), training
    train = material.train
    times = train.times
    if times is None:
        raise RuntimeError("data without times")
    ae = build(name, experiment, train.shape, train.num_visits, times[train.observed], seed)
    checkpoint = out / "checkpoints" / f"{label}.ckpt"
    clock = EpochClock()
    options: dict[str, Any] = {}
    if experiment.milestones:
        options["scheduler"] = partial(
            MultiStepLR, milestones=list(experiment.milestones), gamma=experiment.decay
        )
    if checkpoint.is_file():
        options["resume"] = checkpoint
    since = time.perf_counter()
    ae.fit(
        train,
        val_data=material.val,
        max_epochs=experiment.epochs,
        batch_size=experiment.batch_size,
        learning_rate=experiment.learning_rate,
        seed=seed,
        accelerator="cpu" if device == "cpu" else "gpu",
        callbacks=[clock],
        checkpoint=checkpoint,
        progress=False,
        **options,
    )
    wall = time.perf_counter() - since
    fitted = ae.fit_
    if fitted is None:
        raise RuntimeError("a training without its history")
    if fitted.interrupted:
        raise KeyboardInterrupt  # what there is of it is in the checkpoint
    losses = fitted.history["val_loss"]
    training = {
        "parameters": sum(p.numel() for p in ae.parameters()),
        "epochs": experiment.epochs,
        "warmup_epochs": 0 if ae.warmup_fit_ is None else len(ae.warmup_fit_.history),
        "best_epoch": fitted.best_epoch,
        "best_val_loss": fitted.best_loss,
        "last_val_loss": losses[-1],
        "resumed": "resume" in options,
        "training_seconds": wall,
        "epoch_cpu_seconds": clock.cpu / max(1, clock.epochs),
        "epoch_wall_seconds": sum(fitted.history["seconds"]) / len(losses),
    }
    ae.to(device).eval()
    ae.save(kept)
    write_json(note, {**training, "digest": digest})
    checkpoint.unlink(missing_ok=True)
    return ae, training


def _machine(device: str) -> dict[str, Any]:
    names = ("torch", "pyro-ppl", "zuko", "lightning", "riemvae")
    return {
        "device": torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"{_processor()}, one thread",
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names},
    }


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _headline(result: dict[str, Any]) -> str:
    """The main number of a result."""
    for name, text in (
        ("nll", "NLL {:.2f} a visit"),
        ("mse_importance_mean", "MSE {:.4f}"),
        ("mse_guide_mean", "MSE {:.4f}"),
        ("mse_held_out_mean", "MSE {:.4f} at held-out times"),
        ("ari_motion", "ARI {:.2f}"),
    ):
        if name in result["numbers"]:
            return text.format(result["numbers"][name])
    return "done"
