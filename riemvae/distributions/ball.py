"""The ball around the origin as a support, and a bijection from the whole space to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to


class Ball(constraints.Constraint):
    """Points with ``‖z‖ <= radius``."""

    is_discrete = False
    event_dim = 1

    def __init__(self, radius: float) -> None:
        self.radius = radius

    def check(self, value: Tensor) -> Tensor:
        """Whether each point ``(..., d)`` lies in the ball, shape ``(...)``."""
        return torch.linalg.vector_norm(value, dim=-1) <= self.radius

    def __repr__(self) -> str:
        return f"Ball(radius={self.radius:g})"


def _ratio(x: Tensor) -> Tensor:
    """``φ(x) = (1 - e^{-x})/x`` of ``x >= 0``, smooth at zero."""
    near = x < 1e-3
    small, large = x.masked_fill(~near, 0.0), x.masked_fill(near, 1.0)
    series = 1 - small / 2 * (1 - small / 3 * (1 - small / 4))
    return torch.where(near, series, -torch.expm1(-large) / large)


def _log_ratio(t: Tensor) -> Tensor:
    """``-log(1 - t)/t`` of ``0 <= t < 1``, smooth at zero."""
    near = t < 1e-3
    small, large = t.masked_fill(~near, 0.0), t.masked_fill(near, 0.5)
    series = 1 + small * (1 / 2 + small * (1 / 3 + small * (1 / 4 + small / 5)))
    return torch.where(near, series, -torch.log1p(-large) / large)


class ToBall(Transform):
    r"""From ``ℝᵈ`` to the open ball of radius ``R``, so that densities on it get tails like a normal's.

    .. math:: z = R \sqrt{1 - e^{-\|u\|^2/2}} \, u / \|u\| = R \sqrt{\phi(\|u\|^2/2)/2} \; u,
       \qquad \phi(x) = (1 - e^{-x})/x

    .. math:: \log |\det \partial z / \partial u|
       = d \log(R/\sqrt{2}) - \|u\|^2/2 + (d/2 - 1) \log \phi(\|u\|^2/2)

    (along ``u`` it stretches by ``R e^{-‖u‖²/2} ‖u‖ / 2s``, across it by ``R s/‖u‖``, ``s² = 1 -
    e^{-‖u‖²/2}``). A density that is bounded on the ball, and need not vanish at its border, is in ``u`` at
    most of the order of a standard normal; for ``d = 2`` the uniform one *is* the standard normal. Normal
    guides in ``u`` then have importance weights of finite variance. An algebraic bijection such as ``R u/√(1
    + ‖u‖²)`` gives it the tails of a Student t with two degrees of freedom, and these weights none.

    Lengths are those of the ball less a few roundings of the dtype, so that no image lies outside.

    Args:
        radius: ``R``, positive.

    Example:
        >>> z = ToBall(2.0)(torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.0, 1e8]]))
        >>> z.norm(dim=-1)
        tensor([0.0000, 1.2545, 2.0000])
    """

    domain = constraints.real_vector
    bijective = True

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.radius = radius

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return Ball(self.radius)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ToBall) and other.radius == self.radius

    def _size(self, like: Tensor) -> float:
        return self.radius * (1 - 8 * torch.finfo(like.dtype).eps)

    def _call(self, x: Tensor) -> Tensor:
        half_square = 0.5 * x.square().sum(-1, keepdim=True)
        return self._size(x) * x * (0.5 * _ratio(half_square)).sqrt()

    def _inverse(self, y: Tensor) -> Tensor:
        y = y / self._size(y)
        square = y.square().sum(-1, keepdim=True).clamp(max=1 - torch.finfo(y.dtype).eps)
        return y * (2 * _log_ratio(square)).sqrt()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        half_square, d = 0.5 * x.square().sum(-1), x.shape[-1]
        log_size = math.log(self._size(x)) - 0.5 * math.log(2.0)
        return d * log_size - half_square + (0.5 * d - 1) * _ratio(half_square).log()


@biject_to.register(Ball)
@transform_to.register(Ball)
def _to_ball(constraint: Ball) -> ToBall:
    return ToBall(constraint.radius)
