"""Whether a prior is conditioned on something: read from its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

from riemvae._checks import argument_error

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def context_rule(prior: Callable[..., Any]) -> str:
    """``"none"``, ``"optional"`` or ``"required"``: whether calling ``prior`` takes an argument.

    Args:
        prior: A callable or module that returns a distribution.

    Raises:
        ValueError: It requires more than one.

    Example:
        >>> context_rule(lambda: None), context_rule(lambda y=None: None), context_rule(lambda y: None)
        ('none', 'optional', 'required')
    """
    try:
        signature = inspect.signature(prior.forward if isinstance(prior, nn.Module) else prior)
    except (TypeError, ValueError):  # of a builtin
        return "none"
    parameters = signature.parameters.values()
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    required = [p.name for p in positional if p.default is p.empty]
    if len(required) > 1:
        raise argument_error(
            "prior",
            "a callable of at most one argument, what it is conditioned on",
            f"one that requires {required}",
            "put them into one tensor",
        )
    if required:
        return "required"
    return "optional" if positional or any(p.kind is p.VAR_POSITIONAL for p in parameters) else "none"


def call_prior(prior: Callable[..., Any] | Distribution, y: Tensor | None) -> Any:
    """``prior()`` or ``prior(y)``, by its signature.

    Args:
        prior: A callable or module that returns a distribution; a distribution stands for itself.
        y: What it is conditioned on, one row for each datum ``(B, ...)``; None is nothing.

    Returns:
        What the prior returns.

    Raises:
        ValueError: Nothing for a prior that requires it, something for one that takes none, something that is
            no tensor with rows.

    Example:
        >>> call_prior(lambda y: y + 1, Tensor([1.0]))
        tensor([2.])
    """
    if isinstance(prior, Distribution):
        law = prior
        return call_prior(lambda: law, y)
    rule = context_rule(prior)
    if y is None:
        if rule == "required":
            raise argument_error(
                "y",
                "what the prior p(z|y) is conditioned on, one row for each datum",
                None,
                "call model(x, y) to observe data, model(y=y) to draw them",
            )
        return prior()
    if rule == "none":
        raise argument_error(
            "y",
            "nothing, since this prior is conditioned on nothing",
            y,
            "leave it out, or pass a prior whose forward takes it",
        )
    if not isinstance(y, Tensor) or y.dim() == 0:
        raise argument_error("y", "a tensor (B, ...), one row for each datum", y)
    return prior(y)
