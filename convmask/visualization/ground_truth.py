"""The ground truth of an image in the form of a prediction, so that both are drawn by the same code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from detectron2.utils.visualizer import GenericMask

from convmask.data.images import read_image, read_panoptic_map, read_semantic_map


def ground_truth(dataset_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the annotation of one image.

    Args:
        dataset_dict: an entry of a registered panoptic, instance or semantic set.

    Returns:
        ``panoptic_seg`` (id map (H, W) int32, segment dicts), or ``sem_seg`` labels (H, W) and ``instances``, as far as
        they are annotated.

    Raises:
        DatasetError: a file is missing or unreadable.
    """
    if "pan_seg_file_name" in dataset_dict:
        id_map = read_panoptic_map(dataset_dict["pan_seg_file_name"])
        return {"panoptic_seg": (torch.from_numpy(id_map), dataset_dict["segments_info"])}
    truth: dict[str, Any] = {}
    if "sem_seg_file_name" in dataset_dict:
        truth["sem_seg"] = read_semantic_map(dataset_dict["sem_seg_file_name"])
    if "annotations" in dataset_dict:
        truth["instances"] = _annotated_instances(dataset_dict)
    return truth


def _annotated_instances(dataset_dict: Mapping[str, Any]) -> Instances:
    if "height" in dataset_dict:
        height, width = int(dataset_dict["height"]), int(dataset_dict["width"])
    else:
        height, width = read_image(dataset_dict["file_name"], "RGB").shape[:2]
    annotations = [item for item in dataset_dict["annotations"] if "segmentation" in item]
    masks = [GenericMask(item["segmentation"], height, width).mask for item in annotations]
    instances = Instances((height, width))
    instances.pred_masks = torch.from_numpy(np.stack(masks) if masks else np.zeros((0, height, width))).bool()
    instances.pred_classes = torch.tensor([int(item["category_id"]) for item in annotations], dtype=torch.int64)
    return instances
