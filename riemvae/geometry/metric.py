"""Riemannian metrics of a latent space: a metric gives its tensor or inverse, the base derives the rest."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from riemvae._checks import argument_error, check_count, check_last_dim
from riemvae._recipe import recipe


def _cholesky(matrix: Tensor) -> Tensor:
    """The Cholesky factor; NaN where a matrix is not positive definite: a failure must be seen, per datum."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return factor.masked_fill((info > 0)[..., None, None], math.nan)


def _factorised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    if matrix.shape[-1] == 2:
        # By hand: a fifth of the calls. By pivots, as Cholesky: the determinant itself may leave the range.
        a, b, c = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 1]
        slope = b / a
        pivot = torch.addcmul(c, b, slope, value=-1.0)
        pivot = pivot.masked_fill((a <= 0) | (pivot <= 0), math.nan)
        last = pivot.reciprocal()
        beside = -slope * last
        first = torch.addcmul(a.reciprocal(), slope, beside, value=-1.0)
        inverse = torch.stack([first, beside, beside, last], -1).unflatten(-1, (2, 2))
        return inverse, a.log() + pivot.log()
    factor = _cholesky(matrix)
    return torch.cholesky_inverse(factor), 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class _InverseAndLogDet(torch.autograd.Function):
    """``(A⁻¹, log det A)`` of symmetric positive-definite matrices from one Cholesky factorisation.

    The backward pass needs no further factorisation: with ``B = A⁻¹``, ``dB = -B dA B`` and ``d log det A =
    tr(B dA)``. It is written in differentiable operations, so that it can itself be differentiated.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        inverse, log_det = _factorised(matrix)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inverse)
        return inverse, log_det

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        grad_inverse, grad_log_det = grads
        (inverse,) = ctx.saved_tensors
        total = None if grad_log_det is None else grad_log_det[..., None, None] * inverse
        if grad_inverse is not None:
            through = inverse @ grad_inverse @ inverse
            total = -through if total is None else total - through
        return total


def inverse_and_log_det(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse and the log determinant of symmetric positive-definite matrices ``(..., d, d)``.

    Returns:
        ``(inverse, log_det)`` of shapes ``(..., d, d)`` and ``(...)``; NaN where a matrix is not positive
        definite.

    Example:
        >>> inverse, log_det = inverse_and_log_det(2.0 * torch.eye(3))
        >>> round(float(log_det), 4)
        2.0794
    """
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return _factorised(matrix)  # a custom function would not pass through torch.func
    return _InverseAndLogDet.apply(matrix)  # type: ignore[no-any-return]


def _quadratic(matrix: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``aᵀ M b`` with leading dimensions broadcast."""
    return (a * (matrix @ b.unsqueeze(-1)).squeeze(-1)).sum(-1)


class LocalMetric:
    """A metric at given points ``z (..., d)``: all that one evaluation gives, computed once and shared.

    An integrator asks the same point for its velocity, its volume and the gradient of its kinetic energy, for
    several momenta. Each quantity here is computed when first asked for and kept.

    A metric with a closed form overrides :meth:`pullback`; everything else follows from it.

    Args:
        metric: The metric.
        z: Points ``(..., d)``.
    """

    def __init__(self, metric: Metric, z: Tensor) -> None:
        self.metric = metric
        self.z = z

    # -- the matrices -----------------------------------------------------------------------------------

    @cached_property
    def _primary(self) -> tuple[Tensor, Tensor]:
        """An alias of ``z`` and the metric's own matrix there, connected where gradients are to be taken.

        The alias makes the derivative *partial*: a momentum computed from ``z`` does not depend on it.
        """
        with torch.inference_mode(False), torch.enable_grad():
            connected = self._create_graph and self.z.requires_grad
            alias = self.z.clone() if connected else self.z.detach().clone().requires_grad_()
            matrix = self.metric.inverse(alias) if self.metric.gives_inverse else self.metric.tensor(alias)
        return alias, matrix

    @property
    def _create_graph(self) -> bool:
        return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

    @cached_property
    def _pair(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(G⁻¹, G, log det G)``."""
        matrix = self._primary[1]
        matrix = matrix if self._create_graph else matrix.detach()
        other, log_det = inverse_and_log_det(matrix)
        return (matrix, other, -log_det) if self.metric.gives_inverse else (other, matrix, log_det)

    @property
    def inverse(self) -> Tensor:
        """``G⁻¹(z)``, shape ``(..., d, d)``."""
        return self._pair[0]

    @property
    def tensor(self) -> Tensor:
        """``G(z)``, shape ``(..., d, d)``."""
        return self._pair[1]

    @property
    def log_volume(self) -> Tensor:
        """``½ log det G(z)``, shape ``(...)``."""
        return 0.5 * self._pair[2]

    # -- derivatives ------------------------------------------------------------------------------------

    def pullback(self, matrix: Tensor) -> Tensor:
        """``Σ_ab M_ab ∂(G⁻¹)_ab/∂z`` for symmetric ``M (..., d, d)``: all other derivatives come from it."""
        alias, primary = self._primary
        # For a metric that gives G: ∂G⁻¹ = -G⁻¹ ∂G G⁻¹.
        weight = matrix if self.metric.gives_inverse else -(self.inverse @ matrix @ self.inverse)
        if not primary.requires_grad:  # a constant metric
            return torch.zeros_like(self.z)
        create_graph = self._create_graph
        with torch.inference_mode(False), torch.enable_grad():
            (gradient,) = torch.autograd.grad(
                primary,
                alias,
                weight.expand(primary.shape),
                create_graph=create_graph,
                retain_graph=True,
                allow_unused=True,  # a matrix that is trained but the same everywhere
            )
        return torch.zeros_like(self.z) if gradient is None else gradient

    def kinetic_gradient(self, v: Tensor) -> Tensor:
        """``∂/∂z [½ vᵀ G⁻¹(z) v + ½ log det G(z)]`` at fixed momentum ``v``, shape ``(..., d)``.

        With ``∂ log det G = -tr(G ∂G⁻¹)`` it is one pullback of ``½ (v vᵀ - G)``.
        """
        return self.pullback(torch.addcmul(self._minus_half_tensor, 0.5 * v.unsqueeze(-1), v.unsqueeze(-2)))

    @cached_property
    def _minus_half_tensor(self) -> Tensor:
        return -0.5 * self.tensor

    @cached_property
    def log_volume_gradient(self) -> Tensor:
        """``∂/∂z ½ log det G(z)``, shape ``(..., d)``."""
        return self.pullback(self._minus_half_tensor)

    # -- momenta ----------------------------------------------------------------------------------------

    def velocity(self, v: Tensor) -> Tensor:
        """``G⁻¹(z) v``: the velocity of a momentum (a covector), shape ``(..., d)``."""
        return (self.inverse @ v.unsqueeze(-1)).squeeze(-1)

    def kinetic_energy(self, v: Tensor) -> Tensor:
        """``½ vᵀ G⁻¹(z) v + ½ log det G(z)``, shape ``(...)``; the constant ``d/2 log 2π`` is left out."""
        return 0.5 * (v * self.velocity(v)).sum(-1) + self.log_volume

    def momentum_log_prob(self, v: Tensor) -> Tensor:
        """``log N(v; 0, G(z))``, shape ``(...)``."""
        return -self.kinetic_energy(v) - 0.5 * self.z.shape[-1] * math.log(2.0 * math.pi)

    def momentum(self, noise: Tensor) -> Tensor:
        """A momentum ``v ~ N(0, G(z))`` from standard normal ``noise (..., d)``.

        With ``G⁻¹ = C Cᵀ`` it is ``C⁻ᵀ ε``, so a metric that gives its inverse never needs ``G``.
        """
        if not self.metric.gives_inverse:
            return (_cholesky(self.tensor) @ noise.unsqueeze(-1)).squeeze(-1)
        factor = _cholesky(self.inverse)
        solution = torch.linalg.solve_triangular(factor.mT, noise.unsqueeze(-1), upper=True)
        return solution.squeeze(-1)


class Metric(nn.Module):
    """A Riemannian metric ``G(z)`` on ``ℝᵈ``, points of shape ``(..., d)``.

    A subclass sets ``latent_dim`` and gives :meth:`tensor` or :meth:`inverse` (both, if both are cheap).
    Volume, inner products, momenta, their densities and every gradient are derived, by Cholesky
    factorisations in log space and by automatic differentiation.

    Args:
        latent_dim: The dimension ``d``; may be set as an attribute instead.

    Example:
        >>> class HalfPlane(Metric):
        ...     latent_dim = 2
        ...     def inverse(self, z):
        ...         return z[..., 1, None, None] ** 2 * torch.eye(2)
        >>> HalfPlane().log_volume(torch.tensor([[0.0, 1.0], [3.0, 0.5]])).round(decimals=4)
        tensor([0.0000, 1.3863])
    """

    latent_dim: int

    def __new__(cls, *args: Any, **kwargs: Any) -> Metric:
        # A user's metric need not call ``super().__init__()``.
        self = super().__new__(cls)
        nn.Module.__init__(self)
        return self

    def __init__(self, latent_dim: int | None = None) -> None:
        super().__init__()
        if latent_dim is not None:
            self.latent_dim = check_count("latent_dim", latent_dim)

    @property
    def gives_inverse(self) -> bool:
        """Whether the inverse, not the tensor, is what this metric computes itself."""
        if type(self).inverse is not Metric.inverse:
            return True
        if type(self).tensor is Metric.tensor:
            raise NotImplementedError(
                f"{type(self).__name__} gives neither tensor(z) nor inverse(z): define one of them"
            )
        return False

    def tensor(self, z: Tensor) -> Tensor:
        """``G(z)``, shape ``(..., d, d)``."""
        if not self.gives_inverse:
            raise NotImplementedError
        return inverse_and_log_det(self.inverse(z))[0]

    def inverse(self, z: Tensor) -> Tensor:
        """``G⁻¹(z)``, shape ``(..., d, d)``."""
        self.gives_inverse  # noqa: B018 - refuses a metric that gives neither
        return inverse_and_log_det(self.tensor(z))[0]

    def at(self, z: Tensor) -> LocalMetric:
        """The metric at ``z (..., d)``: one evaluation, shared by all that is asked of it."""
        return LocalMetric(self, z)

    def _checked(self, z: Tensor) -> Tensor:
        check_last_dim("z", z, self.latent_dim, "points have the metric's latent dimension last")
        return z

    def log_volume(self, z: Tensor) -> Tensor:
        """``½ log det G(z)``, shape ``(...)``: the log volume element."""
        self._checked(z)
        if self.gives_inverse:
            return -0.5 * inverse_and_log_det(self.inverse(z))[1]
        return 0.5 * inverse_and_log_det(self.tensor(z))[1]

    def log_volume_gradient(self, z: Tensor) -> Tensor:
        """``∇ ½ log det G(z)``, shape ``(..., d)``."""
        return self.at(self._checked(z)).log_volume_gradient

    def log_volume_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``½ log det G(z)`` and its gradient from one evaluation."""
        local = self.at(self._checked(z))
        return local.log_volume, local.log_volume_gradient

    def inner(self, z: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """``uᵀ G(z) v`` of tangent vectors, shape ``(...)``."""
        return _quadratic(self.tensor(self._checked(z)), u, v)

    def norm(self, z: Tensor, v: Tensor) -> Tensor:
        """``√(vᵀ G(z) v)`` of a tangent vector (a velocity), shape ``(...)``."""
        return self.inner(z, v, v).sqrt()

    def dual_inner(self, z: Tensor, p: Tensor, q: Tensor) -> Tensor:
        """``pᵀ G⁻¹(z) q`` of covectors (momenta), shape ``(...)``."""
        return _quadratic(self.inverse(self._checked(z)), p, q)

    def dual_norm(self, z: Tensor, p: Tensor) -> Tensor:
        """``√(pᵀ G⁻¹(z) p)`` of a covector (a momentum), shape ``(...)``."""
        return self.dual_inner(z, p, p).sqrt()

    def sample_momentum(self, z: Tensor) -> Tensor:
        """One draw of ``N(0, G(z))`` a point, shape ``(..., d)``."""
        return self.at(self._checked(z)).momentum(torch.randn_like(z))

    def momentum_log_prob(self, z: Tensor, v: Tensor) -> Tensor:
        """``log N(v; 0, G(z))``, shape ``(...)``, a density over momenta in the coordinates of ``v``."""
        return self.at(self._checked(z)).momentum_log_prob(v)


class _FlatLocal(LocalMetric):
    """The local view of a metric that does not depend on the point: no derivative at all."""

    def pullback(self, matrix: Tensor) -> Tensor:
        return torch.zeros_like(self.z)

    def kinetic_gradient(self, v: Tensor) -> Tensor:
        return torch.zeros_like(v)


class _EuclideanLocal(_FlatLocal):
    def velocity(self, v: Tensor) -> Tensor:
        return v

    def momentum(self, noise: Tensor) -> Tensor:
        return noise

    @property
    def log_volume(self) -> Tensor:
        return self.z.new_zeros(self.z.shape[:-1])


@recipe
class EuclideanMetric(Metric):
    """The flat metric ``G = I``.

    Args:
        latent_dim: The dimension ``d``.

    Example:
        >>> EuclideanMetric(2).norm(torch.zeros(2), torch.tensor([3.0, 4.0]))
        tensor(5.)
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)

    def tensor(self, z: Tensor) -> Tensor:
        return torch.eye(self.latent_dim, dtype=z.dtype, device=z.device).expand(*z.shape, z.shape[-1])

    def inverse(self, z: Tensor) -> Tensor:
        return self.tensor(z)

    def log_volume(self, z: Tensor) -> Tensor:
        return z.new_zeros(self._checked(z).shape[:-1])

    def at(self, z: Tensor) -> LocalMetric:
        return _EuclideanLocal(self, z)


@recipe
class ConstantMetric(Metric):
    """A metric that is the same positive-definite matrix everywhere; its distance is Mahalanobis'.

    Args:
        matrix: ``G (d, d)``, symmetric positive definite.

    Raises:
        ValueError: ``matrix`` is not square, symmetric and positive definite.

    Example:
        >>> ConstantMetric(4.0 * torch.eye(2)).norm(torch.zeros(2), torch.tensor([3.0, 4.0]))
        tensor(10.)
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        matrix = torch.as_tensor(matrix)
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise argument_error("matrix", "one square matrix (d, d)", matrix)
        super().__init__(matrix.shape[0])
        symmetric = torch.allclose(matrix, matrix.mT, rtol=1e-4, atol=1e-6)
        if not symmetric or int(torch.linalg.cholesky_ex(matrix.detach())[1]) > 0:
            raise argument_error("matrix", "a symmetric positive-definite matrix", "one that is not")
        self.register_buffer("matrix", matrix)

    def tensor(self, z: Tensor) -> Tensor:
        matrix = self.matrix.to(z)
        return matrix.expand(*z.shape[:-1], *matrix.shape)

    def at(self, z: Tensor) -> LocalMetric:
        return _FlatLocal(self, z)
