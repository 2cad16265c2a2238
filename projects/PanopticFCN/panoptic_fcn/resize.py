"""Bilinear reduction of masks and label maps that never stores them as floating-point numbers at full size."""

from __future__ import annotations

from typing import NamedTuple

import torch

Taps = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def linear_taps(size: int, reduced: int, device: torch.device) -> Taps:
    """Which two of ``size`` values each of ``reduced`` is made of: indices (reduced,) twice, and the second's weight.

    The convention is that of ``interpolate(mode="bilinear", align_corners=False)``.
    """
    source = (torch.arange(reduced, device=device, dtype=torch.float32) + 0.5) * (size / reduced) - 0.5
    source = source.clamp(min=0)
    first = source.long().clamp(max=size - 1)
    return first, (first + 1).clamp(max=size - 1), source - first


class ReducedRows(NamedTuple):
    """The rows of reduced masks that can have a share above 0; all others are zeros.

    Attributes:
        masks: (R,) which mask, ascending.
        rows: (R,) which of its rows, ascending in each mask.
        shares: (R, width) of 0 to 1.
    """

    masks: torch.Tensor
    rows: torch.Tensor
    shares: torch.Tensor


def reduce_rows(masks: torch.Tensor, height: int, width: int) -> ReducedRows:
    """Resizes (N, H, W) bool masks to (N, height, width) shares, as ``interpolate`` does with floats.

    An instance fills a small part of an image: only the rows that it reaches are resized, of which only the four pixels
    that make up each cell are read.
    """
    count, tall, wide = masks.shape
    top, bottom, y = linear_taps(tall, height, masks.device)
    left, right, x = linear_taps(wide, width, masks.device)
    # PyTorch finds maxima of bytes many times as fast as it finds any() of bools
    filled = masks.view(torch.uint8).amax(dim=2) if masks.numel() else masks.new_zeros(count, tall, dtype=torch.uint8)
    index, row = (filled[:, top] | filled[:, bottom]).nonzero(as_tuple=True)
    lines = masks.reshape(count * tall, wide)
    upper, lower = (_resized_lines(lines[index * tall + tap[row]], left, right, x) for tap in (top, bottom))
    return ReducedRows(index, row, torch.lerp(upper, lower, y[row, None]))


def _resized_lines(lines: torch.Tensor, left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(R, width) shares of (R, W) bool lines."""
    return torch.lerp(lines.index_select(1, left).float(), lines.index_select(1, right).float(), weight)


def paste_rows(reduced: ReducedRows, canvas: torch.Tensor) -> None:
    """Writes the rows into (N, h, w), at the top left of a canvas of zeros at least as large as the masks."""
    width = reduced.shares.shape[1]
    canvas.flatten(0, 1)[:, :width].index_copy_(0, reduced.masks * canvas.shape[1] + reduced.rows, reduced.shares)


def add_labels(labels: torch.Tensor, height: int, width: int, canvas: torch.Tensor) -> None:
    """Adds the reduced one-hot map of ``labels`` to a canvas, without making that map.

    Args:
        labels: (H, W) int64; negative ones are left out.
        height: of the reduced map.
        width: of the reduced map.
        canvas: (L, h, w) contiguous float, zeros at the top left, where the shares of each label are written.
    """
    top, bottom, y = linear_taps(labels.shape[0], height, labels.device)
    left, right, x = linear_taps(labels.shape[1], width, labels.device)
    rows, columns = canvas.shape[1:]
    cells = torch.arange(height, device=labels.device)[:, None] * columns + torch.arange(width, device=labels.device)
    for row, row_weight in ((top, 1 - y), (bottom, y)):
        line = labels.index_select(0, row)
        for column, column_weight in ((left, 1 - x), (right, x)):
            label = line.index_select(1, column)
            weight = (row_weight[:, None] * column_weight) * (label >= 0)
            canvas.view(-1).index_add_(0, (label.clamp(min=0) * (rows * columns) + cells).view(-1), weight.view(-1))
