"""The evidence lower bound, and the objectives that weigh its KL part otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import Independent, Normal

from riemvae._checks import argument_error, check_count, check_positive
from riemvae._recipe import recipe
from riemvae.guides.log_joint import data_plate, in_batch, is_subsample
from riemvae.inference.scheduled import ScheduledObjective
from riemvae.inference.schedules import Schedule, as_schedule

_PARTICLES = "num_particles_vectorized"  # Pyro's name for the plate of vectorised particles


@recipe
class ELBO(ScheduledObjective, Trace_ELBO):
    r"""The evidence lower bound: Pyro's ``Trace_ELBO``, with a weight on its KL part, a capacity, free bits.

    .. math:: E_q[\log p(x|z)] - β E_q[\log q(z|x) - \log p(z)]

    The KL part is everything but the model's observed sites: for a flow or a Hamiltonian guide the densities
    of all its draws and its factors, and the priors of global latents. With ``capacity = C`` the second term
    is ``β |KL - C|``, with the KL part averaged over the minibatch (and over vectorised particles). With
    ``free_bits = λ`` each latent dimension's KL term, averaged over the minibatch, counts as ``max(λ,
    KL_j)``: nothing is gained by switching a dimension off. Where guide and prior factorise over dimensions
    there is one group a dimension, elsewhere (Hamiltonian guides, flows) one group for the whole latent.

    Only ``beta=1`` without capacity and free bits is a bound on ``log p(x)``. Any other setting is an
    objective: report a likelihood by :func:`riemvae.log_likelihood`, not this loss.

    ``beta`` and ``capacity`` may be schedules, such as ``Linear(0.0, 1.0, epochs=20)`` for a warm-up. ``fit``
    moves them; with ``SVI`` call ``objective.begin_epoch(epoch)``.

    Args:
        free_bits: ``λ`` in nats, or None.
        num_particles: Draws a datum whose bounds are averaged.
        vectorize_particles: Draw them at once, in a plate of their own.
        beta: ``β >= 0``, a number or a schedule. (``γ`` where there is a capacity.)
        capacity: ``C >= 0`` in nats a datum, a number or a schedule, or None.

    Raises:
        ValueError: Numbers out of range, free bits beside a capacity; when used with free bits or a capacity,
            a guide whose draws are not reparametrised.

    Source: Kingma and Welling (2014); ``β``: Higgins et al. (2017), eq. 4; capacity: Burgess et al. (2018),
    eq. 8; free bits: Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016), eq. 15.

    Example:
        >>> from riemvae.inference.schedules import Linear
        >>> objective = ELBO(beta=Linear(0.0, 1.0, epochs=20))
        >>> objective.begin_epoch(5)
        >>> objective.scheduled_values
        {'beta': 0.25}
    """

    def __init__(
        self,
        *,
        free_bits: float | None = None,
        num_particles: int = 1,
        vectorize_particles: bool = False,
        beta: float | Schedule = 1.0,
        capacity: float | Schedule | None = None,
    ) -> None:
        ScheduledObjective.__init__(self)
        Trace_ELBO.__init__(
            self,
            num_particles=check_count("num_particles", num_particles),
            vectorize_particles=vectorize_particles,
        )
        if free_bits is not None:
            check_positive("free_bits", free_bits)
            if capacity is not None:
                raise argument_error(
                    "capacity", "None beside free_bits, which hold the KL part up too", capacity
                )
        self.free_bits = free_bits
        self.beta, self.capacity = beta, capacity
        self._schedules["beta"] = as_schedule("beta", beta, 0.0, math.inf)
        if capacity is not None:
            self._schedules["capacity"] = as_schedule("capacity", capacity, 0.0, math.inf)

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[poutine.Trace, poutine.Trace]:
        traces: tuple[poutine.Trace, poutine.Trace] = super()._get_trace(model, guide, args, kwargs)
        beta = self._now("beta")
        if beta != 1.0 and self.capacity is None:
            _scale_kl(beta, *traces)
        return traces

    def _differentiable_loss_particle(
        self, model_trace: poutine.Trace, guide_trace: poutine.Trace
    ) -> tuple[Any, Any]:
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        extra = None
        if self.free_bits is not None:
            extra = self._free_bits_excess(self.free_bits, model_trace, guide_trace)
        elif self.capacity is not None:
            extra = self._capacity_excess(model_trace, guide_trace)
        if extra is not None:
            loss, surrogate = loss + float(extra.detach()), surrogate + extra
        return loss, surrogate

    @property
    def _is_plain(self) -> bool:
        """Whether the loss is a sum of the traces' terms."""
        return self.free_bits is None and self.capacity is None

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss without its gradient."""
        if self._is_plain:
            return float(super().loss(model, guide, *args, **kwargs))
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The loss; its gradient is added to the parameters."""
        if self._is_plain:
            return float(super().loss_and_grads(model, guide, *args, **kwargs))
        return backward_loss(self.differentiable_loss(model, guide, *args, **kwargs))

    def _free_bits_excess(
        self, free_bits: float, model_trace: poutine.Trace, guide_trace: poutine.Trace
    ) -> Tensor:
        """``scale · B · Σ_j (max(λ, KL_j) - KL_j)`` with ``KL_j`` averaged over the minibatch."""
        kl = _dimension_kl(model_trace, guide_trace)
        sites = _latents(model_trace, guide_trace)
        scale = float(sites[0]["scale"])
        data = math.prod(f.size for f in sites[0]["cond_indep_stack"] if f.vectorized)
        return scale * data * (kl.clamp_min(free_bits) - kl).sum()

    def _capacity_excess(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
        """``n (β |KL - C| - KL)`` with ``KL`` the mean over the ``n`` data that the loss is a sum over."""
        first = _latents(model_trace, guide_trace)[0]
        plate = data_plate(model_trace)
        frames = [f for f in first["cond_indep_stack"] if f.name in (plate, _PARTICLES)]
        n = float(first["scale"]) * math.prod(f.size for f in frames)
        total: Any = 0.0
        for site in _kl_sites(model_trace, guide_trace, plus="guide"):
            total = total + site["log_prob_sum"]
        for site in _kl_sites(model_trace, guide_trace, plus="model"):
            total = total - site["log_prob_sum"]
        kl = torch.as_tensor(total) / n
        return n * (self._now("beta") * (kl - self._now("capacity")).abs() - kl)


def _kl_sites(model_trace: poutine.Trace, guide_trace: poutine.Trace, plus: str) -> list[Any]:
    """The sites of the KL part: all of the guide's, and the model's that are not observed."""
    nodes = (guide_trace if plus == "guide" else model_trace).nodes.values()
    return [
        s
        for s in nodes
        if s["type"] == "sample" and (plus == "guide" or not s["is_observed"])  # type: ignore[typeddict-item]
    ]


def _scale_kl(beta: float, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Multiplies the KL part of a pair of traces by ``beta``; a score's own factor is not scaled."""
    for plus in ("guide", "model"):
        for site in _kl_sites(model_trace, guide_trace, plus):
            site["scale"] = site["scale"] * beta
            site["log_prob"] = site["log_prob"] * beta
            site["log_prob_sum"] = site["log_prob_sum"] * beta
            if plus == "guide":
                site["score_parts"] = site["score_parts"].scale_and_mask(beta)


def _latents(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> list[Any]:
    """The guide's sites inside the data plate."""
    plate = data_plate(model_trace)
    sites: list[Any] = list(guide_trace.nodes.values())
    latents = [s for s in sites if s["type"] == "sample" and not is_subsample(s) and in_batch(s, plate)]
    for site in latents:
        if not site["fn"].has_rsample:
            raise argument_error(
                "guide",
                "reparametrised draws (has_rsample), for free bits or a capacity",
                f"{site['name']!r} without",
                "use ELBO(beta=...) alone",
            )
    return latents


def _factorised(fn: Any) -> Normal | None:
    while isinstance(fn, (Independent, ExpandedDistribution)):
        fn = fn.base_dist
    return fn if isinstance(fn, Normal) else None


def _dimension_kl(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
    """A one-draw estimate of the mean KL term: ``(d,)`` where both sides factorise, else ``(1,)``."""
    latent = _latents(model_trace, guide_trace)
    sites: dict[str, Any] = dict(model_trace.nodes)
    if len(latent) == 1:
        site = latent[0]
        q, p = _factorised(site["fn"]), _factorised(sites[site["name"]]["fn"])
        if q is not None and p is not None and site["mask"] is None:
            z = site["value"]
            return (q.log_prob(z) - p.log_prob(z)).flatten(0, -2).mean(0)
    total: Any = 0.0
    for site in latent:
        total = total + site["fn"].log_prob(site["value"])
        if site["name"] in sites:
            model_site = sites[site["name"]]
            total = total - model_site["fn"].log_prob(model_site["value"])
    return torch.as_tensor(total).mean().reshape(1)


def backward_loss(loss: Tensor) -> float:
    """Adds the gradient of ``loss`` to the parameters; its value."""
    if loss.requires_grad:
        loss.backward()
    return float(loss.detach())
