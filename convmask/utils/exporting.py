"""Whether ``torch.export`` is at work, for steps that have another form in a program."""

from __future__ import annotations

import torch


def exporting() -> bool:
    """True while ``torch.export`` traces; False before torch 2.7, with which nothing of ours is exported."""
    known = getattr(torch.compiler, "is_exporting", None)
    return known is not None and bool(known())
