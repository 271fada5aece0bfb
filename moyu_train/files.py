"""Files that are either whole or not there: written to a temporary name, then renamed."""

import hashlib
import json
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import moyu_kernels.reading
from safetensors.torch import load_file
from torch import Tensor

from moyu_train.errors import MoyuError


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def reading(what: str | Path) -> AbstractContextManager[None]:
    """Turns whatever a malformed file raises within into a MoyuError that names it."""
    return moyu_kernels.reading.reading(what, MoyuError)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: MoyuError."""
    with reading(path):
        return moyu_kernels.reading.read_json(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises: MoyuError."""
    with reading(path):
        return load_file(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: Path, needed: int) -> None:
    """Make the folder and try it.

    Args: needed: bytes that will be written below it.
    Raises: MoyuError where it is read-only or has too little room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".moyu-{os.getpid()}"
        probe.write_bytes(b"moyu")
        probe.unlink()
    except OSError as error:
        raise MoyuError(
            f"output folder {str(folder)!r} cannot be written ({error.strerror}); set another one"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MoyuError(
            f"output folder {str(folder)!r} has {free / 1e9:.1f} GB free, the run needs about {needed / 1e9:.1f} GB; "
            "free some or set another folder"
        )
