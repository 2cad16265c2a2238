"""Instance masks: an id map is transformed once and split into masks at its final size.

Shapes: H, W of the source image; H', W' after the transforms; N segments or instances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, Instances
from scipy import ndimage

from convmask.data.errors import DatasetError

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

VOID = 0
_HIGHEST_ID = 2**24 - 1


def transform_id_map(transforms: T.Transform | T.TransformList, ids: IntArray) -> IntArray:
    """Applies geometric transforms to an id map, by the nearest pixel.

    The map goes through ``apply_segmentation`` as four planes of bytes: Detectron2 resizes bytes with PIL, whose
    nearest pixel agrees with the resized image, but other types with torch, whose nearest pixel is off by up to one.

    Args:
        transforms: whatever pads with one value for all planes (0 or 255) and keeps (H, W, 4) as it is.
        ids: (H, W).

    Returns:
        (H', W'). Padding is 0 or -1, neither of which is the id of a segment.
    """
    planes = np.ascontiguousarray(ids, dtype="<i4")[..., None].view(np.uint8)
    planes = np.ascontiguousarray(transforms.apply_segmentation(planes))
    return planes.view("<i4")[..., 0].astype(np.int32, copy=False)


def segment_index(ids: IntArray, segment_ids: Sequence[int]) -> IntArray:
    """Numbers the segments of an id map.

    Args:
        ids: (H, W).
        segment_ids: N different ids, 1 to 2^24 - 1.

    Returns:
        (H, W): k where the id is ``segment_ids[k - 1]``, 0 where it is none of them.

    Raises:
        DatasetError: an id is out of range or occurs twice.
    """
    wanted = np.asarray(segment_ids, dtype=np.int64).reshape(-1)
    if not len(wanted):
        return np.zeros(ids.shape, dtype=np.int32)
    if wanted.min() <= VOID or wanted.max() > _HIGHEST_ID:
        raise DatasetError(f"segment ids from {wanted.min()} to {wanted.max()} do not lie between 1 and {_HIGHEST_ID}")
    if len(np.unique(wanted)) < len(wanted):
        raise DatasetError("a segment id occurs twice")
    # The last entry stands for every other id. The table may have 2^24 entries: the system provides only the pages of
    # it that are in use, and a look-up costs a fraction of sorting the pixels.
    table = np.zeros(wanted.max() + 2, dtype=np.int32)
    table[wanted] = np.arange(1, len(wanted) + 1)
    index = np.ascontiguousarray(ids, dtype=np.int32).view(np.uint32)
    return table[np.minimum(index, np.uint32(len(table) - 1))]


def boxes_and_areas(index: IntArray, count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Tight boxes and areas of all segments, without a mask for any.

    Args:
        index: (H, W), the result of :func:`segment_index`.
        count: N.

    Returns:
        boxes (N, 4), XYXY in pixels, the lower right corner outside; and areas (N,) in pixels. Zeros where a segment
        has no pixel.
    """
    areas = np.bincount(index.ravel(), minlength=count + 1)[1:]
    boxes = np.zeros((count, 4), dtype=np.float32)
    for number, found in enumerate(ndimage.find_objects(index, max_label=count) if count else ()):
        if found is not None:
            rows, columns = found
            boxes[number] = columns.start, rows.start, columns.stop, rows.stop
    return boxes, areas


def split_masks(index: IntArray, numbers: Sequence[int], boxes: npt.NDArray[np.float32]) -> torch.Tensor:
    """One mask for each of some segments.

    They take M bytes a pixel, and nothing else of that size is allocated.

    Args:
        index: (H, W), the result of :func:`segment_index`.
        numbers: M of the numbers 1 to N in it.
        boxes: (M, 4), the tight boxes of these, XYXY.

    Returns:
        (M, H, W) bool.
    """
    masks = np.zeros((len(numbers), *index.shape), dtype=bool)
    for mask, number, (x0, y0, x1, y1) in zip(masks, numbers, boxes.astype(int), strict=True):
        mask[y0:y1, x0:x1] = index[y0:y1, x0:x1] == number
    return torch.from_numpy(masks)


def make_instances(masks: torch.Tensor, boxes: npt.NDArray[np.float32], classes: Sequence[int]) -> Instances:
    """Detectron2's training targets.

    Args:
        masks: (N, H, W) bool; N may be 0.
        boxes: (N, 4), XYXY.
        classes: N class indices.

    Returns:
        Instances of image size (H, W) with ``gt_masks`` (BitMasks), ``gt_boxes`` and ``gt_classes``.
    """
    instances = Instances(tuple(masks.shape[1:]))
    instances.gt_boxes = Boxes(torch.as_tensor(boxes.reshape(-1, 4)))
    instances.gt_classes = torch.as_tensor(list(classes), dtype=torch.int64)
    instances.gt_masks = BitMasks(masks)
    return instances


def instances_from_index(index: IntArray, classes: Mapping[int, int], count: int) -> Instances:
    """The instances of which at least one pixel is there, in ascending order of number.

    Args:
        index: (H, W), the result of :func:`segment_index`.
        classes: number of the segment (1 to N) to class index, for those segments that are instances.
        count: N.

    Returns:
        As :func:`make_instances`.
    """
    boxes, areas = boxes_and_areas(index, count)
    kept = [number for number in sorted(classes) if areas[number - 1] > 0]
    boxes = boxes[[number - 1 for number in kept]]
    return make_instances(split_masks(index, kept, boxes), boxes, [classes[number] for number in kept])
