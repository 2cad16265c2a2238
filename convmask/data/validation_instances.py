"""Checks of a COCO json with instances, and of dataset dicts of any origin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from convmask.data.categories import PanopticCategories, category_problems
from convmask.data.errors import DatasetError
from convmask.data.instance import has_masks
from convmask.data.problems import Problem
from convmask.data.rle import checked_polygons, checked_rle
from convmask.data.validation_entries import (
    area_problem,
    box_is_fine,
    box_problem,
    crowd_problem,
    image_problems,
    is_integer,
    label,
)


def instance_json_problems(
    file: str, content: Mapping[str, Any], images: dict[Any, Mapping[str, Any]]
) -> Iterator[Problem]:
    """Checks everything that shows without opening a picture.

    Args:
        file: the name for messages.
        content: the json, with the lists ``categories`` and ``images``.
        images: filled with the sound entries of ``images`` by id.
    """
    categories = content["categories"]
    with_kind = [{"isthing": 1, **entry} if isinstance(entry, Mapping) else entry for entry in categories]
    yield from (Problem(file, "", field, message) for field, message in category_problems(with_kind))
    known = {entry["id"] for entry in categories if isinstance(entry, Mapping) and is_integer(entry.get("id"))}
    yield from image_problems(file, content["images"], images)
    annotations = content.get("annotations")
    if not isinstance(annotations, list) or not annotations:
        yield Problem(file, "", "annotations", "is missing or empty, as in files for testing", fatal=False)
        return
    # COCO 2014's minival and valminusminival repeat a few annotations, and everyone lives with it.
    duplicates_are_fatal = "minival" not in file
    with_masks = has_masks(annotations)
    seen: set[Any] = set()
    for index, annotation in enumerate(annotations):
        field = f"annotations[{index}]"
        if not isinstance(annotation, Mapping):
            yield Problem(file, "", field, f"is not an object: {annotation!r:.80}")
            continue
        identity = annotation.get("image_id")
        image = images.get(identity) if isinstance(identity, (int, str)) else None
        yield from _id_problems(file, field, annotation, label(image or {"id": identity}), seen, duplicates_are_fatal)
        if image is not None:
            yield from _annotation_problems(file, field, annotation, image, known, with_masks)
        else:
            message = f"is not the id of an image: {identity!r:.80}"
            yield Problem(file, "", f"{field}.image_id", message, fatal=False)


def _id_problems(
    file: str, field: str, annotation: Mapping[str, Any], where: str, seen: set[Any], duplicates_are_fatal: bool
) -> Iterator[Problem]:
    identity = annotation.get("id")
    if not isinstance(identity, (int, str)):
        yield Problem(file, where, f"{field}.id", f"is neither an integer nor text: {identity!r:.80}")
    elif identity in seen:
        yield Problem(file, where, f"{field}.id", f"annotation id {identity!r} occurs twice", duplicates_are_fatal)
    else:
        seen.add(identity)


def _annotation_problems(
    file: str,
    field: str,
    annotation: Mapping[str, Any],
    image: Mapping[str, Any],
    known: set[int],
    with_masks: bool,
) -> Iterator[Problem]:
    height, width = image["height"], image["width"]
    category_id = annotation.get("category_id")
    if not is_integer(category_id) or category_id not in known:
        yield Problem(file, label(image), f"{field}.category_id", f"unknown category {category_id!r:.80}")
    crowd = crowd_problem(annotation.get("iscrowd", 0))
    if crowd:
        yield Problem(file, label(image), f"{field}.iscrowd", crowd)
    if not box_is_fine(annotation.get("bbox"), width, height):
        yield Problem(file, label(image), f"{field}.bbox", *box_problem(annotation.get("bbox"), width, height))
    area = area_problem(annotation["area"]) if "area" in annotation else None
    if area:
        yield Problem(file, label(image), f"{field}.area", *area)
    wrong = _segmentation_problem(annotation.get("segmentation"), height, width)
    if wrong:
        yield Problem(file, label(image), f"{field}.segmentation", *wrong)
    elif with_masks and not annotation.get("segmentation") and not annotation.get("iscrowd", 0):
        message = "is missing or empty, while other annotations have one"
        yield Problem(file, label(image), f"{field}.segmentation", message, fatal=False)


def _segmentation_problem(segmentation: Any, height: int, width: int) -> tuple[str, bool] | None:
    try:
        if isinstance(segmentation, Mapping):
            checked_rle(segmentation, height, width)
        elif segmentation:
            if not isinstance(segmentation, Sequence) or isinstance(segmentation, str):
                return f"is neither polygons nor RLE: {segmentation!r:.80}", True
            if not checked_polygons(segmentation, height, width):
                return "no polygon has three points or more", False
    except DatasetError as error:
        return str(error), True
    return None


def record_problems(name: str, records: Sequence[Any], categories: PanopticCategories | None) -> Iterator[Problem]:
    """Checks dataset dicts in Detectron2's format without opening a picture.

    Args:
        name: of the dataset, for messages.
        records: the dicts.
        categories: classes that the dicts may hold; None leaves class ids unchecked.
    """
    if not records:
        yield Problem(name, "", "", "holds no image")
    seen: set[Any] = set()
    for index, record in enumerate(records):
        if not isinstance(record, Mapping) or not isinstance(record.get("file_name"), str):
            yield Problem(name, f"[{index}]", "file_name", "the dict has no file_name")
            continue
        try:
            yield from list(_record_problems(name, record, seen, categories))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            yield Problem(name, label(record), "", f"is not a dict of Detectron2's format: {error!r:.200}")


def _record_problems(
    name: str, record: Mapping[str, Any], seen: set[Any], categories: PanopticCategories | None
) -> Iterator[Problem]:
    identity = record.get("image_id")
    if identity is not None and identity in seen:
        yield Problem(name, label(record), "image_id", f"image id {identity!r:.80} occurs twice")
    seen.add(identity)
    for key in ("annotations", "segments_info"):
        for number, entry in enumerate(record.get(key) or ()):
            yield from _entry_problems(name, record, f"{key}[{number}]", entry, categories)
    outlines = [a.get("segmentation") is not None for a in record.get("annotations") or () if not a.get("iscrowd", 0)]
    if any(outlines) and not all(outlines):
        yield Problem(name, label(record), "annotations", f"{outlines.count(False)} of them lack a segmentation")
    segment_ids = [segment["id"] for segment in record.get("segments_info") or ()]
    if len(set(segment_ids)) < len(segment_ids):
        twice = next(i for i in segment_ids if segment_ids.count(i) > 1)
        yield Problem(name, label(record), "segments_info", f"segment id {twice!r:.80} occurs twice in the image")


def _entry_problems(
    name: str, record: Mapping[str, Any], field: str, entry: Mapping[str, Any], categories: PanopticCategories | None
) -> Iterator[Problem]:
    category_id, isthing = entry.get("category_id"), bool(entry.get("isthing", True))
    if categories is not None and not isinstance(category_id, (int, np.integer)):
        yield Problem(name, label(record), f"{field}.category_id", f"is not a class index: {category_id!r:.80}")
    elif categories is not None:
        try:
            categories.category_id(int(category_id), isthing)  # type: ignore[arg-type]
        except DatasetError as error:
            yield Problem(name, label(record), f"{field}.category_id", str(error))
    if "bbox" in entry and entry.get("bbox_mode") in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        box = [float(value) for value in entry["bbox"]]
        if entry["bbox_mode"] == BoxMode.XYXY_ABS:
            box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        width, height = record.get("width", float("inf")), record.get("height", float("inf"))
        if not box_is_fine(box, width, height):
            yield Problem(name, label(record), f"{field}.bbox", *box_problem(box, width, height))
    if "segmentation" in entry and "height" in record and not isinstance(entry["segmentation"], np.ndarray):
        wrong = _segmentation_problem(entry["segmentation"], record["height"], record["width"])
        if wrong:
            yield Problem(name, label(record), f"{field}.segmentation", *wrong)
