"""Mixtures of many normal distributions with diagonal covariances."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from riemvae._checks import argument_error, check_last_dim
from riemvae._recipe import recipe
from riemvae.distributions.space_forms import is_validating

_PAIRS = 1 << 22  # points times components held at once


@recipe
class DiagonalMixture(TorchDistribution):
    r"""The mixture ``Σ_k π_k N(z; μ_k, diag σ_k²)`` of many components, cheap in their number.

    .. math:: \log p(z) = \log \sum_k \pi_k \prod_j N(z_j; \mu_{kj}, \sigma_{kj}^2)

    The square in the exponent is expanded, ``Σ_j z_j²/σ_kj² - 2 Σ_j z_j μ_kj/σ_kj² + Σ_j μ_kj²/σ_kj²``, so
    that all pairs of points and components are one matrix product and no tensor of points times components
    times ``d`` is made. Expanded it cancels: points and means are centred first and the product is taken in
    double precision (in single where a device has no double), which costs less than the exponentials that
    follow. Where no gradient is asked for, points go through in tiles: memory is then bounded whatever their
    number.

    Components without batch dimensions are shared by the whole batch of an expanded distribution; with batch
    dimensions, each member of the batch has its own.

    Args:
        logits: Unnormalised log weights ``(..., K)``; normalised they are ``log π``.
        loc: ``μ (..., K, d)``.
        scale: Standard deviations ``σ (..., K, d)``, positive.
        validate_args: Whether to check arguments and values.

    Raises:
        ValueError: Shapes that do not fit each other, a scale that is not positive, weights or means that are
            not finite.

    Source: Tomczak and Welling (2018), for such a mixture as a prior.

    Example:
        >>> mixture = DiagonalMixture(torch.zeros(3), torch.randn(3, 2), torch.ones(3, 2))
        >>> mixture.log_prob(torch.zeros(7, 2)).shape, mixture.responsibilities(torch.zeros(7, 2)).shape
        (torch.Size([7]), torch.Size([7, 3]))
        >>> DiagonalMixture(torch.zeros(2), torch.zeros(2, 1), torch.ones(2, 1)).log_prob(torch.zeros(1))
        tensor(-0.9189)
    """

    arg_constraints = {
        "logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
    }
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        if loc.dim() < 2 or 0 in loc.shape[-2:]:
            raise argument_error("loc", "means of shape (..., K, d) with K, d >= 1", loc)
        num, dim = loc.shape[-2:]
        check_last_dim("logits", logits, num, "one log weight a component")
        if scale.shape[-2:] != (num, dim):
            raise argument_error("scale", f"standard deviations of shape (..., {num}, {dim}), as loc", scale)
        try:
            batch_shape = torch.broadcast_shapes(loc.shape[:-2], scale.shape[:-2], logits.shape[:-1])
        except RuntimeError:
            raise argument_error(
                "loc, scale, logits",
                "batch shapes that broadcast against each other",
                f"{tuple(loc.shape[:-2])}, {tuple(scale.shape[:-2])} and {tuple(logits.shape[:-1])}",
            ) from None
        self.loc = loc.expand(*batch_shape, num, dim)
        self.scale = scale.expand(*batch_shape, num, dim)
        self.logits = logits.expand(*batch_shape, num)
        # The arguments themselves: only then are they finite and positive.
        super().__init__(batch_shape, torch.Size([dim]), validate_args=validate_args)
        if is_validating(validate_args):
            for name in ("loc", "logits"):
                if not bool(torch.isfinite(getattr(self, name).detach()).all()):
                    raise argument_error(name, "finite values", "NaN or infinite ones")

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiagonalMixture:
        """The same mixture with another batch shape; components that all share are not repeated."""
        new = self._get_checked_instance(DiagonalMixture, _instance)
        batch_shape, own = torch.Size(batch_shape), self.loc.shape[:-2]
        torch.broadcast_shapes(self.batch_shape, batch_shape)
        lead = batch_shape if own else torch.Size()
        new.loc = self.loc.expand(*lead, *self.loc.shape[-2:])
        new.scale = self.scale.expand(*lead, *self.scale.shape[-2:])
        new.logits = self.logits.expand(*lead, self.logits.shape[-1])
        super(DiagonalMixture, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    # -- the components --------------------------------------------------------------------------------------

    @property
    def num_components(self) -> int:
        """``K``."""
        return self.loc.shape[-2]

    @property
    def log_weights(self) -> Tensor:
        """``log π (..., K)``."""
        return self.logits.log_softmax(-1)

    @property
    def mean(self) -> Tensor:
        """``Σ_k π_k μ_k``, of the batch shape and ``(d,)``."""
        mean = (self.log_weights.exp().unsqueeze(-1) * self.loc).sum(-2)
        return mean.expand(*self.batch_shape, *self.event_shape)

    @property
    def variance(self) -> Tensor:
        """The variance of each coordinate, of the batch shape and ``(d,)``."""
        weights = self.log_weights.exp().unsqueeze(-1)
        centred = self.loc - (weights * self.loc).sum(-2, keepdim=True)
        variance = (weights * (self.scale.square() + centred.square())).sum(-2)
        return variance.expand(*self.batch_shape, *self.event_shape)

    def _joint(self, value: Tensor) -> Tensor:
        """``log π_k N(z; μ_k, diag σ_k²)`` of points ``(m, d)``, or ``(n, m, d)`` with a batch of components.

        Returns:
            Shape ``(m, K)`` or ``(n, m, K)``, in the dtype of the points.
        """
        exact = torch.float32 if value.device.type == "mps" else torch.float64
        loc, scale = self.loc, self.scale
        if value.dim() == 3:
            loc, scale = loc.flatten(0, -3), scale.flatten(0, -3)
        middle = loc.detach().mean(-2, keepdim=True)
        centred, points = (loc - middle).to(exact), (value - middle).to(exact)
        precision = scale.to(exact).square().reciprocal()
        moments = precision * centred
        log_height = self.log_weights - self.scale.log().sum(-1)
        log_height = log_height.flatten(0, -2) if value.dim() == 3 else log_height
        constant = -0.5 * (moments * centred).sum(-1) + log_height
        constant = constant - 0.5 * value.shape[-1] * math.log(2 * math.pi)
        weights = torch.cat([-0.5 * precision, moments], -1).mT
        features = torch.cat([points.square(), points], -1)
        if value.dim() == 3:
            return torch.baddbmm(constant.unsqueeze(-2), features, weights).to(value.dtype)
        return torch.addmm(constant, features, weights).to(value.dtype)

    def _arranged(self, value: Tensor) -> tuple[Tensor, torch.Size, bool]:
        """Points with all that shares components in one dimension, the shape to restore, and which it is."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        if not self.loc.shape[:-2]:
            return value.reshape(-1, value.shape[-1]), value.shape[:-1], False
        lead = len(shape) - len(self.batch_shape)
        value = value.expand(*shape, value.shape[-1])
        grouped = value.reshape(math.prod(shape[:lead]), self.batch_shape.numel(), value.shape[-1])
        return grouped.transpose(0, 1), shape, True

    def component_log_prob(self, value: Tensor) -> Tensor:
        """``log π_k N(z; μ_k, diag σ_k²)`` for each component.

        Args:
            value: Points ``(..., d)``.

        Returns:
            ``(..., K)``.
        """
        check_last_dim("value", value, self.event_shape[0])
        points, shape, batched = self._arranged(value)
        joint = self._joint(points)
        return (joint.transpose(0, 1) if batched else joint).reshape(*shape, self.num_components)

    def responsibilities(self, value: Tensor) -> Tensor:
        """``p(k | z)``: which component a point belongs to.

        Args:
            value: Points ``(..., d)``.

        Returns:
            Probabilities ``(..., K)``.
        """
        return self.component_log_prob(value).softmax(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density.

        Args:
            value: Points ``(..., d)``.

        Returns:
            ``(...)``, broadcast with the batch shape.
        """
        if self._validate_args:
            self._validate_sample(value)
        check_last_dim("value", value, self.event_shape[0])
        points, shape, batched = self._arranged(value)
        tiles = points.split(max(1, _PAIRS // (self.num_components * (len(points) if batched else 1))), -2)
        parts = [self._joint(tile).logsumexp(-1) for tile in tiles]
        total = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        total = (total.transpose(0, 1) if batched else total).reshape(shape)
        return total.expand(torch.broadcast_shapes(shape, self.batch_shape))

    # -- draws -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``sample_shape + batch_shape + (d,)``: a component by its weight, then its normal."""
        shape = self._extended_shape(torch.Size(sample_shape))
        num, dim = self.loc.shape[-2:]
        own = self.loc.shape[:-2]
        count = math.prod(shape[:-1]) // max(1, own.numel())
        if count == 0 or own.numel() == 0:
            return self.loc.new_empty(shape)
        weights = self.log_weights.exp().reshape(-1, num)
        index = torch.multinomial(weights, count, replacement=True).unsqueeze(-1).expand(-1, -1, dim)
        loc = self.loc.reshape(-1, num, dim).gather(1, index)
        scale = self.scale.reshape(-1, num, dim).gather(1, index)
        draws = loc + scale * torch.randn_like(loc)  # (members of the batch, count, d)
        return draws.transpose(0, 1).reshape(shape)
