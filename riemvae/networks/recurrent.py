"""An encoder of the observed visits one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from riemvae._checks import check_choice, check_count
from riemvae._recipe import recipe
from riemvae.networks.layers import Heads, as_widths, dense
from riemvae.networks.sequence import SequenceEncoder, VisitRows

CELLS: dict[str, Any] = {"elman": nn.RNN, "gru": nn.GRU}


class RecurrentRows(nn.Module):
    """A recurrent network over each subject's observed visits: its last state, ``(B, hidden_size)``.

    The visits come in the order of their times, equal ones and those without times in the order of the data.
    Missing ones are left out, not fed as zeros: sequences are packed. Each step is also told the time since
    the step before, 0 at the first.

    Args:
        size: Number of values in a row.
        hidden_size: Of the state.
        num_layers: Recurrent layers on each other.
        cell: ``"elman"`` (tanh) or ``"gru"``.
        backward: Whether it runs from the last visit to the first.
    """

    def __init__(self, size: int, hidden_size: int, num_layers: int, cell: str, backward: bool) -> None:
        super().__init__()
        self.backward = bool(backward)
        network = CELLS[check_choice("cell", cell, list(CELLS))]
        self.network = network(
            size + 1,
            check_count("hidden_size", hidden_size),
            check_count("num_layers", num_layers),
            batch_first=True,
        )

    def forward(self, rows: VisitRows) -> Tensor:
        """The last state of the last layer; that of one step on zeros where there are no visits."""
        observed = rows.observed
        lengths = observed.sum(1)
        subject, place = in_order(rows)
        rank = lengths[subject] - 1 - place if self.backward else place
        steps = int(lengths.max()) if len(lengths) else 0
        inputs = torch.cat([rows.features, rows.times.unsqueeze(-1)], -1)
        empty = inputs.new_zeros(len(observed), max(steps, 1), inputs.shape[-1])
        padded = empty.index_put((subject, rank), inputs)
        # The last column is the time: what a step is told is how long ago the step before was.
        gaps = torch.zeros_like(padded[..., -1:])
        gaps[:, 1:] = (padded[:, 1:, -1:] - padded[:, :-1, -1:]).abs()
        padded = torch.cat([padded[..., :-1], gaps], -1)
        packed = pack_padded_sequence(
            padded, lengths.clamp_min(1).cpu(), batch_first=True, enforce_sorted=False
        )
        _, state = self.network(packed)
        return state[-1]  # type: ignore[no-any-return]


def in_order(rows: VisitRows) -> tuple[Tensor, Tensor]:
    """Of each row: its subject, and its place (from 0) among the subject's visits by time, ``(n,)`` each."""
    observed = rows.observed
    times = torch.where(observed, rows.scatter(rows.times.detach()), torch.inf)
    place = times.argsort(dim=1, stable=True).argsort(dim=1)
    return observed.nonzero(as_tuple=True)[0], place[observed]


@recipe
class RecurrentEncoder(SequenceEncoder):
    """``(loc, scale)`` from the last state of a recurrent network over the observed visits.

    Each step sees ``[features, time features, covariates, gap]``, the gap being the time since the step
    before (in units of the first time feature). Visits go in the order of their times, missing ones are left
    out. A subject without visits gets ``N(0, I)``.

    Args:
        features: Of one visit, a module ``(n, *shape) -> (n, h)`` or an encoder of ours; see
            :class:`~riemvae.networks.sequence.SequenceEncoder`, also for its errors.
        latent_dim: ``k``.
        hidden_size: Of the state.
        num_layers: Recurrent layers on each other.
        hidden: Widths of the layers between the last state and the heads.
        cell: ``"elman"`` (tanh) or ``"gru"``.
        backward: Whether it runs from the last visit to the first, so that it ends at the start of the
            sequence.
        time_features: A module of the times with ``num_features``; None is the time itself, which is the
            visit's number from 0 where there are no times.
        covariates: ``c``.
        activation: Of the ``hidden`` layers.
        num_features: ``h``; None where ``features`` says it.

    Raises:
        ValueError: As for :class:`~riemvae.networks.sequence.SequenceEncoder`; an unknown cell or activation.

    Source: Elman (1990) with three layers: Chadebec (2023), table 5.4; backward in time: Rubanova, Chen and
        Duvenaud (2019), section 3.

    Example:
        >>> from riemvae.networks import MLPEncoder
        >>> encoder = RecurrentEncoder(MLPEncoder(5, 2), latent_dim=2, hidden_size=16)
        >>> x, observed = torch.randn(3, 4, 5), torch.rand(3, 4) < 0.5
        >>> loc, scale = encoder(x, observed, None, None, None)
        >>> loc.shape, scale.shape
        (torch.Size([3, 2]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        features: nn.Module,
        latent_dim: int,
        hidden_size: int = 128,
        num_layers: int = 3,
        hidden: int | Sequence[int] = (128,),
        cell: str = "elman",
        backward: bool = False,
        time_features: nn.Module | None = None,
        covariates: int = 0,
        activation: str = "relu",
        num_features: int | None = None,
    ) -> None:
        super().__init__(features, latent_dim, time_features, covariates, num_features)
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.hidden = as_widths("hidden", hidden)
        self.cell, self.backward = cell, bool(backward)
        self.activation = activation
        self.recurrent = RecurrentRows(self.width, hidden_size, num_layers, cell, backward)
        widths = (hidden_size, *self.hidden)
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
        loc, log_variance = self.heads(self.layers(self.recurrent(rows)))
        return self.or_prior(loc, (0.5 * log_variance).exp(), rows.observed)
