"""Draws of a posterior: a guide's draws, resampled by their importance weights, and models run at them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from riemvae._checks import argument_error, check_count
from riemvae.guides.log_joint import (
    BATCH_DIM,
    data_plate,
    in_batch,
    is_subsample,
    plate_nesting,
    prototype,
    site_log_prob,
)
from riemvae.inference.estimation import for_each_batch
from riemvae.inference.likelihood import KHAT_LIMIT
from riemvae.inference.pareto import pareto_shape, tail_size
from riemvae.inference.weights import (
    DEFAULT_CHUNK,
    draw_weights,
    global_draw,
    log_mean_exp,
    refuse_scores,
)

# So many numbers are the most that a result in memory may hold: 1 GiB in single precision.
LARGEST_RESULT = 1 << 28
# Draws of the guide from which one posterior draw is resampled, and the fewest of a datum.
_PROPOSALS_A_DRAW = 4
_FEWEST_PROPOSALS = 200
# Different values of global latents in a set of draws.
_GLOBAL_DRAWS = 20
DATUM = "datum:"  # begins the names of numbers a datum, in what is joined over batches
_PARTICLES = "num_particles_vectorized"


@dataclass(frozen=True)
class Layout:
    """Where a site's values lie among the plates.

    Attributes:
        event_dim: Dimensions of its event.
        plates: The dims (below -1) of the plates around it besides the data plate, outermost first.
    """

    event_dim: int
    plates: tuple[int, ...]


@dataclass(frozen=True)
class PosteriorDraws:
    """Draws of a batch's local latents, given one value of the global ones.

    Attributes:
        values: ``(S, B, *plates, *event)`` by site.
        log_weights: ``log p(x_b, z_sb) - log q(z_sb | x_b)`` of these draws, ``(S, B)``.
        log_prob: ``log p̂(x_b)`` by all proposals, ``(B,)``.
        mcse: Its Monte Carlo error.
        ess: Kish's effective size of the proposals.
        khat: Their Pareto shape.
        layouts: How the sites lie among the plates.
        nesting: The depth of the plates.
        shared: The values of the global latents.
    """

    values: dict[str, Tensor]
    log_weights: Tensor
    log_prob: Tensor
    mcse: Tensor
    ess: Tensor
    khat: Tensor
    layouts: dict[str, Layout]
    nesting: int
    shared: dict[str, Tensor]

    def vectorised(self) -> dict[str, Tensor]:
        """The values as a model in a plate of draws takes them."""
        return {name: _with_plates(v, self.layouts[name], self.nesting) for name, v in self.values.items()}


# -- layouts -----------------------------------------------------------------------------------------------


def layout_of(site: Mapping[str, Any], nesting: int, in_draws: bool = True) -> Layout:
    """The layout of a trace's site, the plate of draws (where the trace is in one) left out."""
    dims = [f.dim for f in site["cond_indep_stack"] if f.dim is not None]
    inner = sorted(d for d in dims if -nesting <= d < BATCH_DIM)
    event_dim = len(site["fn"].event_shape)
    if site["infer"].get("_deterministic") and event_dim == site["value"].dim():
        # Pyro takes all of a deterministic value for its event, the plates too.
        event_dim = max(0, event_dim - nesting - int(in_draws))
    return Layout(event_dim, tuple(inner))


def datum_first(value: Tensor, layout: Layout, nesting: int, num: int, size: int) -> Tensor:
    """A site's value ``(S, plates, B, event)`` as ``(S, B, plates, event)``."""
    batch = tuple(value.shape[: value.dim() - layout.event_dim])
    event = tuple(value.shape[value.dim() - layout.event_dim :])
    batch = (1,) * (nesting + 1 - len(batch)) + batch
    value = value.reshape(batch + event).expand((num,) + batch[1:-1] + (size,) + event)
    absent = [d + nesting + 1 for d in range(-nesting, BATCH_DIM) if d not in layout.plates]
    value = value.movedim(nesting, 1)  # the plates between now begin at 2
    for index in sorted(absent, reverse=True):
        value = value.select(index + 1, 0)
    return value


def _with_plates(value: Tensor, layout: Layout, nesting: int) -> Tensor:
    for d in range(-nesting, BATCH_DIM):
        if d not in layout.plates:
            value = value.unsqueeze(d + nesting + 2)
    return value.movedim(1, nesting)


def _flat(log_prob: Tensor, nesting: int) -> Tensor:
    """A site's log probability, inner plates summed, as ``(S or 1, B or 1)``."""
    if log_prob.dim() > nesting:
        return log_prob.reshape(log_prob.shape[0], -1)
    return log_prob.reshape(1, -1)


# -- posterior draws ---------------------------------------------------------------------------------------


def posterior_draws(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    num_samples: int,
    *,
    resample: bool = True,
    num_proposals: int | None = None,
    pairs: int = DEFAULT_CHUNK,
    shared: Mapping[str, Tensor] | None = None,
) -> PosteriorDraws:
    """``num_samples`` draws of the local latents of each of ``size`` data, in bounded memory.

    With ``resample``, each is one of ``num_proposals`` draws of the guide, picked with a probability in
    proportion to its weight (sampling importance resampling): independent of the others given the proposals,
    and a draw of the posterior as their number grows. Without, they are the guide's draws. Draws that
    diverged are never kept.

    Raises:
        ValueError: Where all draws of a datum diverged.

    Source: Rubin (1987), sampling importance resampling; Chao (1982), unequal probabilities in one pass.
    """
    total = num_proposals_for(num_samples, num_proposals) if resample else num_samples
    step = max(1, pairs // size)
    places = Places(num_samples)
    all_weights: list[Tensor] = []
    layouts: dict[str, Layout] = {}
    nesting = 1
    raw: list[dict[str, Tensor]] = []
    for start in range(0, total, step):
        num = min(step, total - start)
        draw = draw_weights(model, guide, args, kwargs, num, shared)
        sites = local_latents(draw.model_trace, draw.plate)
        if start == 0:
            if resample:
                refuse_scores(draw.model_trace)
            if draw.log_weights.shape[-1] != size:
                raise argument_error(
                    "model",
                    f"one weight for each of the {size} data",
                    f"{draw.log_weights.shape[-1]} of them",
                    "let the model take the batch as it is, not a subsample that it draws itself",
                )
            nesting = particle_nesting(draw.model_trace)
            layouts = {name: layout_of(site, nesting) for name, site in sites.items()}
        weights = draw.log_weights.double()
        weights = torch.where(torch.isnan(weights), -math.inf, weights)
        values = {
            name: datum_first(site["value"].detach(), layouts[name], nesting, num, size)
            for name, site in sites.items()
        }
        all_weights.append(weights)
        if resample:
            places.add(weights, values)
        else:
            raw.append(values)
    weights = torch.cat(all_weights)
    lost = torch.isneginf(weights)
    if bool(lost.all(0).any()):
        raise argument_error(
            "guide",
            "draws of finite weight for each datum",
            f"none for {int(lost.all(0).sum())} of {size} data: all {total} draws diverged",
            "lower its step size, take more samples, or check these data",
        )
    if resample:
        kept, kept_weights = places.values, places.log_weights
    else:
        kept = {name: torch.cat([values[name] for values in raw]) for name in raw[0]}
        kept_weights = weights
        if bool(lost.any()):  # others in their place, at random
            picks = torch.arange(total, device=lost.device).unsqueeze(-1).expand_as(lost)
            picks = torch.where(lost, _pick(torch.where(lost, -math.inf, 0.0), total), picks)
            kept = {name: _rows(value, picks) for name, value in kept.items()}
            kept_weights = weights.gather(0, picks)
    ess = torch.exp(2.0 * torch.logsumexp(weights, 0) - torch.logsumexp(2.0 * weights, 0))
    mcse = ((total / ess - 1.0).clamp_min(0.0) / max(total - 1, 1)).sqrt()
    largest = weights.topk(min(tail_size(total) + 1, total), 0).values
    khat = pareto_shape(largest)
    estimate = log_mean_exp(weights)
    return PosteriorDraws(kept, kept_weights, estimate, mcse, ess, khat, layouts, nesting, dict(shared or {}))


class Places:
    """Places for draws picked in proportion to weights that pass by in chunks, independent of each other.

    Each place keeps its pick, or exchanges it for one of the new chunk with the chance that the pick of all
    so far lies there.

    Args:
        num: Places, ``S``.

    Attributes:
        values: What is in them, ``(S, B, ...)`` by name.
        log_weights: The weights of that, ``(S, B)``.
    """

    def __init__(self, num: int) -> None:
        self.num = num
        self.values: dict[str, Tensor] = {}
        self.log_weights = torch.empty(0)
        self._total = torch.empty(0)

    def add(self, log_weights: Tensor, values: Mapping[str, Tensor]) -> None:
        """Lets a chunk pass by: its weights ``(n, B)`` and values ``(n, B, ...)``."""
        picks, new = _pick(log_weights, self.num), torch.logsumexp(log_weights, 0)
        picked = log_weights.gather(0, picks)
        if not len(self._total):
            self._total, self.log_weights = new, picked
            self.values = {name: _rows(value, picks) for name, value in values.items()}
            return
        self._total = torch.logaddexp(self._total, new)
        # NaN, where there is no weight yet, is no change.
        change = torch.rand_like(picked) < (new - self._total).exp()
        self.log_weights = torch.where(change, picked, self.log_weights)
        for name, value in values.items():
            mask = change.reshape(change.shape + (1,) * (value.dim() - 2))
            self.values[name] = torch.where(mask, _rows(value, picks), self.values[name])


def num_proposals_for(num_samples: int, num_proposals: int | None) -> int:
    """How many draws of the guide are resampled to ``num_samples``: 4 for each, at least 200."""
    if num_proposals is None:
        return max(_FEWEST_PROPOSALS, _PROPOSALS_A_DRAW * num_samples)
    return check_count("num_proposals", num_proposals, num_samples, "take at least as many as num_samples")


def _pick(log_weights: Tensor, num: int) -> Tensor:
    """Indices ``(num, B)`` of rows, in proportion to the weights ``(n, B)``; any where there are none."""
    peak = log_weights.max(0).values
    weights = (log_weights - torch.where(torch.isneginf(peak), 0.0, peak)).exp()
    weights = torch.where(torch.isneginf(peak), 1.0, weights)
    return torch.multinomial(weights.mT, num, replacement=True).mT


def _rows(value: Tensor, picks: Tensor) -> Tensor:
    return value[picks, torch.arange(value.shape[1], device=value.device)]


def local_latents(trace: poutine.Trace, plate: str | None) -> dict[str, Any]:
    """The latent sites of a model's trace inside the data plate."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not is_subsample(site)
        and in_batch(site, plate)
    }


def global_latents(trace: poutine.Trace, plate: str | None) -> dict[str, Any]:
    """The latent sites of a model's trace outside the data plate."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not is_subsample(site)
        and not in_batch(site, plate)
    }


def observed_sites(trace: poutine.Trace, plate: str | None) -> dict[str, Any]:
    """The data of a model's trace: observed inside the data plate, neither deterministic nor a factor."""
    sites: dict[str, Any] = dict(trace.nodes)
    return {
        name: site
        for name, site in sites.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not is_subsample(site)
        and in_batch(site, plate)
        and not site["infer"].get("_deterministic")
        and not isinstance(site["fn"], dist.Unit)
    }


def particle_nesting(trace: poutine.Trace) -> int:
    """The depth of the plates of a trace inside the plate of draws."""
    for site in trace.nodes.values():
        if site["type"] == "sample":
            for frame in site["cond_indep_stack"]:
                if frame.name == _PARTICLES and frame.dim is not None:
                    return -frame.dim - 1
    raise RuntimeError("a trace without a plate of draws")


# -- models at draws ---------------------------------------------------------------------------------------


class Redraw(Messenger):
    """Draws the named observed sites from their distributions, in place of the data."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        wanted = msg["name"] in self.names and not msg["infer"].get("_deterministic")
        if msg["is_observed"] and wanted:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def run_at(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: Mapping[str, Tensor],
    num: int,
    nesting: int,
    redraw: Sequence[str] = (),
) -> poutine.Trace:
    """The model's trace with ``num`` draws of its latents at once; the sites ``redraw`` are drawn anew."""
    # Inside out: the data are let go first, then the latents are held.
    held = poutine.condition(Redraw(redraw)(model) if redraw else model, dict(values))
    # Without validation: a draw on the very border of a support must not raise for all the others.
    with pyro.validation_enabled(False), poutine.block(), pyro.plate(_PARTICLES, num, dim=-1 - nesting):
        return poutine.trace(held).get_trace(*args, **kwargs)


def log_probs(
    trace: poutine.Trace, names: Sequence[str], nesting: int, num: int, size: int
) -> dict[str, Tensor]:
    """Log probabilities of sites in the data plate, masks applied, other plates summed: ``(S, B)`` each."""
    kept = frozenset({BATCH_DIM, -1 - nesting})
    return {name: _flat(site_log_prob(trace.nodes[name], kept), nesting).expand(num, size) for name in names}


def log_joint(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    draws: PosteriorDraws,
    size: int,
) -> Tensor:
    """``log p(x_b, z_sb)`` of draws, ``(S, B)``."""
    num = len(draws.log_weights)
    trace = run_at(model, args, kwargs, {**draws.shared, **draws.vectorised()}, num, draws.nesting)
    plate = data_plate(trace)
    names = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not is_subsample(site) and in_batch(site, plate)
    ]
    return torch.stack(list(log_probs(trace, names, draws.nesting, num, size).values())).sum(0)


# -- whole data sets ---------------------------------------------------------------------------------------

Visit = Callable[[tuple[Any, ...], dict[str, Any], int, list[PosteriorDraws]], dict[str, Tensor]]


def visit_draws(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    num_samples: int,
    visit: Visit,
    *,
    resample: bool = True,
    num_proposals: int | None = None,
    num_globals: int | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    tolerance: float = 1e-6,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Calls ``visit`` with the posterior draws of each batch and joins what it returns along the data.

    ``visit(args, kwargs, size, groups)`` gets as many :class:`PosteriorDraws` as there are values of the
    global latents (the same for all batches), ``num_samples`` draws in all, and returns tensors
    ``(S, B, ...)``, or ``(B,)`` of diagnostics under names that begin with ``"datum:"``.

    Raises:
        ValueError: As :func:`for_each_batch`, and where all draws of a datum diverged.
    """
    check_count("num_samples", num_samples)
    pairs = DEFAULT_CHUNK if chunk_size is None else check_count("chunk_size", chunk_size)
    proposals = num_proposals_for(num_samples, num_proposals) if resample else num_samples
    values: list[dict[str, Tensor]] = []  # of the global latents, from the first batch
    shapes: list[Tensor] = []

    def estimate(
        args: tuple[Any, ...], kwargs: dict[str, Any], size: int, _: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if not values:
            values.extend(global_draws(model, guide, args, kwargs, num_samples, num_globals))
        groups = []
        for index, shared in enumerate(values):
            num = len(range(index, num_samples, len(values)))
            each = max(num, math.ceil(proposals / len(values)), min(_FEWEST_PROPOSALS // 4, proposals))
            draws = posterior_draws(
                *(model, guide, args, kwargs, size, num),
                resample=resample,
                num_proposals=each if resample else None,
                pairs=pairs,
                shared=shared,
            )
            groups.append(draws)
        shapes.append(torch.stack([draws.khat for draws in groups]).max(0).values)
        found = visit(args, kwargs, size, groups)
        return {name: v if name.startswith(DATUM) else v.movedim(1, 0) for name, v in found.items()}

    joined = for_each_batch(
        *(model, guide, data, estimate),
        batch_size=max(1, pairs // proposals),
        seed=seed,
        progress=progress,
        description="draws of the posterior",
        tolerance=tolerance,
    )
    if resample:
        warn_of_tails(torch.cat(shapes))
    return {name: v if name.startswith(DATUM) else v.movedim(0, 1) for name, v in joined.items()}


def warn_of_tails(khat: Tensor, stacklevel: int = 4) -> None:
    """Warns where resampled draws are not the posterior's, since a few weights are nearly everything."""
    bad = int((khat > KHAT_LIMIT).sum())
    if bad:
        warnings.warn(
            f"k̂ > {KHAT_LIMIT} for {bad} of {len(khat)} data: their resampled draws are few of the guide's, "
            "many times over, and not yet the posterior's; take more proposals or a guide closer to it",
            stacklevel=stacklevel,
        )


def global_draws(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_samples: int,
    num_globals: int | None = None,
) -> list[dict[str, Tensor]]:
    """Values of the global latents by the guide: one where it has but one, else ``num_globals`` draws."""
    if num_globals is not None:
        check_count("num_globals", num_globals)
    first = global_draw(model, guide, args, kwargs)
    if not first:
        return [first]
    again = global_draw(model, guide, args, kwargs)
    if all(torch.equal(first[name], again[name]) for name in first):
        return [first]
    count = min(num_samples, _GLOBAL_DRAWS if num_globals is None else num_globals)
    return [first, again][:count] + [global_draw(model, guide, args, kwargs) for _ in range(count - 2)]


def structure_of(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[poutine.Trace, str | None, int]:
    """A trace of the model as it is, its data plate and the depth of its plates."""
    trace = prototype(model, args, kwargs)
    return trace, data_plate(trace), max(1, plate_nesting(trace))


def refuse_large(name: str, numbers: int, remedy: str) -> None:
    """Refuses a result of more numbers than memory should hold."""
    if numbers > LARGEST_RESULT:
        raise argument_error(
            name, f"a result of at most {LARGEST_RESULT:,} numbers", f"{numbers:,} of them", remedy
        )
