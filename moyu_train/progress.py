"""One progress bar for everything that takes more than a moment, on standard error."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")
console = Console(stderr=True)


def track(items: Sequence[T], what: str) -> Iterator[T]:
    yield from rich_track(items, description=what, console=console, transient=True)
