"""Models whose latent is a whole sequence: a dynamics that does nothing, and a prior of each visit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, Normal, constraints

from riemvae._checks import argument_error, check_count, check_last_dim
from riemvae._recipe import recipe
from riemvae.distributions.charts import is_all_of_space
from riemvae.longitudinal.dynamics import Dynamics, Trajectory
from riemvae.priors import FixedPrior


@recipe
class VisitLatents(Dynamics):
    """Each visit has a latent of its own, and the subject's latent is all of them: ``k = T d``.

    What ties the visits together, if anything does, is the prior:
    :class:`~riemvae.priors.GaussianProcessPrior` makes the GP-VAE, :class:`RepeatedPrior` a VAE a visit, as
    does the default ``N(0, I)``. Guides are made by
    :class:`~riemvae.longitudinal.GaussianProcessEncoder` and :class:`~riemvae.longitudinal.VisitEncoder`.

    Args:
        num_visits: ``T`` of numbered visits; None takes that of the times, for a prior that is called with
            them (``base_dim`` is then None).
        latent_dim: ``d``.

    Raises:
        ValueError: Numbers that are no counts; when called, a latent whose size is not ``T d``.

    Source: Fortuin, Baranchuk, Rätsch and Mandt (2020), section 3.

    Example:
        >>> VisitLatents(3, 2).unroll(torch.arange(6.0).reshape(1, 6)).z[:, 0].tolist()
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    """

    covariates = 0

    def __init__(self, num_visits: int | None, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.num_visits = None if num_visits is None else check_count("num_visits", num_visits)
        self.base_dim = None if num_visits is None else num_visits * latent_dim  # type: ignore[assignment]

    def unroll(
        self,
        z_0: Tensor,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
        *,
        log_det: bool = False,
    ) -> Trajectory:
        """``(..., B, T d)`` as ``(..., T, B, d)``; of the times only the number enters.

        Raises:
            ValueError: Another size, or ``log_det=True``: a visit's latent is a part of the subject's.
        """
        refuse_log_det(self, log_det)
        num_visits = self.count_visits(times)
        check_last_dim("z_0", z_0, num_visits * self.latent_dim)
        return Trajectory(z_0.reshape(*z_0.shape[:-1], num_visits, self.latent_dim).transpose(-3, -2))


def refuse_log_det(dynamics: Dynamics, log_det: bool) -> None:
    """Refuses to give log-determinants of maps that are no bijections."""
    if log_det:
        raise argument_error(
            "log_det",
            f"False: the visits of {type(dynamics).__name__} are no bijections of the latent",
            log_det,
        )


class VisitProduct(TorchDistribution):
    """Independent visits that share one distribution of ``d`` numbers: a distribution of ``T d`` numbers.

    Args:
        base: Batch shape ``()``, event ``(d,)``.
        num_visits: ``T``.

    Raises:
        ValueError: A base with a batch, with another event, or not on all of ``ℝᵈ``.

    Example:
        >>> import pyro.distributions as dist
        >>> VisitProduct(dist.Normal(torch.zeros(2), 1.0).to_event(1), 3).sample((5,)).shape
        torch.Size([5, 6])
    """

    arg_constraints = {}
    support = constraints.real_vector

    def __init__(self, base: TorchDistribution, num_visits: int) -> None:
        if len(base.event_shape) != 1 or len(base.batch_shape) != 0 or not is_all_of_space(base.support):
            raise argument_error(
                "prior",
                "a distribution on all of ℝᵈ with batch shape () and event shape (d,)",
                f"shapes {tuple(base.batch_shape)} and {tuple(base.event_shape)} on {base.support}",
            )
        self.base, self.num_visits = base, check_count("num_visits", num_visits)
        self.has_rsample = bool(base.has_rsample)
        size = self.num_visits * base.event_shape[0]
        super().__init__(torch.Size(), torch.Size([size]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> VisitProduct:
        """The same with another batch shape."""
        new = self._get_checked_instance(VisitProduct, _instance)
        new.base, new.num_visits, new.has_rsample = self.base, self.num_visits, self.has_rsample
        super(VisitProduct, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``sample_shape + batch_shape + (T d,)``, differentiable."""
        return self.base.rsample(self._rows(sample_shape)).flatten(-2)  # type: ignore[no-any-return]

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``sample_shape + batch_shape + (T d,)``."""
        return self.base.sample(self._rows(sample_shape)).flatten(-2)  # type: ignore[no-any-return]

    def _rows(self, sample_shape: Any) -> torch.Size:
        return torch.Size([*sample_shape, *self.batch_shape, self.num_visits])

    def log_prob(self, value: Tensor) -> Tensor:
        """The sum over visits, ``(..., T d) -> (...)``."""
        check_last_dim("value", value, self.event_shape[0])
        visits = value.reshape(*value.shape[:-1], self.num_visits, -1)
        total = self.base.log_prob(visits).sum(-1)
        return total.expand(torch.broadcast_shapes(total.shape, self.batch_shape))


class SeenVisits(TorchDistribution):
    """Independent visits, normal where they were seen and of one law where not: a distribution of ``T d``.

    Args:
        loc: ``(B, T, d)``.
        scale: The same shape.
        observed: Which visits were seen, ``(B, T)``.
        law: Of the others: batch shape ``()``, event ``(d,)``.

    Example:
        >>> import pyro.distributions as dist
        >>> loc, observed = torch.zeros(4, 3, 2), torch.tensor([True, False, True]).expand(4, 3)
        >>> law = dist.Normal(torch.ones(2), 1.0).to_event(1)
        >>> SeenVisits(loc, torch.ones(4, 3, 2), observed, law).mean[0].tolist()
        [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    """

    arg_constraints = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, observed: Tensor, law: Any) -> None:
        self.seen: Any = Normal(loc, scale, validate_args=False)
        self.observed, self.law = observed, law
        super().__init__(loc.shape[:1], torch.Size([loc[0].numel()]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SeenVisits:
        """The same with more leading dimensions."""
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        new._batch_shape = torch.Size(batch_shape)
        return new  # type: ignore[no-any-return]

    def _joined(self, seen: Tensor, others: Tensor) -> Tensor:
        return torch.where(self.observed.unsqueeze(-1), seen, others).flatten(-2)

    @property
    def mean(self) -> Tensor:
        """``(B, T d)``."""
        return self._joined(self.seen.mean, self.law.mean).expand(*self.batch_shape, -1)

    @property
    def variance(self) -> Tensor:
        """``(B, T d)``."""
        return self._joined(self.seen.variance, self.law.variance).expand(*self.batch_shape, -1)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``sample_shape + batch_shape + (T d,)``, differentiable where visits were seen."""
        lead = torch.Size(sample_shape) + self.batch_shape[:-1]
        law: Any = self.law
        return self._joined(self.seen.rsample(lead), law.sample((*lead, *self.observed.shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """The sum over visits, ``(..., T d) -> (...)``."""
        check_last_dim("value", value, self.event_shape[0])
        visits = value.reshape(*value.shape[:-1], self.observed.shape[1], -1)
        terms = torch.where(self.observed, self.seen.log_prob(visits).sum(-1), self.law.log_prob(visits))
        return terms.sum(-1).expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))


@recipe
class RepeatedPrior(nn.Module):
    """One prior of ``d`` numbers at each visit, independently: with a VAMP prior, a VAMP-VAE a visit.

    Args:
        prior: A fixed distribution on ``ℝᵈ`` with event ``(d,)``, or a callable or module that returns one.
        num_visits: ``T`` of numbered visits; None: called with the times, whose number it follows.

    Raises:
        ValueError: What is neither; when called, a distribution that is not on all of ``ℝᵈ`` or has a batch,
            no times where they are needed.

    Example:
        >>> from riemvae.priors import StandardNormal
        >>> RepeatedPrior(StandardNormal(2), 3)().event_shape
        torch.Size([6])
    """

    def __init__(
        self, prior: TorchDistribution | Callable[[], TorchDistribution], num_visits: int | None = None
    ) -> None:
        super().__init__()
        if isinstance(prior, Distribution):
            prior = FixedPrior(prior)
        elif not callable(prior):
            raise argument_error("prior", "a distribution, or a callable or module that returns one", prior)
        self.prior = prior
        self.num_visits = None if num_visits is None else check_count("num_visits", num_visits)

    @property
    def takes_times(self) -> bool:
        """Whether it is called with the times of the visits."""
        return self.num_visits is None

    def forward(self, times: Tensor | None = None) -> VisitProduct:
        """The product over visits, event ``(T d,)``; of ``times (B, T)`` only the number enters."""
        num_visits = self.num_visits
        if num_visits is None:
            if times is None:
                raise argument_error("times", "the times of the visits, (B, T)", None, "pass times=")
            num_visits = times.shape[-1]
        law: Any = self.prior()
        return VisitProduct(law, num_visits)
