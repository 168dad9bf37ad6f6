"""The engine of every estimate per datum: batches, devices, seeds, a progress bar, and runs that resume."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from riemvae._checks import argument_error, check_count
from riemvae._seeding import forked
from riemvae.guides.evaluation import evaluating
from riemvae.guides.log_joint import prototype
from riemvae.inference.batches import (
    batch_call,
    batch_length,
    batch_parts,
    make_batches,
    map_batch,
    takes_missing,
)
from riemvae.inference.tensor_file import read_tensors, write_tensors
from riemvae.inference.weights import global_draw, placement

Estimate = Callable[[tuple[Any, ...], dict[str, Any], int, dict[str, Tensor]], Mapping[str, Tensor]]

# Seconds between two writings of a checkpoint; one is also written at the end and when the run is stopped.
CHECKPOINT_INTERVAL = 10.0

_FORMAT, _VERSION = "unfinished estimates", 1


def for_each_batch(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    data: Any,
    estimate: Estimate,
    *,
    batch_size: int,
    seed: int | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    description: str = "",
    tolerance: float = 1e-6,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Runs ``estimate`` on one batch of data after another and joins what it says of each datum.

    A batch is moved to the model's device and estimated without gradients, in the context in which guides
    estimate rather than train. Global latents are drawn once from the guide, from the first batch, and shared
    by all data (none without a guide).

    With a ``checkpoint``, finished batches are kept in that file, written whole or not at all every few
    seconds, at the end, and when the run is stopped. Another call with the same arguments goes on from there,
    with the random numbers that would have followed: the result is the one of a run that was not stopped, bit
    by bit. Without a ``seed`` it goes on with the first run's random numbers too. The file holds tensors and
    text; reading it runs no code.

    Args:
        model: The model itself.
        guide: Its guide; None for an estimate that needs none.
        data: Tensor, array, tuple or mapping of these, data set or loader. A loader's own batches are used.
        estimate: ``(args, kwargs, size, shared) ->`` a mapping of tensors ``(size, ...)``, where
            ``model(*args, **kwargs)`` is the model on this batch and ``shared`` the values of global latents.
        batch_size: Data in a batch.
        seed: Of the random numbers; the caller's generator is left as it was. None draws from it.
        progress: Shows a bar with the time that is left.
        checkpoint: A file for finished batches.
        description: What the bar says: the name of the estimate, which is one of a checkpoint's settings.
        tolerance: Residual to which fixed points of Riemannian guides are iterated.
        settings: What else the result depends on, as JSON has it: a checkpoint of other settings is refused.

    Returns:
        The tensors of all batches, joined along their first dimension: ``(N, ...)``.

    Raises:
        ValueError: Bad data; an estimate without one number a datum; a checkpoint of other data, weights,
            settings or seed, or a file that is no checkpoint.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        >>> def squares(args, kwargs, size, shared):
        ...     return {"square": args[0] ** 2}
        >>> for_each_batch(model, None, torch.arange(4.0), squares, batch_size=3)
        {'square': tensor([0., 1., 4., 9.])}
    """
    check_count("batch_size", batch_size)
    run = _Run(model, guide, estimate, seed, tolerance)
    size = None if isinstance(data, DataLoader) else batch_size
    batches = make_batches("data", data, size, shuffle=False, dtype=run.dtype, missing=takes_missing(model))
    with forked(seed):
        kept = None
        if checkpoint is not None:
            own = {"batch_size": size, "seed": seed, "tolerance": tolerance, "description": description}
            kept = _Checkpoint(Path(checkpoint), {**own, **(settings or {})}, run)
        with contextlib.nullcontext() if kept is None else kept.written_if_stopped():
            for batch in _bar(batches, progress, description):
                run.take(batch, kept)
        if kept is not None:
            kept.finish()
    return run.result()


class _Run:
    """The state of a run: what is shared, and what is known of the data so far."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None,
        estimate: Estimate,
        seed: int | None,
        tolerance: float,
    ) -> None:
        self.model, self.guide, self.estimate = model, guide, estimate
        self.seed, self.tolerance = seed, tolerance
        self.device, self.dtype = placement(model) if guide is None else placement(model, guide)
        self.place = self.device or torch.device("cpu")
        self.shared: dict[str, Tensor] | None = None
        self.parts: dict[str, list[Tensor]] = {}

    def take(self, batch: Any, kept: _Checkpoint | None) -> None:
        """One batch: from the checkpoint, or estimated and kept there."""
        if kept is not None and kept.known(batch):
            return
        batch = self.moved(batch)
        args, kwargs = batch_call(batch)
        size = batch_length(batch)
        with torch.no_grad(), evaluating(self.tolerance, self.model, self.guide):
            if self.shared is None:
                self.shared = {} if self.guide is None else global_draw(self.model, self.guide, args, kwargs)
            result = dict(self.estimate(args, kwargs, size, self.shared))
        if self.parts and set(result) != set(self.parts):
            raise argument_error("estimate", f"the names {sorted(self.parts)}", f"{sorted(result)}")
        for name, value in result.items():
            if value.shape[:1] != (size,):
                expected = f"tensors with one row for each of {size} data"
                raise argument_error("estimate", expected, f"{name!r} of shape {tuple(value.shape)}")
            self.parts.setdefault(name, []).append(value.detach())
            self.place = value.device
        if kept is not None:
            kept.add()

    def moved(self, batch: Any) -> Any:
        """A batch on the model's device."""
        if self.device is None:
            return batch
        return map_batch(lambda a: a.to(self.device) if isinstance(a, Tensor) else a, batch)

    def result(self) -> dict[str, Tensor]:
        if not self.parts:
            raise argument_error("data", "at least one batch", "a loader that yields none")
        # Parts of a checkpoint were on the CPU.
        return {name: torch.cat([p.to(self.place) for p in parts]) for name, parts in self.parts.items()}


class _Checkpoint:
    """Finished batches in a file, with all that says whether they are those of this run.

    Each batch has a digest of its numbers, checked as the data pass by: data of any kind, a shuffled loader
    among them, must come again in the same order, which they do with the generator's state at the start.
    """

    def __init__(self, path: Path, settings: dict[str, Any], run: _Run) -> None:
        self.path, self.run = path, run
        self.settings = json.loads(json.dumps(settings, sort_keys=True))
        self.digests: list[str] = []
        self.weights: str | None = None
        self.start, self.state = _generator_states(), _generator_states()
        self.passed = 0  # batches of this pass so far
        self.finished = 0  # batches in the file when it was read
        self.written = time.monotonic()
        if path.exists():
            self._read()

    # -- reading -----------------------------------------------------------------------------------------

    def _read(self) -> None:
        header, tensors = read_tensors(self.path, _FORMAT, _VERSION, "checkpoint")
        if header["settings"] != self.settings:
            old, new = header["settings"], self.settings
            names = [n for n in {**old, **new} if old.get(n) != new.get(n)]
            raise self._refusal(
                "settings", ", ".join(f"{n}={old.get(n)!r} instead of {new.get(n)!r}" for n in sorted(names))
            )
        self.digests, self.weights = header["digests"], header["weights"]
        self.finished = len(self.digests)
        for name in header["shared"]:
            if self.run.shared is None:
                self.run.shared = {}
            self.run.shared[name] = tensors[f"shared.{name}"].to(self.run.device or "cpu")
        if self.finished and self.run.shared is None:
            self.run.shared = {}
        for name in header["results"]:
            self.run.parts[name] = [tensors[f"result.{name}"]]
        self.start = _states_from(tensors, "start")
        self.state = _states_from(tensors, "state")
        _restore(self.start)  # a loader draws its order from it

    def known(self, batch: Any) -> bool:
        """Whether the file holds this batch; refuses another one in its place."""
        digest = _digest(batch)
        number = self.passed
        self.passed += 1
        if number == 0:
            weights = self._weights_digest(batch)
            if self.weights is not None and self.weights != weights:
                raise self._refusal("weights", "the numbers of the model or the guide have changed")
            self.weights = weights
        if number >= self.finished:
            self.digests.append(digest)
            return False
        if self.digests[number] != digest:
            raise self._refusal("data", f"batch {number} is another one")
        if number == self.finished - 1:
            _restore(self.state)
        return True

    def _weights_digest(self, batch: Any) -> str:
        """Of the numbers that the model and the guide hold: states of modules, and Pyro's parameters."""
        run = self.run
        args, kwargs = batch_call(run.moved(batch))
        state: dict[str, Any] = {}
        for part, function in (("model", run.model), ("guide", run.guide)):
            if isinstance(function, nn.Module):
                state.update({f"{part}.{k}": v for k, v in function.state_dict().items()})
            elif function is not None:
                trace = prototype(function, args, kwargs)
                params = [s for s in trace.nodes.values() if s["type"] == "param"]
                state.update({f"{part}.{s['name']}": s["value"] for s in params})
        return _digest(state)

    def _refusal(self, what: str, got: str) -> ValueError:
        return argument_error(
            "checkpoint",
            f"a file of the same data, weights and settings ({self.path} is of other {what})",
            got,
            "delete the file or name another one to start afresh",
        )

    # -- writing -----------------------------------------------------------------------------------------

    def add(self) -> None:
        """Keeps the batch that was just estimated, in the file if it is time."""
        self.finished = self.passed
        self.state = _generator_states()
        if time.monotonic() - self.written >= CHECKPOINT_INTERVAL:
            self._write()

    @contextlib.contextmanager
    def written_if_stopped(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if self.finished:
                self._write()
            raise

    def finish(self) -> None:
        """Refuses a file of more data than there are; writes the last batches."""
        if self.passed < self.finished:
            raise self._refusal("data", f"{self.passed} batches where it has {self.finished}")
        self._write()

    def _write(self) -> None:
        run = self.run
        for name, parts in run.parts.items():  # joined, so that the next writing joins less
            run.parts[name] = [torch.cat([part.cpu() for part in parts])]
        shared = run.shared or {}
        header = {
            "settings": self.settings,
            "weights": self.weights,
            "digests": self.digests[: self.finished],
            "shared": sorted(shared),
            "results": list(run.parts),
        }
        tensors = {f"result.{name}": parts[0] for name, parts in run.parts.items()}
        tensors.update({f"shared.{name}": value.cpu().clone() for name, value in shared.items()})
        for name, states in (("start", self.start), ("state", self.state)):
            tensors.update({f"rng.{name}.{i}": state for i, state in enumerate(states)})
        write_tensors(self.path, _FORMAT, _VERSION, header, tensors)
        self.written = time.monotonic()


def _digest(batch: Any) -> str:
    """Of the numbers, types and shapes of a batch or a mapping of tensors."""
    digest = hashlib.sha256()
    names = list(batch) if isinstance(batch, Mapping) else None
    digest.update(repr(names).encode())
    for part in batch_parts(batch):
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            flat = part.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def _generator_states() -> list[Tensor]:
    """The states of torch's global generators: the CPU's, then those of devices in use."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def _states_from(tensors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    states: list[Tensor] = []
    while f"rng.{name}.{len(states)}" in tensors:
        states.append(tensors[f"rng.{name}.{len(states)}"])
    return states


def _restore(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_initialized():
        for index, state in enumerate(states[1 : 1 + torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, index)


def _bar(batches: Any, progress: bool, description: str) -> Iterator[Any]:
    """The batches, under a bar on request."""
    if not progress:
        yield from batches
        return
    from rich import progress as rich

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn())
    with rich.Progress(*columns, rich.TimeElapsedColumn(), rich.TimeRemainingColumn()) as bar:
        try:
            total = len(batches)
        except TypeError:  # a stream says no length
            total = None
        yield from bar.track(batches, total=total, description=description or "batches")
