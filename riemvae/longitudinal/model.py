"""The model of sequences: one latent a subject, a dynamics, and a likelihood of each visit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from pyro.poutine.util import is_validation_enabled
from torch import Tensor
from torch.distributions import Distribution

from riemvae import likelihoods
from riemvae._checks import argument_error, check_finite
from riemvae._recipe import recipe
from riemvae.autoencoder import Prior, decode_rows
from riemvae.geometry import Potential
from riemvae.likelihoods import Likelihood
from riemvae.longitudinal.dynamics import Dynamics
from riemvae.longitudinal.masks import Seen, seen
from riemvae.priors import FixedPrior, StandardNormal
from riemvae.priors.fixed import without_validation


@recipe
class LongitudinalVAE(PyroModule):
    """``z_0 ~ p(z_0)``, ``z_l`` by the dynamics, ``x_l ~ p(x | decoder(z_l))``: a Pyro model of sequences.

    ``model(x, observed)`` observes sequences ``(B, T, *shape)`` in the plates ``subjects`` (dim -1) and
    ``visits`` (dim -2); ``model(size=n)`` draws ``n`` sequences from the prior. The latent site bears the
    dynamics' name, ``z_0`` for flows between visits, and lies in ``subjects`` alone; the data site is ``x``.
    Missing visits and pixels are masked: whatever they hold, NaN included, changes nothing.

    Args:
        decoder: ``z (n, d) ->`` the likelihood's parameters of one visit; it knows no time.
        dynamics: From ``z_0 (..., B, k)`` to the latents ``(..., T, B, d)`` of all visits.
        prior: Of the subject's latent, event ``(k,)``: a fixed distribution, or a callable or module that
            returns one (called with the times where it has ``takes_times = True``). None is the standard
            normal.
        likelihood: A likelihood brick or its name. With pixel masks its data must be independent given the
            parameters.

    Raises:
        ValueError: A prior of another shape, an unknown likelihood; when called, masks that do not fit, data
            outside the support, covariates that are not finite, another number of visits than the dynamics
            has, no times where it needs them.

    Source: Chadebec (thesis), section 6.3.2.

    Example:
        >>> from torch.distributions import AffineTransform
        >>> from riemvae.longitudinal import FlowChain
        >>> dynamics = FlowChain([AffineTransform(0.0, 2.0)], latent_dim=2)
        >>> model = LongitudinalVAE(torch.nn.Linear(2, 5), dynamics)
        >>> model(size=3).shape
        torch.Size([3, 2, 5])
    """

    # Its data may hold NaN where the masks say that nothing is seen.
    takes_missing = True

    def __init__(
        self,
        decoder: Callable[[Tensor], Any],
        dynamics: Dynamics,
        prior: Prior = None,
        likelihood: str | Likelihood = "gaussian",
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.dynamics = dynamics
        if prior is None:
            if dynamics.base_dim is None:
                raise argument_error(
                    "prior",
                    "a prior of as many visits as there are times",
                    None,
                    "such as RepeatedPrior(StandardNormal(d))",
                )
            prior = StandardNormal(dynamics.base_dim)
        elif isinstance(prior, Distribution):
            prior = FixedPrior(prior)
        elif not callable(prior):
            raise argument_error("prior", "a distribution, or a callable or module that returns one", prior)
        self.prior = prior
        self.likelihood = likelihoods.by_name(likelihood) if isinstance(likelihood, str) else likelihood
        if isinstance(prior, FixedPrior):
            self._checked_prior(prior.distribution)
            _check_support(prior.distribution)

    @property
    def latent_dim(self) -> int:
        """``d``, the size of a visit's latent."""
        return self.dynamics.latent_dim

    @property
    def site(self) -> str:
        """The name of the latent site."""
        return self.dynamics.site

    def prior_of(self, times: Tensor | None = None) -> TorchDistribution:
        """The prior of the subjects' latent, batch shape ``()`` or ``(B,)``."""
        prior: Any = self.prior
        return self._checked_prior(prior(times) if getattr(prior, "takes_times", False) else prior())

    def _checked_prior(self, prior: Any) -> TorchDistribution:
        shape, size = getattr(prior, "event_shape", None), self.dynamics.base_dim
        if shape is None or len(shape) != 1 or (size is not None and shape != (size,)):
            raise argument_error(
                "prior",
                f"a distribution with event shape ({size},), as the dynamics takes",
                f"event shape {shape and tuple(shape)}",
            )
        return prior  # type: ignore[no-any-return]

    def trajectory(
        self, z_0: Tensor, times: Tensor | None = None, covariates: Tensor | None = None
    ) -> Tensor:
        """The latents of all visits, ``z_0 (..., B, k) -> (..., T, B, d)``."""
        return self.dynamics.unroll(z_0, times, covariates).z

    def decode(self, z: Tensor) -> Any:
        """The likelihood's parameters at ``z (..., d)``."""
        return decode_rows(self.decoder, z)

    def decoder_mean(self, z: Tensor) -> Tensor:
        """``E[x | z]`` at ``z (..., d)``."""
        return self.likelihood.mean(self.decode(z))  # type: ignore[no-any-return]

    def forward(
        self,
        x: Tensor | None = None,
        observed: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        times: Tensor | None = None,
        covariates: Tensor | None = None,
        *,
        size: int | None = None,
    ) -> Tensor:
        # Read once each, and always: reading a module is what registers its parameters with Pyro.
        likelihood, _, dynamics = self.likelihood, self.decoder, self.dynamics
        data: Seen | None = None
        if x is not None:
            data = self.seen_part(x, observed, pixel_mask, times)
            times, size = data.times, len(x)
            if is_validation_enabled():
                likelihood.validate(data.x)
                if covariates is not None:
                    check_finite("covariates", covariates, "impute them or add a column that says missing")
        elif size is None:
            size = 1 if times is None else len(times)
        elif times is not None and len(times) == 1:
            times = times.expand(size, -1)
        num_visits = dynamics.count_visits(times)
        prior = self.prior_of(times)
        subjects = pyro.plate("subjects", size, dim=-1)
        with subjects:
            z_0 = pyro.sample(self.site, prior)
        if z_0.dim() > 2:  # the place of the visits, which its plates lack
            z_0 = z_0.squeeze(-3)
        z = self.trajectory(z_0, times, covariates)
        with pyro.plate("visits", num_visits, dim=-2), subjects:
            distribution: Any = likelihood(self.decode(z), z.dim() - 1)
            if data is None:
                return pyro.sample("x", distribution).movedim(z.dim() - 3, z.dim() - 2)
            if x is not None and x.shape[2:] != distribution.event_shape:
                raise argument_error(
                    "x", f"visits of shape {tuple(distribution.event_shape)}, as the decoder gives", x
                )
            if data.pixel_mask is not None:
                distribution = masked_values(distribution, data.pixel_mask.transpose(0, 1))
            seen_visits: Any = data.observed.transpose(0, 1)
            with poutine.mask(mask=seen_visits):
                drawn = pyro.sample("x", distribution, obs=data.x.transpose(0, 1))
        return drawn.transpose(0, 1)

    def seen_part(
        self, x: Tensor, observed: Tensor | None, pixel_mask: Tensor | None, times: Tensor | None
    ) -> Seen:
        """The data with what is missing taken out of the way, checked against the dynamics' visits."""
        num_visits = self.dynamics.num_visits
        if x.dim() < 3 or (num_visits is not None and x.shape[1] != num_visits):
            raise argument_error(
                "x",
                f"sequences (B, {'T' if num_visits is None else num_visits}, *shape)",
                x,
                "put missing visits in and mask them with observed=",
            )
        return seen(x, observed, pixel_mask, times)

    def log_prob_visits(self, z: Tensor, data: Seen) -> Tensor:
        """``log p(x_l | z_l)`` of each visit, ``z (..., T, B, d) -> (..., T, B)``; zero at unseen ones."""
        parameters = self.decode(z)
        x = data.x.transpose(0, 1)
        if data.pixel_mask is None:
            terms = self.likelihood.log_prob(parameters, x, z.dim() - 1)
        else:
            distribution: Any = self.likelihood(parameters, z.dim() - 1)
            terms = masked_values(distribution, data.pixel_mask.transpose(0, 1)).log_prob(x)
        return torch.where(data.observed.transpose(0, 1), terms, 0.0)

    def latent_potential(
        self, latent: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Potential | None:
        """``-log p(x, z_0)`` without tracing, ``(..., B, k) -> (..., B)``; None in a changed subclass."""
        names = ("x", "observed", "pixel_mask", "times", "covariates")
        given = {**dict(zip(names, args)), **kwargs}
        x = given.get("x")
        if type(self).forward is not LongitudinalVAE.forward or latent != self.site or x is None:
            return None
        data = self.seen_part(x, given.get("observed"), given.get("pixel_mask"), given.get("times"))
        with poutine.block(hide_types=["sample"]):
            prior: Any = without_validation(self.prior_of(data.times))

        def potential(z_0: Tensor) -> Tensor:
            z = self.trajectory(z_0, data.times, given.get("covariates"))
            return -self.log_prob_visits(z, data).sum(-2) - prior.log_prob(z_0)

        return potential


def masked_values(distribution: Any, pixel_mask: Tensor) -> Any:
    """The distribution of one datum with some of its coordinates left out of the density."""
    event_dim = len(distribution.event_shape)
    base = getattr(distribution, "base_dist", None)
    if base is None or getattr(distribution, "reinterpreted_batch_ndims", None) != event_dim:
        raise argument_error(
            "pixel_mask",
            "None for a likelihood whose coordinates are not independent given the decoder's output",
            type(distribution).__name__,
            "mask whole visits with observed=",
        )
    return dist.Independent(dist.MaskedDistribution(base, pixel_mask), event_dim)


def _check_support(prior: Any) -> None:
    """Refuses a prior of positive latents or of a box: flows and encoders go everywhere."""
    try:
        everywhere = all(
            bool(prior.support.check(torch.full(prior.event_shape, v)).all()) for v in (-1e3, 1e3)
        )
    except NotImplementedError:
        return
    if not everywhere:
        raise argument_error("prior", "a distribution of all real vectors", f"support {prior.support}")
