"""Model outputs in Detectron2's formats, made from panoptic segmentations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from .oracle import CATEGORY_IDS, perturb


def panoptic_output(name: str, id_map: np.ndarray, segments: list[dict[str, Any]]) -> dict[str, Any]:
    """``panoptic_seg`` of a segmentation whose segments hold the dataset's category ids."""
    metadata = MetadataCatalog.get(name)
    things, stuff = metadata.thing_dataset_id_to_contiguous_id, metadata.stuff_dataset_id_to_contiguous_id
    segments_info = [
        {
            "id": segment["id"],
            "isthing": segment["category_id"] in things,
            "category_id": (things if segment["category_id"] in things else stuff)[segment["category_id"]],
        }
        for segment in segments
    ]
    return {"panoptic_seg": (torch.as_tensor(id_map.astype(np.int32)), segments_info)}


def instances_output(masks: np.ndarray, classes: list[int], scores: list[float]) -> dict[str, Any]:
    """``instances`` with the tight boxes of (N, H, W) masks, none of them empty."""
    instances = Instances(masks.shape[1:])
    boxes = []
    for mask in masks:
        rows, columns = np.nonzero(mask)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.pred_masks = torch.as_tensor(masks).bool()
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    instances.scores = torch.tensor(scores, dtype=torch.float32)
    return {"instances": instances}


def inputs_of(name: str) -> list[dict[str, Any]]:
    """What the test loader gives a model, without the pixels."""
    keys = ("file_name", "image_id", "height", "width")
    return [{key: record[key] for key in keys if key in record} for record in DatasetCatalog.get(name)]


def perturbed_outputs(name: str, images: list[Any], seed: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """One output of a fictitious model for each image, and the (map, segments) behind it."""
    rng = np.random.default_rng(seed)
    predictions = [perturb(rng, *image, CATEGORY_IDS) for image in images]
    return [panoptic_output(name, *prediction) for prediction in predictions], predictions
