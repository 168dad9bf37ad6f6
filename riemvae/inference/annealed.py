"""Marginal likelihoods by annealed importance sampling."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from riemvae._checks import check_choice, check_count
from riemvae.inference.annealing import (
    KernelFactory,
    Transitions,
    Tuning,
    anneal,
    check_kernel,
    fixed_tuning,
    make_transitions,
    pilot_chains,
    summary_of,
    tune,
)
from riemvae.inference.batches import data_dims
from riemvae.inference.estimation import for_each_batch
from riemvae.inference.likelihood import KHAT_LIMIT, LogLikelihood
from riemvae.inference.tempering import STARTS, inverse_temperature_schedule, latent_name, tempered_path
from riemvae.inference.weights import DEFAULT_CHUNK


@dataclass(frozen=True, repr=False)
class AnnealedLogLikelihood(LogLikelihood):
    """Estimates of ``log p(x_b)`` by annealing, each ``(B,)``, with how the chains moved.

    Attributes:
        acceptance: Mean acceptance of the transitions of each datum; NaN where there were none.
        step_size: Step sizes at ``β_1, …, β_T``, ``(B, T)``.
    """

    acceptance: Tensor | None = None
    step_size: Tensor | None = None


def annealed_importance_sampling(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    data: Any,
    num_chains: int = 16,
    num_temperatures: int = 100,
    *,
    start: str = "guide",
    kernel: str | KernelFactory = "hmc",
    num_leapfrog: int = 5,
    step_size: float = 0.5,
    adapt: bool = True,
    schedule: str | Tensor = "sigmoid",
    latent: str | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    tolerance: float = 1e-6,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> AnnealedLogLikelihood:
    r"""``log p(x)`` of each datum by annealed importance sampling: chains from a start to the posterior.

    A chain starts at ``z_0 ~ q_0``, moves by transitions that leave

    .. math:: \log f_{\beta}(z) = (1 - \beta) \log q_0(z) + \beta \log p(x, z)

    as it is for ``0 < β_1 < … < β_{T-1} < 1``, and has the weight ``log w = Σ_t (β_t - β_{t-1}) (log p(x,
    z_{t-1}) - log q_0(z_{t-1}))``. ``E[w] = p(x)`` exactly, whatever the steps, the number of temperatures
    and how badly the chains mix. So ``log_prob`` (the log mean weight) is a lower bound of ``log p(x)`` in
    expectation, which rises to it with chains and temperatures; ``elbo`` (the mean log weight) is a lower
    one, which rises with temperatures alone. Neither is a bound for one draw of the chains.

    Momenta are drawn afresh and trajectories are accepted by Metropolis' rule. With ``adapt`` a pilot run of
    its own chains (a quarter as many, 4 to 64) finds a step size for each datum and temperature, at an
    acceptance of 0.75; they are fixed before the measured run starts, because adapting a chain to its own
    past would bias its weight. On a constrained support all happens in unconstrained coordinates, with the
    Jacobian.

    One leapfrog step costs one gradient of the model for ``chunk_size`` pairs of data and chains; values of
    both ends of the path are carried along, so that a change of temperature costs nothing.

    Args:
        model: The model itself: its latent with event ``(d,)`` in the data plate, and no other latent there.
        guide: Its guide, None for a start from the prior. Global latents are conditioned on one draw of it
            (or on its ``given=``), shared by all data; without a guide, condition the model on them.
        data: Tensor, array, tuple or mapping of these, data set or loader.
        num_chains: ``C``, of each datum.
        num_temperatures: ``T``; 1 is importance sampling from the start.
        start: ``q_0``: ``"prior"`` is the model's own prior of the latent; ``"guide"`` the guide's
            distribution where its density can be evaluated anywhere: of a Hamiltonian, flow or refined guide
            that is what its encoder says, before all that follows. The prior covers what a guide that sits
            on one mode of the posterior misses.
        kernel: ``"hmc"`` in units of the start's scale; ``"riemannian"`` with the frozen metric of the guide
            as mass; or a factory ``(log_density_and_gradient, step_size (N,)) -> kernel`` of a
            :class:`~riemvae.sampling.kernel.Kernel` on ``N`` chains, reversible with respect to the density.
        num_leapfrog: Leapfrog steps of a transition.
        step_size: Leapfrog step; a first guess where it is adapted.
        adapt: Whether a pilot adapts it.
        schedule: ``"sigmoid"``, ``"linear"``, or inverse temperatures ``(T + 1,)`` from 0 to 1.
        latent: Name of the latent site; None is that of the guide, or ``"z"``.
        chunk_size: Data times chains at once; None is about 2,000.
        seed: Of the draws; the caller's generator is left as it was. None draws from it.
        tolerance: Residual of the fixed points of the Riemannian kernel (not below what rounding allows).
        progress: Shows a bar.
        checkpoint: A file in which finished batches are kept, from which another call goes on.

    Returns:
        A :class:`~riemvae.inference.likelihood.LogLikelihood` over the chains as samples (``method="ais"``),
        with the ``acceptance`` of each datum and the ``step_size`` that was used.

    Raises:
        ValueError: Numbers out of range; a model whose structure does not allow it; a guide whose density
            cannot be evaluated, or without a frozen metric for ``kernel="riemannian"``.

    Source: Neal (2001); Wu, Burda, Salakhutdinov and Grosse (2017) for decoder-based models.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> ll = annealed_importance_sampling(model, None, torch.zeros(3, 2), 200, 20, start="prior", seed=0)
        >>> bool(((ll.log_prob + 2.531).abs() < 5 * ll.mcse).all()), ll.method
        (True, 'ais')
    """
    check_count("num_chains", num_chains)
    check_choice("start", start, STARTS)
    check_kernel(kernel, num_leapfrog, step_size)
    betas = inverse_temperature_schedule(schedule, num_temperatures)
    pairs = DEFAULT_CHUNK if chunk_size is None else check_count("chunk_size", chunk_size)
    name = latent_name(guide, latent)

    def estimate(
        args: tuple[Any, ...], kwargs: dict[str, Any], size: int, shared: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        path = tempered_path(model, guide, args, kwargs, size, shared, start=start, latent=name)
        transitions = make_transitions(path, guide, kernel, num_leapfrog, 1, tolerance)
        tuning = tuned(transitions, betas, step_size, adapt, num_chains)
        weights, accepted = [], torch.zeros_like(tuning.betas[0])
        for chains in chunks(num_chains, max(1, pairs // size)):
            cloud, acceptance, _ = anneal(transitions, tuning, 1, chains)
            weights.append(cloud.log_weights[0])
            accepted = accepted + acceptance * (chains / num_chains)
        return {
            **summary_of(torch.cat(weights)),
            "acceptance": accepted,
            "step_size": tuning.steps.mT,
            "num_dims": torch.full((size,), data_dims(args, kwargs)),
        }

    settings = {
        "num_chains": num_chains,
        "start": start,
        "kernel": kernel if isinstance(kernel, str) else "own",
        "num_leapfrog": num_leapfrog,
        "step_size": step_size,
        "adapt": adapt,
        "schedule": betas.tolist(),
        "latent": name,
        "chunk_size": pairs,
    }
    result = for_each_batch(
        model,
        guide,
        data,
        estimate,
        batch_size=max(1, pairs // num_chains),
        seed=seed,
        progress=progress,
        checkpoint=checkpoint,
        description="annealed importance sampling",
        tolerance=tolerance,
        settings=settings,
    )
    num_dims = int(result.pop("num_dims")[0])
    ll = AnnealedLogLikelihood(num_samples=num_chains, num_dims=num_dims, method="ais", **result)  # type: ignore[arg-type]
    bad = int((ll.khat > KHAT_LIMIT).sum())
    if bad:
        warnings.warn(
            f"k̂ > {KHAT_LIMIT} for {bad} of {len(ll)} data: a few chains are the estimate, which is too low "
            "by an unknown amount; take more temperatures, more leapfrog steps, or start='prior'",
            stacklevel=2,
        )
    return ll


def tuned(transitions: Transitions, betas: Tensor, step_size: float, adapt: bool, num_chains: int) -> Tuning:
    """Steps for a fixed schedule, by a pilot beside ``num_chains`` chains where they are to be adapted."""
    if adapt and len(betas) > 2:
        return tune(transitions, betas, step_size, pilot_chains(num_chains))
    return fixed_tuning(betas, step_size, transitions.scale, transitions.path.size)


def chunks(count: int, largest: int) -> list[int]:
    """``count`` in parts of at most ``largest``.

    Example:
        >>> chunks(5, 2)
        [2, 2, 1]
    """
    return [min(largest, count - start) for start in range(0, count, largest)]
