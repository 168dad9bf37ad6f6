"""A normal prior with any covariance."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from riemvae._checks import check_count, check_last_dim
from riemvae._recipe import recipe
from riemvae.priors.parameters import FLOOR, LowerTriangle, Real, as_vector


@recipe
class FullCovarianceNormal(nn.Module):
    """``N(μ, L Lᵀ)`` on ``ℝᵈ``, with ``μ`` and the lower-triangular ``L`` learned or fixed.

    With an affine first layer in the decoder a learned ``μ`` and ``L`` add nothing to the model; they do for
    a prior that is compared, penalised or read.

    Args:
        latent_dim: ``d``.
        loc: The (initial) mean, a number or ``(d,)``.
        scale_tril: The (initial) Cholesky factor ``(d, d)`` of the covariance; None is the identity.
        learn: Whether mean and factor are trained.
        floor: What a learned diagonal of ``L`` stays above.

    Raises:
        ValueError: Shapes that do not fit, a factor that is not lower triangular or whose diagonal is not
            above the floor.

    Example:
        >>> prior = FullCovarianceNormal(2, scale_tril=torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
        >>> prior().covariance_matrix.detach()
        tensor([[1.0000, 0.5000],
                [0.5000, 1.2500]])
    """

    def __init__(
        self,
        latent_dim: int,
        loc: float | Tensor = 0.0,
        scale_tril: Tensor | None = None,
        learn: bool = True,
        floor: float = FLOOR,
    ) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.learn, self.floor = learn, floor
        self.location = Real(as_vector("loc", loc, latent_dim), learn)
        if scale_tril is None:
            scale_tril = torch.eye(latent_dim)
        check_last_dim("scale_tril", scale_tril, latent_dim)
        self.factor = LowerTriangle("scale_tril", scale_tril, learn, floor)

    @property
    def loc(self) -> Tensor:
        """The mean ``(d,)``."""
        return self.location()  # type: ignore[no-any-return]

    @property
    def scale_tril(self) -> Tensor:
        """The Cholesky factor ``(d, d)`` of the covariance."""
        return self.factor()  # type: ignore[no-any-return]

    def forward(self) -> TorchDistribution:
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)
