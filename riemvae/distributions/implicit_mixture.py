"""A mixture of diagonal normals whose draws are differentiable."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from riemvae._recipe import recipe
from riemvae.distributions.diagonal_mixture import DiagonalMixture


@recipe
class ImplicitMixture(DiagonalMixture):
    r"""A mixture ``Σ_k π_k N(z; μ_k, diag σ_k²)`` with implicitly reparametrised draws: a posterior.

    Density, draws and arguments are those of :class:`DiagonalMixture`; its draws have first derivatives with
    respect to the weights, means and scales. With the conditional distribution functions

    .. math:: F_j(z) = \sum_k r_k(z_{<j}) \, \Phi((z_j - \mu_{kj}) / \sigma_{kj}), \quad
              r_k(z_{<j}) \propto \pi_k \prod_{i<j} N(z_i; \mu_{ki}, \sigma_{ki}^2)

    a draw solves ``F(z; φ) = u`` for uniform ``u``, so ``∂z/∂φ = -(∂F/∂z)⁻¹ ∂F/∂φ``, with a lower triangular
    matrix whose diagonal are conditional densities. Which component a point came from does not enter. It is
    worked out in double precision (in single where a device has none) and in log space, so that no number of
    dimensions underflows.

    Args:
        logits: Unnormalised log weights ``(..., K)``.
        loc: ``μ (..., K, d)``.
        scale: Standard deviations ``σ (..., K, d)``, positive.
        validate_args: Whether to check arguments and values.

    Raises:
        ValueError: What :class:`DiagonalMixture` raises.

    Source: Graves (2016), section 2; Figurnov, Mohamed and Mnih (2018), eq. 5 and section 3.

    Example:
        >>> loc = torch.zeros(3, 2, requires_grad=True)
        >>> mixture = ImplicitMixture(torch.zeros(3), loc, torch.ones(3, 2))
        >>> mixture.rsample((4,)).sum().backward()
        >>> round(float(loc.grad.sum()), 4)  # draws move as their components do
        8.0
    """

    has_rsample = True

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``sample_shape + batch_shape + (d,)``, differentiable once."""
        z = self.sample(sample_shape)
        parameters = (self.logits, self.loc, self.scale)
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in parameters):
            return z
        cdf, jacobian = self._conditional_cdfs(z)
        draws: Tensor = _ImplicitDraw.apply(z, cdf, jacobian)  # type: ignore[no-untyped-call]
        return draws

    def _conditional_cdfs(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``F (..., d)``, differentiable in the parameters, and ``∂F/∂z (..., d, d)``, a constant."""
        exact = torch.float32 if z.device.type == "mps" else torch.float64
        loc, scale = self.loc.to(exact), self.scale.to(exact)
        epsilon = (z.to(exact).unsqueeze(-2) - loc) / scale  # (..., K, d)
        log_normal = -0.5 * epsilon.square() - scale.log()
        before = log_normal.cumsum(-1) - log_normal
        share = (self.logits.to(exact).log_softmax(-1).unsqueeze(-1) + before).softmax(-2)
        below = torch.special.ndtr(epsilon)
        cdf = (share * below).sum(-2)
        with torch.no_grad():
            # ∂r_k/∂z_i = r_k (s_ki - Σ_l r_l s_li) with the scores s: a covariance, centred where it cancels.
            centred = share * (below - cdf.unsqueeze(-2))
            jacobian = (centred.mT @ (-epsilon / scale)).tril(-1)
            density = (share * (log_normal - 0.5 * math.log(2 * math.pi)).exp()).sum(-2)
            jacobian = jacobian + torch.diag_embed(density.clamp_min(torch.finfo(exact).tiny))
        return cdf, jacobian


class _ImplicitDraw(torch.autograd.Function):
    """``z`` with the derivative that keeps ``F(z; φ)`` fixed."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, cdf: Tensor, jacobian: Tensor) -> Tensor:
        ctx.save_for_backward(jacobian)
        return z.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (jacobian,) = ctx.saved_tensors
        gradient = gradients[0].to(jacobian.dtype).unsqueeze(-1)
        moved = torch.linalg.solve_triangular(jacobian.mT, gradient, upper=True).squeeze(-1)
        return None, -moved, None
