"""Panoptic datasets: one call registers images, a COCO panoptic json and its PNG files."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from detectron2.structures import BoxMode

from convmask.data import metadata as lazy
from convmask.data.categories import LabelOrder, PanopticCategories
from convmask.data.errors import DatasetError
from convmask.data.json_files import read_json

LISTS = ("categories", "images", "annotations")

# Says where below the image root the picture of an entry of the json's ``images`` lies.
ImagePath = Callable[[Mapping[str, Any]], str]

_logger = logging.getLogger(__name__)


def register_panoptic(
    name: str,
    image_root: str | os.PathLike[str],
    panoptic_json: str | os.PathLike[str],
    panoptic_root: str | os.PathLike[str],
    *,
    categories: PanopticCategories | Iterable[Mapping[str, Any]] | None = None,
    label_order: LabelOrder = "things_first",
    image_path: ImagePath | None = None,
    **metadata: Any,
) -> None:
    """Registers a panoptic dataset in COCO's format with Detectron2's catalogs.

    Class names, contiguous ids, boxes, masks and the semantic map all follow from the json and its PNG files. Nothing
    is written to disk, and nothing is read before the first use.

    Args:
        name: for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        image_root: folder of the pictures, which the json's ``images`` name.
        panoptic_json: COCO panoptic json with ``categories``, ``images`` and ``annotations``.
        panoptic_root: folder of the PNG files that the annotations name (segment id = R + 256 G + 256^2 B, 0: void).
        categories: known in advance; then the metadata is there without the json. By default the json's own.
        label_order: order of the semantic layout ``"all"``, see :meth:`PanopticCategories.from_coco`.
        image_path: maps an entry of ``images`` to a path below ``image_root``. By default its ``file_name``.
        metadata: further values for ``MetadataCatalog``.

    Raises:
        DatasetError: the name is taken, or ``categories`` is malformed. At first use: the json is missing or broken.
    """
    image_root, panoptic_root = os.fspath(image_root), os.fspath(panoptic_root)
    panoptic_json = os.fspath(panoptic_json)
    if categories is not None and not isinstance(categories, PanopticCategories):
        categories = PanopticCategories.from_coco(categories, label_order)
    load_categories = functools.partial(_categories, categories, panoptic_json, label_order)
    lazy.register(
        name,
        functools.partial(load_panoptic, image_root, panoptic_json, panoptic_root, load_categories, image_path),
        None if categories else lambda: load_categories().metadata(),
        **_panoptic_metadata(
            metadata,
            categories,
            image_root=image_root,
            panoptic_root=panoptic_root,
            panoptic_json=panoptic_json,
            **({"image_path": image_path} if image_path else {}),
        ),
    )


def register_panoptic_records(
    name: str,
    categories: PanopticCategories | Iterable[Mapping[str, Any]],
    load_records: Callable[[], list[dict[str, Any]]],
    **metadata: Any,
) -> None:
    """Registers a panoptic dataset whose dicts a function returns, in the form that :func:`load_panoptic` describes.

    Args:
        name: for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        categories: of the dataset, or the ``categories`` list of a COCO panoptic json.
        load_records: takes nothing and returns the same dicts at every call.
        metadata: further values for ``MetadataCatalog``.

    Raises:
        DatasetError: the name is taken, or ``categories`` is malformed.
    """
    if not isinstance(categories, PanopticCategories):
        categories = PanopticCategories.from_coco(categories)
    lazy.register(name, load_records, None, **_panoptic_metadata(metadata, categories))


def load_panoptic(
    image_root: str,
    panoptic_json: str,
    panoptic_root: str,
    load_categories: Callable[[Mapping[str, Any]], PanopticCategories],
    image_path: ImagePath | None = None,
) -> list[dict[str, Any]]:
    """Reads a COCO panoptic json into Detectron2's dataset dicts, in the order of its annotations.

    Returns:
        One dict an annotated image: ``file_name``, ``image_id``, ``height``, ``width``, ``pan_seg_file_name``;
        ``segments_info``, dicts of ``id``, ``category_id`` (contiguous: things 0 to T-1, stuff 1 to S), ``isthing``,
        ``iscrowd``, ``area``, ``bbox``, ``bbox_mode``; and ``annotations``, one for each thing segment: ``bbox``,
        ``bbox_mode``, ``category_id``, ``iscrowd``, ``segment_id``. Masks are in the PNG file only. A dataset whose
        categories are all stuff has no ``annotations``: Detectron2 takes them for instances that are missing.

    Raises:
        DatasetError: the json is missing, broken, or lacks a field.
    """
    content = read_json(panoptic_json, LISTS)
    converter = _Converter(image_root, panoptic_json, panoptic_root, load_categories(content), image_path)
    images = converter.by_id(content["images"])
    records = [converter.record(images, annotation) for annotation in content["annotations"]]
    if not records:
        raise DatasetError(f"{panoptic_json}: annotations is empty")
    if len(records) < len(images):
        _logger.warning("%s: %d images have no annotation and are left out", panoptic_json, len(images) - len(records))
    _logger.info("Loaded %d images in COCO's panoptic format from %s", len(records), panoptic_json)
    return records


def _categories(
    known: PanopticCategories | None,
    panoptic_json: str,
    label_order: LabelOrder,
    content: Mapping[str, Any] | None = None,
) -> PanopticCategories:
    if content is None:
        content = read_json(panoptic_json, LISTS[:1])
    try:
        read = PanopticCategories.from_coco(content["categories"], label_order)
    except DatasetError as error:
        raise DatasetError(f"{panoptic_json}: {error}") from error
    problems = disagreements(known, read) if known else []
    if problems:
        raise DatasetError(f"{panoptic_json}: categories {'; '.join(problems[:10])}")
    return known or read


def disagreements(known: PanopticCategories, read: PanopticCategories) -> list[str]:
    """How the categories of a json contradict those that the dataset was registered with. Others may be added."""
    found = []
    for identity, expected in known.by_id.items():
        other = read.by_id.get(identity)
        kind = "a thing" if expected.isthing else "stuff"
        if other is None:
            found.append(f"lack {identity} ({expected.name}), with which the dataset is registered")
        elif other.isthing != expected.isthing:
            found.append(f"have isthing {int(other.isthing)} for {identity}, registered as {kind} ({expected.name})")
    return found


def _panoptic_metadata(given: Mapping[str, Any], categories: PanopticCategories | None, **own: Any) -> dict[str, Any]:
    fixed = {"evaluator_type": "convmask_panoptic", "ignore_label": 255, "label_divisor": 1000}
    return {**(categories.metadata() if categories else {}), **fixed, **own, **given}


class _Converter:
    """Turns entries of one COCO panoptic json into dataset dicts."""

    def __init__(
        self,
        image_root: str,
        panoptic_json: str,
        panoptic_root: str,
        categories: PanopticCategories,
        image_path: ImagePath | None,
    ) -> None:
        self.image_root, self.panoptic_json, self.panoptic_root = image_root, panoptic_json, panoptic_root
        self.image_path = image_path or (lambda image: image["file_name"])
        self.has_things = categories.num_things > 0
        self.classes = {
            **{identity: (index, True) for identity, index in categories.thing_ids.items()},
            **{identity: (index, False) for identity, index in categories.stuff_ids.items()},
        }

    def by_id(self, images: list[Any]) -> dict[Any, Mapping[str, Any]]:
        try:
            return {image["id"]: image for image in images}
        except (KeyError, TypeError) as error:
            raise DatasetError(f"{self.panoptic_json}: images: an entry has no usable id ({error})") from error

    def record(self, images: Mapping[Any, Mapping[str, Any]], annotation: Mapping[str, Any]) -> dict[str, Any]:
        try:
            image = images[annotation["image_id"]]
            record = {
                "file_name": os.path.join(self.image_root, self.image_path(image)),
                "image_id": image["id"],
                "height": int(image["height"]),
                "width": int(image["width"]),
                "pan_seg_file_name": os.path.join(self.panoptic_root, annotation["file_name"]),
                "segments_info": [self.segment(segment) for segment in annotation["segments_info"]],
            }
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise DatasetError(f"{self.panoptic_json}: {self.explain(images, annotation, error)}") from error
        if self.has_things:
            record["annotations"] = [
                {
                    "bbox": segment["bbox"],
                    "bbox_mode": segment["bbox_mode"],
                    "category_id": segment["category_id"],
                    "iscrowd": segment["iscrowd"],
                    "segment_id": segment["id"],
                }
                for segment in record["segments_info"]
                if segment["isthing"]
            ]
        return record

    def segment(self, segment: Mapping[str, Any]) -> dict[str, Any]:
        category_id, isthing = self.classes[segment["category_id"]]
        x, y, width, height = segment["bbox"]
        return {
            "id": segment["id"],
            "category_id": category_id,
            "isthing": isthing,
            "iscrowd": int(segment.get("iscrowd", 0)),
            "area": segment["area"],
            "bbox": [x, y, width, height],
            "bbox_mode": BoxMode.XYWH_ABS,
        }

    def explain(self, images: Mapping[Any, Any], annotation: Any, error: Exception) -> str:
        if not isinstance(annotation, Mapping):
            return f"annotations: an entry is not an object: {annotation!r:.80}"
        where = f"image {annotation.get('image_id')!r:.80} ({annotation.get('file_name')!r:.80})"
        if isinstance(error, KeyError) and annotation.get("image_id") == error.args[0]:
            return f"{where}: image_id is not in images"
        if isinstance(error, KeyError) and not isinstance(error.args[0], str):
            return f"{where}: unknown category_id {error.args[0]!r}; categories has {sorted(self.classes)}"
        if isinstance(error, KeyError):
            return f"{where}: field {error.args[0]} is missing"
        return f"{where}: a field has a wrong value ({error})"
