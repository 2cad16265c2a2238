"""A split of one annotation file into two, by image."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from convmask.data.errors import DatasetError


def split_by_image(content: dict[str, Any], share: float, file: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two COCO files, panoptic or of instances, out of one: for training, and for validation.

    Which images are for validation depends on their file names alone: those with the smallest hashes. More images, or
    another order, change as little as can be.

    Args:
        content: of the file; unchanged.
        share: of the images that are for validation, above 0 and below 1. At least one image is in either part.
        file: for messages.

    Raises:
        DatasetError: there are fewer than two images.
    """
    images = content["images"]
    if len(images) < 2:
        raise DatasetError(f"{file}: cannot be split: it has {len(images)} images")
    count = min(max(math.floor(share * len(images) + 0.5), 1), len(images) - 1)
    ranked = sorted(images, key=lambda image: hashlib.sha256(str(image["file_name"]).encode()).hexdigest())
    held_out = {image["id"] for image in ranked[:count]}
    parts = []
    for wanted in (False, True):
        chosen = {image["id"] for image in images if (image["id"] in held_out) == wanted}
        parts.append(
            {
                **content,
                "images": [image for image in images if image["id"] in chosen],
                "annotations": [a for a in content.get("annotations") or [] if a["image_id"] in chosen],
            }
        )
    return parts[0], parts[1]
