"""Masked autoregressive flows: affine in either direction, and splines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from riemvae._checks import check_count, check_positive
from riemvae._recipe import recipe
from riemvae.flows._zuko import LazyTransform, MonotonicAffineTransform, MonotonicRQSTransform
from riemvae.flows.flow import VectorFlow, stacked
from riemvae.flows.sequential import SequentialTransform


def _autoregressive(features: int, *sizes: Any, **univariate: Any) -> list[LazyTransform]:
    """Transforms of which every second one runs through the features in descending order."""

    def turn(k: int) -> dict[str, Any]:
        ascending = torch.arange(features)
        return {"order": ascending if k % 2 == 0 else ascending.flip(0)}

    return stacked(SequentialTransform, turn, features, *sizes, **univariate)


# zuko's: scales between 1/1000 and 1000.
MAX_LOG_SCALE = math.log(1e3)


def affine(max_log_scale: float) -> dict[str, Any]:
    """The arguments of zuko for a monotone affine map."""
    check_positive("max_log_scale", max_log_scale)
    return {"univariate": partial(MonotonicAffineTransform, slope=math.exp(-max_log_scale))}


def spline(bins: int, bound: float) -> dict[str, Any]:
    """The arguments of zuko for a monotone rational-quadratic spline."""
    check_count("bins", bins, minimum=2)
    check_positive("bound", bound)
    univariate: Callable[..., Any] = partial(MonotonicRQSTransform, bound=float(bound))
    return {"univariate": univariate, "shapes": [(bins,), (bins,), (bins - 1,)]}


@recipe
class MAF(VectorFlow):
    """The masked autoregressive flow: densities at once, draws one feature after another.

    Both ways take the products of one pass; ``d`` small steps are slower than one large one all the same.

    Each transform takes data towards the base by ``y_i = x_i exp(a_i(x_{<i}, c)) + b_i(x_{<i}, c)``, every
    second one with the order of the features reversed. It starts near the identity.

    Args:
        features: ``d``.
        context: The number of context features; 0 is an unconditional flow.
        transforms: The number of transforms; with one, the first feature depends on no other.
        hidden: Widths of the hidden layers of each masked network.
        activation: ``"elu"``, ``"relu"``, ``"silu"`` or ``"tanh"``; a smooth one suits Hamiltonian guides.
        max_log_scale: What ``|a|`` stays below, softly. Chains of many flows want 1: scales multiply.

    Raises:
        ValueError: Counts below one, an unknown activation, a bound that is not positive; when called, a
            context that does not fit.

    Source: Papamakarios, Pavlakou and Murray (2017).

    Example:
        >>> flow = MAF(3, context=2)
        >>> flow(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
        max_log_scale: float = MAX_LOG_SCALE,
    ) -> None:
        parts = _autoregressive(features, context, transforms, hidden, activation, **affine(max_log_scale))
        super().__init__(features, context, parts)
        self.transforms, self.hidden, self.activation = transforms, tuple(hidden), activation
        self.max_log_scale = max_log_scale


@recipe
class IAF(VectorFlow):
    """The inverse autoregressive flow: draws at once, densities of foreign points a feature at a time.

    The transforms of :class:`MAF` run from the base to the data. What a posterior wants, whose density is
    asked for at its own draws only.

    Args:
        features: ``d``.
        context: The number of context features; 0 is an unconditional flow.
        transforms: The number of transforms; with one, the first feature depends on no other.
        hidden: Widths of the hidden layers of each masked network.
        activation: ``"elu"``, ``"relu"``, ``"silu"`` or ``"tanh"``.
        max_log_scale: What ``|a|`` stays below, softly. Chains of many flows want 1: scales multiply.

    Raises:
        ValueError: As for :class:`MAF`.

    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016); the affine form is that of the
    MAF, without their gate.

    Example:
        >>> IAF(3)().rsample((5,)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
        max_log_scale: float = MAX_LOG_SCALE,
    ) -> None:
        parts = _autoregressive(features, context, transforms, hidden, activation, **affine(max_log_scale))
        super().__init__(features, context, [part.inv for part in reversed(parts)])
        self.transforms, self.hidden, self.activation = transforms, tuple(hidden), activation
        self.max_log_scale = max_log_scale


@recipe
class NSF(VectorFlow):
    """The autoregressive neural spline flow: densities at once, draws one feature after another.

    Like :class:`MAF` with monotone rational-quadratic splines for the affine maps. A spline acts on
    ``[-bound, bound]`` and is the **identity outside**: standardise data, or take a larger bound; what lies
    outside follows the base. ``InvertedFlow(NSF(d))`` draws at once.

    Args:
        features: ``d``.
        context: The number of context features; 0 is an unconditional flow.
        transforms: The number of transforms; with one, the first feature depends on no other.
        hidden: Widths of the hidden layers of each masked network.
        bins: Bins of each spline, at least 2.
        bound: Where the splines end.
        activation: ``"elu"``, ``"relu"``, ``"silu"`` or ``"tanh"``.

    Raises:
        ValueError: As for :class:`MAF`; a bound that is not positive.

    Source: Durkan, Bekasov, Murray and Papamakarios (2019).

    Example:
        >>> NSF(2, bins=4)().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
        bins: int = 8,
        bound: float = 5.0,
        activation: str = "silu",
    ) -> None:
        parts = _autoregressive(features, context, transforms, hidden, activation, **spline(bins, bound))
        super().__init__(features, context, parts)
        self.transforms, self.hidden, self.activation = transforms, tuple(hidden), activation
        self.bins, self.bound = bins, bound
