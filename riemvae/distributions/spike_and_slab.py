"""Spike and slab with a continuous spike: a narrow normal and a wide normal or Student-t."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Chi2, Normal, StudentT, constraints

from riemvae._checks import argument_error
from riemvae._recipe import recipe


@recipe
class SpikeAndSlab(TorchDistribution):
    r"""A mixture of a narrow normal at zero and of a wide slab, for each coordinate by itself.

    .. math:: p(z) = (1 - \pi) N(z; 0, s_0^2) + \pi \, S(z / s_1) / s_1

    where the slab ``S`` is the standard normal or, with ``df``, Student's t. A draw from the spike stands for
    zero: its scale ``s_0`` is what is small enough not to matter.

    ``rsample`` differentiates a draw at a fixed probability of the mixture (implicit reparametrisation),
    given the slab's scale: a t is a normal whose scale is random. These are first derivatives.

    Args:
        inclusion: ``π`` in (0, 1), the probability of the slab. All arguments broadcast; their common shape
            is the batch shape.
        spike_scale: ``s_0 > 0``.
        slab_scale: ``s_1 > 0``.
        df: Degrees of freedom of the slab; None is a normal slab.
        validate_args: Whether to check arguments and values.

    Raises:
        ValueError: Shapes that do not broadcast; where validation is on, numbers out of range.

    Source: George and McCulloch (1993), Variable selection via Gibbs sampling; Figurnov, Mohamed and Mnih
    (2018), Implicit Reparameterization Gradients.

    Example:
        >>> law = SpikeAndSlab(torch.tensor(0.2), torch.tensor(0.1), torch.tensor(2.0), df=torch.tensor(4.0))
        >>> law.inclusion_probability(torch.tensor([0.0, 0.3, 3.0]))
        tensor([0.0116, 0.5105, 1.0000])
    """

    arg_constraints = {
        "inclusion": constraints.unit_interval,
        "spike_scale": constraints.positive,
        "slab_scale": constraints.positive,
        "df": constraints.positive,
    }
    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        inclusion: Tensor,
        spike_scale: Tensor,
        slab_scale: Tensor,
        df: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        given = [inclusion, spike_scale, slab_scale] + ([] if df is None else [df])
        try:
            self.inclusion, self.spike_scale, self.slab_scale, *rest = torch.broadcast_tensors(*given)
        except RuntimeError:
            shapes = ", ".join(str(tuple(value.shape)) for value in given)
            raise argument_error("inclusion", "arguments that broadcast", f"shapes {shapes}") from None
        self.df = rest[0] if rest else None
        if self.df is None:  # torch would check it
            self.arg_constraints = {k: v for k, v in type(self).arg_constraints.items() if k != "df"}
        super().__init__(self.inclusion.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> SpikeAndSlab:
        """The same distributions repeated to ``batch_shape``."""
        new = self._get_checked_instance(SpikeAndSlab, _instance)
        shape = torch.Size(batch_shape)
        for name in ("inclusion", "spike_scale", "slab_scale"):
            setattr(new, name, getattr(self, name).expand(shape))
        new.df = None if self.df is None else self.df.expand(shape)
        new.arg_constraints = self.arg_constraints
        super(SpikeAndSlab, new).__init__(shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """Zero (NaN for a t slab with at most one degree of freedom)."""
        zero = torch.zeros_like(self.slab_scale)
        return zero if self.df is None else zero.masked_fill(self.df <= 1, math.nan)

    @property
    def variance(self) -> Tensor:
        """``(1 - π) s_0² + π`` times the slab's variance, which is infinite for ``df <= 2``."""
        slab = self.slab_scale**2
        if self.df is not None:
            slab = (slab * self.df / (self.df - 2)).masked_fill(self.df <= 2, math.inf)
        return (1 - self.inclusion) * self.spike_scale**2 + self.inclusion * slab

    def _log_parts(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities of spike and slab, each with its weight."""
        spike = Normal(0.0, self.spike_scale, validate_args=False).log_prob(value)
        if self.df is None:
            slab = Normal(0.0, self.slab_scale, validate_args=False).log_prob(value)
        else:
            slab = StudentT(self.df, 0.0, self.slab_scale, validate_args=False).log_prob(value)
        return (-self.inclusion).log1p() + spike, self.inclusion.log() + slab

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of ``value (...)``."""
        if self._validate_args:
            self._validate_sample(value)
        return torch.logaddexp(*self._log_parts(value))

    def inclusion_probability(self, value: Tensor) -> Tensor:
        """``p(slab | z)``: the posterior probability that ``z (...)`` is not from the spike."""
        spike, slab = self._log_parts(value)
        return torch.sigmoid(slab - spike)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``sample_shape + batch_shape``, differentiable in all parameters."""
        shape = self._extended_shape(torch.Size(sample_shape))
        slab_scale = self.slab_scale.expand(shape)
        if self.df is not None:
            df = self.df.expand(shape)
            slab_scale = slab_scale * (df / Chi2(df, validate_args=False).rsample()).sqrt()
        with torch.no_grad():
            included = torch.rand_like(slab_scale) < self.inclusion
            z = torch.where(included, slab_scale, self.spike_scale) * torch.randn_like(slab_scale)
        inputs = (self.inclusion, self.spike_scale, slab_scale)
        if not (torch.is_grad_enabled() and any(value.requires_grad for value in inputs)):
            return z
        # At a fixed P(Z > |z|), Q = Σ_k w_k Φ(-|z| / s_k): dz = sign(z) dQ / p. On the side away from the
        # bulk nothing cancels.
        weights = (1 - self.inclusion, self.inclusion)
        scales = (self.spike_scale, slab_scale)
        upper = sum(w * torch.special.ndtr(-z.abs() / s) for w, s in zip(weights, scales))
        with torch.no_grad():
            density = sum(
                w * Normal(0.0, s, validate_args=False).log_prob(z).exp() for w, s in zip(weights, scales)
            )
            slope = z.sign() / density
        surrogate: Tensor = slope * (upper - upper.detach())  # type: ignore[operator, union-attr]
        return z + surrogate
