"""The posterior of a subject as a product: the prior times one Gaussian factor of each observed visit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from riemvae._recipe import recipe
from riemvae.networks.layers import Heads, as_widths, dense
from riemvae.networks.sequence import SequenceEncoder


@recipe
class ProductOfExperts(SequenceEncoder):
    r"""``q(z | x) ∝ N(z; 0, I) ∏_l N(z; μ(x_l, t_l), 1/π(x_l, t_l))`` over the observed visits.

    .. math:: σ^{-2} = 1 + \sum_l π_l, \qquad μ = σ^2 \sum_l π_l μ_l

    One network gives each visit's expert from the visit, its time and the covariates, so the order of the
    visits does not matter, each visit can only make the posterior narrower, and without any it is the prior
    exactly. It is the right form where the latent is normal and the decoder linear.

    Args:
        features: Of one visit, a module ``(n, *shape) -> (n, h)`` or an encoder of ours; see
            :class:`~riemvae.networks.sequence.SequenceEncoder`, also for its errors.
        latent_dim: ``k``.
        hidden: Widths of the layers between ``[features, time features, covariates]`` and the expert's mean
            and log precision.
        time_features: A module of the times with ``num_features``; None is the time itself, which is the
            visit's number from 0 where there are no times.
        covariates: ``c``.
        activation: Of the hidden layers.
        num_features: ``h``; None where ``features`` says it.

    Raises:
        ValueError: As for :class:`~riemvae.networks.sequence.SequenceEncoder`; an unknown activation.

    Source: Hinton (2002); with the prior as one expert: Wu and Goodman (2018), section 2.2.

    Example:
        >>> from riemvae.networks import MLPEncoder
        >>> encoder = ProductOfExperts(MLPEncoder(5, 2), latent_dim=2)
        >>> x, observed = torch.randn(3, 4, 5), torch.tensor([[True] * 4, [True, False] * 2, [False] * 4])
        >>> loc, scale = encoder(x, observed, None, None, None)
        >>> loc[2].tolist(), scale[2].tolist(), bool((scale[:2] < 1).all())
        ([0.0, 0.0], [1.0, 1.0], True)
    """

    def __init__(
        self,
        features: nn.Module,
        latent_dim: int,
        hidden: int | Sequence[int] = (128,),
        time_features: nn.Module | None = None,
        covariates: int = 0,
        activation: str = "relu",
        num_features: int | None = None,
    ) -> None:
        super().__init__(features, latent_dim, time_features, covariates, num_features)
        self.hidden = as_widths("hidden", hidden)
        self.activation = activation
        widths = (self.width, *self.hidden)
        self.layers = dense(widths, activation)
        self.heads = Heads(widths[-1], (), latent_dim, latent_dim, activation)

    def forward(
        self,
        x: Tensor,
        observed: Tensor | None,
        pixel_mask: Tensor | None,
        times: Tensor | None,
        covariates: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """``(B, T, *shape) -> ((B, k), (B, k))``."""
        rows = self.rows(x, observed, pixel_mask, times, covariates)
        loc, log_precision = self.heads(self.layers(rows.features))
        precision = log_precision.exp()
        sums = rows.scatter(torch.stack([precision, precision * loc], 1)).sum(1)
        total = 1.0 + sums[:, 0]
        return sums[:, 1] / total, total.rsqrt()
