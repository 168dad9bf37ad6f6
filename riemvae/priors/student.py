"""A heavy-tailed prior."""

from __future__ import annotations

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from riemvae._checks import check_count
from riemvae._recipe import recipe
from riemvae.priors.parameters import FLOOR, Positive, Real, as_vector

MIN_DF = 1.0


@recipe
class StudentTPrior(nn.Module):
    """Independent Student-t coordinates, with degrees of freedom, location and scale learned or fixed.

    Args:
        latent_dim: ``d``.
        df: The (initial) degrees of freedom, a number or ``(d,)``; learned ones stay above 1 (Cauchy).
        loc: The (initial) location, a number or ``(d,)``.
        scale: The (initial) scale, a number or ``(d,)``.
        learn: Whether all three are trained.
        floor: What a learned scale stays above.

    Raises:
        ValueError: Shapes that do not fit, numbers that are not positive or below their floor.

    Source: Mathieu et al. (2019), Disentangling Disentanglement in Variational Autoencoders, section 4.

    Example:
        >>> StudentTPrior(2, df=4.0)().event_shape
        torch.Size([2])
    """

    def __init__(
        self,
        latent_dim: int,
        df: float | Tensor = 4.0,
        loc: float | Tensor = 0.0,
        scale: float | Tensor = 1.0,
        learn: bool = False,
        floor: float = FLOOR,
    ) -> None:
        super().__init__()
        d = self.latent_dim = check_count("latent_dim", latent_dim)
        self.learn, self.floor = learn, floor
        self.freedom = Positive("df", as_vector("df", df, d), learn, MIN_DF)
        self.location = Real(as_vector("loc", loc, d), learn)
        self.spread = Positive("scale", as_vector("scale", scale, d), learn, floor)

    @property
    def df(self) -> Tensor:
        """The degrees of freedom ``(d,)``."""
        return self.freedom()  # type: ignore[no-any-return]

    @property
    def loc(self) -> Tensor:
        """The location ``(d,)``."""
        return self.location()  # type: ignore[no-any-return]

    @property
    def scale(self) -> Tensor:
        """The scale ``(d,)``."""
        return self.spread()  # type: ignore[no-any-return]

    def forward(self) -> TorchDistribution:
        law = dist.StudentT(self.df, self.loc, self.scale, validate_args=False)
        return law.to_event(1)  # type: ignore[no-any-return]
