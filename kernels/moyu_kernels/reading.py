"""Reading checkpoints that a stranger may have written: data only, names that stay inside, and one kind of error."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

MALFORMED = (
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    OSError,
    RecursionError,
    SafetensorError,
    StrictDataclassError,  # a field of a transformers config that is of another type
)


class CheckpointError(ValueError):
    """The folder is not a sparse checkpoint that this version can load; the message says what to do."""


@contextmanager
def reading(what: str | Path, told: type[Exception] = CheckpointError) -> Iterator[None]:
    """Turns whatever malformed content raises within into one error that names the file, and lets `told` through."""
    try:
        yield
    except MALFORMED as error:
        if isinstance(error, told):
            raise
        raise told(
            f"{str(what)!r} cannot be read ({type(error).__name__}: {str(error)[:300]}): it is damaged, or not what is "
            "expected there; copy it again, or write it again with the stage that made it"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: CheckpointError."""
    with reading(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}, not an object")
        return found


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder.

    Raises: CheckpointError for a name that leads out of it.
    """
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise CheckpointError(f"{folder} names the file {name!r}, which leads out of it; nothing of it is read")
    return folder / name
