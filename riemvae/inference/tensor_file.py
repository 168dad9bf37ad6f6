"""One file of tensors and a JSON header: written whole or not at all, read without running code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from riemvae._atomic import write_file
from riemvae._checks import argument_error


def write_tensors(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    header: Mapping[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """Writes a safetensors file whose metadata hold ``header`` as JSON.

    Args:
        path: The file to write or replace.
        kind: What the file is, to be asked for when it is read.
        version: Of this kind's layout.
        header: What JSON can hold.
        tensors: No two of them may share memory.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> write_tensors(path, "numbers", 1, {"name": "a"}, {"a": torch.ones(2)})
        >>> read_tensors(path, "numbers", 1)
        ({'name': 'a'}, {'a': tensor([1., 1.])})
    """
    text = json.dumps({"format": kind, "format_version": version, "header": dict(header)}, sort_keys=True)
    own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    content = safetensors.torch.save(own, metadata={"riemvae": text})
    write_file(path, lambda file: file.write(content))


def read_tensors(
    path: str | os.PathLike[str], kind: str, version: int, name: str = "path"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors, on the CPU, of a file that :func:`write_tensors` wrote.

    Raises:
        ValueError: no such file, one of another kind or version, or a damaged one; ``name`` is the argument
            that it names.
    """
    path = Path(path)
    if not path.is_file():
        raise argument_error(name, f"a file of {kind}", f"{path}, which is not there")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = json.loads((file.metadata() or {})["riemvae"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        known = (text["format"], text["format_version"]) == (kind, version)
        header = text["header"]
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError):
        known, header, tensors = False, {}, {}
    if not known or not isinstance(header, dict):
        raise argument_error(
            name,
            f"a file of {kind}, version {version}",
            f"{path}, which is of something else or damaged",
            "name another file",
        )
    return header, tensors
