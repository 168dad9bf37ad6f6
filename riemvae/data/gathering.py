"""The data of a ``Dataset`` or ``DataLoader`` as arrays in memory, for what needs all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from riemvae._checks import argument_error

_ITEMS = 256  # of a data set, collated at once


def in_memory(data: Any, name: str = "x") -> Any:
    """The arrays of a data set or loader; anything else as it is.

    A loader's data come in the order of its data set, whether it shuffles or not, so that results are in that
    order too; one with a batch sampler of its own is read as it comes.

    Args:
        data: A torch ``Dataset`` whose items are a tensor, a tuple or a mapping of these; a ``DataLoader`` of
            such batches; or anything else.
        name: The argument's name in the messages.

    Returns:
        A tensor, a tuple of several or a mapping, the first dimension over data; what is neither a data set
        nor a loader, unchanged.

    Raises:
        ValueError: No data, or items that are no numbers.

    Example:
        >>> x = torch.arange(5.0)
        >>> in_memory(DataLoader(TensorDataset(x), batch_size=2, shuffle=True)).tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    if isinstance(data, TensorDataset):
        return data.tensors[0] if len(data.tensors) == 1 else tuple(data.tensors)
    if not isinstance(data, (Dataset, DataLoader)):
        return data
    batches = list(_batches(data))
    if not batches:
        raise argument_error(name, "at least one datum", "an empty set")
    first = batches[0]
    if isinstance(first, Mapping):
        return {key: _joined(f"{name}[{key!r}]", [batch[key] for batch in batches]) for key in first}
    if isinstance(first, (tuple, list)):
        parts = tuple(_joined(f"{name}[{i}]", list(part)) for i, part in enumerate(zip(*batches)))
        return parts[0] if len(parts) == 1 else parts
    return _joined(name, batches)


def batch_size_of(data: Any) -> int | None:
    """The data in a batch of a loader; None where it does not say, and for anything else."""
    return data.batch_size if isinstance(data, DataLoader) else None


def _batches(data: Dataset | DataLoader) -> Iterator[Any]:
    if not isinstance(data, DataLoader):
        return iter(DataLoader(data, batch_size=_ITEMS))
    if data.batch_size is None:
        return iter(data)
    return iter(DataLoader(data.dataset, batch_size=data.batch_size, collate_fn=data.collate_fn))


def _joined(name: str, parts: list[Any]) -> Tensor:
    bad = next((part for part in parts if not isinstance(part, Tensor)), None)
    if bad is not None:
        raise argument_error(name, "batches of tensors", bad, "leave out what is no number")
    return torch.cat(parts)
