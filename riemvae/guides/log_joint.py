"""``log p(x, z)`` of a user's Pyro model as a function of one latent, per datum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from riemvae._checks import argument_error
from riemvae.geometry import Potential

BATCH_DIM = -1


@dataclass(frozen=True)
class ModelStructure:
    """What a guide needs to know of a model: where its latent lives, and what else is latent.

    Attributes:
        latent: The name of the latent site.
        event_shape: Its event shape.
        support: Its support.
        frames: The plates around it, outermost first.
        subsampled: Names of plates that draw their subsample themselves, as a site.
        others: Names of the other latent sites.
        nesting: The deepest plate of the model, counted from dim -1.
    """

    latent: str
    event_shape: torch.Size
    support: Any
    frames: tuple[CondIndepStackFrame, ...]
    subsampled: frozenset[str]
    others: tuple[str, ...]
    nesting: int


def is_subsample(site: Mapping[str, Any]) -> bool:
    """Whether a trace's site is a plate's draw of its subsample."""
    return type(site["fn"]).__name__ == "_Subsample"


def prototype(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> poutine.Trace:
    """A trace of ``model``, taken away from all handlers and without touching the random state."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), poutine.block():
        return poutine.trace(model).get_trace(*args, **kwargs)


def plate_nesting(trace: poutine.Trace) -> int:
    """The deepest plate of a trace, counted from dim -1."""
    dims = [
        -frame.dim
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    return max(dims, default=0)


def examine(
    model: Callable[..., Any], latent: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ModelStructure:
    """Runs ``model`` once, away from all handlers and without touching the random state, and reads its structure.

    Raises:
        ValueError: The model has no latent site of that name, it is not in a data plate at dim -1, or it has an event of
            another rank than a vector.
    """
    trace = prototype(model, args, kwargs)
    sites = {name: s for name, s in trace.nodes.items() if s["type"] == "sample"}
    if latent not in sites or sites[latent]["is_observed"]:
        free = [n for n, s in sites.items() if not s["is_observed"] and not is_subsample(s)]
        state = "observed" if latent in sites else "missing"
        raise argument_error(
            "latent",
            f"the name of a latent site of the model; it has {free or 'none'}",
            f"{latent!r}, which is {state}",
            "name the site with latent=",
        )
    site = sites[latent]
    fn: TorchDistribution = site["fn"]
    if len(fn.event_shape) != 1:
        raise argument_error(
            "model",
            f"a latent {latent!r} with event shape (d,)",
            f"event shape {tuple(fn.event_shape)}",
            "give its distribution one event dimension with .to_event(1)",
        )
    frames = tuple(frame for frame in site["cond_indep_stack"] if frame.vectorized)
    if not any(frame.dim == BATCH_DIM for frame in frames):
        raise argument_error(
            "model",
            f"the latent {latent!r} inside a data plate at dim -1",
            "a site outside such a plate",
            'wrap it in `with pyro.plate("data", len(x)):`',
        )
    others = tuple(
        n for n, s in sites.items() if not s["is_observed"] and n != latent and not is_subsample(s)
    )
    subsampled = frozenset(
        n for n, s in sites.items() if is_subsample(s) and s["fn"].subsample_size != s["fn"].size
    )
    return ModelStructure(
        latent, fn.event_shape, fn.support, frames, subsampled, others, plate_nesting(trace)
    )


def in_batch(site: Mapping[str, Any]) -> bool:
    """Whether a site lies inside the data plate."""
    return any(frame.dim == BATCH_DIM for frame in site["cond_indep_stack"])


def site_log_prob(site: Mapping[str, Any]) -> Tensor:
    """The site's log probability with its mask and without its scale, plates other than the data plate summed (kept at 1)."""
    log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
    for frame in site["cond_indep_stack"]:
        if frame.vectorized and frame.dim != BATCH_DIM and -frame.dim <= log_prob.dim():
            log_prob = log_prob.sum(frame.dim, keepdim=True)
    return log_prob


def per_datum(log_prob: Tensor, batch_shape: torch.Size) -> Tensor:
    """``log_prob`` in exactly ``batch_shape``: plates that were summed are kept at 1, leading ones may be missing."""
    return log_prob.expand(batch_shape) if log_prob.shape != batch_shape else log_prob


class LogJoint:
    """The potential ``U(z) = -log p(x, z)`` of a model, per datum: ``z (..., B, d) -> (..., B)``.

    The model is traced with ``z``, the global values and the current subsample conditioned on, hidden from all outer
    handlers. Every site inside the data plate counts, with its mask, without plate and annealing scales; sites outside it
    (the priors of global latents) are constants of ``z`` and are left out.

    Args:
        model: The Pyro model.
        latent: The name of its latent.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        values: Values of other sites, plate subsamples among them.

    Raises:
        ValueError: At the first call, where the model draws a latent that nobody conditions.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        latent: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.latent, self.args, self.kwargs = model, latent, args, kwargs
        self.values = dict(values or {})

    def __call__(self, z: Tensor) -> Tensor:
        conditioned = poutine.condition(self.model, {**self.values, self.latent: z})
        with poutine.block():
            trace = poutine.trace(conditioned).get_trace(*self.args, **self.kwargs)
        total: Tensor | float = 0.0
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or is_subsample(site):
                continue
            if not site["is_observed"]:
                refuse_unconditioned([name])
            if in_batch(site):
                total = total + site_log_prob(site)
        return -per_datum(torch.as_tensor(total), z.shape[:-1])


def refuse_unconditioned(names: list[str]) -> None:
    """The error for latent sites that the guide has no value for."""
    raise argument_error(
        "given",
        "a value or a guide for every latent besides the guided one",
        f"nothing for {names}",
        "pass given={name: value}, or given= a guide of these sites, or condition the model on them "
        "(a discrete nuisance must be summed out by hand)",
    )


def potential_of(
    model: Callable[..., Any],
    structure: ModelStructure,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: Mapping[str, Tensor],
) -> Potential:
    """``-log p(x, z)`` as a potential: the model's own, where it offers one, else by tracing.

    A model may offer ``latent_potential(latent, args, kwargs)``, a faster potential with its gradient, or None where it
    does not apply.
    """
    own = getattr(model, "latent_potential", None)
    if own is not None and not values:
        potential = own(structure.latent, args, kwargs)
        if potential is not None:
            return potential  # type: ignore[no-any-return]
    return LogJoint(model, structure.latent, args, kwargs, values)
