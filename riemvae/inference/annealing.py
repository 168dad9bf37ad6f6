"""Chains that anneal from a start to the joint density: transitions, a pilot that tunes them, and weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_choice, check_count, check_positive
from riemvae.geometry import Metric
from riemvae.inference.accumulation import WeightSums
from riemvae.inference.tempering import Point, TemperedPath
from riemvae.sampling.kernel import HMC, DensityAndGradient, Kernel
from riemvae.sampling.riemannian_hmc import RiemannianHMC, default_tolerance

KERNELS = ("hmc", "riemannian")

KernelFactory = Callable[[DensityAndGradient, Tensor], Kernel]
"""``(log_density_and_gradient, step_size (N,)) -> kernel``: a user's own transition of ``N`` chains."""

# Of the step of each trajectory: breaks periodic orbits, and is drawn apart from the position.
_JITTER = 0.2
# Acceptance that a pilot aims at, and how far one transition moves the logarithm of the step.
TARGET_ACCEPTANCE = 0.75
_FIRST_GAIN, _GAIN, _FIRST_TRIES = 2.0, 0.4, 12
# Transitions that a pilot makes in all at least; its temperatures share them.
_PILOT_TRANSITIONS = 50
_PILOT_CHAINS = (4, 64)
# Steps are averaged over at most so many temperatures to either side.
_SMOOTHED = 5
# Bisections of a step in temperature: to a relative 2⁻⁴⁰.
_BISECTIONS = 40


@dataclass(frozen=True)
class Transitions:
    """How a chain moves at one temperature: ``num_moves`` transitions that each leave ``f_β`` as it is.

    Momenta are drawn afresh for each transition and its end is accepted by Metropolis' rule, so that it is
    reversible: a chain that runs the temperatures backwards uses the same ones.

    Args:
        path: The densities.
        kernel: ``"hmc"``, with the start's scale as mass; ``"riemannian"``; or a factory of one's own.
        num_leapfrog: Leapfrog steps of a transition.
        num_moves: Transitions a temperature.
        metric: Of the Riemannian kernel.
        scale: Deviations of the start, ``(B, d)``, the unit of the steps of ``"hmc"``.
        tolerance: Residual of the Riemannian kernel's fixed points.
    """

    path: TemperedPath
    kernel: str | KernelFactory
    num_leapfrog: int
    num_moves: int
    metric: Metric | None
    scale: Tensor
    tolerance: float

    def __call__(self, point: Point, beta: Tensor, step_size: Tensor) -> tuple[Point, Tensor]:
        """``num_moves`` transitions at ``beta`` with steps ``step_size``, both of shape ``(B,)``.

        Returns:
            The new point and the mean acceptance of each chain, ``(N,)``.
        """
        chains = len(point.position) // self.path.size
        beta, step_size = beta.repeat(chains), step_size.repeat(chains).to(point.position)
        seen: list[Point] = []

        def density(u: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(self.path.evaluate(u))
            state = seen[-1].tempered(beta)
            return state.log_density, state.gradient

        kernel = self._kernel(density, lambda u: self.path.gradient(u, beta), step_size, chains)
        total = torch.zeros_like(point.log_start)
        for _ in range(self.num_moves):
            seen.clear()
            state, info = kernel(point.tempered(beta))
            point = self._evaluated(state.position, [point, *reversed(seen)])
            total = total + info.acceptance
        return point, total / self.num_moves

    def _kernel(
        self,
        density: DensityAndGradient,
        gradient: Callable[[Tensor], Tensor],
        step_size: Tensor,
        chains: int,
    ) -> Kernel:
        if callable(self.kernel):
            return self.kernel(density, step_size)
        if self.metric is not None:
            tolerance = max(self.tolerance, default_tolerance(step_size.dtype))
            return RiemannianHMC(
                density, self.metric, step_size, self.num_leapfrog, _JITTER, tolerance=tolerance
            )
        mass = self.scale.repeat(chains, 1).to(step_size).reciprocal().square()
        return HMC(density, step_size, self.num_leapfrog, mass, _JITTER, gradient)

    def _evaluated(self, position: Tensor, seen: list[Point]) -> Point:
        """The point at ``position``, put together from what the kernel evaluated on its way there."""
        result = seen[0]
        missing = torch.ones_like(result.log_start, dtype=torch.bool)
        for point in seen:
            here = missing & (point.position == position).all(-1)
            result = point.where(here, result)
            missing = missing & ~here
            if not bool(missing.any()):
                return result
        return self.path.evaluate(position)


def make_transitions(
    path: TemperedPath,
    guide: Any,
    kernel: str | KernelFactory,
    num_leapfrog: int,
    num_moves: int,
    tolerance: float,
) -> Transitions:
    """The transitions of one batch.

    Raises:
        ValueError: A Riemannian kernel for a guide without a frozen metric.
    """
    metric = getattr(guide, "metric", None) if kernel == "riemannian" else None
    if kernel == "riemannian" and not isinstance(metric, Metric):
        raise argument_error(
            "guide", "a guide with a frozen metric for kernel='riemannian'", guide, "call freeze_metric first"
        )
    return Transitions(path, kernel, num_leapfrog, num_moves, metric, path.scale(), tolerance)


def check_kernel(kernel: str | KernelFactory, num_leapfrog: int, step_size: float) -> None:
    """Refuses a kernel that is neither a name nor a factory, and numbers out of range."""
    if not callable(kernel):
        check_choice("kernel", kernel, KERNELS)
    check_count("num_leapfrog", num_leapfrog)
    check_positive("step_size", step_size)


class Tuning(NamedTuple):
    """What a pilot found, and the measured run holds to.

    Attributes:
        betas: ``β_0 = 0, …, β_T = 1`` of each datum, ``(T + 1, B)`` in float64; repeated ones do nothing.
        steps: The step size of the transitions at ``β_1, …, β_T``, ``(T, B)``.
    """

    betas: Tensor
    steps: Tensor


def fixed_tuning(schedule: Tensor, step_size: float, like: Tensor, size: int) -> Tuning:
    """The same temperatures and step for all data, without a pilot."""
    betas = schedule.to(like.device).unsqueeze(-1).expand(-1, size)
    return Tuning(betas, torch.full_like(betas[1:], step_size))


def tune(
    transitions: Transitions,
    schedule: Tensor | None,
    step_size: float,
    num_chains: int,
    *,
    adapt: bool = True,
    conditional_ess: float = 0.9,
    ess_threshold: float = 0.0,
    max_temperatures: int = 1000,
) -> Tuning:
    """A pilot: steps for a target acceptance, per datum and temperature, and the temperatures if not given.

    Its chains are thrown away, and what it found is fixed before the measured run starts: adapting a chain to
    its own past would take away the property that makes its weight unbiased.

    Args:
        transitions: Of the batch.
        schedule: ``(T + 1,)``, or None to choose each datum's next temperature so that the conditional
            effective sample size of the step is ``conditional_ess`` of the chains (Zhou, Johansen and
            Aston, 2016).
        step_size: The first guess.
        num_chains: Of the pilot.
        adapt: Whether the steps are adapted too.
        conditional_ess: As above.
        ess_threshold: Resample a datum whose effective sample size falls below this share.
        max_temperatures: Of a schedule that is found.
    """
    path = transitions.path
    cloud = Cloud.start(path, 1, num_chains)
    device = cloud.point.position.device
    log_step = torch.full((path.size,), math.log(step_size), dtype=torch.float64, device=device)
    fixed = None if schedule is None else schedule.to(device)
    limit = max_temperatures if fixed is None else len(fixed) - 1
    repeats = 3 if fixed is None else math.ceil(_PILOT_TRANSITIONS / limit)
    beta = torch.zeros_like(log_step)
    betas = [beta]
    steps: list[Tensor] = []
    for t in range(1, limit + 1):
        if fixed is None:
            increment = cloud.increment(1.0 - beta, conditional_ess)
            following = torch.ones_like(beta) if t == limit else (beta + increment).clamp_max(1.0)
        else:
            following = fixed[t].expand_as(beta)
        cloud.reweigh(following - beta)
        cloud.resample(ess_threshold)
        beta = following
        betas.append(beta)
        last = bool((beta >= 1.0).all())
        if last and fixed is not None and steps:
            # Only a run that goes on after the last temperature moves there.
            steps.append(steps[-1])
            break
        tries = _FIRST_TRIES if t == 1 else 0
        for k in range(tries + repeats):
            cloud.point, acceptance = transitions(cloud.point, beta, log_step.exp())
            gain = _FIRST_GAIN if k < tries else _GAIN
            mean = acceptance.double().view(-1, path.size).mean(0)
            if adapt:
                log_step = log_step + gain * (mean - TARGET_ACCEPTANCE)
        steps.append(log_step.exp())
        if last:
            break
    return Tuning(torch.stack(betas), _smoothed(torch.stack(steps)))


def _smoothed(steps: Tensor) -> Tensor:
    """Geometric means over neighbouring temperatures."""
    side = min(_SMOOTHED, len(steps) // 10)
    log = steps.log().mT.unsqueeze(1)  # (B, 1, T)
    smooth = torch.nn.functional.avg_pool1d(log, 2 * side + 1, 1, side, count_include_pad=False)
    return smooth.squeeze(1).mT.exp()


class Cloud:
    """Weighted chains ``(groups, chains, data)`` on their way, and the evidence of each group so far.

    Attributes:
        point: Where they are, ``N = G·C·B`` rows.
        log_weights: Since the last resampling, ``(G, C, B)`` in float64.
        log_evidence: What was taken out of the weights at resamplings, ``(G, B)``.
    """

    def __init__(self, point: Point, num_groups: int, size: int) -> None:
        self.point = point
        shape = (num_groups, len(point.position) // (num_groups * size), size)
        self.log_weights = torch.zeros(shape, dtype=torch.float64, device=point.position.device)
        self.log_evidence = self.log_weights.new_zeros(num_groups, size)

    @classmethod
    def start(cls, path: TemperedPath, num_groups: int, num_chains: int) -> Cloud:
        """Chains at draws of the start."""
        return cls(path.evaluate(path.draw(num_groups * num_chains)), num_groups, path.size)

    @property
    def log_ratio(self) -> Tensor:
        """``log p(x, z) - log q_0(z)`` of each chain, ``(G, C, B)``."""
        return self.point.log_ratio.view_as(self.log_weights)

    def reweigh(self, increment: Tensor) -> None:
        """Takes the weights over a step ``(B,)`` in inverse temperature."""
        gained = torch.where(increment > 0, increment * self.log_ratio, 0.0)
        self.log_weights = self.log_weights + gained

    def increment(self, room: Tensor, share: float) -> Tensor:
        """The step ``(B,)`` in ``[0, room]`` whose conditional ESS is ``share`` of what it can be.

        Of the first group. Chains of weight zero, now or after any step, do not count.
        """
        ratio = self.log_ratio[0]
        dead = torch.isneginf(ratio)
        ratio = torch.where(dead, 0.0, ratio)
        log_weights = torch.where(dead, -torch.inf, self.log_weights[0])
        total = torch.logsumexp(log_weights, 0)
        alive = torch.isfinite(total)
        log_weights = torch.where(alive, log_weights - total, 0.0)

        def enough(step: Tensor) -> Tensor:
            first = torch.logsumexp(log_weights + step * ratio, 0)
            second = torch.logsumexp(log_weights + 2.0 * step * ratio, 0)
            return (2.0 * first - second >= math.log(share)) | ~alive

        low, high = torch.zeros_like(room), room
        whole = enough(high)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            good = enough(middle)
            low, high = torch.where(good, middle, low), torch.where(good, high, middle)
        return torch.where(whole, room, low)

    def resample(self, threshold: float) -> None:
        """Systematic resampling of the groups whose effective sample size is below a share of the chains."""
        if threshold <= 0.0:
            return
        chains = self.log_weights.shape[1]
        total = torch.logsumexp(self.log_weights, 1)
        poor = (self.ess < threshold * chains) & torch.isfinite(total)
        if not bool(poor.any()):
            return
        index = systematic(self.log_weights - total.unsqueeze(1))
        same = torch.arange(chains, device=index.device).view(1, -1, 1)
        index = torch.where(poor.unsqueeze(1), index, same)
        self.point = Point(*(self._rows(part, index) for part in self.point))
        mean = total - math.log(chains)
        self.log_evidence = self.log_evidence + torch.where(poor, mean, 0.0)
        self.log_weights = torch.where(poor.unsqueeze(1), 0.0, self.log_weights)

    def _rows(self, part: Tensor, index: Tensor) -> Tensor:
        shaped = part.view(*self.log_weights.shape, *part.shape[1:])
        index = index if part.dim() == 1 else index.unsqueeze(-1).expand(*index.shape, part.shape[-1])
        return shaped.gather(1, index).reshape(part.shape)

    @property
    def ess(self) -> Tensor:
        """Kish's effective sample size of each group, ``(G, B)``; zero where all weights are."""
        total = torch.logsumexp(self.log_weights, 1)
        return torch.nan_to_num(torch.exp(2.0 * total - torch.logsumexp(2.0 * self.log_weights, 1)), nan=0.0)

    @property
    def log_mean_weight(self) -> Tensor:
        """The evidence of each group, ``(G, B)``: unbiased before the logarithm is taken."""
        chains = self.log_weights.shape[1]
        return self.log_evidence + torch.logsumexp(self.log_weights, 1) - math.log(chains)


def systematic(log_weights: Tensor) -> Tensor:
    """Indices along dim 1 of ``(G, C, B)`` normalised log weights, by one uniform number a group and datum.

    Each chain is chosen ``C w`` times in the mean, rounded up or down.

    Example:
        >>> log_weights = torch.tensor([0.5, 0.25, 0.25, 0.0]).log().view(1, 4, 1)
        >>> systematic(log_weights).flatten()
        tensor([0, 0, 1, 2])
    """
    groups, chains, size = log_weights.shape
    upper = log_weights.exp().cumsum(1).permute(0, 2, 1).contiguous()
    upper = torch.where(torch.isfinite(upper), upper, 0.0)
    upper = upper / upper[..., -1:].clamp_min(torch.finfo(upper.dtype).tiny)
    offset = torch.rand(groups, size, 1, dtype=upper.dtype, device=upper.device)
    ticks = (torch.arange(chains, dtype=upper.dtype, device=upper.device) + offset) / chains
    return torch.searchsorted(upper, ticks, right=True).clamp_max(chains - 1).permute(0, 2, 1)


class Annealed(NamedTuple):
    """Where a run ended.

    Attributes:
        cloud: The chains, with their weights.
        acceptance: Mean acceptance of each datum, ``(B,)``; NaN where nothing moved.
        ess: Effective sample size of each group at the last temperature, ``(G, B)``.
    """

    cloud: Cloud
    acceptance: Tensor
    ess: Tensor


def anneal(
    transitions: Transitions,
    tuning: Tuning,
    num_groups: int,
    num_chains: int,
    *,
    ess_threshold: float = 0.0,
    move_last: bool = False,
) -> Annealed:
    """Runs groups of chains through the temperatures.

    Without resampling each chain's weight is that of annealed importance sampling.

    Args:
        transitions: Of the batch.
        tuning: Temperatures and steps.
        num_groups: ``G``.
        num_chains: ``C``, chains of a group.
        ess_threshold: Share of effective chains below which a group resamples; zero never does.
        move_last: Resample and move at the last temperature too: equally weighted draws of the posterior.

    Returns:
        The chains, and how they came there.
    """
    path = transitions.path
    cloud = Cloud.start(path, num_groups, num_chains)
    acceptance = torch.zeros_like(tuning.betas[0])
    moves = 0
    for t in range(1, len(tuning.betas)):
        beta, last = tuning.betas[t], t == len(tuning.betas) - 1
        cloud.reweigh(beta - tuning.betas[t - 1])
        if last:
            ess = cloud.ess
            if not move_last:
                break
        cloud.resample(math.inf if last else ess_threshold)
        cloud.point, accepted = transitions(cloud.point, beta, tuning.steps[t - 1])
        acceptance = acceptance + accepted.double().view(-1, path.size).mean(0)
        moves += 1
    return Annealed(cloud, acceptance / moves if moves else torch.full_like(acceptance, math.nan), ess)


def anneal_back(transitions: Transitions, tuning: Tuning, position: Tensor, num_chains: int) -> Tensor:
    """Log weights ``(C, B)`` of chains that start at ``position (B, d)`` and run to the start.

    At a draw of the posterior, ``E[1/w] = 1/p(x)`` for each chain.
    """
    path = transitions.path
    start = position.unsqueeze(0).expand(num_chains, -1, -1).reshape(-1, position.shape[-1])
    cloud = Cloud(path.evaluate(start), 1, path.size)
    for t in range(len(tuning.betas) - 1, 0, -1):
        cloud.reweigh(tuning.betas[t] - tuning.betas[t - 1])
        if t > 1:
            cloud.point, _ = transitions(cloud.point, tuning.betas[t - 1], tuning.steps[t - 2])
    return cloud.log_weights[0]


def pilot_chains(num_chains: int) -> int:
    """Chains of a pilot beside a run of ``num_chains``: a quarter of them, within bounds."""
    return min(max(_PILOT_CHAINS[0], num_chains // 4), _PILOT_CHAINS[1])


def summary_of(log_weights: Tensor) -> dict[str, Tensor]:
    """What ``(S, B)`` independent log weights say of each datum, by the names of ``LogLikelihood``."""
    sums = WeightSums(len(log_weights))
    sums.add(log_weights)
    return sums.result()
