"""Priors on the simplex and on positive numbers."""

from __future__ import annotations

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from riemvae._checks import check_count
from riemvae._recipe import recipe
from riemvae.priors.parameters import FLOOR, Positive, Real, as_vector


@recipe
class DirichletPrior(nn.Module):
    """A Dirichlet on the simplex of ``d`` shares: a latent that says how much of each part.

    A guide works in the ``d - 1`` unconstrained coordinates of stick breaking: the encoder gives a posterior
    of event ``(d - 1,)`` while the decoder sees the ``d`` shares.

    Args:
        latent_dim: ``d >= 2``, the number of shares.
        concentration: The (initial) concentration, a number or ``(d,)``; 1 is uniform, less is sparse.
        learn: Whether it is trained.
        floor: What a learned concentration stays above.

    Raises:
        ValueError: One share, a concentration that is not positive, of another shape or below its floor.

    Example:
        >>> DirichletPrior(3)().sample().sum().round(decimals=4)
        tensor(1.)
    """

    def __init__(
        self, latent_dim: int, concentration: float | Tensor = 1.0, learn: bool = False, floor: float = FLOOR
    ) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim, 2, "one share is always 1")
        self.learn, self.floor = learn, floor
        start = as_vector("concentration", concentration, latent_dim)
        self.strength = Positive("concentration", start, learn, floor)

    @property
    def concentration(self) -> Tensor:
        """The concentration ``(d,)``."""
        return self.strength()  # type: ignore[no-any-return]

    def forward(self) -> TorchDistribution:
        return dist.Dirichlet(self.concentration, validate_args=False)


@recipe
class LogNormalPrior(nn.Module):
    """Independent log-normal coordinates, positive; a guide works with their logarithms.

    Args:
        latent_dim: ``d``.
        loc: The (initial) mean of the logarithm, a number or ``(d,)``.
        scale: Its (initial) standard deviation, a number or ``(d,)``.
        learn: Whether both are trained.
        floor: What a learned scale stays above.

    Raises:
        ValueError: Shapes that do not fit, a scale that is not positive or below its floor.

    Example:
        >>> bool((LogNormalPrior(2)().sample((5,)) > 0).all())
        True
    """

    def __init__(
        self,
        latent_dim: int,
        loc: float | Tensor = 0.0,
        scale: float | Tensor = 1.0,
        learn: bool = False,
        floor: float = FLOOR,
    ) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.learn, self.floor = learn, floor
        self.location = Real(as_vector("loc", loc, latent_dim), learn)
        self.spread = Positive("scale", as_vector("scale", scale, latent_dim), learn, floor)

    @property
    def loc(self) -> Tensor:
        """The mean of the logarithm ``(d,)``."""
        return self.location()  # type: ignore[no-any-return]

    @property
    def scale(self) -> Tensor:
        """The standard deviation of the logarithm ``(d,)``."""
        return self.spread()  # type: ignore[no-any-return]

    def forward(self) -> TorchDistribution:
        return dist.LogNormal(self.loc, self.scale, validate_args=False).to_event(1)  # type: ignore[no-any-return]


@recipe
class GammaPrior(nn.Module):
    """Independent gamma coordinates, positive.

    Args:
        latent_dim: ``d``.
        concentration: The (initial) shape, a number or ``(d,)``; below 1 the density has a pole at zero.
        rate: The (initial) rate, a number or ``(d,)``.
        learn: Whether both are trained.
        floor: What learned numbers stay above.

    Raises:
        ValueError: Shapes that do not fit, numbers that are not positive or below their floor.

    Example:
        >>> GammaPrior(2, concentration=2.0)().mean
        tensor([2., 2.])
    """

    def __init__(
        self,
        latent_dim: int,
        concentration: float | Tensor = 1.0,
        rate: float | Tensor = 1.0,
        learn: bool = False,
        floor: float = FLOOR,
    ) -> None:
        super().__init__()
        d = self.latent_dim = check_count("latent_dim", latent_dim)
        self.learn, self.floor = learn, floor
        self.strength = Positive("concentration", as_vector("concentration", concentration, d), learn, floor)
        self.speed = Positive("rate", as_vector("rate", rate, d), learn, floor)

    @property
    def concentration(self) -> Tensor:
        """The shape ``(d,)``."""
        return self.strength()  # type: ignore[no-any-return]

    @property
    def rate(self) -> Tensor:
        """The rate ``(d,)``."""
        return self.speed()  # type: ignore[no-any-return]

    def forward(self) -> TorchDistribution:
        law = dist.Gamma(self.concentration, self.rate, validate_args=False)
        return law.to_event(1)  # type: ignore[no-any-return]
