"""Numbered visits for irregular times: each visit at the nearest of given times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from riemvae._checks import argument_error
from riemvae._recipe import recipe
from riemvae.longitudinal.dynamics import Dynamics, Trajectory
from riemvae.longitudinal.time_features import subject_times


@recipe
class NearestBins(Dynamics):
    """A dynamics of numbered visits, told times: a visit is that of the nearest bin.

    Visits of one subject in the same bin share its latent; none is dropped, as they would be if the data were
    moved to a grid.

    Args:
        dynamics: Of numbered visits, one a bin.
        bins: Their times, increasing.

    Raises:
        ValueError: Another number of bins than the dynamics has visits, bins out of order.

    Example:
        >>> from torch.distributions import AffineTransform
        >>> from riemvae.longitudinal import FlowChain
        >>> binned = NearestBins(FlowChain([AffineTransform(1.0, 1.0)], 1), (0.0, 1.0))
        >>> binned.unroll(torch.zeros(1, 1), torch.tensor([[0.1, 0.4, 0.9]])).z.flatten().tolist()
        [0.0, 0.0, 1.0]
    """

    bins: Tensor

    def __init__(self, dynamics: Dynamics, bins: Sequence[float]) -> None:
        super().__init__()
        times = torch.tensor([float(time) for time in bins])
        if dynamics.num_visits != len(times) or bool((times.diff() <= 0).any()):
            raise argument_error("bins", f"{dynamics.num_visits} increasing times", times)
        self.dynamics = dynamics
        self._bins = tuple(bins)
        self.register_buffer("bins", times, persistent=False)
        self.site, self.invertible = dynamics.site, dynamics.invertible
        self.base_dim, self.latent_dim = dynamics.base_dim, dynamics.latent_dim

    def nearest(self, times: Tensor) -> Tensor:
        """The bin of each visit, ``(B, T)``."""
        return (times.unsqueeze(-1) - self.bins.to(times)).abs().argmin(-1)

    def unroll(
        self,
        z_0: Tensor,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
        *,
        log_det: bool = False,
    ) -> Trajectory:
        """The latents of the visits' bins."""
        bins = self.nearest(subject_times(times, z_0)).T
        every = self.dynamics.unroll(z_0, None, covariates, log_det=log_det)
        subjects = torch.arange(bins.shape[1], device=bins.device)
        z = every.z[..., bins, subjects, :]
        return Trajectory(z, None if every.log_det is None else every.log_det[..., bins, subjects])

    def rewind(
        self,
        z: Tensor,
        visit: Tensor,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """From the bin of that visit."""
        bins = self.nearest(subject_times(times, z))
        subjects = torch.arange(len(bins), device=bins.device)
        return self.dynamics.rewind(z, bins[subjects, visit], None, covariates)
