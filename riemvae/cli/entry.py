"""What the command ``riemvae`` starts: its arguments, and how errors are said."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from riemvae.cli import benchmarks, commands, longitudinal
from riemvae.cli.arguments import Help, Version


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments; None is those of the process.

    Returns:
        The exit status: 0, 2 for a wrong argument, file or value (with one line on the error stream), 130
        for an interrupt.

    Raises:
        SystemExit: From ``--help``, ``--version`` and arguments that do not parse, as argparse does.

    Example:
        >>> main(["evaluate", "no_such_folder", "no_such_file.npz"])
        2
    """
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        if arguments.debug:
            raise
        sys.stderr.write(f"{arguments.name}: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{arguments.name}: interrupted\n")
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    top = argparse.ArgumentParser(
        prog="riemvae",
        description="Generative models whose latent space has a geometry. "
        "'riemvae COMMAND --help' explains a command.",
    )
    top.add_argument("--version", action=Version, help="show the version and exit")
    every = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_commands(_maker(every))
    sequences = every.add_parser(
        "longitudinal",
        help="models of sequences: fit, impute, sample, evaluate",
        description="Models of subjects seen at several visits, some of which may be missing. "
        "'riemvae longitudinal COMMAND --help' explains a command.",
    )
    longitudinal.add_commands(
        _maker(sequences.add_subparsers(dest="subcommand", metavar="COMMAND", required=True))
    )
    comparisons = every.add_parser(
        "benchmark",
        help="published comparisons, measured again",
        description="Published comparisons, measured again. 'riemvae benchmark COMMAND --help' explains one.",
    )
    benchmarks.add_commands(
        _maker(comparisons.add_subparsers(dest="subcommand", metavar="COMMAND", required=True))
    )
    return top


def _maker(parsers: Any) -> Callable[..., argparse.ArgumentParser]:
    """Makes the parser of one command of these."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the whole traceback of an error")

    def command(name: str, run: Any, summary: str, description: str) -> argparse.ArgumentParser:
        sub = parsers.add_parser(
            name, help=summary, description=description, parents=[common], formatter_class=Help
        )
        sub.set_defaults(run=run, name=sub.prog)
        return sub  # type: ignore[no-any-return]

    return command
