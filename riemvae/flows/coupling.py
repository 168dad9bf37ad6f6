"""Coupling flows: one pass in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from riemvae._recipe import recipe
from riemvae.flows._zuko import GeneralCouplingTransform, LazyTransform
from riemvae.flows.autoregressive import MAX_LOG_SCALE, affine, spline
from riemvae.flows.flow import VectorFlow, stacked


def _coupling(features: int, *sizes: Any, **univariate: Any) -> list[LazyTransform]:
    """Transforms that change the even and the odd features in turn."""

    def turn(k: int) -> dict[str, Any]:
        return {"mask": torch.arange(features) % 2 == (k + 1) % 2}

    return stacked(GeneralCouplingTransform, turn, features, *sizes, **univariate)


@recipe
class RealNVP(VectorFlow):
    """The affine coupling flow: one pass for densities and for draws.

    Each transform changes the even or the odd features in turn, ``y_b = x_b exp(a(x_a, c)) + b(x_a, c)``. It
    starts near the identity.

    Args:
        features: ``d``.
        context: The number of context features; 0 is an unconditional flow.
        transforms: The number of transforms; each feature depends on all others from three on.
        hidden: Widths of the hidden layers of each network.
        activation: ``"elu"``, ``"relu"``, ``"silu"`` or ``"tanh"``; a smooth one suits Hamiltonian guides.
        max_log_scale: What ``|a|`` stays below, softly. Chains of many flows want 1: scales multiply.

    Raises:
        ValueError: Counts below one, an unknown activation; when called, a context that does not fit.

    Source: Dinh, Sohl-Dickstein and Bengio (2017).

    Example:
        >>> RealNVP(3)().rsample((5,)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 4,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
        max_log_scale: float = MAX_LOG_SCALE,
    ) -> None:
        parts = _coupling(features, context, transforms, hidden, activation, **affine(max_log_scale))
        super().__init__(features, context, parts)
        self.transforms, self.hidden, self.activation = transforms, tuple(hidden), activation
        self.max_log_scale = max_log_scale


@recipe
class SplineCoupling(VectorFlow):
    """The coupling form of the neural spline flow: one pass for densities and for draws.

    Like :class:`RealNVP` with monotone rational-quadratic splines, which act on ``[-bound, bound]`` and are
    the **identity outside**.

    Args:
        features: ``d``.
        context: The number of context features; 0 is an unconditional flow.
        transforms: The number of transforms; each feature depends on all others from three on.
        hidden: Widths of the hidden layers of each network.
        bins: Bins of each spline, at least 2.
        bound: Where the splines end.
        activation: ``"elu"``, ``"relu"``, ``"silu"`` or ``"tanh"``.

    Raises:
        ValueError: As for :class:`RealNVP`; a bound that is not positive.

    Source: Durkan, Bekasov, Murray and Papamakarios (2019).

    Example:
        >>> SplineCoupling(2, bins=4)().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 4,
        hidden: Sequence[int] = (64, 64),
        bins: int = 8,
        bound: float = 5.0,
        activation: str = "silu",
    ) -> None:
        parts = _coupling(features, context, transforms, hidden, activation, **spline(bins, bound))
        super().__init__(features, context, parts)
        self.transforms, self.hidden, self.activation = transforms, tuple(hidden), activation
        self.bins, self.bound = bins, bound
