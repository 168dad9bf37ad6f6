"""Training and evaluation modes of modules, put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def kept_modes(*functions: Any) -> Iterator[None]:
    """Each part of the modules among ``functions`` is in its mode of before afterwards."""
    parts = [part for fn in functions if isinstance(fn, nn.Module) for part in fn.modules()]
    modes = [(part, part.training) for part in parts]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def in_evaluation_mode(*functions: Any) -> Iterator[None]:
    """Modules among ``functions`` in evaluation mode; each part is afterwards as it was."""
    with kept_modes(*functions):
        for fn in functions:
            if isinstance(fn, nn.Module):
                for part in fn.modules():
                    part.training = False
        yield
