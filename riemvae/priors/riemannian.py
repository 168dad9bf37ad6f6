"""Priors on curved latent spaces: wrapped normals, and densities made of a metric's volume element."""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar

import geoopt
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import biject_to

from riemvae._checks import argument_error, check_count, check_positive
from riemvae._recipe import recipe
from riemvae.distributions.inverse_volume import InverseVolume
from riemvae.distributions.mixture import CoveringMixture
from riemvae.distributions.riemannian_uniform import RiemannianUniform
from riemvae.distributions.volume import VolumeDensity
from riemvae.distributions.wrapped_normal import WrappedNormal
from riemvae.geometry import LatentManifold, Metric

# Weighted draws behind each resampled one, and at least so many.
_POOL, _SMALLEST_POOL = 64, 8_192
# An effective size of the weights, for each draw wanted, below which resampled ones repeat each other.
_DISTINCT = 4.0


@recipe
class WrappedNormalPrior(nn.Module):
    r"""The wrapped normal ``z = Exp_μ(E a)``, ``a ~ N(0, diag σ²)``, as a prior in coordinates.

    Its density is the one with respect to Lebesgue measure in the chart, as that of guides is. The Poincaré
    ball and learned metrics have such charts. The embedded sphere and hyperboloid do not (their wrapped
    normal is a density of area on a surface) and are refused.

    On the ball, guides work in unconstrained coordinates by ``biject_to`` of its support. Under a learned
    metric every density is a logarithm map, a small boundary problem: slow, and NaN where none is found,
    which an estimate counts as weight zero.

    Args:
        manifold: ``geoopt.PoincareBall``, a :class:`~riemvae.geometry.LatentManifold`, or a
            :class:`~riemvae.geometry.Metric`.
        latent_dim: ``d``; None is that of the metric or of ``loc``.
        loc: ``μ (d,)``, a point of the manifold; None is the origin.
        scale: ``σ``, a number or ``(d,)`` positive numbers.
        learn: Train ``μ`` and ``log σ``. Parameters of the metric are trained if they require gradients.

    Raises:
        ValueError: A manifold without such a chart, a curvature that is trained (the support would change
            under the guide), a point off the manifold, a scale that is not positive.

    Source: Mathieu et al. (2019), section 3, for the ball; thesis, section 2.1.

    Example:
        >>> prior = WrappedNormalPrior(geoopt.PoincareBall(), latent_dim=2, scale=0.5, learn=True)
        >>> prior().support, [name for name, _ in prior.named_parameters()]
        (OpenBall(c=1), ['unconstrained_loc', 'log_scale'])
    """

    manifold: geoopt.Manifold
    unconstrained_loc: Tensor
    log_scale: Tensor

    def __init__(
        self,
        manifold: geoopt.Manifold | Metric,
        latent_dim: int | None = None,
        loc: Tensor | None = None,
        scale: float | Tensor = 1.0,
        learn: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(manifold, Metric):
            manifold = LatentManifold(manifold)
        if isinstance(manifold, (geoopt.Sphere, geoopt.Lorentz)):
            raise argument_error(
                "manifold",
                "a space with a chart, in which a density of coordinates exists",
                f"the embedded {type(manifold).__name__}, whose densities are of area and not comparable "
                "with a guide's",
                "use geoopt.PoincareBall, or a Metric of the space in coordinates",
            )
        if not isinstance(manifold, (geoopt.PoincareBall, LatentManifold)):
            raise argument_error("manifold", "a geoopt.PoincareBall, a LatentManifold or a Metric", manifold)
        if isinstance(manifold, geoopt.PoincareBall) and any(p.requires_grad for p in manifold.parameters()):
            raise argument_error(
                "manifold",
                "a ball of fixed curvature",
                "one whose curvature is trained: the support would change under the guide",
                "pass geoopt.PoincareBall(c, learnable=False)",
            )
        if isinstance(manifold, geoopt.PoincareBall):
            # A constant, but a parameter to geoopt, which Pyro would warn of at each call.
            self.__dict__["manifold"] = manifold
        else:
            self.manifold = manifold
        self.latent_dim = self._dim(latent_dim, loc)
        self.learn = bool(learn)
        point = torch.zeros(self.latent_dim) if loc is None else loc.detach()
        widths = torch.as_tensor(scale, dtype=point.dtype, device=point.device).detach()
        check_positive("scale", widths)
        if widths.dim() > 1 or widths.numel() not in (1, self.latent_dim):
            raise argument_error("scale", f"a number or a tensor ({self.latent_dim},)", widths)
        support = self._at(point, widths).support
        if not bool(support.check(point)):
            raise argument_error("loc", f"a point of {support!r}", f"{point.tolist()}")
        start = biject_to(support).inv(point).clone()
        log_scale = widths.expand(self.latent_dim).log()
        if self.learn:
            self.unconstrained_loc, self.log_scale = nn.Parameter(start), nn.Parameter(log_scale)
        else:
            self.register_buffer("unconstrained_loc", start)
            self.register_buffer("log_scale", log_scale)

    def _dim(self, latent_dim: int | None, loc: Tensor | None) -> int:
        if loc is not None and (not isinstance(loc, Tensor) or loc.dim() != 1 or not loc.is_floating_point()):
            raise argument_error("loc", "a floating-point tensor of shape (d,)", loc)
        known = [
            latent_dim,
            None if loc is None else len(loc),
            self.manifold.metric.latent_dim if isinstance(self.manifold, LatentManifold) else None,
        ]
        sizes = {d for d in known if d is not None}
        if len(sizes) != 1:
            raise argument_error(
                "latent_dim",
                "one number from latent_dim, the length of loc and the metric",
                f"{known[0]}, {known[1]} and {known[2]}",
                "pass latent_dim=",
            )
        return check_count("latent_dim", sizes.pop())

    def _at(self, loc: Tensor, scale: Tensor) -> WrappedNormal:
        scale = scale.expand(self.latent_dim)
        return WrappedNormal(
            self.manifold, loc, torch.diag_embed(scale), measure="lebesgue", validate_args=False
        )

    @property
    def loc(self) -> Tensor:
        """``μ (d,)``, as it is now."""
        support = self._at(torch.zeros_like(self.unconstrained_loc), self.log_scale.exp()).support
        return biject_to(support)(self.unconstrained_loc)

    @property
    def scale(self) -> Tensor:
        """``σ (d,)``, as it is now."""
        return self.log_scale.exp()

    def forward(self) -> TorchDistribution:
        """The wrapped normal, a density with respect to Lebesgue measure."""
        return self._at(self.loc, self.scale)


class _ResampledVolume(VolumeDensity):
    """A volume density that draws in any dimension: exactly where it can, else by importance resampling."""

    def __init__(self, metric: Metric, radius: float | None) -> None:
        super().__init__(metric, radius)
        self._mixtures: list[CoveringMixture] = []  # the adapted proposal, shared by expanded copies

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``sample_shape + batch_shape + (d,)``.

        Exact and independent where the class it resembles has exact draws. Elsewhere the best of 64 weighted
        draws of a covering mixture for each one wanted (8192 at least), with replacement: the distribution
        is the target's up to one over the effective size of their weights.
        """
        try:
            return super().sample(sample_shape)
        except NotImplementedError:
            pass
        shape = self._extended_shape(torch.Size(sample_shape))
        count = math.prod(shape[:-1])
        if count == 0:
            return self._like().new_empty(shape)
        if not self._mixtures:
            self._mixtures.append(self._proposal(None))
        mixture = self._mixtures[0]
        z = mixture.sample(max(_POOL * count, _SMALLEST_POOL), stratified=True)
        log_weight = (self._log_density_in_chunks(z) - mixture.log_prob(z)).double()
        weight = log_weight.softmax(0)
        effective = float(1 / weight.square().sum())
        if effective < _DISTINCT * count:
            warnings.warn(
                f"draws of {type(self).__name__}: {count} wanted of weights worth {effective:.0f}, so that "
                "some repeat; use the samplers of riemvae.sampling",
                RuntimeWarning,
                stacklevel=2,
            )
        edges = weight.cumsum(0)
        ticks = torch.rand(count, dtype=edges.dtype, device=edges.device) * edges[-1]
        return z[torch.searchsorted(edges, ticks).clamp(max=len(z) - 1)].reshape(shape)


class _InverseVolume(_ResampledVolume, InverseVolume):
    """The density of :class:`InverseVolumePrior`."""


class _RiemannianUniform(_ResampledVolume, RiemannianUniform):
    """The density of :class:`RiemannianUniformPrior`."""


class _VolumePrior(nn.Module):
    """A density made of a fixed metric's volume element, normalised once.

    Args:
        metric: The metric.
        radius: Radius of the ball.
    """

    _density: ClassVar[type[_ResampledVolume]]

    def __init__(self, metric: Metric, radius: float | None = None) -> None:
        super().__init__()
        if not isinstance(metric, Metric):
            raise argument_error("metric", "a riemvae.geometry.Metric", metric)
        if any(p.requires_grad for p in metric.parameters()):
            raise argument_error(
                "metric",
                "a fixed metric, since the constant of the density is computed once",
                "one with trainable parameters",
                "freeze a copy of it: copy.deepcopy(metric).requires_grad_(False)",
            )
        self.metric = metric
        self._distribution = self._density(metric, radius)
        self.radius = self._distribution.radius

    @property
    def log_normalizer(self) -> float:
        """Log of the integral of the volume element, computed when it is first needed."""
        return self._distribution.log_normalizer

    @property
    def log_normalizer_stderr(self) -> float:
        """Its standard error, which all log probabilities share: 0 for a quadrature (``d <= 2``)."""
        return self._distribution.log_normalizer_stderr

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # The proposal holds tensors of the old device and dtype; the constant stays what it is.
        result = super()._apply(fn, recurse)
        self._distribution._mixtures.clear()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._distribution = self._density(self.metric, self.radius)

    def forward(self) -> TorchDistribution:
        return self._distribution


@recipe
class InverseVolumePrior(_VolumePrior):
    r"""``p(z) ∝ √det G⁻¹(z)`` on the ball ``‖z‖ <= radius``: the generating density of chapters 1 and 2.

    With the metric of a trained model it is large near that model's codes. It is a proper density with
    respect to Lebesgue measure: its constant is a quadrature for ``d`` = 1 and 2 and an importance estimate
    above, whose error :attr:`log_normalizer_stderr` every ``log p(x)`` under this prior shares. Guides work
    in unconstrained coordinates by the bijection of :class:`~riemvae.distributions.ball.ToBall`.

    Draws are exact for a metric of centroids with ``d <= 2``, and by importance resampling elsewhere, with a
    warning where the weights are worth too little.

    Args:
        metric: A fixed metric: no parameter of it may require gradients.
        radius: Radius of the ball; None is twice the largest norm of the metric's centroids.

    Raises:
        ValueError: A metric with trainable parameters, no radius, and what
            :class:`~riemvae.distributions.InverseVolume` raises.

    Source: Chadebec, Thibeau-Sutre, Burgos and Allassonnière (2022), eq. 1.8 of the thesis.

    Example:
        >>> from riemvae.geometry import CentroidMetric
        >>> metric = CentroidMetric(torch.ones(1, 2), torch.eye(2)[None], temperature=1, regularization=0.01)
        >>> prior = InverseVolumePrior(metric)
        >>> prior().support, prior().log_prob(torch.tensor([1.0, 1.0]))
        (Ball(radius=2.82843), tensor(-1.1796))
    """

    _density = _InverseVolume


@recipe
class RiemannianUniformPrior(_VolumePrior):
    r"""``p(z) ∝ √det G(z)``: uniform for the Riemannian volume, on a ball or where the metric decays.

    As :class:`InverseVolumePrior`, for a metric whose volume is large near data (chapter 3).

    Args:
        metric: A fixed metric: no parameter of it may require gradients.
        radius: Radius of the ball; None is the whole space, for a ``PosteriorMetric`` with a decay.

    Raises:
        ValueError: A metric with trainable parameters, an improper density, and what
            :class:`~riemvae.distributions.RiemannianUniform` raises.

    Source: Pennec (2006); Chadebec and Allassonnière (2022), section 3.4.5 of the thesis.

    Example:
        >>> from riemvae.geometry import EuclideanMetric
        >>> RiemannianUniformPrior(EuclideanMetric(2), radius=1.0)().log_prob(torch.zeros(2))
        tensor(-1.1447)
    """

    _density = _RiemannianUniform
