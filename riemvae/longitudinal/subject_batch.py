"""Some subjects with their model and guide: what draws of their latents are worth, and decode to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from riemvae._checks import argument_error
from riemvae.distributions.charts import is_all_of_space
from riemvae.distributions.gaussian_process import GaussianProcess
from riemvae.guides.log_joint import LogJoint, examine
from riemvae.inference.weights import draw_weights
from riemvae.longitudinal.anchor_posteriors import AnchorMixture, VisitPosterior
from riemvae.longitudinal.anchored import AnchoredGuide, anchorable_visits
from riemvae.longitudinal.model import LongitudinalVAE, masked_values
from riemvae.priors.fixed import without_validation

ARGUMENTS = ("x", "observed", "pixel_mask", "times", "covariates")

_PARTICLES = "num_particles_vectorized"
# The plates of a LongitudinalVAE are at dims -1 and -2.
_NESTING = 2


class SubjectBatch:
    """``B`` subjects, conditioned on what is seen of them.

    Only the observed visits are decoded where a likelihood is asked for. The times of unobserved visits are
    times to predict at: they move those predictions alone, except under a prior that is a process in time.

    Args:
        model: A :class:`LongitudinalVAE`.
        guide: Its guide.
        given: The model's arguments by name.
        shared: Values of global latents.
        pairs: Draws times subjects whose visits are decoded at once.

    Attributes:
        data: What is seen.
        size: ``B``.
        num_visits: ``T``.
        times: To predict at, ``(B, T)``, or None.
        undated: Visits without a finite time, ``(B, T)``, or None: nothing can be said of them.
        values: Which single values are seen, ``(B, T, *shape)``.
        empty: Subjects of whom nothing is seen, ``(B,)``.
    """

    def __init__(
        self,
        model: LongitudinalVAE,
        guide: Callable[..., Any],
        given: Mapping[str, Any],
        shared: Mapping[str, Tensor],
        pairs: int,
    ) -> None:
        self.model, self.guide = model, guide
        # All of them by name: an encoder of sequences is told that there are no times, say.
        self.given: dict[str, Any] = {name: given.get(name) for name in ARGUMENTS}
        self.shared, self.pairs = dict(shared), pairs
        raw, self.covariates = self.given["times"], self.given["covariates"]
        self.data = model.seen_part(self.given["x"], self.given["observed"], self.given["pixel_mask"], raw)
        self.size = len(self.data.x)
        self.num_visits = model.dynamics.count_visits(self.data.times)
        self.times, self.undated = self.data.times, None
        if raw is not None and self.data.times is not None:
            finite = torch.isfinite(raw)
            self.times = torch.where(finite, raw, self.data.times)
            self.undated = None if bool(finite.all()) else ~finite
        event = (1,) * (self.data.x.dim() - 2)
        self.values = self.data.observed.reshape(*self.data.observed.shape, *event).expand(self.data.x.shape)
        if self.data.pixel_mask is not None:
            self.values = self.values & self.data.pixel_mask
        self.empty = ~self.values.flatten(1).any(1)
        # The observed visits in one row, visits before subjects as in a trajectory.
        self._visit, self._subject = self.data.observed.T.nonzero(as_tuple=True)
        self._x = self.data.x.transpose(0, 1)[self._visit, self._subject]
        mask = self.data.pixel_mask
        self._mask = None if mask is None else mask.transpose(0, 1)[self._visit, self._subject]

    def rows(self, rows: slice) -> SubjectBatch:
        """Some of the subjects."""
        given = {k: v[rows] if isinstance(v, Tensor) else v for k, v in self.given.items()}
        return SubjectBatch(self.model, self.guide, given, self.shared, self.pairs)

    # -- densities ---------------------------------------------------------------------------------------

    def prior(self) -> Any:
        """``p(z_0)``, of the times to predict at where it depends on times."""
        with poutine.block(hide_types=["sample"]):
            return without_validation(self.model.prior_of(self.times))

    def log_likelihood(self, z_0: Tensor) -> Tensor:
        """``log p(what is seen | z_0)``, ``(S, B, k) -> (S, B)``."""
        z = self.model.trajectory(z_0, self.data.times, self.covariates)
        terms = z.new_zeros(z.shape[:-1])
        if len(self._visit):
            parameters = self.model.decode(z[:, self._visit, self._subject])
            likelihood = self.model.likelihood
            if self._mask is None:
                found = likelihood.log_prob(parameters, self._x, 2)
            else:
                found = masked_values(likelihood(parameters, 2), self._mask).log_prob(self._x)
            index = torch.arange(len(z), device=z.device)[:, None]
            terms = terms.index_put((index, self._visit, self._subject), found)
        return terms.sum(-2)

    def potential(self) -> Callable[[Tensor], Tensor]:
        """``-log p(z_0, what is seen)``, ``(S, B, k) -> (S, B)``.

        Raises:
            ValueError: A latent that is not free in all of space.
        """
        prior = self.prior()
        if not is_all_of_space(prior.support):
            raise argument_error(
                "method", "one that draws from the guide", f"a refinement of a latent on {prior.support}"
            )
        if type(self.model).forward is not LongitudinalVAE.forward:
            return self._traced()
        return lambda z_0: -self.log_likelihood(z_0) - prior.log_prob(z_0)

    def _traced(self) -> Callable[[Tensor], Tensor]:
        """The potential of a subclass with another ``forward``."""
        structure = examine(self.model, self.model.site, (), self.given)
        traced = LogJoint(self.model, structure, (), self.given, self.shared)
        return lambda z_0: traced(z_0.unsqueeze(-3)).reshape(z_0.shape[:-1])

    # -- draws -------------------------------------------------------------------------------------------

    def chunks(self, num: int, each: int = 1) -> Iterator[int]:
        """``num`` draws in parts, where each of a subject is ``each`` sequences to decode."""
        step = max(1, self.pairs // (self.size * each))
        for start in range(0, num, step):
            yield min(step, num - start)

    def anchors(self) -> Tensor:
        """The visits that may be anchors, ``(B, T)``."""
        return anchorable_visits(self.data.observed)

    def components(self) -> VisitPosterior:
        """``q(z_l | x_l)`` of all visits.

        Raises:
            ValueError: A guide that has no anchors.
        """
        return anchored(self.guide).visit_posterior(self.data)

    def prior_draws(self, num: int) -> Tensor:
        """``(num, B, k)``."""
        prior = self.prior()
        return prior.sample((num,) if prior.batch_shape == (self.size,) else (num, self.size))  # type: ignore[no-any-return]

    def guide_draws(self, num: int) -> Tensor:
        """``(num, B, k)``, as the guide draws them."""
        parts = []
        for n in self.chunks(num):
            guide = poutine.condition(self.guide, self.shared) if self.shared else self.guide
            with poutine.block(), pyro.plate(_PARTICLES, n, dim=-1 - _NESTING):
                trace = poutine.trace(guide).get_trace(**self.given)
            site: Any = trace.nodes[self.model.site]
            parts.append(self._at_times(site["value"].detach().reshape(n, self.size, -1)))
        return torch.cat(parts)

    def _at_times(self, z_0: Tensor) -> Tensor:
        """Draws of a guide as draws at the times to predict at, ``(n, B, k)``.

        A guide is told no times of unobserved visits. Under a Gaussian process the latents there are drawn
        anew, given those of the observed visits: the weights, which are of these, stay.
        """
        prior = self.prior()
        return prior.redraw(z_0, self.data.observed) if self._in_time(prior) else z_0

    def _in_time(self, prior: Any) -> bool:
        """Whether the latents are those of visits on a Gaussian process in time."""
        return isinstance(prior, GaussianProcess) and self.model.dynamics.num_visits is None

    def proposals(self, num: int) -> tuple[Tensor, Tensor]:
        """Draws ``(num, B, k)`` and their ``log p(z_0, what is seen) - log q(z_0)``, ``(num, B)``.

        From the mixture over all anchors where there are such, else from the guide.
        """
        drawn = self._from_anchors if isinstance(self.guide, AnchoredGuide) else self._from_guide
        parts = [*drawn(num)]
        z_0 = torch.cat([part[0] for part in parts])
        log_weights = torch.cat([part[1] for part in parts])
        return z_0, torch.where(torch.isnan(log_weights), -torch.inf, log_weights)

    def _from_anchors(self, num: int) -> Iterator[tuple[Tensor, Tensor]]:
        mixture = AnchorMixture(
            self.components(), self.model.dynamics, self.anchors(), self.data.times, self.covariates
        )
        prior = self.prior()
        for n in self.chunks(num):
            z_0 = mixture.rsample((n,))
            yield z_0, self.log_likelihood(z_0) + prior.log_prob(z_0) - mixture.log_prob(z_0)

    def _from_guide(self, num: int) -> Iterator[tuple[Tensor, Tensor]]:
        prior = self.prior()
        for n in self.chunks(num):
            with poutine.block():
                draw = draw_weights(self.model, self.guide, (), self.given, n, self.shared)
            site: Any = draw.model_trace.nodes[self.model.site]
            z_0 = site["value"].detach().reshape(n, self.size, -1)
            log_weights = draw.log_weights
            if self._in_time(prior):
                z_0 = self._at_times(z_0)
            else:  # the model takes the times of unobserved visits from the others
                other = site["fn"].log_prob(site["value"]).reshape(n, self.size)
                log_weights = log_weights + prior.log_prob(z_0) - other
            yield z_0, log_weights

    # -- decoding ----------------------------------------------------------------------------------------

    def decode(self, z_0: Tensor) -> Any:
        """The likelihood's parameters of all visits, ``(S, B, k)`` to leading dimensions ``(S, T, B)``."""
        return self.model.decode(self.model.trajectory(z_0, self.times, self.covariates))

    def dated(self, values: Tensor) -> Tensor:
        """``(..., B, T, *shape)`` with NaN at visits that have no time."""
        if self.undated is None:
            return values
        event = (1,) * (self.data.x.dim() - 2)
        return torch.where(self.undated.reshape(*self.undated.shape, *event), torch.nan, values)


def anchored(guide: Any) -> AnchoredGuide:
    """A guide that has anchors.

    Raises:
        ValueError: One that has none.
    """
    if not isinstance(guide, AnchoredGuide):
        raise argument_error(
            "method",
            "'importance', 'guide', 'map' or 'hmc' for a guide of whole sequences",
            f"'naive' or 'best', whose anchors {type(guide).__name__} lacks",
            "AnchoredGuide has them",
        )
    return guide


def arguments(data: Any) -> Any:
    """Data as a mapping by the model's names, None left out; data sets and loaders as they are."""
    if isinstance(data, Mapping):
        return {name: value for name, value in data.items() if value is not None}
    if isinstance(data, (tuple, list)) and data and hasattr(data[0], "shape"):
        if len(data) > len(ARGUMENTS):
            raise argument_error("data", f"at most {ARGUMENTS}", f"{len(data)} of them")
        return {name: value for name, value in zip(ARGUMENTS, data) if value is not None}
    return {"x": data} if isinstance(data, Tensor) or hasattr(data, "__array__") else data


def named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch's arguments by the model's names."""
    return {**dict(zip(ARGUMENTS, args)), **kwargs}
