"""Planar and radial flows, their parameters free or from a context."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from riemvae._recipe import recipe
from riemvae.distributions.planar import Planar, Radial
from riemvae.flows._zuko import ComposedTransform, LazyTransform
from riemvae.flows.flow import SHRINKAGE, VectorFlow, check_sizes, network_options


class _Stack(LazyTransform):  # type: ignore[misc]
    """``K`` transforms whose parameters are free, or are what one network makes of the context.

    Args:
        build: From ``(..., P)`` parameters to a transform.
        initial: The parameters to start from ``(K, P)``.
        context: The number of context features.
        hidden: Widths of the network's hidden layers.
        activation: Their activation.
    """

    def __init__(
        self,
        build: Callable[[Tensor], Transform],
        initial: Tensor,
        context: int,
        hidden: Sequence[int],
        activation: str,
    ) -> None:
        super().__init__()
        self.build, self.shape = build, tuple(initial.shape)
        options = network_options(hidden, activation)
        if not context:
            self.phi = nn.Parameter(initial)
            return
        widths = [context, *options["hidden_features"]]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), options["activation"]()]
        last = nn.Linear(widths[-1], initial.numel())
        with torch.no_grad():
            last.weight.mul_(SHRINKAGE)  # the context speaks softly at the start
            last.bias.copy_(initial.flatten())
        self.hyper = nn.Sequential(*layers, last)

    def forward(self, context: Tensor | None = None) -> Transform:
        """The composition of the ``K`` transforms."""
        phi = self.phi if context is None else self.hyper(context).unflatten(-1, self.shape)
        return ComposedTransform(*(self.build(p) for p in phi.unbind(-2)))  # type: ignore[no-any-return]


@recipe
class PlanarFlow(VectorFlow):
    """``K`` planar transforms from the base to the data: draws in closed form.

    The transforms are :class:`~riemvae.distributions.transforms.Planar`: always invertible, near the identity
    at the start. The density of foreign points solves one scalar equation a point and transform, to the
    precision of the dtype. With a context one network gives the parameters of all transforms (amortised).

    Args:
        features: ``d``.
        context: The number of context features; 0 is an unconditional flow.
        transforms: ``K``.
        hidden: Widths of the hidden layers of the context's network.
        activation: ``"elu"``, ``"relu"``, ``"silu"`` or ``"tanh"``.

    Raises:
        ValueError: Counts below one, an unknown activation; when called, a context that does not fit.

    Source: Rezende and Mohamed (2015), eq. 10.

    Example:
        >>> PlanarFlow(2, transforms=4)().rsample((5,)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 8,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
    ) -> None:
        check_sizes(features, context, transforms)
        direction = 0.01 * torch.randn(transforms, features)
        weight = torch.randn(transforms, features) / math.sqrt(features)
        initial = torch.cat([direction, weight, torch.zeros(transforms, 1)], -1)
        super().__init__(features, context, _Stack(_planar, initial, context, hidden, activation).inv)
        self.transforms, self.hidden, self.activation = transforms, tuple(hidden), activation


def _planar(phi: Tensor) -> Transform:
    d = (phi.shape[-1] - 1) // 2
    direction, weight, bias = phi.split([d, d, 1], -1)
    return Planar(d, direction=direction, weight=weight, bias=bias.squeeze(-1))


@recipe
class RadialFlow(VectorFlow):
    """``K`` radial transforms from the base to the data: both directions in closed form.

    The transforms are :class:`~riemvae.distributions.transforms.Radial`: always invertible, near the identity
    at the start. With a context one network gives the parameters of all transforms (amortised).

    Args:
        features: ``d``.
        context: The number of context features; 0 is an unconditional flow.
        transforms: ``K``.
        hidden: Widths of the hidden layers of the context's network.
        activation: ``"elu"``, ``"relu"``, ``"silu"`` or ``"tanh"``.

    Raises:
        ValueError: Counts below one, an unknown activation; when called, a context that does not fit.

    Source: Rezende and Mohamed (2015), eq. 14.

    Example:
        >>> RadialFlow(2, transforms=4)().rsample((5,)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 8,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
    ) -> None:
        check_sizes(features, context, transforms)
        centre = 0.5 * torch.randn(transforms, features)
        strength = 0.01 * torch.randn(transforms, 1)
        initial = torch.cat([centre, torch.zeros(transforms, 1), strength], -1)
        super().__init__(features, context, _Stack(_radial, initial, context, hidden, activation).inv)
        self.transforms, self.hidden, self.activation = transforms, tuple(hidden), activation


def _radial(phi: Tensor) -> Transform:
    d = phi.shape[-1] - 2
    centre, log_radius, strength = phi.split([d, 1, 1], -1)
    return Radial(d, centre=centre, log_radius=log_radius.squeeze(-1), strength=strength.squeeze(-1))
