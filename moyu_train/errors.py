"""Errors that a user can act on. The command line prints them without a traceback."""


class MoyuError(RuntimeError):
    """Says what was given, why it fails and what to change."""
