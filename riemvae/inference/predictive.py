"""What a model predicts: draws of data from the prior or the posterior, and checks of data against them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from riemvae._checks import argument_error, check_count
from riemvae._seeding import forked
from riemvae.guides.log_joint import in_batch, is_subsample
from riemvae.inference.batches import batch_call, batch_length, make_batches, map_batch, takes_missing
from riemvae.inference.resampling import (
    PosteriorDraws,
    Redraw,
    datum_first,
    global_latents,
    layout_of,
    local_latents,
    observed_sites,
    refuse_large,
    run_at,
    structure_of,
    visit_draws,
)
from riemvae.inference.weights import DEFAULT_CHUNK, placement

_LESS = "ask for fewer draws, fewer data or fewer sites=, or for statistics with predictive_check"


def posterior_predictive(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    num_samples: int = 100,
    *,
    resample: bool = True,
    num_proposals: int | None = None,
    num_globals: int | None = None,
    sites: Sequence[str] | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    tolerance: float = 1e-6,
    progress: bool = False,
) -> dict[str, Tensor]:
    """New data ``x̃ ~ ∫ p(x̃|z) p(z|x) dz`` for each datum, ``(S, B, ...)`` by site.

    The guide's draws of ``z`` are resampled by their importance weights, so that they are draws of the
    posterior and not of the guide; then the observed sites in the data plate are drawn from the model given
    them. Masked entries are drawn too. Global latents are drawn from the guide, which is not weighed, and
    shared by all data of a draw.

    Args:
        model: The model itself.
        guide: Its guide.
        data: Tensor, array, tuple or mapping of these, data set or loader.
        num_samples: ``S``.
        resample: False keeps the guide's own draws.
        num_proposals: Draws of the guide that are resampled to ``num_samples``; None is 4 for each, at least
            200.
        num_globals: Different draws of the global latents among the ``S``, where the guide has such; None is
            20.
        sites: Names of sites to return, latent ones in the data plate too; None is all observed ones.
            Observed sites that are not named stay as they were observed.
        chunk_size: Data times samples at once; None is about 2,000.
        seed: Of the draws; the caller's generator is left as it was.
        tolerance: Residual of fixed points of Riemannian guides.
        progress: Shows a bar.

    Returns:
        Draws by site. Plates besides the data plate follow it: ``(S, B, *plates, *event)``.

    Raises:
        ValueError: Bad data, an unknown site, a model that observes nothing in the data plate, a relaxed
            score, draws that all diverged, or a result of more than 2²⁸ numbers.

    Source: Rubin (1987) for the resampling; Gelman et al. (2013), section 6.3.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from riemvae.guides import GaussianGuide
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> guide = GaussianGuide(model, lambda x: (x / 2, torch.ones_like(x)))
        >>> draws = posterior_predictive(model, guide, torch.zeros(3, 2), 500, seed=0)["x"]
        >>> draws.shape, round(float(draws.var()), 1)  # the posterior's 0.5 and the noise's 1
        (torch.Size([500, 3, 2]), 1.5)
    """
    total = _num_data(data)

    def visit(
        args: tuple[Any, ...], kwargs: dict[str, Any], size: int, groups: list[PosteriorDraws]
    ) -> dict[str, Tensor]:
        drawn = predict(model, args, kwargs, size, groups, sites)
        each = sum(math.prod(value.shape[2:]) for value in drawn.values())
        refuse_large("num_samples", num_samples * max(total, size) * each, _LESS)
        return drawn

    return visit_draws(
        *(model, guide, data, num_samples, visit),
        resample=resample,
        num_proposals=num_proposals,
        num_globals=num_globals,
        chunk_size=chunk_size,
        seed=seed,
        tolerance=tolerance,
        progress=progress,
    )


def predict(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    groups: Sequence[PosteriorDraws],
    sites: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """New data of one batch at draws of its latents, ``(S, B, ...)`` by site."""
    parts: list[dict[str, Tensor]] = []
    for draws in groups:
        num = len(draws.log_weights)
        names, nesting = _names(model, args, kwargs, sites, draws.values), draws.nesting
        redrawn = [name for name in names if name not in draws.values]
        part = {name: draws.values[name] for name in names if name in draws.values}
        if redrawn:
            held = {**draws.shared, **draws.vectorised()}
            trace = run_at(model, args, kwargs, held, num, nesting, redrawn)
            part |= {name: _value(trace, name, nesting, num, size) for name in redrawn}
        parts.append({name: part[name] for name in names})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _names(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sites: Sequence[str] | None,
    latents: Mapping[str, Any],
) -> list[str]:
    trace, plate, _ = structure_of(model, args, kwargs)
    data = list(observed_sites(trace, plate))
    if sites is None:
        if not data:
            raise argument_error(
                "model",
                "observed sites in a data plate at dim -1",
                "none",
                "draw its data with pyro.sample(..., obs=x), not with a factor",
            )
        return data
    known = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not is_subsample(site) and in_batch(site, plate)
    ]
    for name in sites:
        if name not in known and name not in latents:
            raise argument_error("sites", f"names among {sorted({*known, *latents})}", repr(name))
    return list(sites)


def _value(
    trace: poutine.Trace, name: str, nesting: int, num: int, size: int, in_draws: bool = True
) -> Tensor:
    site: Any = trace.nodes[name]
    return datum_first(site["value"].detach(), layout_of(site, nesting, in_draws), nesting, num, size)


def _num_data(data: Any) -> int:
    """How many data there are, 0 where only a pass over them tells."""
    if hasattr(data, "dataset"):
        data = data.dataset
    if isinstance(data, Mapping) or (isinstance(data, (tuple, list)) and len(data)):
        data = next(iter(data.values())) if isinstance(data, Mapping) else data[0]
    try:
        return len(data)
    except TypeError:
        return 0


def prior_predictive(
    model: Callable[..., Any],
    data: Any = None,
    num_samples: int = 100,
    *,
    size: int | None = None,
    sites: Sequence[str] | None = None,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Draws of data and latents from the model before it has seen any data, ``(S, B, ...)`` by site.

    Args:
        model: The model itself.
        data: One batch of the shape to draw; its values matter only for arguments that the model does not
            observe (covariates). None for a model that takes ``size=``, as ``VAE`` does.
        num_samples: ``S``.
        size: ``B`` without ``data``; None is 1.
        sites: Names of sites to return; None is all sites in the data plate, and the latents outside it,
            ``(S, ...)``.
        seed: Of the draws; the caller's generator is left as it was.

    Returns:
        Draws by site.

    Raises:
        ValueError: An unknown site, both ``data`` and ``size``, or a result of more than 2²⁸ numbers.

    Source: Gelman et al. (2013), section 6.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> draws = prior_predictive(model, torch.zeros(3, 2), 500, seed=0)
        >>> draws["x"].shape, abs(float(draws["x"].var()) - 2) < 0.2
        (torch.Size([500, 3, 2]), True)
    """
    check_count("num_samples", num_samples)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if data is None:
        kwargs = {"size": 1 if size is None else check_count("size", size)}
        if not takes_size(model):
            raise argument_error(
                "data", "a batch of the shape to draw, since the model takes no size=", None, "pass data="
            )
    elif size is not None:
        raise argument_error("size", "None, since the data tell it", size)
    else:
        device, dtype = placement(model)
        batch = make_batches("data", data, shuffle=False, dtype=dtype, missing=takes_missing(model)).first()
        if device is not None:
            batch = map_batch(lambda a: a.to(device) if isinstance(a, Tensor) else a, batch)
        args, kwargs = batch_call(batch)
        size = batch_length(batch)
    with forked(seed), torch.no_grad():
        return prior_draws(model, args, kwargs, size or 1, num_samples, sites)


def prior_draws(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    num_samples: int,
    sites: Sequence[str] | None = None,
    shared: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Draws of a model whose data are let go; ``shared`` holds the values of its global latents."""
    held = poutine.condition(model, dict(shared)) if shared else model
    trace, plate, nesting = structure_of(held, args, kwargs)
    data = list(observed_sites(trace, plate))
    local = list(local_latents(trace, plate))
    free = list(global_latents(trace, plate))
    names = [*free, *local, *data] if sites is None else list(sites)
    for name in names:
        if name not in trace.nodes or trace.nodes[name]["type"] != "sample":
            raise argument_error("sites", f"names among {[*free, *local, *data]}", repr(name))
    nodes: dict[str, Any] = dict(trace.nodes)
    numbers = sum(nodes[name]["value"].numel() for name in names)
    refuse_large("num_samples", num_samples * numbers, _LESS)
    # Draws of global latents run through the model one by one: a user's model need not broadcast over them.
    step = 1 if free else max(1, DEFAULT_CHUNK // size)
    parts: list[dict[str, Tensor]] = []
    for start in range(0, num_samples, step):
        num = min(step, num_samples - start)
        if free:
            with poutine.block():
                drawn = poutine.trace(Redraw(data)(held)).get_trace(*args, **kwargs)
            nodes = dict(drawn.nodes)
            part = {name: nodes[name]["value"].detach().unsqueeze(0) for name in names if name in free}
        else:
            drawn, part = run_at(held, args, kwargs, {}, num, nesting, data), {}
        part |= {
            name: _value(drawn, name, nesting, num, size, not free) for name in names if name not in free
        }
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def takes_size(model: Callable[..., Any]) -> bool:
    """Whether a model draws ``n`` data when called with ``size=n`` alone."""
    try:
        parameters = inspect.signature(getattr(model, "forward", model)).parameters
    except (TypeError, ValueError):
        return False
    others = [p for name, p in parameters.items() if name != "size"]
    optional = all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others)
    return "size" in parameters and optional


@dataclass(frozen=True)
class PredictiveCheck:
    """A statistic of the data beside its values on data that the model predicts.

    Attributes:
        observed: ``T(x_b)``, ``(B,)``; for a discrepancy ``T(x_b, z_sb)``, ``(S, B)``.
        predicted: ``T(x̃_sb)``, ``(S, B)``.
        p_value: ``P(T(x̃_b) ≥ T(x_b) | x_b)`` of each datum, ties counted half, ``(B,)``. Near 0 the datum's
            statistic is larger than the model predicts, near 1 smaller.
        set_p_value: The same for the mean of the statistic over the set.
        name: The site.
    """

    observed: Tensor
    predicted: Tensor
    p_value: Tensor
    set_p_value: float
    name: str

    def __len__(self) -> int:
        return self.predicted.shape[1]

    @property
    def extreme(self) -> float:
        """The share of data with a tail probability below 2.5 % on either side."""
        return float(((self.p_value < 0.025) | (self.p_value > 0.975)).float().mean())

    def summary(self) -> dict[str, float]:
        """Means of the statistic, the set's tail probability and the share of extreme data."""
        return {
            "observed": float(self.observed.mean()),
            "predicted": float(self.predicted.mean()),
            "set_p_value": self.set_p_value,
            "extreme_share": self.extreme,
            "num_data": float(len(self)),
            "num_samples": float(len(self.predicted)),
        }

    def __repr__(self) -> str:
        s = self.summary()
        return (
            f"PredictiveCheck({self.name!r}: observed {s['observed']:.4g}, predicted {s['predicted']:.4g}, "
            f"P(T(x̃) ≥ T(x)) = {self.set_p_value:.3f} over {len(self)} data, "
            f"{100 * self.extreme:.0f} % of them in the outer 5 %)"
        )


def predictive_check(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    statistic: Callable[..., Tensor],
    num_samples: int = 200,
    *,
    site: str | None = None,
    latent: str | None = None,
    resample: bool = True,
    num_proposals: int | None = None,
    num_globals: int | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    tolerance: float = 1e-6,
    progress: bool = False,
) -> PredictiveCheck:
    """Posterior predictive check: is a statistic of the data as the model predicts it?

    ``p_b = P(T(x̃_b) ≥ T(x_b) | x_b)`` over draws of the posterior predictive, and the same for the mean of
    ``T`` over the set. The data are used twice, for the posterior and for the comparison: where the model is
    true these probabilities gather around 1/2 more than uniform ones, so values near 0 and 1 are telling and
    middling ones are not proof. Only the statistics are kept, whatever the size of the data.

    Args:
        model: The model itself.
        guide: Its guide.
        data: Tensor, array, tuple or mapping of these, data set or loader.
        statistic: ``T``, from data ``(S, B, *event)`` to ``(S, B)``; leading dimensions are free.
        num_samples: ``S``.
        site: The observed site, needed where the model has several.
        latent: Name of a latent site: then ``T(x, z)`` is a discrepancy, called with ``x`` and ``z`` of equal
            leading dimensions, for the data and for the predictions at the same draws of ``z``.
        resample: As in :func:`posterior_predictive`, with ``num_proposals`` and ``num_globals``.
        num_proposals: See ``resample``.
        num_globals: See ``resample``.
        chunk_size: Data times samples at once; None is about 2,000.
        seed: Of the draws; the caller's generator is left as it was.
        tolerance: Residual of fixed points of Riemannian guides.
        progress: Shows a bar.

    Returns:
        A :class:`PredictiveCheck`.

    Raises:
        ValueError: Several observed sites and no ``site``, a statistic of the wrong shape, bad data.

    Source: Rubin (1984); Gelman, Meng and Stern (1996).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from riemvae.guides import GaussianGuide
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> guide = GaussianGuide(model, lambda x: (x / 2, torch.ones_like(x)))
        >>> largest = lambda x: x.max(-1).values
        >>> x = torch.tensor([[0.0, 0.0], [9.0, 0.0]])  # the second lies far from what it predicts
        >>> predictive_check(model, guide, x, largest, seed=0).p_value < 0.01
        tensor([False,  True])
    """

    def visit(
        args: tuple[Any, ...], kwargs: dict[str, Any], size: int, groups: list[PosteriorDraws]
    ) -> dict[str, Tensor]:
        trace, plate, _ = structure_of(model, args, kwargs)
        found = observed_sites(trace, plate)
        if site is None and len(found) != 1:
            raise argument_error("site", f"one of the observed sites {sorted(found)}", None, "name it")
        name = next(iter(found)) if site is None else site
        if name not in found:
            raise argument_error("site", f"one of the observed sites {sorted(found)}", repr(name))
        drawn = predict(model, args, kwargs, size, groups, [name] if latent is None else [name, latent])
        # The draw of structure_of: the data themselves, laid out as the predictions are.
        nesting = groups[0].nesting
        data_value = datum_first(found[name]["value"], layout_of(found[name], nesting), nesting, 1, size)
        x = data_value if latent is None else data_value.expand_as(drawn[name])
        z = () if latent is None else (drawn[latent],)
        result = {"observed": statistic(x, *z), "predicted": statistic(drawn[name], *z)}
        for key, value in result.items():
            expected = (1 if latent is None and key == "observed" else num_samples, size)
            if not isinstance(value, Tensor) or value.shape != expected:
                raise argument_error(
                    "statistic",
                    f"a function to one number a datum: of shape {expected} here",
                    value,
                    "reduce the event's dimensions and leave the leading ones alone",
                )
        names.append(name)
        return {key: value.double() for key, value in result.items()}

    names: list[str] = []
    found = visit_draws(
        *(model, guide, data, num_samples, visit),
        resample=resample,
        num_proposals=num_proposals,
        num_globals=num_globals,
        chunk_size=chunk_size,
        seed=seed,
        tolerance=tolerance,
        progress=progress,
    )
    observed, predicted = found["observed"], found["predicted"]
    whole, of_data = predicted.mean(1), observed.mean(1)
    return PredictiveCheck(
        observed if len(observed) > 1 else observed[0],
        predicted,
        _tail(predicted, observed),
        float(_tail(whole, of_data)),
        names[0],
    )


def _tail(predicted: Tensor, observed: Tensor) -> Tensor:
    """``P(predicted ≥ observed)`` along the first dimension, ties counted half."""
    return ((predicted > observed).double() + 0.5 * (predicted == observed).double()).mean(0)
