"""One panoptic map from the instances and the semantic map of an image (arXiv 1901.02446, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.structures import Instances

from convmask.ops import panoptic_merge


def panoptic_segmentation(
    instances: Instances,
    sem_seg: torch.Tensor,
    *,
    overlap_threshold: float = 0.5,
    stuff_area_limit: int = 4096,
    score_threshold: float = 0.5,
    stuff_labels: Sequence[int] | None = None,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Paints instances in the order of their scores, then stuff where nothing is painted.

    Args:
        instances: of one image, at output size: ``pred_masks`` (N, H, W) bool, ``scores`` (N,), ``pred_classes`` (N,).
        sem_seg: logits or probabilities (C, H, W) of the same image.
        overlap_threshold: an instance of which a larger share is already painted is dropped.
        stuff_area_limit: stuff classes that cover fewer pixels of the output are dropped.
        score_threshold: instances with a lower score are dropped.
        stuff_labels: the semantic label of each stuff class 1..S; pixels of all other labels are not painted. By
            default label 0 is "things" and the other labels are the stuff classes.

    Returns:
        The id map (H, W) int32, 0 where nothing was painted, and Detectron2's ``segments_info``; category ids of stuff
        are 1..S whichever labels ``sem_seg`` has.
    """
    labels = sem_seg.argmax(dim=0)
    if stuff_labels is not None:
        class_of_label = labels.new_zeros(len(sem_seg))
        class_of_label[list(stuff_labels)] = torch.arange(1, len(stuff_labels) + 1, device=labels.device)
        labels = class_of_label[labels]
    return panoptic_merge(
        instances.pred_masks,
        instances.scores,
        instances.pred_classes,
        labels,
        overlap_threshold=overlap_threshold,
        stuff_area_limit=stuff_area_limit,
        score_threshold=score_threshold,
    )
