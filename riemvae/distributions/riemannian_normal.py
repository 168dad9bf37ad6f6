"""The Riemannian normal distribution of a hyperbolic space: a Gaussian in geodesic distance."""

from __future__ import annotations

import math
from typing import Any

import geoopt
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from riemvae._checks import argument_error, check_choice
from riemvae._recipe import recipe
from riemvae.distributions.radial import (
    implicit_derivatives,
    legendre_rule,
    rejection_sample,
    with_derivatives,
)
from riemvae.distributions.space_forms import (
    BallSpace,
    as_parameter,
    check_on_space,
    is_validating,
    log_sinh_ratio,
    plain,
)
from riemvae.distributions.spherical import log_sphere_area

_WINDOW = 9.0  # standard deviations about the mode that hold all of the mass, to double precision
_NODES = 128
_NEWTON_STEPS = 12
MEASURES = ("lebesgue", "riemannian")


@recipe
class RiemannianNormal(TorchDistribution):
    r"""The Riemannian normal on the Poincaré ball of any curvature ``-c``: points ``(..., d)``.

    .. math:: p(x) = \frac{1}{C(\sigma)} \exp\left(-\frac{\mathrm{dist}(x, \mu)^2}{2\sigma^2}\right), \quad
        C(\sigma) = \frac{2\pi^{d/2}}{\Gamma(d/2)} \int_0^\infty e^{-r^2/2\sigma^2}
        \left(\frac{\sinh \sqrt c r}{\sqrt c}\right)^{d-1} dr

    with respect to the Riemannian volume; ``measure="lebesgue"`` (the default, as for any chart) adds
    ``½ log det G(x)``, so that it is a density over coordinates.

    The integral has a closed form, an alternating binomial sum of error functions, whose terms cancel: at
    ``d = 20`` and ``σ = 0.3`` to nothing in double precision. It is computed by Gauss-Legendre quadrature
    about its mode instead, in log space. Its logarithm is concave, with a curvature between ``1/σ²`` and
    ``2/σ²``, so that 128 nodes reach double precision for every ``d``, ``σ`` and ``c``.

    Draws are exact: a radius by rejection from a normal at the mode (accepted 7 times in 10 or more; for
    ``d = 1`` 5 times), a uniform direction, moved to ``μ`` by a gyrotranslation. ``rsample`` is
    differentiable in ``μ``, ``σ`` and a trained curvature; the radius by the implicit derivative of its
    distribution function, a first derivative.

    On a flat space this is ``N(μ, σ² G⁻¹)``, the thesis's posterior under a locally constant metric; its
    eq. 3.5 writes ``σ`` for what is ``σ²`` here.

    Args:
        manifold: A ``geoopt.PoincareBall``. Double precision is recommended far from the centre.
        loc: The Fréchet mean ``μ (..., d)``, inside the ball.
        scale: ``σ > 0 (...)``, in geodesic distance.
        measure: ``"lebesgue"``, ``"riemannian"`` or None for the first.
        validate_args: Whether to check arguments and values.

    Raises:
        ValueError: Another manifold, a point outside the ball, a scale that is not positive, or shapes that
            do not broadcast.

    Source: Pennec (2006); Said, Bombrun and Berthoumieu (2014); Mathieu et al. (2019), appendix B; thesis,
    eq. 3.5.

    Example:
        >>> ball = geoopt.PoincareBall()
        >>> q = RiemannianNormal(ball, torch.zeros(5, 2), torch.tensor(0.5))
        >>> q.rsample().shape
        torch.Size([5, 2])
        >>> q.log_prob(torch.zeros(5, 2))[0].round(decimals=4)
        tensor(0.8507)
    """

    arg_constraints = {"loc": constraints.real_vector, "scale": constraints.positive}
    has_rsample = True

    def __init__(
        self,
        manifold: geoopt.PoincareBall,
        loc: Tensor,
        scale: float | Tensor,
        measure: str | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(manifold, geoopt.PoincareBall):
            raise argument_error("manifold", "a geoopt.PoincareBall", manifold)
        loc = plain(torch.as_tensor(loc))
        if loc.dim() == 0 or not loc.is_floating_point():
            raise argument_error("loc", "a floating-point tensor of shape (..., d)", loc)
        scale = as_parameter(scale, loc)
        try:
            batch_shape = torch.broadcast_shapes(loc.shape[:-1], scale.shape)
        except RuntimeError:
            raise argument_error(
                "scale",
                f"a tensor that broadcasts against the batch shape {tuple(loc.shape[:-1])} of loc",
                scale,
                "drop its last dimension of size 1, if it has one",
            ) from None
        dtype = torch.promote_types(loc.dtype, scale.dtype)
        self.manifold, self._space = manifold, BallSpace(manifold)
        self.measure = "lebesgue" if measure is None else check_choice("measure", measure, MEASURES)
        self.loc = loc.to(dtype).expand(*batch_shape, loc.shape[-1])
        self.scale = scale.to(device=loc.device, dtype=dtype).expand(batch_shape)
        if is_validating(validate_args):
            check_on_space("loc", self.loc, self._space)
            if not bool(((self.scale > 0) & torch.isfinite(self.scale)).all()):
                low, high = (float(x) for x in scale.detach().aminmax())
                raise argument_error(
                    "scale", "finite positive numbers", f"values from {low:.4g} to {high:.4g}"
                )
        super().__init__(batch_shape, self.loc.shape[-1:], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The open ball."""
        return self._space.support

    def expand(self, batch_shape: Any, _instance: object = None) -> RiemannianNormal:
        """The same distributions repeated to ``batch_shape``."""
        new = self._get_checked_instance(RiemannianNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.manifold, new._space, new.measure = self.manifold, self._space, self.measure
        new.loc = self.loc.expand(*batch_shape, *self.event_shape)
        new.scale = self.scale.expand(batch_shape)
        super(RiemannianNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mode(self) -> Tensor:
        """``μ``, the mode with respect to the Riemannian volume."""
        return self.loc

    @property
    def log_normalizer(self) -> Tensor:
        """``log C(σ)``, shape ``(...)``."""
        scale = self.scale.double()
        value = _log_radial_integral(scale, self._space.negative_curvature(scale), self.event_shape[0])
        return (value + log_sphere_area(self.event_shape[0])).to(self.scale.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density with respect to :attr:`measure`.

        Args:
            value: Points ``(..., d)`` inside the ball.

        Returns:
            Log densities ``(...)``.

        Raises:
            ValueError: A point outside the ball, where validation is on.
        """
        if self._validate_args:
            self._validate_sample(value)
        value = plain(value)
        a = self._space.coordinates(self.loc, value)
        log_density = -0.5 * (a / self.scale.unsqueeze(-1)).square().sum(-1) - self.log_normalizer
        return log_density + self._space.log_volume(value) if self.measure == "lebesgue" else log_density

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Exact draws ``sample_shape + batch_shape + (d,)``, differentiable in all parameters."""
        shape = self._extended_shape(sample_shape)
        scale = self.scale.double().expand(shape[:-1]).reshape(-1)
        curvature = self._space.negative_curvature(scale)
        radius = _radii(scale, curvature, shape[-1]).reshape(shape[:-1]).unsqueeze(-1)
        noise = torch.randn(shape, dtype=scale.dtype, device=scale.device)
        direction = noise / torch.linalg.vector_norm(noise, dim=-1, keepdim=True)
        return self._space.confine(self._space.exponential(self.loc, (radius * direction).to(self.loc.dtype)))


# -- the radius, whose log density h(r) = -r²/2σ² + (d - 1) log(sinh(√c r)/√c) is concave ------------------


def _log_density(r: Tensor, scale: Tensor, curvature: Tensor, dim: int) -> Tensor:
    value = -0.5 * (r / scale).square()
    if dim == 1:
        return value
    tiny = torch.finfo(r.dtype).tiny
    return value + (dim - 1) * (r.clamp(min=tiny).log() + log_sinh_ratio(curvature * r * r))


def _mode(scale: Tensor, curvature: Tensor, dim: int) -> Tensor:
    """The root of ``h'``, which is concave: Newton's method from a bound below it never oversteps."""
    root = curvature.sqrt()
    pull = (dim - 1) * scale.square()
    r = torch.maximum(pull * root, pull.sqrt())
    for _ in range(_NEWTON_STEPS if dim > 1 else 0):
        t = root * r
        value = r - pull * root / t.tanh()
        slope = 1 + pull * (root / t.sinh()).square()
        r = r - value / slope
    return r


def _log_radial_integral(scale: Tensor, curvature: Tensor, dim: int) -> Tensor:
    """``log ∫ e^h dr``; the mode and the interval are fixed, which takes nothing from its derivatives."""
    points, weights = legendre_rule(scale, _NODES)
    with torch.no_grad():
        mode, width = _mode(scale, curvature, dim), _WINDOW * scale
        low = (mode - width).clamp(min=0).unsqueeze(-1)
        length = (mode + width).unsqueeze(-1) - low
        r = low + length * points
    h = _log_density(r, scale.unsqueeze(-1), curvature, dim)
    return torch.logsumexp(h + (length * weights).log(), -1)


def _radii(scale: Tensor, curvature: Tensor, dim: int) -> Tensor:
    """Radii ``(n,)`` for scales ``(n,)``, differentiable in them and in the curvature."""
    with torch.no_grad():
        s, c = scale.detach(), curvature.detach()
        mode = _mode(s, c, dim)
        log_top = _log_density(mode, s, c, dim)

        def propose(rows: Tensor) -> tuple[Tensor, Tensor]:
            # h'' <= -1/σ²: the normal at the mode lies above
            noise = torch.randn_like(mode[rows])
            r = mode[rows] + s[rows] * noise
            log_ratio = _log_density(r.abs(), s[rows], c, dim) - log_top[rows] + 0.5 * noise.square()
            return r, log_ratio.masked_fill(r < 0, -math.inf)

        radius = rejection_sample(s, propose)
    if not (torch.is_grad_enabled() and (scale.requires_grad or curvature.requires_grad)):
        return radius
    scale, curvature = torch.broadcast_tensors(scale, curvature)
    by_scale, by_curvature = _radius_derivatives(
        radius, mode, scale.detach(), curvature.detach(), dim, curvature.requires_grad
    )
    return with_derivatives(radius, (scale, by_scale), (curvature, by_curvature))


def _radius_derivatives(
    radius: Tensor, mode: Tensor, scale: Tensor, curvature: Tensor, dim: int, trained_curvature: bool
) -> tuple[Tensor, Tensor]:
    """``∂r/∂σ`` and ``∂r/∂c`` at a fixed probability; the second is 0 where it is not asked for."""

    def plain_scores(r: Tensor, scale: Tensor, curvature: Tensor) -> list[Tensor]:
        scores = [r.square() / scale**3]
        if trained_curvature:
            # d/dc log(sinh(√c r)/√c r) = (√c r coth(√c r) - 1) / 2c
            with torch.enable_grad():
                c = curvature.expand_as(r).clone().requires_grad_()
                (slope,) = torch.autograd.grad(log_sinh_ratio(c * r * r).sum(), c)
            scores.append((dim - 1) * slope)
        return scores

    with torch.no_grad():
        points, weights = legendre_rule(scale, _NODES)
        low, high = (mode - _WINDOW * scale).clamp(min=0), mode + _WINDOW * scale
        r = low[:, None] + (high - low)[:, None] * points
        h = _log_density(r, scale[:, None], curvature[:, None], dim)
        share = torch.softmax(h + weights.log(), -1)
        means = [
            (share * score).sum(-1, keepdim=True)
            for score in plain_scores(r, scale[:, None], curvature[:, None])
        ]

        def log_density(r: Tensor, rows: slice) -> Tensor:
            return _log_density(r, scale[rows, None], curvature[rows, None], dim)

        def scores(r: Tensor, rows: slice) -> list[Tensor]:
            plain = plain_scores(r, scale[rows, None], curvature[rows, None])
            return [score - mean[rows] for score, mean in zip(plain, means)]

        found = implicit_derivatives(radius, low, high, mode, log_density, scores)
    return found[0], found[1] if trained_curvature else torch.zeros_like(radius)
