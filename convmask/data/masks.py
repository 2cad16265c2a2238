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
from convmask.utils.label_runs import encode_runs, position_of

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
# int32, or uint8 where that suffices
IdMap = npt.NDArray[np.int32] | npt.NDArray[np.uint8]

VOID = 0
_HIGHEST_ID = 2**24 - 1


def transform_id_map(transforms: T.Transform | T.TransformList, ids: IdMap) -> IdMap:
    """Applies geometric transforms to an id map, by the nearest pixel.

    The map goes through ``apply_segmentation`` as one or four planes of bytes: Detectron2 resizes bytes with PIL, whose
    nearest pixel agrees with the resized image, but other types with torch, whose nearest pixel is off by up to one.

    Args:
        transforms: whatever pads with one value for all planes (0 or 255) and keeps (H, W, 4) as it is. Detectron2's
            ``ExtentTransform`` does not serve: it mixes the labels of neighbouring pixels.
        ids: (H, W): int32, or uint8 of 0 to 254.

    Returns:
        (H', W') of the same type. Padding is 0.
    """
    if ids.dtype == np.uint8:
        moved = np.ascontiguousarray(transforms.apply_segmentation(ids))
        return np.where(moved == 255, np.uint8(VOID), moved)
    planes = np.ascontiguousarray(ids, dtype="<i4")[..., None].view(np.uint8)
    planes = np.ascontiguousarray(transforms.apply_segmentation(planes))
    moved = planes.view("<i4")[..., 0].astype(np.int32, copy=False)
    return np.where(moved == -1, np.int32(VOID), moved)


def segment_index(ids: IdMap, segment_ids: Sequence[int]) -> IdMap:
    """Numbers the segments of an id map.

    Args:
        ids: (H, W).
        segment_ids: N different ids, 1 to 2^24 - 1.

    Returns:
        (H, W): k where the id is ``segment_ids[k - 1]``, 0 where it is none of them. Of type uint8 where N is below
        255, else int32.

    Raises:
        DatasetError: an id is out of range or occurs twice.
    """
    wanted = np.asarray(segment_ids, dtype=np.int64).reshape(-1)
    dtype = np.uint8 if len(wanted) < 255 else np.int32
    if not len(wanted):
        return np.zeros(ids.shape, dtype=dtype)
    if wanted.min() <= VOID or wanted.max() > _HIGHEST_ID:
        raise DatasetError(f"segment ids from {wanted.min()} to {wanted.max()} do not lie between 1 and {_HIGHEST_ID}")
    if len(np.unique(wanted)) < len(wanted):
        raise DatasetError("a segment id occurs twice")
    # A look-up for each run of equal pixels costs a fraction of one for each pixel.
    runs = encode_runs(ids)
    return runs.with_values((position_of(runs.values, wanted) + 1).astype(dtype)).decode()


def tight_boxes(index: IdMap, count: int) -> npt.NDArray[np.float32]:
    """Tight boxes of all segments, without a mask for any.

    Args:
        index: (H, W), the result of :func:`segment_index`.
        count: N.

    Returns:
        (N, 4): XYXY in pixels, the lower right corner outside. Zeros where a segment has no pixel.
    """
    boxes = np.zeros((count, 4), dtype=np.float32)
    for number, found in enumerate(ndimage.find_objects(index, max_label=count) if count else ()):
        if found is not None:
            rows, columns = found
            boxes[number] = columns.start, rows.start, columns.stop, rows.stop
    return boxes


def split_masks(index: IdMap, numbers: Sequence[int], boxes: npt.NDArray[np.float32]) -> torch.Tensor:
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


def instances_from_index(index: IdMap, classes: Mapping[int, int], count: int) -> Instances:
    """The instances of which at least one pixel is there, in ascending order of number.

    Args:
        index: (H, W), the result of :func:`segment_index`.
        classes: number of the segment (1 to N) to class index, for those segments that are instances.
        count: N.

    Returns:
        As :func:`make_instances`.
    """
    boxes = tight_boxes(index, count)
    kept = [number for number in sorted(classes) if boxes[number - 1].any()]
    boxes = boxes[[number - 1 for number in kept]]
    return make_instances(split_masks(index, kept, boxes), boxes, [classes[number] for number in kept])
