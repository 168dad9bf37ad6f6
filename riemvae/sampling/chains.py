"""Many chains at once: warm-up, draws, and what happened on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_count, check_finite
from riemvae.sampling.adaptation import DualAveraging, step_field, steps_of, warm_up
from riemvae.sampling.kernel import HMC, ChainState, Kernel, TransitionInfo, with_gradient


class ChainResult(NamedTuple):
    """Draws of ``C`` chains.

    Attributes:
        samples: of shape ``(draws, C, d)``.
        log_density: log density of the draws up to the target's constant, ``(draws, C)``.
        acceptance: mean acceptance probability of each chain after the warm-up, ``(C,)``.
        divergences: number of divergent transitions of each chain after the warm-up, ``(C,)``.
        step_size: the step size (or the scale of a random walk) that was used.
        state: where the chains ended, from which they can go on.
        not_converged: number of proposals of each chain, ``(C,)``, that were refused because an implicit
            integrator did not solve its equations; ``None`` for a kernel that solves none.
        trace: what led to each draw, in fields of shape ``(draws, C)``: over the transitions since the last
            draw the mean acceptance and whether any was accepted, diverged or did not converge, and the
            energy error of the last of them.
    """

    samples: Tensor
    log_density: Tensor
    acceptance: Tensor
    divergences: Tensor
    step_size: float | Tensor
    state: ChainState
    not_converged: Tensor | None = None
    trace: TransitionInfo | None = None


def run_chains(
    kernel: Kernel, state: ChainState, num_samples: int, *, thin: int = 1, progress: bool = False
) -> ChainResult:
    """Runs a fixed kernel and keeps every ``thin``-th state.

    Only the kept states are held in memory; ``num_samples=1, thin=n`` keeps where ``n`` transitions lead.

    Args:
        kernel: the transition.
        state: where the chains start, from ``kernel.init``.
        num_samples: states kept of each chain.
        thin: transitions between kept states.
        progress: shows a bar.

    Raises:
        ValueError: on counts below one.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> kernel = HMC(lambda z: (-0.5 * z.square().sum(-1), -z), step_size=0.5, num_steps=4)
        >>> run_chains(kernel, kernel.init(torch.zeros(10, 2)), 5, thin=2).samples.shape
        torch.Size([5, 10, 2])
    """
    check_count("num_samples", num_samples)
    check_count("thin", thin)
    draws, log_density, trace = [], [], []
    divergences = torch.zeros_like(state.log_density, dtype=torch.long)
    not_converged: Tensor | None = None
    since: list[TransitionInfo] = []
    for k in steps_of(num_samples * thin, progress, type(kernel).__name__):
        state, info = kernel(state)
        since.append(info)
        divergences += info.diverged
        if info.not_converged is not None:
            failed = info.not_converged.long()
            not_converged = failed if not_converged is None else not_converged + failed
        if (k + 1) % thin == 0:
            draws.append(state.position)
            log_density.append(state.log_density)
            trace.append(_joined(since))
            since = []
    steps = _stacked(trace)
    return ChainResult(
        torch.stack(draws),
        torch.stack(log_density),
        steps.acceptance.mean(0),
        divergences,
        getattr(kernel, step_field(kernel)),
        state,
        not_converged,
        steps,
    )


def _stacked(infos: Sequence[TransitionInfo]) -> TransitionInfo:
    """The fields of several transitions, each stacked in front; ``None`` where a kernel has none."""
    columns: list[Any] = [None if column[0] is None else torch.stack(column) for column in zip(*infos)]
    return TransitionInfo(*columns)


def _joined(infos: Sequence[TransitionInfo]) -> TransitionInfo:
    """Several transitions as one: mean acceptance, what happened in any of them, the last energy error."""
    if len(infos) == 1:
        return infos[0]
    steps = _stacked(infos)
    return TransitionInfo(
        steps.acceptance.mean(0),
        steps.accepted.any(0),
        steps.diverged.any(0),
        infos[-1].energy_error,
        None if steps.not_converged is None else steps.not_converged.any(0),
    )


def sample_chains(
    log_density: Callable[[Tensor], Tensor],
    start: Tensor,
    num_samples: int,
    *,
    warmup: int = 500,
    thin: int = 1,
    target_accept: float = 0.95,
    step_size: float | None = None,
    num_leapfrog: int = 15,
    mass: Tensor | None = None,
    jitter: float = 0.1,
    max_step_size: float = math.inf,
    progress: bool = False,
) -> ChainResult:
    """Draws from a density with batched HMC: warm-up with step size adaptation, then a frozen kernel.

    Args:
        log_density: ``z (C, d) -> (C,)`` up to a constant, ``-inf`` outside the support. Its gradient is
            taken by automatic differentiation, or from its own ``log_density_and_gradient`` (as
            ``InverseVolume`` has).
        start: where the chains start, ``(C, d)``, in the support.
        num_samples: draws kept of each chain.
        warmup: transitions before the first draw, thrown away. They adapt the step size when ``step_size`` is
            ``None``.
        thin: transitions between draws.
        target_accept: acceptance that the adaptation aims at.
        step_size: a step size to use as it is; ``None`` adapts it, one for all chains.
        num_leapfrog: leapfrog steps of a trajectory.
        mass: diagonal of the mass matrix, ``(d,)``.
        jitter: relative uniform jitter of the step size of each trajectory.
        max_step_size: bound of the adapted step size.
        progress: shows a bar.

    Returns:
        A :class:`ChainResult`.

    Raises:
        ValueError: on starts that are not finite, or where the density is zero.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
        >>> result = sample_chains(normal.log_prob, torch.zeros(20, 2), 10, warmup=100)
        >>> result.samples.shape, bool(result.acceptance.mean() > 0.9), int(result.divergences.sum())
        (torch.Size([10, 20, 2]), True, 0)
    """
    check_start(start)
    check_count("warmup", warmup, 0)
    rule = DualAveraging(target_accept, max_step_size=max_step_size)
    both = with_gradient(log_density)
    kernel = HMC(both, 0.1 if step_size is None else step_size, num_leapfrog, mass, jitter)
    state = kernel.init(start)
    check_support(state)
    if step_size is None:
        kernel, state = warm_up(kernel, state, warmup, rule)
    elif warmup:
        state = run_chains(kernel, state, 1, thin=warmup).state
    return run_chains(kernel, state, num_samples, thin=thin, progress=progress)


def check_start(start: Tensor) -> None:
    """Refuses starts that are not a finite tensor ``(chains, d)``."""
    if not isinstance(start, Tensor) or start.dim() != 2 or not len(start):
        raise argument_error("start", "a tensor of shape (chains, d)", start)
    check_finite("start", start, "start where the density is positive")


def check_support(state: ChainState) -> None:
    """Refuses a state with chains where the density is zero or undefined."""
    bad = int((~torch.isfinite(state.log_density)).sum())
    if bad:
        raise argument_error(
            "start",
            "points where the density is positive",
            f"{bad} of {state.log_density.numel()} outside its support",
            "start the chains inside the support",
        )
