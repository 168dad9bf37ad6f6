"""The wrapped normal distribution: a normal in a tangent space, shot along geodesics."""

from __future__ import annotations

import math
import warnings
import weakref
from typing import Any

import geoopt
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from riemvae._checks import argument_error, check_choice, check_finite, check_last_dim
from riemvae._recipe import recipe
from riemvae.distributions.space_forms import (
    SpaceForm,
    SphereSpace,
    check_on_space,
    is_validating,
    plain,
    space_form,
)
from riemvae.geometry.exponential import differentiated, exponential_map_and_jacobian
from riemvae.geometry.logarithm import log_map
from riemvae.geometry.manifold import LatentManifold

MEASURES = ("lebesgue", "riemannian")
FRAMES = ("orthonormal", "coordinates")

# Where a point lies: its coordinates in the frame ``(..., m)``, and the log determinant of the derivative of
# the point in them ``(...)``, with respect to the geometry's own measure. NaN where it is not known.
_Located = tuple[Tensor, Tensor]

_TAIL = 8.5  # standard deviations past which a normal density is below its peak's rounding


class _LastDraw:
    """The last draw and where it lies, so that its density needs no logarithm.

    It is known again by identity, as long as nobody has edited it in place. A copy of a distribution starts
    without.
    """

    def __init__(self) -> None:
        self._reference: weakref.ref[Tensor] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _LastDraw, ()

    def keep(self, value: Tensor, located: _Located) -> None:
        """Remembers where ``value`` lies."""
        self._reference, self._located = weakref.ref(value), located
        self._copy, self._connected = value.detach().clone(), value.requires_grad

    def find(self, value: Tensor, differentiated: bool) -> _Located | None:
        """Where ``value`` lies, if it is the last draw.

        Args:
            value: Points.
            differentiated: Whether a gradient may be asked of the density, at ``value`` or of a parameter. A
                draw that was made without a graph cannot give it.
        """
        if self._reference is None or self._reference() is not value:
            return None
        if differentiated and torch.is_grad_enabled() and not self._connected:
            return None
        return self._located if torch.equal(self._copy, value.detach()) else None


class _ClosedForm:
    """A space of constant curvature: densities are with respect to its volume."""

    measure = "riemannian"

    def __init__(self, space: SpaceForm) -> None:
        self.space = space

    def shoot(self, loc: Tensor, a: Tensor) -> tuple[Tensor, _Located | None]:
        """``Exp_loc(E a)`` and its place; None for the place if rounding moved a point inside the ball."""
        exact = self.space.exponential(self.space.project(loc), a)
        value = self.space.confine(exact)
        if value is not exact and not torch.equal(value, exact):
            return value, None
        return value, self._placed(a)

    def locate(self, loc: Tensor, value: Tensor) -> _Located:
        """The place of any point."""
        return self._placed(self.space.coordinates(self.space.project(loc), self.space.project(value)))

    def _placed(self, a: Tensor) -> _Located:
        if isinstance(self.space, SphereSpace):
            a = _within_half_turn(a)
        return a, (a.shape[-1] - 1) * self.space.log_stretch(a.square().sum(-1))

    def log_surplus(self, a: Tensor, scale_tril: Tensor) -> Tensor:
        """Log of the density over the term of the shortest geodesic alone."""
        if isinstance(self.space, SphereSpace):
            return _log_surplus_around(a, scale_tril)
        return a.new_zeros(())

    def log_volume(self, value: Tensor) -> Tensor:
        """``½ log det G``."""
        return self.space.log_volume(value)

    def is_differentiated(self, value: Tensor, loc: Tensor, scale_tril: Tensor) -> bool:
        """Whether a gradient may be asked of a density."""
        tensors = (value, loc, scale_tril, *self.space.manifold.parameters())
        return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _within_half_turn(a: Tensor) -> Tensor:
    """The velocity, of length at most ``π``, that leads along the same great circle to the same point."""
    square = (a * a).sum(-1, keepdim=True)
    far = square > math.pi**2
    length = square.masked_fill(~far, 1.0).sqrt()
    turns = (length.detach() / (2 * math.pi)).round()
    return torch.where(far, a * (1 - 2 * math.pi * turns / length), a)


def _log_surplus_around(a: Tensor, scale_tril: Tensor) -> Tensor:
    """``log Σ_k t_k / t_0`` over the lengths ``‖a‖ + 2πk`` that lead to the same point of a sphere.

    Both directions are among them. A length ``ρ`` contributes ``t = exp(-½ ρ² q) (ρ / |sin ρ|)^{m-1}``, with
    ``q = ûᵀ Σ⁻¹ û``. Lengths past ``(√(m - 1) + 8.5)/√q`` are below the rounding of the largest term, which
    lies before ``√((m - 1)/q)``: the log of a term has a slope of at least ``-q`` times what is beyond.
    """
    m = a.shape[-1]
    square = a.square().sum(-1)
    known = square > 0
    root = square.masked_fill(~known, 1.0).sqrt()
    axis = torch.zeros_like(a)
    axis[..., 0] = 1.0
    direction = torch.where(known.unsqueeze(-1), a / root.unsqueeze(-1), axis)
    q = _quadratic(direction, scale_tril)
    length = root.masked_fill(~known, 0.0).unsqueeze(-1)
    if q.numel() == 0:
        return q
    reach = (math.sqrt(m - 1) + _TAIL) / math.sqrt(float(q.detach().nan_to_num(1.0).min()))
    turns = math.ceil(reach / (2 * math.pi)) + 1
    k = torch.arange(-turns, turns + 1, dtype=a.dtype, device=a.device)
    other = (length + 2 * math.pi * k).abs()
    tiny = 16 * torch.finfo(a.dtype).eps
    log_ratio = other.clamp(min=tiny).log() - length.clamp(min=tiny).log()
    terms = -0.5 * q.unsqueeze(-1) * (other.square() - length.square()) + (m - 1) * log_ratio
    if m > 1:
        terms = terms.masked_fill((length < tiny) & (k != 0), -math.inf)
    return torch.logsumexp(terms, -1)


class _Learned:
    """A metric on coordinates: densities are with respect to Lebesgue measure."""

    measure = "lebesgue"

    def __init__(self, manifold: LatentManifold, frame: str) -> None:
        self.metric, self.num_steps, self.frame = manifold.metric, manifold.num_steps, frame

    def _frame(self, loc: Tensor) -> tuple[Tensor, Tensor]:
        """``E`` at ``loc`` and its log determinant."""
        if self.frame == "coordinates":
            eye = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
            return eye.expand(*loc.shape, loc.shape[-1]), loc.new_zeros(loc.shape[:-1])
        frame, info = torch.linalg.cholesky_ex(self.metric.inverse(loc))
        frame = frame.masked_fill((info > 0)[..., None, None], math.nan)
        return frame, frame.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _end(self, loc: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``Exp_loc(v)`` and the log determinant of its derivative; NaN past a conjugate point."""
        end, jacobian = exponential_map_and_jacobian(self.metric, loc, v, self.num_steps)
        sign, log_det = torch.linalg.slogdet(jacobian)
        return end, log_det.masked_fill(~(sign > 0), math.nan)

    def shoot(self, loc: Tensor, a: Tensor) -> tuple[Tensor, _Located]:
        """``Exp_loc(E a)`` and its place."""
        loc = loc.expand(a.shape)
        frame, log_frame = self._frame(loc)
        end, log_det = self._end(loc, (frame @ a.unsqueeze(-1)).squeeze(-1))
        return end, (a, log_det + log_frame)

    def locate(self, loc: Tensor, value: Tensor) -> _Located:
        """The place of any point, by the logarithm."""
        loc, value = torch.broadcast_tensors(loc, value)
        with warnings.catch_warnings():  # the density warns of them too
            warnings.filterwarnings("ignore", message="log_map: ", category=RuntimeWarning)
            v = log_map(self.metric, loc, value, self.num_steps)
        lost = torch.isnan(v).any(-1)
        v = v.masked_fill(lost.unsqueeze(-1), 0.0)  # so that masking such a point leaves no NaN in gradients
        frame, log_frame = self._frame(loc)
        a = torch.linalg.solve_triangular(frame, v.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = self._end(loc, v)[1] + log_frame
        return a, log_det.masked_fill(lost, math.nan)

    def log_surplus(self, a: Tensor, scale_tril: Tensor) -> Tensor:
        """Zero: other geodesics are not looked for."""
        return a.new_zeros(())

    def log_volume(self, value: Tensor) -> Tensor:
        """``½ log det G``."""
        return self.metric.log_volume(value)

    def is_differentiated(self, value: Tensor, loc: Tensor, scale_tril: Tensor) -> bool:
        """Whether a gradient may be asked of a density."""
        return scale_tril.requires_grad or differentiated(self.metric, value, loc)


def _quadratic(a: Tensor, scale_tril: Tensor) -> Tensor:
    """``aᵀ Σ⁻¹ a`` for ``Σ = L Lᵀ``."""
    shape = torch.broadcast_shapes(a.shape[:-1], scale_tril.shape[:-2])
    factor = scale_tril.expand(*shape, *scale_tril.shape[-2:])
    a = a.expand(*shape, a.shape[-1])
    return torch.linalg.solve_triangular(factor, a.unsqueeze(-1), upper=False).square().sum((-2, -1))


@recipe
class WrappedNormal(TorchDistribution):
    r"""The wrapped normal ``x = Exp_μ(E a)``, ``a ~ N(0, Σ)``, ``E`` a frame of the tangent space at ``μ``.

    .. math:: \log p(x) = \log N(a; 0, \Sigma) - \log |\det \partial x / \partial a|

    =================== ============== ============ ============================================= ============
    manifold            points         ``m``        ``log|det|`` with respect to the Riemannian   measures
                                                    volume, ``r = ‖a‖``
    =================== ============== ============ ============================================= ============
    geoopt.Sphere       ``(..., m+1)`` any          ``(m-1) log(sin r / r)``                      riemannian
    geoopt.Lorentz      ``(..., m+1)`` any          ``(m-1) log(sinh(r/√k) / (r/√k))``            riemannian
    geoopt.PoincareBall ``(..., m)``   any          ``(m-1) log(sinh(√c r) / (√c r))``            both
    LatentManifold      ``(..., m)``   any          that of the Jacobian along the geodesic       both
    =================== ============== ============ ============================================= ============

    ``measure`` says what the density is taken with. In a chart (the last two rows) ``"lebesgue"`` is the
    default, a density over coordinates, which is the Riemannian one plus ``½ log det G(x)``. On the embedded
    sphere and hyperboloid only ``"riemannian"``, the area, exists.

    **Frames.** On geoopt's manifolds ``E`` is the orthonormal frame of the origin (on the sphere and the
    hyperboloid the first axis, in the ball the centre) transported along the geodesic to ``μ``. Under a
    learned metric it is ``chol(G⁻¹(μ))``, orthonormal too, so that ``Σ`` is in geodesic lengths;
    ``frame="coordinates"`` takes ``E = I`` as the thesis does, with ``Σ`` the covariance of a velocity in
    coordinates.

    **More than one geodesic.** On the sphere the density is the sum over all geodesics from ``μ`` that reach
    ``x``, forth and back and around: it integrates to one whatever ``Σ``. For ``m >= 2`` this sum is infinite
    at ``μ`` and its antipode, where spheres of velocities end (integrable; at ``μ`` itself the term of the
    shortest geodesic alone is given). Hyperbolic spaces have one geodesic. Under a learned metric the density
    has the one term of the geodesic found, which is right as long as no other of likely length ends there:
    keep ``Σ`` within the injectivity radius. A point past a conjugate point (``det <= 0``), or without a
    converged logarithm, gets a density of NaN and a warning.

    **Draws** carry their density: :meth:`log_prob` of the very tensor that was drawn last needs no logarithm.
    Other points go through the manifold's logarithm. Everything is differentiable in ``loc``, ``scale_tril``,
    the metric's parameters and a trained curvature. For a gradient with respect to the *point* of a draw that
    depends on parameters, pass a clone of it.

    Args:
        manifold: ``geoopt.Sphere``, ``geoopt.Lorentz`` or ``geoopt.PoincareBall`` of any curvature, or a
            :class:`~riemvae.geometry.LatentManifold` (its ``num_steps`` are those of each geodesic).
        loc: ``μ``, points of the manifold ``(..., n)``.
        scale_tril: The lower Cholesky factor of ``Σ``, ``(..., m, m)``, where ``m`` is ``n``, or ``n - 1`` on
            the sphere and the hyperboloid.
        measure: ``"riemannian"``, ``"lebesgue"`` or None, see above.
        frame: ``"orthonormal"`` or, under a learned metric, ``"coordinates"``.
        validate_args: Whether to check arguments and values.

    Raises:
        ValueError: A manifold of another kind, points off it, factors that are not lower triangular with a
            positive diagonal or of another size, or a measure or frame that the manifold does not have.

    Source: thesis, section 2.1; Mallasto and Feragen (2018); Nagano et al. (2019), eq. 11, for the
    hyperboloid; Mathieu et al. (2019), appendix B, for the ball.

    Example:
        >>> q = WrappedNormal(geoopt.PoincareBall(), torch.zeros(5, 2), 0.5 * torch.eye(2))
        >>> x = q.rsample()
        >>> x.shape, q.log_prob(x).shape
        (torch.Size([5, 2]), torch.Size([5]))
        >>> from riemvae.geometry import EuclideanMetric
        >>> q = WrappedNormal(LatentManifold(EuclideanMetric(2)), torch.zeros(2), torch.eye(2))
        >>> q.log_prob(torch.zeros(2)).round(decimals=4)  # a plain normal
        tensor(-1.8379)
    """

    arg_constraints = {"loc": constraints.real_vector, "scale_tril": constraints.lower_cholesky}
    has_rsample = True

    def __init__(
        self,
        manifold: geoopt.Manifold,
        loc: Tensor,
        scale_tril: Tensor,
        measure: str | None = None,
        frame: str = "orthonormal",
        validate_args: bool | None = None,
    ) -> None:
        self.manifold = manifold
        self.frame = check_choice("frame", frame, FRAMES)
        space = space_form(manifold)
        if space is not None:
            if frame == "coordinates":
                raise argument_error(
                    "frame",
                    f"'orthonormal' on a {type(manifold).__name__}",
                    frame,
                    "only a LatentManifold has the frame of its coordinates",
                )
            self._geometry: _ClosedForm | _Learned = _ClosedForm(space)
        elif isinstance(manifold, LatentManifold):
            self._geometry = _Learned(manifold, frame)
        else:
            raise argument_error(
                "manifold",
                "a geoopt.Sphere, geoopt.Lorentz, geoopt.PoincareBall or riemvae.geometry.LatentManifold",
                manifold,
                "wrap a metric as LatentManifold(metric)",
            )
        self.measure = self._checked_measure(measure)
        loc, scale_tril = plain(torch.as_tensor(loc)), plain(torch.as_tensor(scale_tril))
        size = self._checked_size(loc, scale_tril)
        try:
            batch_shape = torch.broadcast_shapes(loc.shape[:-1], scale_tril.shape[:-2])
        except RuntimeError:
            raise argument_error(
                "scale_tril",
                f"a tensor that broadcasts against the batch shape {tuple(loc.shape[:-1])} of loc",
                scale_tril,
            ) from None
        dtype = torch.promote_types(loc.dtype, scale_tril.dtype)
        self.loc = loc.to(dtype).expand(*batch_shape, loc.shape[-1])
        self.scale_tril = scale_tril.to(dtype).expand(*batch_shape, size, size)
        if is_validating(validate_args):
            check_finite("loc", self.loc)
            if space is not None:
                check_on_space("loc", self.loc, space)
            if not bool(constraints.lower_cholesky.check(scale_tril.detach()).all()):
                raise argument_error(
                    "scale_tril",
                    "lower-triangular matrices with a positive diagonal",
                    scale_tril,
                    "pass torch.linalg.cholesky(covariance) of a positive-definite covariance",
                )
        self._last = _LastDraw()
        super().__init__(batch_shape, self.loc.shape[-1:], validate_args=validate_args)

    def _checked_measure(self, measure: str | None) -> str:
        is_chart = isinstance(self._geometry, _Learned) or self._geometry.space.is_chart
        if measure is None:
            return "lebesgue" if is_chart else "riemannian"
        check_choice("measure", measure, MEASURES)
        if measure == "lebesgue" and not is_chart:
            raise argument_error(
                "measure",
                f"'riemannian' on the embedded {type(self.manifold).__name__}",
                measure,
                "points of an embedded surface have no Lebesgue density",
            )
        return measure

    def _checked_size(self, loc: Tensor, scale_tril: Tensor) -> int:
        """The dimension ``m`` of the tangent spaces."""
        if loc.dim() == 0 or not loc.is_floating_point():
            raise argument_error("loc", "a floating-point tensor of shape (..., n)", loc)
        size = loc.shape[-1]
        if isinstance(self._geometry, _Learned):
            check_last_dim("loc", loc, self._geometry.metric.latent_dim)
        else:
            size -= self._geometry.space.codimension
        if size < 1:
            raise argument_error("loc", "points (..., n) with n of at least 2", loc)
        if scale_tril.dim() < 2 or scale_tril.shape[-2:] != (size, size):
            raise argument_error(
                "scale_tril",
                f"matrices (..., {size}, {size}), the dimension of the tangent space at points of "
                f"{loc.shape[-1]} coordinates",
                scale_tril,
            )
        return size

    @property
    def support(self) -> constraints.Constraint:
        """The points of the manifold; of a learned metric, all of ``ℝᵈ``."""
        if isinstance(self._geometry, _Learned):
            return constraints.real_vector
        return self._geometry.space.support

    def expand(self, batch_shape: Any, _instance: object = None) -> WrappedNormal:
        """The same distributions repeated to ``batch_shape``."""
        new = self._get_checked_instance(WrappedNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.manifold, new._geometry = self.manifold, self._geometry
        new.measure, new.frame = self.measure, self.frame
        new.loc = self.loc.expand(*batch_shape, *self.event_shape)
        new.scale_tril = self.scale_tril.expand(*batch_shape, *self.scale_tril.shape[-2:])
        new._last = _LastDraw()
        super(WrappedNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def covariance_matrix(self) -> Tensor:
        """``Σ (..., m, m)``, in the frame."""
        return self.scale_tril @ self.scale_tril.mT

    # -- draws ------------------------------------------------------------------------------------------

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``sample_shape + batch_shape + (n,)``, differentiable in all parameters."""
        shape = self._extended_shape(sample_shape)
        size = self.scale_tril.shape[-1]
        noise = torch.randn(*shape[:-1], size, dtype=self.loc.dtype, device=self.loc.device)
        a = (self.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
        value, located = self._geometry.shoot(self.loc, a)
        if located is not None:
            self._last.keep(value, located)
        return value

    # -- density ----------------------------------------------------------------------------------------

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density with respect to :attr:`measure`.

        Args:
            value: Points ``(..., n)`` of the manifold.

        Returns:
            Log densities ``(...)``. Under a learned metric NaN, with a warning that counts them, where the
            logarithm did not converge or a point lies past a conjugate point.

        Raises:
            ValueError: A point off the manifold, where validation is on.
        """
        if self._validate_args:
            self._validate_sample(value)
        value = plain(value)
        geometry = self._geometry
        located = self._last.find(value, geometry.is_differentiated(value, self.loc, self.scale_tril))
        a, log_det = geometry.locate(self.loc, value) if located is None else located
        log_density = (
            -0.5 * _quadratic(a, self.scale_tril) - log_det + geometry.log_surplus(a, self.scale_tril)
        )
        log_diagonal = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_density = log_density - log_diagonal - 0.5 * a.shape[-1] * math.log(2 * math.pi)
        if isinstance(geometry, _Learned):
            _warn_of_unknown(log_density)
        if self.measure == geometry.measure:
            return log_density
        log_volume = geometry.log_volume(value)
        return log_density + log_volume if self.measure == "lebesgue" else log_density - log_volume


def _warn_of_unknown(log_density: Tensor) -> None:
    bad = int(torch.isnan(log_density.detach()).sum())
    if bad:
        warnings.warn(
            f"WrappedNormal.log_prob: {bad} of {log_density.numel()} densities are not known and are NaN: "
            "no geodesic was found, or one past a conjugate point; a smaller scale_tril stays nearer to loc",
            RuntimeWarning,
            stacklevel=3,
        )
