"""What is kept of the weights of each datum as they pass by: sums, and the largest few."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from riemvae.inference.pareto import pareto_smooth, tail_size

# The fitted shape of the tail up to which the variance of the weights is believed to be finite.
_LARGEST_SHAPE = 0.49


class WeightSums:
    """Reduces log weights ``l = log w`` as they come, in memory that their number hardly enters.

    Kept are the ``3√S + 1`` largest weights of each datum, for the tail, and sums over the others of ``w``,
    ``w²`` and ``w l``, relative to the largest so far; and over all draws the sums of ``l`` and ``l²``, for
    the evidence lower bound and for the error of its gap. No sum cancels another, so that the tail can be
    exchanged for a smoothed one however much of the total it is.

    Args:
        num_samples: The most draws a datum that will come.

    Example:
        >>> sums = WeightSums(100)
        >>> for part in torch.zeros(100, 3).split(30):
        ...     sums.add(part)
        >>> sums.result()["log_prob"]
        tensor([0., 0., 0.], dtype=torch.float64)
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self._keep = tail_size(num_samples) + 1
        self._count = 0
        self._columns: dict[str, Tensor] = {}  # each (B,), but "largest" (<= keep, B), in descending order

    def add(self, log_weights: Tensor) -> None:
        """Takes draws ``(s, B)`` in."""
        new = log_weights.double()
        batch = new.shape[1]
        if not self._columns:
            zero = new.new_zeros(batch)
            # Near the log weights, so that their squares do not cancel.
            reference = _finite(new.max(0).values)
            names = ("weight", "square", "product", "log", "log_square", "lost")
            self._columns = dict.fromkeys(names, zero)
            self._columns.update(reference=reference, top=reference, largest=new.new_zeros(0, batch))
        c = self._columns
        self._count += len(new)
        pool = torch.cat([c["largest"], new]).sort(0, descending=True).values
        top = _finite(pool[0])
        # Before the first finite weight there was nothing to subtract and nothing was summed.
        shrink = torch.where(c["weight"] > 0.0, (c["top"] - top).exp(), 0.0)
        weight, square, product = _sums(pool[self._keep :], top, c["reference"])
        centred = new - c["reference"]
        self._columns = {
            "largest": pool[: self._keep],
            "top": top,
            "reference": c["reference"],
            "weight": c["weight"] * shrink + weight,
            "square": c["square"] * shrink.square() + square,
            "product": c["product"] * shrink + product,
            "log": c["log"] + centred.sum(0),
            "log_square": c["log_square"] + centred.square().sum(0),
            "lost": c["lost"] + torch.isneginf(new).sum(0),
        }

    def select(self, rows: Tensor) -> WeightSums:
        """The sums of some of the data, to which more draws can be added."""
        chosen = WeightSums(self.num_samples)
        chosen._count = self._count
        chosen._columns = {name: value[..., rows] for name, value in self._columns.items()}
        return chosen

    def result(self, smooth: bool = False) -> dict[str, Tensor]:
        """Estimates and errors of each datum, ``(B,)``: the numbers of a ``LogLikelihood``.

        Args:
            smooth: Exchange the largest weights for their Pareto-smoothed ones.

        Raises:
            RuntimeError: No weights were added.
        """
        if not self._count:
            raise RuntimeError("no weights were added")
        c, s = self._columns, self._count
        top, reference = c["top"], c["reference"]
        size = tail_size(s) + 1  # of those that are kept: fewer draws may have come than were announced
        tail = c["largest"][:size]
        smoothed, khat = pareto_smooth(tail)
        body = _sums(c["largest"][size:], top, reference)
        end = _sums(tail, top, reference, smoothed if smooth else None)
        first, second, product = (
            c[name] + a + b for name, a, b in zip(("weight", "square", "product"), body, end)
        )
        ess = first.square() / second
        # Of the weights over their mean, of the log weights, and of both: variances over the draws.
        weight_variance = (s / ess - 1.0).clamp_min(0.0)
        unseen = s * _unseen_square(tail, top, khat) / first.square()
        log_mean = c["log"] / s
        log_variance = (c["log_square"] / s - log_mean.square()).clamp_min(0.0)
        covariance = product / first - log_mean
        gap_variance = (weight_variance + log_variance - 2.0 * covariance).clamp_min(0.0)
        log_prob = top + first.log() - math.log(s)
        return {
            "log_prob": log_prob,
            "mcse": self._error(weight_variance),
            "ess": torch.nan_to_num(ess, nan=0.0),
            "khat": khat,
            "num_diverged": c["lost"].long(),
            "elbo": reference + log_mean,
            "elbo_mcse": self._error(log_variance),
            "kl_gap_mcse": self._error(gap_variance),
            "tail_mcse": self._error(weight_variance + unseen),
        }

    def _error(self, variance: Tensor) -> Tensor:
        """The standard error of a mean of draws with this variance; NaN of a single one."""
        if self._count == 1:
            return torch.full_like(variance, math.nan)
        return (variance / (self._count - 1)).sqrt()


def _unseen_square(tail: Tensor, top: Tensor, khat: Tensor) -> Tensor:
    """How much ``Σ y²`` of the exceedances ``y`` falls short of what their fitted tail expects, ``(B,)``.

    A sum of squares lacks the rare large weights on which a heavy tail's variance stands, most of all in the
    samples that look harmless: intervals then cover too seldom. The generalised Pareto distribution with mean
    ``m`` and shape ``k`` has ``E[y²] = 2 m² (1-k)/(1-2k)``. Light tails, ``k̂ <= 0``, are left as they are.
    """
    shape = khat.clamp(0.0, _LARGEST_SHAPE)  # from 1/2 on the second moment is infinite
    if len(tail) < 2:
        return torch.zeros_like(khat)
    exceedances = (tail[:-1] - top).exp() - (tail[-1] - top).exp()
    mean = exceedances.mean(0)
    expected = len(exceedances) * 2.0 * mean.square() * (1.0 - shape) / (1.0 - 2.0 * shape)
    missing = (expected - exceedances.square().sum(0)).clamp_min(0.0)
    return torch.where(khat > 0.0, missing, 0.0)


def _finite(top: Tensor) -> Tensor:
    """The largest log weight, zero where all are ``-inf``: something to subtract."""
    return torch.where(torch.isfinite(top), top, 0.0)


def _sums(
    log_weights: Tensor, top: Tensor, reference: Tensor, smoothed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``Σ w``, ``Σ w²`` and ``Σ w (l - reference)`` over ``(n, B)``, with ``w`` over the largest weight."""
    weights = ((log_weights if smoothed is None else smoothed) - top).exp()
    product = torch.where(weights > 0.0, weights * (log_weights - reference), 0.0)
    return weights.sum(0), weights.square().sum(0), product.sum(0)
