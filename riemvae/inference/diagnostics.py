"""What a trained guide makes of its latent dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from riemvae._checks import check_positive
from riemvae.guides import AmortizedGuide
from riemvae.inference.batches import batch_call, make_batches


@dataclass(frozen=True)
class ActiveUnits:
    """Which latent dimensions carry information about the data.

    Attributes:
        variance: ``Var_x(E_q[z_j | x])``, shape ``(d,)``, in units of ``z²``.
        active: Whether each exceeds the threshold, ``(d,)``.
    """

    variance: Tensor
    active: Tensor

    @property
    def count(self) -> int:
        """The number of active dimensions."""
        return int(self.active.sum())


@torch.no_grad()
def active_units(
    guide: AmortizedGuide, data: Any, *, threshold: float = 1e-2, batch_size: int | None = None
) -> ActiveUnits:
    """The latent dimensions whose encoder means vary over the data: a collapsed dimension does not.

    Args:
        guide: A guide with an encoder; the encoder's own means count, before any flow.
        data: Tensor, array, tuple or mapping of these, data set or loader, at least two data.
        threshold: Variance above which a dimension is active.
        batch_size: Data encoded at a time; None is all.

    Returns:
        An :class:`ActiveUnits`.

    Raises:
        ValueError: Bad data or threshold.

    Source: Burda, Grosse and Salakhutdinov (2016), appendix C.

    Example:
        >>> from riemvae.guides import GaussianGuide
        >>> encoder = lambda x: (torch.stack([x[:, 0], 0 * x[:, 1]], -1), torch.ones(len(x), 2))
        >>> active_units(GaussianGuide(lambda x: None, encoder), torch.randn(50, 2)).active
        tensor([ True, False])
    """
    check_positive("threshold", threshold)
    means = []
    for batch in make_batches("data", data, batch_size, shuffle=False):
        args, kwargs = batch_call(batch)
        means.append(guide.encoder_distribution(*args, *kwargs.values()).mean)
    variance = torch.cat(means).var(0)
    return ActiveUnits(variance, variance > threshold)
