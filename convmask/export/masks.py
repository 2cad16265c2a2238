"""Small masks in boxes of a whole image, by matrix products: bilinear interpolation of all at once, of any size.

Shapes: n masks of P x P cells, H x W pixels.
"""

from __future__ import annotations

import torch


def linear_weights(places: torch.Tensor, cells: int) -> torch.Tensor:
    """(n, S, cells): how much of each cell the places (n, S) have, bilinearly; nothing lies beyond the first and last
    cell."""
    distance = (places[:, :, None] - torch.arange(cells, device=places.device, dtype=places.dtype)).abs()
    return (1 - distance).clamp(min=0)


def interpolate_at(masks: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(n, S, T): values of (n, H, W) masks at the places of rows (n, S) and columns (n, T), in cells."""
    across = linear_weights(columns, masks.shape[2]).transpose(1, 2)
    return linear_weights(rows, masks.shape[1]) @ (masks @ across)


def paste(masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(n, H, W) probabilities: masks (n, P, P) in their boxes (n, 4), as Detectron2's ``paste_masks_in_image``."""
    cells = masks.shape[1]
    places = []
    for axis, length in ((1, height), (0, width)):
        start, end = boxes[:, axis, None], boxes[:, axis + 2, None]
        centres = torch.arange(length, device=boxes.device, dtype=boxes.dtype) + 0.5
        places.append((centres - start) / (end - start).clamp(min=1e-6) * cells - 0.5)
    return interpolate_at(masks, *places)


def paste_whole(masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int, threshold: float) -> torch.Tensor:
    """(n, H, W) bool: masks (n, P, P) resized to boxes (n, 4) of whole pixels, ends excluded, at or above a threshold.

    As ``F.interpolate`` (bilinear, corners not aligned) does, whose border is repeated. A box of no pixels is empty.
    """
    cells = masks.shape[1]
    places, inside = [], []
    for axis, length in ((1, height), (0, width)):
        start, end = boxes[:, axis, None], boxes[:, axis + 2, None]
        pixels = torch.arange(length, device=boxes.device, dtype=boxes.dtype)
        scale = cells / (end - start).clamp(min=1)
        places.append(((pixels - start + 0.5) * scale - 0.5).clamp(min=0, max=cells - 1))
        inside.append((pixels >= start) & (pixels < end))
    values = interpolate_at(masks, *places)
    return (values >= threshold) & inside[0][:, :, None] & inside[1][:, None, :]
