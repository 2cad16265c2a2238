"""One panoptic map from the instances and the semantic map of an image (arXiv 1801.00868, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.structures import Instances


def panoptic_segmentation(
    instances: Instances,
    sem_seg: torch.Tensor,
    *,
    overlap_threshold: float = 0.5,
    stuff_area_limit: int = 4096,
    score_threshold: float = 0.5,
    num_thing_labels: int = 1,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Paints instances in the order of their scores, then stuff where nothing is painted.

    Args:
        instances: of one image, at output size: ``pred_masks`` (N, H, W) bool, ``scores`` (N,), ``pred_classes`` (N,).
        sem_seg: logits or probabilities (C, H, W) of the same image.
        overlap_threshold: an instance of which a larger share is already painted is dropped.
        stuff_area_limit: stuff labels that cover fewer pixels of the output are dropped.
        score_threshold: instances with a lower score are dropped.
        num_thing_labels: the first labels of ``sem_seg`` are things and never painted: 1 for the label "things", or the
            number of thing classes where the semantic branch predicts all classes.

    Returns:
        The id map (H, W) int32, 0 where nothing was painted, and Detectron2's ``segments_info``; category ids of stuff
        are 1..S whichever labels ``sem_seg`` has.
    """
    labels = sem_seg.argmax(dim=0)
    if num_thing_labels != 1:
        # all thing labels become 0, stuff labels 1..S
        labels = (labels - (num_thing_labels - 1)).clamp(min=0)
    return combine_semantic_and_instance_outputs(
        instances, labels, overlap_threshold, stuff_area_limit, score_threshold
    )
