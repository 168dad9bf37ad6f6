"""Potentials: functions ``z (..., d) -> U (...)``, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class DifferentiablePotential(Protocol):
    """A potential that knows its gradient: ``value_and_gradient(z) -> (U (...), ∇U (..., d))``.

    Under enabled gradients both must be differentiable in what ``U`` depends on.
    """

    def __call__(self, z: Tensor) -> Tensor: ...

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class GradientPotential(DifferentiablePotential, Protocol):
    """A potential that can also give its gradient alone, for less: ``gradient(z) -> ∇U (..., d)``."""

    def gradient(self, z: Tensor) -> Tensor: ...


Potential = Callable[[Tensor], Tensor]


def value_and_gradient(potential: Potential, z: Tensor) -> tuple[Tensor, Tensor]:
    """``(U(z), ∇U(z))`` of shapes ``(...)`` and ``(..., d)``.

    A potential with a method ``value_and_gradient`` is asked; any other is differentiated. Where gradients
    are enabled, the result can be differentiated again; under ``no_grad`` (or ``inference_mode``) the graph
    is dropped.

    Example:
        >>> value, gradient = value_and_gradient(lambda z: 0.5 * (z**2).sum(-1), torch.tensor([3.0, 4.0]))
        >>> value.detach(), gradient.detach()
        (tensor(12.5000), tensor([3., 4.]))
    """
    if isinstance(potential, DifferentiablePotential):
        return potential.value_and_gradient(z)
    create_graph = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        # An alias: the derivative is the partial one even where U's other inputs were computed from z.
        alias = z.clone() if create_graph and z.requires_grad else z.detach().clone().requires_grad_()
        value = potential(alias)
        if not value.requires_grad:  # a constant potential
            return value, torch.zeros_like(z)
        (gradient,) = torch.autograd.grad(
            value, alias, torch.ones_like(value), create_graph=create_graph, allow_unused=True
        )
    gradient = torch.zeros_like(z) if gradient is None else gradient
    return (value, gradient) if create_graph else (value.detach(), gradient)


def gradient(potential: Potential, z: Tensor) -> Tensor:
    """``∇U(z)`` alone, ``(..., d)``, for less than :func:`value_and_gradient` where that is offered."""
    if isinstance(potential, GradientPotential):
        return potential.gradient(z)
    return value_and_gradient(potential, z)[1]
