"""A normal prior whose mean and scale are latent themselves, and a guide of such global sites."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.nn import PyroModule
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to, constraints

from riemvae._checks import argument_error, check_count, check_positive
from riemvae._recipe import recipe
from riemvae._seeding import kept_generators
from riemvae.distributions.charts import is_all_of_space
from riemvae.priors.fixed import FixedPrior

_POSITIVE = (constraints.positive, constraints.nonnegative)


@recipe
class HierarchicalNormal(PyroModule):
    r"""``z ~ N(μ, diag σ²)`` given ``μ`` and ``σ``, which have priors of their own (hyperpriors).

    .. math:: \mu \sim p(\mu), \quad \sigma \sim p(\sigma), \quad z_b \mid \mu, \sigma \sim N(\mu, \sigma^2)

    Its forward samples the global sites ``prior_loc`` and ``prior_scale`` (or ``prior_precision``), each with
    event ``(d,)``, outside the data plate, and returns the normal given them: all data of a model share one
    draw. A guide of the model needs something to say of them; :meth:`guide` makes a mean-field one:

    ``GaussianGuide(model, encoder, given=prior.guide())``

    Hyperpriors mean something where the decoder is fixed or penalised: the first layer of a decoder that is
    trained freely can shift and scale the latent as well.

    Args:
        latent_dim: ``d``.
        loc: The distribution of the coordinates of ``μ``, with batch and event shape ``()``, or that of the
            vector, with event ``(d,)``; or a number that they are fixed at. None is ``N(0, 1)``.
        scale: Likewise of ``σ``, on positive numbers: a half-normal, half-Cauchy, log-normal... None is the
            half-normal of scale 1.
        precision: Likewise of ``1/σ²`` in its place, a gamma say.
        name: The prefix of the sites.

    Raises:
        ValueError: Both ``scale`` and ``precision``, distributions of another shape, with trainable tensors,
            or of numbers that need not be positive; no site at all.

    Source: Gelman (2006), for the half-Cauchy and half-normal on a scale.

    Example:
        >>> prior = HierarchicalNormal(2, scale=dist.HalfCauchy(1.0))
        >>> poutine.trace(prior).get_trace().stochastic_nodes
        ['prior_loc', 'prior_scale']
        >>> prior().event_shape
        torch.Size([2])
    """

    def __init__(
        self,
        latent_dim: int,
        loc: TorchDistribution | float | None = None,
        scale: TorchDistribution | float | None = None,
        precision: TorchDistribution | float | None = None,
        name: str = "prior",
    ) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim)
        if scale is not None and precision is not None:
            raise argument_error("precision", "None where scale is given", precision, "pass one of them")
        if not isinstance(name, str) or not name:
            raise argument_error("name", "the prefix of the sites' names", name)
        self.loc, self.scale, self.precision, self.name = loc, scale, precision, name
        loc = dist.Normal(0.0, 1.0) if loc is None else loc
        scale = dist.HalfNormal(1.0) if scale is None else scale
        self.loc_law = self._law("loc", loc)
        self.width_law = (
            self._law("scale", scale, True) if precision is None else self._law("precision", precision, True)
        )
        if not any(isinstance(law, FixedPrior) for law in (self.loc_law, self.width_law)):
            raise argument_error(
                "loc, scale",
                "a distribution for at least one of them",
                "numbers for both",
                "use a fixed normal as the prior",
            )

    def _law(self, name: str, value: Any, positive: bool = False) -> nn.Module:
        if not isinstance(value, Distribution):
            if positive:
                check_positive(name, value)
            elif not isinstance(value, (int, float)) or not math.isfinite(value):
                raise argument_error(name, "a distribution or a finite number", value)
            return _Number(float(value))
        law: Any = value
        shapes = (tuple(law.batch_shape), tuple(law.event_shape))
        if shapes == ((), ()):
            law = law.expand((self.latent_dim,)).to_event(1)
        elif shapes != ((), (self.latent_dim,)):
            raise argument_error(
                name,
                f"a distribution of one coordinate, or of a vector with event shape ({self.latent_dim},)",
                f"batch shape {shapes[0]} and event shape {shapes[1]}",
                "use .to_event(1)",
            )
        support = getattr(law.support, "base_constraint", law.support)
        if positive and not any(type(support) is type(known) for known in _POSITIVE):
            raise argument_error(
                name, "a distribution of positive numbers, such as a HalfNormal", f"one on {support}"
            )
        return FixedPrior(law)

    def _value(self, site: str, law: nn.Module) -> Tensor:
        return pyro.sample(f"{self.name}_{site}", law()) if isinstance(law, FixedPrior) else law()

    def forward(self) -> TorchDistribution:
        """The normal given the global sites, batch shape ``()`` (or that of an outer plate)."""
        loc = self._value("loc", self.loc_law)
        if self.precision is None:
            scale = self._value("scale", self.width_law)
        else:
            scale = self._value("precision", self.width_law).rsqrt()
        shape = torch.broadcast_shapes(loc.shape, scale.shape, (self.latent_dim,))
        return dist.Normal(loc.expand(shape), scale.expand(shape)).to_event(1)

    def guide(self, init_scale: float = 0.1) -> GlobalGuide:
        """A mean-field guide of the global sites, for ``given=``; each call makes a new one.

        Args:
            init_scale: Its standard deviations at the start, in unconstrained coordinates.
        """
        return GlobalGuide(self, init_scale)


class _Number(nn.Module):
    """A constant that moves with its module."""

    value: Tensor

    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(value), persistent=False)

    def forward(self) -> Tensor:
        return self.value


@recipe
class GlobalGuide(PyroModule):
    r"""A mean-field guide of the global sites that a prior samples.

    A site with support ``S`` is ``T(u)``, ``u ~ N(m, diag s²)`` with ``T = biject_to(S)`` from unconstrained
    coordinates: a normal where the site is real, a log-normal where it is positive. It starts at the medians
    of the sites. It ignores its arguments, which are the model's.

    Args:
        prior: A prior that samples continuous global sites: :class:`HierarchicalNormal`, or a module or
            function of one's own that takes no argument.
        init_scale: ``s`` at the start.

    Raises:
        ValueError: A prior without such sites, or with discrete ones.

    Source: Kucukelbir et al. (2017).

    Example:
        >>> guide = GlobalGuide(HierarchicalNormal(2))
        >>> sorted(guide())
        ['prior_loc', 'prior_scale']
    """

    def __init__(self, prior: Callable[[], Any], init_scale: float = 0.1) -> None:
        super().__init__()
        check_positive("init_scale", init_scale)
        self._prior_reference = (prior,)  # in a tuple: the prior is no part of its guide
        self.init_scale = float(init_scale)
        self._supports: dict[str, Any] = {}
        locs = []
        for name, site in _global_sites(prior):
            support = site["fn"].support
            if support.is_discrete:
                raise argument_error(
                    "prior", "continuous global sites", f"{name!r} on {support}", "sum it out by hand"
                )
            self._supports[name] = support
            locs.append(biject_to(support).inv(site["value"].detach()).contiguous())
        if not locs:
            raise argument_error("prior", "a prior that samples global sites", "one that samples none")
        self.locs = nn.ParameterList([nn.Parameter(loc.clone()) for loc in locs])
        self.log_scales = nn.ParameterList(
            [nn.Parameter(torch.full_like(loc, math.log(init_scale))) for loc in locs]
        )

    @property
    def prior(self) -> Callable[[], Any]:
        """The prior whose sites these are."""
        return self._prior_reference[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # As for a guide and its model: shared, unless it was copied before in the same call.
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        state = {k: v for k, v in self.__dict__.items() if k != "_prior_reference"}
        new.__dict__.update(copy.deepcopy(state, memo))
        new.__dict__["_prior_reference"] = (memo.get(id(self.prior), self.prior),)
        return new

    def distributions(self) -> dict[str, TorchDistribution]:
        """The distribution of each site, as it is now."""
        found: dict[str, TorchDistribution] = {}
        for (name, support), loc, log_scale in zip(
            self._supports.items(), self.locs, self.log_scales, strict=True
        ):
            law: Any = dist.Normal(loc, log_scale.exp())
            if not is_all_of_space(support):
                law = dist.TransformedDistribution(law, [biject_to(support)])
            found[name] = law.to_event(len(law.batch_shape))
        return found

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws all sites; the arguments are ignored."""
        return {name: pyro.sample(name, law) for name, law in self.distributions().items()}


def _global_sites(prior: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
    with kept_generators(), torch.no_grad(), poutine.block():
        trace = poutine.trace(InitMessenger(init_to_median)(prior)).get_trace()
    for name, site in trace.nodes.items():
        latent = site["type"] == "sample" and not site["is_observed"]
        if latent and not isinstance(site["fn"], _Subsample):
            yield name, site
