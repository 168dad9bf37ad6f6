"""Sphere, hyperboloid and Poincaré ball in normal coordinates, to the rounding of the dtype.

geoopt's maps clamp by fixed epsilons (a float32 distance on its sphere is never below 0.014); here everything
is an even, smooth function of a squared length, so that values and gradients hold at coincident points too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import geoopt
import torch
from geoopt.manifolds.stereographic.math import project as project_to_ball
from pyro.distributions.constraints import sphere
from pyro.distributions.transforms import Normalize
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to, constraints, transform_to

from riemvae._checks import argument_error

_SERIES_BELOW = 1e-3  # four terms then err by less than 1e-13


class UnitSphere(type(sphere)):  # type: ignore[misc]
    """Points ``(..., n)`` of norm one, as Pyro's ``sphere`` but to a thousand roundings of their dtype.

    A ``pyro.param`` under this constraint is a vector divided by its norm.
    """

    reltol = 1e3

    def __repr__(self) -> str:
        return "UnitSphere()"


class Hyperboloid(constraints.Constraint):
    """Points ``(..., n)`` with ``-x_0² + x_1² + ... = -k`` and ``x_0 > 0``, to rounding of ``x_0²``."""

    is_discrete = False
    event_dim = 1

    def __init__(self, k: float | Tensor = 1.0) -> None:
        self.k = k

    def check(self, value: Tensor) -> Tensor:
        """Whether each point lies on the upper sheet, shape ``(...)``."""
        time = value[..., 0]
        form = value[..., 1:].square().sum(-1) - time.square() + self.k
        return (form.abs() <= _slack(value) * time.square().clamp(min=1.0)) & (time > 0)

    def __repr__(self) -> str:
        return f"Hyperboloid(k={float(self.k):g})"


class OpenBall(constraints.Constraint):
    """Points ``(..., d)`` with ``c ‖x‖² < 1``."""

    is_discrete = False
    event_dim = 1

    def __init__(self, c: float | Tensor = 1.0) -> None:
        self.c = c

    def check(self, value: Tensor) -> Tensor:
        """Whether each point lies inside, shape ``(...)``."""
        return self.c * value.square().sum(-1) < 1

    def __repr__(self) -> str:
        return f"OpenBall(c={float(self.c):g})"


class BallTransform(Transform):
    """``ℝᵈ`` to the ball ``c ‖x‖² < 1`` by the exponential map of its centre, ``u tanh(√c ‖u‖) / (√c ‖u‖)``.

    Args:
        c: Minus the curvature, positive.
    """

    domain = constraints.real_vector
    bijective = True

    def __init__(self, c: float | Tensor = 1.0) -> None:
        super().__init__()
        self.c = c

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return OpenBall(self.c)

    def _call(self, x: Tensor) -> Tensor:
        c = torch.as_tensor(self.c).to(x)
        return project_to_ball(x * _tanh_ratio(c * _dot(x, x)), k=-c)  # type: ignore[no-any-return]

    def _inverse(self, y: Tensor) -> Tensor:
        c = torch.as_tensor(self.c).to(y)
        square = c * _dot(y, y)
        # atanh t = asinh(t / √(1 - t²))
        return y * _asinh_ratio(square / (1 - square)) * (1 - square).rsqrt()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        square = torch.as_tensor(self.c).to(x) * x.square().sum(-1)
        # sech² along u, tanh r / r across it
        log_cosh = log_sinh_ratio(4 * square) - log_sinh_ratio(square)  # sinh 2r = 2 sinh r cosh r
        d = x.shape[-1]
        return (d - 1) * log_sinh_ratio(square) - (d + 1) * log_cosh


@biject_to.register(OpenBall)
@transform_to.register(OpenBall)
def _to_ball(constraint: OpenBall) -> BallTransform:
    return BallTransform(constraint.c)


@transform_to.register(UnitSphere)
def _to_sphere(constraint: UnitSphere) -> Normalize:
    return Normalize()


def plain(x: Tensor) -> Tensor:
    """``x`` as a plain tensor, where it is one of geoopt's."""
    return x.as_subclass(Tensor) if isinstance(x, geoopt.ManifoldTensor) else x


def as_parameter(value: float | Tensor, like: Tensor) -> Tensor:
    """``value`` as a tensor; a plain number is taken to the dtype and device of ``like`` at once."""
    if isinstance(value, Tensor):
        return value
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def is_validating(validate_args: bool | None) -> bool:
    """Whether a distribution given this argument checks its own."""
    return bool(Distribution._validate_args) if validate_args is None else validate_args


def _slack(value: Tensor) -> float:
    return 1e3 * torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0


# -- even functions of a length, from its square -----------------------------------------------------------


def _even(square: Tensor, series: tuple[float, ...], function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function(√square)``, by its power series in ``square`` near zero, where the root has no gradient."""
    near = square < _SERIES_BELOW
    small = square.masked_fill(~near, 0.0)
    value = torch.full_like(square, series[-1])
    for coefficient in reversed(series[:-1]):
        value = value * small + coefficient
    return torch.where(near, value, function(square.masked_fill(near, 1.0).sqrt()))


def _cos(square: Tensor) -> Tensor:
    return _even(square, (1.0, -1 / 2, 1 / 24, -1 / 720), torch.cos)


def _sin_ratio(square: Tensor) -> Tensor:
    """``sin r / r``."""
    return _even(square, (1.0, -1 / 6, 1 / 120, -1 / 5040), lambda r: r.sin() / r)


def log_sin_ratio(square: Tensor) -> Tensor:
    """``log |sin r / r|`` from ``r²``; the sine is kept above the rounding of its argument."""

    def far(r: Tensor) -> Tensor:
        return r.sin().abs().clamp(min=torch.finfo(r.dtype).eps).log() - r.log()

    return _even(square, (0.0, -1 / 6, -1 / 180, -1 / 2835), far)


def _cosh(square: Tensor) -> Tensor:
    return _even(square, (1.0, 1 / 2, 1 / 24, 1 / 720), torch.cosh)


def _sinh_ratio(square: Tensor) -> Tensor:
    """``sinh r / r``."""
    return _even(square, (1.0, 1 / 6, 1 / 120, 1 / 5040), lambda r: r.sinh() / r)


def log_sinh_ratio(square: Tensor) -> Tensor:
    """``log(sinh r / r)`` from ``r²``, without overflow.

    Example:
        >>> log_sinh_ratio(torch.tensor([0.0, 1.0, 1e4])).round(decimals=4)
        tensor([ 0.0000,  0.1614, 94.7017])
    """

    def far(r: Tensor) -> Tensor:
        return r + torch.log1p(-torch.exp(-2 * r)) - math.log(2.0) - r.log()

    return _even(square, (0.0, 1 / 6, -1 / 180, 1 / 2835), far)


def _tanh_ratio(square: Tensor) -> Tensor:
    """``tanh r / r``."""
    return _even(square, (1.0, -1 / 3, 2 / 15, -17 / 315), lambda r: r.tanh() / r)


def _asinh_ratio(square: Tensor) -> Tensor:
    """``asinh r / r``."""
    return _even(square, (1.0, -1 / 6, 3 / 40, -5 / 112), lambda r: r.asinh() / r)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """``a · b`` with the last dimension kept."""
    return (a * b).sum(-1, keepdim=True)


# -- spaces ------------------------------------------------------------------------------------------------


class SpaceForm:
    """A space of constant curvature, with an orthonormal frame ``E`` at each point.

    The frame is the one of the origin (the first coordinate axis of a sphere or hyperboloid, the centre of
    the ball) transported along the geodesic from there.

    Args:
        manifold: The geoopt manifold, whose curvature is read at each use: it may be trained.
    """

    codimension: ClassVar[int]  # of points in their coordinates
    is_chart: ClassVar[bool]  # whether a Lebesgue density exists
    description: ClassVar[str]

    def __init__(self, manifold: geoopt.Manifold) -> None:
        self.manifold = manifold

    @property
    def support(self) -> constraints.Constraint:
        """The points of the space."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """``x`` with its rounding off the space removed; gradients become tangent."""
        raise NotImplementedError

    def exponential(self, loc: Tensor, a: Tensor) -> Tensor:
        """``Exp_loc(E a)``."""
        raise NotImplementedError

    def confine(self, x: Tensor) -> Tensor:
        """``x`` with points that rounding put off the space, or too near its boundary, moved in."""
        return x

    def coordinates(self, loc: Tensor, x: Tensor) -> Tensor:
        """``a`` with ``Exp_loc(E a) = x``: the shortest."""
        raise NotImplementedError

    def log_stretch(self, square: Tensor) -> Tensor:
        """Log of the factor by which ``Exp`` stretches directions across a geodesic, from ``‖a‖²``."""
        raise NotImplementedError

    def log_volume(self, x: Tensor) -> Tensor:
        """``½ log det G(x)`` in the coordinates of a chart; 0 for an embedded space."""
        return x.new_zeros(x.shape[:-1])


class SphereSpace(SpaceForm):
    """The unit sphere in ``ℝⁿ``; its origin is ``(1, 0, ..., 0)``.

    At the antipode of the origin, which many geodesics reach, the one along the second axis is taken.
    """

    codimension = 1
    is_chart = False
    description = "a point of the unit sphere"

    @property
    def support(self) -> constraints.Constraint:
        return UnitSphere()

    def project(self, x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)

    @staticmethod
    def _removed(loc: Tensor, y: Tensor) -> Tensor:
        """What the transport takes from ``y (..., n - 1)``: ``(1 - μ_0)(û · y) û``, ``û`` along ``μ_1, ...``.

        On the origin's half it is ``(u · y) u / (1 + μ_0)``, whose gradient is finite at the origin.
        """
        first, u = loc[..., :1], loc[..., 1:]
        near = first > 0
        here = _dot(u, y) * u / (1 + first.masked_fill(~near, 1.0))
        square = _dot(u, u)
        known = square > torch.finfo(u.dtype).tiny
        axis = torch.zeros_like(u)
        axis[..., 0] = 1.0
        direction = torch.where(known, u / square.masked_fill(~known, 1.0).sqrt(), axis)
        return torch.where(near, here, (1 - first) * _dot(direction, y) * direction)

    def _raise(self, loc: Tensor, a: Tensor) -> Tensor:
        return torch.cat([-_dot(loc[..., 1:], a), a - self._removed(loc, a)], -1)

    def _lower(self, loc: Tensor, x: Tensor) -> Tensor:
        return x[..., 1:] - x[..., :1] * loc[..., 1:] - self._removed(loc, x[..., 1:])

    def exponential(self, loc: Tensor, a: Tensor) -> Tensor:
        square = _dot(a, a)
        return self.project(_cos(square) * loc + _sin_ratio(square) * self._raise(loc, a))

    def coordinates(self, loc: Tensor, x: Tensor) -> Tensor:
        cosine = _dot(loc, x)
        # The frame is orthogonal to loc, so that loc may be taken off or added: no cancellation near it.
        w = self._lower(loc, torch.where(cosine < 0, x + loc, x - loc))
        square = _dot(w, w)
        opposite = (square == 0) & (cosine < 0)
        axis = torch.zeros_like(w)
        axis[..., 0] = math.pi
        near = (square < _SERIES_BELOW) & (cosine > 0)
        sine = square.masked_fill(near | opposite, 1.0).sqrt()
        angle = torch.where(
            near,
            _even(square.masked_fill(~near, 0.0), (1.0, 1 / 6, 3 / 40, 5 / 112), torch.ones_like),
            torch.atan2(sine, cosine) / sine,
        )
        return torch.where(opposite, axis, angle * w)

    def log_stretch(self, square: Tensor) -> Tensor:
        return log_sin_ratio(square)


class HyperboloidSpace(SpaceForm):
    """The Lorentz model ``<x, x> = -k`` of curvature ``-1/k``; its origin is ``(√k, 0, ..., 0)``."""

    codimension = 1
    is_chart = False
    description = "a point of the upper sheet of the hyperboloid"

    def curvature_radius_square(self, like: Tensor) -> Tensor:
        """``k`` in the dtype and on the device of ``like``."""
        return self.manifold.k.to(like)

    @property
    def support(self) -> constraints.Constraint:
        return Hyperboloid(self.manifold.k.detach())

    def project(self, x: Tensor) -> Tensor:
        u = x[..., 1:]
        return torch.cat([(self.curvature_radius_square(x) + _dot(u, u)).sqrt(), u], -1)

    def exponential(self, loc: Tensor, a: Tensor) -> Tensor:
        k = self.curvature_radius_square(loc)
        square = _dot(a, a) / k
        time, u = loc[..., :1], loc[..., 1:]
        # The first coordinate follows from the others.
        tangent = a + _dot(u, a) * u / (k + k.sqrt() * time)
        spatial = _cosh(square) * u + _sinh_ratio(square) * tangent
        return torch.cat([(k + _dot(spatial, spatial)).sqrt(), spatial], -1)

    def coordinates(self, loc: Tensor, x: Tensor) -> Tensor:
        k = self.curvature_radius_square(loc)
        time, u = loc[..., :1], loc[..., 1:]
        difference = x[..., 1:] - u
        # x_0 - μ_0 without cancellation
        rise = _dot(difference, x[..., 1:] + u) / (x[..., :1] + time)
        w = difference - rise * u / k.sqrt() + _dot(u, difference) * u / (k + k.sqrt() * time)
        return w * _asinh_ratio(_dot(w, w) / k)

    def log_stretch(self, square: Tensor) -> Tensor:
        return log_sinh_ratio(square / self.curvature_radius_square(square))


class BallSpace(SpaceForm):
    """The Poincaré ball ``c ‖x‖² < 1`` of curvature ``-c``, ``G = (2 / (1 - c ‖x‖²))² I``.

    Points that rounding would put on the boundary, or outside, are moved to geoopt's own bound, a relative
    1e-5 (float32: 4e-3) inside: distances from the origin end at 12.2 (float32: 6.2) over ``√c``.
    """

    codimension = 0
    is_chart = True
    description = "a point inside the ball"

    def negative_curvature(self, like: Tensor) -> Tensor:
        """``c`` in the dtype and on the device of ``like``."""
        return -self.manifold.k.to(like)

    @property
    def support(self) -> constraints.Constraint:
        return OpenBall(-self.manifold.k.detach())

    def project(self, x: Tensor) -> Tensor:
        return x

    def confine(self, x: Tensor) -> Tensor:
        return project_to_ball(x, k=-self.negative_curvature(x))  # type: ignore[no-any-return]

    def exponential(self, loc: Tensor, a: Tensor) -> Tensor:
        c = self.negative_curvature(loc)
        y = 0.5 * a * _tanh_ratio(0.25 * c * _dot(a, a))
        # loc ⊕ y
        product, loc_square, y_square = _dot(loc, y), _dot(loc, loc), _dot(y, y)
        top = (1 + 2 * c * product + c * y_square) * loc + (1 - c * loc_square) * y
        return top / (1 + 2 * c * product + c * c * loc_square * y_square)

    def coordinates(self, loc: Tensor, x: Tensor) -> Tensor:
        c = self.negative_curvature(loc)
        difference = x - loc
        square = _dot(difference, difference)
        room, room_x = 1 - c * _dot(loc, loc), 1 - c * _dot(x, x)
        # (-loc) ⊕ x = top / (room room_x + c square), of norm √square / √(the same): nothing cancels.
        top = room * difference - c * square * loc
        ratio = _asinh_ratio(c * square / (room * room_x))  # sinh²(√c dist / 2)
        return 2 * ratio * top * (room * room_x * (room * room_x + c * square)).rsqrt()

    def log_stretch(self, square: Tensor) -> Tensor:
        return log_sinh_ratio(self.negative_curvature(square) * square)

    def log_volume(self, x: Tensor) -> Tensor:
        c = self.negative_curvature(x)
        return x.shape[-1] * (math.log(2.0) - torch.log1p(-c * x.square().sum(-1)))


def space_form(manifold: object) -> SpaceForm | None:
    """The space of constant curvature that ``manifold`` is; None if it is none of the three.

    Raises:
        ValueError: A sphere restricted to a subspace.
    """
    if isinstance(manifold, geoopt.Sphere):
        if manifold.projector is not None:
            raise argument_error(
                "manifold",
                "a whole sphere",
                "a geoopt.Sphere restricted to a subspace",
                "use coordinates of the subspace",
            )
        return SphereSpace(manifold)
    if isinstance(manifold, geoopt.Lorentz):
        return HyperboloidSpace(manifold)
    if isinstance(manifold, geoopt.PoincareBall):
        return BallSpace(manifold)
    return None


def check_on_space(name: str, x: Tensor, space: SpaceForm) -> None:
    """Refuses points off the space."""
    if not bool(space.support.check(x.detach()).all()):
        raise argument_error(
            name,
            f"each row {space.description}",
            f"a tensor of shape {tuple(x.shape)} with rows off {space.support!r}",
            "apply manifold.projx to it",
        )
