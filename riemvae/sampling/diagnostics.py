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
    import arviz as az  # takes seconds to import

    groups = {"posterior": posterior} | ({"sample_stats": sample_stats} if sample_stats else {})
    arrays: dict[str, Any] = {
        group: {name: values.detach().cpu().numpy() for name, values in variables.items()}
        for group, variables in groups.items()
    }
    with warnings.catch_warnings():
        # Many short chains are what batched kernels are good at.
        warnings.filterwarnings("ignore", message="More chains|Found chain dimension to be longer")
        if "posterior" in inspect.signature(az.from_dict).parameters:  # ArviZ below 1
            return az.from_dict(**arrays)
        return az.from_dict(arrays)


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
