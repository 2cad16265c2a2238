"""Coordinates as additional channels (Liu et al., NeurIPS 2018, arXiv 1807.03247)."""

from __future__ import annotations

from typing import Any

import torch

from convmask.utils.exporting import exporting


def append_coordinates(x: torch.Tensor) -> torch.Tensor:
    """Appends the row and the column of each cell, in that order, as two channels.

    Args:
        x: (N, C, H, W).

    Returns:
        (N, C + 2, H, W). Coordinates go from -1 (first row or column) to 1 (last); along a side of one cell they are
        -1.
    """
    batch, _, height, width = x.shape
    line = _line_of_any_length if exporting() else torch.linspace
    rows = line(-1, 1, height, device=x.device, dtype=x.dtype)
    columns = line(-1, 1, width, device=x.device, dtype=x.dtype)
    return torch.cat(
        [
            x,
            rows[None, None, :, None].expand(batch, 1, height, width),
            columns[None, None, None, :].expand(batch, 1, height, width),
        ],
        dim=1,
    )


def _line_of_any_length(start: float, end: float, steps: int, **options: Any) -> torch.Tensor:
    """``torch.linspace``, which an exporter makes for one length alone."""
    index = torch.arange(steps, **options)
    return index * (end - start) / index[-1:].clamp(min=1) + start
