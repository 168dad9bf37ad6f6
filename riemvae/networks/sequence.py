"""What every encoder of sequences shares: it sees the observed visits, with their times, and nothing else."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from riemvae._checks import argument_error, check_count
from riemvae._masks import check_mask, visits_seen
from riemvae.networks.layers import feature_module


class VisitRows(NamedTuple):
    """What is known of the observed visits of all subjects, one row each, subject after subject.

    Attributes:
        features: Of the visit, its time and its subject's covariates, ``(n, h + F + c)``.
        times: The visit's first time feature, ``(n,)``: what visits are ordered and gaps measured by.
        observed: Which visits the rows are, ``(B, T)``.
    """

    features: Tensor
    times: Tensor
    observed: Tensor

    def scatter(self, rows: Tensor) -> Tensor:
        """``rows (n, w)`` at their visits, ``(B, T, w)``; zero at missing ones."""
        empty = rows.new_zeros(*self.observed.shape, *rows.shape[1:])
        return empty.index_put(self.observed.nonzero(as_tuple=True), rows)


class SequenceEncoder(nn.Module):
    """An encoder of whole sequences, ``(x, observed, pixel_mask, times, covariates) -> (loc, scale)``.

    Only rows of observed visits enter a network: what a missing visit holds, its time included, changes
    neither outputs nor gradients. A subject without any gets ``N(0, I)``.

    Args:
        features: Of one visit, a module ``(n, *shape) -> (n, h)``; or an encoder with ``features`` and
            ``num_features`` such as :class:`~riemvae.networks.MLPEncoder`, whose layers before the heads are
            taken (shared with it, not copied). It sees zeros at masked pixels; where its second argument is
            required, or is named ``mask`` or ``pixel_mask``, it is told the mask ``(n, *shape)``.
        latent_dim: ``k``.
        time_features: A module ``(...) -> (..., F)`` of the times with ``num_features``; None is the time
            itself.
        covariates: ``c``, the number of covariates of a subject that the encoder is told.
        num_features: ``h``; None where ``features`` says it.

    Raises:
        ValueError: A size that is not a positive integer, an unknown number of features; in a call, masks,
            times or covariates that do not fit the data, times of observed visits that are not finite.
    """

    def __init__(
        self,
        features: nn.Module,
        latent_dim: int,
        time_features: nn.Module | None = None,
        covariates: int = 0,
        num_features: int | None = None,
    ) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.features, self.num_features = feature_module(features, num_features)
        self.time_features = time_features
        width = 1 if time_features is None else getattr(time_features, "num_features", None)
        if not isinstance(width, int):
            raise argument_error("time_features", "a module with num_features", time_features)
        self.covariates = check_count("covariates", covariates, minimum=0)
        self._takes_mask = _takes_mask(self.features)
        self._width = self.num_features + width + self.covariates

    @property
    def width(self) -> int:
        """The number of values in a row of :meth:`rows`."""
        return self._width

    def rows(
        self,
        x: Tensor,
        observed: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
    ) -> VisitRows:
        """The observed visits' features, times and covariates.

        Args:
            x: ``(B, T, *shape)``.
            observed: ``(B, T)``, True where the visit is seen; None is all of them.
            pixel_mask: ``(B, T, *shape)``, True where the value is seen; None is all of them. A visit of
                which nothing is left is not observed.
            times: ``(B, T)`` or ``(1, T)``; None is the visits' numbers from 0.
            covariates: ``(B, c)``; they do not enter an encoder that was built without.
        """
        if x.dim() < 3:
            raise argument_error("x", "sequences (B, T, *shape) with at least one value a visit", x)
        visits = x.shape[:2]
        if observed is None:
            observed = torch.ones(visits, dtype=torch.bool, device=x.device)
        check_mask("observed", observed, visits)
        mask = None
        if pixel_mask is not None:
            check_mask("pixel_mask", pixel_mask, x.shape)
            observed = visits_seen(observed, pixel_mask)
            mask = pixel_mask[observed]
        seen = x[observed]
        if mask is not None:
            seen = torch.where(mask, seen, 0.0)
        if self._takes_mask:
            features = self.features(seen, torch.ones_like(seen, dtype=torch.bool) if mask is None else mask)
        else:
            features = self.features(seen)
        if features.shape != (len(seen), self.num_features):
            expected = f"one that gives (n, {self.num_features})"
            raise argument_error("features", expected, f"one that gives {tuple(features.shape)}")
        time = self._time_rows(times, observed, features)
        parts = [features, time]
        if self.covariates:
            parts.append(self._covariate_rows(covariates, observed, features))
        return VisitRows(torch.cat(parts, -1), time[:, 0], observed)

    def _time_rows(self, times: Tensor | None, observed: Tensor, like: Tensor) -> Tensor:
        if times is None:
            times = torch.arange(observed.shape[1], device=like.device, dtype=like.dtype).expand_as(observed)
        elif (
            times.dim() != 2
            or times.shape[0] not in (1, len(observed))
            or times.shape[1] != observed.shape[1]
        ):
            raise argument_error("times", f"(B, T) = {tuple(observed.shape)}, one for each visit", times)
        rows = times.expand_as(observed)[observed]
        if not bool(torch.isfinite(rows).all()):
            raise argument_error("times", "finite times of the seen visits", "NaN or infinities among them")
        # Standardised in their own precision: dates in seconds have none left in that of the data.
        rows = rows if rows.is_floating_point() else rows.to(like.dtype)
        features = rows.unsqueeze(-1) if self.time_features is None else self.time_features(rows)
        return features.to(like.dtype)  # type: ignore[no-any-return]

    def _covariate_rows(self, covariates: Tensor | None, observed: Tensor, like: Tensor) -> Tensor:
        shape = (len(observed), self.covariates)
        if covariates is None or covariates.dim() != 2 or covariates.shape != shape:
            raise argument_error("covariates", f"a tensor {shape}, as the encoder was built", covariates)
        return covariates.to(like.dtype)[observed.nonzero(as_tuple=True)[0]]

    def or_prior(self, loc: Tensor, scale: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """``(loc, scale)``, or ``N(0, I)`` for a subject without observed visits."""
        known = observed.any(1, keepdim=True)
        return torch.where(known, loc, 0.0), torch.where(known, scale, 1.0)


def _takes_mask(features: nn.Module) -> bool:
    try:
        parameters = list(inspect.signature(features.forward).parameters.values())
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2:
        return False
    return positional[1].default is inspect.Parameter.empty or positional[1].name in ("mask", "pixel_mask")
