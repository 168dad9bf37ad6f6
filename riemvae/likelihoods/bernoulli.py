"""Binary data, and the relaxed score of grey data."""

from __future__ import annotations

import math
from functools import partial

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from riemvae._recipe import recipe
from riemvae.likelihoods.likelihood import DirectIndependent, Likelihood, refuse, sum_event


class BernoulliScore(dist.Bernoulli):
    """The cross-entropy ``x log p + (1-x) log(1-p)`` for grey ``x`` in [0, 1]; it does not integrate to one.

    Draws are binary. The mark ``is_density = False`` lets a likelihood estimate refuse it.
    """

    is_density = False
    support = constraints.unit_interval


@recipe
class Bernoulli(Likelihood):
    """Binary data given logits: ``log p(x | l) = x l - log(1 + e^l)``, ``x`` in {0, 1}.

    It is a probability on {0, 1} only. Many variational autoencoders feed it grey pixels; the score is then
    missing its normaliser (Loaiza-Ganem and Cunningham, 2019), so that is refused unless asked for.

    Args:
        relaxed: Accept grey values in [0, 1]. The result is a score, not a likelihood: ``is_density`` is
            ``False`` here and on the distributions.

    Example:
        >>> import torch
        >>> likelihood = Bernoulli()
        >>> logits = torch.zeros(2, 3)
        >>> likelihood.log_prob(logits, torch.ones(2, 3), batch_dim=1)
        tensor([-2.0794, -2.0794])
        >>> likelihood.validate(torch.tensor([0.0, 0.5]))
        Traceback (most recent call last):
        ValueError: x: expected values 0 or 1, got 1 of 2 values outside, the first 0.5; use \
ContinuousBernoulli() for values in [0, 1], Gaussian() for real values, or binarize.
    """

    support: constraints.Constraint = constraints.boolean

    def __init__(self, relaxed: bool = False) -> None:
        super().__init__()
        self.relaxed = relaxed
        if relaxed:
            self.is_density = False
            self.support = constraints.unit_interval

    def forward(self, parameters: Tensor, batch_dim: int) -> TorchDistribution:  # type: ignore[override]
        """``Bernoulli(logits)`` with all but ``batch_dim`` dimensions in the event."""
        family = BernoulliScore if self.relaxed else dist.Bernoulli
        base = family(logits=parameters, validate_args=False)
        event_dim = parameters.dim() - batch_dim
        if event_dim == 0:
            return base  # type: ignore[no-any-return]
        return DirectIndependent(base, event_dim, partial(self.log_prob, parameters, batch_dim=batch_dim))

    def mean(self, parameters: Tensor) -> Tensor:  # type: ignore[override]
        """``sigmoid(logits)``, of the shape of the logits."""
        return parameters.sigmoid()

    def score(self, parameters: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """``x - sigmoid(logits)``."""
        return x - parameters.sigmoid()

    def log_prob(self, parameters: Tensor, x: Tensor, batch_dim: int) -> Tensor:  # type: ignore[override]
        """``Σ x l - log(1 + e^l)`` per datum, ``(*batch,)``."""
        event_dim = parameters.dim() - batch_dim
        if event_dim and not torch.is_grad_enabled():
            return _log_prob(parameters.flatten(-event_dim), x.to(parameters.dtype).flatten(-event_dim))
        # log σ(l) + (x-1) l: exact for large |l| of both signs, unlike softplus with its threshold. In place:
        # over many samples the time goes into new memory.
        values = F.logsigmoid(parameters).addcmul_(parameters, x.to(parameters.dtype) - 1.0)
        return sum_event(values, event_dim)

    def validate(self, x: Tensor, name: str = "x") -> None:
        """Refuses what is not 0 or 1 (relaxed: not in [0, 1])."""
        if self.relaxed:
            refuse(
                name, x, (x >= 0) & (x <= 1), "values in [0, 1]", "rescale, or use Gaussian() for real values"
            )
        else:
            refuse(
                name,
                x,
                (x == 0) | (x == 1),
                "values 0 or 1",
                "use ContinuousBernoulli() for values in [0, 1], Gaussian() for real values, or binarize",
            )

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"relaxed={self.relaxed}"


def _log_prob(logits: Tensor, x: Tensor) -> Tensor:
    """``Σ_j x_j l_j - log(1 + e^{l_j})`` without a graph: ``(..., D) -> (...)``.

    With ``log σ(l) = min(l, 0) + log σ(|l|)``. The factors ``σ(|l|)`` lie in [1/2, 1], so that up to 64 of
    them are multiplied before one logarithm is taken, and all of it happens in one piece of new memory.
    """
    values = logits.abs().sigmoid_()
    factors = values
    for _ in range(_doublings(values.dtype)):
        if factors.shape[-1] % 2:
            break
        half = factors.shape[-1] // 2
        factors = factors[..., :half].mul_(factors[..., half:])
    total = factors.log().sum(-1)
    return total.add_(torch.clamp_max(logits, 0.0, out=values).addcmul_(logits, x - 1.0).sum(-1))


def _doublings(dtype: torch.dtype) -> int:
    """How often factors of at least 1/2 can be paired without underflow, six times at most."""
    return min(6, int(math.log2(-math.log2(torch.finfo(dtype).tiny))))
