"""Importance weights per datum: the one primitive that bounds and likelihoods reduce."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor, nn

from riemvae._checks import argument_error, check_count
from riemvae.guides.enumeration import enumerated, is_enumerated, summed_log_prob
from riemvae.guides.evaluation import evaluating
from riemvae.guides.log_joint import (
    BATCH_DIM,
    data_plate,
    enumerated_sites,
    in_batch,
    is_subsample,
    plate_nesting,
    prototype,
)
from riemvae.inference.batches import batch_call, batch_length, make_batches, takes_missing
from riemvae.likelihoods import is_density

# Data times samples that go through the decoder at once, where nothing else is asked for.
DEFAULT_CHUNK = 1 << 11


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """``Σ_s w_s v_s``, where draws without weight count nothing whatever they hold, infinities and NaN too.

    Args:
        weights: ``(S, ...)``, of at least 0, such as normalised importance weights.
        values: ``(S, ...)``, of a shape that the weights broadcast to from the left: ``(S, B)`` weights and
            ``(S, B, k)`` values.

    Example:
        >>> weighted_sum(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 3.0], [torch.inf, torch.nan]]))
        tensor([2., 3.])
    """
    weights = weights.reshape(*weights.shape, *(1,) * (values.dim() - weights.dim()))
    return torch.where(weights > 0, weights * values, 0.0).sum(0)


@dataclass(frozen=True)
class WeightedDraw:
    """Weights of one vectorised draw of a guide.

    Attributes:
        log_weights: ``log p(x_b, z_sb) - log q(z_sb | x_b)``, shape ``(S, B)``: every site in the data plate,
            masks applied, plate and annealing scales left out, discrete sites that ask for it summed out.
        scale: The plate's scale ``N/B`` of a subsample; 1 without one.
        plate: The name of the data plate.
        nesting: The depth of the plates without that of the draws.
        model_trace: The model's trace, without the sites that were summed out.
        guide_trace: The guide's trace.
    """

    log_weights: Tensor
    scale: float
    plate: str | None
    nesting: int
    model_trace: poutine.Trace
    guide_trace: poutine.Trace


def draw_weights(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_samples: int,
    global_values: Mapping[str, Tensor] | None = None,
) -> WeightedDraw:
    """Draws ``num_samples`` latents a datum at once and weighs them, differentiably where enabled."""
    nesting, plate, sums = _plates(model, guide, args, kwargs)
    if global_values:
        values = dict(global_values)
        model, guide = poutine.condition(model, values), poutine.condition(guide, values)
    particles = pyro.plate("num_particles_vectorized", num_samples, dim=-1 - nesting)
    with particles:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    first_dim = -2 - nesting  # of values to sum out
    replayed = poutine.replay(enumerated(model, first_dim) if sums else model, guide_trace)
    with particles:
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    _refuse_undrawn(model_trace, guide_trace, plate)
    # An auxiliary site belongs to the guide: the model's replay of it must not be counted twice.
    counted = [s for s in model_trace.nodes.values() if _counts(s, plate)]
    if sums:
        kept = frozenset({BATCH_DIM, -1 - nesting})
        summed = summed_log_prob(counted, kept, nesting, first_dim)
        terms = [summed.reshape(summed.shape[0], summed.shape[-1])]
        for name in [n for n, s in model_trace.nodes.items() if s["type"] == "sample" and is_enumerated(s)]:
            model_trace.remove_node(name)
    else:
        terms = [site_terms(s, num_samples, nesting) for s in counted]
    terms += [-site_terms(s, num_samples, nesting) for s in guide_trace.nodes.values() if _counts(s, plate)]
    if not terms:
        raise argument_error("model", "sites inside a data plate at dim -1", "none")
    scale = next((_plate_scale(s) for s in model_trace.nodes.values() if _counts(s, plate)), 1.0)
    total = sum(terms[1:], terms[0])
    batch = max(t.shape[-1] for t in terms)
    return WeightedDraw(total.expand(num_samples, batch), scale, plate, nesting, model_trace, guide_trace)


def _counts(site: Mapping[str, Any], plate: str | None) -> bool:
    return site["type"] == "sample" and not is_subsample(site) and in_batch(site, plate)


def _refuse_undrawn(model_trace: poutine.Trace, guide_trace: poutine.Trace, plate: str | None) -> None:
    """Refuses a latent that only the model draws: its density would count and its proposal would not."""
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or is_subsample(site):
            continue
        if site["is_observed"] or name in guide_trace.nodes:
            continue
        if not is_enumerated(site):
            raise argument_error(
                "guide",
                "a draw of each latent of the model",
                f"none of {name!r}",
                'draw it in the guide, or mark a discrete one infer={"enumerate": "parallel"} to sum it out',
            )
        if not in_batch(site, plate):
            raise argument_error(
                "model",
                "enumerated latents inside the data plate",
                f"{name!r} outside it, which couples all data",
                "draw it in the guide, or condition the model on it",
            )


def _plate_scale(site: Mapping[str, Any]) -> float:
    for frame in site["cond_indep_stack"]:
        if frame.dim == BATCH_DIM:
            return (frame.full_size or frame.size) / frame.size  # type: ignore[no-any-return]
    return 1.0


def _plates(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, str | None, bool]:
    """The depth of the plates, the name of the data plate, and whether a site asks to be summed out."""
    structure_of = getattr(guide, "structure", None)
    if structure_of is not None:
        structure = structure_of(*args, **kwargs)
        return int(structure.nesting), structure.plate, bool(structure.enumerated)
    # A foreign guide: look at both once.
    traces = [prototype(f, args, kwargs) for f in (model, guide)]
    plate = data_plate(traces[0])
    drawn = traces[1].nodes
    sums = any(name not in drawn for name in enumerated_sites(traces[0], plate))
    return max(1, *(plate_nesting(t) for t in traces)), plate, sums


def site_terms(site: Mapping[str, Any], num_samples: int, nesting: int) -> Tensor:
    """One site's log probability as ``(S or 1, B or 1)``, masked, not scaled: every other plate summed."""
    log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
    if log_prob.dim() <= 1:
        return log_prob.reshape(1, -1)
    if log_prob.dim() > nesting + 1:
        raise argument_error(
            "model",
            f"log probabilities over at most {nesting + 1} plates",
            f"shape {tuple(log_prob.shape)} at {site['name']!r}",
            "give dimensions that are not plates to the event with .to_event(n)",
        )
    has_particles = log_prob.dim() == nesting + 1
    inner = tuple(range(1 if has_particles else 0, log_prob.dim() - 1))
    summed = log_prob.sum(inner) if inner else log_prob
    return summed if has_particles else summed.reshape(1, -1)


def global_draw(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """One draw of the guide's global sites (outside the data plate), to be shared by all data and samples."""
    structure_of = getattr(guide, "structure", None)
    if structure_of is not None and not structure_of(*args, **kwargs).others:
        return {}
    with torch.no_grad(), poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args, **kwargs)
    plate = data_plate(model_trace)
    sites: dict[str, Any] = dict(guide_trace.nodes)
    return {
        name: site["value"].detach()
        for name, site in sites.items()
        if site["type"] == "sample"
        and not is_subsample(site)
        and not in_batch(site, plate)
        and name in model_trace.nodes
        and not site["is_observed"]
    }


def refuse_scores(trace: poutine.Trace) -> None:
    """Refuses a relaxed score: a number that no measure normalises is not a likelihood."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and site["is_observed"] and not is_density(site["fn"]):
            raise argument_error(
                "model",
                "a density for the data",
                f"a relaxed score at {name!r}, which is not a likelihood",
                "binarise the data, or use likelihood='continuous_bernoulli'",
            )


def log_weights(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    num_samples: int,
    *,
    chunk_size: int | None = None,
    tolerance: float = 1e-6,
) -> Tensor:
    """``log w_sb = log p(x_b, z_sb) - log q(z_sb | x_b)`` of draws of the guide, ``(S, B)``, in nats.

    ``E[w] = p(x)`` per datum: the sites inside the data plate count, masks applied, plate and annealing
    scales left out. Global latents are conditioned on one draw of the guide (or on ``given=``), shared by all
    data and samples. Hamiltonian guides iterate their fixed points to ``tolerance``; a draw that diverged has
    log weight ``-inf``.

    Args:
        model: The model itself.
        guide: Its guide.
        data: One batch: tensor or array -> ``model(x)``, tuple -> ``model(*batch)``, mapping ->
            ``model(**batch)``.
        num_samples: ``S``.
        chunk_size: Data times samples evaluated at once; memory is bounded by it. None is about 2,000.
        tolerance: Residual of fixed points.

    Returns:
        A tensor ``(S, B)`` without gradients.

    Raises:
        ValueError: Bad data, a model whose data term is a relaxed score, a guide with an unfrozen metric.

    Source: Burda, Grosse and Salakhutdinov (2016), eq. 8.

    Example:
        >>> import pyro.distributions as dist
        >>> from riemvae.guides import GaussianGuide
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> posterior = GaussianGuide(model, lambda x: (x / 2, torch.full_like(x, 0.5**0.5)))
        >>> log_weights(model, posterior, torch.zeros(3, 2), 4).round(decimals=4)[:, 0]
        tensor([-2.5310, -2.5310, -2.5310, -2.5310])
    """
    check_count("num_samples", num_samples)
    _, dtype = placement(model, guide)
    batch = make_batches("data", data, shuffle=False, dtype=dtype, missing=takes_missing(model)).first()
    args, kwargs = batch_call(batch)
    pairs = DEFAULT_CHUNK if chunk_size is None else check_count("chunk_size", chunk_size)
    with torch.no_grad(), evaluating(tolerance, model, guide):
        shared = global_draw(model, guide, args, kwargs)
        size = batch_length(batch)
        return torch.cat(list(weight_chunks(model, guide, args, kwargs, size, num_samples, pairs, shared)))


def weight_chunks(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    num_samples: int,
    pairs: int,
    global_values: Mapping[str, Tensor],
) -> Iterator[Tensor]:
    """The weights of one batch of ``size`` data, ``pairs`` data times samples at once: ``(s, size)`` each.

    Raises:
        ValueError: A relaxed score in place of a density, or a model that draws a subsample of the batch.
    """
    step = max(1, pairs // size)
    for start in range(0, num_samples, step):
        draw = draw_weights(model, guide, args, kwargs, min(step, num_samples - start), global_values)
        if start == 0:
            refuse_scores(draw.model_trace)
            if draw.log_weights.shape[-1] != size:
                raise argument_error(
                    "model",
                    f"one weight for each of the {size} data",
                    f"{draw.log_weights.shape[-1]} of them",
                    "let the model take the batch as it is, not a subsample that it draws itself",
                )
        yield torch.where(torch.isnan(draw.log_weights), -math.inf, draw.log_weights)


def placement(*callables: Callable[..., Any]) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and floating type of the first parameter among modules; None where there is none."""
    for fn in callables:
        if isinstance(fn, nn.Module):
            for parameter in fn.parameters():
                if parameter.is_floating_point():
                    return parameter.device, parameter.dtype
    return None, None


def log_mean_exp(log_weights: Tensor, dim: int = 0) -> Tensor:
    """``log mean exp`` along ``dim``; ``-inf`` where all are."""
    return torch.logsumexp(log_weights, dim) - math.log(log_weights.shape[dim])
