"""Counts."""

from __future__ import annotations

from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from riemvae._recipe import recipe
from riemvae.likelihoods.likelihood import Likelihood, refuse, sum_event

_ONE_DRAW = torch.Size()


class LogRatePoisson(TorchDistribution):
    """The Poisson distribution with parameter ``r = log rate``: ``log p(x | r) = x r - e^r - log x!``.

    torch's own takes the rate, whose logarithm is ``-inf`` once ``e^r`` underflows.

    Args:
        log_rate: Any shape (the batch shape).
        validate_args: As for every torch distribution.

    Example:
        >>> LogRatePoisson(torch.tensor(-1000.0)).log_prob(torch.tensor(1.0))
        tensor(-1000.)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"log_rate": constraints.real}
    support = constraints.nonnegative_integer

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):  # type: ignore[no-untyped-def]
        """The same distribution with its batch shape broadcast to ``batch_shape``."""
        new = self._get_checked_instance(LogRatePoisson, _instance)
        batch_shape = torch.Size(batch_shape)
        new.log_rate = self.log_rate.expand(batch_shape)
        TorchDistribution.__init__(new, batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """``e^r``."""
        return self.log_rate.exp()

    @property
    def variance(self) -> Tensor:
        """``e^r``."""
        return self.log_rate.exp()

    def sample(self, sample_shape=_ONE_DRAW) -> Tensor:  # type: ignore[no-untyped-def]
        """Counts in the dtype of ``log_rate``."""
        with torch.no_grad():
            return torch.poisson(self.log_rate.exp().expand(self._extended_shape(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """``x r - e^r - log x!``."""
        if self._validate_args:
            self._validate_sample(value)
        value = value.to(self.log_rate.dtype)
        return value * self.log_rate - self.log_rate.exp() - torch.lgamma(value + 1)


@recipe
class Poisson(Likelihood):
    """Counts given log rates: ``log p(x | r) = x r - e^r - log x!``.

    Rates are exponentials: a log rate above 88 overflows float32, and the log probability is then ``-inf``.

    Example:
        >>> Poisson().log_prob(torch.zeros(1, 2), torch.tensor([[0.0, 2.0]]), batch_dim=1)
        tensor([-2.6931])
    """

    support = constraints.nonnegative_integer

    def forward(self, parameters: Tensor, batch_dim: int) -> TorchDistribution:  # type: ignore[override]
        """``Poisson(e^r)`` with all but ``batch_dim`` dimensions in the event."""
        return LogRatePoisson(parameters, validate_args=False).to_event(parameters.dim() - batch_dim)

    def mean(self, parameters: Tensor) -> Tensor:  # type: ignore[override]
        """``e^r``, of the shape of the log rates."""
        return parameters.exp()

    def score(self, parameters: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """``x - e^r``."""
        return x - parameters.exp()

    def log_prob(self, parameters: Tensor, x: Tensor, batch_dim: int) -> Tensor:  # type: ignore[override]
        """``Σ x r - e^r - log x!`` per datum, ``(*batch,)``."""
        values = LogRatePoisson(parameters, validate_args=False).log_prob(x)
        return sum_event(values, parameters.dim() - batch_dim)

    def validate(self, x: Tensor, name: str = "x") -> None:
        """Refuses what is not a count: negative, fractional, NaN or infinite."""
        good = (x >= 0) & (x < torch.inf)
        if x.is_floating_point():
            good &= x == x.floor()
        refuse(name, x, good, "counts 0, 1, 2, ...", "use Gaussian() for real values")
