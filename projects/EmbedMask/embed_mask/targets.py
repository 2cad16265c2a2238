"""Which proposals stand for an object, and what the mask loss compares with (arXiv 1912.01954, section 3.3).

Shapes: L locations of all levels, G objects of an image, n positives, h x w pixels at the stride of the masks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F

Size = tuple[int, int]


class Positives(NamedTuple):
    """Locations that stand for the objects of an image.

    Attributes:
        objects: (n,) int64, ascending.
        locations: (n,) int64, ascending within an object.
    """

    objects: torch.Tensor
    locations: torch.Tensor


@torch.no_grad()
def select_positives(
    assigned: torch.Tensor,
    predicted: torch.Tensor,
    boxes: torch.Tensor,
    *,
    proposals: Literal["mean", "best"],
    threshold: float,
    inclusive: bool,
) -> Positives:
    """Those locations of each object whose predicted boxes are good.

    Args:
        assigned: (L,) index of the object, -1 for background.
        predicted: (L, 4) corners.
        boxes: (G, 4) true corners.
        proposals: "mean", all with an IoU above the threshold, or where an object has none of these, all with its
            greatest; "best", the first with the greatest.
        threshold: see ``proposals``.
        inclusive: corners are the first and the last pixel.
    """
    locations = (assigned >= 0).nonzero()[:, 0]
    objects = assigned[locations]
    iou = paired_iou(predicted[locations], boxes[objects], 1.0 if inclusive else 0.0)
    best = iou.new_full((len(boxes),), -1.0).scatter_reduce(0, objects, iou, "amax")
    keep = iou == best[objects]
    if proposals == "mean":
        keep = torch.where(best[objects] > threshold, iou > threshold, keep)
    else:
        # the first of equal ones
        order = torch.arange(len(objects), device=objects.device)
        first = torch.full_like(best, len(objects), dtype=torch.int64)
        keep &= order == first.scatter_reduce(0, objects[keep], order[keep], "amin")[objects]
    objects, locations = objects[keep], locations[keep]
    order = torch.argsort(objects, stable=True)
    return Positives(objects[order], locations[order])


def paired_iou(first: torch.Tensor, second: torch.Tensor, extent: float) -> torch.Tensor:
    """(n,) IoU of (n, 4) corners one by one; ``extent`` is added to every side."""
    sides = torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2]) + extent
    intersection = sides.clamp(min=0).prod(dim=1)
    areas = [(x[:, 2:] - x[:, :2] + extent).prod(dim=1) for x in (first, second)]
    return intersection / (areas[0] + areas[1] - intersection)


def mask_targets(masks: torch.Tensor, size: Size, stride: int) -> torch.Tensor:
    """(G, h, w) bool: where the masks, reduced bilinearly by the stride, are above 0.

    Reducing by an even factor reads the four pixels in the middle of each cell.

    Args:
        masks: (G, H, W) bool, of the image without padding.
        size: (h, w), of the padded image.
        stride: of the masks, 1 or even.
    """
    if not len(masks):
        return torch.zeros(0, *size, dtype=torch.bool, device=masks.device)
    padded = F.pad(masks, (0, size[1] * stride - masks.shape[2], 0, size[0] * stride - masks.shape[1]))
    if stride == 1:
        return padded
    rows = padded[:, stride // 2 - 1 :: stride] | padded[:, stride // 2 :: stride]
    return rows[:, :, stride // 2 - 1 :: stride] | rows[:, :, stride // 2 :: stride]


def training_cells(boxes: torch.Tensor, size: Size, stride: int, padding: float) -> torch.Tensor:
    """(G, 4) int64: the cells (x1, y1, x2, y2; the last two excluded) of each object that the mask loss looks at.

    The release's rule: less than the padding and one cell away from the box, and never the last column or row.

    Args:
        boxes: (G, 4) true corners, in pixels.
        size: (h, w).
        stride: of the masks.
        padding: share of the sides; below 0: the whole map.
    """
    limits = boxes.new_tensor([size[1], size[0]])
    if padding < 0:
        return torch.cat([torch.zeros_like(boxes[:, :2]), limits.expand(len(boxes), 2)], dim=1).long()
    cells = boxes / stride
    reach = padding * (cells[:, 2:] - cells[:, :2]) + 1
    first = (cells[:, :2] - reach).clamp(min=0)
    last = (cells[:, 2:] + reach).minimum(limits - 1)
    return torch.cat([first, last], dim=1).ceil().long()
