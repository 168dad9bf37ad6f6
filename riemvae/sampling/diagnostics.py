"""Convergence of chains: rank-normalised split R-hat and effective sample sizes, through ArviZ."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_choice


def split_rhat(draws: Tensor) -> Tensor:
    """The rank-normalised split R-hat of each coordinate: near 1, below 1.01, when chains have mixed.

    The larger of the bulk's and the folded (tail) statistic, as ``arviz.rhat``.

    Args:
        draws: ``(draws, chains, ...)``, as ``ChainResult.samples``.

    Returns:
        Shape ``(...)``; NaN for a single chain, or fewer than 4 draws.

    Raises:
        ValueError: when there are not two leading dimensions.

    Source: Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bool(split_rhat(torch.randn(500, 4)) < 1.01)
        True
    """
    return _statistic("rhat", draws, method="rank")


def effective_sample_size(draws: Tensor, kind: str = "bulk") -> Tensor:
    """How many independent draws the chains' draws of each coordinate are worth.

    Args:
        draws: ``(draws, chains, ...)``, as ``ChainResult.samples``.
        kind: ``"bulk"`` (for means and medians), ``"tail"`` (the smaller of those of the 5 % and 95 %
            quantiles).

    Returns:
        Shape ``(...)``, over all chains together; NaN for fewer than 4 draws.

    Raises:
        ValueError: on another kind, or when there are not two leading dimensions.

    Source: Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> size = effective_sample_size(torch.randn(500, 4, 2))
        >>> size.shape, bool((size > 1500).all())
        (torch.Size([2]), True)
    """
    return _statistic("ess", draws, method=check_choice("kind", kind, ["bulk", "tail"]))


def to_inference_data(
    posterior: Mapping[str, Tensor], sample_stats: Mapping[str, Tensor] | None = None
) -> Any:
    """Chains as ArviZ keeps them: an ``InferenceData`` before ArviZ 1, an xarray ``DataTree`` from it on.

    Args:
        posterior: draws by name, each ``(chains, draws, ...)``.
        sample_stats: what the sampler did, by ArviZ's names, each ``(chains, draws)``.

    Example:
        >>> data = to_inference_data({"z": torch.zeros(4, 100, 2)})
        >>> data.posterior["z"].shape
        (4, 100, 2)
    """
    return from_groups({"posterior": posterior} | ({"sample_stats": sample_stats} if sample_stats else {}))


def from_groups(
    groups: Mapping[str, Mapping[str, Tensor]],
    dims: Mapping[str, Mapping[str, list[str]]] | None = None,
    coords: Mapping[str, Any] | None = None,
) -> Any:
    """Groups of variables as ArviZ keeps them, in every version of it.

    Args:
        groups: Variables by name for each of ArviZ's groups: ``(chains, draws, ...)`` of sampled ones, and
            without the two of observed and constant data.
        dims: For each group the names of a variable's dimensions, chain and draw left out. A name may have
            other dimensions in another group, as ``x`` has in the log-likelihood.
        coords: Coordinates by dimension.

    Example:
        >>> draws = {"posterior": {"z": torch.zeros(4, 100, 2)}}
        >>> data = from_groups(draws, {"posterior": {"z": ["latent"]}}, {"latent": ["a", "b"]})
        >>> data.posterior["z"].dims
        ('chain', 'draw', 'latent')
    """
    import arviz as az  # takes seconds to import

    by_group = "posterior" in inspect.signature(az.from_dict).parameters  # ArviZ below 1
    parts: dict[str, Any] = {}
    with warnings.catch_warnings():
        # Many short chains are what batched kernels are good at, and one long one what a guide is.
        warnings.filterwarnings("ignore", message="More chains|Found chain dimension to be longer")
        for group, variables in groups.items():
            arrays = {name: values.detach().cpu().numpy() for name, values in variables.items()}
            named = {} if dims is None else dict(dims.get(group, {}))
            used = {dim for names in named.values() for dim in names}
            options: dict[str, Any] = {
                "dims": named or None,
                "coords": {dim: values for dim, values in (coords or {}).items() if dim in used} or None,
            }
            if by_group:
                options[group] = arrays
                parts[group] = az.from_dict(**options)
            else:
                parts[group] = az.from_dict({group: arrays}, **options)[group].to_dataset()
        if by_group:
            return az.concat(*parts.values()) if len(parts) > 1 else next(iter(parts.values()))
    import xarray

    return xarray.DataTree.from_dict(parts)


def _statistic(name: str, draws: Tensor, **options: Any) -> Tensor:
    if not isinstance(draws, Tensor) or draws.dim() < 2:
        raise argument_error("draws", "a tensor of shape (draws, chains, ...)", draws)
    if len(draws) < 4 or (name == "rhat" and draws.shape[1] < 2):
        return draws.new_full(draws.shape[2:], torch.nan, dtype=torch.float64)
    import arviz as az

    # Doubles: ranks and variances of single precision are needlessly rough.
    data = to_inference_data({"x": draws.double().movedim(0, 1)})
    values = getattr(az, name)(data, **options)["x"].values
    return torch.as_tensor(values, dtype=torch.float64, device=draws.device)
