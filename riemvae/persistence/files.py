"""The two files of a save: written at one stroke, read with suspicion."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from riemvae._atomic import new_folder

FORMAT = "riemvae"
FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "weights.safetensors"


def _riemvae_version() -> str:
    try:
        return metadata.version("riemvae")
    except metadata.PackageNotFoundError:
        return "unknown"


def write_folder(
    folder: str | os.PathLike[str], content: Mapping[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Writes ``config.json`` and ``weights.safetensors`` so that ``folder`` is at no moment half written.

    Both are written and flushed in a hidden folder beside the target, which is then renamed. A riemvae save
    of that name is renamed away before and removed after; if something fails it is put back.

    Raises:
        ValueError: ``folder`` is a file, or holds anything else than a riemvae save.
    """
    _refuse_foreign(Path(os.path.realpath(folder)))
    with new_folder(folder) as new:
        weights = safetensors.torch.save(tensors, metadata={"format": FORMAT})
        digest = {"file": WEIGHTS, "bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "riemvae_version": _riemvae_version(),
            "weights": digest,
            **content,
        }
        _write(new / WEIGHTS, weights)
        _write(new / CONFIG, (json.dumps(config, indent=1, allow_nan=False) + "\n").encode())


def _refuse_foreign(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"folder: expected a folder to write, got the file {target}; pass another path.")
    names = {entry.name for entry in target.iterdir()}
    if not names:
        return
    foreign = sorted(names - {CONFIG, WEIGHTS})
    if not foreign:
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
            if json.loads((target / CONFIG).read_bytes()).get("format") == FORMAT:
                return
    what = f"with {', '.join(foreign[:3])}" if foreign else f"whose {CONFIG} is not riemvae's"
    raise ValueError(
        f"folder: expected a new folder or an earlier save, got {target}, a folder {what}; "
        "pass another path, nothing was written."
    )


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_folder(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors (on the CPU) of a save.

    Raises:
        ValueError: There is no such folder, it is not riemvae's, it was written by a newer version, or a
            file is truncated or altered.
    """
    target = Path(os.path.realpath(folder))
    if not (target / CONFIG).is_file():
        raise ValueError(f"folder: expected a folder written by save, got {_absent(target)}.")
    config = _read_config(target / CONFIG)
    try:
        data = (target / WEIGHTS).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{target}: {WEIGHTS} is missing; copy the whole folder, or save again.") from None
    expected = config.get("weights")
    if not isinstance(expected, dict):
        raise ValueError(f"{target / CONFIG}: it does not describe {WEIGHTS}: altered; save again.")
    size = expected.get("bytes")
    if size != len(data):
        raise ValueError(
            f"{target / WEIGHTS}: expected {size} bytes, got {len(data)}: the file is truncated or of "
            f"another "
            "save; copy the folder again, or save again."
        )
    if hashlib.sha256(data).hexdigest() != expected.get("sha256"):
        raise ValueError(
            f"{target / WEIGHTS}: its SHA-256 is not the one in {CONFIG}: the file was altered or is of "
            f"another "
            "save; copy the folder again, or save again."
        )
    try:
        return config, safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{target / WEIGHTS}: not a safetensors file ({error}); save again.") from None


def _absent(target: Path) -> str:
    if target.is_dir():
        return f"{target}, which has no {CONFIG}"
    left = sorted(target.parent.glob(f".{target.name}.*.old")) if target.parent.is_dir() else []
    if left:  # the machine stopped between two renames
        return f"{target}, which does not exist; an interrupted save left it at {left[-1]}: rename that"
    return f"{target}, which does not exist" if not target.exists() else f"the file {target}"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}): truncated or altered; save again.") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(
            f'{path}: not a description by riemvae (no "format": "{FORMAT}"); pass another folder.'
        )
    version = config.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(
            f"{path}: expected a format_version of at least 1, got {version!r}: altered; save again."
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: written by a newer riemvae ({config.get('riemvae_version')}, format {version}; this "
            f"one "
            f"reads up to {FORMAT_VERSION}): upgrade riemvae."
        )
    return config
