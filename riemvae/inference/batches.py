"""Data of any kind as batches.

A batch is a tensor for ``model(x)``, a tuple for ``model(*batch)`` or a mapping for ``model(**batch)``.
Arrays in memory are cut by index tensors, a whole batch at once; data sets and loaders go through torch's
``DataLoader``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from riemvae._checks import argument_error, check_count, check_finite, describe

# Arrays up to this size are kept on the device for the whole training; larger ones travel batch by batch.
RESIDENT_BYTES = 2**30

Batch: TypeAlias = Any  # a tensor, or a tuple, list or mapping of tensors


def map_batch(function: Callable[[Any], Any], batch: Batch) -> Batch:
    """``function`` of each tensor of a batch, in the batch's own structure (a list becomes a tuple).

    Example:
        >>> map_batch(lambda a: a + 1, {"x": torch.zeros(2)})
        {'x': tensor([1., 1.])}
    """
    if isinstance(batch, Mapping):
        return {key: function(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(function(value) for value in batch)
    return function(batch)


def batch_parts(batch: Batch) -> list[Any]:
    """The members of a batch, in order."""
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, (tuple, list)) else [batch]


def batch_call(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments with which a model is called on ``batch``.

    Example:
        >>> batch_call({"x": 1})
        ((), {'x': 1})
        >>> batch_call((1, 2))
        ((1, 2), {})
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def batch_length(batch: Batch) -> int:
    """The number of data in a batch: the leading size of its first tensor.

    Raises:
        ValueError: if no member of the batch is a tensor with a leading dimension.
    """
    for part in batch_parts(batch):
        if isinstance(part, Tensor) and part.dim() > 0:
            return part.shape[0]
    raise argument_error("data", "batches with at least one tensor of shape (B, ...)", batch)


def data_dims(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Numbers in one datum: in a row of the first tensor among the arguments."""
    first = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
    return math.prod(first.shape[1:])


class ArrayBatches:
    """Arrays in memory as batches; a new pass draws a new order from torch's generator.

    A pass of one batch yields the arrays themselves: nothing is drawn and nothing is copied. The smaller last
    batch is kept; a single datum that is left over joins the batch before it where they are shuffled, that
    is, to train on: alone it has no batch statistics. Over several processes the order is common to all, from
    ``seed`` and the number of the pass, and each process takes its share; shares are made equal by repeating
    a few data.

    Args:
        data: a tensor ``(N, ...)``, or a tuple or mapping of tensors with the same ``N``.
        batch_size: data a batch (and a process); ``None`` for all of them.
        shuffle: whether each pass has its own order.
        rank: this process's number, of ``world_size``.
        world_size: number of processes.
        seed: of the common order, where there are several processes.

    Example:
        >>> batches = ArrayBatches(torch.arange(5.0), batch_size=2, shuffle=False)
        >>> [batch.tolist() for batch in batches], len(batches)
        ([[0.0, 1.0], [2.0, 3.0], [4.0]], 3)
    """

    def __init__(
        self,
        data: Batch,
        batch_size: int | None = None,
        shuffle: bool = True,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        self.data, self.batch_size, self.shuffle = data, batch_size, shuffle
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.num_data = batch_length(data)
        self._passes = 0

    @property
    def _share(self) -> int:
        return math.ceil(self.num_data / self.world_size)

    @property
    def _size(self) -> int:
        return self._share if self.batch_size is None else min(self.batch_size, self._share)

    @property
    def _sizes(self) -> list[int]:
        """Data in each batch of a pass."""
        full, rest = divmod(self._share, self._size)
        if rest == 1 and self.shuffle and self._size > 1:
            return [*[self._size] * (full - 1), self._size + 1]
        return [self._size] * full + [rest] * (rest > 0)

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Batch]:
        if self.world_size == 1 and len(self) == 1:
            yield self.data
            return
        for index in self._order().split(self._sizes):
            yield map_batch(partial(_rows, index), self.data)

    def _order(self) -> Tensor:
        if self.world_size == 1:
            return torch.randperm(self.num_data) if self.shuffle else torch.arange(self.num_data)
        generator = torch.Generator().manual_seed(self.seed + self._passes)
        self._passes += 1
        order = (
            torch.randperm(self.num_data, generator=generator)
            if self.shuffle
            else torch.arange(self.num_data)
        )
        padded = order[torch.arange(self._share * self.world_size) % self.num_data]
        return padded[self.rank :: self.world_size]

    def first(self) -> Batch:
        """The first batch of the order in which the data came."""
        return map_batch(lambda array: array[: self._size], self.data)

    def on(self, device: torch.device, rank: int = 0, world_size: int = 1, seed: int = 0) -> ArrayBatches:
        """The same for one process, its arrays moved to ``device`` if they are small enough to stay there."""
        size = sum(part.numel() * part.element_size() for part in batch_parts(self.data))
        data = map_batch(lambda a: a.to(device), self.data) if size <= RESIDENT_BYTES else self.data
        return ArrayBatches(data, self.batch_size, self.shuffle, rank=rank, world_size=world_size, seed=seed)


def _rows(index: Tensor, array: Tensor) -> Tensor:
    return array.index_select(0, index.to(array.device))


class LoaderBatches:
    """A ``DataLoader`` as batches; a pass draws from torch's generator when its first batch is asked for."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        yield from self.loader

    def first(self) -> Batch:
        """The first batch of one pass."""
        for batch in self.loader:
            return batch
        raise argument_error("data", "at least one batch", "a loader that yields none")

    def on(self, device: torch.device, rank: int = 0, world_size: int = 1, seed: int = 0) -> Any:
        """These batches; over several processes the loader itself, for Lightning to put its sampler into."""
        return self if world_size == 1 else self.loader


def make_batches(
    name: str,
    data: Any,
    batch_size: int | None = None,
    *,
    shuffle: bool = True,
    num_workers: int = 0,
    dtype: torch.dtype | None = None,
    missing: bool = False,
) -> ArrayBatches | LoaderBatches:
    """Tensors, arrays, data sets and loaders as batches.

    Args:
        name: the argument's name, for errors.
        data: a tensor or array ``(N, ...)``; a tuple, list or mapping of these; a torch ``Dataset`` whose
            items are a tensor, tuple or mapping; or a ``DataLoader``, used as it is.
        batch_size: data a batch, ``None`` for all of them at once.
        shuffle: whether each pass has a new order.
        num_workers: processes that read a ``Dataset``.
        dtype: floating arrays that are not tensors get this type (default: torch's); tensors keep theirs.
        missing: whether arrays may hold NaN, for models that are told what is missing.

    Returns:
        An iterable of batches.

    Raises:
        ValueError: for an empty set, members of different lengths, NaN or infinite values, something that is
        not
            an array, or a ``batch_size`` beside a ``DataLoader``.

    Example:
        >>> batches = make_batches("data", np.zeros((8, 3)), batch_size=3)
        >>> [tuple(batch.shape) for batch in batches]
        [(3, 3), (3, 3), (2, 3)]
    """
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size, remedy="leave it out for full batches")
    check_count("num_workers", num_workers, minimum=0)
    if isinstance(data, DataLoader):
        if batch_size is not None:
            raise argument_error(
                "batch_size", f"None, since {name} is a DataLoader", batch_size, "set it in the loader"
            )
        return LoaderBatches(_not_empty(name, data))
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Dataset):
        return LoaderBatches(_dataset_loader(name, data, batch_size, shuffle, num_workers))
    if isinstance(data, Mapping):
        arrays: Batch = {k: _as_tensor(f"{name}[{k!r}]", v, dtype, missing) for k, v in data.items()}
    elif isinstance(data, (tuple, list)):
        arrays = tuple(_as_tensor(f"{name}[{i}]", v, dtype, missing) for i, v in enumerate(data))
    else:
        arrays = _as_tensor(name, data, dtype, missing)
    lengths = [len(part) for part in batch_parts(arrays)]
    if not lengths or 0 in lengths:
        raise argument_error(name, "at least one datum", "an empty set")
    if len(set(lengths)) > 1:
        raise argument_error(
            name, "members with the same number of data", f"{lengths}", "cut them to the same rows"
        )
    return ArrayBatches(arrays, batch_size, shuffle)


def takes_missing(model: Any) -> bool:
    """Whether a model is told what is missing, so that its data may hold NaN there: ``takes_missing``."""
    return bool(getattr(model, "takes_missing", False))


def _as_tensor(name: str, value: Any, dtype: torch.dtype | None, missing: bool) -> Tensor:
    expected = "a tensor or numeric array of shape (N, ...)"
    if isinstance(value, Tensor):
        tensor = value
    elif hasattr(value, "__array__"):
        try:
            with warnings.catch_warnings():
                # Batches are only read, so an array that cannot be written to is as good as any.
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                tensor = torch.as_tensor(np.asarray(value))
        except TypeError as error:
            raise argument_error(name, expected, value, "encode text and objects as numbers") from error
        if tensor.is_floating_point():
            tensor = tensor.to(dtype or torch.get_default_dtype())
    else:
        raise argument_error(name, expected, value, "pass a tensor, an array, or a tuple or mapping of these")
    if tensor.dim() == 0:
        raise argument_error(name, expected, value)
    if not missing:
        check_finite(name, tensor)
    return tensor.detach()


def _not_empty(name: str, loader: DataLoader) -> DataLoader:
    try:
        length = len(loader)
    except TypeError:
        return loader
    if length == 0:
        raise argument_error(name, "at least one datum", "an empty set")
    return loader


def _dataset_loader(
    name: str, data: Dataset, batch_size: int | None, shuffle: bool, num_workers: int
) -> DataLoader:
    workers: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    if isinstance(data, IterableDataset):
        if batch_size is None:
            raise argument_error("batch_size", f"a number, since {name} is an IterableDataset", None)
        return DataLoader(data, batch_size=batch_size, **workers)
    length = len(data) if hasattr(data, "__len__") else None
    if length is None:
        raise argument_error(name, "a Dataset with a length", describe(data), "define __len__")
    if length == 0:
        raise argument_error(name, "at least one datum", "an empty set")
    return DataLoader(
        data, batch_size=batch_size or length, shuffle=shuffle and (batch_size or length) < length, **workers
    )
