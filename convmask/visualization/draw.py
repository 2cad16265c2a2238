"""Painting segments on an image: a thin smooth contour, a translucent fill, a small label where there is room."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.data import Metadata
from PIL import Image, ImageDraw

from convmask.visualization.colors import blend
from convmask.visualization.segments import Segment, segments_of
from convmask.visualization.text import Box, font, overlaps, text_size

_WHITE = (255, 255, 255)
# Opacity of the fill of objects and of stuff, over an image whose own colours are muted by the share below: they would
# mix with the class's colour.
_THING_FILL, _STUFF_FILL = 0.55, 0.45
_MUTED = 0.6
_LABELS_PER_CLASS = 12


def default_scale(height: int, width: int) -> int:
    """The whole factor by which an image is enlarged so that its longer side has at least 480 pixels."""
    return max(1, math.ceil(480 / max(height, width, 1)))


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """Scales an image (H, W, 3) uint8 to (scale H, scale W, 3)."""
    image = np.ascontiguousarray(image)
    return image if scale == 1 else cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)


def draw_prediction(
    image: np.ndarray,
    prediction: Mapping[str, Any],
    metadata: Metadata,
    *,
    scale: int | None = None,
    threshold: float = 0.0,
    labels: bool = True,
    scores: bool = True,
) -> np.ndarray:
    """Draws a prediction, or ground truth, on its image.

    Args:
        image: (H, W, 3) uint8, RGB.
        prediction: see :func:`~convmask.visualization.segments.segments_of`.
        metadata: names and colours.
        scale: enlargement; by default :func:`default_scale`, so that contours and text fit on small images.
        threshold: objects with a lower score are left out.
        labels: write class names where there is room.
        scores: write scores beside them.

    Returns:
        (scale H, scale W, 3) uint8, RGB.
    """
    scale = default_scale(*image.shape[:2]) if scale is None else scale
    return draw_segments(image, segments_of(prediction, metadata, threshold), scale, labels, scores)


def draw_segments(
    image: np.ndarray, segments: Sequence[Segment], scale: int = 1, labels: bool = True, scores: bool = True
) -> np.ndarray:
    """Draws segments on ``image`` (H, W, 3), large ones below small ones, stuff below objects.

    Returns:
        (scale H, scale W, 3) uint8.
    """
    canvas = enlarge(image, scale).copy()
    order = sorted(segments, key=lambda segment: (segment.is_thing, -int(segment.mask.sum())))
    masks = [_enlarged_mask(segment, image.shape[:2], scale) for segment in order]
    for segment, mask in zip(order, masks, strict=True):
        _fill(canvas, segment, mask, scale)
    for segment, mask in zip(order, masks, strict=True):
        _outline(canvas, segment, mask, scale)
    return _label(canvas, order, masks, scale, scores) if labels else canvas


def _enlarged_mask(segment: Segment, size: tuple[int, ...], scale: int) -> np.ndarray:
    """The segment's mask (scale h, scale w) uint8 0/1, its staircase smoothed; ``size`` is that of the image."""
    mask = segment.mask.astype(np.uint8)
    if scale == 1:
        return mask
    height, width = mask.shape
    large = cv2.resize(mask, (width * scale, height * scale), interpolation=cv2.INTER_NEAREST)
    # Beyond the cut there is nothing of the segment, but beyond the image's border it is taken to go on.
    margin = 2 * scale
    over, under, before, after = (margin * int(side) for side in _touched(segment, size))
    padded = cv2.copyMakeBorder(large * 255, over, under, before, after, cv2.BORDER_REPLICATE)
    padded = np.pad(padded, ((margin - over, margin - under), (margin - before, margin - after)))
    # The two sides of a border blur into complements, so neighbours still meet without a gap.
    blurred = cv2.GaussianBlur(padded, (0, 0), sigmaX=0.6 * scale)
    smooth = (blurred[margin:-margin, margin:-margin] > 127).astype(np.uint8)
    # Objects of a pixel or two would vanish.
    return smooth if 2 * int(smooth.sum()) >= int(large.sum()) else large


def _touched(segment: Segment, size: tuple[int, ...], scale: int = 1) -> tuple[bool, bool, bool, bool]:
    """Whether the cut of the segment reaches the top, bottom, left and right border of an image of ``size``."""
    bottom, right = segment.top + segment.mask.shape[0], segment.left + segment.mask.shape[1]
    return segment.top == 0, bottom * scale == size[0], segment.left == 0, right * scale == size[1]


def _window(canvas: np.ndarray, segment: Segment, mask: np.ndarray, scale: int) -> np.ndarray:
    top, left = segment.top * scale, segment.left * scale
    return canvas[top : top + mask.shape[0], left : left + mask.shape[1]]


def _fill(canvas: np.ndarray, segment: Segment, mask: np.ndarray, scale: int) -> None:
    window = _window(canvas, segment, mask, scale)
    inside = mask == 1
    pixels = window[inside].astype(np.float32)
    grey = pixels @ np.asarray([[0.299], [0.587], [0.114]], dtype=np.float32)
    pixels += _MUTED * (grey - pixels)
    share = _THING_FILL if segment.is_thing else _STUFF_FILL
    window[inside] = (pixels * (1 - share) + np.asarray(segment.color, dtype=np.float32) * share).astype(np.uint8)


def _outline(canvas: np.ndarray, segment: Segment, mask: np.ndarray, scale: int) -> None:
    # At the image's border the contour is led outside, where it is not seen.
    over, under, before, after = (3 * int(side) for side in _touched(segment, canvas.shape, scale))
    mask = cv2.copyMakeBorder(mask, over, under, before, after, cv2.BORDER_REPLICATE)
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    color = blend(segment.color, _WHITE, 0.35) if segment.is_thing else blend(segment.color, _WHITE, 0.1)
    thickness = 2 if segment.is_thing and max(canvas.shape) >= 1000 else 1
    offset = (segment.left * scale - before, segment.top * scale - over)
    cv2.drawContours(canvas, contours, -1, color, thickness, cv2.LINE_AA, offset=offset)


def _label(
    canvas: np.ndarray, segments: Sequence[Segment], masks: Sequence[np.ndarray], scale: int, scores: bool
) -> np.ndarray:
    """Writes names at the middle of their segments: objects first, large before small, none over another."""
    height, width = canvas.shape[:2]
    size = int(np.clip(max(height, width) / 44, 11, 18))
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    placed: list[Box] = []
    written: Counter[tuple[str, bool]] = Counter()
    for segment, mask in sorted(
        zip(segments, masks, strict=True), key=lambda pair: (not pair[0].is_thing, -int(pair[1].sum()))
    ):
        key = (segment.name, segment.is_thing)
        if written[key] >= _LABELS_PER_CLASS:
            continue
        text = segment.name
        if scores and segment.score is not None:
            text += f" {100 * segment.score:.0f}%"
        text_width, text_height = text_size(text, size)
        x, y, room = _middle(mask)
        if mask.shape[1] < 0.7 * text_width or room < 0.6 * text_height:
            continue
        x = float(np.clip(segment.left * scale + x, text_width / 2 + 3, max(width - text_width / 2 - 3, 0)))
        y = float(np.clip(segment.top * scale + y, size, max(height - size, 0)))
        box = (x - text_width / 2 - 2, y - size / 2 - 1, x + text_width / 2 + 2, y + size / 2 + 1)
        if overlaps(box, placed):
            continue
        placed.append(box)
        written[key] += 1
        outline = blend(segment.color, (0, 0, 0), 0.75)
        pen.text((x, y), text, fill=_WHITE, font=font(size), anchor="mm", stroke_width=2, stroke_fill=outline)
    return np.asarray(picture).copy()


def _middle(mask: np.ndarray) -> tuple[float, float, float]:
    """(x, y) of the pixel of ``mask`` that is furthest from its border, and that distance."""
    distance = cv2.distanceTransform(np.pad(mask, 1), cv2.DIST_L2, 3)
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return float(x) - 1, float(y) - 1, float(distance[y, x])
