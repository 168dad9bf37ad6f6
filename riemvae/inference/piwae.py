"""Two bounds at once: many draws for the model, several bounds of fewer draws for the guide."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from riemvae._recipe import recipe
from riemvae.inference.miwae import MIWAE
from riemvae.inference.weighted import group_bounds


@recipe
class PIWAE(MIWAE):
    """``MIWAE(M, K)`` for the guide's parameters, ``IWAE(M·K)`` of the same draws for the model's.

    More draws make the model's gradient better and the encoder's worse; here each has what suits it. The
    value is that of the importance-weighted bound of all ``M·K`` draws; the gradient is of two objectives, so
    it is the gradient of no single one.

    The guide's parameters are those of its module, and those that it declares by ``pyro.param`` or
    ``pyro.module``; all others that the loss depends on are the model's. A parameter of both, as with a
    VampPrior that shares the encoder, gets the guide's gradient, that of ``MIWAE``. It costs a second
    backward pass.

    Args:
        num_bounds: ``M``.
        num_samples: ``K``.
        gradient: ``"standard"``, ``"sticking"`` or ``"doubly"`` for the guide, as for :class:`IWAE`.

    Raises:
        ValueError: What :class:`IWAE` raises.

    Source: Rainforth, Kosiorek, Le, Maddison, Igl, Wood and Teh (2018), section 5.

    Example:
        >>> PIWAE(num_bounds=4, num_samples=8).num_samples
        8
    """

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss of all draws, with the gradients of the two bounds attached."""
        grouped = self._grouped_weights(model, guide, args, kwargs)
        tight = -grouped.scale * group_bounds(*grouped.as_one_group()).sum()
        if not tight.requires_grad:
            return tight
        mean = -grouped.scale * group_bounds(grouped.log_weights, grouped.failed).sum()
        leaves = _leaves([tight])
        of_guide = _guide_parameters(model, guide, grouped.draw.guide_trace)
        mine = [leaf for leaf in leaves if id(leaf) in of_guide]
        models = [leaf for leaf in leaves if id(leaf) not in of_guide]
        gradients = [
            *(torch.autograd.grad(mean, mine, retain_graph=True, allow_unused=True) if mine else ()),
            *(torch.autograd.grad(tight, models, allow_unused=True) if models else ()),
        ]
        loss: Tensor = _WithGradients.apply(tight.detach(), gradients, *mine, *models)  # type: ignore[no-untyped-call]
        return loss


class _WithGradients(torch.autograd.Function):
    """A number with given gradients in given leaves."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *outer: Tensor) -> Any:
        scaled = (None if g is None else outer[0] * g for g in ctx.gradients)
        return (None, None, *scaled)


def _leaves(tensors: Iterable[Any]) -> list[Tensor]:
    """The leaves that tensors depend on, in the order of the graph."""
    found: list[Tensor] = []
    stack, seen = [], set()
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            if tensor.is_leaf:
                found.append(tensor)
            stack.append(tensor.grad_fn)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found.append(leaf)
        stack.extend(parent for parent, _ in node.next_functions)
    return found


def _guide_parameters(model: Any, guide: Any, guide_trace: poutine.Trace) -> set[int]:
    """The ids of the guide's leaves: its module's, and those declared in its run that are no model's."""
    own = list(guide.parameters()) if isinstance(guide, nn.Module) else []
    models = {id(p) for p in model.parameters()} if isinstance(model, nn.Module) else set()
    declared = _leaves(s["value"] for s in guide_trace.nodes.values() if s["type"] == "param")
    return {id(p) for p in own} | {id(leaf) for leaf in declared if id(leaf) not in models}
