"""Posteriors of a model in ArviZ's terms: draws of a guide, or of Markov chains over the global latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_choice, check_count
from riemvae._seeding import forked
from riemvae.guides.evaluation import evaluating
from riemvae.inference.batches import batch_call, batch_length, make_batches, map_batch, takes_missing
from riemvae.inference.pointwise import pointwise_log_likelihood
from riemvae.inference.predictive import predict, prior_draws
from riemvae.inference.resampling import (
    PosteriorDraws,
    datum_first,
    global_latents,
    layout_of,
    local_latents,
    log_probs,
    observed_sites,
    refuse_large,
    run_at,
    structure_of,
    visit_draws,
)
from riemvae.inference.weights import DEFAULT_CHUNK, placement
from riemvae.sampling.diagnostics import from_groups

_LESS = "take fewer draws or data, or leave the group out with prior=False, posterior_predictive=False"
_CONDITIONAL = (
    "log p(x_b | z_sb) at draws of the local latents, which were inferred from x_b: az.loo and az.waic of it "
    "are conditional and mislead. The marginal log p(x_b), for comparisons on held-out data, is "
    "constant_data['log_marginal']."
)
_MARGINAL = "log p(x_b | theta), local latents integrated out by importance sampling"
_RESAMPLED = "weights that the draws had in the guide's; they are resampled already: do not weigh them again"
_WEIGHTED = "log p(x_b, z_sb) - log q(z_sb | x_b) of the guide's draws: weigh them by its exponential"


def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None = None,
    data: Any = None,
    num_samples: int = 100,
    *,
    posterior: str = "resampled",
    prior: bool = True,
    posterior_predictive: bool = True,
    log_likelihood: bool = True,
    mcmc: Any = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    num_proposals: int | None = None,
    num_globals: int | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    tolerance: float = 1e-6,
    progress: bool = False,
) -> Any:
    """A model's posterior for ArviZ: ``InferenceData`` before ArviZ 1, an xarray ``DataTree`` from it on.

    **With a guide**, of data with local latents: ``posterior`` holds ``num_samples`` draws of each datum's
    latents in one chain, with dimensions ``(chain, draw, subject, latent)``: the guide's draws, resampled by
    their importance weights. ``sample_stats/log_weight`` is ``(chain, draw, subject)``; ``constant_data``
    holds, by subject, ``log_marginal`` (``log p̂(x_b)``, what models are compared by), its Monte Carlo error
    ``log_marginal_mcse``, and ``khat`` and ``ess`` of the guide's weights. ``log_likelihood`` is
    ``log p(x_b | z_sb)``: it serves pointwise pictures, but ``az.loo`` of it is conditional on latents that
    were inferred from the very datum, and misleads; its attributes say so.

    **With ``mcmc``**, Markov chains over the *global* latents (Pyro's ``MCMC``, :class:`BatchedMCMC`, or
    draws by name): ``log_likelihood`` is ``log p(x_b | θ)`` with the local latents integrated out by the
    guide's importance weights (``num_samples`` of them for each ``θ``), so that ``az.loo`` is leave-one-out
    as it should be. A model without local latents needs no guide. ``posterior_predictive`` is of new
    subjects, whose local latents come from the prior at ``θ``, unless the chains have draws of these too.

    Args:
        model: The model itself.
        guide: Its guide. With ``mcmc``, of the local latents, its ``given=`` replaced by each draw of ``θ``.
        data: One batch or all the data: tensor, array, tuple or mapping of these.
        num_samples: Draws of the guide.
        posterior: ``"resampled"`` by the weights, or the guide's own draws ``"weighted"``: not the
            posterior's until weighed by ``sample_stats/log_weight``.
        prior: Adds ``prior`` and ``prior_predictive``, as many draws.
        posterior_predictive: Adds data drawn at the posterior's draws.
        log_likelihood: Adds it.
        mcmc: ``pyro.infer.MCMC`` after its run, or draws by name, each ``(chains, draws, ...)``.
        coords: Coordinates by dimension, such as ``{"subject": names, "time": times}``. ``subject`` and
            ``latent`` are numbered otherwise.
        dims: Names of the dimensions of a variable, its chain, draw and subject left out, such as
            ``{"x": ["time"]}`` for a series a datum.
        num_proposals: Draws of the guide that are resampled; None is 4 for each draw, at least 200.
        num_globals: Different draws of the guide's global latents; None is 20.
        chunk_size: Data times samples at once; None is about 2,000.
        seed: Of the draws; the caller's generator is left as it was.
        tolerance: Residual of fixed points of Riemannian guides.
        progress: Shows a bar.

    Returns:
        ArviZ's own object.

    Raises:
        ValueError: No data; neither guide nor chains; local latents and chains but no guide; draws that all
            diverged; coordinates of the wrong length; a group of more than 2²⁸ numbers.

    Source: Kumar, Carroll, Hartikainen and Martin (2019); Vehtari, Gelman and Gabry (2017) for LOO.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from riemvae.guides import GaussianGuide
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> guide = GaussianGuide(model, lambda x: (x / 2, torch.ones_like(x)))
        >>> data = to_arviz(model, guide, torch.zeros(3, 2), 50, coords={"subject": ["a", "b", "c"]})
        >>> dict(data.posterior["z"].sizes)
        {'chain': 1, 'draw': 50, 'subject': 3, 'latent': 2}
    """
    check_choice("posterior", posterior, ["resampled", "weighted"])
    check_count("num_samples", num_samples)
    if data is None:
        raise argument_error("data", "the data that the posterior is of", None, "pass data=")
    if guide is None and mcmc is None:
        raise argument_error("guide", "a guide, or chains as mcmc=", None)
    device, dtype = placement(*(f for f in (model, guide) if f is not None))
    batch = make_batches("data", data, shuffle=False, dtype=dtype, missing=takes_missing(model)).first()
    if device is not None:
        batch = map_batch(lambda a: a.to(device) if isinstance(a, Tensor) else a, batch)
    pairs = DEFAULT_CHUNK if chunk_size is None else check_count("chunk_size", chunk_size)
    groups = _Groups(batch_length(batch), coords, dims)
    with forked(seed), torch.no_grad(), evaluating(tolerance, model, guide):
        if mcmc is None:
            found, layouts = _of_guide(
                *(model, guide, batch, num_samples, posterior == "resampled", log_likelihood),
                predictive=posterior_predictive,
                num_proposals=num_proposals,
                num_globals=num_globals,
                chunk_size=chunk_size,
                tolerance=tolerance,
                progress=progress,
            )
        else:
            found, layouts = _of_chains(
                *(model, guide, batch, num_samples, mcmc, log_likelihood, posterior_predictive, pairs)
            )
        if prior:
            args, kwargs = batch_call(batch)
            drawn = prior_draws(model, args, kwargs, groups.size, num_samples)
            trace, plate, _ = structure_of(model, args, kwargs)
            names = observed_sites(trace, plate)
            found["prior"] = {n: v.unsqueeze(0) for n, v in drawn.items() if n not in names}
            found["prior_predictive"] = {n: v.unsqueeze(0) for n, v in drawn.items() if n in names}
            layouts |= {n: (n in names or n in local_latents(trace, plate)) for n in drawn}
    for group, variables in found.items():
        groups.add(group, variables, layouts)
    notes = {"sample_stats": {"log_weight": _RESAMPLED if posterior == "resampled" else _WEIGHTED}}
    if mcmc is None or guide is not None:
        note = _CONDITIONAL if mcmc is None else _MARGINAL
        notes["log_likelihood"] = dict.fromkeys(found.get("log_likelihood", {}), note)
    return groups.build(notes)


def _of_guide(
    model: Callable[..., Any],
    guide: Any,
    batch: Any,
    num_samples: int,
    resample: bool,
    log_likelihood: bool,
    *,
    predictive: bool,
    **options: Any,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, bool]]:
    shared: dict[str, Tensor] = {}
    total = batch_length(batch)

    def visit(
        args: tuple[Any, ...], kwargs: dict[str, Any], size: int, groups: list[PosteriorDraws]
    ) -> dict[str, Tensor]:
        result = {f"posterior:{n}": torch.cat([d.values[n] for d in groups]) for n in groups[0].values}
        result["sample_stats:log_weight"] = torch.cat([d.log_weights for d in groups])
        log_count = torch.stack([d.log_prob for d in groups])
        spread = torch.stack([d.mcse for d in groups])
        shares = torch.softmax(log_count, 0)
        result["datum:log_marginal"] = torch.logsumexp(log_count, 0) - torch.tensor(float(len(groups))).log()
        result["datum:log_marginal_mcse"] = (shares * spread).square().sum(0).sqrt()
        result["datum:khat"] = torch.stack([d.khat for d in groups]).max(0).values
        result["datum:ess"] = torch.stack([d.ess for d in groups]).sum(0)
        if predictive:
            drawn = predict(model, args, kwargs, size, groups)
            numbers = sum(value[0, 0].numel() for value in drawn.values())
            refuse_large("num_samples", num_samples * total * numbers, _LESS)
            result |= {f"posterior_predictive:{n}": v for n, v in drawn.items()}
        if log_likelihood:
            trace, plate, _ = structure_of(model, args, kwargs)
            names = list(observed_sites(trace, plate))
            parts = []
            for d in groups:
                num = len(d.log_weights)
                at = run_at(model, args, kwargs, {**d.shared, **d.vectorised()}, num, d.nesting)
                parts.append(log_probs(at, names, d.nesting, num, size))
            result |= {f"log_likelihood:{n}": torch.cat([p[n] for p in parts]) for n in parts[0]}
        if not shared and groups[0].shared:
            counts = [len(d.log_weights) for d in groups]
            for name in groups[0].shared:
                rows = [d.shared[name].expand(n, *d.shared[name].shape) for d, n in zip(groups, counts)]
                shared[name] = torch.cat(rows).unsqueeze(0)
        return result

    flat = visit_draws(model, guide, batch, num_samples, visit, resample=resample, **options)
    found: dict[str, dict[str, Tensor]] = {"posterior": dict(shared)}
    layouts = dict.fromkeys(shared, False)
    for key, value in flat.items():
        group, name = key.split(":", 1)
        if group == "datum":
            found.setdefault("constant_data", {})[name] = value
        else:
            found.setdefault(group, {})[name] = value.unsqueeze(0)
        layouts[name] = True
    found["observed_data"] = _observed(model, batch)
    return found, layouts | dict.fromkeys(found["observed_data"], True)


def _observed(model: Callable[..., Any], batch: Any) -> dict[str, Tensor]:
    """The data by site, ``(B, ...)``."""
    args, kwargs = batch_call(batch)
    trace, plate, nesting = structure_of(model, args, kwargs)
    return {
        name: datum_first(site["value"], layout_of(site, nesting), nesting, 1, batch_length(batch))[0]
        for name, site in observed_sites(trace, plate).items()
    }


def _of_chains(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    batch: Any,
    num_samples: int,
    mcmc: Any,
    log_likelihood: bool,
    predictive: bool,
    pairs: int,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, bool]]:
    args, kwargs = batch_call(batch)
    size = batch_length(batch)
    draws = _chain_draws(mcmc)
    trace, plate, nesting = structure_of(model, args, kwargs)
    local = local_latents(trace, plate)
    missing = [name for name in global_latents(trace, plate) if name not in draws]
    if missing:
        raise argument_error(
            "mcmc", "draws of every global latent", f"nothing for {missing}, only {list(draws)}"
        )
    layouts = dict.fromkeys(draws, False)
    found: dict[str, dict[str, Tensor]] = {"posterior": {}, "observed_data": _observed(model, batch)}
    layouts |= dict.fromkeys(found["observed_data"], True)
    for name, value in draws.items():
        if name in local:  # (chains, draws, plates, B, event): the data first
            lead = value.shape[:2]
            flat = datum_first(value.flatten(0, 1), layout_of(local[name], nesting), nesting, -1, size)
            value, layouts[name] = flat.reshape(lead + flat.shape[1:]), True
        found["posterior"][name] = value
    stats = _chain_stats(mcmc)
    if stats:
        found["sample_stats"] = stats
    chains, length = next(iter(draws.values())).shape[:2]
    values = {name: value.flatten(0, 1) for name, value in draws.items() if name in trace.nodes}
    values = {name: value.to(_like(trace, name)) for name, value in values.items() if name not in local}
    if log_likelihood and values:
        pointwise = pointwise_log_likelihood(
            *(model, guide, args, kwargs, size, values, num_samples, pairs),
        )
        found["log_likelihood"] = {n: v.reshape(chains, length, size) for n, v in pointwise.items()}
        layouts |= dict.fromkeys(pointwise, True)
    if predictive:
        numbers = sum(value.numel() for value in found["observed_data"].values())
        refuse_large("mcmc", chains * length * numbers, "thin the chains, or pass posterior_predictive=False")
        held = {name: value.flatten(0, 1) for name, value in draws.items() if name in trace.nodes}
        # Local latents without draws of their own come from the prior at θ: new data of new subjects.
        parts = [
            prior_draws(
                *(model, args, kwargs, size, 1, list(found["observed_data"])),
                shared={name: value[index] for name, value in held.items()},
            )
            for index in range(chains * length)
        ]
        found["posterior_predictive"] = {
            name: torch.cat([part[name] for part in parts]).reshape(chains, length, *parts[0][name].shape[1:])
            for name in parts[0]
        }
    return found, layouts


def _like(trace: Any, name: str) -> Tensor:
    return trace.nodes[name]["value"]  # type: ignore[no-any-return]


def _chain_draws(mcmc: Any) -> dict[str, Tensor]:
    """Draws by site, ``(chains, draws, ...)``."""
    if isinstance(mcmc, Mapping):
        draws = {name: torch.as_tensor(value) for name, value in mcmc.items()}
    elif hasattr(mcmc, "get_samples"):
        draws = dict(mcmc.get_samples(group_by_chain=True))
    else:
        raise argument_error("mcmc", "pyro.infer.MCMC after its run, or draws by name", mcmc)
    shapes = {tuple(value.shape[:2]) for value in draws.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise argument_error("mcmc", "draws (chains, draws, ...) of equal leading sizes", f"{sorted(shapes)}")
    return draws


def _chain_stats(mcmc: Any) -> dict[str, Tensor]:
    """What a batched sampler knows of each draw, and the divergences of Pyro's, ``(chains, draws)``."""
    trace = getattr(getattr(mcmc, "result", None), "trace", None)
    if trace is not None:
        return {
            "lp": mcmc.result.log_density.mT,
            "acceptance_rate": trace.acceptance.mT,
            "energy_error": trace.energy_error.mT,
            "diverging": trace.diverged.mT,
        }
    if not hasattr(mcmc, "diagnostics"):
        return {}
    diverging = torch.zeros(next(iter(_chain_draws(mcmc).values())).shape[:2], dtype=torch.bool)
    for chain, found in enumerate(mcmc.diagnostics().get("divergences", {}).values()):
        diverging[chain, [int(index) for index in found]] = True
    return {"diverging": diverging}


# -- ArviZ -------------------------------------------------------------------------------------------------


class _Groups:
    """Groups of variables with named dimensions, as every version of ArviZ takes them."""

    def __init__(
        self,
        size: int,
        coords: Mapping[str, Sequence[Any]] | None,
        dims: Mapping[str, Sequence[str]] | None,
    ) -> None:
        self.size = size
        self.given_dims = {name: list(value) for name, value in (dims or {}).items()}
        self.coords: dict[str, Any] = dict(coords or {})
        self.coords.setdefault("subject", list(range(size)))
        if len(self.coords["subject"]) != size:
            raise argument_error(
                "coords['subject']", f"{size} names, one a datum", f"{len(self.coords['subject'])} of them"
            )
        self.arrays: dict[str, dict[str, Tensor]] = {}
        self.dims: dict[str, dict[str, list[str]]] = {}

    def add(self, group: str, variables: Mapping[str, Tensor], of_subjects: Mapping[str, bool]) -> None:
        """Adds ``(chains, draws, B, ...)``, or ``(B, ...)`` of data; without ``B`` for global variables."""
        lead = 0 if group in ("observed_data", "constant_data") else 2
        for name, value in variables.items():
            subjects = of_subjects.get(name, False)
            rest = tuple(value.shape[lead + int(subjects) :])
            named = ["subject"] if subjects else []
            self.dims.setdefault(group, {})[name] = named + self._names(name, rest, group)
            self.arrays.setdefault(group, {})[name] = value

    def _names(self, name: str, rest: tuple[int, ...], group: str) -> list[str]:
        given = self.given_dims.get(name) if rest else None
        if given is not None:
            if len(given) != len(rest):
                raise argument_error(f"dims[{name!r}]", f"{len(rest)} names for the shape {rest}", f"{given}")
            names = given
        elif group in ("posterior", "prior") and len(rest) == 1:
            # Latents of one size share the dimension; of another, they get their own.
            names = ["latent"]
            if "latent" in self.coords and len(self.coords["latent"]) != rest[0]:
                names = [f"{name}_dim_0"]
        else:
            names = [f"{name}_dim_{i}" for i in range(len(rest))]
        for dim, length in zip(names, rest):
            if len(self.coords.setdefault(dim, list(range(length)))) != length:
                raise argument_error(
                    f"coords[{dim!r}]",
                    f"{length} values, as {name!r} has",
                    f"{len(self.coords[dim])} of them",
                )
        return names

    def build(self, notes: Mapping[str, Mapping[str, str]]) -> Any:
        """The object, with a ``note`` in the attributes of some variables."""
        built = from_groups(self.arrays, self.dims, self.coords)
        for group, variables in notes.items():
            for name, note in variables.items():
                if note and name in self.arrays.get(group, {}):
                    built[group][name].attrs["note"] = note
        return built
