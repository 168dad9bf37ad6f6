"""A prior that is one given distribution."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Distribution

from riemvae._checks import argument_error
from riemvae._recipe import recipe
from riemvae.distributions.directions import with_validation


def map_tensors(distribution: Distribution, fn: Callable[[Tensor], Tensor]) -> Distribution:
    """A copy of ``distribution`` with ``fn`` applied to every tensor that it and its parts hold."""
    new = copy.copy(distribution)
    for name, value in vars(distribution).items():
        if isinstance(value, Tensor):
            new.__dict__[name] = fn(value)
        elif isinstance(value, Distribution):
            new.__dict__[name] = map_tensors(value, fn)
    return new


def without_validation(distribution: Distribution) -> Distribution:
    """A copy of ``distribution`` that evaluates any value, its parts too."""
    copied: Distribution = with_validation(distribution, False)
    return copied


def tensors_of(distribution: Distribution) -> list[Tensor]:
    """All tensors that ``distribution`` and its parts hold."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(distribution, keep)
    return found


@recipe
class FixedPrior(nn.Module):
    """One fixed distribution as a prior; its tensors move with the module.

    Args:
        distribution: A distribution with batch shape ``()`` and event shape ``(d,)`` that holds nothing
            trainable.

    Raises:
        ValueError: A distribution of torch, which no Pyro model can sample; another shape, or a tensor that
            requires gradients: a stored distribution would keep the graph of its first use and break at the
            second training step.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> FixedPrior(dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))().event_shape
        torch.Size([2])
    """

    def __init__(self, distribution: TorchDistribution) -> None:
        super().__init__()
        if not isinstance(distribution, TorchDistributionMixin):
            raise argument_error(
                "prior",
                "a distribution of pyro.distributions",
                f"{type(distribution).__name__} of {type(distribution).__module__}",
                "Pyro has one of the same name",
            )
        if len(distribution.event_shape) != 1 or len(distribution.batch_shape) != 0:
            raise argument_error(
                "prior",
                "a distribution with batch shape () and event shape (d,)",
                f"shapes {tuple(distribution.batch_shape)} and {tuple(distribution.event_shape)}",
                "use .to_event(1)",
            )
        if any(t.requires_grad for t in tensors_of(distribution)):
            raise argument_error(
                "prior",
                "a fixed distribution, or a callable or module that returns one",
                "a stored distribution of trainable tensors, which would break at the second step",
                "pass a module whose forward builds it",
            )
        self.distribution = distribution

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved: Any = map_tensors(self.distribution, fn)
        self.distribution = moved
        return super()._apply(fn, recurse)

    def forward(self) -> TorchDistribution:
        return self.distribution
