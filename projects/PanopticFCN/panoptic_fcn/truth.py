"""Upper bounds: annotations in the place of what the position head predicts (arXiv 2012.00720, table 9)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Instances
from torch.nn import functional as F

from .heads import HeadOutputs
from .targets import Size, TargetOptions, Targets, make_targets

# Logits of what is there and of what is not: sigmoids of almost 1 and 0.
_YES, _NO = 12.0, -12.0


def true_logits(
    outputs: HeadOutputs,
    instances: Sequence[Instances],
    sem_segs: Sequence[torch.Tensor],
    *,
    padded: Size,
    options: TargetOptions,
    positions: bool,
    classes: bool,
) -> HeadOutputs:
    """Head outputs with true positions, true classes, or both.

    Args:
        outputs: of a batch.
        instances: annotations, see :func:`make_targets`, as are the next two.
        sem_segs: see above.
        padded: see above.
        options: see :class:`TargetOptions`.
        positions: peaks are exactly at the true centres, of the class that is predicted there as the best; regions are
            the true ones.
        classes: a cell inside an instance has its scores, the best of all classes, in that instance's class alone. With
            ``positions`` each centre has its class.
    """
    targets = make_targets(
        instances,
        sem_segs,
        padded=padded,
        common=(outputs.encoded.shape[2], outputs.encoded.shape[3]),
        levels=[(x.shape[2], x.shape[3]) for x in outputs.centers],
        options=options,
    )
    centers = [
        _true_positions(logits, targets, level, classes) if positions else _true_classes(logits, targets)
        for level, logits in enumerate(outputs.centers)
    ]
    regions = outputs.regions
    if positions:
        regions = [torch.where(target > 0, _YES + target, _NO) for target in targets.regions]
    return outputs._replace(centers=centers, regions=regions)


def _true_positions(logits: torch.Tensor, targets: Targets, level: int, classes: bool) -> torch.Tensor:
    objects, member = targets.objects, targets.members[level]
    images, (rows, columns) = objects.images[member], targets.cells[level].unbind(1)
    label = objects.classes[member] if classes else logits[images, :, rows, columns].argmax(dim=1)
    result = torch.full_like(logits, _NO)
    result[images, label, rows, columns] = _YES
    return result


def _true_classes(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    size = logits.shape[-2:]
    objects = targets.objects
    masks = F.interpolate(objects.masks[:, None], size=size, mode="bilinear", align_corners=False)[:, 0] > 0.5
    best = logits.amax(dim=1, keepdim=True)
    count, labels = logits.shape[:2]
    inside = torch.zeros(count * labels, *size, device=logits.device)
    inside.index_add_(0, objects.images * labels + objects.classes, masks.float())
    inside = inside.view(count, labels, *size) > 0
    covered = inside.any(dim=1, keepdim=True)
    return torch.where(covered, torch.where(inside, best, _NO), logits)
