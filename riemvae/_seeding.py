"""Draws that leave the caller's generators as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from riemvae._checks import check_seed


@contextmanager
def kept_generators(seed: int | None = None) -> Iterator[None]:
    """Torch's generators are afterwards as they were; within it they start from ``seed`` if it is given.

    Raises:
        ValueError: A seed that is not an integer.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with kept_generators():
        ...     a = torch.rand(2)
        >>> torch.equal(a, torch.rand(2))
        True
    """
    seed = check_seed("seed", seed)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def forked(seed: int | None) -> Iterator[None]:
    """Within it the draws are those of ``seed``; the caller's generator is left as it was. None: its own.

    Raises:
        ValueError: A seed that is not an integer.

    Example:
        >>> with forked(3):
        ...     a = torch.rand(2)
        >>> with forked(3):
        ...     print(torch.equal(a, torch.rand(2)))
        True
    """
    if seed is None:
        yield
        return
    with kept_generators(seed):
        yield
