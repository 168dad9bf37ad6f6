"""Variational bounds, as objectives of Pyro: they work in ``SVI`` and in ``fit``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.infer import Trace_ELBO
from pyro.infer.elbo import ELBO as PyroELBO
from torch import Tensor
from torch.distributions import Independent, Normal

from riemvae._checks import argument_error, check_count, check_positive
from riemvae._recipe import recipe
from riemvae.guides.log_joint import data_plate, in_batch, is_subsample
from riemvae.inference.weights import draw_weights, log_mean_exp


@recipe
class ELBO(Trace_ELBO):
    """The evidence lower bound ``E_q[log p(x, z) - log q(z|x)]``: Pyro's ``Trace_ELBO``, with free bits.

    With ``free_bits = λ`` each latent dimension's KL term, averaged over the minibatch, counts as ``max(λ,
    KL_j)``: nothing is gained by switching a dimension off. Where guide and prior factorise over dimensions
    there is one group a dimension, elsewhere (Hamiltonian guides, flows) one group for the whole latent. The
    result is then no bound but an objective.

    Args:
        free_bits: ``λ`` in nats, or None.
        num_particles: Draws a datum whose bounds are averaged.
        vectorize_particles: Draw them at once, in a plate of their own.

    Source: Kingma and Welling (2014); free bits: Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling
    (2016), eq. 15.

    Example:
        >>> ELBO(num_particles=2).num_particles
        2
    """

    def __init__(
        self, *, free_bits: float | None = None, num_particles: int = 1, vectorize_particles: bool = False
    ) -> None:
        super().__init__(
            num_particles=check_count("num_particles", num_particles), vectorize_particles=vectorize_particles
        )
        if free_bits is not None:
            check_positive("free_bits", free_bits)
        self.free_bits = free_bits

    def _differentiable_loss_particle(
        self, model_trace: poutine.Trace, guide_trace: poutine.Trace
    ) -> tuple[Any, Any]:
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        if self.free_bits is not None:
            extra = self._free_bits_excess(self.free_bits, model_trace, guide_trace)
            loss, surrogate = loss + float(extra.detach()), surrogate + extra
        return loss, surrogate

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss without its gradient."""
        if self.free_bits is None:
            return float(super().loss(model, guide, *args, **kwargs))
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The loss; its gradient is added to the parameters."""
        if self.free_bits is None:
            return float(super().loss_and_grads(model, guide, *args, **kwargs))
        return _loss_and_grads(self, model, guide, args, kwargs)

    def _free_bits_excess(
        self, free_bits: float, model_trace: poutine.Trace, guide_trace: poutine.Trace
    ) -> Tensor:
        """``scale · B · Σ_j (max(λ, KL_j) - KL_j)`` with ``KL_j`` averaged over the minibatch."""
        kl = _dimension_kl(model_trace, guide_trace)
        sites = _latents(model_trace, guide_trace)
        scale = float(sites[0]["scale"])
        data = math.prod(f.size for f in sites[0]["cond_indep_stack"] if f.vectorized)
        return scale * data * (kl.clamp_min(free_bits) - kl).sum()


def _latents(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> list[Any]:
    """The guide's sites inside the data plate."""
    plate = data_plate(model_trace)
    sites: list[Any] = list(guide_trace.nodes.values())
    return [s for s in sites if s["type"] == "sample" and not is_subsample(s) and in_batch(s, plate)]


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


def _loss_and_grads(
    objective: Any,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> float:
    loss = objective.differentiable_loss(model, guide, *args, **kwargs)
    if loss.requires_grad:
        loss.backward()
    return float(loss.detach())


@recipe
class IWAE(PyroELBO):
    """The importance-weighted bound ``Σ_b log mean_s w_sb``, itself the loss's negative.

    Weights are per datum, with all data in one plate at dim -1; the draws must be reparametrised. A draw
    whose integration diverged has weight zero; a datum all of whose draws did is left out.

    Args:
        num_samples: ``S`` draws a datum; 1 is the ELBO.

    Raises:
        ValueError: When used: a guide with draws that are not reparametrised, or with global latents.

    Source: Burda, Grosse and Salakhutdinov (2016).

    Example:
        >>> IWAE(num_samples=5).num_samples
        5
    """

    def __init__(self, num_samples: int = 10) -> None:
        super().__init__(num_particles=1)
        self.num_samples = check_count("num_samples", num_samples)
        self.num_left_out = 0  # data of the last call all of whose draws failed

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss, ``-Σ_b log mean_s w_sb`` times the plate's scale, with its gradient attached."""
        draw = draw_weights(model, guide, args, kwargs, self.num_samples)
        self._refuse(draw.guide_trace, draw.plate)
        log_weights = draw.log_weights
        self.num_left_out = 0
        failed = getattr(getattr(guide, "info", None), "diverged", None)
        if failed is not None and failed.numel() == log_weights.numel() and bool(failed.any()):
            failed = failed.reshape(log_weights.shape)
            kept = ~failed.all(0)
            self.num_left_out = int((~kept).sum())
            log_weights = torch.where(failed, -math.inf, log_weights)[:, kept]
        return -draw.scale * log_mean_exp(log_weights).sum()

    @staticmethod
    def _refuse(trace: poutine.Trace, plate: str | None) -> None:
        sites: dict[str, Any] = dict(trace.nodes)
        for name, site in sites.items():
            if site["type"] != "sample" or is_subsample(site) or site["is_observed"]:
                continue
            if not in_batch(site, plate):
                raise argument_error(
                    "guide",
                    "latents inside the data plate",
                    f"the global latent {name!r}",
                    "condition the model on it, or use ELBO",
                )
            if not site["fn"].has_rsample:
                raise argument_error(
                    "guide", "reparametrised draws (has_rsample)", f"{name!r} without", "use ELBO"
                )

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss without its gradient."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The loss; its gradient is added to the parameters."""
        return _loss_and_grads(self, model, guide, args, kwargs)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return (
            pyro.infer.trace_elbo.get_importance_trace(  # pragma: no cover - Pyro's base asks for it to exist
                "flat", self.max_plate_nesting, model, guide, args, kwargs
            )
        )
