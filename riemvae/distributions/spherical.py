"""Distributions on the unit sphere: von Mises-Fisher and uniform, with their divergences."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Beta, constraints, register_kl

from riemvae._checks import argument_error, check_count
from riemvae._recipe import recipe
from riemvae.distributions.bessel import bessel_ratio, log_bessel
from riemvae.distributions.radial import implicit_derivatives, rejection_sample, with_derivatives
from riemvae.distributions.space_forms import UnitSphere, as_parameter, is_validating, plain

_WINDOW = 14.0  # widths of the angle's density that hold all of its mass, to double precision


def log_sphere_area(dim: int) -> float:
    """Log of the area ``2 π^{d/2} / Γ(d/2)`` of the unit sphere in ``ℝᵈ``.

    Example:
        >>> round(log_sphere_area(3), 4)  # log 4π
        2.531
    """
    return math.log(2.0) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)


@recipe
class VonMisesFisher(TorchDistribution):
    r"""The von Mises-Fisher distribution on the unit sphere of ``ℝᵈ``: points ``(..., d)``, ``d >= 2``.

    .. math:: p(x) = \frac{\kappa^{d/2-1}}{(2\pi)^{d/2} I_{d/2-1}(\kappa)} \, e^{\kappa \mu^\top x}

    with respect to the sphere's area (the Riemannian measure; there is no Lebesgue density). Written as
    ``-½ κ ‖x - μ‖²`` plus a scaled constant it loses nothing at large ``κ``, and the Bessel function is
    computed in log space for any ``d`` and ``κ``.

    Draws are exact: Wood's rejection in double precision for the cosine ``w = μᵀx``, a uniform direction
    orthogonal to ``μ``. ``rsample`` is differentiable: the rotation by a projection, and the angle by the
    implicit derivative of its distribution function, an integral that is taken to double precision. The
    derivative through the accepted proposal alone, which other implementations keep, lacks a term; this one
    lacks none. Derivatives of draws are first ones.

    Args:
        loc: The mean direction ``μ (..., d)``, of norm one.
        concentration: ``κ >= 0``, of the batch shape ``(...)`` (no last dimension of one); 0 is uniform.
        validate_args: Whether to check arguments and values.

    Raises:
        ValueError: ``loc`` off the sphere or of fewer than two coordinates, ``concentration`` negative or
            not finite, or shapes that do not broadcast.

    Source: Wood (1994), Simulation of the von Mises Fisher distribution; Figurnov, Mohamed and Mnih (2018),
    eq. 5; its use in a VAE: Davidson et al. (2018).

    Example:
        >>> q = VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(10.0))
        >>> q.rsample((5,)).shape
        torch.Size([5, 3])
        >>> q.log_prob(torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])).round(decimals=4)
        tensor([ 0.4647, -9.5353])
        >>> q.mean.round(decimals=4)
        tensor([0.0000, 0.0000, 0.9000])
    """

    arg_constraints = {"loc": UnitSphere(), "concentration": constraints.nonnegative}
    support = UnitSphere()
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: float | Tensor, validate_args: bool | None = None) -> None:
        loc = plain(torch.as_tensor(loc))
        if loc.dim() == 0 or loc.shape[-1] < 2 or not loc.is_floating_point():
            raise argument_error("loc", "a floating-point tensor of shape (..., d) with d of at least 2", loc)
        concentration = as_parameter(concentration, loc)
        try:
            batch_shape = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
        except RuntimeError:
            raise argument_error(
                "concentration",
                f"a tensor that broadcasts against the batch shape {tuple(loc.shape[:-1])} of loc",
                concentration,
                "drop its last dimension of size 1, if it has one",
            ) from None
        dtype = torch.promote_types(loc.dtype, concentration.dtype)
        self.loc = loc.to(dtype).expand(*batch_shape, loc.shape[-1])
        self.concentration = concentration.to(device=loc.device, dtype=dtype).expand(batch_shape)
        if is_validating(validate_args):
            if not bool(UnitSphere().check(self.loc).all()):
                norms = loc.detach().norm(dim=-1)
                raise argument_error(
                    "loc",
                    "rows of norm one",
                    f"norms from {float(norms.min()):.4g} to {float(norms.max()):.4g}",
                    "divide each by its norm",
                )
            if not bool(((self.concentration >= 0) & torch.isfinite(self.concentration)).all()):
                low, high = (float(x) for x in concentration.detach().aminmax())
                raise argument_error(
                    "concentration",
                    "finite numbers of at least 0",
                    f"values from {low:.4g} to {high:.4g}",
                )
        super().__init__(batch_shape, self.loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> VonMisesFisher:
        """The same distributions repeated to ``batch_shape``."""
        new = self._get_checked_instance(VonMisesFisher, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(*batch_shape, *self.event_shape)
        new.concentration = self.concentration.expand(batch_shape)
        super(VonMisesFisher, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    # -- moments ----------------------------------------------------------------------------------------

    @property
    def _dim(self) -> int:
        return self.event_shape[0]

    @property
    def _direction(self) -> Tensor:
        """``loc`` without its rounding; gradients become tangent."""
        return self.loc / torch.linalg.vector_norm(self.loc, dim=-1, keepdim=True)

    @property
    def _ratio(self) -> Tensor:
        """``A_d(κ)/κ`` in double precision."""
        return bessel_ratio(0.5 * self._dim - 1, self.concentration.double())

    @property
    def mean_resultant_length(self) -> Tensor:
        """``A_d(κ) = I_{d/2}(κ) / I_{d/2-1}(κ) = E[μᵀx]``, shape ``(...)``."""
        return (self.concentration.double() * self._ratio).to(self.concentration.dtype)

    @property
    def mean(self) -> Tensor:
        """``E[x] = A_d(κ) μ``, inside the sphere, ``(..., d)``."""
        return self.mean_resultant_length.unsqueeze(-1) * self._direction

    @property
    def mode(self) -> Tensor:
        """``μ``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """The variance of each coordinate, ``(..., d)``; they add up to ``1 - A_d(κ)²``."""
        ratio = self._ratio.unsqueeze(-1)
        square = self._direction.double().square()
        # E[w²] = 1 - (d - 1) A/κ, and the rest of a point is spread evenly across μ.
        along = 1 - self._dim * ratio - (self.concentration.double().unsqueeze(-1) * ratio).square()
        return (ratio + square * along).to(self.loc.dtype)

    def entropy(self) -> Tensor:
        """``-E[log p(x)]`` in nats, shape ``(...)``."""
        kappa = self.concentration.double()
        return (kappa * (1 - kappa * self._ratio) - self._scaled_constant()).to(self.concentration.dtype)

    def _scaled_constant(self) -> Tensor:
        """The log density at the mode, in double precision: the normalising constant times ``e^κ``."""
        value = log_bessel(0.5 * self._dim - 1, self.concentration.double())
        return -0.5 * self._dim * math.log(2 * math.pi) - value

    # -- density and draws ------------------------------------------------------------------------------

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density with respect to the sphere's area.

        Args:
            value: Points ``(..., d)`` of norm one.

        Returns:
            Log densities ``(...)``.

        Raises:
            ValueError: A point off the sphere, where validation is on.
        """
        if self._validate_args:
            self._validate_sample(value)
        value = plain(value)
        # For vectors of norm one; the projection makes the gradient tangent.
        value = value / torch.linalg.vector_norm(value, dim=-1, keepdim=True)
        square = (value - self._direction).square().sum(-1)
        return self._scaled_constant().to(self.loc.dtype) - 0.5 * self.concentration * square

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Exact draws ``sample_shape + batch_shape + (d,)``, differentiable in both parameters."""
        shape = self._extended_shape(sample_shape)
        kappa = self.concentration.double().expand(shape[:-1])
        angle = _angles(kappa.reshape(-1), self._dim).reshape(shape[:-1]).unsqueeze(-1)
        mu = self._direction.double()
        noise = torch.randn(shape, dtype=mu.dtype, device=mu.device)
        # Orthogonal to μ, and smooth in it. Twice, so that rounding leaves no part of μ.
        for _ in range(2):
            noise = noise - (noise * mu).sum(-1, keepdim=True) * mu
            noise = noise / torch.linalg.vector_norm(noise, dim=-1, keepdim=True)
        x = angle.cos() * mu + angle.sin() * noise
        return x.to(self.loc.dtype)


def _angles(kappa: Tensor, dim: int) -> Tensor:
    """Angles from the mean direction ``(n,)`` for concentrations ``(n,)``, differentiable in them."""
    with torch.no_grad():
        angle = _rejected_angles(kappa.detach(), dim)
    if not (torch.is_grad_enabled() and kappa.requires_grad):
        return angle
    with torch.no_grad():
        derivative = _angle_derivative(angle, kappa.detach(), dim)
    return with_derivatives(angle, (kappa, derivative))


def _rejected_angles(kappa: Tensor, dim: int) -> Tensor:
    """Wood's rejection for ``w = cos(angle)``, written for ``t = 1 - w``, which large ``κ`` makes small."""
    m = dim - 1
    b = m / (2 * kappa + torch.hypot(2 * kappa, torch.full_like(kappa, m)))
    t_0 = 2 * b / (1 + b)
    half = torch.full_like(kappa, 0.5 * m)

    def propose(rows: Tensor) -> tuple[Tensor, Tensor]:
        beta = Beta(half[rows], half[rows], validate_args=False).sample()
        r_b, r_t0 = b[rows], t_0[rows]
        t = 2 * r_b * beta / (1 - (1 - r_b) * beta)
        # κ (w - w_0) + m log((1 - w_0 w) / (1 - w_0²)), with 1 - w_0² = t_0 (2 - t_0)
        log_acceptance = kappa[rows] * (r_t0 - t) + m * (
            (r_t0 + (1 - r_t0) * t).log() - (r_t0 * (2 - r_t0)).log()
        )
        return t, log_acceptance

    t = rejection_sample(kappa, propose)
    return 2 * torch.atan2(t.clamp(min=0).sqrt(), (2 - t).clamp(min=0).sqrt())


def _angle_derivative(angle: Tensor, kappa: Tensor, dim: int) -> Tensor:
    """``∂ angle / ∂κ`` at a fixed probability; the angle's density is ``∝ e^{κ cos φ} sin^{d-2} φ``."""
    mean = kappa * bessel_ratio(0.5 * dim - 1, kappa)
    m = dim - 2
    # κ sin² φ = m cos φ at the mode
    cosine = 2 * kappa / (m + torch.hypot(torch.full_like(kappa, m), 2 * kappa))
    mode = torch.acos(cosine.nan_to_num(1.0).clamp(max=1.0))
    # The curvature at the mode, κ cos φ + m / sin² φ, is at least κ or m.
    width = _WINDOW / torch.maximum(kappa, torch.full_like(kappa, m)).clamp(min=1e-3).sqrt()
    low, high = (mode - width).clamp(min=0), (mode + width).clamp(max=math.pi)
    # The mean of cos φ is taken off; its rounding counts where the density is narrow.
    offset = 1 - mean

    def log_density(phi: Tensor, rows: slice) -> Tensor:
        value = -2 * kappa[rows, None] * (0.5 * phi).sin().square()
        return value + m * phi.sin().clamp(min=torch.finfo(phi.dtype).tiny).log() if m else value

    def scores(phi: Tensor, rows: slice) -> list[Tensor]:
        return [offset[rows, None] - 2 * (0.5 * phi).sin().square()]

    return implicit_derivatives(angle, low, high, mode, log_density, scores)[0]


@recipe
class HypersphericalUniform(TorchDistribution):
    """The uniform distribution on the unit sphere of ``ℝᵈ``, with respect to its area.

    ``dim`` is the number of coordinates ``d`` of a point, as for :class:`VonMisesFisher` (whose limit at
    concentration 0 this is); the sphere itself has dimension ``d - 1``. Other libraries may count the latter.

    Args:
        dim: ``d >= 2``; draws are ``(..., d)``.
        like: A tensor whose dtype and device draws follow; None is torch's default.
        validate_args: Whether to check values.

    Raises:
        ValueError: ``dim`` below two, or ``like`` not of a floating-point type.

    Source: Davidson et al. (2018), the prior of the hyperspherical VAE.

    Example:
        >>> p = HypersphericalUniform(3)
        >>> p.sample((5,)).shape
        torch.Size([5, 3])
        >>> p.log_prob(torch.tensor([0.0, 0.0, 1.0])).round(decimals=4)  # -log 4π
        tensor(-2.5310)
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = UnitSphere()
    has_rsample = True  # no parameters: draws depend on nothing

    def __init__(self, dim: int, like: Tensor | None = None, validate_args: bool | None = None) -> None:
        self.dim = check_count("dim", dim, 2, "points have dim coordinates, a circle is dim=2")
        if like is None:
            like = torch.empty(0)
        if not like.is_floating_point():
            raise argument_error("like", "a floating-point tensor", like)
        self._like = like.detach().new_empty(0)  # a tensor: it moves with a prior that holds this
        super().__init__(torch.Size(), torch.Size([self.dim]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> HypersphericalUniform:
        """Independent copies."""
        new = self._get_checked_instance(HypersphericalUniform, _instance)
        new.dim, new._like = self.dim, self._like
        super(HypersphericalUniform, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The centre of the sphere, ``(..., d)``."""
        return self._like.new_zeros(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """``1/d`` for each coordinate, ``(..., d)``."""
        return self._like.new_full(self._extended_shape(), 1 / self.dim)

    def entropy(self) -> Tensor:
        """The log area of the sphere, shape ``(...)``."""
        return self._like.new_full(self.batch_shape, log_sphere_area(self.dim))

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus the log area of the sphere, for points ``(..., d)``; shape ``(...)``.

        Raises:
            ValueError: A point off the sphere, where validation is on.
        """
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        return value.new_full(shape, -log_sphere_area(self.dim))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``sample_shape + batch_shape + (d,)``."""
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self._like.dtype, device=self._like.device)
        return noise / torch.linalg.vector_norm(noise, dim=-1, keepdim=True)


# -- divergences -------------------------------------------------------------------------------------------


def _check_same_dimension(p: TorchDistribution, q: TorchDistribution) -> None:
    if p.event_shape != q.event_shape:
        raise argument_error(
            "q", f"a distribution of points of {p.event_shape[0]} coordinates", f"one of {q.event_shape[0]}"
        )


@register_kl(VonMisesFisher, VonMisesFisher)
def _kl_vmf_vmf(p: VonMisesFisher, q: VonMisesFisher) -> Tensor:
    _check_same_dimension(p, q)
    # E_p[-½ κ_q ‖x - μ_q‖²] = -κ_q (1 - A μ_p · μ_q), without cancellation at large κ
    kappa_p, kappa_q = p.concentration.double(), q.concentration.double()
    length = kappa_p * p._ratio
    square = (p._direction.double() - q._direction.double()).square().sum(-1)
    gap = kappa_q * (1 - length + 0.5 * length * square) - kappa_p * (1 - length)
    return (p._scaled_constant() - q._scaled_constant() + gap).to(p.loc.dtype)


@register_kl(VonMisesFisher, HypersphericalUniform)
def _kl_vmf_uniform(p: VonMisesFisher, q: HypersphericalUniform) -> Tensor:
    _check_same_dimension(p, q)
    kappa = p.concentration.double()
    value = p._scaled_constant() - kappa * (1 - kappa * p._ratio) + log_sphere_area(q.dim)
    return value.to(p.loc.dtype).expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


@register_kl(HypersphericalUniform, VonMisesFisher)
def _kl_uniform_vmf(p: HypersphericalUniform, q: VonMisesFisher) -> Tensor:
    _check_same_dimension(p, q)
    value = q.concentration.double() - q._scaled_constant() - log_sphere_area(p.dim)
    return value.to(q.loc.dtype).expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


@register_kl(HypersphericalUniform, HypersphericalUniform)
def _kl_uniform_uniform(p: HypersphericalUniform, q: HypersphericalUniform) -> Tensor:
    _check_same_dimension(p, q)
    return p._like.new_zeros(torch.broadcast_shapes(p.batch_shape, q.batch_shape))
