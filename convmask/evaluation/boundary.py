"""Boundary AP (Cheng et al., "Boundary IoU", CVPR 2021, arXiv 2103.16562): COCO's AP, demanding at the edges of masks.

The boundary of a mask is what an erosion by d pixels takes away, d being 2 % of the diagonal of the image (rounded, at
least 1); what lies outside the image is not part of the mask. The erosion is d steps of a 3 x 3 square. The overlap of
two masks is the smaller of their IoU and the IoU of their boundaries; all else is COCO's. With crowd regions, "IoU" is
COCO's share of the detection in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from pycocotools.cocoeval import COCOeval

DILATION_RATIO = 0.02

Code = Mapping[str, Any]


def dilation(height: int, width: int, ratio: float = DILATION_RATIO) -> int:
    """The width d of boundaries in an image of that size, in pixels."""
    return max(1, round(ratio * math.hypot(height, width)))


def boundary_of(code: Code, ratio: float = DILATION_RATIO) -> dict[str, Any]:
    """The boundary of a mask; the work is done inside its bounding box.

    Args:
        code: the mask, compressed run-length code.
        ratio: width of the boundary, of the diagonal of the image.

    Returns:
        Run-length code, compressed, of the same size.
    """
    height, width = (int(side) for side in code["size"])
    left, top, box_width, box_height = (int(value) for value in mask_util.toBbox(code))
    crop = np.asarray(mask_util.decode(code))[top : top + box_height, left : left + box_width]
    side = 2 * dilation(height, width, ratio) + 1
    if min(crop.shape) < side:
        return encode_crop(crop, top, left, height, width)
    # A line of zeros around it is enough: a window that reaches further out reaches that line as well.
    padded = cv2.copyMakeBorder(crop, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((side, side), np.uint8))
    return encode_crop(crop - eroded[1:-1, 1:-1], top, left, height, width)


def encode_crop(crop: np.ndarray, top: int, left: int, height: int, width: int) -> dict[str, Any]:
    """COCO's compressed run-length code of a mask of which all is in a part of the image; only that part is read.

    Args:
        crop: (h, w) uint8 or bool, the part.
        top: row of the image in which the part begins.
        left: column of the image in which the part begins.
        height: of the image.
        width: of the image.

    Returns:
        {"size": [height, width], "counts": bytes}
    """
    rows, columns = crop.shape
    # Columns one after the other, each ended by a zero.
    flat = np.zeros((columns, rows + 1), dtype=np.int8)
    flat[:, :rows] = crop.T
    change = np.flatnonzero(np.diff(flat.reshape(-1), prepend=np.int8(0)))
    column, row = np.divmod(change, rows + 1)
    edges = (left + column) * height + top + row
    # A run at the bottom of a column goes on at the top of the next one, where the part is as high as the image.
    joined = np.flatnonzero(np.diff(edges) == 0)
    edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    counts = np.diff(edges, prepend=0, append=height * width)
    counts = counts[:-1] if counts[-1] == 0 else counts
    return dict(mask_util.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width))


def boundary_overlaps(
    detections: Sequence[Code], truths: Sequence[Code], crowd: Sequence[int], ratio: float = DILATION_RATIO
) -> np.ndarray:
    """The overlap of each of D detections with each of G true masks, (D, G), from 0 to 1.

    Args:
        detections: compressed run-length codes.
        truths: the same.
        crowd: of each true mask, 1 or 0.
        ratio: see :func:`boundary_of`.
    """
    boundaries = [[boundary_of(code, ratio) for code in codes] for codes in (detections, truths)]
    whole = mask_util.iou(list(detections), list(truths), list(crowd))
    return np.minimum(whole, mask_util.iou(*boundaries, list(crowd)))


class BoundaryCOCOeval(COCOeval):
    """pycocotools' evaluation of masks with this module's overlap. ``iouType`` has to be "segm"."""

    def _prepare(self) -> None:
        super()._prepare()
        self._boundaries: dict[tuple[str, int], dict[str, Any]] = {}

    def computeIoU(self, imgId: Any, catId: Any) -> Any:  # noqa: N802, N803 (pycocotools' names)
        """The overlaps (D, G) of detections, in descending order of score, and true masks of an image and category."""
        whole = super().computeIoU(imgId, catId)
        if not len(whole):
            return whole
        categories = [catId] if self.params.useCats else self.params.catIds
        truths = [entry for category in categories for entry in self._gts[imgId, category]]
        found = [entry for category in categories for entry in self._dts[imgId, category]]
        # as pycocotools, whose rows these are
        order = np.argsort([-entry["score"] for entry in found], kind="mergesort")[: self.params.maxDets[-1]]
        detections = [self._boundary("detection", found[index]) for index in order]
        crowd = [int(entry["iscrowd"]) for entry in truths]
        edges = mask_util.iou(detections, [self._boundary("truth", entry) for entry in truths], crowd)
        return np.minimum(whole, edges)

    def _boundary(self, kind: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        key = (kind, entry["id"])
        if key not in self._boundaries:
            self._boundaries[key] = boundary_of(entry["segmentation"])
        return self._boundaries[key]
