"""Copies of a distribution, or of what a module returns, whose parameters are moved along a direction."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

Moved = Callable[[dict[str, Tensor]], Any]


def with_validation(distribution: Any, validate_args: bool) -> Any:
    """A copy of ``distribution``, its parts too, that checks the values it is given, or that does not."""
    new = copy.copy(distribution)
    for name, value in vars(distribution).items():
        if isinstance(value, Distribution):
            new.__dict__[name] = with_validation(value, validate_args)
    new._validate_args = validate_args  # last: Pyro's Independent hands it on to its part
    return new


def _arguments(distribution: Distribution) -> dict[str, Any] | None:
    """The constructor's arguments, where the distribution keeps them all under their own names.

    Others are copied attribute by attribute. What a constructor derives (the chi-square inside a Student-t)
    would be left behind by that.
    """
    try:
        parameters = inspect.signature(type(distribution).__init__).parameters
    except (TypeError, ValueError):
        return None
    held: dict[str, Any] = vars(distribution)
    found: dict[str, Any] = {}
    for name, parameter in list(parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return None
        if name == "validate_args":
            found[name] = False
        elif name in held:
            found[name] = held[name]
        elif parameter.default is parameter.empty:
            value = getattr(distribution, name, None)  # a property, of what the base distribution keeps
            if value is None:
                return None
            found[name] = value
    try:
        again: Any = type(distribution)(**found)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
    return found if again.batch_shape == distribution.batch_shape else None


def _tensors(distribution: Distribution, prefix: str = "") -> dict[str, Tensor]:
    found = {}
    arguments = _arguments(distribution)
    for name, value in (vars(distribution) if arguments is None else arguments).items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            found[prefix + name] = value
        elif isinstance(value, Distribution):
            found.update(_tensors(value, f"{prefix}{name}."))
    return found


def _replaced(distribution: Distribution, values: dict[str, Tensor], prefix: str = "") -> Distribution:
    arguments = _arguments(distribution)
    old = dict(vars(distribution)) if arguments is None else arguments
    moved: dict[str, Any] = {}
    for name, value in old.items():
        if prefix + name in values:
            moved[name] = values[prefix + name]
        elif isinstance(value, Distribution):
            moved[name] = _replaced(value, values, f"{prefix}{name}.")
    if arguments is not None:
        kind: Any = type(distribution)
        return kind(**{**arguments, **moved})  # type: ignore[no-any-return]
    new = copy.copy(distribution)
    new.__dict__.update(moved)
    return new


def _direction(value: Tensor) -> Tensor:
    """A random direction of the size of the tensor, which keeps a triangle a triangle."""
    value = value.detach()
    scale = value.abs().mean().clamp(min=0.1) if bool(torch.isfinite(value).all()) else value.new_ones(())
    step = torch.where(value == 0, scale, value.abs()) * (0.5 + torch.rand_like(value))
    sign = torch.where(torch.rand_like(value) < 0.5, -1.0, 1.0)
    square = value.dim() >= 2 and value.shape[-1] == value.shape[-2] and value.shape[-1] > 1
    if square and bool((value.triu(1) == 0).all()):
        step = step.tril()
    if square and bool((value == value.mT).all()):
        return 0.5 * (step + step.mT)  # a covariance, or the like
    # One sign for numbers that are all positive: a scale is then moved as a whole.
    return step if bool((value > 0).all()) else step * sign


def parameter_directions(source: Any, distribution: Distribution) -> tuple[dict[str, Tensor], Moved]:
    """Directions for the parameters of a distribution, and the copy moved along them.

    Args:
        source: What the user handed over: a module that returns the distribution, whose parameters are moved,
            or anything else.
        distribution: The distribution; its tensors are moved where there is no module with parameters.

    Returns:
        The direction of each parameter, and a function of a step for each (all in one dictionary, tensors of
        no dimension) that gives the distribution there.
    """
    if isinstance(source, nn.Module) and any(p.requires_grad for p in source.parameters()):
        named = {name: p.detach() for name, p in source.named_parameters() if p.requires_grad}
        module = source

        def from_module(steps: dict[str, Tensor]) -> Any:
            moved = {n: named[n] + step * directions[n] for n, step in steps.items()}
            return with_validation(torch.func.functional_call(module, moved, ()), False)

        directions = {name: _direction(value) for name, value in named.items()}
        return directions, from_module
    tensors = {name: value.detach() for name, value in _tensors(distribution).items()}
    directions = {name: _direction(value) for name, value in tensors.items()}
    for name in directions:
        directions[name] = _tangent(distribution, name, tensors[name], directions[name])

    def from_attributes(steps: dict[str, Tensor]) -> Any:
        moved = {n: tensors[n] + step * directions[n] for n, step in steps.items()}
        return with_validation(_replaced(distribution, moved), False)

    return directions, from_attributes


def _tangent(distribution: Any, name: str, value: Tensor, direction: Tensor) -> Tensor:
    """The direction within the manifold that a location lies on."""
    for part in name.split(".")[:-1]:
        distribution = getattr(distribution, part)
    manifold = getattr(distribution, "manifold", None)
    if manifold is None or name.split(".")[-1] != "loc" or not hasattr(manifold, "proju"):
        return direction
    return manifold.proju(value, direction).as_subclass(Tensor)  # type: ignore[no-any-return]
