"""The best of many in a number of rows that does not depend on the data: candidates, NMS, results.

What is absent has the score ``ABSENT``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torchvision.ops import nms

ABSENT = -math.inf
# Most (RoI, class) pairs that go into the NMS of a program.
MOST_CANDIDATES = 8192


def best(scores: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest of (K,) scores in ``limit`` rows: scores, descending, and indices; ``ABSENT`` and 0 in what is left.

    Of equal scores the first comes first, as ``torch.topk`` does not promise: RoIs that are rounded to the same pixels
    have equal scores. K may be smaller than the limit.
    """
    if not isinstance(scores.shape[0], int) or scores.shape[0] < limit:
        scores = torch.cat([scores, scores.new_full((limit,), ABSENT)])
    values, indices = (x[:limit] for x in scores.sort(stable=True, descending=True))
    return values, torch.where(values > ABSENT, indices, 0)


def valid_first(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows (N, ...) in their order, but those that are not ``valid`` last."""
    valid = found["valid"]
    place = -torch.arange(valid.shape[0], device=valid.device, dtype=torch.float32)
    value, order = best(torch.where(valid, place, ABSENT), valid.shape[0])
    return {**{name: x[order] for name, x in found.items()}, "valid": value > ABSENT}


def survivors(
    boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, num_groups: int, threshold: float
) -> torch.Tensor:
    """(K,) bool: which boxes NMS keeps, each group by itself; none that is absent.

    Boxes of different groups are moved apart, to the fields of a square: in a row the coordinates would lose most of
    their fractions in single precision, the only one that ONNX has for NMS.

    Args:
        boxes: (K, 4) float32 corners, at least 0.
        scores: (K,) float32.
        groups: (K,) int64, from 0 to ``num_groups`` - 1.
        num_groups: there are.
        threshold: boxes with a larger IoU with one of a higher score are dropped.
    """
    present = scores > ABSENT
    boxes = torch.where(present[:, None], boxes, 0.0)
    if num_groups > 1:
        side = math.ceil(math.sqrt(num_groups))
        fields = torch.stack([groups % side, torch.div(groups, side, rounding_mode="floor")], dim=1)
        boxes = boxes + (fields.to(boxes.dtype) * (boxes.max() + 1)).repeat(1, 2)
    kept = nms(boxes, scores, threshold)
    return torch.zeros_like(present).index_fill(0, kept, True) & present


def anchors_of(generator: Any, level: int, feature: torch.Tensor) -> torch.Tensor:
    """(H W A, 4) anchors of a level (1, C, H, W), as Detectron2's ``DefaultAnchorGenerator`` lays them out.

    That itself calls ``meshgrid`` in a way that ``torch.export`` does not take.
    """
    cells = list(generator.cell_anchors)[level]
    stride, places = generator.strides[level], []
    for length in (feature.shape[3], feature.shape[2]):
        places.append((torch.arange(length, device=cells.device) + generator.offset) * stride)
    x, y = places[0][None, :].expand(feature.shape[2], -1), places[1][:, None].expand(-1, feature.shape[3])
    shifts = torch.stack([x, y, x, y], dim=-1)
    return (shifts[:, :, None] + cells).flatten(0, 2)


def clipped(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Boxes (..., 4) with coordinates from 0 to the sides, which may be symbols."""
    x, y = boxes[..., 0::2].clamp(min=0, max=width), boxes[..., 1::2].clamp(min=0, max=height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def boxes_around(masks: torch.Tensor) -> torch.Tensor:
    """(N, 4) float32 boxes around (N, H, W) bool masks, right and bottom excluded; zeros around an empty one."""
    sides = []
    for dim in (1, 2):  # columns, rows
        filled = masks.any(dim=dim)
        index = torch.arange(filled.shape[1], device=masks.device)
        first = torch.where(filled, index, filled.shape[1]).amin(dim=1)
        last = torch.where(filled, index + 1, 0).amax(dim=1)
        sides.append(torch.stack([torch.minimum(first, last), last], dim=1))
    return torch.stack(sides, dim=2).flatten(1).float()
