"""Loads and decodes sparse checkpoints: needs torch, and transformers only once a model is loaded."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gated import SparseGatedFFN
    from .guard import density, density_drift
    from .loading import from_pretrained
    from .runner import Runner
    from .sparse_ffn import SparseFFN

_HOMES = {
    "density": "guard",
    "density_drift": "guard",
    "from_pretrained": "loading",
    "SparseFFN": "sparse_ffn",
    "SparseGatedFFN": "gated",
    "Runner": "runner",
}

__all__ = ["Runner", "SparseFFN", "SparseGatedFFN", "density", "density_drift", "from_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
