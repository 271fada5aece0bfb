"""How many positions a model has, and the windows that fit."""

from typing import Any

from moyu_train.errors import MoyuError

WINDOW = 1024  # tokens, where no setting names them


def positions(model: Any) -> int | None:
    """Those that its config knows; None where it names no end."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if found and found > 0 else None


def longest_window(model: Any, most: int = WINDOW) -> int:
    """`most` tokens, or as many as the model has positions for."""
    return min(most, positions(model) or most)


def check_window(model: Any, window: int, setting: str) -> None:
    """Raises: MoyuError for a window that is longer than the model, of which some would fail and others guess."""
    if window > longest_window(model, window):
        raise MoyuError(f"{setting} is {window}, and the model has {positions(model)} positions; lower {setting}")
