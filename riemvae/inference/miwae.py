"""The mean of several importance-weighted bounds."""

from __future__ import annotations

from torch import Tensor

from riemvae._checks import check_count
from riemvae._recipe import recipe
from riemvae.inference.weighted import WeightedObjective, group_bounds


@recipe
class MIWAE(WeightedObjective):
    """The mean of ``M`` importance-weighted bounds of ``K`` draws each: ``1/M Σ_m log 1/K Σ_k w_mk``.

    ``MIWAE(1, K)`` is ``IWAE(K)`` and ``MIWAE(M, 1)`` the ELBO of ``M`` draws. A draw whose integration
    diverged has weight zero, a bound all of whose draws did is left out of the mean.

    Args:
        num_bounds: ``M``.
        num_samples: ``K``.
        gradient: ``"standard"``, ``"sticking"`` or ``"doubly"``, as for :class:`IWAE`.

    Raises:
        ValueError: What :class:`IWAE` raises.

    Source: Rainforth, Kosiorek, Le, Maddison, Igl, Wood and Teh (2018), section 5.

    Example:
        >>> MIWAE(num_bounds=4, num_samples=8).num_bounds
        4
    """

    def __init__(self, num_bounds: int = 4, num_samples: int = 10, gradient: str = "standard") -> None:
        super().__init__(gradient)
        self.num_bounds = check_count("num_bounds", num_bounds)
        self.num_samples = check_count("num_samples", num_samples)

    @property
    def _groups(self) -> tuple[int, int]:
        return self.num_bounds, self.num_samples

    def _bound(self, log_weights: Tensor, failed: Tensor | None) -> Tensor:
        return group_bounds(log_weights, failed)
