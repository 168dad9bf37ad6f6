"""Simulation-based calibration: is a guide the posterior of its model, on data that the model makes?"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from riemvae._checks import argument_error, check_count
from riemvae._seeding import forked
from riemvae.guides.evaluation import evaluating
from riemvae.inference.batches import (
    batch_call,
    batch_length,
    batch_parts,
    make_batches,
    map_batch,
)
from riemvae.inference.predictive import prior_draws, takes_size
from riemvae.inference.resampling import (
    Layout,
    PosteriorDraws,
    local_latents,
    log_joint,
    num_proposals_for,
    observed_sites,
    posterior_draws,
    structure_of,
    warn_of_tails,
)
from riemvae.inference.weights import DEFAULT_CHUNK, global_draw, placement
from riemvae.sampling.adaptation import steps_of

# Simulated sets of uniform ranks behind the p-values and the band of the ECDF.
_SETS = 10_000
# Places at which the ECDF is compared.
_PLACES = 100
# Draws of the guide for each resampled one, and the fewest of a datum.
_PROPOSALS_A_DRAW, _FEWEST = 10, 500
# Share of simulations with fewer effective proposals than draws, above which a verdict may be about those.
_MOST_FEW = 0.1
# The fewest ranks a bin of the chi-square test should expect.
_EXPECTED = 5

Simulator = Callable[[int], tuple[Tensor, Any]]


@dataclass(frozen=True)
class CalibratedQuantity:
    """How the ranks of one quantity are distributed.

    Attributes:
        name: A latent's coordinate, as ``z[0]``, or a statistic.
        p_value: Of uniformity by the ECDF: the chance that uniform ranks leave the middle as far anywhere.
        chi2_p_value: Of uniformity by Pearson's chi-square over ``num_bins`` bins of equally many ranks.
        adjusted: ``p_value`` by Holm's method over all quantities.
        slope: Shift of the mean rank in standard errors: positive where the truth lies above the draws.
        curvature: Excess of ranks at both ends over the middle, in standard errors.
        shape: What the histogram of ranks looks like and means, in words.
    """

    name: str
    p_value: float
    chi2_p_value: float
    adjusted: float
    slope: float
    curvature: float
    shape: str


@dataclass(frozen=True)
class Calibration:
    """Ranks of simulated truths among the draws of a guide.

    Attributes:
        ranks: The number of draws below the truth, 0 to ``num_draws``, ``(n, q)`` for ``q`` quantities.
        num_draws: ``L``.
        num_bins: Bins of the chi-square test, of equally many ranks.
        level: Of the verdict.
        quantities: A :class:`CalibratedQuantity` for each column.
        khat: The Pareto shape of the guide's weights for each simulated datum, ``(n,)``.
    """

    ranks: Tensor
    num_draws: int
    num_bins: int
    level: float
    quantities: tuple[CalibratedQuantity, ...]
    khat: Tensor

    @property
    def calibrated(self) -> bool:
        """Whether no quantity's ranks differ from uniform ones at ``level``, by Holm's method over all.

        True is absence of evidence: more simulations find smaller faults.
        """
        return all(q.adjusted >= self.level for q in self.quantities)

    @property
    def names(self) -> list[str]:
        """The names of the quantities."""
        return [q.name for q in self.quantities]

    def __len__(self) -> int:
        return len(self.ranks)

    def __iter__(self) -> Iterator[CalibratedQuantity]:
        return iter(self.quantities)

    def __getitem__(self, name: str) -> CalibratedQuantity:
        for quantity in self.quantities:
            if quantity.name == name:
                return quantity
        raise KeyError(name)

    def ecdf(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The ECDF of the ranks beside the band in which uniform ones stay, all along.

        Returns:
            Places ``(K,)`` in (0, 1), the ECDF there ``(K, q)``, and the lower and upper end ``(K,)`` of a
            simultaneous band of level ``1 - level``.
        """
        places, lower, upper = ecdf_band(len(self), self.num_draws, self.level)
        cut = torch.tensor(places) * (self.num_draws + 1)
        counts = (self.ranks.cpu().unsqueeze(0) < cut[:, None, None]).double().mean(1)
        return torch.tensor(places), counts, torch.tensor(lower), torch.tensor(upper)

    def histogram(self) -> Tensor:
        """Ranks a bin, ``(num_bins, q)``."""
        return _histogram(self.ranks, self.num_draws, self.num_bins)

    def __repr__(self) -> str:
        verdict = "no fault found" if self.calibrated else "NOT calibrated"
        lines = [
            f"Calibration: {verdict} at level {self.level:g} "
            f"({len(self)} simulations, {self.num_draws} draws, {len(self.quantities)} quantities)"
        ]
        width = max(len(q.name) for q in self.quantities)
        shown = sorted(self.quantities, key=lambda q: q.adjusted)[:12]
        for q in shown:
            lines.append(f"  {q.name.ljust(width)}  p = {q.p_value:.4f} (Holm {q.adjusted:.4f})  {q.shape}")
        if len(shown) < len(self.quantities):
            lines.append(f"  ... and {len(self.quantities) - len(shown)} with larger p")
        return "\n".join(lines)


def simulation_based_calibration(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any = None,
    num_simulations: int = 1000,
    num_draws: int = 99,
    *,
    simulate: Simulator | None = None,
    statistics: Mapping[str, Callable[[Tensor, Any], Tensor]] | None = None,
    weights: bool = False,
    num_proposals: int | None = None,
    latent: str = "z",
    level: float = 0.05,
    chunk_size: int | None = None,
    seed: int | None = None,
    tolerance: float = 1e-6,
    progress: bool = False,
) -> Calibration:
    """Draws ``z*`` and ``x`` from the model, and ranks ``z*`` among the guide's draws given ``x``.

    If the guide is the posterior, ``z*`` and the draws are exchangeable given ``x``, so that the ranks are
    uniform on ``0..L``. A U shape says that the guide is too narrow, a hump that it is too wide, a slope that
    it is shifted. Beside each coordinate of ``z`` the norm ``|z|`` and ``log p(x, z)`` are ranked, which
    depend on all coordinates together: coordinates alone miss a wrong correlation. The draws are independent,
    so none are thinned. What is found is right on average over data *of the model*; of data that the model
    does not make, it says nothing.

    Args:
        model: The model itself.
        guide: Its guide; global latents are held at one draw of it, in the simulation too.
        data: Data of the shape to simulate, for a model that takes no ``size=``: arguments that the model
            observes are replaced by what it draws, the others (covariates) are kept, row by row.
        num_simulations: ``n``; rounded up to whole batches of ``data``.
        num_draws: ``L``; ``L + 1`` should have divisors, for bins of equally many ranks.
        simulate: ``n -> (z, data)``, in place of the model's own draws: ``z (n, d)`` and a batch of data.
        statistics: Further quantities by name: functions of ``z (..., n, d)`` and of the batch, to
            ``(..., n)``.
        weights: Calibrates the guide's draws resampled by their importance weights instead.
        num_proposals: Draws that are then resampled to ``L``; None is 10 for each, at least 500. For a guide
            far from the posterior that can be too few: where the weights' effective sample size is below
            ``L``, many draws are the same ones, the ranks make a U, and the verdict is about the number of
            proposals, not about the posterior. A warning says so; take more proposals then.
        latent: The latent's name.
        level: Of the verdict and the band.
        chunk_size: Data times samples at once; None is about 2,000.
        seed: Of the draws; the caller's generator is left as it was.
        tolerance: Residual of fixed points of Riemannian guides.
        progress: Shows a bar.

    Returns:
        A :class:`Calibration`.

    Raises:
        ValueError: A model that cannot be simulated as it is called (pass ``simulate=``), a number of draws
            without bins, a statistic of the wrong shape.

    Source: Talts, Betancourt, Simpson, Vehtari and Gelman (2018); Modrák et al. (2023) for ``log p(x, z)``;
    Säilynoja, Bürkner and Vehtari (2022) for the band.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from riemvae.guides import GaussianGuide
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> exact = GaussianGuide(model, lambda x: (x / 2, torch.full_like(x, 0.5**0.5)))
        >>> narrow = GaussianGuide(model, lambda x: (x / 2, torch.full_like(x, 0.4)))
        >>> simulation_based_calibration(model, exact, torch.zeros(500, 1), 500, seed=1).calibrated
        True
        >>> simulation_based_calibration(model, narrow, torch.zeros(500, 1), 500, seed=1)["z[0]"].shape
        'U: the guide is too narrow (overconfident)'
    """
    check_count("num_simulations", num_simulations, 2)
    check_count("num_draws", num_draws, 1)
    pairs = DEFAULT_CHUNK if chunk_size is None else check_count("chunk_size", chunk_size)
    if not 0.0 < level < 1.0:
        raise argument_error("level", "a number strictly between 0 and 1", level)
    num_bins = bins_for(num_simulations, num_draws)
    # Resampled draws share their proposals: too few of those would make a U of an exact guide's ranks.
    default = num_proposals_for(num_draws, num_proposals or max(_FEWEST, _PROPOSALS_A_DRAW * num_draws))
    proposals = default if weights else num_draws
    ranks, khats, effective, names = [], [], [], []
    with forked(seed), torch.no_grad(), evaluating(tolerance, model, guide):
        source = _Simulations(model, guide, data, simulate, latent, max(1, pairs // proposals))
        sizes = source.sizes(num_simulations)
        for index in steps_of(len(sizes), progress, "Simulations"):
            truth, batch, shared = source.draw(sizes[index])
            args, kwargs = batch_call(batch)
            size = batch_length(batch)
            draws = posterior_draws(
                *(model, guide, args, kwargs, size, num_draws),
                resample=weights,
                num_proposals=proposals if weights else None,
                pairs=pairs,
                shared=shared,
            )
            if set(draws.values) != {latent}:
                raise argument_error(
                    "model",
                    f"the one latent {latent!r} in the data plate",
                    f"latents {sorted(draws.values)}",
                    "name it with latent=, or condition the model on the others",
                )
            if truth.shape != draws.values[latent].shape[1:]:
                raise argument_error(
                    "simulate", f"latents {tuple(draws.values[latent].shape[1:])} with their data", truth
                )
            found = _quantities(model, args, kwargs, batch, draws, truth, latent, size, statistics or {})
            names = list(found)
            ranks.append(torch.cat([_ranks(*pair) for pair in found.values()], -1))
            khats.append(draws.khat)
            effective.append(draws.ess)
    if weights:
        warn_of_tails(torch.cat(khats), 3)
        _warn_of_few(torch.cat(effective), num_draws, proposals)
    joined = torch.cat(ranks)
    return Calibration(
        joined,
        num_draws,
        num_bins,
        level,
        tuple(_judge(joined, num_draws, num_bins, _labels(names, joined.shape[1]), level)),
        torch.cat(khats),
    )


def _warn_of_few(ess: Tensor, num_draws: int, num_proposals: int) -> None:
    """Warns where too few proposals, rather than a wrong posterior, may be what the ranks show."""
    few = int((ess < num_draws).sum())
    if few > _MOST_FEW * len(ess):
        warnings.warn(
            f"the weights' effective sample size is below num_draws={num_draws} for {few} of {len(ess)} "
            f"simulations: repeated draws alone can make their ranks a U; raise num_proposals (here "
            f"{num_proposals}), or take fewer draws or a guide closer to the posterior",
            stacklevel=3,
        )


# -- simulations -------------------------------------------------------------------------------------------


class _Simulations:
    """Batches of truths and data, from a function, from ``model(size=n)``, or in the shape of given data."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        data: Any,
        simulate: Simulator | None,
        latent: str,
        batch_size: int,
    ) -> None:
        self.model, self.guide, self.latent, self.simulate = model, guide, latent, simulate
        self.batch_size = batch_size
        self.templates: list[Any] = []
        self.shared: dict[str, Tensor] | None = None
        if simulate is None and data is None and not takes_size(model):
            raise argument_error(
                "simulate",
                "a way to draw data, since the model takes no size=",
                None,
                "pass data= of the shape to simulate, or simulate=n -> (z, data)",
            )
        if simulate is None and data is not None:
            device, dtype = placement(model, guide)
            for batch in make_batches("data", data, batch_size, shuffle=False, dtype=dtype):
                if device is not None:
                    batch = map_batch(lambda a: a.to(device) if isinstance(a, Tensor) else a, batch)
                self.templates.append(batch)
        self.drawn = 0

    def sizes(self, total: int) -> list[int]:
        """Simulations a batch, ``total`` of them or, in whole batches of given data, a few more."""
        if not self.templates:
            whole, rest = divmod(total, self.batch_size)
            return [self.batch_size] * whole + [rest] * (rest > 0)
        found: list[int] = []
        while sum(found) < total:
            found.append(batch_length(self.templates[len(found) % len(self.templates)]))
        return found

    def draw(self, size: int) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """A truth ``(size, d)``, its data, and the global latents that both were drawn with."""
        truth, batch = self._draw(size, self.shared)
        if self.shared is None:
            args, kwargs = batch_call(batch)
            self.shared = global_draw(self.model, self.guide, args, kwargs)
            if self.shared and self.simulate is None:  # again, at the values that the guide is asked at
                truth, batch = self._draw(size, self.shared)
        self.drawn += 1
        return truth, batch, self.shared

    def _draw(self, size: int, shared: dict[str, Tensor] | None) -> tuple[Tensor, Any]:
        if self.simulate is not None:
            return self.simulate(size)
        template = self.templates[self.drawn % len(self.templates)] if self.templates else None
        args, kwargs = ((), {"size": size}) if template is None else batch_call(template)
        drawn = prior_draws(self.model, args, kwargs, size, 1, shared=shared)
        trace, plate, _ = structure_of(self.model, args, kwargs)
        if template is None:
            free = [name for name in local_latents(trace, plate) if name != self.latent]
            if len(free) != 1 or self.latent not in drawn:
                raise argument_error(
                    "simulate",
                    f"a function n -> (z, data), since model(size=n) draws {sorted(drawn)}",
                    None,
                )
            return drawn[self.latent][0], drawn[free[0]][0]
        if self.latent not in drawn:
            known = sorted(local_latents(trace, plate))
            raise argument_error("latent", f"a latent site, of {known}", repr(self.latent))
        observed = observed_sites(trace, plate)
        left = set(observed)

        def replaced(part: Any) -> Any:
            for name in sorted(left):
                value = observed[name]["value"]
                same = isinstance(part, Tensor) and (
                    part is value or (part.shape == value.shape and torch.equal(part.to(value), value))
                )
                if same:
                    left.discard(name)
                    return drawn[name][0].reshape(part.shape).to(part.dtype)
            return part

        batch = map_batch(replaced, template)
        if left:
            raise argument_error(
                "simulate",
                f"a function n -> (z, data): the observed {sorted(left)} are none of the "
                f"{len(batch_parts(template))} arguments as they are",
                None,
            )
        return drawn[self.latent][0], batch


# -- ranks -------------------------------------------------------------------------------------------------


def _quantities(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: Any,
    draws: PosteriorDraws,
    truth: Tensor,
    latent: str,
    size: int,
    statistics: Mapping[str, Callable[[Tensor, Any], Tensor]],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Values of each quantity at the truth ``(n, q)`` and at the draws ``(L, n, q)``."""
    z, one = draws.values[latent], truth.unsqueeze(0)
    found = {latent: (truth.flatten(1), z.flatten(2))}
    norms = [v.flatten(2).norm(dim=-1, keepdim=True) for v in (one, z)]
    found[f"|{latent}|"] = (norms[0][0], norms[1])
    at_truth = _holding(draws, latent, one)
    joints = [log_joint(model, args, kwargs, d, size).unsqueeze(-1) for d in (at_truth, draws)]
    found[f"log p(x, {latent})"] = (joints[0][0], joints[1])
    for name, statistic in statistics.items():
        values = [statistic(v, batch) for v in (one, z)]
        for value, v in zip(values, (one, z)):
            if not isinstance(value, Tensor) or value.shape != v.shape[:2]:
                raise argument_error(
                    f"statistics[{name!r}]",
                    f"a function of z {tuple(v.shape)} and the batch to {tuple(v.shape[:2])}",
                    value,
                )
        found[name] = (values[0][0].unsqueeze(-1), values[1].unsqueeze(-1))
    return found


def _holding(draws: PosteriorDraws, latent: str, value: Tensor) -> PosteriorDraws:
    """The same structure at one other value ``(1, n, d)``."""
    layouts: dict[str, Layout] = {latent: draws.layouts[latent]}
    row = draws.log_weights[:1]
    return PosteriorDraws(
        {latent: value}, row, row[0], row[0], row[0], row[0], layouts, draws.nesting, draws.shared
    )


def _ranks(truth: Tensor, draws: Tensor) -> Tensor:
    """How many draws lie below the truth, ``(n, q)``; among equal ones, at random."""
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    among = (torch.rand(equal.shape, device=equal.device) * (equal + 1)).floor().to(below.dtype)
    return below + torch.minimum(among, equal)


def _labels(names: list[str], count: int) -> list[str]:
    """The quantities' names, the first of them once a coordinate."""
    coordinates = count - len(names) + 1
    return [f"{names[0]}[{i}]" for i in range(coordinates)] + names[1:]


# -- uniformity --------------------------------------------------------------------------------------------


def bins_for(num_ranks: int, num_draws: int) -> int:
    """Bins of equally many ranks ``0..L``: about ``2 n^(2/5)``, each expecting 5 ranks or more.

    Raises:
        ValueError: ``L + 1`` has no divisor that serves.

    Source: Mann and Wald (1942) for the number.
    """
    most = min(num_ranks // _EXPECTED, max(2, round(2.0 * num_ranks**0.4)))
    found = [b for b in range(2, max(2, most) + 1) if (num_draws + 1) % b == 0]
    if not found:
        near = num_draws + 1
        while near % 10:
            near += 1
        raise argument_error(
            "num_draws",
            f"a number L whose L + 1 has a divisor from 2 to {max(2, most)}, for bins of equally many ranks",
            num_draws,
            f"take num_draws={near - 1}",
        )
    return max(found)


def _histogram(ranks: Tensor, num_draws: int, num_bins: int) -> Tensor:
    bins = ranks.cpu().long() * num_bins // (num_draws + 1)
    return torch.stack([torch.bincount(column, minlength=num_bins) for column in bins.T], -1)


@functools.lru_cache(maxsize=16)
def _uniform_sets(num_ranks: int, num_draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the ECDF, and for each of many sets of uniform ranks its smallest pointwise tail, sorted."""
    counts = np.unique(np.linspace(1, num_draws, min(_PLACES, num_draws)).round().astype(int))
    places = counts / (num_draws + 1)
    # A table of its own: neither the caller's generator nor its seed matter to it.
    generator = torch.Generator().manual_seed(0)
    so_far = torch.zeros(_SETS, dtype=torch.float64)
    smallest, before = np.ones(_SETS), 0.0
    for place in places:
        share = torch.full_like(so_far, (place - before) / (1.0 - before))
        so_far = so_far + torch.binomial(num_ranks - so_far, share, generator=generator)
        smallest = np.minimum(smallest, _pointwise(so_far.numpy(), num_ranks, place))
        before = place
    return places, np.sort(smallest)


def _pointwise(counts: Any, num_ranks: int, place: Any) -> Any:
    """The two-sided tail of counts below a place under uniformity, doubled."""
    law = stats.binom(num_ranks, place)
    return np.minimum(1.0, 2.0 * np.minimum(law.cdf(counts), law.sf(counts - 1)))


def ecdf_band(num_ranks: int, num_draws: int, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The band in which the ECDF of ``n`` uniform ranks on ``0..L`` stays with probability ``1 - level``.

    At each place the interval holds the central ``1 - γ`` of a binomial count, and ``γ`` is chosen by
    simulation so that the whole curve stays inside with the probability asked for.

    Returns:
        Places ``k/(L+1)``, and the lower and upper end of the ECDF there.

    Source: Säilynoja, Bürkner and Vehtari (2022), section 2.
    """
    places, smallest = _uniform_sets(num_ranks, num_draws)
    gamma = smallest[int(level * _SETS)]
    law = stats.binom(num_ranks, places)
    # The smallest and largest counts whose doubled tail is at least γ.
    lower, upper = law.ppf(gamma / 2.0 * (1 - 1e-12)), law.isf(gamma / 2.0)
    lower = np.where(2.0 * law.cdf(lower) < gamma, lower + 1, lower)
    upper = np.where(2.0 * law.sf(upper - 1) < gamma, upper - 1, upper)
    return places, lower / num_ranks, upper / num_ranks


def uniformity_p_value(ranks: Tensor, num_draws: int) -> float:
    """The chance that the ECDF of uniform ranks leaves its middle as far anywhere as that of ``ranks (n,)``.

    Example:
        >>> round(uniformity_p_value(torch.arange(100) % 10, 9), 2)  # as even as can be
        1.0
        >>> uniformity_p_value(torch.zeros(100), 9) < 0.001
        True
    """
    places, smallest = _uniform_sets(len(ranks), num_draws)
    cut = np.round(places * (num_draws + 1))
    counts = np.searchsorted(np.sort(ranks.cpu().numpy()), cut, side="left")
    found = _pointwise(counts, len(ranks), places).min()
    below = np.searchsorted(smallest, found * (1.0 + 1e-9), side="right")
    return float((1 + below) / (1 + _SETS))


def _judge(
    ranks: Tensor, num_draws: int, num_bins: int, names: list[str], level: float
) -> Iterator[CalibratedQuantity]:
    n = len(ranks)
    counts = _histogram(ranks, num_draws, num_bins).double().numpy()
    chi2 = stats.chisquare(counts, axis=0).pvalue
    p_values = [uniformity_p_value(column, num_draws) for column in ranks.T]
    u = (ranks.cpu().double() + 0.5) / (num_draws + 1)
    # Orthonormal polynomials on the ranks: each has mean 0 and variance 1 under uniformity.
    grid = (torch.arange(num_draws + 1, dtype=torch.float64) + 0.5) / (num_draws + 1)
    first = grid - 0.5
    second = first.square() - first.square().mean()
    slope = (u - 0.5).sum(0) / (n * first.square().mean()).sqrt()
    spread = (n * second.square().mean()).sqrt()
    curvature = ((u - 0.5).square() - first.square().mean()).sum(0) / spread.clamp_min(1e-300)
    for index, adjusted in enumerate(holm(p_values)):
        s, c = float(slope[index]), float(curvature[index])
        shape = _shape(s, c) if adjusted < level else "as uniform"
        yield CalibratedQuantity(names[index], p_values[index], float(chi2[index]), adjusted, s, c, shape)


def _shape(slope: float, curvature: float) -> str:
    """The shape of ranks that are not uniform, in words."""
    found = []
    if abs(slope) > 3.0:
        side = "low: the truth lies above it" if slope > 0 else "high: the truth lies below it"
        found.append((abs(slope), f"slope: the guide is too {side}"))
    if curvature > 3.0:
        found.append((curvature, "U: the guide is too narrow (overconfident)"))
    if curvature < -3.0:
        found.append((-curvature, "hump: the guide is too wide (underconfident)"))
    found.sort(reverse=True)
    if not found:
        return "neither a slope, nor a U, nor a hump: look at the ranks"
    return "; and ".join(text for _, text in found)


def holm(p_values: list[float]) -> list[float]:
    """P-values adjusted by Holm's method, in their order.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for position, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = largest
    return adjusted
