"""Checks of a COCO panoptic json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from convmask.data.categories import PanopticCategories, category_problems
from convmask.data.panoptic import disagreements
from convmask.data.problems import Problem
from convmask.data.validation_entries import (
    area_problem,
    box_is_fine,
    box_problem,
    crowd_problem,
    image_problems,
    is_integer,
    label,
)

MAX_SEGMENT_ID = (1 << 24) - 1

# image entry, annotation entry
Pair = tuple[Mapping[str, Any], Mapping[str, Any]]


def panoptic_json_problems(
    file: str, content: Mapping[str, Any], pairs: list[Pair], known: PanopticCategories | None = None
) -> Iterator[Problem]:
    """Checks everything that shows without opening a picture.

    Args:
        file: the name for messages.
        content: the json, with the lists ``categories``, ``images`` and ``annotations``.
        pairs: filled with the sound images and their annotations.
        known: the categories that the dataset is registered with, if not those of the json.
    """
    wrong = category_problems(content["categories"])
    yield from (Problem(file, "", field, message) for field, message in wrong)
    isthing = {
        category["id"]: bool(category.get("isthing"))
        for category in content["categories"]
        if isinstance(category, Mapping) and is_integer(category.get("id"))
    }
    if known is not None and not wrong:
        read = PanopticCategories.from_coco(content["categories"])
        yield from (Problem(file, "", "categories", message) for message in disagreements(known, read))
        isthing = {identity: category.isthing for identity, category in known.by_id.items()}
    images: dict[Any, Mapping[str, Any]] = {}
    yield from image_problems(file, content["images"], images)
    yield from _annotation_problems(file, content["annotations"], images, isthing, pairs)
    without = images.keys() - {image["id"] for image, _ in pairs}
    if without:
        first = label(next(image for identity, image in images.items() if identity in without))
        message = f"{len(without)} images have none and are left out, {first} being the first"
        yield Problem(file, "", "annotations", message, fatal=False)


def _annotation_problems(
    file: str,
    annotations: list[Any],
    images: Mapping[Any, Mapping[str, Any]],
    isthing: Mapping[int, bool],
    pairs: list[Pair],
) -> Iterator[Problem]:
    if not annotations:
        yield Problem(file, "", "annotations", "is empty")
    seen = set()
    for index, annotation in enumerate(annotations):
        field = f"annotations[{index}]"
        if not isinstance(annotation, Mapping):
            yield Problem(file, "", field, f"is not an object: {annotation!r:.80}")
            continue
        identity = annotation.get("image_id")
        if not isinstance(identity, (int, str)) or identity not in images:
            yield Problem(file, label(annotation), f"{field}.image_id", f"is not the id of an image: {identity!r:.80}")
            continue
        image = images[identity]
        if identity in seen:
            yield Problem(file, label(image), f"{field}.image_id", f"image {identity!r} has a second annotation")
            continue
        seen.add(identity)
        if not isinstance(annotation.get("file_name"), str) or not annotation["file_name"]:
            name = annotation.get("file_name")
            yield Problem(file, label(image), f"{field}.file_name", f"is not a file name: {name!r:.80}")
        elif not isinstance(annotation.get("segments_info"), list):
            yield Problem(file, label(image), f"{field}.segments_info", "is missing or not a list")
        else:
            pairs.append((image, annotation))
            yield from _segments_problems(file, image, annotation, isthing)


def _segments_problems(
    file: str, image: Mapping[str, Any], annotation: Mapping[str, Any], isthing: Mapping[int, bool]
) -> Iterator[Problem]:
    seen: set[int] = set()
    height, width = image["height"], image["width"]
    for index, segment in enumerate(annotation["segments_info"]):
        if not _is_fine(segment, width, height, isthing, seen):
            where = f"segments_info[{index}]"
            for field, message in _explain(segment, width, height, isthing, seen):
                yield Problem(file, label(image), f"{where}{field}", message)
        if isinstance(segment, Mapping) and is_integer(segment.get("id")):
            seen.add(segment["id"])


def _is_fine(segment: Any, width: int, height: int, isthing: Mapping[int, bool], seen: set[int]) -> bool:
    """The common case in one pass: a dataset may hold millions of segments."""
    try:
        identity, kind = segment["id"], isthing[segment["category_id"]]
        return (
            type(identity) is int
            and 0 < identity <= MAX_SEGMENT_ID
            and identity not in seen
            and segment["area"] > 0
            and segment.get("iscrowd", 0) in (0, 1)
            and segment.get("isthing", kind) == kind
            and box_is_fine(segment["bbox"], width, height)
            and area_problem(segment["area"]) is None
        )
    except (KeyError, TypeError, AttributeError):
        return False


def _explain(
    segment: Any, width: int, height: int, isthing: Mapping[int, bool], seen: set[int]
) -> Iterator[tuple[str, str]]:
    """(field, message) of everything that is wrong with a segment."""
    if not isinstance(segment, Mapping):
        yield "", f"is not an object: {segment!r:.80}"
        return
    identity, category_id = segment.get("id"), segment.get("category_id")
    if not is_integer(identity) or not 0 < identity <= MAX_SEGMENT_ID:
        yield ".id", f"is not an integer from 1 to {MAX_SEGMENT_ID}: {identity!r:.80}"
    elif identity in seen:
        yield ".id", f"segment id {identity} occurs twice in the image"
    if not is_integer(category_id) or category_id not in isthing:
        yield ".category_id", f"unknown category {category_id!r:.80}"
    elif segment.get("isthing", isthing[category_id]) != isthing[category_id]:
        kind = "a thing" if isthing[category_id] else "stuff"
        yield ".isthing", f"is {segment['isthing']!r:.80}, but category {category_id} is {kind}"
    crowd = crowd_problem(segment.get("iscrowd", 0))
    if crowd:
        yield ".iscrowd", crowd
    if not box_is_fine(segment.get("bbox"), width, height):
        yield ".bbox", box_problem(segment.get("bbox"), width, height)[0]
    area = area_problem(segment.get("area"))
    if area:
        yield ".area", area[0]
