"""Independent tasks in one process or several, telling how far they are."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Tell: TypeAlias = Callable[[str], None]
Task: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...]]

_lines: Any = None


def run_tasks(tasks: Sequence[Task], jobs: int, tell: Tell) -> list[Any]:
    """The results of ``function(*arguments, tell)`` for each task, in the order of the tasks.

    Args:
        tasks: Pairs of a function of a module (it is pickled by name) and its arguments.
        jobs: Processes; with one, all run in this process.
        tell: Gets the lines that the tasks tell.

    Returns:
        The results. The first error of a task is raised when those that
        run have ended, and those that wait are given up.

    Example:
        >>> run_tasks([(pow_and_tell, (2, 3))], 1, print)
        2 to the 3
        [8]
    """
    if jobs == 1 or len(tasks) == 1:
        return [function(*arguments, tell) for function, arguments in tasks]
    # A fresh interpreter each: forking a process whose torch has threads can hang.
    context = multiprocessing.get_context("spawn")
    # It writes in the process that tells: a line is there before the result of its task is.
    lines = context.SimpleQueue()
    with ProcessPoolExecutor(min(jobs, len(tasks)), context, _remember, (lines,)) as pool:
        futures = [pool.submit(_work, function, arguments) for function, arguments in tasks]
        try:
            waiting: set[Future[Any]] = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()  # an error ends the run now
                _pass_on(lines, tell)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those that run come to their end
            raise
        _pass_on(lines, tell)
        return [future.result() for future in futures]


def pow_and_tell(base: int, exponent: int, tell: Tell) -> int:
    """``base`` to the ``exponent``: a task for examples and tests."""
    tell(f"{base} to the {exponent}")
    return int(base**exponent)


def _remember(lines: Any) -> None:
    global _lines
    _lines = lines


def _work(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments, _lines.put)


def _pass_on(lines: Any, tell: Tell) -> None:
    while not lines.empty():
        tell(lines.get())


@contextmanager
def progress_lines(console: Console, total: int) -> Iterator[Tell]:
    """A bar in a terminal; plain lines with the seconds elsewhere."""
    if not console.is_terminal:
        since = time.perf_counter()
        yield lambda text: console.print(f"{time.perf_counter() - since:5.0f} s  {text}", highlight=False)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=total)
        yield lambda text: progress.update(task, advance=1, description=text)
