"""Draws from a seed that leave the caller's generators as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def forked(seed: int | None) -> Iterator[None]:
    """Within it the draws are those of ``seed``; the caller's generator is left as it was. None: its own.

    Example:
        >>> with forked(3):
        ...     a = torch.rand(2)
        >>> with forked(3):
        ...     print(torch.equal(a, torch.rand(2)))
        True
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield
