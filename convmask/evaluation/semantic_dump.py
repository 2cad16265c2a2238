"""Semantic predictions on disk in the format of Detectron2's ``SemSegEvaluator``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from convmask.utils.files import write_atomically
from convmask.utils.label_runs import encode_masks

FILE_NAME = "sem_seg_predictions.json"


def encode_labels(labels: np.ndarray, file_name: str, category_ids: Mapping[int, int]) -> list[dict[str, Any]]:
    """An entry for each label of an image: ``file_name``, ``category_id``, ``segmentation`` (RLE).

    Args:
        labels: (H, W) integers.
        file_name: of the image.
        category_ids: label to the dataset's category id.
    """
    present = np.unique(labels).tolist()
    return [
        {"file_name": file_name, "category_id": category_ids[label], "segmentation": mask}
        for label, mask in zip(present, encode_masks(labels, present), strict=True)
    ]


def write_labels(output_dir: str, entries: list[dict[str, Any]]) -> None:
    """Writes the entries of all images into ``sem_seg_predictions.json``."""
    os.makedirs(output_dir, exist_ok=True)
    write_atomically(os.path.join(output_dir, FILE_NAME), json.dumps(entries).encode())
