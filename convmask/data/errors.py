"""The error that everything about datasets raises."""

from __future__ import annotations


class DatasetError(ValueError):
    """A dataset is missing, unreadable or contradicts itself. The message names the file, the image and the field."""
