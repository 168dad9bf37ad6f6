"""Posteriors of a visit's latent as distributions of the subject's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from riemvae.flows.flow import moved
from riemvae.longitudinal.dynamics import Dynamics

_ONE = torch.Size()


class VisitPosterior:
    """``q(z_l | x_l)`` of many visits at once: an encoder's distribution, carried by flows.

    Args:
        base: Of all visits in one row, batch shape ``(n,)`` and event ``(d,)``.
        transforms: Applied to its draws in this order.
        shape: That of the visits, with ``n`` elements: ``(B,)`` or ``(T, B)``.
    """

    def __init__(self, base: TorchDistribution, transforms: Sequence[Any], shape: torch.Size) -> None:
        self.base, self.transforms, self.shape = base, list(transforms), torch.Size(shape)

    @property
    def dim(self) -> int:
        """``d``."""
        return self.base.event_shape[0]

    def rsample(self, sample_shape: torch.Size = _ONE) -> tuple[Tensor, Tensor]:
        """``z (*sample_shape, *shape, d)`` and its log densities ``(*sample_shape, *shape)``."""
        base: Any = self.base
        z = base.rsample(sample_shape) if base.has_rsample else base.sample(sample_shape)
        log_prob = base.log_prob(z)
        for transform in self.transforms:
            z, terms = moved(transform, z)
            log_prob = log_prob - terms
        lead = torch.Size(sample_shape) + self.shape
        return z.reshape(*lead, self.dim), log_prob.reshape(lead)

    def log_prob(self, z: Tensor) -> Tensor:
        """``log q(z_l | x_l)`` of ``z (..., *shape, d)``."""
        lead = z.shape[:-1]
        z = z.reshape(*lead[: len(lead) - len(self.shape)], -1, self.dim)
        total: Any = 0.0
        for transform in reversed(self.transforms):
            z, terms = moved(transform.inv, z)
            total = total + terms
        return (self.base.log_prob(z) + total).reshape(lead)


class Unseen(NamedTuple):
    """The subjects of whom nothing is seen, and what their latents follow.

    Attributes:
        subjects: ``(B,)``.
        prior: Batch shape ``()`` or ``(B,)``.
    """

    subjects: Tensor
    prior: TorchDistribution

    def draw(self, lead: torch.Size) -> Tensor:
        """``z_0 (*lead, B, d)``, for everybody; its density is the prior's, gradients included."""
        prior: Any = self.prior
        return prior.sample(lead if prior.batch_shape else (*lead, *self.subjects.shape))  # type: ignore[no-any-return]


class _Pulled(TorchDistribution):
    """A distribution of the subject's latent that remembers the density of its last draw.

    The draw has gone through the inverse of flows; evaluating it anew would go forward through them again.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        posterior: VisitPosterior,
        dynamics: Dynamics,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
        unseen: Unseen | None = None,
    ) -> None:
        self.posterior, self.dynamics = posterior, dynamics
        self.times, self.covariates, self.unseen = times, covariates, unseen
        self._drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(posterior.shape[-1:], torch.Size([posterior.dim]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TorchDistribution:
        """The same with more leading dimensions."""
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update({**self.__dict__, "_drawn": None})
        new._batch_shape = torch.Size(batch_shape)
        return new  # type: ignore[no-any-return]

    def rsample(self, sample_shape: Any = _ONE) -> Tensor:
        """``z_0 (*sample_shape, *batch, d)``."""
        lead = torch.Size(sample_shape) + self.batch_shape[:-1]
        z_0, log_prob = self._draw(lead)
        if self.unseen is not None:
            z_0 = torch.where(self.unseen.subjects.unsqueeze(-1), self.unseen.draw(lead), z_0)
            log_prob = self._or_prior(z_0, log_prob)
        self._drawn = z_0, log_prob
        return z_0

    def log_prob(self, value: Tensor) -> Tensor:
        """``log q(z_0)``, ``(...,)``."""
        if self._drawn is not None and value is self._drawn[0]:
            return self._drawn[1]
        return self._or_prior(value, self._log_prob(value))

    def _or_prior(self, z_0: Tensor, log_prob: Tensor) -> Tensor:
        if self.unseen is None:
            return log_prob
        return torch.where(self.unseen.subjects, self.unseen.prior.log_prob(z_0), log_prob)

    def _draw(self, lead: torch.Size) -> tuple[Tensor, Tensor]:
        """``z_0 (*lead, B, d)`` and the densities."""
        raise NotImplementedError

    def _log_prob(self, z_0: Tensor) -> Tensor:
        raise NotImplementedError


class AnchorPosterior(_Pulled):
    """``q_j(z_0)`` of one anchor a subject.

    Args:
        posterior: ``q(z_j | x_j)``, of shape ``(B,)``.
        dynamics: What carries ``z_j`` back.
        visit: The anchors ``(B,)``.
        times: Of all visits, ``(B, T)`` or None.
        covariates: ``(B, c)`` or None.
        unseen: Subjects of whom nothing is seen, and their prior; None is nobody.
    """

    def __init__(
        self,
        posterior: VisitPosterior,
        dynamics: Dynamics,
        visit: Tensor,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
        unseen: Unseen | None = None,
    ) -> None:
        self.visit = visit
        super().__init__(posterior, dynamics, times, covariates, unseen)

    def _draw(self, lead: torch.Size) -> tuple[Tensor, Tensor]:
        z, log_prob = self.posterior.rsample(lead)
        z_0, log_det = self.dynamics.rewind(z, self.visit, self.times, self.covariates)
        return z_0, log_prob - log_det

    def _log_prob(self, z_0: Tensor) -> Tensor:
        path = self.dynamics.unroll(z_0, self.times, self.covariates, log_det=True)
        z, log_det = at_visit(path.z, self.visit), at_visit(path.known_log_det.unsqueeze(-1), self.visit)
        return self.posterior.log_prob(z) + log_det.squeeze(-1)


class AnchorMixture(_Pulled):
    """``mean_k q_k(z_0)`` over the anchors of each subject, draws spread evenly over them.

    The ``s``-th of the draws of a subject with ``m`` anchors comes from anchor ``(s + r) mod m``, ``r`` drawn
    once for the subject: each draw by itself is one of the mixture, so that importance weights are unbiased,
    and where ``m`` divides their number they are the balance heuristic with equal shares.

    Args:
        posterior: ``q(z_k | x_k)``, of shape ``(T, B)``.
        dynamics: What carries draws back and forth.
        anchors: Which visits are components, ``(B, T)``, at least one a subject.
        times: ``(B, T)`` or None.
        covariates: ``(B, c)`` or None.
        unseen: Subjects of whom nothing is seen, and their prior; None is nobody.
    """

    def __init__(
        self,
        posterior: VisitPosterior,
        dynamics: Dynamics,
        anchors: Tensor,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
        unseen: Unseen | None = None,
    ) -> None:
        self.anchors = anchors
        super().__init__(posterior, dynamics, times, covariates, unseen)

    def _draw(self, lead: torch.Size) -> tuple[Tensor, Tensor]:
        every, _ = self.posterior.rsample(lead)
        visit = self._spread(lead)
        z_0, _ = self.dynamics.rewind(at_visit(every, visit), visit, self.times, self.covariates)
        return z_0, self._log_prob(z_0)

    def _spread(self, lead: torch.Size) -> Tensor:
        """Anchors ``(*lead, B)``."""
        device, (size, _) = self.anchors.device, self.anchors.shape
        order = torch.argsort(
            (~self.anchors).to(torch.uint8), dim=1, stable=True
        )  # a subject's anchors first
        count = self.anchors.sum(1)
        # A float is uniform enough: counts are small.
        offset = (torch.rand(size, device=device) * count).long()
        number = (torch.arange(lead.numel(), device=device)[:, None] + offset) % count
        return order.gather(1, number.T).T.reshape(*lead, size)

    def _log_prob(self, z_0: Tensor) -> Tensor:
        path = self.dynamics.unroll(z_0, self.times, self.covariates, log_det=True)
        terms = self.component_log_prob(path.z, path.known_log_det)
        return torch.logsumexp(terms, -2) - self.anchors.sum(1).to(terms.dtype).log()

    def component_log_prob(self, z: Tensor, log_det: Tensor) -> Tensor:
        """``log q_k(z_0)`` of all anchors ``(..., T, B)``, ``-inf`` at visits that are none."""
        terms = self.posterior.log_prob(z) + log_det
        return torch.where(self.anchors.T, terms, -torch.inf)


def at_visit(values: Tensor, visit: Tensor) -> Tensor:
    """One visit of each subject, ``values (..., T, B, d)`` and ``visit (..., B)`` to ``(..., B, d)``."""
    lead = values.shape[:-3]
    index = visit.expand(*lead, values.shape[-2])[..., None, :, None]
    return values.gather(-3, index.expand(*lead, 1, *values.shape[-2:])).squeeze(-3)
