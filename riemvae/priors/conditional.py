"""Priors ``p(z|y)`` of the latent given something known of each datum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution

from riemvae._checks import argument_error, check_count, check_positive
from riemvae._recipe import recipe
from riemvae.distributions.diagonal_mixture import DiagonalMixture


@recipe
class ConditionalNormal(nn.Module):
    """``p(z|y) = N(z; μ(y), diag σ(y)²)`` by a network.

    Given to :class:`~riemvae.VAE`, the model is called as ``vae(x, y)``, draws are ``vae(y=y)``.

    Args:
        network: ``y (B, ...) -> (loc, scale)``, each ``(B, d)``, or ``y -> Distribution`` with batch shape
            ``(B,)`` and event ``(d,)``; an encoder of ``y``, that is.

    Raises:
        ValueError: When called: a network that returns something else, a scale that is not positive.

    Source: Sohn, Lee and Yan (2015).

    Example:
        >>> from riemvae.networks import MLPEncoder
        >>> prior = ConditionalNormal(MLPEncoder(3, 2))
        >>> prior(torch.zeros(5, 3)).log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(self, network: Callable[[Tensor], Any]) -> None:
        super().__init__()
        if not callable(network):
            raise argument_error("network", "a callable y -> (loc, scale) or y -> Distribution", network)
        self.network = network

    def forward(self, y: Tensor) -> TorchDistribution:
        """The normal given each row of ``y``, batch shape ``(B,)``."""
        result = self.network(y)
        if isinstance(result, Distribution):
            vector: Any = result
            return vector if len(result.event_shape) else vector.to_event(1)  # type: ignore[no-any-return]
        try:
            loc, scale = result
        except (TypeError, ValueError):
            raise argument_error(
                "network",
                "a callable y -> (loc, scale) or y -> Distribution",
                f"one that returned {type(result)}",
            ) from None
        if loc.dim() != 2 or loc.shape[:1] != y.shape[:1]:
            raise argument_error("network", f"a loc of shape ({len(y)}, d)", loc)
        return dist.Normal(loc, scale).to_event(1)  # type: ignore[no-any-return]


@recipe
class ClassConditional(nn.Module):
    """A learned normal, or mixture of normals, for each class: ``p(z|y) = Σ_k π_yk N(z; μ_yk, diag σ_yk²)``.

    Args:
        num_classes: ``C``.
        latent_dim: ``d``.
        num_components: Normals a class.
        spread: Standard deviation of the random means at the start, drawn from torch's generator. The scales
            start at 1.

    Raises:
        ValueError: Numbers out of range; when called, ``y`` that is neither labels nor one-hot rows.

    Source: Kingma, Mohamed, Rezende and Welling (2014), for the class as a condition; Jiang et al. (2017),
    for a normal a class.

    Example:
        >>> prior = ClassConditional(10, 2)
        >>> prior(torch.tensor([3, 3, 7])).batch_shape
        torch.Size([3])
        >>> prior(torch.eye(10)).batch_shape
        torch.Size([10])
    """

    def __init__(
        self, num_classes: int, latent_dim: int, num_components: int = 1, spread: float = 0.5
    ) -> None:
        super().__init__()
        self.num_classes = check_count("num_classes", num_classes)
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.num_components = check_count("num_components", num_components)
        check_positive("spread", spread)
        self.spread = float(spread)
        shape = (self.num_classes, self.num_components, self.latent_dim)
        self.loc = nn.Parameter(self.spread * torch.randn(shape))
        self.log_scale = nn.Parameter(torch.zeros(shape))
        if self.num_components > 1:
            self.logits = nn.Parameter(torch.zeros(shape[:2]))

    def labels(self, y: Tensor) -> Tensor:
        """Integer labels ``(B,)`` of ``y``: labels themselves, or one-hot rows ``(B, C)``."""
        if y.dim() == 2 and y.shape[1] == self.num_classes:
            one_hot = ((y == 0) | (y == 1)).all(-1) & (y.sum(-1) == 1)
            if bool(one_hot.all()):
                return y.argmax(-1)
        integer = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        if y.dim() == 1 and integer and bool(((y >= 0) & (y < self.num_classes)).all()):
            return y.long()
        raise argument_error(
            "y",
            f"integer labels (B,) from 0 to {self.num_classes - 1}, or one-hot rows (B, {self.num_classes})",
            y if y.dim() != 1 or not integer else f"labels from {int(y.min())} to {int(y.max())}",
            "use y.long() for labels in a floating type",
        )

    def forward(self, y: Tensor) -> TorchDistribution:
        """The distribution of the class of each row of ``y``, batch shape ``(B,)``."""
        labels = self.labels(y)
        loc, scale = self.loc[labels], self.log_scale[labels].exp()
        if self.num_components > 1:
            return DiagonalMixture(self.logits[labels], loc, scale)
        return dist.Normal(loc[:, 0], scale[:, 0]).to_event(1)  # type: ignore[no-any-return]
