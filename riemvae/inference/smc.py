"""Marginal likelihoods and posterior draws by tempered sequential Monte Carlo."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_choice, check_count
from riemvae.inference.annealed import AnnealedLogLikelihood, chunks
from riemvae.inference.annealing import (
    KernelFactory,
    anneal,
    check_kernel,
    fixed_tuning,
    make_transitions,
    summary_of,
    tune,
)
from riemvae.inference.batches import data_dims
from riemvae.inference.estimation import for_each_batch
from riemvae.inference.tempering import STARTS, inverse_temperature_schedule, latent_name, tempered_path
from riemvae.inference.weights import DEFAULT_CHUNK

# Of a schedule that is found: where a datum has not arrived, the last step takes it there.
_MAX_TEMPERATURES = 1000
_FIXED_TEMPERATURES = 50


@dataclass(frozen=True, repr=False)
class SequentialLogLikelihood(AnnealedLogLikelihood):
    """Estimates of ``log p(x_b)`` by sequential Monte Carlo, each ``(B,)``; the runs are their samples.

    Attributes:
        num_temperatures: Steps in temperature that each datum took, ``(B,)``.
        particle_ess: Kish's effective sample size of a run's particles at the last temperature, mean over
            runs, ``(B,)``.
        draws: Equally weighted draws of the posterior ``p(z|x)``, ``(B, runs · particles, d)``, where asked
            for; resampled and moved once more, so that particles of one run may be alike.
    """

    num_temperatures: Tensor | None = None
    particle_ess: Tensor | None = None
    draws: Tensor | None = None


def sequential_monte_carlo(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    data: Any,
    num_particles: int = 64,
    num_temperatures: int | None = None,
    *,
    num_runs: int = 8,
    start: str = "guide",
    kernel: str | KernelFactory = "hmc",
    num_leapfrog: int = 5,
    num_moves: int = 1,
    step_size: float = 0.5,
    adapt: bool = True,
    adaptive: bool = True,
    conditional_ess: float = 0.9,
    ess_threshold: float = 0.5,
    schedule: str | Tensor = "sigmoid",
    return_draws: bool = False,
    latent: str | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    tolerance: float = 1e-6,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> SequentialLogLikelihood:
    r"""``log p(x)`` of each datum, and draws of its posterior, by tempered sequential Monte Carlo.

    ``R`` independent runs of ``P`` particles each: along the path of :func:`annealed_importance_sampling
    <riemvae.inference.annealed.annealed_importance_sampling>` a run is reweighted from one temperature to the
    next, resampled (systematically, each datum for itself) where the effective sample size is below
    ``ess_threshold · P``, and moved by transitions that leave the density as it is. Its estimate of ``p(x)``
    is the product of the mean increments of weight.

    That estimate is exactly unbiased as long as temperatures and steps do not depend on the run's own
    particles. So with ``adaptive`` (each datum's next temperature by bisection such that the conditional
    effective sample size of the step is ``conditional_ess · P``) and with ``adapt`` a *pilot* run of ``P``
    particles finds them, and they are fixed before the measured runs start. Then ``log_prob`` (the log of the
    mean over runs) and ``elbo`` (the mean over runs of the log) are lower bounds of ``log p(x)`` in
    expectation. The posterior draws are consistent in ``P``, not exact.

    The standard error is that of the independent runs (``R - 1`` degrees of freedom), not one from the
    genealogy of a single run, which dies out with few particles.

    Args:
        model: The model itself: its latent with event ``(d,)`` in the data plate, and no other latent there.
        guide: Its guide, None for a start from the prior; of global latents one draw is shared by all data.
        data: Tensor, array, tuple or mapping of these, data set or loader.
        num_particles: ``P``.
        num_temperatures: The number of temperatures of a fixed schedule (None: 50), the most that are taken
            with ``adaptive`` (None: 1000).
        num_runs: ``R``.
        start: ``"guide"`` or ``"prior"``, as for annealed importance sampling.
        kernel: ``"hmc"``, ``"riemannian"``, or a factory, as there.
        num_leapfrog: Leapfrog steps of a transition.
        num_moves: Transitions a temperature.
        step_size: Leapfrog step; a first guess where it is adapted.
        adapt: Whether a pilot adapts the step.
        adaptive: Whether a pilot chooses the temperatures.
        conditional_ess: Share in (0, 1) of effective particles that a step in temperature leaves; a larger
            one takes more and smaller steps.
        ess_threshold: Share in [0, 1] of effective particles below which a run resamples; 0 never does.
        schedule: Of fixed temperatures: ``"sigmoid"``, ``"linear"`` or values from 0 to 1.
        return_draws: Whether to keep draws of the posterior.
        latent: Name of the latent site; None is that of the guide, or ``"z"``.
        chunk_size: Data times particles at once; None is about 2,000.
        seed: Of the draws; the caller's generator is left as it was. None draws from it.
        tolerance: Residual of the fixed points of the Riemannian kernel (not below what rounding allows).
        progress: Shows a bar.
        checkpoint: A file in which finished batches are kept, from which another call goes on.

    Returns:
        A :class:`~riemvae.inference.likelihood.LogLikelihood` whose samples are the runs (``num_samples`` is
        ``R``, ``method="smc"``), with the acceptance, the number of temperatures and the draws.

    Raises:
        ValueError: Numbers out of range, or what annealed importance sampling raises.

    Source: Del Moral, Doucet and Jasra (2006); Zhou, Johansen and Aston (2016) for the temperatures.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> ll = sequential_monte_carlo(model, None, torch.zeros(3, 2), start="prior", seed=0)
        >>> bool(((ll.log_prob + 2.531).abs() < 5 * ll.mcse).all()), ll.method
        (True, 'smc')
    """
    check_count("num_particles", num_particles, minimum=2)
    check_count("num_runs", num_runs)
    check_count("num_moves", num_moves)
    check_choice("start", start, STARTS)
    check_kernel(kernel, num_leapfrog, step_size)
    if not 0.0 < conditional_ess < 1.0:
        raise argument_error("conditional_ess", "a number in (0, 1)", conditional_ess)
    if not 0.0 <= ess_threshold <= 1.0:
        raise argument_error("ess_threshold", "a number in [0, 1]", ess_threshold)
    if num_temperatures is not None:
        check_count("num_temperatures", num_temperatures)
    if adaptive and isinstance(schedule, Tensor):
        raise argument_error(
            "schedule", "a name where the temperatures are adaptive", schedule, "adaptive=False"
        )
    betas = inverse_temperature_schedule(schedule, num_temperatures or _FIXED_TEMPERATURES)
    pairs = DEFAULT_CHUNK if chunk_size is None else check_count("chunk_size", chunk_size)
    name = latent_name(guide, latent)

    def estimate(
        args: tuple[Any, ...], kwargs: dict[str, Any], size: int, shared: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        path = tempered_path(model, guide, args, kwargs, size, shared, start=start, latent=name)
        transitions = make_transitions(path, guide, kernel, num_leapfrog, num_moves, tolerance)
        if adapt or adaptive:
            tuning = tune(
                transitions,
                None if adaptive else betas,
                step_size,
                num_particles,
                adapt=adapt,
                conditional_ess=conditional_ess,
                ess_threshold=ess_threshold,
                max_temperatures=num_temperatures or _MAX_TEMPERATURES,
            )
        else:
            tuning = fixed_tuning(betas, step_size, transitions.scale, size)
        evidence, ess, draws = [], [], []
        accepted = torch.zeros_like(tuning.betas[0])
        for runs in chunks(num_runs, max(1, pairs // (size * num_particles))):
            cloud, acceptance, effective = anneal(
                transitions, tuning, runs, num_particles, ess_threshold=ess_threshold, move_last=return_draws
            )
            evidence.append(cloud.log_mean_weight)
            ess.append(effective)
            accepted = accepted + acceptance * (runs / num_runs)
            if return_draws:
                z = path.constrained(cloud.point.position)
                draws.append(z.view(runs * num_particles, size, -1).transpose(0, 1))
        result = {
            **summary_of(torch.cat(evidence)),
            "acceptance": accepted,
            "num_temperatures": (tuning.betas.diff(dim=0) > 0).sum(0),
            "particle_ess": torch.cat(ess).mean(0),
            "num_dims": torch.full((size,), data_dims(args, kwargs)),
        }
        return {**result, "draws": torch.cat(draws, 1)} if return_draws else result

    settings = {
        "num_particles": num_particles,
        "num_temperatures": num_temperatures,
        "num_runs": num_runs,
        "start": start,
        "kernel": kernel if isinstance(kernel, str) else "own",
        "num_leapfrog": num_leapfrog,
        "num_moves": num_moves,
        "step_size": step_size,
        "adapt": adapt,
        "adaptive": adaptive,
        "conditional_ess": conditional_ess,
        "ess_threshold": ess_threshold,
        "schedule": betas.tolist(),
        "return_draws": return_draws,
        "latent": name,
        "chunk_size": pairs,
    }
    result = for_each_batch(
        model,
        guide,
        data,
        estimate,
        batch_size=max(1, pairs // num_particles),
        seed=seed,
        progress=progress,
        checkpoint=checkpoint,
        description="sequential Monte Carlo",
        tolerance=tolerance,
        settings=settings,
    )
    num_dims = int(result.pop("num_dims")[0])
    return SequentialLogLikelihood(num_samples=num_runs, num_dims=num_dims, method="smc", **result)  # type: ignore[arg-type]
