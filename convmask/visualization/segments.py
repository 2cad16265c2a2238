"""Predictions and ground truth of every kind as one list of labelled, coloured segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.structures import Instances
from scipy import ndimage

from convmask.visualization.colors import Color, class_color, object_color

_IGNORE = 255


@dataclass(frozen=True)
class Segment:
    """A region of an image with one label.

    Attributes:
        mask: (h, w) bool, cut to the segment's bounding box; at least one pixel is set.
        top, left: where the cut lies in the image, in pixels.
        name: of the class.
        score: 0 to 1, or None for ground truth and stuff.
        color: of the segment.
        is_thing: an object, not stuff.
    """

    mask: np.ndarray
    top: int
    left: int
    name: str
    score: float | None
    color: Color
    is_thing: bool


def segments_of(prediction: Mapping[str, Any], metadata: Metadata, threshold: float = 0.0) -> list[Segment]:
    """The segments of a prediction in Detectron2's format, or of :func:`~convmask.visualization.ground_truth`.

    The panoptic result is preferred. Without one, objects follow the semantic map, as far as both are there.

    Args:
        prediction: any of ``panoptic_seg`` (id map (H, W), list of segment dicts), ``sem_seg`` (logits (C, H, W) or
            labels (H, W)) and ``instances`` (``pred_classes``, and ``pred_masks`` or ``pred_boxes``).
        metadata: of the data set, for names and colours.
        threshold: objects with a lower score are left out.
    """
    if prediction.get("panoptic_seg") is not None:
        id_map, segments_info = prediction["panoptic_seg"]
        return panoptic_segments(_numpy(id_map), segments_info, metadata, threshold)
    segments: list[Segment] = []
    if prediction.get("sem_seg") is not None:
        segments += semantic_segments(prediction["sem_seg"], metadata)
    if prediction.get("instances") is not None:
        segments += instance_segments(prediction["instances"], metadata, threshold)
    return segments


def panoptic_segments(
    id_map: np.ndarray, segments_info: Sequence[Mapping[str, Any]], metadata: Metadata, threshold: float = 0.0
) -> list[Segment]:
    """Segments of an id map (H, W); ids that ``segments_info`` does not name are void and left out."""
    wanted = {
        int(info["id"]): info
        for info in segments_info
        if info.get("score") is None or not info["isthing"] or info["score"] >= threshold
    }
    ids, dense = np.unique(id_map, return_inverse=True)
    # Labels from 1: find_objects takes 0 for background.
    dense = dense.reshape(id_map.shape) + 1
    segments = []
    for label, box in enumerate(ndimage.find_objects(dense), start=1):
        info = wanted.get(int(ids[label - 1]))
        if info is None:
            continue
        mask = dense[box] == label
        score = float(info["score"]) if info["isthing"] and info.get("score") is not None else None
        segments.append(
            _segment(mask, box, id_map.shape, int(info["category_id"]), bool(info["isthing"]), score, metadata)
        )
    return segments


def instance_segments(instances: Instances, metadata: Metadata, threshold: float = 0.0) -> list[Segment]:
    """Segments of objects; a box stands in for a mask that is not there. Objects without a pixel are left out."""
    height, width = instances.image_size
    count = len(instances)
    scores: list[float] | None = instances.scores.tolist() if instances.has("scores") else None
    classes = instances.pred_classes.tolist() if instances.has("pred_classes") else [0] * count
    segments = []
    for i in range(count):
        score = None if scores is None else scores[i]
        if score is not None and score < threshold:
            continue
        if instances.has("pred_masks"):
            mask = _numpy(instances.pred_masks[i]).astype(bool)
        else:
            mask = _box_mask(instances.pred_boxes.tensor[i].tolist(), height, width)
        found = ndimage.find_objects(mask.astype(np.uint8))
        if found:
            box = found[0]
            segments.append(_segment(mask[box], box, (height, width), int(classes[i]), True, score, metadata))
    return segments


def semantic_segments(sem_seg: torch.Tensor | np.ndarray, metadata: Metadata) -> list[Segment]:
    """One segment per class of a semantic map; the class "things" of Detectron2's layout is left out.

    Args:
        sem_seg: logits (C, H, W), or labels (H, W) with 255 for pixels without one.
        metadata: if there are more channels (or labels) than ``stuff_classes``, the things come first.
    """
    values = _numpy(sem_seg)
    labels = values.argmax(axis=0) if values.ndim == 3 else values
    stuff = list(metadata.get("stuff_classes", None) or [])
    things = list(metadata.get("thing_classes", None) or [])
    separated = bool(stuff) and stuff[0] == "things"
    valid = labels[labels != _IGNORE]
    classes = values.shape[0] if values.ndim == 3 else int(valid.max(initial=-1)) + 1
    # Layout "all": things 0..T-1, then stuff without the class "things".
    all_layout = separated and classes > len(stuff)
    segments = []
    for label in np.unique(valid).tolist():
        is_thing = all_layout and label < len(things)
        index = label - len(things) + 1 if all_layout and not is_thing else label
        if separated and index == 0 and not is_thing:
            continue
        mask = labels == label
        box = ndimage.find_objects(mask.astype(np.uint8))[0]
        segment = _segment(mask[box], box, labels.shape, index, is_thing, None, metadata, vary=False)
        segments.append(segment)
    return segments


def _segment(
    mask: np.ndarray,
    box: tuple[slice, slice],
    size: tuple[int, ...],
    index: int,
    is_thing: bool,
    score: float | None,
    metadata: Metadata,
    vary: bool = True,
) -> Segment:
    names = metadata.get("thing_classes" if is_thing else "stuff_classes", None) or []
    color = class_color(metadata, index, is_thing)
    if is_thing and vary:
        rows, columns = np.nonzero(mask)
        center = (box[1].start + columns.mean()) / size[1], (box[0].start + rows.mean()) / size[0]
        color = object_color(color, center, one_class=len(names) == 1)
    name = names[index] if index < len(names) else f"class {index}"
    return Segment(mask, box[0].start, box[1].start, name, score, color, is_thing)


def _box_mask(box: Sequence[float], height: int, width: int) -> np.ndarray:
    x0, y0, x1, y1 = (round(value) for value in box)
    mask = np.zeros((height, width), dtype=bool)
    mask[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
    return mask


def _numpy(array: torch.Tensor | np.ndarray) -> np.ndarray:
    return array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
