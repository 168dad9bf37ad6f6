"""What of a sequence is seen: masks checked, and missing values taken out of the way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from riemvae._checks import argument_error
from riemvae._masks import check_mask, visits_seen


class Seen(NamedTuple):
    """Sequences whose missing values are zero, and the masks that say which those are.

    Attributes:
        x: ``(B, T, *shape)``, zero wherever nothing is seen.
        observed: Which visits are seen, ``(B, T)``: those of which any value is.
        pixel_mask: Which values of the visits are seen, ``(B, T, *shape)``; None is all of them.
        times: ``(B, T)`` or None; at unseen visits the mean of the subject's seen times (of all
            subjects' where it has none).
    """

    x: Tensor
    observed: Tensor
    pixel_mask: Tensor | None
    times: Tensor | None


def seen(
    x: Tensor,
    observed: Tensor | None = None,
    pixel_mask: Tensor | None = None,
    times: Tensor | None = None,
) -> Seen:
    """Checks masks and times against ``x`` and replaces what is missing.

    What a missing visit holds, NaN and infinities included, cannot reach a network, a density or a gradient
    afterwards.

    Args:
        x: ``(B, T, *shape)``.
        observed: ``(B, T)``, True where the visit is seen; None is all of them.
        pixel_mask: ``(B, T, *shape)``, True where the value is seen; None is all of them.
        times: ``(B, T)``, finite where the visit is seen.

    Raises:
        ValueError: A mask that is not boolean or of another shape than the data; a time of a seen visit that
            is not finite.

    Example:
        >>> x = torch.tensor([[[1.0], [float("nan")]]])
        >>> seen(x, torch.tensor([[True, False]])).x
        tensor([[[1.],
                 [0.]]])
    """
    if x.dim() < 3:
        raise argument_error("x", "sequences (B, T, *shape) with at least one value a visit", x)
    visits = x.shape[:2]
    if observed is None:
        observed = torch.ones(visits, dtype=torch.bool, device=x.device)
    else:
        check_mask("observed", observed, visits)
        x = torch.where(observed.reshape(*visits, *(1,) * (x.dim() - 2)), x, x.new_zeros(()))
    if pixel_mask is not None:
        check_mask("pixel_mask", pixel_mask, x.shape)
        if bool(pixel_mask.all()):
            pixel_mask = None  # the same to the last bit as no mask
        else:
            x = torch.where(pixel_mask, x, x.new_zeros(()))
            observed = visits_seen(observed, pixel_mask)
    if times is not None:
        if times.shape != visits:
            raise argument_error("times", f"(B, T) = {tuple(visits)}, one for each visit", times)
        finite = torch.where(observed, times, 0.0)
        if not bool(torch.isfinite(finite).all()):
            raise argument_error("times", "finite times of the seen visits", "NaN or infinities among them")
        count = observed.sum(1, keepdim=True)
        mean = finite.sum(1, keepdim=True) / count.clamp_min(1)
        everyone = finite.sum() / count.sum().clamp_min(1)
        times = torch.where(observed, times, torch.where(count > 0, mean, everyone))
    return Seen(x, observed, pixel_mask, times)
