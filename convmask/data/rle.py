"""Run-length encoded masks of annotation files, checked before pycocotools sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from convmask.data.errors import DatasetError

_LARGEST_RUN = 1 << 48


def run_lengths(counts: str | bytes | Sequence[int]) -> np.ndarray:
    """The run lengths of an RLE in COCO's compressed (text) or uncompressed (list) form, int64.

    Raises:
        DatasetError: the text is no compressed RLE, or the list does not hold integers.
    """
    if not isinstance(counts, (str, bytes)):
        if not all(isinstance(count, (int, np.integer)) and abs(count) <= _LARGEST_RUN for count in counts):
            raise DatasetError("RLE counts are not a list of integers")
        return np.asarray(counts, dtype=np.int64)
    # Five bits a character from the lowest on; bit 5 says that more follow, bit 4 of the last one is the sign.
    try:
        text = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError as error:
        raise DatasetError("RLE counts hold characters that are not ASCII") from error
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if codes.size == 0:
        return codes
    last = (codes & 32) == 0
    starts = np.concatenate(([0], np.flatnonzero(last)[:-1] + 1))
    place = np.arange(codes.size) - np.repeat(starts, np.diff(np.append(starts, codes.size)))
    if codes.min() < 0 or codes.max() > 63 or not last[-1] or place.max() > 6:
        raise DatasetError("RLE counts are no compressed RLE")
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    values -= np.where(codes[last] & 16, 1 << (5 * (place[last] + 1)), 0)
    # From the fourth value on, a value is the difference from the run two before.
    for parity in (1, 2):
        values[parity::2] = np.cumsum(values[parity::2])
    return values


def checked_rle(segmentation: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """An RLE of COCO's format, compressed, after checking that it fills height x width pixels exactly.

    Raises:
        DatasetError: ``size`` or ``counts`` is missing, malformed, or does not fit the image.
    """
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        raise DatasetError(f"RLE size is {size!r:.80}, the image has height and width {[height, width]}")
    if not isinstance(counts, (str, bytes, list)):
        raise DatasetError(f"RLE counts are {type(counts).__name__}, not text or a list")
    runs = run_lengths(counts)
    if runs.size and runs.min() < 0:
        raise DatasetError(f"RLE counts hold a negative run ({runs.min()})")
    # Sums of float64 cannot overflow into a wrong match.
    if float(runs.astype(np.float64).sum()) != height * width:
        raise DatasetError(f"RLE counts cover {runs.sum()} pixels, the image has {height * width}")
    if isinstance(counts, list):
        return dict(mask_util.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width))
    return {"size": [height, width], "counts": counts}


def checked_polygons(segmentation: Sequence[Any], height: int, width: int) -> list[Sequence[float]]:
    """The polygons with at least three points, after checking that they lie in or near the image.

    Raises:
        DatasetError: a coordinate is no finite number, or further outside the image than the image is large
            (rasterising takes memory in proportion to the outline).
    """
    polygons = []
    for polygon in segmentation:
        if not isinstance(polygon, Sequence) or isinstance(polygon, str):
            raise DatasetError(f"a polygon is not a list of coordinates: {polygon!r:.80}")
        if len(polygon) % 2 or len(polygon) < 6:
            continue
        try:
            finite = math.isfinite(sum(polygon))
        except (TypeError, OverflowError) as error:
            raise DatasetError(f"a polygon holds something that is not a number ({error})") from error
        if not finite:
            raise DatasetError("a polygon holds a coordinate that is NaN or infinite")
        limit = 2 * max(height, width)
        if min(polygon) < -limit or max(polygon) > limit:
            raise DatasetError(
                f"a polygon reaches from {min(polygon)} to {max(polygon)} in an image of {width} x {height} pixels"
            )
        polygons.append(polygon)
    return polygons
