"""Several scales and flipped images at test time: all their RoIs vote together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.data.transforms import ResizeShortestEdge

from .inference import RoiPredictions


@dataclass(frozen=True)
class AugmentationOptions:
    """See Detectron2's keys ``TEST.AUG``.

    Attributes:
        min_sizes: shorter sides of the input, in pixels.
        max_size: limit of the longer side.
        flip: also mirrored images.
    """

    min_sizes: tuple[int, ...]
    max_size: int
    flip: bool = True


def augmented_predictions(
    predict: Callable[[list[dict[str, Any]]], list[RoiPredictions]],
    inputs: dict[str, Any],
    options: AugmentationOptions,
    offset: int,
) -> RoiPredictions:
    """The RoIs of all versions of one image, in pixels of the output.

    Scales are made from ``inputs["image"]``: set ``INPUT.MIN_SIZE_TEST`` to 0, which leaves images as they are, or to
    the largest scale.

    Args:
        predict: gives the RoIs of a batch of inputs, in pixels of the output.
        inputs: Detectron2's dict of one image.
        options: see :class:`AugmentationOptions`.
        offset: of the boxes' convention.
    """
    image = inputs["image"].permute(1, 2, 0).cpu().numpy()
    size = {"height": inputs.get("height", image.shape[0]), "width": inputs.get("width", image.shape[1])}
    found = []
    for min_size in options.min_sizes:
        transform = ResizeShortestEdge(min_size, options.max_size).get_transform(image)
        resized = np.ascontiguousarray(transform.apply_image(image).transpose(2, 0, 1))
        tensor = torch.from_numpy(resized)
        found += predict([{**inputs, **size, "image": tensor}])
        if options.flip:
            mirrored = predict([{**inputs, **size, "image": tensor.flip(2)}])[0]
            found.append(unflip(mirrored, size["width"], offset))
    return RoiPredictions(
        torch.cat([part.boxes for part in found]),
        torch.cat([part.probabilities for part in found]),
        torch.cat([part.masks for part in found]),
    )


def unflip(predictions: RoiPredictions, width: int, offset: int) -> RoiPredictions:
    """RoIs of a mirrored image in the image itself.

    Args:
        predictions: boxes in an image of this width.
        width: in pixels.
        offset: of the boxes' convention.
    """
    x1, y1, x2, y2 = predictions.boxes.unbind(dim=1)
    last = width - offset
    boxes = torch.stack([last - x2, y1, last - x1, y2], dim=1)
    return RoiPredictions(boxes, predictions.probabilities, predictions.masks.flip(2))
