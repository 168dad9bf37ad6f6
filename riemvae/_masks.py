"""Masks of what is seen of sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from riemvae._checks import argument_error


def check_mask(name: str, mask: Tensor, shape: torch.Size) -> None:
    """Refuses a mask that is not boolean or of another shape than the data."""
    if mask.dtype != torch.bool:
        raise argument_error(
            name, "a boolean mask, True where seen", f"dtype {mask.dtype}", "use mask.bool()"
        )
    if mask.shape != shape:
        raise argument_error(name, f"shape {tuple(shape)}, as the data", f"shape {tuple(mask.shape)}")


def visits_seen(observed: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """The observed visits ``(B, T)`` of which any value is seen under ``pixel_mask (B, T, *shape)``."""
    return observed if pixel_mask is None else observed & pixel_mask.flatten(2).any(2)
