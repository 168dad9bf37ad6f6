"""A register of the classes that can be written as JSON and rebuilt from it without running foreign code."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

C = TypeVar("C", bound=type)

RECIPES: dict[str, type] = {}


def recipe(cls: C) -> C:
    """Registers ``cls``: an instance is described by its constructor's arguments.

    The class keeps every constructor argument as the attribute of that name (or of that name with a leading
    underscore), so the description is read from the live object and cannot go stale.
    """
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise TypeError(f"{cls.__name__}: a recipe names all its arguments, it cannot take *args or **kwargs")
    names = tuple(p.name for p in parameters)
    cls._recipe_arguments = names  # type: ignore[attr-defined]
    RECIPES[cls.__name__] = cls
    return cls


def is_recipe(value: Any) -> bool:
    """Whether ``value`` is an instance of exactly a registered class (a user's subclass is not)."""
    return RECIPES.get(type(value).__name__) is type(value)


def recipe_arguments(value: Any) -> dict[str, Any]:
    """The constructor arguments that rebuild ``value``, read from its attributes."""
    arguments = {}
    for name in type(value)._recipe_arguments:
        for attribute in (f"_{name}", name):
            if hasattr(value, attribute):
                arguments[name] = getattr(value, attribute)
                break
        else:
            raise AttributeError(f"{type(value).__name__} does not keep its argument {name!r}")
    return arguments
