"""From RoIs to instances: voting and pasting.

Shapes: M RoIs, C classes with background, masks of P x P. Boxes are by the convention unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes, Instances
from torch.nn import functional as F
from torchvision.ops import batched_nms

from convmask.ops import mask_voting
from convmask.ops.mask_voting import Procedure

from .boxes import clip, from_detectron, sides, to_detectron
from .convention import MXNET, Convention

Size = tuple[int, int]
PASTES = ("release", "detectron2")


@dataclass(frozen=True)
class InferenceOptions:
    """See the keys of ``MODEL.FCIS``, ``MODEL.ROI_HEADS`` and ``TEST``.

    Attributes:
        rounds: 1 or 2.
        min_size: of RoIs, in pixels of the input.
        score_threshold: least score of a result.
        nms_threshold: IoU of results of one class.
        max_detections: of an image.
        voting: whether RoIs vote.
        merge_threshold: IoU of RoIs that vote.
        procedure: of the mxnet convention, "gpu" or "cpu".
        binary_threshold: of masks.
        paste: "release" or "detectron2".
    """

    rounds: int = 2
    min_size: float = 2.0
    score_threshold: float = 1e-3
    nms_threshold: float = 0.3
    max_detections: int = 100
    voting: bool = True
    merge_threshold: float = 0.5
    procedure: str = "gpu"
    binary_threshold: float = 0.4
    paste: Literal["release", "detectron2"] = "release"


@dataclass
class RoiPredictions:
    """What all rounds predict for one image, before anything is dropped.

    Attributes:
        boxes: (M, 4) in pixels of the input.
        probabilities: (M, C).
        masks: (M, P, P) inside probabilities.
    """

    boxes: torch.Tensor
    probabilities: torch.Tensor
    masks: torch.Tensor

    def select(self, kept: torch.Tensor) -> RoiPredictions:
        """Some of them, by indices or a mask."""
        return RoiPredictions(self.boxes[kept], self.probabilities[kept], self.masks[kept])


def drop_small(predictions: RoiPredictions, min_size: float, convention: Convention) -> RoiPredictions:
    """Without RoIs that have a side shorter than ``min_size`` pixels of the input."""
    return predictions.select((sides(predictions.boxes, convention) >= min_size).all(dim=1))


def rescale(predictions: RoiPredictions, image: Size, output: Size, convention: Convention) -> RoiPredictions:
    """Boxes from an input of the size ``image`` to an output of the size ``output``, clipped to it.

    MXNet's end pixels are divided like all others, as the release does.
    """
    factor = predictions.boxes.new_tensor([image[1] / output[1], image[0] / output[0]]).repeat(2)
    return replace(predictions, boxes=clip(predictions.boxes / factor, output, convention))


def detect(
    predictions: RoiPredictions, image_size: Size, options: InferenceOptions, convention: Convention = MXNET
) -> Instances:
    """The instances of an image of (height, width), in whose pixels the boxes are.

    Returns:
        ``pred_boxes`` as Detectron2's, ``scores``, ``pred_classes`` without background, and ``pred_masks`` (n, 1, P,
        P), from 0 to 1, to be pasted into the boxes.
    """
    predictions = replace(predictions, masks=predictions.masks.float())
    boxes, scores, classes, masks = (_vote if options.voting else _suppress)(
        predictions, image_size, options, convention
    )
    result = Instances(image_size)
    result.pred_boxes = Boxes(to_detectron(boxes, convention))
    result.scores = scores
    result.pred_classes = classes - 1
    result.pred_masks = masks[:, None]
    return result


def _vote(
    predictions: RoiPredictions, image_size: Size, options: InferenceOptions, convention: Convention
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return mask_voting(
        predictions.masks,
        predictions.boxes,
        predictions.probabilities,
        image_size,
        nms_threshold=options.nms_threshold,
        merge_threshold=options.merge_threshold,
        binary_threshold=options.binary_threshold,
        score_threshold=max(options.score_threshold, 1e-12),
        max_detections=options.max_detections,
        procedure=cast(Procedure, options.procedure if convention.offset else "chainercv"),
    )


def _suppress(
    predictions: RoiPredictions, image_size: Size, options: InferenceOptions, convention: Convention
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """NMS by class alone; each result has its RoI's own mask, whatever class that is of."""
    roi, category = (predictions.probabilities[:, 1:] > options.score_threshold).nonzero(as_tuple=True)
    scores = predictions.probabilities[roi, category + 1]
    boxes = predictions.boxes[roi]
    kept = batched_nms(to_detectron(boxes, convention).float(), scores.float(), category, options.nms_threshold)
    kept = kept[: options.max_detections]
    return boxes[kept], scores[kept], category[kept] + 1, predictions.masks[roi[kept]]


def paste(instances: Instances, options: InferenceOptions, convention: Convention = MXNET) -> Instances:
    """``instances`` of :func:`detect` with ``pred_masks`` (n, H, W) bool, the size being theirs."""
    height, width = instances.image_size
    result = Instances((height, width), **instances.get_fields())
    masks = instances.pred_masks[:, 0]
    if options.paste == "detectron2":
        boxes = instances.pred_boxes.tensor.to(masks.dtype)
        if len(masks) == 0:
            result.pred_masks = masks.new_zeros(0, height, width, dtype=torch.bool)
        else:
            result.pred_masks = paste_masks_in_image(masks, boxes, (height, width), options.binary_threshold)
        return result
    boxes = from_detectron(instances.pred_boxes.tensor, convention)
    pixels = clip(boxes, (height, width), convention).round().long()
    pixels[:, 2:] += convention.offset
    result.pred_masks = paste_rounded(masks, pixels, (height, width), options.binary_threshold)
    return result


def paste_rounded(masks: torch.Tensor, boxes: torch.Tensor, size: Size, threshold: float) -> torch.Tensor:
    """(n, H, W) bool: masks (n, P, P), resized to boxes (n, 4) of whole pixels, ends excluded, at or above a threshold.

    A box of no pixels gives an empty mask.
    """
    result = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    for target, mask, (x1, y1, x2, y2) in zip(result, masks, boxes.tolist(), strict=True):
        if x2 > x1 and y2 > y1:
            whole = F.interpolate(mask[None, None], size=(y2 - y1, x2 - x1), mode="bilinear", align_corners=False)
            target[y1:y2, x1:x2] = whole[0, 0] >= threshold
    return result
