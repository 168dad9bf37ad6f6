"""An encoder of the observed visits as a set of pairs of a visit and its time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from riemvae._checks import check_choice, check_count
from riemvae._recipe import recipe
from riemvae.networks.layers import Heads, as_widths, dense
from riemvae.networks.sequence import SequenceEncoder, VisitRows

POOLINGS = ("mean", "attention")


@recipe
class SetEncoder(SequenceEncoder):
    """``(loc, scale) = ρ(pool_l φ(x_l, t_l), log n)`` over the ``n`` observed visits of a subject.

    The order of the visits does not matter, only their times. ``pooling="mean"`` averages; with
    ``"attention"`` each of ``num_heads`` learned queries weighs the visits by a softmax of its own, so that
    one visit can speak for the sequence. A subject without visits gets ``N(0, I)``.

    Args:
        features: Of one visit, a module ``(n, *shape) -> (n, h)`` or an encoder of ours; see
            :class:`~riemvae.networks.sequence.SequenceEncoder`, also for its errors.
        latent_dim: ``k``.
        hidden: Widths of the layers of ``φ`` on ``[features, time features, covariates]``, at least one.
        pooled_hidden: Widths of the layers of ``ρ``.
        pooling: ``"mean"`` or ``"attention"``.
        num_heads: Queries of the attention.
        time_features: A module of the times with ``num_features``; None is the time itself, which is the
            visit's number from 0 where there are no times.
        covariates: ``c``.
        activation: Of the hidden layers.
        num_features: ``h``; None where ``features`` says it.

    Raises:
        ValueError: As for :class:`~riemvae.networks.sequence.SequenceEncoder`; an unknown pooling or
            activation.

    Source: Zaheer et al. (2017), theorem 2; attention pooling: Lee et al. (2019), section 3.2.

    Example:
        >>> from riemvae.networks import MLPEncoder
        >>> encoder = SetEncoder(MLPEncoder(5, 2), latent_dim=2)
        >>> x, times = torch.randn(3, 4, 5), torch.rand(3, 4)
        >>> a, _ = encoder(x, None, None, times, None)
        >>> b, _ = encoder(x.flip(1), None, None, times.flip(1), None)
        >>> torch.allclose(a, b, atol=1e-5)
        True
    """

    def __init__(
        self,
        features: nn.Module,
        latent_dim: int,
        hidden: int | Sequence[int] = (128,),
        pooled_hidden: int | Sequence[int] = (128,),
        pooling: str = "mean",
        num_heads: int = 4,
        time_features: nn.Module | None = None,
        covariates: int = 0,
        activation: str = "relu",
        num_features: int | None = None,
    ) -> None:
        super().__init__(features, latent_dim, time_features, covariates, num_features)
        self.hidden = as_widths("hidden", hidden)
        self.pooled_hidden = as_widths("pooled_hidden", pooled_hidden)
        self.pooling = check_choice("pooling", pooling, POOLINGS)
        self.num_heads = check_count("num_heads", num_heads)
        self.activation = activation
        widths = (self.width, *self.hidden)
        self.layers = dense(widths, activation)
        attends = self.pooling == "attention"
        self.scores = nn.Linear(widths[-1], num_heads) if attends else None
        pooled = (widths[-1] * (num_heads if attends else 1) + 1, *self.pooled_hidden)
        self.pooled_layers = dense(pooled, activation)
        self.heads = Heads(pooled[-1], (), latent_dim, latent_dim, activation)

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
        pooled = pool(rows, self.layers(rows.features), self.scores)
        # The number of visits says how sure to be; its logarithm is 0 for the single visit.
        count = rows.observed.sum(1, keepdim=True).clamp_min(1).to(pooled.dtype)
        loc, log_variance = self.heads(self.pooled_layers(torch.cat([pooled, count.log()], -1)))
        return self.or_prior(loc, (0.5 * log_variance).exp(), rows.observed)


def pool(rows: VisitRows, values: Tensor, scores: nn.Module | None = None) -> Tensor:
    """The mean of ``values (n, w)`` over each subject's observed visits, or one weighted mean a query.

    Args:
        rows: The visits that the values are of.
        values: ``(n, w)``.
        scores: ``(n, w) -> (n, q)`` for the softmax over visits; None is the mean.

    Returns:
        ``(B, w)``, or ``(B, q w)``; zero for a subject without visits.
    """
    if scores is None:
        count = rows.observed.sum(1, keepdim=True).clamp_min(1)
        return rows.scatter(values).sum(1) / count
    logits = rows.scatter(scores(values))
    # A finite number: a subject without visits has even weights on zeros, and no NaN in the gradient.
    logits = torch.where(rows.observed.unsqueeze(-1), logits, torch.finfo(logits.dtype).min)
    weights = logits.softmax(1)
    return torch.einsum("btq,btw->bqw", weights, rows.scatter(values)).flatten(1)
