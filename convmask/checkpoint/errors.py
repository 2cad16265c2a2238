"""The error that every failure to read, recognise or fit a checkpoint becomes."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit. The message starts with the file's name and gives the reason."""
