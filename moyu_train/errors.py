"""Errors that a user can act on. The command line prints them without a traceback."""

import errno
import sys


class MoyuError(RuntimeError):
    """Says what was given, why it fails and what to change."""


def is_told(error: Exception) -> bool:
    """Whether an error is one of ours, or the kernels' (whose module is asked for only where it is loaded already), or
    says of itself what is wrong."""
    kernels = sys.modules.get("moyu_kernels.reading")
    ours = isinstance(error, MoyuError) or (kernels is not None and isinstance(error, kernels.CheckpointError))
    return ours or is_full_disk(error)


def is_full_disk(error: Exception) -> bool:
    """Also of safetensors, which has no number for it."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"os error {number})" in str(error) for number in full)
