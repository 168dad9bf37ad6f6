"""Modes and Hamiltonian chains of many posteriors at once, each with steps of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_count
from riemvae.geometry import Potential
from riemvae.geometry.potential import value_and_gradient
from riemvae.sampling.kernel import HMC, ChainState

# Pairs of steps and gradient changes that the curvature is read from.
_MEMORY = 10
# The decrease that a step must bring, as a share of what the gradient promises (Nocedal and Wright, 2006).
_ARMIJO = 1e-4
# Halvings of one step after which a row has gone as far as rounding lets it.
_MOST_HALVINGS = 30
# So many of them do where the fall that is hoped for is no larger than the rounding of the value.
_HIDDEN_HALVINGS = 3
_ROUNDING = 8.0

# Acceptance that the warm-up aims at, and the relative jitter of each trajectory's step.
TARGET_ACCEPTANCE = 0.8
_JITTER = 0.2
# Of dual averaging (Hoffman and Gelman, 2014, section 3.2).
_GAMMA, _OFFSET, _KAPPA, _FIRST_STEP = 0.05, 10.0, 0.75, 0.3


class Minimum(NamedTuple):
    """Where a minimisation of many rows ended.

    Attributes:
        position: ``(..., B, k)``.
        value: ``U`` there, ``(..., B)``.
        gradient_norm: Largest component of the gradient, ``(..., B)``.
        num_steps: Evaluations of the potential.
    """

    position: Tensor
    value: Tensor
    gradient_norm: Tensor
    num_steps: int


@torch.no_grad()
def minimise(
    potential: Potential, start: Tensor, *, max_steps: int = 200, tolerance: float = 1e-6
) -> Minimum:
    """The minimum of ``U`` from each start by L-BFGS, all rows at once, each with a step of its own.

    One evaluation of all rows is one step: a row whose value falls enough takes the new point and a new
    direction, another halves its step along the one it has. Rows are independent of each other: the result
    of one does not depend on which others there are.

    Args:
        potential: ``z (..., B, k) -> U (..., B)``; differentiated automatically unless it knows its gradient.
        start: ``(..., B, k)``.
        max_steps: Evaluations at most.
        tolerance: A row is done when no component of its gradient is larger, or when rounding hides any
            further fall.

    Returns:
        A :class:`Minimum`; never above the start.

    Raises:
        ValueError: Starts where ``U`` is not finite.

    Source: Nocedal and Wright (2006), algorithms 3.1 and 7.4.

    Example:
        >>> scale = torch.tensor([1.0, 100.0])
        >>> result = minimise(lambda z: 0.5 * (scale * (z - 3.0) ** 2).sum(-1), torch.zeros(4, 2))
        >>> bool((result.position - 3.0).abs().max() < 1e-4)
        True
    """
    check_count("max_steps", max_steps)
    shape, dim = start.shape, start.shape[-1]
    eps = torch.finfo(start.dtype).eps

    def evaluate(rows: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = value_and_gradient(potential, rows.reshape(shape))
        return value.reshape(-1), gradient.reshape(-1, dim)

    z = start.reshape(-1, dim)
    value, gradient = evaluate(z)
    if not bool(torch.isfinite(value).all() and torch.isfinite(gradient).all()):
        bad = int((~(torch.isfinite(value) & torch.isfinite(gradient).all(-1))).sum())
        raise argument_error("start", "points where the potential is finite", f"{bad} where it is not")
    history = _History(len(z), dim, z)
    direction, slope = _descent(history, gradient)
    step = _first_step(gradient)
    halvings = torch.zeros(len(z), dtype=torch.long, device=z.device)
    done = gradient.abs().amax(-1) <= tolerance
    steps = 0
    while steps < max_steps and not bool(done.all()):
        steps += 1
        trial = z + step.unsqueeze(-1) * direction
        trial_value, trial_gradient = evaluate(trial)
        slack = _ROUNDING * eps * value.abs()
        fell = trial_value <= value + _ARMIJO * step * slope + slack
        # Where rounding hides the value, the slope along the direction must not have grown.
        hidden = (step * slope).abs() <= slack
        flatter = (trial_gradient * direction).sum(-1).abs() <= slope.abs()
        good = fell & (~hidden | flatter) & ~done
        good = good & torch.isfinite(trial_value) & torch.isfinite(trial_gradient).all(-1)
        moved = good.unsqueeze(-1)
        change = torch.where(moved, trial_gradient - gradient, 0.0)
        history.add(torch.where(moved, trial - z, 0.0), change, eps)
        z = torch.where(moved, trial, z)
        value = torch.where(good, trial_value, value)
        gradient = torch.where(moved, trial_gradient, gradient)
        new_direction, new_slope = _descent(history, gradient)
        direction = torch.where(moved, new_direction, direction)
        slope = torch.where(good, new_slope, slope)
        step = torch.where(good, torch.ones_like(step), 0.5 * step)
        halvings = torch.where(good, 0, halvings + 1)
        most = torch.where(hidden, _HIDDEN_HALVINGS, _MOST_HALVINGS)
        done = done | (gradient.abs().amax(-1) <= tolerance) | (halvings > most)
    return Minimum(
        z.reshape(shape), value.reshape(shape[:-1]), gradient.abs().amax(-1).reshape(shape[:-1]), steps
    )


def _first_step(gradient: Tensor) -> Tensor:
    """At most a unit's way along the first gradient, whose scale is not known."""
    return (1.0 / gradient.norm(dim=-1).clamp_min(1e-12)).clamp_max(1.0)


def _descent(history: _History, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """A direction of descent of each row, and the slope along it."""
    direction = -history.times(gradient)
    slope = (direction * gradient).sum(-1)
    uphill = ~(slope < 0)
    direction = torch.where(uphill.unsqueeze(-1), -gradient, direction)
    return direction, torch.where(uphill, -gradient.square().sum(-1), slope)


class _History:
    """The last steps and gradient changes of each row, for the inverse Hessian's product."""

    def __init__(self, rows: int, dim: int, like: Tensor) -> None:
        self.s = like.new_zeros(_MEMORY, rows, dim)
        self.y = like.new_zeros(_MEMORY, rows, dim)
        self.rho = like.new_zeros(_MEMORY, rows)  # 0: no pair
        self.scale = like.new_ones(rows)

    def add(self, s: Tensor, y: Tensor, eps: float) -> None:
        """A pair of each row; rows of zeros, or without positive curvature, keep what they have."""
        curvature = (s * y).sum(-1)
        good = curvature > eps * s.norm(dim=-1) * y.norm(dim=-1)
        column = good.unsqueeze(-1)
        self.s = torch.where(column, torch.cat([self.s[1:], s.unsqueeze(0)]), self.s)
        self.y = torch.where(column, torch.cat([self.y[1:], y.unsqueeze(0)]), self.y)
        inverse = torch.where(good, 1.0 / curvature, 0.0)
        self.rho = torch.where(good, torch.cat([self.rho[1:], inverse.unsqueeze(0)]), self.rho)
        self.scale = torch.where(good, curvature / y.square().sum(-1), self.scale)

    def times(self, gradient: Tensor) -> Tensor:
        """The approximate inverse Hessian times ``gradient``, by two loops over the pairs."""
        q, weights = gradient, []
        for s, y, rho in reversed(list(zip(self.s, self.y, self.rho, strict=True))):
            weights.append((rho * (s * q).sum(-1)).unsqueeze(-1))
            q = q - weights[-1] * y
        r = self.scale.unsqueeze(-1) * q
        for s, y, rho, weight in zip(self.s, self.y, self.rho, reversed(weights), strict=True):
            r = r + s * (weight - (rho * (y * r).sum(-1)).unsqueeze(-1))
        return r


class Refined(NamedTuple):
    """Draws of Hamiltonian chains.

    Attributes:
        draws: ``(n, C, B, k)``.
        acceptance: Mean acceptance of each subject's chains after the warm-up, ``(B,)``.
        rhat: The largest split R-hat over coordinates, ``(B,)``; NaN for fewer than 4 draws a chain.
        divergences: Divergent transitions after the warm-up, ``(B,)``.
    """

    draws: Tensor
    acceptance: Tensor
    rhat: Tensor
    divergences: Tensor


@torch.no_grad()
def hamiltonian_chains(
    potential: Potential,
    start: Tensor,
    scale: Tensor,
    num_draws: int,
    *,
    warmup: int = 100,
    num_leapfrog: int = 8,
    thin: int = 1,
    on_step: Callable[[], None] | None = None,
) -> Refined:
    """Hamiltonian Monte Carlo of ``B`` densities at once, ``C`` chains each.

    Every subject has a step size of its own (dual averaging over its chains' mean acceptance), first in
    units of ``scale``; after half of the warm-up in those of the covariance that its chains had in the second
    quarter, shrunk towards its diagonal. Both are frozen before the draws.

    Args:
        potential: ``-log p`` up to a constant, ``(C, B, k) -> (C, B)``.
        start: Where the chains start, ``(C, B, k)``.
        scale: A first guess of the deviations, ``(B, k)``.
        num_draws: Kept of each chain.
        warmup: Transitions before the first draw.
        num_leapfrog: Leapfrog steps of a transition.
        thin: Transitions between draws.
        on_step: Called after each transition.

    Returns:
        A :class:`Refined`.

    Raises:
        ValueError: Counts out of range.

    Source: Neal (2011); Hoffman and Gelman (2014) for the steps.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> start = torch.zeros(8, 3, 2)  # 8 chains for 3 subjects
        >>> result = hamiltonian_chains(lambda z: 0.5 * z.square().sum(-1), start, torch.ones(3, 2), 100)
        >>> result.draws.shape, bool((result.draws.flatten(0, 1).std(0) - 1).abs().max() < 0.15)
        (torch.Size([100, 8, 3, 2]), True)
    """
    check_count("num_draws", num_draws)
    check_count("warmup", warmup, 0)
    check_count("num_leapfrog", num_leapfrog)
    check_count("thin", thin)
    walk = _Walk(potential, start, torch.diag_embed(scale), num_leapfrog)
    half = warmup // 2
    kept: list[Tensor] = []
    for t in range(warmup):
        if t == half and kept:
            walk.whiten(torch.stack(kept))
        walk.transition(adapt=True)
        if half // 2 <= t < half:
            kept.append(walk.position)
        if on_step is not None:
            on_step()
    draws, acceptance = [], torch.zeros_like(walk.log_step)
    divergences = torch.zeros_like(walk.log_step, dtype=torch.long)
    for t in range(num_draws * thin):
        accepted, diverged = walk.transition(adapt=False)
        acceptance, divergences = acceptance + accepted, divergences + diverged
        if (t + 1) % thin == 0:
            draws.append(walk.position)
        if on_step is not None:
            on_step()
    result = torch.stack(draws)
    rhat = split_rhat(result).amax(-1)
    return Refined(result, acceptance / (num_draws * thin), rhat, divergences)


class _Walk:
    """Chains in whitened coordinates ``z = L u``, with one step size and one ``L`` a subject."""

    def __init__(self, potential: Potential, start: Tensor, factor: Tensor, num_leapfrog: int) -> None:
        self.potential, self.num_leapfrog = potential, num_leapfrog
        self.shape = start.shape
        self._enter(start, factor)

    def _enter(self, z: Tensor, factor: Tensor) -> None:
        self.factor = factor
        columns = z.permute(1, 2, 0)  # (B, k, C)
        u = torch.linalg.solve_triangular(factor, columns, upper=False).permute(2, 0, 1)
        self.state = ChainState(u.reshape(-1, self.shape[-1]), *self._density(u.reshape(-1, self.shape[-1])))
        subjects = self.shape[1]
        self.log_step = z.new_full((subjects,), math.log(_FIRST_STEP))
        self.averaged, self.error, self.updates = self.log_step, torch.zeros_like(self.log_step), 0

    def _constrained(self, u: Tensor) -> Tensor:
        return torch.einsum("bij,cbj->cbi", self.factor, u.reshape(self.shape))

    def _density(self, u: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = value_and_gradient(self.potential, self._constrained(u))
        gradient = torch.einsum("bij,cbi->cbj", self.factor, gradient)
        return -value.reshape(-1), -gradient.reshape(u.shape)

    @property
    def position(self) -> Tensor:
        """``z (C, B, k)``."""
        return self._constrained(self.state.position)

    def transition(self, *, adapt: bool) -> tuple[Tensor, Tensor]:
        """One transition; the mean acceptance and the divergences of each subject, ``(B,)``."""
        chains, subjects, _ = self.shape
        log_step = self.log_step if adapt else self.averaged
        kernel = HMC(self._density, log_step.exp().repeat(chains), self.num_leapfrog, None, _JITTER)
        self.state, info = kernel(self.state)
        acceptance = info.acceptance.view(chains, subjects).mean(0)
        if adapt:
            self._adapt(acceptance)
        return acceptance, info.diverged.view(chains, subjects).sum(0)

    def _adapt(self, acceptance: Tensor) -> None:
        self.updates += 1
        t = self.updates
        weight = 1.0 / (t + _OFFSET)
        self.error = (1.0 - weight) * self.error + weight * (TARGET_ACCEPTANCE - acceptance)
        self.log_step = math.log(10.0 * _FIRST_STEP) - math.sqrt(t) / _GAMMA * self.error
        share = t**-_KAPPA
        self.averaged = share * self.log_step + (1.0 - share) * self.averaged

    def whiten(self, draws: Tensor) -> None:
        """New coordinates from ``draws (n, C, B, k)``, and steps found anew in them."""
        z = self.position
        flat = draws.flatten(0, 1)
        n, dim = len(flat), flat.shape[-1]
        centred = flat - flat.mean(0)
        cov = torch.einsum("nbi,nbj->bij", centred, centred) / max(n - 1, 1)
        variance = cov.diagonal(dim1=-2, dim2=-1)
        # A chain that has not moved tells no scale.
        good = (variance > 0) & torch.isfinite(variance)
        old = self.factor.square().sum(-1)
        variance = torch.where(good, variance, old)
        share = n / (n + 2.0 * dim)
        cov = share * torch.where(torch.isfinite(cov), cov, 0.0)
        cov = cov + torch.diag_embed(variance - share * torch.where(good, variance, 0.0))
        factor, info = torch.linalg.cholesky_ex(cov)
        diagonal = torch.diag_embed(variance.sqrt())
        self._enter(z, torch.where((info == 0)[:, None, None], factor, diagonal))


def split_rhat(draws: Tensor) -> Tensor:
    """Split R-hat of many quantities at once, without ranks: ``(n, C, ...) -> (...)``.

    Each chain is cut in halves, so that one chain has a value too. Near 1 when the chains have mixed;
    :func:`riemvae.sampling.split_rhat` is the rank-normalised statistic, one quantity at a time. NaN for
    fewer than 4 draws a chain.

    Source: Gelman et al. (2013), section 11.4.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bool((split_rhat(torch.randn(500, 4, 3)) < 1.02).all())
        True
    """
    half = len(draws) // 2
    if half < 2:
        return draws.new_full(draws.shape[2:], math.nan)
    parts = torch.cat([draws[:half], draws[-half:]], 1)
    within = parts.var(0).mean(0)
    between = parts.mean(0).var(0)
    return ((half - 1) / half + between / within).sqrt()
