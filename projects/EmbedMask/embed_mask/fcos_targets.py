"""Which location learns which object (arXiv 1904.01355, sections 3.1 and 3.2).

Shapes: N images, L locations of all levels (level after level, row by row), G objects of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from detectron2.structures import Instances

BACKGROUND = -1


@dataclass(frozen=True)
class TargetOptions:
    """See the keys of ``MODEL.EMBED_MASK.FCOS``.

    Attributes:
        num_classes: C.
        sizes_of_interest: greatest distance of each level but the last, in pixels.
        center_radius: in strides; 0: the whole box.
        sample_in_mask: positives lie on the mask.
        inclusive: corners are the first and the last pixel.
    """

    num_classes: int
    sizes_of_interest: tuple[float, ...] = (64, 128, 256, 512)
    center_radius: float = 1.5
    sample_in_mask: bool = True
    inclusive: bool = True


class Locations(NamedTuple):
    """The locations of all levels.

    Attributes:
        points: (L, 2) x and y in pixels.
        strides: (L,) of their levels.
        levels: (L,) indices of their levels.
    """

    points: torch.Tensor
    strides: torch.Tensor
    levels: torch.Tensor


class FCOSTargets(NamedTuple):
    """Targets of a batch.

    Attributes:
        classes: (N, L) int64, -1 for background.
        objects: (N, L) int64, index of the object in its image, -1 for background.
        distances: (N, L, 4) left, top, right, bottom to the sides of its box, in pixels; 0 on background.
        boxes: for each image (G, 4) corners, by ``TargetOptions.inclusive``.
    """

    classes: torch.Tensor
    objects: torch.Tensor
    distances: torch.Tensor
    boxes: list[torch.Tensor]


def make_locations(sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device) -> Locations:
    """The locations of levels of (H_l, W_l) cells: the centres of the cells, rounded down to whole pixels."""
    points, of_level, indices = [], [], []
    for index, ((height, width), stride) in enumerate(zip(sizes, strides, strict=True)):
        y = torch.arange(height, device=device) * stride + stride // 2
        x = torch.arange(width, device=device) * stride + stride // 2
        grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
        points.append(grid.reshape(-1, 2).float())
        of_level.append(torch.full((height * width,), float(stride), device=device))
        indices.append(torch.full((height * width,), index, device=device))
    return Locations(torch.cat(points), torch.cat(of_level), torch.cat(indices))


def decode(points: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """Corners (..., 4) from points (..., 2) and distances (..., 4), all in pixels."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def corners(instances: Instances, inclusive: bool) -> torch.Tensor:
    """(G, 4) corners of ``gt_boxes``, in the convention of the targets."""
    boxes = instances.gt_boxes.tensor.float()
    return boxes - boxes.new_tensor([0.0, 0.0, 1.0, 1.0]) if inclusive else boxes


@torch.no_grad()
def make_targets(instances: Sequence[Instances], locations: Locations, options: TargetOptions) -> FCOSTargets:
    """Assigns the locations of each image.

    Args:
        instances: of each image, ``gt_boxes``, ``gt_classes`` and, for ``sample_in_mask``, ``gt_masks`` (BitMasks).
        locations: see :class:`Locations`.
        options: see :class:`TargetOptions`.

    Raises:
        ValueError: a class is out of range, or masks are needed and not there; the message names the config key.
    """
    boxes = [corners(x, options.inclusive) for x in instances]
    found = []
    for x, box in zip(instances, boxes, strict=True):
        _check(x, options)
        found.append(_assign(x, box, locations, options))
    classes, objects, distances = (torch.stack(parts) for parts in zip(*found, strict=True))
    return FCOSTargets(classes, objects, distances, boxes)


def _check(instances: Instances, options: TargetOptions) -> None:
    if not len(instances):
        return
    greatest = int(instances.gt_classes.max())
    if greatest >= options.num_classes:
        raise ValueError(f"MODEL.EMBED_MASK.NUM_CLASSES is {options.num_classes}, but an object has class {greatest}")
    if options.sample_in_mask and not instances.has("gt_masks"):
        raise ValueError("MODEL.EMBED_MASK.FCOS.SAMPLE_IN_MASK needs masks, but an image has boxes alone")


def _assign(
    instances: Instances, boxes: torch.Tensor, locations: Locations, options: TargetOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(L,) classes, (L,) objects and (L, 4) distances of one image."""
    points = locations.points
    if not len(boxes):
        background = torch.full((len(points),), BACKGROUND, dtype=torch.int64, device=points.device)
        return background, background.clone(), points.new_zeros(len(points), 4)
    distances = torch.cat([points[:, None] - boxes[:, :2], boxes[:, 2:] - points[:, None]], dim=2)
    candidate = _in_center(distances, boxes, locations, options.center_radius)
    candidate &= _in_range(distances.amax(dim=2), locations.levels, options.sizes_of_interest)
    if options.sample_in_mask:
        candidate &= _on_mask(instances.gt_masks.tensor, points)
    extent = 1.0 if options.inclusive else 0.0
    areas = (boxes[:, 2:] - boxes[:, :2] + extent).prod(dim=1).expand(len(points), len(boxes))
    smallest = areas.masked_fill(~candidate, float("inf")).argmin(dim=1)  # the first of equal ones
    positive = candidate.any(dim=1)
    objects = torch.where(positive, smallest, BACKGROUND)
    classes = torch.where(positive, instances.gt_classes[smallest], BACKGROUND)
    chosen = distances[torch.arange(len(points), device=points.device), smallest]
    return classes, objects, chosen * positive[:, None]


def _in_center(distances: torch.Tensor, boxes: torch.Tensor, locations: Locations, radius: float) -> torch.Tensor:
    """(L, G): strictly inside the box, and nearer to its centre than the radius in x and in y."""
    inside = distances.amin(dim=2) > 0
    if radius <= 0:
        return inside
    offsets = (locations.points[:, None] - (boxes[:, :2] + boxes[:, 2:]) / 2).abs().amax(dim=2)
    return inside & (offsets < radius * locations.strides[:, None])


def _in_range(greatest: torch.Tensor, levels: torch.Tensor, sizes: Sequence[float]) -> torch.Tensor:
    """(L, G): the greatest distance suits the level; both ends of its range do."""
    limits = greatest.new_tensor([-1.0, *sizes, 1e8])
    return (greatest >= limits[levels, None]) & (greatest <= limits[levels + 1, None])


def _on_mask(masks: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """(L, G): the pixel is on the mask; points beyond the image, in the padding, are not."""
    x, y = points.long().unbind(1)
    height, width = masks.shape[1:]
    inside = (x < width) & (y < height)
    return masks[:, y.clamp(max=height - 1), x.clamp(max=width - 1)].T & inside[:, None]


def instances_of(batched_inputs: list[dict[str, Any]], device: torch.device) -> list[Instances]:
    """``instances`` of each image, on ``device``.

    Raises:
        ValueError: an image has none; the message names it.
    """
    for inputs in batched_inputs:
        if "instances" not in inputs:
            raise ValueError(
                f"no 'instances' for image {inputs.get('file_name', '')!r}: check INPUT.TARGETS and the dataset"
            )
    return [x["instances"].to(device) for x in batched_inputs]
