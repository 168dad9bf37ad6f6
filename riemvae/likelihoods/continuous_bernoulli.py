"""Values in [0, 1]: the continuous Bernoulli density, stable for all logits and their derivatives.

The density on [0, 1] with natural parameter (logit) ``l`` is ``p(x | l) = exp(l x - A(l))``, where

    A(l)   = log ∫₀¹ e^{lx} dx = log((e^l - 1) / l),
    A'(l)  = E[x]   = 1/2 + (coth(l/2)/2 - 1/l),
    A''(l) = Var[x] = 1/l² - e^{-|l|} / (1 - e^{-|l|})².

All three lose digits by cancellation near 0 (the value of A alone does not), where the series with Bernoulli
numbers

    A(l) = l/2 + Σ_n B_2n l^2n / (2n (2n)!)      for |l| < 2π

is differentiated instead. `torch.distributions.ContinuousBernoulli` goes through clamped probabilities and
is wrong from |logit| of about 15 in float32 on (its log density is bounded by the clamp), so it is not used
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from riemvae._recipe import recipe
from riemvae.likelihoods.likelihood import Likelihood, refuse, sum_event

# B_2n / (2n)!, n = 1, 2, ...: they decay as (2π)^-2n, so eleven serve float64 and five float32 up to |l| = 1.
_SERIES = (
    1 / 12,
    -1 / 720,
    1 / 30240,
    -1 / 1209600,
    1 / 47900160,
    -691 / 1307674368000,
    1 / 74724249600,
    -3617 / 10670622842880000,
    43867 / 5109094217170944000,
    -174611 / 802857662698291200000,
    854513 / 155112100433309859840000,
)
_ONE_DRAW = torch.Size()


def _polynomial(u: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's rule, lowest order first."""
    value = torch.full_like(u, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * u + coefficient
    return value


@lru_cache
def _series(dtype: torch.dtype, derivative: bool) -> tuple[tuple[float, ...], float]:
    """Coefficients in ``l²`` of ``(A' - 1/2)/l`` or of ``A''``, and their sum as `_polynomial` rounds it."""
    terms: tuple[float, ...] = _SERIES if dtype == torch.float64 else _SERIES[:5]
    if derivative:
        terms = tuple((2 * n + 1) * term for n, term in enumerate(terms))
    return terms, float(_polynomial(torch.ones((), dtype=dtype, device="cpu"), terms))


# Series and closed form meet at |l| = 1. Rather than choose by `torch.where`, which costs more than an
# exponential, both are evaluated on their own side, with |l| cut at 1, and added:
# series(min(|l|, 1)) - series(1) + closed(max(|l|, 1)). The first two cancel exactly beyond 1, so that the
# small variances of large logits keep their digits.


def _variance(logits: Tensor) -> Tensor:
    """``A''``, differentiable by autograd any number of times."""
    terms, at_one = _series(logits.dtype, True)
    a, one = logits.abs(), logits.new_ones(())
    near, far = torch.minimum(a, one), torch.maximum(a, one)  # at a tie each passes half of the gradient
    decay = torch.exp(-far)
    return (_polynomial(near * near, terms) - at_one) + (far**-2 - decay / (1 - decay) ** 2)


class _Mean(torch.autograd.Function):
    """``A'`` with ``A''`` as its derivative, so that no graph is kept through the two formulas."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor) -> Tensor:
        terms, at_one = _series(logits.dtype, False)
        # In place on its own temporaries: nothing is differentiated here, and allocation costs as much.
        a = logits.abs()
        far = a.clamp_min(1)
        near = a.clamp_max_(1)
        squared = near * near
        series = torch.full_like(squared, terms[-1])
        for term in reversed(terms[:-1]):
            series.mul_(squared).add_(term)
        series.mul_(near).sub_(at_one)
        closed = torch.neg(far).exp_().neg_().add_(1).reciprocal_().sub_(far.reciprocal_()).sub_(0.5)
        return torch.copysign(closed.add_(series), logits).add_(0.5)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return gradient * _variance(logits)


class _LogNormalizer(torch.autograd.Function):
    """``A - max(l, 0) = log((1 - e^{-|l|}) / |l|)`` plus ``max(l, 0)``, with ``A'`` as its derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor) -> Tensor:
        a = logits.abs().clamp_min(torch.finfo(logits.dtype).tiny)
        return logits.clamp_min(0) + torch.log(-torch.expm1(-a) / a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return gradient * _Mean.apply(logits)


def log_normalizer(logits: Tensor) -> Tensor:
    """``A(l) = log((e^l - 1) / l)``, elementwise, accurate for all finite logits with all its derivatives.

    Example:
        >>> log_normalizer(torch.tensor([0.0, 1.0, -1000.0]))
        tensor([ 0.0000,  0.5413, -6.9078])
    """
    return _LogNormalizer.apply(logits)


def continuous_bernoulli_mean(logits: Tensor) -> Tensor:
    """``E[x] = A'(l)``, elementwise.

    Example:
        >>> continuous_bernoulli_mean(torch.tensor([0.0, 1000.0, -1000.0]))
        tensor([0.5000, 0.9990, 0.0010])
    """
    return _Mean.apply(logits)


class ContinuousBernoulliDistribution(TorchDistribution):
    """``p(x | l) = exp(l x - A(l))`` on [0, 1] (Loaiza-Ganem and Cunningham, 2019), parametrised by logits.

    Args:
        logits: Natural parameter, any shape (the batch shape).
        validate_args: As for every torch distribution.

    Example:
        >>> d = ContinuousBernoulliDistribution(torch.tensor([-1000.0, 0.0, 1000.0]))
        >>> d.log_prob(torch.tensor([0.0, 0.3, 1.0]))
        tensor([6.9078, 0.0000, 6.9078])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):  # type: ignore[no-untyped-def]
        """The same distribution with its batch shape broadcast to ``batch_shape``."""
        new = self._get_checked_instance(ContinuousBernoulliDistribution, _instance)
        batch_shape = torch.Size(batch_shape)
        new.logits = self.logits.expand(batch_shape)
        TorchDistribution.__init__(new, batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """``A'(l)``."""
        return continuous_bernoulli_mean(self.logits)

    @property
    def variance(self) -> Tensor:
        """``A''(l)``."""
        return _variance(self.logits)

    def log_prob(self, value: Tensor) -> Tensor:
        """``l x - A(l)``, with respect to Lebesgue measure on [0, 1]."""
        if self._validate_args:
            self._validate_sample(value)
        return value * self.logits - log_normalizer(self.logits)

    def icdf(self, value: Tensor) -> Tensor:
        """The ``x`` with ``P(X <= x) = value``, that is ``x = log(1 + u (e^l - 1))/l``.

        Written with ``e^{-|l|}`` so that nothing overflows: ``x(u; l) = 1 - x(1 - u; -l)`` serves ``l > 0``.
        Below ``|l| = 0.01`` the expansion in ``l`` is used, because the derivative in ``l`` would lose
        digits.
        """
        logits = self.logits
        near = logits.abs() < 1e-2
        variance = value * (1 - value)
        slope = (1 - 2 * value) * logits / 3 + (1 - 6 * variance) * logits * logits / 12
        series = value + 0.5 * variance * logits * (1 + slope)
        positive = logits > 0
        u = torch.where(positive, 1 - value, value)
        a = torch.where(near, 1.0, logits.abs())
        x = -torch.log1p(u * torch.expm1(-a)) / a
        return torch.where(near, series, torch.where(positive, 1 - x, x))

    def rsample(self, sample_shape=_ONE_DRAW) -> Tensor:  # type: ignore[no-untyped-def]
        """Reparameterised draws by the inverse distribution function."""
        shape = self._extended_shape(sample_shape)
        return self.icdf(torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device))

    def entropy(self) -> Tensor:
        """``A(l) - l A'(l)`` in nats."""
        return log_normalizer(self.logits) - self.logits * self.mean


@recipe
class ContinuousBernoulli(Likelihood):
    """Data in [0, 1] (grey pixels) given logits: ``log p(x | l) = l x - log((e^l - 1)/l)``.

    The normalised form of the cross-entropy that autoencoders use on grey images (Loaiza-Ganem and
    Cunningham, 2019, "The continuous Bernoulli"). Its mean is *not* ``sigmoid(l)``.

    Example:
        >>> likelihood = ContinuousBernoulli()
        >>> logits = torch.tensor([[0.0, 2.0]])
        >>> likelihood.mean(logits)
        tensor([[0.5000, 0.6565]])
        >>> likelihood.log_prob(logits, torch.tensor([[0.1, 1.0]]), batch_dim=1)
        tensor([0.8386])
    """

    support = constraints.unit_interval

    def forward(self, parameters: Tensor, batch_dim: int) -> TorchDistribution:  # type: ignore[override]
        """The density on ``[0, 1]^D`` with all but ``batch_dim`` dimensions in the event."""
        base = ContinuousBernoulliDistribution(parameters, validate_args=False)
        return base.to_event(parameters.dim() - batch_dim)

    def mean(self, parameters: Tensor) -> Tensor:  # type: ignore[override]
        """``1/(1 - e^{-l}) - 1/l``, of the shape of the logits."""
        return continuous_bernoulli_mean(parameters)

    def score(self, parameters: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """``x - mean(l)``."""
        return x - continuous_bernoulli_mean(parameters)

    def log_prob(self, parameters: Tensor, x: Tensor, batch_dim: int) -> Tensor:  # type: ignore[override]
        """``Σ l x - A(l)`` per datum, ``(*batch,)``."""
        values = x.to(parameters.dtype) * parameters - log_normalizer(parameters)
        return sum_event(values, parameters.dim() - batch_dim)

    def validate(self, x: Tensor, name: str = "x") -> None:
        """Refuses values outside [0, 1]."""
        refuse(
            name,
            x,
            (x >= 0) & (x <= 1),
            "values in [0, 1]",
            "rescale (8-bit images: divide by 255), or use Gaussian() for real values",
        )
