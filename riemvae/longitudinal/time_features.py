"""What a dynamics is told of the time of a visit and of its subject: features of the time, covariates."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from riemvae._checks import argument_error, check_count, check_positive
from riemvae._recipe import recipe


@recipe
class TimeFeatures(nn.Module):
    """``t -> (τ, sin ωτ, cos ωτ, sin 2ωτ, cos 2ωτ, ...)`` of the standardised time ``τ = (t - loc) / scale``.

    ``loc`` and ``scale`` are buffers, 0 and 1 until :meth:`fit` takes them from the training times. They are
    set once, before training: another scale would be another model. The frequencies are low, so that what is
    learnt between visits is smooth.

    Args:
        frequencies: The number of sines, and of cosines; 0 leaves ``τ`` alone.
        period: Of the slowest sine, in units of ``scale``: ``ω = 2π / period``. Much longer than the training
            times spread, it is no claim that anything repeats.

    Raises:
        ValueError: A number that is no count, a period that is not positive.

    Example:
        >>> features = TimeFeatures(frequencies=1, period=4.0).fit(torch.tensor([[1.0, 3.0]]))
        >>> features(torch.tensor([2.0, 3.0])).round(decimals=3).tolist()  # τ = 0 and 1
        [[0.0, 0.0, 1.0], [1.0, 1.0, -0.0]]
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, frequencies: int = 2, period: float = 8.0) -> None:
        super().__init__()
        self.frequencies = check_count("frequencies", frequencies, minimum=0)
        check_positive("period", period)
        self.period = float(period)
        self.register_buffer("loc", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @property
    def num_features(self) -> int:
        """``F``, the number of features."""
        return 1 + 2 * self.frequencies

    @torch.no_grad()
    def fit(self, times: Tensor, observed: Tensor | None = None) -> TimeFeatures:
        """Sets ``loc`` and ``scale`` to the mean and the standard deviation of the observed times.

        Args:
            times: ``(B, T)``; those that are not observed may hold anything.
            observed: ``(B, T)`` of booleans; None where all are.

        Returns:
            Itself. The scale stays 1 where all times are the same.

        Raises:
            ValueError: No observed time, or one that is not finite.
        """
        known = observed_times(times, observed).double()
        spread = float(known.std(correction=0))
        self.loc.copy_(known.mean())
        # What is left by the rounding of equal times is no spread.
        self.scale.fill_(spread if spread > 1e-12 * (1.0 + float(known.abs().max())) else 1.0)
        return self

    def forward(self, times: Tensor) -> Tensor:
        """``(...) -> (..., F)``."""
        # The buffers have no dimensions: the dtype is that of the times.
        tau = ((times - self.loc) / self.scale).unsqueeze(-1)
        orders = torch.arange(1, self.frequencies + 1, device=tau.device, dtype=tau.dtype)
        angle = (2.0 * math.pi / self.period) * tau * orders
        waves = torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)
        return torch.cat([tau, waves], -1)


def observed_times(times: Tensor, observed: Tensor | None = None) -> Tensor:
    """The observed ones of ``times (B, T)`` as a vector.

    Raises:
        ValueError: None are observed, one that is not finite, or a mask of another shape.
    """
    if observed is not None and observed.shape != times.shape:
        raise argument_error("observed", f"a mask of the shape of times, {tuple(times.shape)}", observed)
    known = times.flatten() if observed is None else times[observed.bool()]
    if len(known) == 0:
        raise argument_error("times", "at least one observed time", times)
    if not bool(torch.isfinite(known).all()):
        raise argument_error(
            "times", "finite times of the observed visits", times, "say in `observed` which are missing"
        )
    return known


def subject_times(times: Tensor | None, z: Tensor) -> Tensor:
    """Real ``times (B, T)`` for the subjects of ``z (..., B, d)``.

    Raises:
        ValueError: None, or those of another number of subjects.
    """
    expected = f"a tensor ({z.shape[-2]}, T), the times of the visits of each subject"
    if times is None or times.dim() != 2 or times.shape[0] not in (1, z.shape[-2]):
        raise argument_error("times", expected, times)
    # Integers as real numbers; real numbers keep their precision until they are standardised.
    times = times if times.is_floating_point() else times.to(z.dtype)
    return times.expand(z.shape[-2], -1)


def visit_times(times: Tensor, visit: Tensor) -> Tensor:
    """The time of visit ``visit (..., B)`` of each subject, from ``times (B, T)``."""
    return times[torch.arange(len(times), device=times.device), visit]


def check_subjects(covariates: Tensor | None, number: int) -> None:
    """Refuses ``covariates (B, c)`` of another number of subjects."""
    if covariates is not None and covariates.dim() > 1 and covariates.shape[-2] not in (1, number):
        raise argument_error("covariates", f"a tensor ({number}, c), one row a subject", covariates)


def with_covariates(features: Tensor, covariates: Tensor | None, expected: int) -> Tensor:
    """``features (..., B, F)`` and ``covariates (..., B, c)`` side by side; without any where none enter.

    Raises:
        ValueError: Covariates that are expected and missing, or of another number.
    """
    if expected == 0:
        return features
    if covariates is None or covariates.shape[-1] != expected:
        raise argument_error("covariates", f"a tensor (B, {expected}), as the dynamics was built", covariates)
    shape = torch.broadcast_shapes(features.shape[:-1], covariates.shape[:-1])
    parts = [part.expand(*shape, part.shape[-1]) for part in (features, covariates.to(features))]
    return torch.cat(parts, -1)
