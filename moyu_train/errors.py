"""Errors that a user can act on. The command line prints them without a traceback."""

import sys


class MoyuError(RuntimeError):
    """Says what was given, why it fails and what to change."""


def is_told(error: Exception) -> bool:
    """Whether an error is one of ours, or the kernels' (whose module is asked for only where it is loaded already)."""
    kernels = sys.modules.get("moyu_kernels.reading")
    return isinstance(error, MoyuError) or (kernels is not None and isinstance(error, kernels.CheckpointError))
