"""Planar and radial flows as Pyro transforms, invertible in both directions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn

from riemvae._checks import check_count, check_last_dim
from riemvae._recipe import recipe

# softplus(x + this) is 1 at x = 0.
_UNIT = math.log(math.e - 1.0)
_MAX_NEWTON_STEPS = 100


def _softplus(x: Tensor) -> Tensor:
    """To double precision: torch's own is the identity from 20 on."""
    return F.softplus(x, threshold=40.0)


class _Root(torch.autograd.Function):
    """The ``a`` with ``a - tanh a + s tanh a = r``, for slopes at zero ``s > 0``.

    The left side is odd and strictly increasing; for ``r > 0`` it is concave (``s >= 1``) or convex (``s <
    1``) in ``a > 0``. Newton's iteration from the lower bound ``max(r/s, r + 1 - s)``, or from the upper
    bound ``min(r/s, r + 1 - s)``, then runs monotonically into the root: no bracket is needed.
    The derivatives are those of the implicit function, and are differentiable again.
    """

    @staticmethod
    def forward(s: Tensor, r: Tensor) -> Tensor:
        size = r.abs()
        a = torch.where(
            s >= 1.0, torch.maximum(size / s, size + 1.0 - s), torch.minimum(size / s, size + 1.0 - s)
        )
        tolerance = 4.0 * torch.finfo(r.dtype).eps
        for _ in range(_MAX_NEWTON_STEPS):
            t = a.tanh()
            step = (a - t + s * t - size) / (t * t + s * (1.0 - t * t))
            a = a - step
            if not bool((step.abs() > tolerance * a.abs()).any()):
                break
        return torch.where(r < 0, -a, a)

    @staticmethod
    def setup_context(
        ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor
    ) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        s, a = ctx.saved_tensors  # type: ignore[attr-defined]
        t = a.tanh()
        by_r = grad / (t * t + s * (1.0 - t * t))
        return -t * by_r, by_r

    @staticmethod
    def vmap(
        info: object, in_dims: tuple[int | None, int | None], s: Tensor, r: Tensor
    ) -> tuple[Tensor, int]:  # type: ignore[override]
        moved = [v.unsqueeze(0) if dim is None else v.movedim(dim, 0) for v, dim in zip((s, r), in_dims)]
        return _Root.apply(*torch.broadcast_tensors(*moved)), 0


class _LayerTransform(TransformModule):
    """What the two share: a bijection of ``ℝᵈ`` whose parameters are its own, or are given."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    autoregressive = False

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = check_count("features", features)

    def _keep(self, name: str, value: Tensor | None, initial: Tensor) -> None:
        """The given value as it is (a parameter registers), or a parameter of its own."""
        if value is None:
            value = nn.Parameter(initial)
        elif initial.dim():
            check_last_dim(name, value, self.features)
        setattr(self, name, value)

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det ∂y/∂x|``, in closed form: ``(...)`` for ``x (..., d)``."""
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``y`` and ``log|det ∂y/∂x|`` at once."""
        raise NotImplementedError


@recipe
class Planar(_LayerTransform):
    """``f(z) = z + û tanh(wᵀz + b)`` with ``wᵀû > -1``, which makes it a bijection of ``ℝᵈ``.

    ``û = u + (m(wᵀu) - wᵀu) w/‖w‖²`` as in the paper's appendix, but with ``m(t) = softplus(t + log(e - 1)) -
    1`` in place of ``softplus(t) - 1``: then ``u = 0`` is the identity. With ``s = 1 + wᵀû`` and ``a = wᵀz +
    b``, ``log|det| = log(tanh² a + s (1 - tanh² a))``, a sum of positive terms.

    The inverse needs the ``a`` with ``a + wᵀû tanh a = wᵀy + b``: a scalar equation a point, whatever ``d``,
    solved by Newton's iteration from a bound from which it cannot overshoot, to the precision of the dtype.
    Its gradient is the implicit function's.

    Args:
        features: ``d``.
        direction: ``u (..., d)``. None is a parameter of the transform, started near the identity.
        weight: ``w (..., d)``, not zero. None as for ``direction``.
        bias: ``b (...)``. None as for ``direction``.

    Raises:
        ValueError: Tensors whose last dimension is not ``features``.

    Source: Rezende and Mohamed (2015), eq. 10 to 12 and appendix A.1.

    Example:
        >>> flow = Planar(2, direction=torch.tensor([2.0, 0.0]), weight=torch.ones(2), bias=torch.zeros(()))
        >>> y = flow(torch.tensor([[0.5, -0.2]]))
        >>> flow.inv(y).round(decimals=4)
        tensor([[ 0.5000, -0.2000]])
    """

    direction: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        features: int,
        *,
        direction: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(features)
        self._keep("direction", direction, 0.01 * torch.randn(features))
        self._keep("weight", weight, torch.randn(features) / math.sqrt(features))
        self._keep("bias", bias, torch.zeros(()))

    def _bounded(self) -> tuple[Tensor, Tensor]:
        """``û`` and ``s = 1 + wᵀû > 0``."""
        u, w = self.direction, self.weight
        dot = (w * u).sum(-1)
        s = _softplus(dot + _UNIT)
        # Where w is zero, so is its dot product: the map is the shift by u tanh b.
        norm = w.square().sum(-1).clamp_min(torch.finfo(w.dtype).tiny)
        return u + ((s - 1.0 - dot) / norm).unsqueeze(-1) * w, s

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``f(x)`` and ``log|det ∂f/∂x|``."""
        u, s = self._bounded()
        t = ((self.weight * x).sum(-1) + self.bias).tanh()
        return x + u * t.unsqueeze(-1), (t * t + s * (1.0 - t * t)).log()

    def _inverse(self, y: Tensor) -> Tensor:
        u, s = self._bounded()
        r = (self.weight * y).sum(-1) + self.bias
        a: Tensor = _Root.apply(*torch.broadcast_tensors(s, r))
        return y - u * a.tanh().unsqueeze(-1)


@recipe
class Radial(_LayerTransform):
    """``f(z) = z + β (z - c)/(α + r)`` with ``r = ‖z - c‖``, ``α > 0``, ``β > -α``: a bijection of ``ℝᵈ``.

    ``α = exp(log_radius)`` and ``β = s - α``, ``s = softplus(strength + softplus⁻¹(α))``: zero strength is
    the identity. The distances are mapped by ``ρ = r (r + s)/(r + α)``, which has the inverse ``r = ½(ρ - s +
    √((ρ - s)² + 4αρ))``: the flow is inverted in closed form, without a search. ``log|det| = (d - 1)
    log((r + s)/(r + α)) + log((r² + 2αr + αs)/(r + α)²)``, sums of positive terms.

    Args:
        features: ``d``.
        centre: ``c (..., d)``. None is a parameter of the transform, started near the identity.
        log_radius: ``log α (...)``. None as for ``centre``.
        strength: The unconstrained ``β (...)``. None as for ``centre``.

    Raises:
        ValueError: A centre whose last dimension is not ``features``.

    Source: Rezende and Mohamed (2015), eq. 14 and appendix A.2.

    Example:
        >>> flow = Radial(2, centre=torch.zeros(2), log_radius=torch.zeros(()), strength=torch.tensor(3.0))
        >>> y = flow(torch.tensor([[0.5, -0.2]]))
        >>> flow.inv(y).round(decimals=4)
        tensor([[ 0.5000, -0.2000]])
    """

    centre: Tensor
    log_radius: Tensor
    strength: Tensor

    def __init__(
        self,
        features: int,
        *,
        centre: Tensor | None = None,
        log_radius: Tensor | None = None,
        strength: Tensor | None = None,
    ) -> None:
        super().__init__(features)
        self._keep("centre", centre, 0.5 * torch.randn(features))
        self._keep("log_radius", log_radius, torch.zeros(()))
        self._keep("strength", strength, 0.01 * torch.randn(()))

    def _bounded(self) -> tuple[Tensor, Tensor]:
        """``α > 0`` and ``s = α + β > 0``."""
        radius = self.log_radius.exp()
        inverse_softplus = radius + (-torch.expm1(-radius)).log()
        return radius, _softplus(self.strength + inverse_softplus)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``f(x)`` and ``log|det ∂f/∂x|``."""
        radius, s = self._bounded()
        offset = x - self.centre
        r = torch.linalg.vector_norm(offset, dim=-1)
        ratio = (r + s) / (r + radius)
        along = (r * r + 2.0 * radius * r + radius * s).log() - 2.0 * (r + radius).log()
        return self.centre + ratio.unsqueeze(-1) * offset, (self.features - 1) * ratio.log() + along

    def _inverse(self, y: Tensor) -> Tensor:
        radius, s = self._bounded()
        offset = y - self.centre
        rho = torch.linalg.vector_norm(offset, dim=-1)
        excess = rho - s
        # The root without a difference of near numbers, on either side.
        q = excess.abs() + (excess.square() + 4.0 * radius * rho).sqrt()
        r = torch.where(excess > 0, 0.5 * q, 2.0 * radius * rho / q)
        return self.centre + ((r + radius) / (r + s)).unsqueeze(-1) * offset
