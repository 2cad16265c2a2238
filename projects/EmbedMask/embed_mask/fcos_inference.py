"""From the predictions of FCOS to boxes of one image: candidates of each level, class-wise NMS, the best ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torchvision.ops import nms

from .fcos_head import FCOSOutputs
from .fcos_targets import Locations, decode


@dataclass(frozen=True)
class FCOSInferenceOptions:
    """See the keys of ``MODEL.EMBED_MASK.INFERENCE``.

    Attributes:
        score_threshold: least class probability.
        pre_nms_topk: most candidates of a level.
        nms_threshold: greatest IoU of boxes of one class.
        detections: most boxes of an image.
        inclusive: corners are the first and the last pixel.
    """

    score_threshold: float = 0.05
    pre_nms_topk: int = 1000
    nms_threshold: float = 0.6
    detections: int = 100
    inclusive: bool = True


class Detections(NamedTuple):
    """Boxes of an image, in descending order of score.

    Attributes:
        boxes: (n, 4) corners in pixels of the image that the network saw, cut to it.
        scores: (n,).
        classes: (n,) int64.
        locations: (n,) int64, the locations that predicted them.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    classes: torch.Tensor
    locations: torch.Tensor


def detect(
    outputs: FCOSOutputs, locations: Locations, image_sizes: Sequence[tuple[int, int]], options: FCOSInferenceOptions
) -> list[Detections]:
    """Detections of each image.

    Args:
        outputs: of a batch, in single precision.
        locations: of its levels.
        image_sizes: height and width of each image without padding.
        options: see :class:`FCOSInferenceOptions`.
    """
    distances = outputs.pixel_distances()
    results = []
    for index, (height, width) in enumerate(image_sizes):
        parts = []
        first = 0
        for logits, centerness in zip(outputs.logits, outputs.centerness, strict=True):
            scores, classes, cells = _candidates(logits[index], centerness[index], options)
            parts.append((scores, classes, cells + first))
            first += centerness.shape[2] * centerness.shape[3]
        scores, classes, chosen = (torch.cat(part) for part in zip(*parts, strict=True))
        boxes = decode(locations.points[chosen], distances[index, chosen])
        extent = 1.0 if options.inclusive else 0.0
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]) - extent)
        keep = _class_wise_nms(boxes, scores, classes, options.nms_threshold, extent)[: options.detections]
        results.append(Detections(boxes[keep], scores[keep], classes[keep], chosen[keep]))
    return results


def _candidates(
    logits: torch.Tensor, centerness: torch.Tensor, options: FCOSInferenceOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, classes and flat cells of a level's best (class, location) pairs, from (C, H, W) and (1, H, W) logits."""
    probabilities = logits.sigmoid().flatten(1)
    classes, cells = (probabilities > options.score_threshold).nonzero().unbind(1)
    scores = probabilities[classes, cells] * centerness.sigmoid().flatten()[cells]
    scores, order = scores.topk(min(options.pre_nms_topk, len(scores)))
    return scores, classes[order], cells[order]


def _class_wise_nms(
    boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, threshold: float, extent: float
) -> torch.Tensor:
    """Indices that are kept, in descending order of score.

    Boxes of different classes are moved apart, in double precision: in single precision the coordinates would lose
    their fractions.
    """
    if not len(boxes):
        return classes
    moved = boxes.double()
    moved[:, 2:] += extent
    moved += (classes * (moved.max() + 2))[:, None]
    return nms(moved, scores.double(), threshold)


def to_instances(detections: Detections, image: tuple[int, int], output: tuple[int, int], inclusive: bool) -> Instances:
    """``pred_boxes`` (Detectron2's corners), ``scores`` and ``pred_classes`` at the size of the output.

    Args:
        detections: of an image.
        image: height and width that the network saw, without padding.
        output: height and width of the result.
        inclusive: corners of the detections are the first and the last pixel.
    """
    scale = detections.boxes.new_tensor([output[1] / image[1], output[0] / image[0]] * 2)
    corners = detections.boxes * scale
    if inclusive:
        corners[:, 2:] += 1
    instances = Instances(output)
    instances.pred_boxes = Boxes(corners)
    instances.pred_boxes.clip(output)
    instances.scores = detections.scores
    instances.pred_classes = detections.classes
    return instances
