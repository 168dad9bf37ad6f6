"""Draws of a subject's latent given what is seen of it, by six methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from riemvae._checks import argument_error, check_choice, check_count, check_positive
from riemvae.inference.annealing import systematic
from riemvae.inference.estimation import for_each_batch
from riemvae.inference.weights import DEFAULT_CHUNK, weighted_sum
from riemvae.longitudinal.anchor_posteriors import at_visit
from riemvae.longitudinal.model import LongitudinalVAE
from riemvae.longitudinal.refinement import hamiltonian_chains, minimise
from riemvae.longitudinal.subject_batch import SubjectBatch, arguments, named

METHODS = ("importance", "guide", "naive", "best", "map", "hmc")


@dataclass(frozen=True, repr=False)
class LatentDraws:
    """Draws of the latents of ``B`` subjects given what is seen of them.

    Attributes:
        z_0: ``(S, B, k)``.
        log_weights: What a draw counts, up to a constant a subject, ``(S, B)``; zero where all count equally.
        anchor: The visit that a draw comes from, ``(S, B)``, -1 for a subject of whom nothing is seen; None
            for methods without one.
        acceptance: Of Hamiltonian chains, ``(B,)``.
        rhat: Of Hamiltonian chains, their largest split R-hat, ``(B,)``; NaN for fewer than 4 draws a chain.
        method: How they were drawn.
    """

    z_0: Tensor
    log_weights: Tensor
    anchor: Tensor | None = None
    acceptance: Tensor | None = None
    rhat: Tensor | None = None
    method: str = "importance"

    def __len__(self) -> int:
        return len(self.z_0)

    @property
    def weights(self) -> Tensor:
        """Normalised, ``(S, B)``."""
        return torch.softmax(self.log_weights.double(), 0).to(self.z_0.dtype)

    @property
    def ess(self) -> Tensor:
        """Kish's effective number of draws by their weights, ``(B,)``; correlation of chains left out."""
        log_weights = self.log_weights.double()
        total = 2.0 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2.0 * log_weights, 0)
        return total.exp().to(self.z_0.dtype)

    @property
    def mean(self) -> Tensor:
        """The weighted mean of the draws, ``(B, k)``."""
        return weighted_sum(self.weights, self.z_0)

    def index(self, num: int) -> Tensor:
        """Which draws to take for ``num`` that count equally, ``(num, B)``: systematic resampling."""
        check_count("num", num)
        size = self.log_weights.shape[1]
        if bool((self.log_weights == self.log_weights[:1]).all()):
            places = torch.arange(num, device=self.z_0.device) % len(self)
            return places.unsqueeze(-1).expand(-1, size)
        normalised = torch.log_softmax(self.log_weights.double(), 0)
        repeats = math.ceil(num / len(self))
        picks = systematic(normalised.repeat(repeats, 1).unsqueeze(0) - math.log(repeats))[0]
        # Systematic resampling gives neighbours in order: any subset of them must be fair too.
        order = torch.rand(picks.shape, device=picks.device).argsort(0)[:num]
        return picks.gather(0, order) % len(self)

    def resampled(self, num: int) -> LatentDraws:
        """``num`` draws that count equally.

        Example:
            >>> draws = LatentDraws(torch.tensor([[[0.0]], [[1.0]]]), torch.tensor([[0.0], [-torch.inf]]))
            >>> draws.resampled(3).z_0.flatten().tolist()
            [0.0, 0.0, 0.0]
        """
        index = self.index(num)
        columns = torch.arange(index.shape[1], device=index.device)
        zero = torch.zeros(index.shape, dtype=self.log_weights.dtype, device=index.device)
        anchor = None if self.anchor is None else self.anchor[index, columns]
        return LatentDraws(self.z_0[index, columns], zero, anchor, self.acceptance, self.rhat, self.method)

    def __repr__(self) -> str:
        draws, size, dim = self.z_0.shape
        return (
            f"LatentDraws({draws} draws of {dim} dimensions for {size} subjects, {self.method}, "
            f"median ESS {float(self.ess.median()):.1f})"
        )


@dataclass(frozen=True)
class DrawOptions:
    """What the methods of :func:`draw_posterior` may be told; see there.

    Raises:
        ValueError: An unknown method, counts out of range.
    """

    method: str = "importance"
    num_draws: int = 100
    resample: bool = False
    num_proposals: int | None = None
    num_candidates: int = 1
    num_starts: int = 4
    max_steps: int = 200
    tolerance: float = 1e-5
    num_chains: int = 4
    warmup: int = 100
    num_leapfrog: int = 8
    thin: int = 1

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        for name in ("num_draws", "num_candidates", "num_starts", "max_steps", "num_chains"):
            check_count(name, getattr(self, name))
        for name in ("num_leapfrog", "thin"):
            check_count(name, getattr(self, name))
        check_count("warmup", self.warmup, 0)
        check_positive("tolerance", self.tolerance)
        if self.num_proposals is not None:
            check_count("num_proposals", self.num_proposals)

    @property
    def proposals(self) -> int:
        """Draws of the guide that are weighed."""
        if self.num_proposals is not None:
            return self.num_proposals
        if self.method == "importance":
            return max(200, 4 * self.num_draws) if self.resample else self.num_draws
        return max(64, 4 * max(self.num_starts, self.num_chains))

    @property
    def width(self) -> int:
        """Sequences of one subject that are decoded at once."""
        widths = {"map": self.num_starts, "hmc": self.num_chains, "importance": self.proposals}
        return widths.get(self.method, self.num_draws)


def draw_posterior(
    model: LongitudinalVAE,
    guide: Callable[..., Any],
    data: Any,
    num_draws: int = 100,
    method: str = "importance",
    *,
    chunk_size: int | None = None,
    seed: int | None = None,
    progress: bool = False,
    **options: Any,
) -> LatentDraws:
    """Draws of each subject's latent given its observed visits.

    The methods, from the published one to the exact one:

    - ``"naive"``: the posterior of one observed visit, at random for each draw, carried back (algorithm 6).
      What the other visits say is lost.
    - ``"best"``: algorithm 7. For each draw, ``num_candidates`` draws from each observed visit; the one with
      the highest likelihood of what is seen (eq. 6.8, of the observed ``x_l``) is kept. It is no draw of the
      posterior: it seeks a mode of the likelihood.
    - ``"guide"``: the guide's own draws; with a guide of all visits a posterior from all of them.
    - ``"importance"``: draws of the mixture over all anchors (of a guide without anchors, its own), with
      self-normalised weights; exact as their number grows. ``ess`` says how many of them count.
    - ``"map"``: the mode of ``p(z_0 | seen)``, by L-BFGS from the ``num_starts`` most probable of
      ``num_proposals`` draws; one draw, whatever ``num_draws``.
    - ``"hmc"``: ``num_chains`` Hamiltonian chains from resampled draws of the guide, which target the
      posterior itself, with a step size and a metric of each subject's own. ``rhat`` and ``acceptance`` say
      whether they mixed.

    A subject of whom nothing is seen gets draws of the prior (under ``"map"`` its mode).

    Args:
        model: A :class:`LongitudinalVAE`.
        guide: Its guide: an :class:`AnchoredGuide` (of either kind of anchors), or one of all visits.
        data: Sequences ``(B, T, *shape)``, a tuple in the order of the model's arguments, a mapping by their
            names, a data set or loader. None among them is left out. Times of unobserved visits must not be
            known.
        num_draws: ``S``.
        method: As above.
        chunk_size: Visits decoded at once; None is about 2,000.
        seed: Of the draws; the caller's generator is left as it was.
        progress: Shows a bar.
        **options: Of ``"importance"``: ``resample=True`` gives draws that count equally, picked from
            ``num_proposals`` (None: 4 a draw, at least 200). Of ``"best"``: ``num_candidates=1``. Of
            ``"map"``: ``num_starts=4``, ``max_steps=200``, ``tolerance=1e-5`` (of the gradient). Of
            ``"hmc"``: ``num_chains=4``, ``warmup=100``, ``num_leapfrog=8``, ``thin=1``. ``num_proposals`` of
            the last two is 64 by default.

    Returns:
        A :class:`LatentDraws`.

    Raises:
        ValueError: Bad data, an unknown method or option out of range, ``"naive"`` or ``"best"`` without
            anchors, a refinement of a latent on a constrained support, draws of no weight.
        TypeError: An unknown option.

    Source: Chadebec (thesis), section 6.3.3, algorithm 7; Rubin (1987); Neal (2011).

    Example:
        >>> from torch.distributions import AffineTransform
        >>> from riemvae.longitudinal import AnchoredGuide, FlowChain
        >>> model = LongitudinalVAE(torch.nn.Linear(2, 5), FlowChain([AffineTransform(0.0, 2.0)], 2))
        >>> guide = AnchoredGuide(model, lambda x: (x[:, :2], torch.ones(len(x), 2)))
        >>> x, observed = torch.randn(4, 2, 5), torch.tensor([[True, False]] * 4)
        >>> draw_posterior(model, guide, (x, observed), 50, seed=0).z_0.shape
        torch.Size([50, 4, 2])
        >>> draw_posterior(model, guide, (x, observed), method="map").z_0.shape
        torch.Size([1, 4, 2])
    """
    chosen = DrawOptions(method, num_draws, **options)

    def estimate(batch: SubjectBatch) -> dict[str, Tensor]:
        draws = draws_of(batch, chosen)
        found = {f.name: getattr(draws, f.name) for f in fields(draws)}
        # Subjects first, to be joined.
        return {
            name: value.transpose(0, 1) if value.dim() > 1 else value
            for name, value in found.items()
            if isinstance(value, Tensor)
        }

    result = for_each_subject(
        model, guide, data, estimate, chosen, chunk_size=chunk_size, seed=seed, progress=progress
    )
    columns = {name: v.transpose(0, 1) if v.dim() > 1 else v for name, v in result.items()}
    return LatentDraws(**columns, method=method)  # type: ignore[arg-type]


def for_each_subject(
    model: LongitudinalVAE,
    guide: Callable[..., Any],
    data: Any,
    estimate: Callable[[SubjectBatch], Mapping[str, Tensor]],
    options: DrawOptions,
    *,
    chunk_size: int | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """``estimate`` of one batch of subjects after another, joined, on the device of the data.

    Raises:
        ValueError: A model of another class, bad data.
    """
    if not isinstance(model, LongitudinalVAE):
        raise argument_error("model", "a LongitudinalVAE", model)
    visits = DEFAULT_CHUNK if chunk_size is None else check_count("chunk_size", chunk_size)
    data = arguments(data)
    x = data.get("x") if isinstance(data, Mapping) else None
    home = x.device if isinstance(x, Tensor) else None
    shape: Any = getattr(x, "shape", ())
    num_visits = model.dynamics.num_visits or (int(shape[1]) if len(shape) > 1 else 1)
    pairs = max(1, visits // num_visits)

    def of_batch(
        args: tuple[Any, ...], kwargs: dict[str, Any], size: int, shared: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        batch = SubjectBatch(model, guide, named(args, kwargs), shared, pairs)
        return {name: value if home is None else value.to(home) for name, value in estimate(batch).items()}

    return for_each_batch(
        model,
        guide,
        data,
        of_batch,
        batch_size=max(1, pairs // options.width),
        seed=seed,
        progress=progress,
        description=options.method,
    )


def draws_of(batch: SubjectBatch, options: DrawOptions) -> LatentDraws:
    """The draws of one batch."""
    draws = _METHODS[options.method](batch, options)
    if options.method == "map" or not bool(batch.empty.any()):
        return draws
    z_0 = torch.where(batch.empty[:, None], batch.prior_draws(len(draws)), draws.z_0)
    log_weights = torch.where(batch.empty, 0.0, draws.log_weights)
    anchor = None if draws.anchor is None else torch.where(batch.empty, -1, draws.anchor)
    return LatentDraws(z_0, log_weights, anchor, draws.acceptance, draws.rhat, draws.method)


def _naive(batch: SubjectBatch, options: DrawOptions) -> LatentDraws:
    components, num = batch.components(), options.num_draws
    chances = batch.anchors().to(torch.get_default_dtype())
    visit = torch.multinomial(chances, num, replacement=True).T
    z, _ = components.rsample(torch.Size([num]))
    z_0, _ = batch.model.dynamics.rewind(at_visit(z, visit), visit, batch.data.times, batch.covariates)
    return LatentDraws(z_0, z_0.new_zeros(visit.shape), visit, method="naive")


def _best(batch: SubjectBatch, options: DrawOptions) -> LatentDraws:
    components, anchors = batch.components(), batch.anchors()
    # A subject's anchors first; those that have fewer repeat their first one, which changes no maximum.
    most = int(anchors.sum(1).max())
    order = torch.argsort((~anchors).to(torch.uint8), dim=1, stable=True)[:, :most]
    valid = anchors.gather(1, order)
    visit = torch.where(valid, order, order[:, :1]).T  # (m, B)
    dynamics, kept, chosen = batch.model.dynamics, [], []
    for num in batch.chunks(options.num_draws, most * options.num_candidates):
        lead = num * options.num_candidates
        z, _ = components.rsample(torch.Size([lead]))
        z_j = z.gather(1, visit[None, :, :, None].expand(lead, -1, -1, z.shape[-1]))
        z_0, _ = dynamics.rewind(z_j, visit, batch.data.times, batch.covariates)
        found = batch.log_likelihood(z_0.flatten(0, 1)).reshape(num, -1, batch.size)
        found = torch.where(torch.isnan(found), -torch.inf, found)
        candidates = z_0.reshape(num, -1, *z_0.shape[2:])  # (num, candidates * m, B, d)
        pick = best_candidate(found, valid.T.repeat(options.num_candidates, 1))
        kept.append(candidates.gather(1, pick[:, None, :, None].expand(-1, 1, -1, z.shape[-1])).squeeze(1))
        chosen.append(visit.gather(0, pick % most))
    z_0 = torch.cat(kept)
    return LatentDraws(z_0, z_0.new_zeros(z_0.shape[:-1]), torch.cat(chosen), method="best")


def best_candidate(log_likelihood: Tensor, valid: Tensor) -> Tensor:
    """Eq. 6.8: which of the candidates ``(S, m, B)`` explains best what is seen, among the valid ``(m, B)``.

    Example:
        >>> found = torch.tensor([[[-3.0], [-1.0], [5.0]]])
        >>> best_candidate(found, torch.tensor([[True], [True], [False]]))
        tensor([[1]])
    """
    # Below all that is finite: a candidate of zero likelihood comes before one that is none.
    masked = torch.where(valid, log_likelihood.clamp_min(torch.finfo(log_likelihood.dtype).min), -torch.inf)
    return masked.argmax(1)


def _guide(batch: SubjectBatch, options: DrawOptions) -> LatentDraws:
    z_0 = batch.guide_draws(options.num_draws)
    return LatentDraws(z_0, z_0.new_zeros(z_0.shape[:-1]), method="guide")


def _importance(batch: SubjectBatch, options: DrawOptions) -> LatentDraws:
    draws = LatentDraws(*_weighed(batch, options.proposals))
    return draws.resampled(options.num_draws) if options.resample else draws


def _weighed(batch: SubjectBatch, num: int) -> tuple[Tensor, Tensor]:
    z_0, log_weights = batch.proposals(num)
    lost = ~torch.isfinite(log_weights).any(0) & ~batch.empty
    if bool(lost.any()):
        raise argument_error(
            "guide",
            "draws of finite weight for each subject",
            f"none for {int(lost.sum())} of {batch.size} subjects among {num} draws",
            "check these data, or take more draws",
        )
    return z_0, log_weights


def _map(batch: SubjectBatch, options: DrawOptions) -> LatentDraws:
    potential = batch.potential()
    z_0, _ = _weighed(batch, max(options.proposals, options.num_starts))
    value = torch.cat([potential(part) for part in z_0.split([*batch.chunks(len(z_0))])])
    starts = torch.where(torch.isnan(value), torch.inf, value).topk(options.num_starts, 0, largest=False)
    found = minimise(
        potential,
        _taken(z_0, starts.indices),
        max_steps=options.max_steps,
        tolerance=options.tolerance,
    )
    best = _taken(found.position, found.value.argmin(0, keepdim=True))
    return LatentDraws(best, best.new_zeros(best.shape[:-1]), method="map")


def _hmc(batch: SubjectBatch, options: DrawOptions) -> LatentDraws:
    potential, chains = batch.potential(), options.num_chains
    proposals = LatentDraws(*_weighed(batch, options.proposals))
    proposals = LatentDraws(proposals.z_0, torch.where(batch.empty, 0.0, proposals.log_weights))
    spread = proposals.z_0.std(0)
    result = hamiltonian_chains(
        potential,
        proposals.resampled(chains).z_0,
        torch.where(spread > 0, spread, torch.ones_like(spread)),
        math.ceil(options.num_draws / chains),
        warmup=options.warmup,
        num_leapfrog=options.num_leapfrog,
        thin=options.thin,
    )
    # The last ones, so that each chain has as many as any other, or one less.
    z_0 = result.draws.flatten(0, 1)[-options.num_draws :]
    zero = z_0.new_zeros(z_0.shape[:-1])
    return LatentDraws(z_0, zero, None, result.acceptance, result.rhat, "hmc")


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index (n, B)`` of ``(S, B, k)``."""
    return values.gather(0, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


_METHODS: dict[str, Callable[[SubjectBatch, DrawOptions], LatentDraws]] = {
    "naive": _naive,
    "best": _best,
    "guide": _guide,
    "importance": _importance,
    "map": _map,
    "hmc": _hmc,
}
