"""The Lightning side of ``fit``; imported by it at the first call, since Lightning is slow to import."""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import math
import os
import signal
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pyro
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import Checkpoint
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from riemvae._checks import argument_error
from riemvae._modes import in_evaluation_mode, kept_modes
from riemvae._seeding import kept_generators
from riemvae.inference.batches import ArrayBatches, LoaderBatches, batch_call, batch_length, batch_parts

CHECKPOINT_FORMAT = "riemvae training"
CHECKPOINT_VERSION = 1
BAR_INTERVAL = 0.2  # seconds between two drawings of the progress bar
_LARGE = 20.0  # of data that networks take in and that were scaled


class NotFinite(RuntimeError):
    """A training loss that is NaN or infinite."""


def _largest(batch: Any) -> float:
    """The largest value of the data of a batch: of ``x`` or else of its first floating-point part."""
    parts = [batch["x"]] if isinstance(batch, Mapping) and "x" in batch else batch_parts(batch)
    floating = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
    return float(floating[0].detach().nan_to_num().abs().max()) if floating and floating[0].numel() else 0.0


class PlateSize(Messenger):
    """Records the full size of a plate of which the rows at hand are a subsample.

    Pyro scales such a model's log density to the full size, so its loss is a sum over that many data, not
    over the rows it was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.full_size: int | None = None

    def of(self, rows: int) -> PlateSize:
        """Watches the next call, on ``rows`` data."""
        self.rows, self.full_size = rows, None
        return self

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            for frame in msg["cond_indep_stack"]:
                if frame.full_size is not None and frame.size == self.rows < frame.full_size:
                    self.full_size = frame.full_size


class Weights:
    """A copy of the parameters and buffers of a module, in storage of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.names = [name for name, _ in module.named_parameters()]
        self._parameters = list(module.parameters())
        self._buffers = [
            (f"{prefix}.{key}" if prefix else key, owner, key)
            for prefix, owner in module.named_modules()
            for key, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self.buffer_names = [name for name, _, _ in self._buffers]
        self.names += self.buffer_names
        self._copies = [tensor.detach().clone() for tensor in self.live()]

    def live(self) -> list[Tensor]:
        """The tensors in use, parameters first."""
        buffers = [owner._buffers[key] for _, owner, key in self._buffers]
        return [p.data for p in self._parameters] + [torch.empty(0) if b is None else b for b in buffers]

    def keep(self) -> None:
        """Copies the tensors in use; storage is made anew only where a buffer has changed its shape."""
        for i, tensor in enumerate(self.live()):
            if self._copies[i].shape == tensor.shape:
                self._copies[i].copy_(tensor)
            else:
                self._copies[i] = tensor.detach().clone()

    def restore(self) -> None:
        """Puts the copies back."""
        self.put(dict(zip(self.names, self._copies, strict=True)))

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Writes ``values`` into the tensors in use."""
        with torch.no_grad():
            for name, parameter in zip(self.names, self._parameters, strict=False):
                parameter.copy_(values[name])
            for name, owner, key in self._buffers:
                buffer = owner._buffers[key]
                if buffer is not None and buffer.shape == values[name].shape:
                    buffer.copy_(values[name])
                else:
                    owner._buffers[key] = values[name].to(
                        None if buffer is None else buffer.device, copy=True
                    )

    def state(self) -> dict[str, Tensor]:
        """The copies by name."""
        return dict(zip(self.names, self._copies, strict=True))

    def current(self) -> dict[str, Tensor]:
        """The tensors in use by name."""
        return dict(zip(self.names, self.live(), strict=True))

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Replaces the copies by ``values``."""
        self._copies = [values[n].to(t.device).clone() for n, t in zip(self.names, self.live(), strict=True)]


class BatchLoss(NamedTuple):
    """The loss of a batch and what its mean is over.

    Attributes:
        loss: as the objective gives it, in nats.
        rows: data in the batch.
        size: data in the sum that the loss is: more than ``rows`` where the model scales a subsample up.
        left_out: data of the batch that are not in the loss.
        diverged: what the guide reports, ``None`` where it reports nothing.
    """

    loss: Any
    rows: int
    size: int
    left_out: float
    diverged: int | None

    @property
    def total(self) -> float:
        """The loss as a sum over the batch alone."""
        loss = self.loss.detach() if isinstance(self.loss, Tensor) else self.loss
        return float(loss) * self.rows / self.size

    @property
    def kept(self) -> float:
        """The data in that sum."""
        return self.rows - self.left_out


class Record:
    """The losses of a training: the sums of the epoch at hand, the rows of the past ones, the best.

    It is a plain object because attributes of a module are slow to set.

    Args:
        min_delta: what counts as an improvement for patience.
    """

    def __init__(self, min_delta: float) -> None:
        self.min_delta = min_delta
        self.rows: list[dict[str, Any]] = []
        self.best_epoch: int | None = None
        self.best_loss = self.reference = math.inf
        self.wait = 0
        self.restart()

    def restart(self) -> None:
        """Begins the sums of an epoch."""
        self.total, self.count, self.diverged = 0.0, 0.0, 0
        self.counts_diverged = False

    def add(self, result: BatchLoss) -> None:
        """Adds one batch."""
        self.total += result.total
        self.count += result.kept
        self.diverged += result.diverged or 0
        self.counts_diverged |= result.diverged is not None

    def observe(self, loss: float) -> bool:
        """Takes the monitored loss of the epoch at hand; whether it is the best so far."""
        # A slow descent counts for patience once its steps add up to min_delta.
        if loss < self.reference - self.min_delta:
            self.reference, self.wait = loss, 0
        else:
            self.wait += 1
        if loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, len(self.rows)
            return True
        return False

    def state(self) -> dict[str, Any]:
        """What a later or another process needs to go on."""
        return {
            name: getattr(self, name) for name in ("rows", "best_epoch", "best_loss", "reference", "wait")
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes such a state."""
        for name in self.state():
            setattr(self, name, state[name])
        self.rows = [dict(row) for row in self.rows]


class Training(pl.LightningModule):
    """A model, a guide and an objective as one Lightning module.

    Lightning runs the loops, devices and callbacks. The losses, the best weights and the files are kept here,
    because Lightning's own bookkeeping costs more an epoch than a small model's step.

    Args:
        model: a module or a function with Pyro's primitives.
        guide: likewise.
        objective: has ``differentiable_loss(model, guide, *args, **kwargs)``.
        batches: the training data.
        val_batches: the validation data, if any.
        settings: the other arguments of ``fit``.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        objective: Any,
        batches: ArrayBatches | LoaderBatches,
        val_batches: ArrayBatches | LoaderBatches | None,
        settings: dict[str, Any],
    ) -> None:
        super().__init__()
        self.model, self.guide, self.objective = model, guide, objective
        self.batches, self.val_batches, self.settings = batches, val_batches, settings
        self.others = nn.ModuleList()  # modules that a plain function uses
        self.free = nn.ParameterList()  # parameters of plain functions, in the order of free_names
        self.free_names: list[str] = []
        self.free_constraints: list[Any] = []
        self.module_names: set[str] = set()  # names that Pyro's store gives to the modules' own parameters
        self.optimised: list[nn.Parameter] = []
        self.plate = PlateSize()
        self.record = Record(settings["min_delta"])
        self.stop_reason: str | None = None
        self.interrupted = False
        self.logs = False  # whether metrics are handed to Lightning, for callbacks and loggers
        self.resumed: dict[str, Any] | None = None
        self.val_seed = 0
        self._weights: Weights | None = None
        self._scheduler: Any = None
        self._val_batches: Any = None
        self._bar: Any = None
        self._drawn = self._started = self._saved = 0.0

    # -- the loss --------------------------------------------------------------------------------------------

    def loss(self, batch: Any) -> BatchLoss:
        """The loss of a batch and what its mean is over."""
        args, kwargs = batch_call(batch)
        rows = batch_length(batch)
        with self.plate.of(rows):
            loss = self.objective.differentiable_loss(self.model, self.guide, *args, **kwargs)
        diverged = getattr(self.guide, "num_diverged", None)
        left_out = getattr(self.objective, "num_left_out", None)
        if left_out is None:
            # A guide counts draws, of which a vectorised objective has several a datum.
            several = getattr(self.objective, "vectorize_particles", False)
            left_out = min(rows, int(diverged or 0) / (self.objective.num_particles if several else 1))
        return BatchLoss(
            loss, rows, self.plate.full_size or rows, left_out, None if diverged is None else int(diverged)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One loss, recorded; refused if it is not finite."""
        try:
            result = self.loss(batch)
        except (ValueError, RuntimeError) as error:
            # Of weights that are not finite, distributions and decompositions say so in words of their own.
            if not self._weights_are_finite():
                raise NotFinite(self._not_finite_message("not defined", batch, batch_idx)) from error
            raise
        value = float(result.loss.detach())
        if not math.isfinite(value):
            raise NotFinite(self._not_finite_message(value, batch, batch_idx))
        self.record.add(result)
        return result.loss

    def _weights_are_finite(self) -> bool:
        return all(bool(torch.isfinite(part.detach()).all()) for part in self.optimised)

    def _not_finite_message(self, value: float | str, batch: Any, batch_idx: int) -> str:
        where = f"the training loss is {value} at epoch {self.epoch}, batch {batch_idx}"
        epoch = self.record.best_epoch
        best = "" if epoch is None else f"; the best weights (epoch {epoch}) are in place"
        for part in batch_parts(batch):
            if isinstance(part, Tensor) and part.is_floating_point() and not bool(torch.isfinite(part).all()):
                return f"{where}, because that batch holds NaN or infinite values: drop or impute them{best}."
        largest = _largest(batch)
        scale = (
            f"scale the data, whose values reach {largest:.3g} (riemvae.data.Standardize does so by column), "
            if largest > _LARGE
            else ""
        )
        return (
            f"{where}: {scale}try a smaller learning_rate or gradient_clip, and check that the data lie in "
            f"the likelihood's support{best}."
        )

    def _means(self) -> dict[str, Any]:
        total, count, diverged = self._over_processes(
            [self.record.total, self.record.count, self.record.diverged]
        )
        if count <= 0:
            raise NotFinite(
                f"all data of epoch {self.epoch} were left out: the guide diverged on each of them."
            )
        means: dict[str, Any] = {"train_loss": total / count}
        if self.record.counts_diverged:
            means["num_diverged"] = int(diverged)
        return means

    def _over_processes(self, values: list[float]) -> list[float]:
        if self.trainer.world_size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()  # type: ignore[union-attr]

    def _validate(self) -> float:
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        total, count = 0.0, 0.0
        # One and the same loss at each epoch, whatever its schedules say by then.
        at_end = getattr(self.objective, "at_end", contextlib.nullcontext)
        with in_evaluation_mode(self), kept_generators(self.val_seed), torch.no_grad(), at_end():
            for i, batch in enumerate(self._val_batches or ()):
                if i % world_size == rank:
                    batch = self.transfer_batch_to_device(batch, self.device, 0)
                    result = self.loss(batch)
                    total += result.total
                    count += result.kept
        total, count = self._over_processes([total, count])
        return total / count if count > 0 else math.nan

    # -- Lightning's hooks -----------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch that is running, counted from the first one of a resumed training."""
        return len(self.record.rows)

    def begin_epoch(self, epoch: int) -> None:
        """Tells an objective that has schedules which epoch it is."""
        begin = getattr(self.objective, "begin_epoch", None)
        if begin is not None:
            begin(epoch)

    @property
    def settled(self) -> bool:
        """Whether the objective's schedules have ended: training losses compare from here on."""
        return bool(getattr(self.objective, "settled", True))

    def setup(self, stage: str) -> None:
        """Puts the parameters of plain functions into this process's parameter store."""
        parameters = dict(zip(self.free_names, self.free, strict=True))
        constraints = dict(zip(self.free_names, self.free_constraints, strict=True))
        pyro.get_param_store().set_state({"params": parameters, "constraints": constraints})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer and, kept here, the scheduler."""
        make, rate = self.settings["optimizer"], self.settings["learning_rate"]
        if make is None:
            # One pass over each parameter: a tenth of the time of the step by step form, on a CPU too.
            optimizer: Any = torch.optim.Adam(self.optimised, lr=rate, fused=_may_fuse(self.optimised))
        elif inspect.isclass(make) and issubclass(make, torch.optim.Optimizer):
            optimizer = make(self.optimised, lr=rate)  # type: ignore[call-arg]
        else:
            optimizer = make(self.optimised)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise argument_error(
                "optimizer",
                "a callable that returns a torch Optimizer",
                f"one that returns {type(optimizer)}",
            )
        if self.settings["scheduler"] is not None:
            self._scheduler = self.settings["scheduler"](optimizer)
            if not hasattr(self._scheduler, "step"):
                raise argument_error(
                    "scheduler", "a callable that returns a torch scheduler", f"{type(self._scheduler)}"
                )
        return optimizer

    def train_dataloader(self) -> Any:
        """The training batches of this process."""
        trainer = self.trainer
        seed = 0
        if trainer.world_size > 1:
            seed = int(trainer.strategy.broadcast(int(torch.randint(2**31, ()))))
            # Each process has draws of its own.
            torch.manual_seed(seed + trainer.global_rank)
        device = trainer.strategy.root_device
        self._val_batches = self.val_batches.on(device) if self.val_batches is not None else None
        if trainer.world_size > 1 and isinstance(self._val_batches, torch.utils.data.DataLoader):
            self._val_batches = LoaderBatches(self._val_batches)
        return self.batches.on(device, trainer.global_rank, trainer.world_size, seed)

    def on_train_start(self) -> None:
        """Makes the storage of the best weights, and takes up a checkpoint."""
        self._weights = Weights(self)
        if self.resumed is not None:
            self._take_up(self._weights, self.resumed)
        if self.settings["progress"] and self.trainer.is_global_zero:
            from tqdm.auto import tqdm

            batches, epochs = self.trainer.num_training_batches, self.settings["max_epochs"]
            known = isinstance(batches, int)
            self._bar = tqdm(
                total=batches * epochs if known else None,
                initial=batches * self.epoch if known else 0,
                unit="step",
                mininterval=BAR_INTERVAL,
                dynamic_ncols=True,
            )
            self._drawn = 0.0
        self._started = self._saved = time.perf_counter()

    def on_train_epoch_start(self) -> None:
        """Moves the objective's schedules."""
        self.begin_epoch(self.epoch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ends an epoch after its last batch."""
        if self._bar is not None:
            self._bar.update(1)
        if self.trainer.is_last_batch:
            self._end_epoch()
        if self.interrupted:
            self.stop_reason = self.stop_reason or "interrupted"
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        """Writes the last checkpoint, then puts the best weights in place."""
        self._save()
        self.finish()

    def get_extra_state(self) -> dict[str, Any]:
        """What a training in another process has to send back beside the weights."""
        return self.record.state() | {"stop_reason": self.stop_reason}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes what another process sent back."""
        self.record.load(state)
        self.stop_reason = state["stop_reason"]

    # -- epochs ----------------------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        optimizer = self.trainer.optimizers[0]
        means = self._means()
        row: dict[str, Any] = {"epoch": self.epoch, "train_loss": means.pop("train_loss")}
        self.record.restart()
        monitored = row["train_loss"]
        if self.val_batches is not None:
            monitored = row["val_loss"] = self._validate()
        settled = self.settled
        if settled or self.val_batches is not None:
            self._observe(monitored)
        if not settled:
            self.record.wait = 0  # patience begins when the loss no longer changes its meaning
        now = time.perf_counter()
        row |= {
            "learning_rate": float(optimizer.param_groups[0]["lr"]),
            "seconds": now - self._started,
        } | means
        row |= getattr(self.objective, "scheduled_values", {})
        self._started = now
        self.record.rows.append(row)
        if self._scheduler is not None:
            plateau = isinstance(self._scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            if not plateau:
                self._scheduler.step()
            elif settled:
                self._scheduler.step(monitored)
        patience = self.settings["patience"]
        if patience is not None and self.record.wait >= patience:
            self.stop_reason, self.trainer.should_stop = "patience", True
        if self.logs:
            metrics = {k: float(v) for k, v in row.items() if k != "epoch"}
            self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=1)
        if self._bar is not None and now - self._drawn > BAR_INTERVAL:
            self._draw(row, now)
        if now - self._saved >= self.settings["checkpoint_interval"]:
            self._save()
            self._saved = now

    def _draw(self, row: dict[str, Any], now: float) -> None:
        self._drawn = now
        losses = {k: f"{row[k]:.4g}" for k in ("train_loss", "val_loss") if k in row}
        self._bar.set_description(f"epoch {row['epoch'] + 1}/{self.settings['max_epochs']}", refresh=False)
        self._bar.set_postfix(losses, refresh=False)

    def _observe(self, loss: float) -> None:
        """Keeps the weights in place if the monitored loss is the best so far."""
        if self.record.observe(loss) and self._weights is not None:
            self._weights.keep()

    def finish(self) -> None:
        """Closes the bar and puts the best weights in place; harmless when repeated."""
        if self._bar is not None:
            if self.record.rows:
                self._draw(self.record.rows[-1], time.perf_counter())
            self._bar.close()
            self._bar = None
        if self._weights is not None and self.record.best_epoch is not None and self.settings["restore_best"]:
            self._weights.restore()
        self._weights = None

    # -- files -----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        path = self.settings["checkpoint"]
        if path is None or self._weights is None or not self.trainer.is_global_zero:
            return
        content = {
            "format": CHECKPOINT_FORMAT,
            "version": CHECKPOINT_VERSION,
            "weights": self._weights.current(),
            "best": self._weights.state(),
            "optimizer": self.trainer.optimizers[0].state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "random": random_state(),
            "record": self.record.state(),
            "val_seed": self.val_seed,
            "steps": self.trainer.fit_loop.epoch_loop._batches_that_stepped,
        }
        write_atomically(path, content)

    def take_best(self, content: dict[str, Any]) -> None:
        """Reads history and best loss of a checkpoint, and puts its best weights in place."""
        self.record.load(content["record"])
        self._matched(Weights(self), content).put(
            content["best" if self.settings["restore_best"] else "weights"]
        )

    def _take_up(self, weights: Weights, content: dict[str, Any]) -> None:
        self.record.load(content["record"])
        self.val_seed = content["val_seed"]
        self._matched(weights, content)
        weights.put(content["weights"])
        weights.load(content["best"])
        self.trainer.optimizers[0].load_state_dict(content["optimizer"])
        if self._scheduler is not None and content["scheduler"] is not None:
            self._scheduler.load_state_dict(content["scheduler"])
        if self.trainer.world_size == 1:
            set_random_state(content["random"])
        # Callbacks and loggers go on counting where the earlier training stopped.
        progress: Any = self.trainer.fit_loop.epoch_progress.current
        progress.ready = progress.started = progress.processed = progress.completed = self.epoch
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = content["steps"]

    def _matched(self, weights: Weights, content: dict[str, Any]) -> Weights:
        # A buffer may grow while a model trains, a parameter may not.
        saved, here = (
            {n: "a buffer" if n in weights.buffer_names else tuple(t.shape) for n, t in tensors.items()}
            for tensors in (content["weights"], weights.current())
        )
        different = sorted(n for n in saved.keys() | here.keys() if saved.get(n) != here.get(n))
        if different:
            name = different[0]
            raise argument_error(
                "resume",
                "the checkpoint of this model and guide",
                f"a checkpoint in which {name} is {saved.get(name, 'missing')} where it is "
                f"{here.get(name, 'missing')} here",
            )
        return weights


# -- parameters ----------------------------------------------------------------------------------------------


def find_parameters(training: Training) -> None:
    """Finds what is to be trained, by one loss on the first batch, and refuses what would stay as it is.

    It is called inside a parameter store of the training's own. The parameters of plain functions, and those
    of guides that look at the model first, exist only after a call; its draws are not those of the training.
    """
    training.begin_epoch(0)
    store = pyro.get_param_store()
    before = dict(training.named_parameters())
    frozen = [p for p in before.values() if not p.requires_grad]
    batch = training.batches.first()
    device = next((p.device for p in training.parameters()), None)
    if device is not None:
        batch = training.transfer_batch_to_device(batch, device, 0)
    with quiet(), kept_generators(), kept_buffers(training):
        loss = training.loss(batch).loss
    for parameter in frozen:  # Pyro's parameter store sets requires_grad on what it is given
        parameter.requires_grad_(False)
    _refuse_shared(training, before)
    captured = dict(store.named_parameters())
    for module in {
        id(m): m for fn in (training.model, training.guide) for m in referenced_modules(fn)
    }.values():
        trainable = [p for p in module.parameters() if p.requires_grad]
        if trainable and all(any(p is c for c in captured.values()) for p in trainable):
            training.others.append(module)
    known = {id(p) for p in training.parameters()}
    loose = {name: tensor for name, tensor in captured.items() if id(tensor) not in known}
    trainable_loss = isinstance(loss, Tensor) and loss.requires_grad
    leaves = _foreign_leaves(loss, known | {id(tensor) for tensor in loose.values()})
    del loss
    _refuse_orphans(leaves)
    own = {
        id(p) for fn in (training.model, training.guide) if isinstance(fn, nn.Module) for p in fn.parameters()
    }
    training.module_names = {name for name, tensor in captured.items() if id(tensor) in own}
    for name, tensor in loose.items():
        training.free_names.append(name)
        training.free_constraints.append(store._constraints[name])
        del store[name]
        training.free.append(tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach()))
    training.optimised = [p for p in training.parameters() if p.requires_grad]
    if not trainable_loss or not training.optimised:
        raise ValueError(
            "model, guide: expected parameters to train, got a loss that depends on no tensor with "
            "requires_grad=True; make the networks attributes of a module, or use pyro.module or pyro.param."
        )
    training.setup("fit")


def _refuse_shared(training: Training, before: dict[str, nn.Parameter]) -> None:
    for name, parameter in training.named_parameters():
        if name in before and before[name] is not parameter:
            raise ValueError(
                f"model, guide: {name} was replaced by a parameter of the same name in the other of the two, "
                "because Pyro shares parameters by name; rename one, give its module a root name "
                "(PyroModule(name=...)), or call pyro.settings.set(module_local_params=True) before the "
                "modules are made."
            )


def _foreign_leaves(loss: Any, known: set[int]) -> list[tuple[weakref.ref, tuple[int, ...]]]:
    """The leaves of the loss's graph outside ``known``, as weak references, with their shapes."""
    leaves = []
    stack, seen = [getattr(loss, "grad_fn", None)], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in known:
            leaves.append((weakref.ref(leaf), tuple(leaf.shape)))
        stack.extend(parent for parent, _ in node.next_functions)
    return leaves


def _refuse_orphans(leaves: list[tuple[weakref.ref, tuple[int, ...]]]) -> None:
    """Refuses leaves that outlive the graph; those made inside the call, for its own use, are gone."""
    if leaves:
        gc.collect()
    shapes = [shape for ref, shape in leaves if ref() is not None]
    if shapes:
        raise ValueError(
            f"model, guide: the loss depends on {len(shapes)} tensors with requires_grad=True that are no "
            f"parameters of either, of shapes {shapes[:5]}; they would never be trained. Make them "
            "attributes of the module (nn.Parameter, nn.Module), register them with pyro.module or "
            "pyro.param, or detach them. A function such as context= that uses a trained network hides it: "
            "pass the module itself, as networks.EncoderFeatures(encoder), or detach its output."
        )


def referenced_modules(fn: Any) -> Iterator[nn.Module]:
    """The modules that a plain function names in its closure, its globals or its partial arguments."""
    if isinstance(fn, nn.Module):
        return
    if isinstance(fn, partial):
        inner = [fn.func, *fn.args, *fn.keywords.values()]
    elif inspect.isfunction(fn):
        names = inspect.getclosurevars(fn)
        inner = [*names.nonlocals.values(), *names.globals.values()]
        inner += [fn.__wrapped__] if hasattr(fn, "__wrapped__") else []
    else:
        inner = []
    for value in inner:
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, partial):
            yield from referenced_modules(value)


# -- surroundings --------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The state of torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Puts torch's generators into a kept state."""
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        for i, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda.cpu(), i)


@contextlib.contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Buffers that a call inside updates, such as running means, are as before afterwards."""
    kept = [
        (owner._buffers, key, buffer, buffer.detach().clone())
        for owner in module.modules()
        for key, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffers, key, buffer, value in kept:
                if buffer.shape == value.shape:
                    buffer.copy_(value)
                buffers[key] = buffer


@contextlib.contextmanager
def training_mode(module: nn.Module) -> Iterator[None]:
    """Roots in evaluation mode are put into training mode; parts of others that are in it are left."""
    with kept_modes(module):
        for root in module.children():
            for part in root if isinstance(root, nn.ModuleList) else [root]:
                if not part.training:
                    part.train()
        yield


@contextlib.contextmanager
def kept_devices(module: nn.Module) -> Iterator[None]:
    """Parameters and buffers are on the device afterwards on which they were before."""
    places = [(p, p.device) for p in module.parameters()]
    buffers = [
        (o._buffers, k, b.device) for o in module.modules() for k, b in o._buffers.items() if b is not None
    ]
    try:
        yield
    finally:
        for parameter, device in places:
            parameter.data = parameter.data.to(device)
            parameter.grad = None
        for owner, key, device in buffers:
            if owner.get(key) is not None:
                owner[key] = owner[key].to(device)  # type: ignore[union-attr]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides Lightning's advertisements and banners, and advice that does not apply; other warnings pass."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    loggers += [logging.getLogger(f"lightning.{name}.utilities.rank_zero") for name in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=PossibleUserWarning)
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.")
            # Frozen parameters need not be in Pyro's store: modules are asked for theirs.
            warnings.filterwarnings(
                "ignore", message=".*not registered in the param store because requires_grad"
            )
            warnings.filterwarnings("ignore", message=r"(?s).*(GPU|MPS|TPU) available but not used")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def interruptible(training: Training) -> Iterator[None]:
    """An interrupt ends the training after the step at hand; a second one at once."""
    usual = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGINT) if usual else None
    usual = usual and previous is signal.default_int_handler

    def ask(number: int, frame: Any) -> None:
        if training.interrupted:
            raise KeyboardInterrupt
        training.interrupted = True

    try:
        if usual:
            signal.signal(signal.SIGINT, ask)
        yield
    except SystemExit as error:
        # Lightning turns an interrupt into the end of the program and leaves further ones ignored.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        training.stop_reason = "interrupted"
    finally:
        if previous is not None:
            signal.signal(signal.SIGINT, previous)


def run(training: Training) -> None:
    """Trains; the best weights are in place afterwards, whatever ended it."""
    settings = training.settings
    callbacks = settings["callbacks"]
    training.logs = bool(callbacks) or bool(settings["logger"])
    options: dict[str, Any] = {
        "accelerator": settings["accelerator"],
        "devices": settings["devices"],
        "strategy": settings["strategy"],
        "logger": settings["logger"],
        "callbacks": callbacks,
        "max_epochs": settings["max_epochs"],
        "gradient_clip_val": settings["gradient_clip"],
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "inference_mode": False,
    }
    with quiet(), kept_devices(training), training_mode(training), interruptible(training):
        try:
            pl.Trainer(**(options | settings["trainer_options"])).fit(training)
        finally:
            training.finish()
    if training.stop_reason is None:
        training.stop_reason = "max_epochs" if training.epoch >= settings["max_epochs"] else "callback"


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that is there in whole or, if the writing breaks off, as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint; no code in the file is run."""
    expected = "a checkpoint written by fit(..., checkpoint=path)"
    if not path.is_file():
        raise argument_error("resume", expected, f"no file at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, by where a file is cut or foreign
        raise argument_error("resume", expected, f"{path}, which is damaged or of another kind") from error
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise argument_error("resume", expected, f"{path}, which is a file of another kind")
    if content.get("version") != CHECKPOINT_VERSION:
        raise argument_error(
            "resume",
            f"a checkpoint of version {CHECKPOINT_VERSION}",
            f"version {content.get('version')}",
            "read it with the release of riemvae that wrote it",
        )
    return content


def _may_fuse(parameters: Sequence[Tensor]) -> bool:
    """Whether torch has a fused Adam for all of them."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
