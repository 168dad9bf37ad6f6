"""What the importance-weighted objectives share: draws, failures, and three estimators of the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.infer.elbo import ELBO as PyroELBO
from torch import Tensor

from riemvae._checks import argument_error, check_choice
from riemvae.guides.log_joint import in_batch, is_subsample
from riemvae.inference.elbo import backward_loss
from riemvae.inference.weights import WeightedDraw, draw_weights, site_terms

GRADIENTS = ("standard", "sticking", "doubly")


class GroupedWeights(NamedTuple):
    """Weights of one draw, ready to be reduced.

    Attributes:
        log_weights: ``(M, K, B)``: ``M`` groups of ``K`` draws; ``-inf`` where a draw failed. Data all of
            whose draws failed are left out.
        failed: Which draws failed, of the same shape; None where none did.
        scale: The plate's scale.
        draw: What they came from.
    """

    log_weights: Tensor
    failed: Tensor | None
    scale: float
    draw: WeightedDraw

    def as_one_group(self) -> tuple[Tensor, Tensor | None]:
        """Weights and failures of one group of all draws, ``(1, M·K, B)``."""
        failed = None if self.failed is None else self.failed.flatten(0, 1)[None]
        return self.log_weights.flatten(0, 1)[None], failed


class WeightedObjective(PyroELBO):
    """An objective that reduces ``(M, K, B)`` importance weights to a number a datum.

    A subclass gives :meth:`_bound`; for another loss than its sum also :meth:`differentiable_loss`.

    The gradient of ``F(log w)`` has a coefficient ``c_s = ∂F/∂log w_s`` for each draw, a normalised weight
    ``ŵ_s`` for the importance-weighted bound. The three estimators of its gradient treat alike whatever
    reaches the parameters otherwise than through the guide's *roots*, the draws whose distribution depends on
    no earlier draw: ``z``, or the ``z_0`` of a flow or a Hamiltonian guide. These later draws and maps are
    smooth functions of the roots, of noise with a fixed distribution, and of parameters, so the model may be
    said to end at the roots. At the roots,

    - ``"standard"`` takes the total derivative, ``Σ c_s ∇ log w_s``;
    - ``"sticking"`` drops the derivative of ``log q`` at a fixed draw, its score;
    - ``"doubly"`` drops it too and multiplies what comes through the draw by a further ``ŵ_s``, which makes
      up for the score in the mean: ``E Σ_s ŵ_s² ∂log w_s/∂z_s ∂z_s/∂φ`` is the gradient of the bound.

    The score is dropped by subtracting ``log q(sg z)`` and adding its value, which serves any density.

    Attributes:
        gradient: The estimator.
        num_left_out: Data of the last call all of whose draws failed.
    """

    def __init__(self, gradient: str = "standard") -> None:
        super().__init__(num_particles=1)
        self.gradient = check_choice("gradient", gradient, GRADIENTS)
        self.num_left_out = 0

    def _bound(self, log_weights: Tensor, failed: Tensor | None) -> Tensor:
        """The objective for each datum, ``(M, K, B) -> (B,)``."""
        raise NotImplementedError

    @property
    def _groups(self) -> tuple[int, int]:
        """``M`` and ``K``."""
        raise NotImplementedError

    def _path_factor(self, log_weights: Tensor, failed: Tensor | None) -> Tensor:
        """What the doubly reparametrised gradient multiplies into a draw's path, ``(M, K, B)``: ``ŵ``."""
        return group_weights(log_weights)

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss, minus the sum over data times the plate's scale, with its gradient attached."""
        grouped = self._grouped_weights(model, guide, args, kwargs)
        return -grouped.scale * self._bound(grouped.log_weights, grouped.failed).sum()

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss without its gradient."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The loss; its gradient is added to the parameters."""
        return backward_loss(self.differentiable_loss(model, guide, *args, **kwargs))

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("weights are drawn by draw_weights, not by Pyro's traces of one particle")

    # -- weights -------------------------------------------------------------------------------------------

    def _grouped_weights(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> GroupedWeights:
        num_groups, group_size = self._groups
        draw = draw_weights(model, guide, args, kwargs, num_groups * group_size)
        _refuse(draw)
        log_weights = draw.log_weights
        roots = []
        if self.gradient != "standard" and torch.is_grad_enabled():
            roots = _roots(draw)
            for root in roots:
                # Its value is zero; the gradient that reaches parameters at a fixed draw is taken away. The
                # guide's density stands in the weight with a minus.
                log_weights = log_weights + (root.score - root.score.detach())
        shape = (num_groups, group_size)
        failed = _failed(guide, log_weights)
        kept = None
        if failed is not None:
            log_weights = torch.where(failed, -math.inf, log_weights)
            kept = ~failed.all(0)
            failed = failed.unflatten(0, shape)
        self.num_left_out = 0 if kept is None else int((~kept).sum())
        grouped = log_weights.unflatten(0, shape)
        if self.gradient == "doubly":
            factor = self._path_factor(grouped.detach(), failed).flatten(0, 1)
            for root in roots:
                root.multiply_path(factor)
        if kept is not None and failed is not None:
            grouped, failed = grouped[..., kept], failed[..., kept]
        return GroupedWeights(grouped, failed, draw.scale, draw)


def _failed(guide: Any, log_weights: Tensor) -> Tensor | None:
    """Which draws the guide reports as diverged, ``(S, B)``; None where it reports none."""
    failed = getattr(getattr(guide, "info", None), "diverged", None)
    if failed is None or failed.numel() != log_weights.numel() or not bool(failed.any()):
        return None
    return failed.reshape(log_weights.shape)  # type: ignore[no-any-return]


class _Root(NamedTuple):
    """A draw of the guide whose distribution depends on no earlier draw.

    Attributes:
        value: The draw, with its graph.
        event_dim: Dimensions of its event.
        score: ``log q`` at the fixed draw, ``(S or 1, B or 1)``, with the parameters' graph.
    """

    value: Tensor
    event_dim: int
    score: Tensor

    def multiply_path(self, factor: Tensor) -> None:
        """Multiplies the gradient that goes through the draw by ``factor (S, B)``."""
        inner = self.value.dim() - self.event_dim - 2
        shape = (factor.shape[0], *[1] * inner, factor.shape[1], *[1] * self.event_dim)
        factor = factor.reshape(shape)
        self.value.register_hook(lambda gradient: gradient * factor)


def _roots(draw: WeightedDraw) -> list[_Root]:
    """The reparametrised draws of a guide that come from no other, where their density has parameters."""
    roots = []
    earlier: set[Any] = set()
    num_samples = draw.log_weights.shape[0]
    sites: dict[str, Any] = dict(draw.guide_trace.nodes)
    for site in sites.values():
        if site["type"] != "sample" or is_subsample(site) or site["is_observed"]:
            continue
        value = site["value"]
        if not isinstance(value, Tensor) or not value.requires_grad:
            continue
        # At the fixed value: the density's own dependence on parameters, and on the draws before this one.
        score = site_terms({**site, "value": value.detach()}, num_samples, draw.nesting)
        if score.requires_grad and not _reaches(score, earlier):
            roots.append(_Root(value, len(site["fn"].event_shape), score))
        earlier.add(value.grad_fn)
    return roots


def _reaches(tensor: Tensor, nodes: set[Any]) -> bool:
    """Whether the graph of ``tensor`` holds one of ``nodes``."""
    stack, seen = [tensor.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node in nodes:
            return True
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions)
    return False


def _refuse(draw: WeightedDraw) -> None:
    sites: dict[str, Any] = dict(draw.guide_trace.nodes)
    for name, site in sites.items():
        if site["type"] != "sample" or is_subsample(site) or site["is_observed"]:
            continue
        if not in_batch(site, draw.plate):
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


# -- reductions of (M, K, B) -------------------------------------------------------------------------------


def group_weights(log_weights: Tensor) -> Tensor:
    """``ŵ``, normalised in each group; zero in a group all of whose draws failed."""
    return torch.nan_to_num(log_weights.softmax(1), nan=0.0)


def group_bounds(log_weights: Tensor, failed: Tensor | None) -> Tensor:
    """``1/M Σ_m log 1/K Σ_k w_mk`` for each datum, over the groups that did not fail altogether."""
    if failed is None:
        return (log_weights.logsumexp(1) - math.log(log_weights.shape[1])).mean(0)
    lost = failed.all(1)
    safe = torch.where(lost.unsqueeze(1), 0.0, log_weights)
    bounds = safe.logsumexp(1) - math.log(log_weights.shape[1])
    return torch.where(lost, 0.0, bounds).sum(0) / (~lost).sum(0)


def mean_log_weight(log_weights: Tensor, failed: Tensor | None) -> Tensor:
    """The mean of ``log w`` over the draws that did not fail, ``(B,)``."""
    alone = log_weights.flatten(0, 1).unsqueeze(1)
    return group_bounds(alone, None if failed is None else failed.flatten(0, 1).unsqueeze(1))
