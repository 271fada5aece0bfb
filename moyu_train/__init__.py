"""moyu: train LLMs to be activation-sparse, fit predictors, export checkpoints that decode faster."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_recipe", "sparsify"]


def __getattr__(name: str) -> Any:  # lazy, so that the command line starts without torch
    if name == "sparsify":
        from moyu_train.api import sparsify

        return sparsify
    if name == "load_recipe":
        from moyu_train.recipe import load_recipe

        return load_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
