"""What all flows of riemvae share: the base, the check of the context, the start near the identity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, Transform

from riemvae._checks import argument_error, check_choice, check_count, check_last_dim
from riemvae.flows._zuko import Flow, LazyDistribution, LazyTransform

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}

# What is left of a network's last layer when a flow starts near the identity.
SHRINKAGE = 1e-2


class StandardBase(LazyDistribution):  # type: ignore[misc]
    """``N(0, I)`` whatever the context, which evaluates any value, where a flow overflows too.

    Args:
        features: ``d``.
    """

    zero: Tensor
    one: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(features), persistent=False)
        self.register_buffer("one", torch.ones(features), persistent=False)

    def forward(self, context: Tensor | None = None) -> Distribution:
        """``N(0, I)``."""
        return Independent(Normal(self.zero, self.one, validate_args=False), 1, validate_args=False)


class VectorFlow(Flow):  # type: ignore[misc]
    """A zuko ``Flow`` over ``ℝᵈ`` with base ``N(0, I)``; all flows of riemvae are of this kind.

    ``flow(context)`` is zuko's ``NormalizingFlow``: its ``transform`` maps data to the base, its inverse
    samples.

    Args:
        features: ``d``.
        context: The number of context features, 0 without one.
        transform: The lazy transform from data to the base, or a sequence of these.
    """

    def __init__(
        self, features: int, context: int, transform: LazyTransform | Sequence[LazyTransform]
    ) -> None:
        super().__init__(transform, StandardBase(features))
        self.features, self.context = features, context

    def forward(self, context: Tensor | None = None) -> Any:
        """The flow given a context ``(..., c)``, whose leading dimensions become the batch shape.

        Raises:
            ValueError: A context for a flow without one, none for a conditional flow, another number of
                features.
        """
        if context is None and self.context:
            raise argument_error(
                "context",
                f"a tensor (..., {self.context}) for a conditional flow",
                None,
                "pass one, or build the flow with context=0",
            )
        if context is not None and not self.context:
            raise argument_error(
                "context", "none for an unconditional flow", context, "build the flow with context=c"
            )
        if context is not None:
            check_last_dim("context", context, self.context)
        return super().forward(context)


def check_sizes(features: int, context: int, transforms: int) -> None:
    """Refuses sizes of a flow that are no counts."""
    check_count("features", features)
    check_count("context", context, minimum=0)
    check_count("transforms", transforms)


def stacked(
    layer: Callable[..., LazyTransform],
    turn: Callable[[int], dict[str, Any]],
    features: int,
    context: int,
    transforms: int,
    hidden: Sequence[int],
    activation: str,
    **univariate: Any,
) -> list[LazyTransform]:
    """``transforms`` layers of zuko near the identity; ``turn(k)`` is what the ``k``-th does differently."""
    check_sizes(features, context, transforms)
    options = {**network_options(hidden, activation), **univariate}
    return [near_identity(layer(features, context, **turn(k), **options)) for k in range(transforms)]


def network_options(hidden: Sequence[int], activation: str) -> dict[str, Any]:
    """The arguments of zuko's networks, checked."""
    widths = [check_count("hidden", width) for width in hidden]
    return {
        "hidden_features": widths,
        "activation": ACTIVATIONS[check_choice("activation", activation, list(ACTIVATIONS))],
    }


@torch.no_grad()
def near_identity(transform: Any) -> Any:
    """Shrinks what decides a zuko transform's parameters, so that it starts near the identity.

    Zero is the identity of the affine and of the spline transform.
    """
    hyper = getattr(transform, "hyper", None)
    # In one dimension without a context there is no network, but free parameters.
    tensors = transform.phi if hyper is None else list(hyper.children())[-1].parameters()
    for tensor in tensors:
        tensor.mul_(SHRINKAGE)
    return transform


def summed_log_det(transform: Transform, terms: Tensor, z: Tensor) -> Tensor:
    """A transform's log-determinant, or one of each coordinate, as one per datum of ``z (..., d)``.

    Terms that all data share, or all coordinates, may come without these dimensions.
    """
    if transform.domain.event_dim > 0:
        return terms.expand(z.shape[:-1])
    return terms.expand(z.shape).sum(-1)


def moved(transform: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """``f(z)`` and ``log|det ∂f/∂z|`` per datum, in one pass where the transform has both."""
    both = getattr(transform, "call_and_ladj", None)
    if both is None:
        target = transform(z)
        return target, summed_log_det(transform, transform.log_abs_det_jacobian(z, target), z)
    target, terms = both(z)
    return target, summed_log_det(transform, terms, z)


def sampling_transform(flow: Any, context: Tensor | None = None) -> Transform:
    """The direction of a flow in which it samples, as a transform of torch.

    Args:
        flow: A zuko ``Flow``: the way from its base to the data. A zuko lazy transform, a Pyro conditional
            transform or a transform of torch: itself.
        context: ``(..., c)`` for the conditional ones, or None.

    Returns:
        A transform of torch; zuko's have ``call_and_ladj``.

    Raises:
        ValueError: Something else, or a context that does not fit the flow.

    Example:
        >>> from riemvae.flows import IAF
        >>> sampling_transform(IAF(2))(torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """
    if isinstance(flow, Flow):
        return flow(context).transform.inv  # type: ignore[no-any-return]
    if isinstance(flow, LazyTransform):
        return flow(context)  # type: ignore[no-any-return]
    if hasattr(flow, "condition"):
        return flow.condition(context)  # type: ignore[no-any-return]
    if isinstance(flow, Transform):
        return flow
    raise argument_error("flow", "a zuko Flow or lazy transform, or a transform of torch or Pyro", flow)
