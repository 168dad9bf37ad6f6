"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def write_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then renames it: no reader sees a part.

    Args:
        path: The file to write or replace.
        write: Gets the open binary file.

    Example:
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> write_file(target, lambda file: file.write(b"whole"))
        >>> target.read_bytes()
        b'whole'
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp gives 0o600
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder to fill, which takes the place of ``folder`` at the end.

    A folder of that name is renamed away before and removed after; if anything fails it is where it was, and
    what was new is gone. Whether it may be replaced is for the caller to check.

    Args:
        folder: The folder to write or replace; links are followed.

    Example:
        >>> target = Path(tempfile.mkdtemp()) / "result"
        >>> with new_folder(target) as new:
        ...     _ = (new / "a.txt").write_text("whole")
        ...     target.exists()
        False
        >>> [entry.name for entry in target.iterdir()]
        ['a.txt']
    """
    target = Path(os.path.realpath(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    new, old = (target.with_name(f".{target.name}.{token}.{end}") for end in ("new", "old"))
    try:
        new.mkdir()
        yield new
        _flush_folder(new)
        _swap(new, target, old)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _swap(new: Path, target: Path, old: Path) -> None:
    replaces = target.exists()
    if replaces:
        os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        if replaces:
            os.rename(old, target)
        raise
    _flush_folder(target.parent)


def _flush_folder(path: Path) -> None:
    with contextlib.suppress(PermissionError):  # Windows opens no folders, and needs none flushed
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
