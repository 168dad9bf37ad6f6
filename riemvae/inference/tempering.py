"""The path of densities from a start ``q_0(z)`` to ``p(x, z)``, per datum and for many chains at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from riemvae._checks import argument_error, check_choice, check_count
from riemvae.geometry import Potential
from riemvae.geometry import potential as potentials
from riemvae.guides import AmortizedGuide
from riemvae.guides.amortized import GuideCall, log_det
from riemvae.guides.log_joint import (
    ModelStructure,
    examine,
    in_batch,
    is_subsample,
    potential_of,
    prototype,
    unconditioned,
)
from riemvae.inference.weights import refuse_scores
from riemvae.priors.fixed import without_validation
from riemvae.sampling.kernel import ChainState

STARTS = ("guide", "prior")
SCHEDULES = ("sigmoid", "linear")

# Of the sigmoid schedule: inverse temperatures are dense at both ends (Grosse et al., 2015).
_STEEPNESS = 4.0
# Draws of the start that tell its scale, and which of their order statistics lie one deviation apart from
# the median in a normal.
_SCALE_DRAWS, _LOWER, _UPPER = 128, 20, 107


class Point(NamedTuple):
    """``N = C·B`` positions (chains outermost) with both ends of the path evaluated there.

    A change of temperature needs no new evaluation: values and gradients of both ends are kept apart.

    Attributes:
        position: Unconstrained coordinates ``u``, ``(N, d)``.
        log_start: ``log q_0(u)``, ``(N,)``.
        log_target: ``log p(x, T(u)) + log|det ∂T/∂u|``, ``(N,)``.
        start_gradient: ``(N, d)``.
        target_gradient: ``(N, d)``.
    """

    position: Tensor
    log_start: Tensor
    log_target: Tensor
    start_gradient: Tensor
    target_gradient: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """``log p(x, z) - log q_0(z)``, ``(N,)`` in float64; ``-inf`` where the model has no density."""
        ratio = self.log_target.double() - self.log_start.double()
        return torch.where(torch.isneginf(self.log_target), -torch.inf, ratio)

    def tempered(self, beta: Tensor) -> ChainState:
        """The state of chains on ``(1 - β) log q_0 + β log p``, ``beta`` of shape ``(N,)``, above zero."""
        beta = beta.to(self.log_start)
        rest = 1.0 - beta
        # At β = 1 the start does not count, not even where it is zero.
        log_start = torch.where(rest > 0, rest * self.log_start, 0.0)
        beta, rest = beta.unsqueeze(-1), rest.unsqueeze(-1)
        gradient = rest * self.start_gradient + beta * self.target_gradient
        return ChainState(self.position, log_start + beta.squeeze(-1) * self.log_target, gradient)

    def where(self, chosen: Tensor, other: Point) -> Point:
        """Rows of this point where ``chosen (N,)``, else of the other."""
        column = chosen.unsqueeze(-1)
        return Point(*(torch.where(column if a.dim() == 2 else chosen, a, b) for a, b in zip(self, other)))


class StartDensity:
    """``q_0`` in unconstrained coordinates, of a distribution there or on the latent's support.

    Args:
        distribution: With batch shape ``()`` or ``(B,)`` and event ``(d,)``.
        transform: ``T: u -> z`` where the distribution is one of ``z``; None where it is one of ``u``.
    """

    def __init__(self, distribution: Any, transform: Any = None) -> None:
        self.distribution, self.transform = without_validation(distribution), transform

    def sample(self, num_chains: int, size: int) -> Tensor:
        """``(C, B, d)``."""
        batch = self.distribution.batch_shape
        draws = self.distribution.sample((num_chains,) if batch == (size,) else (num_chains, size))
        return (draws if self.transform is None else self.transform.inv(draws)).detach()

    def potential(self) -> Potential:
        """``-log q_0(u)``."""
        return unconstrained(lambda z: -self.distribution.log_prob(z), self.transform)


def unconstrained(potential: Potential, transform: Any) -> Potential:
    """``U(T(u)) - log|det ∂T/∂u|``; the potential itself without a transform."""
    if transform is None:
        return potential

    def pulled_back(u: Tensor) -> Tensor:
        z = transform(u)
        return potential(z) - log_det(transform, u, z)

    return pulled_back


class _BeforePlates:
    """A potential of ``(C, B, d)`` of a model with further plates, which stand between chains and data."""

    def __init__(self, potential: Potential, num_plates: int) -> None:
        self.potential, self.ones = potential, (1,) * num_plates

    def _shaped(self, u: Tensor) -> Tensor:
        return u.reshape(*u.shape[:-2], *self.ones, *u.shape[-2:])

    def __call__(self, u: Tensor) -> Tensor:
        return self.potential(self._shaped(u)).reshape(u.shape[:-1])

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = potentials.value_and_gradient(self.potential, self._shaped(u))
        return value.reshape(u.shape[:-1]), gradient.reshape(u.shape)


class TemperedPath:
    """``log f_β(u) = (1 - β) log q_0(u) + β log p(x, u)`` for the ``B`` data of a batch.

    A position where a density is NaN has density zero: a function of the position like any other, with which
    an estimate stays unbiased for what is left.

    Args:
        start: ``q_0``.
        target: ``-log p(x, z)``, per datum.
        transform: From unconstrained coordinates to the latent's support, None where that is ``ℝᵈ``.
        size: ``B``.
        nesting: Depth of the model's plates: chains stand in front of all of them.

    Attributes:
        target: ``-log p(x, T(u)) - log|det ∂T/∂u|`` as a potential of ``(C, B, d)``.
    """

    def __init__(
        self, start: StartDensity, target: Potential, transform: Any, size: int, nesting: int = 1
    ) -> None:
        self.start, self.transform, self.size = start, transform, size
        self._start = start.potential()
        target = unconstrained(target, transform)
        self.target = target if nesting == 1 else _BeforePlates(target, nesting - 1)

    def draw(self, num_chains: int) -> Tensor:
        """Positions ``(C·B, d)`` from the start."""
        return self.start.sample(num_chains, self.size).flatten(0, 1)

    def scale(self) -> Tensor:
        """Half the central 68 % interval of the start in each coordinate, ``(B, d)``: a deviation."""
        draws = self.start.sample(_SCALE_DRAWS, self.size).sort(0).values
        width = 0.5 * (draws[_UPPER] - draws[_LOWER])
        return torch.where((width > 0) & torch.isfinite(width), width, 1.0)

    def _chains(self, u: Tensor) -> Tensor:
        return u.view(-1, self.size, u.shape[-1])

    @torch.no_grad()
    def evaluate(self, u: Tensor) -> Point:
        """Both ends of the path at ``u (C·B, d)``: one gradient of the model."""
        start = potentials.value_and_gradient(self._start, self._chains(u))
        target = potentials.value_and_gradient(self.target, self._chains(u))
        values = [_or_zero(-value.reshape(-1)) for value, _ in (start, target)]
        gradients = [_finite(-gradient.reshape(u.shape)) for _, gradient in (start, target)]
        return Point(u, *values, *gradients)

    @torch.no_grad()
    def gradient(self, u: Tensor, beta: Tensor) -> Tensor:
        """The gradient of ``log f_β`` alone, ``(C·B, d)``."""
        start = potentials.gradient(self._start, self._chains(u)).reshape(u.shape)
        target = potentials.gradient(self.target, self._chains(u)).reshape(u.shape)
        beta = beta.to(u).unsqueeze(-1)
        return (1.0 - beta) * _finite(-start) + beta * _finite(-target)

    @torch.no_grad()
    def log_ratio(self, u: Tensor) -> Tensor:
        """``log p(x, z) - log q_0(z)`` alone at ``u (C, B, d)``, ``(C, B)`` in float64."""
        log_start, log_target = (_or_zero(-end(u)) for end in (self._start, self.target))
        return Point(u, log_start, log_target, u, u).log_ratio

    def constrained(self, u: Tensor) -> Tensor:
        """``z = T(u)``."""
        return u if self.transform is None else self.transform(u)

    def unconstrained(self, z: Tensor) -> Tensor:
        """``u = T⁻¹(z)``."""
        return z if self.transform is None else self.transform.inv(z)


def _or_zero(log_density: Tensor) -> Tensor:
    return torch.where(torch.isnan(log_density) | torch.isposinf(log_density), -torch.inf, log_density)


def _finite(gradient: Tensor) -> Tensor:
    return torch.where(torch.isfinite(gradient), gradient, 0.0)


def tempered_path(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    shared: Mapping[str, Tensor],
    *,
    start: str,
    latent: str,
) -> TemperedPath:
    """The path of a model's latent for one batch, its global latents given by ``shared``.

    Raises:
        ValueError: The model has no such latent in a data plate, the latent lies in further plates, other
            latents lie in the data plate or have no value, the model draws a subsample of the batch, its data
            term is a relaxed score, or a start whose density cannot be evaluated.
    """
    conditioned = poutine.condition(model, dict(shared)) if shared else model
    with pyro.validation_enabled(False):
        trace = prototype(conditioned, args, kwargs)
    refuse_scores(trace)
    structure = examine(conditioned, latent, args, kwargs)
    if structure.others:
        local = [n for n in structure.others if in_batch(trace.nodes[n], structure.plate)]
        if local:
            raise argument_error(
                "model",
                f"{latent!r} as the only latent of a datum",
                f"{local} beside it in the data plate",
                "sum them out, or put them into the event of one site",
            )
        raise unconditioned(list(structure.others))
    if len(structure.frames) > 1 or structure.subsampled:
        raise argument_error(
            "model",
            f"{latent!r} in the data plate alone, one for each datum of the batch",
            f"plates {[f.name for f in structure.frames]}, subsampled {sorted(structure.subsampled)}",
            "put the other dimensions into its event and let the model take the batch as it is",
        )
    transform = AmortizedGuide._transform(structure)
    values = {name: value for name, value in shared.items() if name in trace.nodes}
    target = potential_of(model, structure, args, kwargs, values)
    if start == "prior":
        density = StartDensity(trace.nodes[latent]["fn"], transform)
    else:
        density = _guide_density(guide, structure, args, kwargs, shared, transform)
    return TemperedPath(density, target, transform, size, max(1, structure.nesting))


def _guide_density(
    guide: Any,
    structure: ModelStructure,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shared: Mapping[str, Tensor],
    transform: Any,
) -> StartDensity:
    """The density of a guide that can be evaluated anywhere: that of its encoder, or of its latent site."""
    remedy = "pass start='prior'"
    if guide is None:
        raise argument_error("guide", "a guide to start from", None, remedy)
    if isinstance(guide, AmortizedGuide):
        with torch.no_grad(), poutine.block():
            posterior = guide.current_posterior(GuideCall(structure, args, kwargs))
        if posterior is None:
            raise argument_error("guide", "a guide whose start has a density", guide, remedy)
        return StartDensity(posterior)
    trace = prototype(poutine.condition(guide, dict(shared)) if shared else guide, args, kwargs)
    sites: dict[str, Any] = {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and in_batch(site, structure.plate) and not is_subsample(site)
    }
    if set(sites) != {structure.latent} or isinstance(sites[structure.latent]["fn"], dist.Delta):
        raise argument_error(
            "guide",
            f"a guide with {structure.latent!r}, with a density, alone in the plate {structure.plate!r}",
            f"sites {sorted(sites)}",
            remedy,
        )
    return StartDensity(sites[structure.latent]["fn"], transform)


def latent_name(guide: Any, latent: str | None) -> str:
    """The name of the latent: as asked for, else the guide's own, else ``"z"``."""
    if latent is not None:
        return latent
    return guide.latent if isinstance(guide, AmortizedGuide) else "z"


def inverse_temperature_schedule(schedule: str | Tensor, num_temperatures: int) -> Tensor:
    """``β_0 = 0 < β_1 < … < β_T = 1`` as ``(T + 1,)`` in float64.

    Args:
        schedule: ``"sigmoid"`` (dense at both ends), ``"linear"``, or the values themselves.
        num_temperatures: ``T``, where the schedule is named.

    Raises:
        ValueError: An unknown name, or values that do not increase from 0 to 1.

    Source: Grosse, Ghahramani and Adams (2015), section 7.

    Example:
        >>> inverse_temperature_schedule("linear", 4)
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    if isinstance(schedule, Tensor):
        betas = schedule.detach().double()
        good = betas.dim() == 1 and len(betas) > 1 and float(betas[0]) == 0.0 and float(betas[-1]) == 1.0
        if not good or not bool((betas.diff() > 0).all()):
            raise argument_error("schedule", "a tensor that increases from 0 to 1", schedule)
        return betas
    check_choice("schedule", schedule, SCHEDULES)
    check_count("num_temperatures", num_temperatures)
    grid = torch.linspace(0.0, 1.0, num_temperatures + 1, dtype=torch.float64)
    if schedule == "linear" or num_temperatures == 1:
        return grid
    bent = torch.sigmoid(_STEEPNESS * (2.0 * grid - 1.0))
    bent = (bent - bent[0]) / (bent[-1] - bent[0])
    bent[0], bent[-1] = 0.0, 1.0
    return bent
