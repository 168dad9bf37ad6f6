"""Trace and rank plots of chains, by ArviZ (before 1.0 and from it on)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from riemvae._checks import argument_error
from riemvae.evaluation.pictures import canvas
from riemvae.sampling.diagnostics import to_inference_data


def draw_traces(chains: Any, *, path: str | os.PathLike[str] | None = None, **options: Any) -> np.ndarray:
    """The draws of each chain over time, and their distribution: chains that mix look alike.

    Args:
        chains: an object with ``to_arviz()`` (``BatchedMCMC``), draws by name, each ``(chains, draws, ...)``,
            or ArviZ's own data.
        path: a file to write the figure to.
        options: for ``arviz.plot_trace`` (``plot_trace_dist`` of ArviZ 1).

    Returns:
        The axes, a row for each coordinate.

    Raises:
        ValueError: draws that are not ``(chains, draws, ...)``.

    Example:
        >>> import torch
        >>> draw_traces({"z": torch.randn(4, 50, 2)}).shape
        (2, 2)
    """
    # ArviZ 1 calls this picture plot_trace_dist, and has another plot_trace.
    options = {"compact": False} | options  # a row for each coordinate
    return _drawn(("plot_trace_dist", "plot_trace"), chains, path, options).reshape(-1, 2)


def draw_ranks(chains: Any, *, path: str | os.PathLike[str] | None = None, **options: Any) -> np.ndarray:
    """How the ranks of each chain's draws among all draws are distributed: uniform where chains mix.

    Args:
        chains: as for :func:`draw_traces`.
        path: a file to write the figure to.
        options: for ``arviz.plot_rank``.

    Returns:
        The axes, one for each coordinate.

    Raises:
        ValueError: draws that are not ``(chains, draws, ...)``.

    Source: Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), Rank-normalization, folding, and
    localization: an improved R-hat.

    Example:
        >>> import torch
        >>> draw_ranks({"z": torch.randn(4, 50, 2)}).shape
        (2,)
    """
    return _drawn(("plot_rank",), chains, path, options)


def _drawn(names: tuple[str, ...], chains: Any, path: Any, options: Mapping[str, Any]) -> np.ndarray:
    import arviz as az  # takes seconds to import

    if hasattr(chains, "to_arviz"):
        chains = chains.to_arviz()
    elif isinstance(chains, Mapping) and not hasattr(chains, "posterior"):
        for name, draws in chains.items():
            if getattr(draws, "ndim", 0) < 2:
                raise argument_error(f"chains[{name!r}]", "draws (chains, draws, ...)", draws)
        chains = to_inference_data(dict(chains))
    plot = next(getattr(az, name) for name in names if hasattr(az, name))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="More chains")
        drawn = plot(chains, **options)
    if hasattr(drawn, "viz"):  # ArviZ 1 returns a collection of plots
        figure = drawn.viz["figure"].item()
        axes = np.array([ax for ax in figure.axes if ax.has_data()])
    else:
        axes = np.asarray(drawn).reshape(-1)
        figure = axes[0].figure
        figure.set_layout_engine("constrained")
    if path is not None:
        canvas.write_figure(figure, path)
    return axes
