"""Checks of images, boxes and classes that annotation files of every format have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from convmask.data.problems import Problem

# Boxes of public datasets reach over the border by fractions of a pixel.
TOLERANCE = 1.0
_LARGEST_SIDE = 1 << 20


def label(image: Any) -> str:
    """How messages name an image: its file name and id, as far as they are there."""
    if not isinstance(image, Mapping):
        return f"{image!r:.80}"
    name, identity = image.get("file_name"), image.get("id", image.get("image_id"))
    if name is None:
        return f"id {identity!r:.80}"
    return f"{name!s:.200}" if identity is None else f"{name!s:.200} (id {identity!s:.80})"


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a json value is an integer; ``true`` is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a json value is a number, NaN and infinity included; ``true`` is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def image_problems(file: str, images: Sequence[Any], good: dict[Any, Mapping[str, Any]]) -> Iterator[Problem]:
    """Checks the ``images`` list of a COCO json, and fills ``good`` with its sound entries by id."""
    if not images:
        yield Problem(file, "", "images", "is empty")
    for index, image in enumerate(images):
        field = f"images[{index}]"
        if not isinstance(image, Mapping):
            yield Problem(file, "", field, f"is not an object: {image!r:.80}")
            continue
        wrong = list(_image_entry_problems(file, field, image))
        yield from wrong
        if wrong:
            continue
        if image["id"] in good:
            other = good[image["id"]]["file_name"]
            yield Problem(file, label(image), f"{field}.id", f"image id {image['id']!r} is also that of {other}")
        else:
            good[image["id"]] = image


def _image_entry_problems(file: str, field: str, image: Mapping[str, Any]) -> Iterator[Problem]:
    if not (is_integer(image.get("id")) or isinstance(image.get("id"), str)):
        yield Problem(file, label(image), f"{field}.id", f"is neither an integer nor text: {image.get('id')!r:.80}")
    if not isinstance(image.get("file_name"), str) or not image["file_name"]:
        yield Problem(file, label(image), f"{field}.file_name", f"is not a file name: {image.get('file_name')!r:.80}")
    for side in ("height", "width"):
        if not is_integer(image.get(side)) or not 0 < image[side] <= _LARGEST_SIDE:
            yield Problem(file, label(image), f"{field}.{side}", f"is not a size in pixels: {image.get(side)!r:.80}")


def box_is_fine(box: Any, width: int, height: int) -> bool:
    """Whether (x, y, width, height) is a box inside the image. False for anything that is not four numbers."""
    try:
        x, y, box_width, box_height = box
        # Comparisons with NaN are false.
        return bool(
            x >= -TOLERANCE
            and y >= -TOLERANCE
            and box_width > 0
            and box_height > 0
            and x + box_width <= width + TOLERANCE
            and y + box_height <= height + TOLERANCE
        )
    except (TypeError, ValueError):
        return False


def box_problem(box: Any, width: int, height: int) -> tuple[str, bool]:
    """What is wrong with (x, y, width, height), and whether it is fatal. For boxes that :func:`box_is_fine` refuses."""
    if not isinstance(box, Sequence) or len(box) != 4 or not all(is_number(value) for value in box):
        return f"is not four numbers (x, y, width, height): {box!r:.80}", True
    if not all(math.isfinite(value) for value in box):
        return f"holds NaN or infinity: {list(box)}", True
    if box[2] < 0 or box[3] < 0:
        return f"has a negative size: {list(box)}", True
    if box[2] == 0 or box[3] == 0:
        return f"has no area: {list(box)}", False
    return f"reaches outside the image of {width} x {height} pixels: {list(box)}", True


def area_problem(area: Any) -> tuple[str, bool] | None:
    """What is wrong with an area in pixels, and whether it is fatal."""
    if not is_number(area) or not math.isfinite(area) or area < 0:
        return f"is not a number of pixels: {area!r:.80}", True
    return ("is 0", False) if area == 0 else None


def crowd_problem(value: Any) -> str | None:
    """What is wrong with an ``iscrowd``."""
    return None if value in (0, 1) else f"is neither 0 nor 1: {value!r:.80}"
