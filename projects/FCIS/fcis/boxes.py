"""Boxes by either release's counting. Detectron2's boxes, whose ends are excluded, are those of offset 0.

Shapes: boxes (..., 4) are x1, y1, x2, y2 in pixels; deltas (..., 4) are dx, dy, dw, dh.
"""

from __future__ import annotations

import torch
from torchvision.ops import box_iou

from .convention import Convention


def from_detectron(boxes: torch.Tensor, convention: Convention) -> torch.Tensor:
    """Detectron2's boxes in the convention."""
    return boxes - boxes.new_tensor([0, 0, convention.offset, convention.offset])


def to_detectron(boxes: torch.Tensor, convention: Convention) -> torch.Tensor:
    """Boxes of the convention as Detectron2's."""
    return boxes + boxes.new_tensor([0, 0, convention.offset, convention.offset])


def sides(boxes: torch.Tensor, convention: Convention) -> torch.Tensor:
    """(..., 2) widths and heights."""
    return boxes[..., 2:] - boxes[..., :2] + convention.offset


def encode(boxes: torch.Tensor, targets: torch.Tensor, convention: Convention) -> torch.Tensor:
    """The deltas from ``boxes`` (N, 4) to ``targets`` (N, 4)."""
    size, target_size = sides(boxes, convention), sides(targets, convention)
    centre, target_centre = _centres(boxes, size, convention), _centres(targets, target_size, convention)
    if convention.offset:
        divisor, ratio = size + convention.epsilon, target_size / size
    else:
        divisor = size.clamp(min=convention.epsilon)
        ratio = target_size.clamp(min=convention.epsilon) / divisor
    return torch.cat([(target_centre - centre) / divisor, ratio.log()], dim=-1)


def decode(boxes: torch.Tensor, deltas: torch.Tensor, convention: Convention) -> torch.Tensor:
    """``boxes`` (N, 4) moved by ``deltas`` (N, 4). The growth is not limited, as in the releases."""
    size = sides(boxes, convention)
    centre = _centres(boxes, size, convention) + deltas[..., :2] * size
    half = 0.5 * (deltas[..., 2:].exp() * size - convention.offset)
    return torch.cat([centre - half, centre + half], dim=-1)


def clip(boxes: torch.Tensor, image_size: tuple[int, int], convention: Convention) -> torch.Tensor:
    """Boxes within an image of (height, width): to [0, width - offset] and [0, height - offset]."""
    height, width = image_size
    limit = boxes.new_tensor([width - convention.offset, height - convention.offset]).repeat(2)
    return torch.minimum(boxes.clamp(min=0), limit)


def pairwise_iou(first: torch.Tensor, second: torch.Tensor, convention: Convention) -> torch.Tensor:
    """(N, M) IoU of (N, 4) and (M, 4) boxes, in float64: ties decide which anchors are positive."""
    return box_iou(to_detectron(first.double(), convention), to_detectron(second.double(), convention))


def _centres(boxes: torch.Tensor, size: torch.Tensor, convention: Convention) -> torch.Tensor:
    return boxes[..., :2] + 0.5 * (size - convention.offset)
