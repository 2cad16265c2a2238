"""Bilinear reduction of masks and label maps that never stores them as floating-point numbers at full size."""

from __future__ import annotations

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


def reduce_masks(masks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes (N, H, W) bool masks to (N, height, width) shares of 0 to 1, as ``interpolate`` does with floats.

    Only the four pixels that make up each cell are read.
    """
    top, bottom, y = linear_taps(masks.shape[1], height, masks.device)
    left, right, x = linear_taps(masks.shape[2], width, masks.device)
    rows = [masks.index_select(1, index) for index in (top, bottom)]
    (top_left, top_right), (bottom_left, bottom_right) = (
        [row.index_select(2, index).float() for index in (left, right)] for row in rows
    )
    upper = torch.lerp(top_left, top_right, x)
    lower = torch.lerp(bottom_left, bottom_right, x)
    return torch.lerp(upper, lower, y[:, None])


def reduce_labels(labels: torch.Tensor, height: int, width: int, num_labels: int) -> torch.Tensor:
    """Shares (num_labels + 1, height, width) of each label in the cells: the reduced one-hot map of ``labels``.

    Args:
        labels: (H, W) int64, 0 to num_labels; ``num_labels`` itself stands for pixels without a label.
        height: of the result.
        width: of the result.
        num_labels: labels there are.
    """
    top, bottom, y = linear_taps(labels.shape[0], height, labels.device)
    left, right, x = linear_taps(labels.shape[1], width, labels.device)
    shares = torch.zeros(num_labels + 1, height, width, device=labels.device)
    for row, row_weight in ((top, 1 - y), (bottom, y)):
        for column, column_weight in ((left, 1 - x), (right, x)):
            corner = labels[row][:, column]
            shares.scatter_add_(0, corner[None], (row_weight[:, None] * column_weight)[None])
    return shares
