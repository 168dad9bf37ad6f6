"""Sampling from a prior, and decoding in batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from riemvae._checks import argument_error, check_count
from riemvae._recipe import recipe
from riemvae.priors.context import call_prior


@recipe
class PriorSampler:
    """Draws latent points from a prior.

    Args:
        prior: a distribution over points of shape ``(d,)``, or a callable or module that returns one (it is
            called at each :meth:`sample`, so it may go on training; global sites that it samples are drawn
            once for all points).
        y: what a prior ``p(z|y)`` is conditioned on, ``(m, ...)``: the ``i``-th draw is given row ``i mod
            m``.

    Raises:
        ValueError: when ``prior`` is neither, or its draws are not points of shape ``(d,)``; when drawing, no
            ``y`` for a prior that requires it, or one for a prior that takes none.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> prior = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1)
        >>> PriorSampler(prior).sample(5).shape
        torch.Size([5, 2])
    """

    def __init__(self, prior: Distribution | Callable[..., Distribution], y: Tensor | None = None) -> None:
        if not isinstance(prior, Distribution) and not callable(prior):
            raise argument_error("prior", "a distribution, or a callable that returns one", prior)
        if y is not None and (not isinstance(y, Tensor) or y.dim() == 0 or len(y) == 0):
            raise argument_error("y", "a tensor (m, ...) with m >= 1 rows", y)
        self.prior, self.y = prior, y

    def __call__(self, n: int) -> Tensor:
        """The same as :meth:`sample`."""
        return self.sample(n)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """``n`` draws of shape ``(n, d)``."""
        n = check_count("n", n)
        y = None if self.y is None else self.y[torch.arange(n, device=self.y.device) % len(self.y)]
        prior = call_prior(self.prior, y)
        if not isinstance(prior, Distribution):
            raise argument_error("prior", "a callable that returns a distribution", prior)
        each = y is not None and prior.batch_shape == (n,)  # a distribution for each draw
        z = prior.sample(torch.Size() if each else torch.Size([n]))
        if z.dim() != 2:
            raise argument_error("prior", f"draws of shape ({n}, d)", z, "its batch shape must be ()")
        return z


@torch.no_grad()
def decode(decoder: Callable[[Tensor], Any], z: Tensor, batch_size: int = 256) -> Any:
    """Runs ``decoder`` over ``z (n, d)`` in batches, without gradients.

    A module runs in evaluation mode, each of its parts being put back into its own mode afterwards.

    Args:
        decoder: ``z (b, d) -> `` a tensor with leading dimension ``b``, or a tuple of such tensors.
        z: latent points.
        batch_size: points at once.

    Returns:
        What the decoder returns, with leading dimension ``n``.

    Raises:
        ValueError: when ``z`` is not ``(n, d)`` with ``n >= 1``.

    Example:
        >>> decode(nn.Linear(2, 5), torch.zeros(7, 2), batch_size=3).shape
        torch.Size([7, 5])
    """
    if z.dim() != 2 or not len(z):
        raise argument_error("z", "a tensor of shape (n, d) with n >= 1", z)
    check_count("batch_size", batch_size)
    modes = [(m, m.training) for m in decoder.modules()] if isinstance(decoder, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        parts = [decoder(part) for part in z.split(batch_size)]
    finally:
        for module, training in modes:
            module.training = training
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(column) for column in zip(*parts))
