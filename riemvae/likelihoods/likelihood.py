"""What a likelihood is: decoder parameters in, a distribution over one datum out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from riemvae._checks import argument_error

Parameters: TypeAlias = Tensor | tuple[Tensor, ...]


def is_density(distribution: Any) -> bool:
    """Whether ``distribution.log_prob`` is a normalised log density or probability.

    A relaxed score (`Bernoulli(relaxed=True)`) carries ``is_density = False``; the mark is found below
    ``to_event``, ``expand``, ``mask`` and any other wrapper that keeps a ``base_dist``.

    Args:
        distribution: A torch or Pyro distribution.

    Returns:
        ``False`` as soon as one layer says that it is not a density.

    Example:
        >>> from riemvae.likelihoods import Bernoulli
        >>> logits = torch.zeros(2, 3)
        >>> is_density(Bernoulli()(logits, 1)), is_density(Bernoulli(relaxed=True)(logits, 1).mask(False))
        (True, False)
    """
    while distribution is not None:
        if not getattr(distribution, "is_density", True):
            return False
        distribution = getattr(distribution, "base_dist", None)
    return True


def sum_event(values: Tensor, event_dim: int) -> Tensor:
    """Sums the last ``event_dim`` dimensions: ``(..., *event) -> (...)``."""
    return values.flatten(-event_dim).sum(-1) if event_dim else values


class DirectIndependent(dist.Independent):
    """``base.to_event(event_dim)`` whose log probability is a direct formula: fewer passes over large data.

    Args:
        base: The distribution of one coordinate, batch shape ``(*batch, *event)``.
        event_dim: Rightmost batch dimensions that belong to one datum, at least 1.
        direct: ``x -> log p (*batch,)``, equal to the sum over coordinates.
    """

    def __init__(self, base: TorchDistribution, event_dim: int, direct: Callable[[Tensor], Tensor]) -> None:
        self.direct = direct
        super().__init__(base, event_dim, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> TorchDistribution:  # type: ignore[override]
        """Itself, as Pyro's plates ask; with another batch shape, coordinate by coordinate."""
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        return dist.Independent(self.base_dist, self.reinterpreted_batch_ndims).expand(batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """The direct formula."""
        return self.direct(value)


class Likelihood(nn.Module):
    """A module that turns the decoder's output into ``p(x | z)``.

    A likelihood says where data may lie (`support`, of one value), which dtype a draw has (`data_dtype`;
    ``None`` is the dtype of the parameters) and how decoder outputs are read. Subclasses give `forward`,
    `mean` and `score`; those whose data are independent coordinates given the parameters override `log_prob`
    with a direct formula. Distributions are built with ``validate_args=False``: call `validate` on the data
    once instead.

    Attributes:
        is_density: ``False`` for a relaxed score that is not a likelihood.
        support: Constraint that one value of a datum must meet.
        data_dtype: Dtype of a draw, ``None`` for that of the parameters.
    """

    is_density: bool = True
    support: constraints.Constraint = constraints.real
    data_dtype: torch.dtype | None = None
    __call__: Callable[..., TorchDistribution]

    def __init__(self) -> None:
        super().__init__()

    def forward(self, parameters: Parameters, batch_dim: int) -> TorchDistribution:
        """The distribution of the data given the decoder's output.

        Args:
            parameters: What the decoder returned, ``(*batch, *parameter_shape)``.
            batch_dim: Number of leading batch dimensions; all the others belong to one datum.

        Returns:
            A distribution with ``len(batch_shape) == batch_dim`` and the datum as its event.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(parameters, batch_dim)")

    def mean(self, parameters: Parameters) -> Tensor:
        """The mean of the data given ``parameters``, ``(*batch, *data_shape)``."""
        raise NotImplementedError(f"{type(self).__name__} must define mean(parameters)")

    def score(self, parameters: Parameters, x: Tensor) -> Parameters | None:
        """``d log p(x | parameters) / d parameters``, differentiable; ``None`` if no closed form is known.

        Args:
            parameters: ``(*batch, *parameter_shape)``, a tensor or a tuple of tensors.
            x: Data that broadcast against them, ``(..., *data_shape)``.

        Returns:
            Something of the structure of ``parameters``, broadcast with ``x``; ``None`` leaves it to
            autograd.
        """
        return None

    def log_prob(self, parameters: Parameters, x: Tensor, batch_dim: int) -> Tensor:
        """``log p(x | parameters)`` in nats per datum: that of `forward`'s distribution, maybe faster.

        Args:
            parameters: ``(*batch, *parameter_shape)``.
            x: Data that broadcast against them, ``(..., *data_shape)``.
            batch_dim: Number of leading batch dimensions of ``parameters``.

        Returns:
            ``(*batch,)``.
        """
        return self(parameters, batch_dim).log_prob(x)

    def validate(self, x: Tensor, name: str = "x") -> None:
        """Refuses data outside the support.

        Args:
            x: Data, ``(..., *data_shape)``.
            name: The argument's name in the message.

        Raises:
            ValueError: A value is NaN or outside the support; the message says what to use instead.
        """
        raise NotImplementedError(f"{type(self).__name__} must define validate(x)")

    def parameter_shape(self, data_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the decoder's output for one datum of shape ``data_shape``."""
        return tuple(data_shape)


def refuse(name: str, x: Tensor, good: Tensor, expected: str, remedy: str) -> None:
    """Raises unless ``good`` holds everywhere; the message counts the bad values and shows the first one."""
    if bool(good.all()):
        return
    bad = ~good
    first = x[bad][0].item()
    got = f"{int(bad.sum())} of {x.numel()} values outside, the first {first:.6g}"
    raise argument_error(name, expected, got, remedy)
