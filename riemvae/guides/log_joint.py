"""``log p(x, z)`` of a user's Pyro model as a function of one latent, per datum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from riemvae._checks import argument_error
from riemvae._seeding import kept_generators
from riemvae.geometry import Potential
from riemvae.guides.enumeration import enumerated, is_enumerated, is_marked, summed_log_prob

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
        enumerated: Names of discrete latent sites inside the data plate that ask to be summed out.
    """

    latent: str
    event_shape: torch.Size
    support: Any
    frames: tuple[CondIndepStackFrame, ...]
    subsampled: frozenset[str]
    others: tuple[str, ...]
    nesting: int
    enumerated: tuple[str, ...] = ()

    @property
    def plate(self) -> str:
        """The name of the data plate: the one at dim -1 around the latent."""
        return next(frame.name for frame in self.frames if frame.dim == BATCH_DIM)

    @property
    def dims(self) -> frozenset[int]:
        """The dims of the plates around the latent."""
        return frozenset(frame.dim for frame in self.frames if frame.dim is not None)


def is_subsample(site: Mapping[str, Any]) -> bool:
    """Whether a trace's site is a plate's draw of its subsample."""
    return isinstance(site["fn"], _Subsample)


def prototype(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> poutine.Trace:
    """A trace of ``model``, taken away from all handlers and without touching the random state."""
    with kept_generators(), torch.no_grad(), poutine.block():
        return poutine.trace(model).get_trace(*args, **kwargs)


class _HandedSubsamples(Messenger):
    """Notes the plates whose subsample is an argument, and not drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) and msg["value"] is not None:
            self.names.add(msg["name"])


def plate_nesting(trace: poutine.Trace) -> int:
    """The deepest plate of a trace, counted from dim -1."""
    dims = [
        -frame.dim
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.dim is not None
    ]
    return max(dims, default=0)


def examine(
    model: Callable[..., Any], latent: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ModelStructure:
    """Reads a model's structure from one run, away from all handlers and the random state.

    Raises:
        ValueError: The model has no latent site of that name, it is not in a data plate at dim -1, or it has
            an event of another rank than a vector.
    """
    handed = _HandedSubsamples()
    trace = prototype(handed(model), args, kwargs)
    sites: dict[str, Any] = {name: s for name, s in trace.nodes.items() if s["type"] == "sample"}
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
    fn: Any = site["fn"]
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
    plate = next(frame.name for frame in frames if frame.dim == BATCH_DIM)
    summed = enumerated_sites(trace, plate)
    others = tuple(
        n
        for n, s in sites.items()
        if not s["is_observed"] and n != latent and n not in summed and not is_subsample(s)
    )
    subsampled = frozenset(
        n
        for n, s in sites.items()
        if is_subsample(s) and n not in handed.names and s["value"].numel() != s["fn"].size
    )
    return ModelStructure(
        latent, fn.event_shape, fn.support, frames, subsampled, others, plate_nesting(trace), summed
    )


def enumerated_sites(trace: poutine.Trace, plate: str | None) -> tuple[str, ...]:
    """The latent sites of a model inside its data plate that ask to be summed out."""
    sites = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not is_subsample(s)}
    return tuple(n for n, s in sites.items() if is_marked(s) and in_batch(s, plate))


def data_plate(model_trace: poutine.Trace) -> str | None:
    """The name of the plate at dim -1 around a model's data; around any site where it observes none."""
    found: dict[bool, str] = {}
    for site in model_trace.nodes.values():
        if site["type"] == "sample" and not is_subsample(site):
            for frame in site["cond_indep_stack"]:
                if frame.dim == BATCH_DIM:
                    found.setdefault(site["is_observed"], frame.name)
    return found.get(True, found.get(False))


def in_batch(site: Mapping[str, Any], plate: str | None) -> bool:
    """Whether a site lies inside the data plate; another plate at dim -1 may hold global latents."""
    return any(frame.dim == BATCH_DIM and frame.name == plate for frame in site["cond_indep_stack"])


def site_log_prob(site: Mapping[str, Any], kept: frozenset[int] = frozenset({BATCH_DIM})) -> Tensor:
    """The site's log probability, masked, not scaled; plates not among the dims ``kept`` are summed."""
    log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
    for frame in site["cond_indep_stack"]:
        if frame.vectorized and frame.dim not in kept and -frame.dim <= log_prob.dim():
            log_prob = log_prob.sum(frame.dim, keepdim=True)
    return log_prob


def per_datum(log_prob: Tensor, batch_shape: torch.Size) -> Tensor:
    """``log_prob`` in exactly ``batch_shape``: summed plates are of size 1, leading ones may be missing."""
    if log_prob.shape == batch_shape:
        return log_prob
    excess = max(0, log_prob.dim() - len(batch_shape))
    return log_prob.reshape(log_prob.shape[excess:]).expand(batch_shape)


class LogJoint:
    """The potential ``U(z) = -log p(x, z)`` of a model, per datum: ``z (..., B, d) -> (..., B)``.

    The model is traced with ``z``, the global values and the current subsample conditioned on, hidden from
    all outer handlers. Every site inside the data plate counts, with its mask, without plate and annealing
    scales; sites outside it (the priors of global latents) are constants of ``z`` and are left out. Discrete
    sites inside it that are marked ``infer={"enumerate": "parallel"}`` are summed out.

    Args:
        model: The Pyro model.
        structure: Its structure.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        values: Values of other sites, plate subsamples among them.

    Raises:
        ValueError: At the first call, where the model draws a latent that nobody conditions, or where a
            latent in several plates shares a site outside one of them (no density of its own then).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        structure: ModelStructure,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.structure, self.args, self.kwargs = model, structure, args, kwargs
        self.values = dict(values or {})

    def __call__(self, z: Tensor) -> Tensor:
        conditioned = poutine.condition(self.model, {**self.values, self.structure.latent: z})
        # Without validation: a datum that has become NaN must not raise for all the others.
        with pyro.validation_enabled(False):
            structure = self.structure
            if not structure.enumerated:
                with poutine.block():
                    trace = poutine.trace(conditioned).get_trace(*self.args, **self.kwargs)
                total: Any = sum(site_log_prob(site, structure.dims) for site in self._sites(trace))
            else:
                first_dim = -1 - max(structure.nesting, z.dim() - 1)
                with poutine.block():
                    trace = poutine.trace(enumerated(conditioned, first_dim)).get_trace(
                        *self.args, **self.kwargs
                    )
                total = summed_log_prob(self._sites(trace), structure.dims, structure.nesting, first_dim)
            return -per_datum(torch.as_tensor(total), z.shape[:-1])

    def _sites(self, trace: poutine.Trace) -> list[Any]:
        """The sites that count."""
        structure = self.structure
        plates = {frame.name for frame in structure.frames}
        counted = []
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or is_subsample(site):
                continue
            if not site["is_observed"] and not is_enumerated(site):
                raise unconditioned([name])
            if in_batch(site, structure.plate):
                if not plates <= {frame.name for frame in site["cond_indep_stack"]}:
                    raise argument_error(
                        "model",
                        f"sites in all plates of the latent {structure.latent!r}, {sorted(plates)}",
                        f"{name!r} outside one of them",
                        "put the latent in the data plate alone, with the others in its event",
                    )
                counted.append(site)
        return counted


def unconditioned(names: list[str]) -> ValueError:
    """The error for latent sites that the guide has no value for."""
    return argument_error(
        "given",
        "a value or a guide for every latent besides the guided one",
        f"nothing for {names}",
        "pass given={name: value}, or given= a guide of these sites, or condition the model on them "
        '(a discrete nuisance inside the data plate is summed out if marked infer={"enumerate": "parallel"})',
    )


def potential_of(
    model: Callable[..., Any],
    structure: ModelStructure,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: Mapping[str, Tensor],
) -> Potential:
    """``-log p(x, z)`` as a potential: the model's own, where it offers one, else by tracing.

    A model may offer ``latent_potential(latent, args, kwargs)``, a faster potential with its gradient, or
    None where it does not apply.
    """
    own = getattr(model, "latent_potential", None)
    if own is not None and not values:
        potential = own(structure.latent, args, kwargs)
        if potential is not None:
            return potential  # type: ignore[no-any-return]
    return LogJoint(model, structure, args, kwargs, values)
