"""The latent space with a metric as a manifold of geoopt, on which its optimizers run."""

from __future__ import annotations

import torch
from geoopt.manifolds.base import Manifold, ScalingInfo
from torch import Tensor

from riemvae._checks import argument_error, check_count, check_finite, check_last_dim, check_positive
from riemvae._recipe import recipe
from riemvae.geometry.exponential import exponential_map
from riemvae.geometry.geodesics import geodesic
from riemvae.geometry.logarithm import log_map
from riemvae.geometry.metric import Metric
from riemvae.geometry.transport import exponential_map_and_transport, parallel_transport


@recipe
class LatentManifold(Manifold):
    """``ℝᵈ`` (or the part of it where the metric is defined) with a metric, as a ``geoopt`` manifold.

    Points are coordinates ``(..., d)``, every vector is tangent everywhere, and a gradient becomes Riemannian
    by the inverse metric. Geodesics, logarithms, transports and distances are computed, by
    :func:`~riemvae.geometry.exponential_map`, :func:`~riemvae.geometry.log_map`,
    :func:`~riemvae.geometry.parallel_transport` and :func:`~riemvae.geometry.geodesic`. As everywhere in
    geoopt, the last dimension is the manifold's and what is reduced is dropped unless ``keepdim``.

    ``geoopt.optim``'s optimizers take parameters ``geoopt.ManifoldParameter(z, manifold=...)``. Their
    retraction is one Runge-Kutta step of the geodesic, with which momenta are transported: it agrees with the
    exponential map to fourth order in the step.

    Args:
        metric: The metric.
        num_steps: Steps of each geodesic that is shot.
        refine: Relative discretisation error that :meth:`dist` refines to; False: 16 segments a geodesic and
            no refinement, True: 1e-4.
        origin: The point ``(d,)`` that :meth:`origin` gives and :meth:`random` spreads around; None: zero.

    Raises:
        ValueError: Numbers out of range, or an origin that is not a point of the metric's domain.

    Source: Kochurov, Karimov and Kozlukov (2020) for geoopt; Bécigneul and Ganea (2019) for the optimizers.

    Example:
        >>> import geoopt
        >>> from riemvae.geometry import ConstantMetric
        >>> manifold = LatentManifold(ConstantMetric(torch.diag(torch.tensor([1.0, 100.0]))))
        >>> z = geoopt.ManifoldParameter(torch.ones(2), manifold=manifold)
        >>> optimizer = geoopt.optim.RiemannianSGD([z], lr=0.5)
        >>> loss = manifold.dist2(z, torch.zeros(2)) / 2
        >>> loss.backward()
        >>> optimizer.step()  # half of the way, in spite of the anisotropic metric
        >>> z.detach().round(decimals=3)
        tensor([0.5000, 0.5000])
    """

    __scaling__ = Manifold.__scaling__.copy()
    name = "Latent"
    ndim = 1
    reversible = False

    metric: Metric
    _origin: Tensor | None

    def __init__(
        self, metric: Metric, num_steps: int = 20, refine: bool | float = True, origin: Tensor | None = None
    ) -> None:
        super().__init__()
        if not isinstance(refine, bool):
            check_positive("refine", refine, "pass True, False or a relative error such as 1e-4")
        self.metric = metric
        self.num_steps = check_count("num_steps", num_steps)
        self.refine = refine
        if origin is not None:
            origin = torch.as_tensor(origin)
            check_last_dim("origin", origin, metric.latent_dim)
            check_finite("origin", origin)
            if origin.dim() != 1:
                raise argument_error("origin", f"one point ({metric.latent_dim},)", origin)
            good, reason = self._check_point_on_manifold(origin)
            if not good:
                raise argument_error("origin", "a point of the metric's domain", f"{reason}")
        self.register_buffer("_origin", origin)

    def extra_repr(self) -> str:
        return f"{type(self.metric).__name__}, latent_dim={self.metric.latent_dim}"

    # -- what is a point and a vector -------------------------------------------------------------------

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        if len(shape) < 1 or shape[-1] != self.metric.latent_dim:
            return False, f"'{name}' of shape {tuple(shape)}: expected (..., {self.metric.latent_dim})"
        return True, None

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not bool(torch.isfinite(x).all()):
            return False, "a coordinate is NaN or infinite"
        with torch.no_grad():
            bad = int((~torch.isfinite(self.metric.log_volume(_plain(x)))).sum())
        return (False, f"the metric is not positive definite at {bad} of the points") if bad else (True, None)

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not bool(torch.isfinite(u).all()):
            return False, "a component is NaN or infinite"
        return True, None

    def projx(self, x: Tensor) -> Tensor:
        """The point itself: the chart is all of the manifold."""
        return x

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """The vector itself, broadcast against the point."""
        return u.expand(torch.broadcast_shapes(x.shape, u.shape))

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """``G⁻¹(x) u``: the Riemannian gradient of a function with partial derivatives ``u``."""
        return (self.metric.inverse(_plain(x)) @ _plain(u).unsqueeze(-1)).squeeze(-1)

    # -- lengths ----------------------------------------------------------------------------------------

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """``uᵀ G(x) v``, with ``v = u`` if there is none."""
        product = self.metric.inner(_plain(x), _plain(u), _plain(u if v is None else v))
        return product.unsqueeze(-1) if keepdim else product

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """The length of the shortest geodesic, differentiable in its ends and the metric."""
        length = geodesic(self.metric, _plain(x), _plain(y), refine=self.refine).length
        return length.unsqueeze(-1) if keepdim else length

    # -- geodesics --------------------------------------------------------------------------------------

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """``Exp_x(u)``."""
        return exponential_map(self.metric, _plain(x), _plain(u), self.num_steps)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """``Log_x(y)``; NaN, with a warning, where shooting does not converge."""
        return log_map(self.metric, _plain(x), _plain(y), self.num_steps)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """One Runge-Kutta step of the geodesic: a retraction of fourth order."""
        return exponential_map(self.metric, _plain(x), _plain(u), 1)

    # -- transport --------------------------------------------------------------------------------------

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Parallel transport of ``v`` along the geodesic from ``x`` to ``y``."""
        x, v = _plain(x), _plain(v)
        return parallel_transport(self.metric, x, self.logmap(x, y), v, self.num_steps)

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``Exp_x(u)`` and ``v`` transported there, by one integration."""
        return exponential_map_and_transport(self.metric, _plain(x), _plain(u), _plain(v), self.num_steps)

    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The retraction and ``v`` transported along it, by one step."""
        return exponential_map_and_transport(self.metric, _plain(x), _plain(u), _plain(v), 1)

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """``v`` transported along ``t -> Exp_x(t u)``."""
        return self.expmap_transp(x, u, v)[1]

    def transp_follow_retr(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """``v`` transported along the retraction."""
        return self.retr_transp(x, u, v)[1]

    # -- points -----------------------------------------------------------------------------------------

    def origin(
        self,
        *size: int | tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        seed: int | None = 42,
    ) -> Tensor:
        """The origin, repeated to a shape ``(..., d)``; ``seed`` is not needed."""
        shape = tuple(n for s in size for n in ((s,) if isinstance(s, int) else s))
        if not self._check_shape(shape, "size")[0]:
            raise argument_error("size", f"a shape (..., {self.metric.latent_dim})", f"{shape}")
        # As the metric's own tensors, if it has any.
        like = next((t for t in self.state_dict().values() if t.is_floating_point()), torch.empty(0))
        origin = torch.zeros(self.metric.latent_dim).to(like) if self._origin is None else self._origin
        return origin.to(dtype=dtype, device=device).repeat(*shape[:-1], 1).reshape(shape)

    @__scaling__(ScalingInfo(std=-1), "random")
    def random_normal(
        self,
        *size: int | tuple[int, ...],
        std: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Points ``Exp_o(E a)`` with ``a ~ N(0, std² I)`` and ``E`` an orthonormal frame at the origin ``o``.

        Args:
            size: The shape ``(..., d)``.
            std: Standard deviation, in geodesic length; not negative.
            dtype: None: that of the origin or the metric.
            device: None: that of the origin or the metric.
        """
        if std != 0:
            check_positive("std", std)
        x = self.origin(*size, dtype=dtype, device=device)
        frame = torch.linalg.cholesky(self.metric.inverse(x))
        noise = std * torch.randn_like(x)
        return self.expmap(x, (frame @ noise.unsqueeze(-1)).squeeze(-1))

    random = random_normal


def _plain(x: Tensor) -> Tensor:
    """Without geoopt's tensor subclasses, which would spread through every computation."""
    return x if type(x) is Tensor else x.as_subclass(Tensor)
