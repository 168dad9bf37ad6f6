"""Options of a recipe on the command line, read and checked by the recipe's own signature."""

from __future__ import annotations

import argparse
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from riemvae.cli.arguments import shape_of


def _yes_or_no(text: str) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]


def _nothing(text: str) -> None:
    if text.lower() != "none":
        raise ValueError(text)


# How a value on the command line is read, by the annotation of the recipe's argument, and how that is called.
_READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    bool: (_yes_or_no, "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "a name"),
    Any: (str, "a name"),
    type(None): (_nothing, "none"),
    Sequence[int]: (shape_of, "whole numbers separated by commas"),
}


def recipe_options(model: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The options of a recipe from ``NAME=VALUE``, each read as its annotation says.

    Raises:
        ValueError: A name that the recipe does not have or that has no text, a value of another kind.

    Example:
        >>> recipe_options("lvae", [("flow", "maf"), ("flow_hidden", "32,32"), ("length_averaged", "yes")])
        {'flow': 'maf', 'flow_hidden': (32, 32), 'length_averaged': True}
    """
    from riemvae.zoo import RECIPES

    recipe = RECIPES[model]
    hints = get_type_hints(recipe)
    readers = {}
    for name in list(inspect.signature(recipe).parameters)[1:]:
        hint = hints[name]
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        found = [_READERS[kind] for kind in kinds if kind in _READERS]
        if any(reader is not _nothing for reader, _ in found):  # modules have no text
            readers[name] = found
    options: dict[str, Any] = {}
    for name, text in pairs:
        if name not in readers:
            raise ValueError(f"--option: expected one of {', '.join(readers)} for {model!r}, got {name!r}.")
        if name in options:
            raise ValueError(f"--option: expected each name once, got {name!r} twice.")
        for read, _ in readers[name]:
            try:
                options[name] = read(text)
                break
            except (ValueError, KeyError, argparse.ArgumentTypeError):
                continue
        else:
            said = " or ".join(kind for _, kind in readers[name])
            raise ValueError(f"--option {name}: expected {said}, got {text!r}.")
    return options
