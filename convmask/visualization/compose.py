"""Pictures beside each other: an image, its prediction and the ground truth; many of them on one sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.data import Metadata
from PIL import Image, ImageDraw

from convmask.visualization.draw import default_scale, draw_prediction, enlarge
from convmask.visualization.text import font

CAPTIONS = ("image", "prediction", "ground truth")
_BACKGROUND = 255
_INK = (70, 70, 70)


def panels(
    image: np.ndarray,
    prediction: Mapping[str, Any],
    ground_truth: Mapping[str, Any] | None,
    metadata: Metadata,
    scale: int | None = None,
    threshold: float = 0.0,
) -> list[np.ndarray]:
    """The image, its prediction and, if there is one, the ground truth, each (scale H, scale W, 3) uint8.

    Args:
        image: (H, W, 3) uint8, RGB.
        prediction: in Detectron2's format.
        ground_truth: of :func:`~convmask.visualization.ground_truth.ground_truth`, or None.
        metadata: names and colours.
        scale: enlargement; by default small images get one.
        threshold: predicted objects with a lower score are left out.
    """
    scale = default_scale(*image.shape[:2]) if scale is None else scale
    result = [enlarge(image, scale)]
    result.append(draw_prediction(image, prediction, metadata, scale=scale, threshold=threshold, scores=False))
    if ground_truth is not None:
        result.append(draw_prediction(image, ground_truth, metadata, scale=scale))
    return result


def side_by_side(
    image: np.ndarray,
    prediction: Mapping[str, Any],
    ground_truth: Mapping[str, Any] | None,
    metadata: Metadata,
    scale: int | None = None,
) -> np.ndarray:
    """:func:`panels` in one row, with captions.

    Returns:
        (H', W', 3) uint8, RGB.
    """
    return contact_sheet([panels(image, prediction, ground_truth, metadata, scale)])


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    captions: Sequence[str] = CAPTIONS,
    groups: int = 1,
    panel_height: int | None = None,
    gap: int = 6,
) -> np.ndarray:
    """Rows of pictures under one line of captions.

    Args:
        rows: pictures (H, W, 3) uint8. They may differ in size: each is scaled to the cell, keeping its proportions.
        captions: one per column of a row; more than there are columns are not used.
        groups: how many rows stand beside each other, with a wider gap between them.
        panel_height: of a cell, in pixels; by default that of the tallest picture.
        gap: between pictures, in pixels.

    Returns:
        (H', W', 3) uint8, on white.

    Raises:
        ValueError: there is no picture.
    """
    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise ValueError("a contact sheet of no pictures")
    height = panel_height or max(picture.shape[0] for row in rows for picture in row)
    width = max(round(picture.shape[1] * height / picture.shape[0]) for row in rows for picture in row)
    groups = min(groups, len(rows))
    lines = [list(rows[start : start + groups]) for start in range(0, len(rows), groups)]

    text = max(13, height // 20)
    header = round(1.9 * text)
    step_x, step_y = width + gap, height + gap
    group_width = columns * step_x + 3 * gap
    sheet_size = (header + len(lines) * step_y, groups * group_width - 3 * gap + gap, 3)
    sheet = np.full(sheet_size, _BACKGROUND, dtype=np.uint8)
    for line, members in enumerate(lines):
        for group, row in enumerate(members):
            for column, picture in enumerate(row):
                x = gap + group * group_width + column * step_x
                _paste(sheet[header + line * step_y :][:height, x : x + width], picture)
    return _write_captions(sheet, captions[:columns], groups, group_width, step_x, gap + width / 2, text)


def _paste(cell: np.ndarray, picture: np.ndarray) -> None:
    """Scales ``picture`` into the middle of ``cell``."""
    factor = min(cell.shape[0] / picture.shape[0], cell.shape[1] / picture.shape[1])
    size = max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor))
    if size != (picture.shape[1], picture.shape[0]):
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    y, x = (cell.shape[0] - size[1]) // 2, (cell.shape[1] - size[0]) // 2
    cell[y : y + size[1], x : x + size[0]] = picture


def _write_captions(
    sheet: np.ndarray, captions: Sequence[str], groups: int, group_width: int, step: int, first: float, size: int
) -> np.ndarray:
    picture = Image.fromarray(sheet)
    pen = ImageDraw.Draw(picture)
    for group in range(groups):
        for column, caption in enumerate(captions):
            x = first + group * group_width + column * step
            pen.text((x, size), caption, fill=_INK, font=font(size), anchor="mm")
    return np.asarray(picture).copy()
