"""Errors that name the argument, what was expected, what came and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def summary(values: Any) -> str:
    """A named tuple of tensors by their shapes, for printing.

    Example:
        >>> from riemvae.longitudinal import Contrast
        >>> Contrast(torch.zeros(5, 3), torch.zeros(5, 3))
        Contrast(first: (5, 3), second: (5, 3))
    """
    parts = [
        f"{name}: {tuple(value.shape) if isinstance(value, Tensor) else value!r}"
        for name, value in values._asdict().items()
    ]
    return f"{type(values).__name__}({', '.join(parts)})"


def describe(value: Any) -> str:
    """A short description of ``value`` for an error message.

    Example:
        >>> describe(torch.zeros(2, 3))
        'a torch.float32 tensor of shape (2, 3)'
    """
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        return f"a {dtype} array of shape {tuple(shape)}"
    if isinstance(value, (int, float, str, bool, type(None))):
        return repr(value)
    return f"an object of type {type(value).__name__}"


def argument_error(name: str, expected: str, got: Any, remedy: str | None = None) -> ValueError:
    """The error for one bad argument; ``got`` is described unless it is already a string.

    Example:
        >>> raise argument_error("latent_dim", "a positive integer", 0, "pass latent_dim=2")
        Traceback (most recent call last):
        ValueError: latent_dim: expected a positive integer, got 0; pass latent_dim=2.
    """
    text = f"{name}: expected {expected}, got {got if isinstance(got, str) else describe(got)}"
    return ValueError(f"{text}; {remedy}." if remedy else f"{text}.")


def repeated(names: Sequence[str]) -> str | None:
    """A name that occurs more than once, the first in alphabetical order; None where there is none.

    Example:
        >>> repeated(["b", "a", "b"])
        'b'
    """
    return min((name for name in names if names.count(name) > 1), default=None)


def check_positive(name: str, value: Any, remedy: str | None = None) -> None:
    """Refuses a number or tensor that is not finite and above zero everywhere."""
    if isinstance(value, Tensor):
        good = bool(torch.isfinite(value).all() and (value > 0).all())
    else:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        good = good and math.isfinite(value) and value > 0
    if not good:
        raise argument_error(name, "a finite positive number", value, remedy)


def check_count(name: str, value: Any, minimum: int = 1, remedy: str | None = None) -> int:
    """Refuses what is not an integer of at least ``minimum``; returns it as an ``int``."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < minimum:
        raise argument_error(name, f"an integer of at least {minimum}", value, remedy)
    return int(value.__index__())


def check_seed(name: str, value: Any) -> int | None:
    """Refuses what is neither None nor an integer of 64 bits; returns it as an ``int``."""
    if value is None:
        return None
    if not hasattr(value, "__index__") or not -(2**63) <= value.__index__() < 2**64:
        raise argument_error(name, "an integer of 64 bits, or None", value)
    return int(value.__index__())


def check_finite(name: str, value: Tensor, remedy: str | None = None) -> None:
    """Refuses a tensor that holds NaN or an infinity, and says how many."""
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise argument_error(
            name,
            "finite values",
            f"{bad} NaN or infinite of {value.numel()}",
            remedy or "drop or impute them",
        )


def check_last_dim(name: str, value: Tensor, size: int, remedy: str | None = None) -> None:
    """Refuses a tensor whose last dimension is not ``size``."""
    if value.dim() == 0 or value.shape[-1] != size:
        raise argument_error(name, f"a tensor of shape (..., {size})", value, remedy)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Refuses a name that is not among ``choices``; returns it.

    Example:
        >>> check_choice("likelihood", "bernouli", ["bernoulli", "gaussian"])
        Traceback (most recent call last):
        ValueError: likelihood: expected one of 'bernoulli', 'gaussian', got 'bernouli'.
    """
    if not isinstance(value, str) or value not in choices:
        raise argument_error(name, "one of " + ", ".join(repr(c) for c in choices), describe(value))
    return value
