"""Marginal log-likelihoods by importance sampling, with what tells whether to trust them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from riemvae._checks import check_count
from riemvae.guides.evaluation import evaluating
from riemvae.inference.batches import batch_call, batch_length, make_batches, map_batch
from riemvae.inference.pareto import pareto_shape, tail_size
from riemvae.inference.weights import DEFAULT_CHUNK, global_draw, placement, weight_chunks

# An estimate of a datum with a larger shape is not to be trusted (Vehtari et al.).
KHAT_LIMIT = 0.7


@dataclass(frozen=True)
class LogLikelihood:
    """Estimates of ``log p(x_b)`` in nats, each ``(B,)``.

    Attributes:
        log_prob: ``log p̂(x_b) = log mean_s w_sb``: consistent, too low in the mean.
        mcse: Its Monte Carlo standard error, by the delta method.
        ess: Kish's effective sample size of the weights.
        khat: The Pareto shape of the weights' tail; above 0.7 neither the estimate nor its error is to be
            trusted. NaN where too few samples tell.
        num_samples: ``S``.
        num_diverged: Draws of weight zero because their integration diverged or did not converge, per datum.
        num_dims: Numbers in one datum, for bits a dimension.
    """

    log_prob: Tensor
    mcse: Tensor
    ess: Tensor
    khat: Tensor
    num_samples: int
    num_diverged: Tensor
    num_dims: int

    @property
    def mean(self) -> float:
        """The mean over data."""
        return float(self.log_prob.mean())

    @property
    def stderr(self) -> float:
        """The standard error of the mean over data (how it would vary with other data of this kind)."""
        n = len(self.log_prob)
        return float(self.log_prob.std() / math.sqrt(n)) if n > 1 else math.nan

    @property
    def bits_per_dim(self) -> float:
        """``-mean / (D log 2)``."""
        return -self.mean / (self.num_dims * math.log(2.0))

    def __len__(self) -> int:
        return len(self.log_prob)

    def summary(self) -> dict[str, float]:
        """The set in numbers: mean, its errors over data and by Monte Carlo, ESS, share of ``k̂ > 0.7``."""
        finite = self.khat[~torch.isnan(self.khat)]
        return {
            "mean": self.mean,
            "stderr": self.stderr,
            "mcse": float(self.mcse.square().sum().sqrt() / len(self)),
            "median_ess": float(self.ess.median()),
            "share_khat_above_0.7": float((finite > KHAT_LIMIT).float().mean()) if len(finite) else math.nan,
            "diverged_share": float(self.num_diverged.sum() / (self.num_samples * len(self))),
            "num_data": float(len(self)),
            "num_samples": float(self.num_samples),
        }

    def __repr__(self) -> str:
        s = self.summary()
        share = s["share_khat_above_0.7"]
        khat = "too few samples for k̂" if math.isnan(share) else f"k̂>0.7: {100 * share:.0f} %"
        return (
            f"LogLikelihood(mean={s['mean']:.3f} ± {s['stderr']:.3f} nats over {len(self)} data, "
            f"mcse={s['mcse']:.3f}, S={self.num_samples}, {khat})"
        )


class _Accumulator:
    """Reduces weights as they come: sums for the mean and its error, and the largest few for the tail."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.keep = tail_size(num_samples) + 1
        self.first: Tensor | None = None
        self.second: Tensor | None = None
        self.largest: Tensor | None = None
        self.lost: Tensor | None = None

    def add(self, log_weights: Tensor) -> None:
        log_weights = log_weights.double()
        first, second = torch.logsumexp(log_weights, 0), torch.logsumexp(2.0 * log_weights, 0)
        lost = torch.isneginf(log_weights).sum(0)
        if self.first is None or self.second is None or self.largest is None or self.lost is None:
            self.first, self.second, self.lost, pool = first, second, lost, log_weights
        else:
            self.first = torch.logaddexp(self.first, first)
            self.second = torch.logaddexp(self.second, second)
            self.lost = self.lost + lost
            pool = torch.cat([self.largest, log_weights])
        self.largest = pool.topk(min(self.keep, len(pool)), 0).values

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if self.first is None or self.second is None or self.largest is None or self.lost is None:
            raise RuntimeError("no weights were added")
        s = self.num_samples
        ess = torch.exp(2.0 * self.first - self.second)
        # Var(mean w) / mean(w)², with mean(w²)/mean(w)² = S/ESS.
        variance = (s / ess - 1.0).clamp_min(0.0) / max(s - 1, 1)
        mcse = variance.sqrt() if s > 1 else torch.full_like(ess, math.nan)
        return (
            self.first - math.log(s),
            mcse,
            torch.nan_to_num(ess, nan=0.0),
            pareto_shape(self.largest),
            self.lost,
        )


def log_likelihood(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    num_samples: int = 100,
    chunk_size: int | None = None,
    seed: int | None = None,
    *,
    tolerance: float = 1e-6,
) -> LogLikelihood:
    """``log p̂(x) = log mean_s w_s`` for each datum by importance sampling from the guide, in bounded memory.

    Data and samples go through the networks together, ``chunk_size`` pairs at a time; a datum is encoded once
    a chunk of samples. Beside the estimate come its Monte Carlo standard error, the effective sample size and
    the Pareto ``k̂``; a warning names what to do where ``k̂ > 0.7``.

    Args:
        model: The model itself.
        guide: Its guide.
        data: Tensor, array, tuple or mapping of these, data set or loader.
        num_samples: ``S``.
        chunk_size: Data times samples at once; None is about 2,000. The result does not depend on it but for
            its draws.
        seed: Of the draws; the caller's generator is left as it was. None draws from it.
        tolerance: Residual to which fixed points of Riemannian guides are iterated.

    Returns:
        A :class:`LogLikelihood`.

    Raises:
        ValueError: Bad data, a relaxed score in place of a likelihood, a guide whose metric is not frozen.

    Source: Burda et al. (2016); Vehtari et al. (2024) for ``k̂``; thesis, eq. 1.2 and table 1.1.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from riemvae.guides import GaussianGuide
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> guide = GaussianGuide(model, lambda x: (x / 2, torch.ones_like(x)))
        >>> ll = log_likelihood(model, guide, torch.zeros(3, 2), num_samples=1000, seed=0)
        >>> bool(((ll.log_prob + 2.531).abs() < 4 * ll.mcse).all())
        True
    """
    check_count("num_samples", num_samples)
    pairs = DEFAULT_CHUNK if chunk_size is None else check_count("chunk_size", chunk_size)
    results = []
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        size = None if isinstance(data, DataLoader) else max(1, pairs // num_samples)
        device, dtype = placement(model, guide)
        batches = make_batches("data", data, size, shuffle=False, dtype=dtype)
        shared: dict[str, Tensor] | None = None
        num_dims = 0
        for batch in batches:
            if device is not None:
                batch = map_batch(lambda a: a.to(device) if isinstance(a, Tensor) else a, batch)
            args, kwargs = batch_call(batch)
            size = batch_length(batch)
            first = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            num_dims = math.prod(first.shape[1:])
            accumulator = _Accumulator(num_samples)
            with torch.no_grad(), evaluating(tolerance):
                if shared is None:
                    shared = global_draw(model, guide, args, kwargs)
                for part in weight_chunks(model, guide, args, kwargs, size, num_samples, pairs, shared):
                    accumulator.add(part)
            results.append(accumulator.result())
    log_prob, mcse, ess, khat, lost = (torch.cat(parts) for parts in zip(*results))
    bad = int((khat > KHAT_LIMIT).sum())
    if bad:
        warnings.warn(
            f"k̂ > {KHAT_LIMIT} for {bad} of {len(khat)} data: their estimates are too low by an unknown "
            "amount and their errors too small; take more samples or a guide closer to the posterior",
            stacklevel=2,
        )
    return LogLikelihood(log_prob, mcse, ess, khat, num_samples, lost, num_dims)
