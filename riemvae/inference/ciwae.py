"""The combination of the evidence lower bound with the importance-weighted one."""

from __future__ import annotations

import torch
from torch import Tensor

from riemvae._checks import check_count
from riemvae._recipe import recipe
from riemvae.inference.scheduled import ScheduledObjective
from riemvae.inference.schedules import Schedule, as_schedule
from riemvae.inference.weighted import WeightedObjective, group_bounds, group_weights, mean_log_weight


@recipe
class CIWAE(ScheduledObjective, WeightedObjective):
    """``β · 1/S Σ_s log w_s + (1 - β) log 1/S Σ_s w_s``: a bound between the ELBO and the IWAE.

    ``β`` is not learned: the importance-weighted term is the larger one for any draws, so a learned ``β``
    would go to zero.

    Args:
        num_samples: ``S``.
        mixing: ``β`` in [0, 1], a number or a schedule; 1 is the ELBO, 0 the IWAE.
        gradient: ``"standard"``, ``"sticking"`` or ``"doubly"``, as for :class:`IWAE`.

    Raises:
        ValueError: A mixing outside [0, 1]; what :class:`IWAE` raises.

    Source: Rainforth, Kosiorek, Le, Maddison, Igl, Wood and Teh (2018), section 5.

    Example:
        >>> CIWAE(num_samples=5, mixing=0.05).mixing
        0.05
    """

    def __init__(
        self, num_samples: int = 10, mixing: float | Schedule = 0.5, gradient: str = "standard"
    ) -> None:
        ScheduledObjective.__init__(self)
        WeightedObjective.__init__(self, gradient)
        self.num_samples = check_count("num_samples", num_samples)
        self.mixing = mixing
        self._schedules["mixing"] = as_schedule("mixing", mixing, 0.0, 1.0)

    @property
    def _groups(self) -> tuple[int, int]:
        return 1, self.num_samples

    def _bound(self, log_weights: Tensor, failed: Tensor | None) -> Tensor:
        mixing = self._now("mixing")
        mean, tight = mean_log_weight(log_weights, failed), group_bounds(log_weights, failed)
        return mixing * mean + (1.0 - mixing) * tight

    def _path_factor(self, log_weights: Tensor, failed: Tensor | None) -> Tensor:
        # The ELBO's share of a draw's coefficient stays as it is, the other is weighed once more.
        mixing, weights = self._now("mixing"), group_weights(log_weights)
        kept = torch.ones_like(weights) if failed is None else (~failed).to(weights)
        even = mixing * kept / kept.sum(1, keepdim=True).clamp_min(1.0)
        tight = (1.0 - mixing) * weights
        return torch.nan_to_num((even + tight * weights) / (even + tight), nan=0.0)
