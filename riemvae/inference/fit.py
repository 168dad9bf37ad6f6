"""Training a model and its guide."""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyro
import pyro.infer
import torch
from pyro.params.param_store import module_from_param_with_module_name
from torch import nn

from riemvae._checks import argument_error, check_count, check_positive, describe
from riemvae._seeding import kept_generators
from riemvae.inference.batches import make_batches, takes_missing
from riemvae.inference.bounds import ELBO
from riemvae.inference.history import History

STOP_REASONS = {
    "max_epochs": "all epochs were run",
    "patience": "the monitored loss no longer improved",
    "interrupted": "interrupted from the keyboard",
    "callback": "a callback asked to stop",
}


class Fit:
    """What a training did; the weights themselves are in the model and the guide.

    Attributes:
        history: the :class:`~riemvae.inference.history.History`, one row an epoch.
        best_epoch: the epoch (from 0) whose monitored loss was the smallest; ``None`` if none was finite.
        best_loss: that loss, the mean per datum in nats.
        stop_reason: ``"max_epochs"``, ``"patience"``, ``"interrupted"`` or ``"callback"``.
        monitored: ``"val_loss"`` where there are validation data, else ``"train_loss"``.
    """

    def __init__(
        self, history: History, best_epoch: int | None, best_loss: float, stop_reason: str, monitored: str
    ) -> None:
        self.history, self.best_epoch, self.best_loss = history, best_epoch, best_loss
        self.stop_reason, self.monitored = stop_reason, monitored

    @property
    def interrupted(self) -> bool:
        """Whether it was stopped from the keyboard."""
        return self.stop_reason == "interrupted"

    def __repr__(self) -> str:
        best = "no finite loss" if self.best_epoch is None else f"best {self.monitored} {self.best_loss:.6g}"
        at = "" if self.best_epoch is None else f" at epoch {self.best_epoch}"
        return f"Fit({len(self.history)} epochs, {best}{at}; stopped: {STOP_REASONS[self.stop_reason]})"

    def plot(self, ax: Any = None) -> Any:
        """Draws the loss curves and marks the best epoch.

        Args:
            ax: matplotlib axes to draw into; new ones if ``None``.

        Returns:
            The axes.

        Example:
            >>> rows = [{"epoch": 0, "train_loss": 3.0}, {"epoch": 1, "train_loss": 2.5}]
            >>> ax = Fit(History(rows), 1, 2.5, "max_epochs", "train_loss").plot()
            >>> ax.get_ylabel()
            'loss per datum (nats)'
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        for name, label in (("train_loss", "training"), ("val_loss", "validation")):
            if name in self.history.columns:
                ax.plot(self.history["epoch"], self.history[name], label=label)
        if self.best_epoch is not None:
            ax.plot([self.best_epoch], [self.best_loss], "o", color="black", label="best")
        ax.set_xlabel("epoch")
        ax.set_ylabel("loss per datum (nats)")
        ax.legend()
        return ax


def fit(
    model: Callable,
    guide: Callable,
    data: Any,
    objective: Any = None,
    val_data: Any = None,
    max_epochs: int = 100,
    batch_size: int | None = None,
    learning_rate: float = 1e-3,
    patience: int | None = None,
    seed: int | None = None,
    *,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    gradient_clip: float | None = None,
    min_delta: float = 0.0,
    restore_best: bool = True,
    warm_start: bool = False,
    num_workers: int = 0,
    accelerator: Any = "auto",
    devices: int | str | Sequence[int] = 1,
    strategy: Any = "auto",
    callbacks: Any = None,
    logger: Any = None,
    progress: bool | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_interval: float = 60.0,
    resume: str | os.PathLike | None = None,
    trainer_options: Mapping[str, Any] | None = None,
) -> Fit:
    r"""Trains ``model`` and ``guide`` under Lightning and leaves the best weights in place.

    The loss is the objective's, a sum over data in nats scaled as Pyro's, so a step with the same draws and
    optimizer is that of :class:`pyro.infer.SVI`. What is shown and monitored is the mean per datum,

    .. math:: \frac{\sum_b L_b \, n_b / m_b}{\sum_b (n_b - r_b)},

    over the batches :math:`b` of an epoch, with :math:`n_b` data, :math:`r_b` of them left out (the
    objective's attribute ``num_left_out`` after the call or, without it, the guide's ``num_diverged``; none
    without either) and :math:`m_b` the number of data over which the loss is a sum: :math:`n_b`, or the size
    of the plate of which the batch is a subsample.

    The best weights are those at the end of the best epoch. A training loss has the noise of its draws,
    and the smallest one is a lucky one; give ``val_data`` where that noise is large. The draws of the
    validation loss are the same at each epoch, so that patience waits for the weights and not for the noise.
    It runs in evaluation mode and without gradients; a guide that needs them enables them.

    An objective with schedules (``ELBO(beta=Linear(0.0, 1.0, 20))``) is told each epoch, counted on in a
    resumed training, and its values are columns of the history. Its training losses do not compare until the
    schedules have ended: without ``val_data`` only epochs from there on may be the best. The validation loss
    is that of the objective at the end of its schedules, at each epoch. Patience, and a plateau scheduler,
    begin when the schedules have ended.

    Args:
        model: a module, passed itself, or a function with ``pyro.module`` or ``pyro.param``.
        guide: likewise.
        data: a tensor or array for ``model(x)``; a tuple or list of these for ``model(*batch)``; a mapping
            for ``model(**batch)``; a torch ``Dataset`` whose items are one of these; or a ``DataLoader``.
            NumPy arrays of floats take the type of the model's parameters; tensors keep theirs.
        objective: has ``differentiable_loss(model, guide, *args, **kwargs)``, as :class:`~riemvae.ELBO`, the
            default, and Pyro's ``Trace_ELBO``. One with ``begin_epoch(epoch)`` is told each epoch.
        val_data: like ``data``; its mean loss is monitored instead of the training's.
        max_epochs: passes over the data, those of a resumed training included.
        batch_size: data a batch (on each device); ``None`` for all data at once. Each epoch has a new order,
            from torch's generator; a smaller last batch is kept, but a single datum left over of tensors
            or arrays joins the batch before it.
        learning_rate: of Adam, or of ``optimizer`` where that is a class of torch optimizers.
        patience: epochs without an improvement of the monitored loss after which to stop.
        seed: makes the training reproducible, on draws of its own: torch's generator is afterwards as it was
            before.
        optimizer: from parameters to a torch optimizer. A class, as ``torch.optim.SGD``, gets
            ``learning_rate`` too.
        scheduler: from the optimizer to a torch scheduler, stepped each epoch; ``ReduceLROnPlateau`` is given
            the monitored loss.
        gradient_clip: largest norm of the gradient (of the sum over the batch).
        min_delta: what counts as an improvement for ``patience``, in nats per datum.
        restore_best: ``False`` leaves the last weights in place.
        warm_start: parameters that functions declare by ``pyro.param`` go on from the values of that name in
            Pyro's store; otherwise they start afresh, whatever was trained before. Modules go on from their
            own weights.
        num_workers: processes that read a ``Dataset``.
        accelerator: Lightning's; ``"auto"`` takes a GPU where there is one (Apple's, which lacks float64,
            only by name).
        devices: Lightning's. Over several, gradients are the mean over the devices.
        strategy: Lightning's.
        callbacks: Lightning callbacks; the history's columns are logged under their names, to be monitored.
        logger: a Lightning logger, or several.
        progress: whether to show a bar; ``None`` shows it in a terminal.
        checkpoint: a file that is written every ``checkpoint_interval`` seconds, at the end and on an
            interrupt.
        checkpoint_interval: seconds; 0 writes at each epoch.
        resume: such a file; the training goes on from it as if it had not been broken off (on one device).
        trainer_options: further arguments of Lightning's ``Trainer``, such as ``num_nodes`` or ``precision``.

    Returns:
        The history, the best epoch and loss, and why the training stopped.

    Raises:
        ValueError: for data that are empty, not finite or of different lengths; a bound method instead of its
        module;
            a loss that depends on trainable tensors outside the model and guide, or on none; a checkpoint
            that is damaged or of another model; any argument out of its range.
        RuntimeError: if a training loss is not finite; the best weights so far are in place.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> result = fit(model, AutoNormal(model), x, max_epochs=5, learning_rate=0.1, seed=0)
        >>> len(result.history), result.stop_reason
        (5, 'max_epochs')
    """
    _check_callable("model", model)
    _check_callable("guide", guide)
    objective = ELBO() if objective is None else objective
    if not callable(getattr(objective, "differentiable_loss", None)):
        raise argument_error(
            "objective",
            "an object with differentiable_loss(model, guide, *args, **kwargs)",
            objective,
            "pass for example riemvae.ELBO()",
        )
    settings: dict[str, Any] = {
        "max_epochs": check_count("max_epochs", max_epochs),
        "learning_rate": learning_rate,
        "patience": None if patience is None else check_count("patience", patience),
        "optimizer": _check_maker("optimizer", optimizer),
        "scheduler": _check_maker("scheduler", scheduler),
        "gradient_clip": gradient_clip,
        "min_delta": _check_not_negative("min_delta", min_delta),
        "restore_best": restore_best,
        "accelerator": _accelerator(accelerator),
        "devices": devices,
        "strategy": strategy,
        "callbacks": [] if callbacks is None else list(callbacks) if _is_list(callbacks) else [callbacks],
        "logger": logger if logger is not None else False,
        "progress": sys.stderr.isatty() if progress is None else progress,
        "checkpoint": None if checkpoint is None else Path(checkpoint),
        "checkpoint_interval": _check_not_negative("checkpoint_interval", checkpoint_interval),
        "trainer_options": dict(trainer_options or {}),
    }
    check_positive("learning_rate", learning_rate)
    if gradient_clip is not None:
        check_positive("gradient_clip", gradient_clip)
    dtype = _floating_type(model, guide)
    missing = takes_missing(model)
    batches = make_batches("data", data, batch_size, num_workers=num_workers, dtype=dtype, missing=missing)
    val_batches = None
    if val_data is not None:
        size = None if isinstance(val_data, torch.utils.data.DataLoader) else batch_size
        val_batches = make_batches(
            "val_data", val_data, size, shuffle=False, num_workers=num_workers, dtype=dtype, missing=missing
        )

    from riemvae.inference import training as engine

    content = None if resume is None else engine.read_checkpoint(Path(resume))
    store = pyro.get_param_store()
    earlier = store.get_state()["params"]
    # A resumed training takes its generators' state from the file; the caller's is left alone then too.
    fork = nullcontext() if seed is None and resume is None else kept_generators(seed)
    state: Any = {"params": {}, "constraints": {}}
    names: set[str] = set()
    try:
        # The training's own parameter store: names of earlier trainings neither give nor take values here.
        with fork, store.scope(state):
            training = engine.Training(model, guide, objective, batches, val_batches, settings)
            with engine.training_mode(training):
                engine.find_parameters(training)
            names |= training.module_names
            _start_values(training, earlier, warm_start)
            with kept_generators():
                training.val_seed = int(torch.randint(2**31, ()))
            training.resumed = content
            try:
                if content is not None and len(content["record"]["rows"]) >= max_epochs:
                    training.take_best(content)
                    training.stop_reason = "max_epochs"
                else:
                    engine.run(training)
            except engine.NotFinite as error:
                raise RuntimeError(str(error)) from None
            finally:
                state.update(store.get_state())
    finally:
        _publish(state, names)
    monitored = "train_loss" if val_batches is None else "val_loss"
    record = training.record
    if record.best_epoch is None and record.rows:
        training.begin_epoch(len(record.rows) - 1)  # other processes may have trained
        why = (
            "was never finite"
            if training.settled or val_batches is not None
            else "never compared, because the objective's schedules had not ended"
        )
        warnings.warn(f"{monitored} {why}: the last weights are in place.", stacklevel=2)
    best_loss = math.nan if record.best_epoch is None else record.best_loss
    return Fit(History(record.rows), record.best_epoch, best_loss, str(training.stop_reason), monitored)


def _start_values(training: Any, earlier: Mapping[str, torch.Tensor], warm_start: bool) -> None:
    """Copies the values of ``pyro.param`` that an earlier run left, or says that they are not used."""
    left = []
    for name, parameter in zip(training.free_names, training.free, strict=True):
        old = earlier.get(name)
        of_module = module_from_param_with_module_name(name) != name
        if old is None or of_module or old.shape != parameter.shape:
            continue
        if warm_start:
            with torch.no_grad():
                parameter.copy_(old)
        else:
            left.append(name)
    if left:
        warnings.warn(
            f"pyro.param {', '.join(map(repr, left[:5]))} start afresh, not from the values that an earlier "
            "run left in Pyro's parameter store; warm_start=True goes on from these.",
            stacklevel=3,
        )


def _publish(state: Any, module_names: set[str]) -> None:
    """Puts the parameters of plain functions into Pyro's store, where these functions look them up.

    Modules have their own; a name that an earlier module of the same structure left in the store would stand
    in for them, so it is taken out.
    """
    store = pyro.get_param_store()
    kept: Any = store.get_state()
    merged: Any = {p: {k: v for k, v in kept[p].items() if k not in state["params"]} for p in kept}
    for part, values in state.items():
        merged[part].update({name: v for name, v in values.items() if name not in module_names})
    # Not name by name: the store fails to delete the second name of a parameter that two modules share.
    store.clear()
    store.set_state(merged)


def _check_callable(name: str, fn: Any) -> None:
    inner = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    if inspect.ismethod(inner) and isinstance(inner.__self__, nn.Module):
        raise argument_error(
            name,
            "a module itself or a function",
            f"the method {inner.__name__!r} of a {type(inner.__self__).__name__}, which hides its parameters",
            "pass the module, with what it computes in forward",
        )
    if not callable(fn) or inspect.isclass(fn):
        raise argument_error(name, "a module or a function with Pyro's primitives", describe(fn))


def _check_maker(name: str, maker: Any) -> Any:
    if maker is not None and not callable(maker):
        raise argument_error(name, "a callable", maker, f"pass lambda x: {type(maker).__name__}(x, ...)")
    return maker


def _check_not_negative(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 <= value < math.inf):
        raise argument_error(name, "a finite number of at least 0", value)
    return float(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _accelerator(accelerator: Any) -> Any:
    if accelerator == "auto" and torch.backends.mps.is_available() and not torch.cuda.is_available():
        return "cpu"
    return accelerator


def _floating_type(*functions: Any) -> torch.dtype | None:
    for function in functions:
        if isinstance(function, nn.Module):
            for parameter in function.parameters():
                if parameter.is_floating_point():
                    return parameter.dtype
    return None
