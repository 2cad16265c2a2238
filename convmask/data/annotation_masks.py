"""Instance masks of COCO annotations: polygons and RLE, which may overlap, unlike the segments of an id map.

Shapes: H, W of the source image; H', W' after the transforms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances
from scipy import ndimage

from convmask.data.errors import DatasetError
from convmask.data.masks import BoolArray, IntArray, make_instances, segment_index, transform_id_map
from convmask.data.rle import checked_polygons, checked_rle

Box = tuple[slice, slice]

_XYXY = BoxMode.XYXY_ABS


def _rasterise_polygons(
    polygons: Sequence[Any],
    transforms: T.Transform | T.TransformList,
    source_size: tuple[int, int],
    target_size: tuple[int, int],
) -> npt.NDArray[np.uint8]:
    """(H', W'), 0 or 1. The corners are transformed, not the pixels; parts outside the image are cut."""
    lists = [polygon.tolist() if isinstance(polygon, np.ndarray) else polygon for polygon in polygons]
    moved = [
        np.asarray(transforms.apply_coords(np.array(polygon, dtype=np.float64).reshape(-1, 2))).reshape(-1)
        for polygon in checked_polygons(lists, *source_size)
    ]
    if not moved:
        return np.zeros(target_size, dtype=np.uint8)
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(moved, *target_size)))


def transform_mask(
    segmentation: Any,
    transforms: T.Transform | T.TransformList,
    source_size: tuple[int, int],
    target_size: tuple[int, int],
) -> BoolArray:
    """The mask of one COCO annotation after the transforms.

    Args:
        segmentation: polygons (a list of lists x, y, x, y, ...), or RLE (a dict with ``size`` and ``counts``).
        transforms: as applied to the image.
        source_size: (H, W).
        target_size: (H', W').

    Returns:
        (H', W').

    Raises:
        DatasetError: the segmentation is neither, or malformed. The message says what, not which file.
    """
    if isinstance(segmentation, Mapping):
        mask = mask_util.decode(checked_rle(segmentation, *source_size))
        moved = transforms.apply_segmentation(np.ascontiguousarray(mask))
    elif isinstance(segmentation, (list, tuple)):
        moved = _rasterise_polygons(segmentation, transforms, source_size, target_size)
    else:
        raise DatasetError(f"is neither a list of polygons nor an RLE: {segmentation!r:.80}")
    # Padding may be 255.
    return moved == 1


class _Layers:
    """RLE masks packed into id maps, those that do not overlap into one, so that few maps are transformed."""

    # An id map takes as much memory as four masks.
    LIMIT = 8

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size
        self._maps: list[IntArray] = []
        self._ids: list[list[int]] = []

    def add(self, identity: int, rle: Mapping[str, Any]) -> bool:
        """Packs a mask under an id of at least 1. Returns False where it overlaps something in every map."""
        x, y, width, height = mask_util.toBbox(rle).astype(int)
        box = (slice(y, y + height), slice(x, x + width))
        part = mask_util.decode(rle)[box].astype(bool)
        free = (k for k, layer in enumerate(self._maps) if not layer[box][part].any())
        chosen = next(free, len(self._maps))
        if chosen == self.LIMIT:
            return False
        if chosen == len(self._maps):
            self._maps.append(np.zeros(self._size, dtype=np.int32))
            self._ids.append([])
        self._maps[chosen][box][part] = identity
        self._ids[chosen].append(identity)
        return True

    def transformed(self, transforms: T.Transform | T.TransformList) -> Iterator[tuple[int, Box, BoolArray]]:
        """Of each mask that is left after the transforms: its id, its box in the image, and its part in the box."""
        for layer, ids in zip(self._maps, self._ids, strict=True):
            index = segment_index(transform_id_map(transforms, layer), ids)
            for number, box in enumerate(ndimage.find_objects(index, max_label=len(ids)), start=1):
                if box is not None:
                    yield ids[number - 1], box, index[box] == number


def instances_from_annotations(
    annotations: Sequence[Mapping[str, Any]],
    transforms: T.Transform | T.TransformList,
    source_size: tuple[int, int],
    target_size: tuple[int, int],
) -> Instances:
    """The instances of COCO annotations after the transforms, in their order; crowds and vanished ones are left out.

    Of each mask, only the part in its box is kept until all are known.

    Args:
        annotations: dicts with ``segmentation`` (polygons or RLE), ``category_id`` and optionally ``iscrowd``.
        transforms: as applied to the image.
        source_size: (H, W).
        target_size: (H', W').

    Returns:
        As :func:`convmask.data.masks.make_instances`.

    Raises:
        DatasetError: a segmentation is missing or malformed; the message names the annotation's place in the list.
    """
    layers = _Layers(source_size)
    parts: dict[int, tuple[Box, BoolArray]] = {}
    for position, annotation in enumerate(annotations):
        segmentation = annotation.get("segmentation")
        if annotation.get("iscrowd", 0):
            continue
        try:
            if isinstance(segmentation, Mapping):
                segmentation = checked_rle(segmentation, *source_size)
                if layers.add(position + 1, segmentation):
                    continue
            mask = transform_mask(segmentation, transforms, source_size, target_size)
        except DatasetError as error:
            raise DatasetError(f"annotations[{position}].segmentation: {error}") from error
        except Exception as error:
            raise DatasetError(f"annotations[{position}].segmentation cannot be decoded: {error!r}") from error
        box = ndimage.find_objects(mask.view(np.uint8), max_label=1)[0]
        if box is not None:
            parts[position] = box, mask[box].copy()
    for identity, box, part in layers.transformed(transforms):
        parts[identity - 1] = box, part
    return _assemble(parts, annotations, target_size)


def has_masks(annotations: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the annotations of an image are more than boxes. Crowds are never targets and do not count."""
    counted = [annotation for annotation in annotations if not annotation.get("iscrowd", 0)]
    return not counted or any(annotation.get("segmentation") is not None for annotation in counted)


def box_polygon(annotation: Mapping[str, Any]) -> list[list[float]]:
    """The box of an annotation as a COCO polygon.

    Raises:
        DatasetError: the box is missing or malformed.
    """
    try:
        x0, y0, x1, y1 = BoxMode.convert([float(v) for v in annotation["bbox"]], annotation["bbox_mode"], _XYXY)
    except (KeyError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        raise DatasetError(f"bbox is missing or malformed ({error!r:.80})") from error
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def instances_from_boxes(
    annotations: Sequence[Mapping[str, Any]], transforms: T.Transform | T.TransformList, target_size: tuple[int, int]
) -> Instances:
    """The instances of annotations that are boxes alone, in their order; crowds and vanished ones are left out.

    Args:
        annotations: dicts with ``bbox``, ``bbox_mode``, ``category_id`` and optionally ``iscrowd``.
        transforms: as applied to the image.
        target_size: (H', W').

    Returns:
        Instances of image size (H', W') with ``gt_boxes``, cut at the border of the image, and ``gt_classes``.

    Raises:
        DatasetError: a box is missing or malformed; the message names the annotation's place in the list.
    """
    boxes, classes = [], []
    for position, annotation in enumerate(annotations):
        if annotation.get("iscrowd", 0):
            continue
        try:
            corners = np.array(box_polygon(annotation), dtype=np.float64).reshape(4, 2)
        except DatasetError as error:
            raise DatasetError(f"annotations[{position}]: {error}") from error
        box = transforms.apply_box(corners[[0, 2]].reshape(1, 4))[0]
        boxes.append(np.clip(box, 0, [*target_size[::-1], *target_size[::-1]]))
        classes.append(int(annotation["category_id"]))
    instances = Instances(target_size)
    instances.gt_boxes = Boxes(torch.as_tensor(np.array(boxes, dtype=np.float32).reshape(-1, 4)))
    instances.gt_classes = torch.as_tensor(classes, dtype=torch.int64)
    return instances[instances.gt_boxes.nonempty()]


def _assemble(
    parts: Mapping[int, tuple[Box, BoolArray]], annotations: Sequence[Mapping[str, Any]], size: tuple[int, int]
) -> Instances:
    order = sorted(parts)
    masks = np.zeros((len(order), *size), dtype=bool)
    boxes = np.zeros((len(order), 4), dtype=np.float32)
    for number, position in enumerate(order):
        (rows, columns), part = parts[position]
        masks[number, rows, columns] = part
        boxes[number] = columns.start, rows.start, columns.stop, rows.stop
    return make_instances(torch.from_numpy(masks), boxes, [int(annotations[p]["category_id"]) for p in order])
