"""Lower and upper bounds of ``log p(x)`` on simulated data, for which a draw of the posterior is known."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from riemvae._checks import argument_error, check_choice, check_count
from riemvae._seeding import forked
from riemvae.distributions import HamiltonianPosterior, MomentumNormal
from riemvae.guides import AmortizedGuide, GaussianGuide, HamiltonianGuide
from riemvae.guides.amortized import GuideCall
from riemvae.guides.evaluation import evaluating
from riemvae.guides.log_joint import data_plate, examine, in_batch, is_subsample
from riemvae.inference.annealed import chunks, tuned
from riemvae.inference.annealing import (
    KernelFactory,
    anneal,
    anneal_back,
    check_kernel,
    make_transitions,
    summary_of,
)
from riemvae.inference.batches import Batch, batch_call, batch_length, batch_parts, make_batches, map_batch
from riemvae.inference.tempering import (
    STARTS,
    TemperedPath,
    inverse_temperature_schedule,
    latent_name,
    tempered_path,
)
from riemvae.inference.weights import DEFAULT_CHUNK, placement
from riemvae.sampling.adaptation import steps_of

METHODS = ("ais", "importance")

Simulation = tuple[Any, Mapping[str, Tensor]]


@dataclass(frozen=True)
class BidirectionalBounds:
    """Stochastic bounds of ``log p(x_b)`` for simulated data, in nats, each ``(B,)``.

    ``E[lower] <= log p(x)`` for every datum, over the draws of the estimate. ``E[upper] >= log p(x)``, over
    those and the latent ``z*`` from which the datum was simulated, a draw of ``p(z|x)``. They are bounds in
    expectation: of one datum ``upper`` may lie below ``lower``, of the mean over many data only by chance.

    Attributes:
        lower: A lower bound.
        upper: An upper bound; ``inf`` where the guide has no density at ``z*``.
        lower_mcse: Monte Carlo standard error of ``lower``, by the delta method.
        x: The simulated data, as the model takes them.
        latents: The latents that they were simulated from.
    """

    lower: Tensor
    upper: Tensor
    lower_mcse: Tensor
    x: Any
    latents: dict[str, Tensor]

    @property
    def gap(self) -> Tensor:
        """``upper - lower`` of each datum: in expectation at least the error of ``lower``."""
        return self.upper - self.lower

    @property
    def mean_gap(self) -> float:
        """Its mean over data: an upper bound, in expectation, of how far the mean of ``lower`` is too low."""
        return float(self.gap.mean())

    @property
    def gap_stderr(self) -> float:
        """The standard error of :attr:`mean_gap` over data, the draws and the ``z*`` in it."""
        return _stderr(self.gap)

    def __len__(self) -> int:
        return len(self.lower)

    def summary(self) -> dict[str, float]:
        """The set in numbers: both means and the gap, each with its standard error over data."""
        return {
            "lower": float(self.lower.mean()),
            "lower_stderr": _stderr(self.lower),
            "upper": float(self.upper.mean()),
            "upper_stderr": _stderr(self.upper),
            "gap": self.mean_gap,
            "gap_stderr": self.gap_stderr,
            "num_data": float(len(self)),
        }

    def __repr__(self) -> str:
        s = self.summary()
        return (
            f"BidirectionalBounds({s['lower']:.3f} <= mean log p(x) <= {s['upper']:.3f}, "
            f"gap={s['gap']:.3f} ± {s['gap_stderr']:.3f} nats over {len(self)} simulated data)"
        )


def _stderr(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def bidirectional_bounds(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    num_data: int = 100,
    *,
    method: str = "ais",
    num_chains: int = 16,
    num_temperatures: int = 100,
    start: str = "guide",
    kernel: str | KernelFactory = "hmc",
    num_leapfrog: int = 5,
    step_size: float = 0.5,
    adapt: bool = True,
    schedule: str | Tensor = "sigmoid",
    simulate: Callable[[int], Simulation] | None = None,
    latent: str | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    tolerance: float = 1e-6,
    progress: bool = False,
) -> BidirectionalBounds:
    r"""Bounds that sandwich ``log p(x)`` of data simulated from the model, where a posterior draw is known.

    ``z*, x ~ p(z) p(x|z)`` makes ``z*`` an exact draw of ``p(z|x)``. From it an upper bound follows:

    - ``method="ais"``: ``lower`` is annealed importance sampling, ``log mean_c w_c``. ``upper`` runs all
      chains backwards from ``z*``, through the same reversible transitions in the opposite order;
      ``E[1/w] = 1/p(x)`` for each of them, so that by Jensen's inequality ``-log mean_c (1/w_c)`` is above
      ``log p(x)`` in expectation, although the chains share their start.
    - ``method="importance"``: ``lower`` is the importance-weighted bound of ``num_chains`` draws of the
      start; in ``upper`` one of them is replaced by ``z*``, and the expectation of ``log mean w`` exceeds
      ``log p(x)`` by a Kullback-Leibler divergence. Cheap, and tight only with a good guide. Hamiltonian
      guides on an encoder enter with their flow: a momentum is drawn at ``z*`` and both are carried back.

    A small gap says that estimates *on such data* are right to within it. It says nothing of real data on
    which the model fits badly.

    Args:
        model: The model itself. One that takes ``size=`` (as :class:`riemvae.VAE`) simulates by itself.
        guide: Its guide; None with ``start="prior"``.
        num_data: Data to simulate, ``B``.
        method: ``"ais"`` or ``"importance"``.
        num_chains: Chains of a datum each way, or draws of the importance-weighted bound.
        num_temperatures: Of ``"ais"``.
        start: ``"guide"`` or ``"prior"``, as for annealed importance sampling.
        kernel: Of ``"ais"``: ``"hmc"``, ``"riemannian"`` or a factory of reversible kernels.
        num_leapfrog: Leapfrog steps of a transition.
        step_size: Leapfrog step; a first guess where it is adapted.
        adapt: Whether a pilot that does not see ``z*`` adapts it.
        schedule: ``"sigmoid"``, ``"linear"``, or inverse temperatures from 0 to 1.
        simulate: ``n -> (data, latents)``: the arguments of the model for ``n`` data (tensor, tuple or
            mapping), and a mapping with the latent's values ``(n, d)`` and those of global latents, which are
            then given. None lets the model do it.
        latent: Name of the latent site; None is that of the guide, or ``"z"``.
        chunk_size: Data times chains at once; None is about 2,000.
        seed: Of the draws; the caller's generator is left as it was. None draws from it.
        tolerance: Residual of fixed points.
        progress: Shows a bar.

    Returns:
        A :class:`BidirectionalBounds`.

    Raises:
        ValueError: Numbers out of range; a model that cannot simulate; what annealed importance sampling
            raises; ``method="importance"`` with a guide whose density at ``z*`` cannot be evaluated.

    Source: Grosse, Ghahramani and Adams (2015); Grosse, Ancha and Roy (2016); Wu et al. (2017).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x=None, size=None):
        ...     with pyro.plate("data", len(x) if size is None else size):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         return pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> bounds = bidirectional_bounds(model, None, 50, num_temperatures=20, start="prior", seed=0)
        >>> exact = dist.Normal(0.0, 2**0.5).expand([2]).to_event(1).log_prob(bounds.x).mean()
        >>> bool(bounds.lower.mean() < exact + 0.05), bool(exact - 0.05 < bounds.upper.mean())
        (True, True)
    """
    check_count("num_data", num_data)
    check_choice("method", method, METHODS)
    check_count("num_chains", num_chains)
    check_choice("start", start, STARTS)
    check_kernel(kernel, num_leapfrog, step_size)
    betas = inverse_temperature_schedule(schedule, num_temperatures)
    pairs = DEFAULT_CHUNK if chunk_size is None else check_count("chunk_size", chunk_size)
    name = latent_name(guide, latent)
    device, dtype = placement(model) if guide is None else placement(model, guide)
    parts: list[tuple[Tensor, ...]] = []
    with forked(seed), torch.no_grad(), evaluating(tolerance, model, guide):
        data, latents = _simulated(model, num_data, name, simulate)
        batches = make_batches("simulate", data, shuffle=False, dtype=dtype)
        data = map_batch(lambda a: a if device is None else a.to(device), batches.first())
        exact = latents[name].to(batch_parts(data)[0].device)
        shared = {k: v for k, v in latents.items() if k != name}
        slices = torch.arange(num_data).split(max(1, pairs // num_chains))
        for k in steps_of(len(slices), progress, "bidirectional bounds"):
            rows = slices[k]
            args, kwargs = batch_call(map_batch(partial(_rows, rows), data))
            z = _rows(rows, exact)
            size = len(rows)
            path = tempered_path(model, guide, args, kwargs, size, shared, start=start, latent=name)
            if method == "importance":
                own = guide if start == "guide" else None
                proposal = _proposal(model, own, path, args, kwargs, shared, name, tolerance)
                parts.append(_importance(proposal, path.unconstrained(z), num_chains))
                continue
            transitions = make_transitions(path, guide, kernel, num_leapfrog, 1, tolerance)
            tuning = tuned(transitions, betas, step_size, adapt, num_chains)
            forward, backward = [], []
            for chains in chunks(num_chains, max(1, pairs // size)):
                forward.append(anneal(transitions, tuning, 1, chains).cloud.log_weights[0])
                backward.append(anneal_back(transitions, tuning, path.unconstrained(z), chains))
            lower = summary_of(torch.cat(forward))
            upper = math.log(num_chains) - torch.logsumexp(-torch.cat(backward), 0)
            parts.append((lower["log_prob"], upper, lower["mcse"]))
    lower_bound, upper_bound, mcse = (torch.cat(column) for column in zip(*parts))
    return BidirectionalBounds(lower_bound, upper_bound, mcse, data, dict(latents))


def _rows(rows: Tensor, value: Tensor) -> Tensor:
    return value.index_select(0, rows.to(value.device))


def _simulated(
    model: Callable[..., Any], num_data: int, latent: str, simulate: Callable[[int], Simulation] | None
) -> tuple[Batch, dict[str, Tensor]]:
    """Data with the latents that they came from."""
    if simulate is None:
        forward = model.forward if isinstance(model, nn.Module) else model
        if "size" not in inspect.signature(forward).parameters:
            raise argument_error(
                "simulate",
                "a callable n -> (data, latents)",
                None,
                "pass simulate=, or let the model draw data where it is called with size=n",
            )
        with poutine.block():
            trace = poutine.trace(model).get_trace(size=num_data)
        plate = data_plate(trace)
        sites: dict[str, Any] = dict(trace.nodes)
        latents = {
            name: site["value"]
            for name, site in sites.items()
            if site["type"] == "sample"
            and not site["is_observed"]
            and not is_subsample(site)
            and (name == latent or not in_batch(site, plate))
        }
        data = sites["_RETURN"]["value"]
    else:
        data, given = simulate(num_data)
        latents = dict(given)
    if latent not in latents:
        raise argument_error(
            "simulate", f"latents with {latent!r}", f"{sorted(latents)}", "name it by latent="
        )
    sizes = [len(latents[latent])] + ([batch_length(data)] if batch_parts(data) else [])
    if set(sizes) != {num_data}:
        raise argument_error("simulate", f"{num_data} data with as many latents", f"{sizes}")
    return data, latents


class _PathProposal:
    """Draws of the path's start."""

    def __init__(self, path: TemperedPath) -> None:
        self.path = path

    def draws(self, num: int) -> Tensor:
        """Log weights of draws, ``(S, B)``."""
        u = self.path.draw(num)
        return self.path.log_ratio(u.view(num, self.path.size, -1))

    def at(self, u: Tensor) -> Tensor:
        """The log weight at ``u (B, d)``, ``(B,)``."""
        return self.path.log_ratio(u.unsqueeze(0))[0]


class _HamiltonianProposal:
    """Draws of a Hamiltonian guide, of position and momentum."""

    def __init__(self, path: TemperedPath, posterior: HamiltonianPosterior) -> None:
        self.path, self.posterior = path, posterior

    def draws(self, num: int) -> Tensor:
        """Log weights of draws, ``(S, B)``; of a failed integration zero."""
        return self._weights(self.posterior.sample(torch.Size([num])), -math.inf)

    def at(self, u: Tensor) -> Tensor:
        """The log weight at ``u (B, d)`` with a momentum drawn there, infinite where nothing leads there."""
        v = MomentumNormal(self.posterior.base_dist.metric, u).sample()
        return self._weights(torch.cat([u, v], -1).unsqueeze(0), math.inf)[0]

    def _weights(self, value: Tensor, failed: float) -> Tensor:
        u, v = value.chunk(2, -1)
        kinetic = MomentumNormal(self.posterior.base_dist.metric, u).log_prob(v)
        weights = kinetic - self.path.target(u) - self.posterior.log_prob(value)
        info = self.posterior.flow.info
        bad = torch.isnan(weights) if info is None else torch.isnan(weights) | ~info.converged
        return torch.where(bad, failed, weights.double())


def _proposal(
    model: Callable[..., Any],
    guide: Any,
    path: TemperedPath,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shared: Mapping[str, Tensor],
    latent: str,
    tolerance: float,
) -> _PathProposal | _HamiltonianProposal:
    """What the guide draws from, with its density: what follows its encoder included."""
    if not isinstance(guide, AmortizedGuide) or isinstance(guide, GaussianGuide):
        return _PathProposal(path)
    if not isinstance(guide, HamiltonianGuide) or isinstance(guide.encoder, AmortizedGuide):
        raise argument_error(
            "guide",
            "a GaussianGuide, a Hamiltonian guide on an encoder, or a plain guide, whose density at a given "
            "point is known",
            guide,
            "use method='ais'",
        )
    conditioned = poutine.condition(model, dict(shared)) if shared else model
    call = GuideCall(examine(conditioned, latent, args, kwargs), args, kwargs)
    position: Any = path.start.distribution
    with poutine.block():
        metric = guide._call_metric(call, position)
    posterior = HamiltonianPosterior(
        position.expand((path.size,)),
        path.target,
        metric,
        step_size=guide.step_size,
        num_steps=guide.num_steps,
        tempering=guide.tempering,
        tolerance=None if metric is None else tolerance,
    )
    return _HamiltonianProposal(path, posterior)


def _importance(
    proposal: _PathProposal | _HamiltonianProposal, exact: Tensor, num_samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The bound of ``num_samples`` draws, and the same with the last of them replaced by the exact one."""
    weights = proposal.draws(num_samples)
    replaced = torch.cat([weights[:-1], proposal.at(exact).unsqueeze(0)])
    lower = summary_of(weights)
    return lower["log_prob"], torch.logsumexp(replaced, 0) - math.log(num_samples), lower["mcse"]
