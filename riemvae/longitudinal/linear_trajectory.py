"""Straight lines in the latent space: how fast a subject moves, how late, and what tells it from others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from riemvae._checks import argument_error, check_choice, check_count, check_last_dim, check_positive
from riemvae._recipe import recipe
from riemvae.longitudinal.dynamics import Dynamics, Trajectory
from riemvae.longitudinal.time_features import TimeFeatures, subject_times
from riemvae.networks.layers import Heads, as_widths, dense
from riemvae.networks.recurrent import RecurrentRows, in_order
from riemvae.networks.sequence import SequenceEncoder
from riemvae.networks.set_encoder import pool

SPATIAL = ("first", "all")


class TrajectoryParameters(NamedTuple):
    """A subject's line.

    Attributes:
        log_speed: ``η (...)``.
        delay: ``τ (...)``, the time at which the subject passes the origin of the first axis.
        spatial: ``λ (..., d - 1)``, what does not change with time.
    """

    log_speed: Tensor
    delay: Tensor
    spatial: Tensor


@recipe
class LinearTrajectory(Dynamics):
    r"""``l(t) = exp(η)(t - τ) e_1 + Σ_{k=2}^d λ_k e_k`` of a subject's latent ``z = (η, τ, λ_2, ..., λ_d)``.

    All subjects move along the first axis, each at its own speed and with its own delay; ``exp(η)(t - τ)`` is
    the subject's time on the common scale (:meth:`progression`), in the unit that :meth:`fit_times` sets.
    The other axes tell subjects apart and do not change. ``z`` has one coordinate more than a visit's latent:
    a visit does not determine it, and there is no ``rewind``.

    Args:
        latent_dim: ``d``.

    Raises:
        ValueError: A size that is not a positive integer; in a call, no times.

    Source: Chadebec, Huijben et al. (2022), thesis eq. 5.1; the framework is that of Louis et al. (2019).

    Example:
        >>> dynamics = LinearTrajectory(3)
        >>> z = torch.tensor([[0.0, 1.0, 5.0, 6.0]])
        >>> dynamics.unroll(z, torch.tensor([[0.0, 1.0, 4.0]])).z[:, 0].tolist()
        [[-1.0, 5.0, 6.0], [0.0, 5.0, 6.0], [3.0, 5.0, 6.0]]
    """

    covariates = 0

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.base_dim = self.latent_dim + 1
        self.unit = TimeFeatures(frequencies=0)

    def fit_times(self, times: Tensor, observed: Tensor | None = None) -> LinearTrajectory:
        """Centres and scales the time by that of the observed training visits ``(N, T)``.

        Delays have mean zero and speeds are about one in that unit, as the prior has them. Call it before
        training: another unit is another model.

        Raises:
            ValueError: No observed time, or one that is not finite.
        """
        self.unit.fit(times, observed)
        return self

    def split(self, z_0: Tensor) -> TrajectoryParameters:
        """``η``, ``τ`` and ``λ`` of ``z_0 (..., d + 1)``."""
        check_last_dim("z_0", z_0, self.base_dim)
        return TrajectoryParameters(z_0[..., 0], z_0[..., 1], z_0[..., 2:])

    def progression(self, z_0: Tensor, times: Tensor) -> Tensor:
        """``exp(η)(t - τ)``: each subject's times on the common scale.

        Args:
            z_0: ``(..., B, d + 1)``.
            times: ``(B, T)``.

        Returns:
            ``(..., B, T)``.
        """
        line = self.split(z_0)
        elapsed = self.unit(subject_times(times, z_0)).squeeze(-1).to(z_0.dtype) - line.delay.unsqueeze(-1)
        return line.log_speed.exp().unsqueeze(-1) * elapsed

    def unroll(
        self,
        z_0: Tensor,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
        *,
        log_det: bool = False,
    ) -> Trajectory:
        """The points of the lines at ``times (B, T)``; covariates do not enter.

        Raises:
            ValueError: No times, or a log-determinant is asked for.
        """
        if log_det:
            raise argument_error(
                "log_det",
                "False: the map from the subject's latent to a visit's is not a bijection",
                True,
                "use a guide on the subject's latent, such as GaussianGuide with a TrajectoryEncoder",
            )
        self.count_visits(times)
        along = self.progression(z_0, subject_times(times, z_0)).mT.unsqueeze(-1)
        spatial = self.split(z_0).spatial.unsqueeze(-3)
        return Trajectory(torch.cat([along, spatial.expand(*along.shape[:-1], -1)], -1))


def trajectory_prior(latent_dim: int, sigma_eta: float = 1.0, sigma_tau: float = 1.0) -> TorchDistribution:
    """``η ~ N(0, σ_η²)``, ``τ ~ N(0, σ_τ²)``, ``λ ~ N(0, I)``, independent: the prior of a line.

    Args:
        latent_dim: ``d``; the event has ``d + 1`` coordinates.
        sigma_eta: Standard deviation of the log speed.
        sigma_tau: Standard deviation of the delay, in units of the times. It is centred at 0: centre the
            times.

    Raises:
        ValueError: A size that is not a positive integer, a scale that is not positive.

    Source: Chadebec (thesis), section 5.2.2.

    Example:
        >>> trajectory_prior(3, sigma_eta=0.5, sigma_tau=2.0).stddev
        tensor([0.5000, 2.0000, 1.0000, 1.0000])
    """
    scale = _prior_scale(latent_dim, sigma_eta, sigma_tau)
    return dist.Normal(torch.zeros_like(scale), scale).to_event(1)  # type: ignore[no-any-return]


def _prior_scale(latent_dim: int, sigma_eta: float, sigma_tau: float) -> Tensor:
    check_count("latent_dim", latent_dim)
    check_positive("sigma_eta", sigma_eta)
    check_positive("sigma_tau", sigma_tau)
    return torch.cat([torch.tensor([sigma_eta, sigma_tau]), torch.ones(latent_dim - 1)])


@recipe
class TrajectoryEncoder(SequenceEncoder):
    """``q(η, τ, λ | x)``, a factorised normal: one network for speed and delay, one for what is constant.

    ``η`` and ``τ`` come from a recurrent network over the observed visits in the order of their times. ``λ``
    comes from the features of the first of them (``spatial="first"``, the thesis's: one image then suffices),
    or of all, averaged after the hidden layers (``"all"``). Both are told the times.

    The networks give ``η`` and ``τ`` in units of their prior's standard deviations. A subject without visits
    gets the prior.

    Args:
        features: Of one visit, a module ``(n, *shape) -> (n, h)`` or an encoder of ours; ``nn.Flatten()``
            with ``num_features`` for features or clinical scores as they are. See
            :class:`~riemvae.networks.sequence.SequenceEncoder`, also for its errors.
        latent_dim: ``d``; the posterior has ``d + 1`` coordinates.
        spatial: ``"first"`` or ``"all"``.
        spatial_hidden: Widths of the layers for ``λ``.
        hidden_size: Of the recurrent state.
        num_layers: Recurrent layers.
        recurrent_hidden: Widths of the layers after it.
        cell: ``"elman"`` (tanh) or ``"gru"``.
        sigma_eta: Standard deviation of ``η`` under the prior.
        sigma_tau: Standard deviation of ``τ`` under the prior.
        time_features: A module of the times with ``num_features``; None is the time itself.
        covariates: ``c``.
        activation: Of the hidden layers.
        num_features: ``h``; None where ``features`` says it.

    Raises:
        ValueError: As for :class:`~riemvae.networks.sequence.SequenceEncoder`; an unknown choice.

    Source: Chadebec (thesis), section 5.2.2; the sizes are those of table 5.4. The table does not say how the
        network of ``η`` and that of ``τ`` are related: here they share all but the last layer.

    Example:
        >>> encoder = TrajectoryEncoder(nn.Flatten(), latent_dim=3, num_features=4, hidden_size=16)
        >>> x, times = torch.randn(5, 6, 4), torch.arange(6.0).expand(5, 6)
        >>> loc, scale = encoder(x, None, None, times, None)
        >>> loc.shape, scale.shape
        (torch.Size([5, 4]), torch.Size([5, 4]))
    """

    prior_scale: Tensor

    def __init__(
        self,
        features: nn.Module,
        latent_dim: int,
        spatial: str = "first",
        spatial_hidden: int | Sequence[int] = (512, 128),
        hidden_size: int = 512,
        num_layers: int = 3,
        recurrent_hidden: int | Sequence[int] = (128,),
        cell: str = "elman",
        sigma_eta: float = 1.0,
        sigma_tau: float = 1.0,
        time_features: nn.Module | None = None,
        covariates: int = 0,
        activation: str = "relu",
        num_features: int | None = None,
    ) -> None:
        super().__init__(features, latent_dim, time_features, covariates, num_features)
        self.spatial = check_choice("spatial", spatial, SPATIAL)
        self.spatial_hidden = as_widths("spatial_hidden", spatial_hidden)
        self.hidden_size, self.num_layers, self.cell = hidden_size, num_layers, cell
        self.recurrent_hidden = as_widths("recurrent_hidden", recurrent_hidden)
        self.activation = activation
        self.sigma_eta, self.sigma_tau = sigma_eta, sigma_tau
        self.register_buffer("prior_scale", _prior_scale(latent_dim, sigma_eta, sigma_tau), persistent=False)
        self.recurrent = RecurrentRows(self.width, hidden_size, num_layers, cell, backward=False)
        widths = (hidden_size, *self.recurrent_hidden)
        self.recurrent_layers = dense(widths, activation)
        self.line_heads = Heads(widths[-1], (), 2, 2, activation)
        size = self.latent_dim - 1
        widths = (self.width, *self.spatial_hidden)
        self.spatial_layers = dense(widths, activation) if size else None
        self.spatial_heads = Heads(widths[-1], (), size, size, activation) if size else None

    def forward(
        self,
        x: Tensor,
        observed: Tensor | None,
        pixel_mask: Tensor | None,
        times: Tensor | None,
        covariates: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """``(B, T, *shape) -> ((B, d + 1), (B, d + 1))``."""
        rows = self.rows(x, observed, pixel_mask, times, covariates)
        loc, log_variance = self.line_heads(self.recurrent_layers(self.recurrent(rows)))
        if self.spatial_layers is not None and self.spatial_heads is not None:
            if self.spatial == "first":
                subject, place = in_order(rows)
                first = self.spatial_layers(rows.features[place == 0])
                empty = first.new_zeros(len(x), first.shape[-1])
                pooled = empty.index_put((subject[place == 0],), first)
            else:
                pooled = pool(rows, self.spatial_layers(rows.features))
            spatial = self.spatial_heads(pooled)
            loc = torch.cat([loc, spatial[0]], -1)
            log_variance = torch.cat([log_variance, spatial[1]], -1)
        loc, scale = self.or_prior(loc, (0.5 * log_variance).exp(), rows.observed)
        return self.prior_scale * loc, self.prior_scale * scale
