"""What the commands' arguments may be, and how help shows them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any


def names(text: str) -> tuple[str, ...]:
    """Words separated by commas."""
    return tuple(part.strip() for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0,1.5,2, got {text!r}") from None
    if not all(math.isfinite(number) for number in found):
        raise argparse.ArgumentTypeError(f"expected finite numbers, got {text!r}")
    return found


def share(text: str) -> float:
    """A number from 0 to below 1."""
    (value, *more) = numbers(text)
    if more or not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")
    return value


def level(text: str) -> float:
    """A number between 0 and 1."""
    try:
        value = share(text)
    except argparse.ArgumentTypeError:
        value = 0.0
    if value == 0.0:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value


def pair(text: str) -> tuple[str, str]:
    """A name and a value with ``=`` between them."""
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name.strip().replace("-", "_"), value.strip()


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of an option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from importlib.metadata import version

        print(f"riemvae {version('riemvae')}")
        parser.exit()


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """The seed of a generator."""
    if not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def seeds(text: str) -> tuple[int, ...]:
    """Seeds separated by commas."""
    return tuple(seed(part.strip()) for part in text.split(","))


def shape_of(text: str) -> tuple[int, ...]:
    """Whole numbers of at least 1, separated by commas."""
    return tuple(count(part.strip()) for part in text.split(","))


def plane(text: str) -> tuple[int, ...]:
    """Two coordinates, separated by a comma."""
    if [part.isdigit() for part in text.split(",")] != [True, True]:
        raise argparse.ArgumentTypeError(f"expected two coordinates such as 0,1, got {text!r}")
    return tuple(int(part) for part in text.split(","))
