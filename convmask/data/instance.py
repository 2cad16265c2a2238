"""Instance datasets: a COCO json with boxes and polygons or run-length encoded masks."""

from __future__ import annotations

import functools
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from detectron2.structures import BoxMode

from convmask.data import metadata as lazy
from convmask.data.categories import PanopticCategories
from convmask.data.errors import DatasetError
from convmask.data.json_files import read_json
from convmask.data.rle import checked_polygons, checked_rle

LISTS = ("categories", "images")

_logger = logging.getLogger(__name__)


def register_instances(
    name: str,
    image_root: str | os.PathLike[str],
    json_file: str | os.PathLike[str],
    *,
    categories: Iterable[Mapping[str, Any]] | None = None,
    **metadata: Any,
) -> None:
    """Registers an instance segmentation dataset in COCO's format with Detectron2's catalogs.

    Masks may be polygons, compressed or uncompressed RLE, or absent from the whole file (boxes alone). Category ids
    need not be contiguous.
    Categories with ``isthing`` 0, as in converted panoptic files, are left out with their annotations.

    Args:
        name: for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        image_root: folder of the pictures.
        json_file: COCO json with ``categories``, ``images`` and, unless it is for testing only, ``annotations``.
        categories: known in advance; then the metadata is there without the json. By default the json's own.
        metadata: further values for ``MetadataCatalog``.

    Raises:
        DatasetError: the name is taken, or ``categories`` is malformed. At first use: the json is missing or broken.
    """
    image_root, json_file = os.fspath(image_root), os.fspath(json_file)
    known = None if categories is None else thing_categories(categories)

    def load_metadata() -> dict[str, Any]:
        found = known or _read_categories(json_file, read_json(json_file, LISTS[:1]))
        values = found.metadata()
        return {key: value for key, value in values.items() if not key.startswith("stuff")}

    lazy.register(
        name,
        functools.partial(load_instances, image_root, json_file),
        load_metadata,
        **{"evaluator_type": "coco", "image_root": image_root, "json_file": json_file, **metadata},
    )


def thing_categories(categories: Iterable[Mapping[str, Any]]) -> PanopticCategories:
    """The things among a COCO json's ``categories``; an entry without ``isthing`` is one.

    Raises:
        DatasetError: an entry is malformed, an id occurs twice, or no category is a thing.
    """
    try:
        entries = [{"isthing": 1, **category} for category in categories]
    except TypeError as error:
        raise DatasetError(f"categories: an entry is not an object ({error})") from error
    things = PanopticCategories.from_coco(entries).things
    if not things:
        raise DatasetError("categories: all of them are stuff (isthing 0); instances need things")
    return PanopticCategories(things, (), tuple(category.id for category in things))


def load_instances(image_root: str, json_file: str) -> list[dict[str, Any]]:
    """Reads a COCO json into Detectron2's dataset dicts, in order of image id.

    Returns:
        One dict an image: ``file_name``, ``image_id``, ``height``, ``width`` and ``annotations``, dicts of ``bbox``,
        ``bbox_mode``, ``category_id`` (0 to T-1), ``iscrowd`` (also 1 where the json says ``ignore``), ``segmentation``
        (polygons or compressed RLE, if any) and ``keypoints`` (if any, as Detectron2 has them). In a file with masks,
        annotations without a mask, or whose polygons have under three points, are left out.

    Raises:
        DatasetError: the json is missing, broken, or lacks a field.
    """
    content = read_json(json_file, LISTS)
    thing_ids = _read_categories(json_file, content).thing_ids
    stuff_ids = {category["id"] for category in content["categories"]} - thing_ids.keys()
    by_image = _group_by_image(json_file, content.get("annotations") or ())
    with_masks = has_masks(content.get("annotations"))
    records, skipped = [], 0
    for image in _sorted_images(json_file, content["images"]):
        annotations = by_image.get(image["id"], ())
        record, left_out = _record(image_root, json_file, image, annotations, thing_ids, stuff_ids, with_masks)
        records.append(record)
        skipped += left_out
    if not records:
        raise DatasetError(f"{json_file}: images is empty")
    if skipped:
        _logger.warning(
            "%s: %d annotations without a mask, or with under three points, are left out", json_file, skipped
        )
    _logger.info("Loaded %d images in COCO format from %s", len(records), json_file)
    return records


def has_masks(annotations: Any) -> bool:
    """Whether any of the ``annotations`` of a COCO json has a mask; otherwise they are boxes alone."""
    return any(isinstance(annotation, Mapping) and annotation.get("segmentation") for annotation in annotations or ())


def _read_categories(json_file: str, content: Mapping[str, Any]) -> PanopticCategories:
    try:
        return thing_categories(content["categories"])
    except DatasetError as error:
        raise DatasetError(f"{json_file}: {error}") from error


def _group_by_image(json_file: str, annotations: Iterable[Any]) -> dict[Any, list[Mapping[str, Any]]]:
    by_image = defaultdict(list)
    try:
        for annotation in annotations:
            by_image[annotation["image_id"]].append(annotation)
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{json_file}: annotations: an entry has no usable image_id ({error})") from error
    return by_image


def _sorted_images(json_file: str, images: list[Any]) -> list[Any]:
    try:
        return [image for _, image in sorted({image["id"]: image for image in images}.items())]
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{json_file}: images: an entry has no usable id ({error})") from error


def _record(
    image_root: str,
    json_file: str,
    image: Mapping[str, Any],
    annotations: Iterable[Mapping[str, Any]],
    thing_ids: Mapping[int, int],
    stuff_ids: set[int],
    with_masks: bool,
) -> tuple[dict[str, Any], int]:
    objects, skipped = [], 0
    annotation: Mapping[str, Any] = {}
    try:
        record = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "image_id": image["id"],
            "height": int(image["height"]),
            "width": int(image["width"]),
        }
        for annotation in annotations:
            if annotation["category_id"] in stuff_ids:
                continue
            converted = _annotation(annotation, thing_ids, record["height"], record["width"], with_masks)
            if converted is None:
                skipped += 1
            else:
                objects.append(converted)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        where = f"image {image['id']} ({image.get('file_name')!r:.80})"
        if annotation:
            where += f", annotation {annotation.get('id')!r:.80}"
        raise DatasetError(f"{json_file}: {where}: {_reason(error, thing_ids)}") from error
    return {**record, "annotations": objects}, skipped


def _reason(error: Exception, thing_ids: Mapping[int, int]) -> str:
    if isinstance(error, KeyError) and isinstance(error.args[0], str):
        return f"field {error.args[0]} is missing"
    if isinstance(error, KeyError):
        return f"unknown category_id {error.args[0]!r}; categories has {sorted(thing_ids)}"
    if isinstance(error, DatasetError):
        return f"segmentation: {error}"
    return f"a field has a wrong value ({error})"


def _annotation(
    annotation: Mapping[str, Any], thing_ids: Mapping[int, int], height: int, width: int, with_masks: bool
) -> dict[str, Any] | None:
    """The dict of one annotation; None where there is no mask, or nothing but degenerate polygons, among masks."""
    x, y, box_width, box_height = annotation["bbox"]
    converted = {
        "bbox": [x, y, box_width, box_height],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": thing_ids[annotation["category_id"]],
        "iscrowd": int(bool(annotation.get("iscrowd", 0) or annotation.get("ignore", 0))),
    }
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, Mapping):
        converted["segmentation"] = checked_rle(segmentation, height, width)
    elif segmentation:
        polygons = checked_polygons(segmentation, height, width)
        if not polygons:
            return None
        converted["segmentation"] = polygons
    elif with_masks and not converted["iscrowd"]:
        return None
    if annotation.get("keypoints"):
        # Detectron2 counts pixel positions continuously, so that the centre of the first pixel is at 0.5.
        keypoints = annotation["keypoints"]
        converted["keypoints"] = [value + 0.5 if index % 3 != 2 else value for index, value in enumerate(keypoints)]
    return converted
