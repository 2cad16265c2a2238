"""Several scales and flipped images at test time, as in the release: all their RoIs vote together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from convmask.inference import ViewOptions, views_of

from .inference import RoiPredictions


def augmented_predictions(
    predict: Callable[[list[dict[str, Any]]], list[RoiPredictions]],
    inputs: dict[str, Any],
    options: ViewOptions,
    offset: int,
) -> RoiPredictions:
    """The RoIs of all views of one image, in pixels of the output.

    Args:
        predict: gives the RoIs of a batch of inputs, in pixels of the output.
        inputs: Detectron2's dict of one image.
        options: see :class:`ViewOptions`.
        offset: of the boxes' convention.
    """
    found = []
    for view in views_of(inputs, options):
        predictions = predict([view.inputs])[0]
        found.append(unflip(predictions, view.inputs["width"], offset) if view.flipped else predictions)
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
