"""Integer codes of unordered classes."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from riemvae._checks import check_count, check_last_dim
from riemvae._recipe import recipe
from riemvae.likelihoods.likelihood import Likelihood, refuse, sum_event


@recipe
class Categorical(Likelihood):
    """Codes ``0 ... C-1`` given logits with the class axis last: ``log p(x | l) = l_x - logsumexp(l)``.

    Logits have shape ``(*batch, *data_shape, C)``, data ``(*batch, *data_shape)`` (integers, or floats that
    hold integers).

    Args:
        num_classes: ``C``, at least 2.

    Raises:
        ValueError: ``num_classes`` is not an integer of at least 2.

    Example:
        >>> likelihood = Categorical(4)
        >>> likelihood.log_prob(torch.zeros(2, 3, 4), torch.tensor([[0, 1, 3], [2, 2, 2]]), batch_dim=1)
        tensor([-4.1589, -4.1589])
    """

    data_dtype = torch.int64

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = check_count("num_classes", num_classes, 2, "use Bernoulli() for binary data")
        self.support = constraints.integer_interval(0, self.num_classes - 1)

    def forward(self, parameters: Tensor, batch_dim: int) -> TorchDistribution:  # type: ignore[override]
        """``Categorical(logits)`` with all but ``batch_dim`` of the data's dimensions in the event."""
        check_last_dim("parameters", parameters, self.num_classes, "the class axis comes last")
        base = dist.Categorical(logits=parameters, validate_args=False)
        return base.to_event(parameters.dim() - 1 - batch_dim)

    def mean(self, parameters: Tensor) -> Tensor:  # type: ignore[override]
        """The most probable code, ``(*batch, *data_shape)``: a mean of codes has no meaning."""
        return parameters.argmax(-1)

    def score(self, parameters: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """``one_hot(x) - softmax(l)``."""
        classes = torch.arange(self.num_classes, device=parameters.device)
        return (x.unsqueeze(-1) == classes).to(parameters.dtype) - parameters.softmax(-1)

    def log_prob(self, parameters: Tensor, x: Tensor, batch_dim: int) -> Tensor:  # type: ignore[override]
        """``Σ l_x - logsumexp(l)`` per datum, ``(*batch,)``."""
        log_probabilities = parameters.log_softmax(-1)
        shape = torch.broadcast_shapes(log_probabilities.shape[:-1], x.shape)
        codes = x.long().expand(shape).unsqueeze(-1)
        values = log_probabilities.expand(*shape, self.num_classes).gather(-1, codes).squeeze(-1)
        return sum_event(values, parameters.dim() - 1 - batch_dim)

    def validate(self, x: Tensor, name: str = "x") -> None:
        """Refuses what is not an integer from 0 to C-1."""
        good = (x >= 0) & (x < self.num_classes)
        if x.is_floating_point():
            good &= x == x.floor()
        refuse(
            name,
            x,
            good,
            f"codes 0 to {self.num_classes - 1}",
            "raise num_classes, recode the column, or use Poisson() for counts or Gaussian() for real values",
        )

    def parameter_shape(self, data_shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(*data_shape, C)``."""
        return (*data_shape, self.num_classes)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"num_classes={self.num_classes}"
