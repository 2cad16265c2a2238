"""Panoptic ground truth as evaluators need it: read once an image for all of them, or kept in memory."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from convmask.data.errors import DatasetError
from convmask.data.images import read_panoptic_map
from convmask.data.json_files import read_json
from convmask.evaluation.panoptic_quality import SegmentedImage, segmented_image


@dataclass(frozen=True)
class EvaluatedCategories:
    """The K categories of a panoptic dataset in order of their id, and what a model's class indices mean.

    Attributes:
        ids: the K category ids.
        names: the K names.
        isthing: (K,) bool.
        thing_classes: contiguous thing class -> category id.
        stuff_classes: contiguous stuff class -> category id.
        labels: class of a prediction without ``segments_info`` (id // label_divisor) -> category id. It is the semantic
            label in the layout "all" for ConvMask's datasets; for Detectron2's, the contiguous id.
    """

    ids: Sequence[int]
    names: Sequence[str]
    isthing: np.ndarray
    thing_classes: Mapping[int, int]
    stuff_classes: Mapping[int, int]
    labels: Mapping[int, int]
    positions: Mapping[int, int] = field(init=False)

    def __post_init__(self) -> None:
        """Derives the position of each category id."""
        object.__setattr__(self, "positions", {category: position for position, category in enumerate(self.ids)})

    @classmethod
    def from_metadata(cls, metadata: Any) -> EvaluatedCategories:
        """Reads ConvMask's ``metadata.categories``, or Detectron2's class names and id maps."""
        categories = metadata.get("categories")
        if categories is not None:
            ids = sorted(categories.by_id)
            return cls(
                ids=ids,
                names=[categories.by_id[identity].name for identity in ids],
                isthing=np.array([categories.by_id[identity].isthing for identity in ids], dtype=bool),
                thing_classes={index: identity for identity, index in categories.thing_ids.items()},
                stuff_classes={index: identity for identity, index in categories.stuff_ids.items()},
                labels=dict(enumerate(categories.all_order)),
            )
        things: dict[int, int] = metadata.thing_dataset_id_to_contiguous_id
        # Some datasets list things among stuff; the separated layout adds a class "things" that is no category.
        stuff = {
            identity: index
            for identity, index in metadata.stuff_dataset_id_to_contiguous_id.items()
            if identity not in things and metadata.stuff_classes[index] != "things"
        }
        names = {identity: metadata.thing_classes[index] for identity, index in things.items()}
        names |= {identity: metadata.stuff_classes[index] for identity, index in stuff.items()}
        ids = sorted(names)
        thing_classes = {index: identity for identity, index in things.items()}
        stuff_classes = {index: identity for identity, index in stuff.items()}
        return cls(
            ids=ids,
            names=[names[identity] for identity in ids],
            isthing=np.array([identity in things for identity in ids], dtype=bool),
            thing_classes=thing_classes,
            stuff_classes=stuff_classes,
            labels={**stuff_classes, **thing_classes},
        )

    def category_id(self, segment: Mapping[str, Any]) -> int:
        """The category id of a segment in Detectron2's format.

        ``category_id`` is contiguous where the segment has ``isthing``, and the dataset's own where it has not.

        Raises:
            ValueError: there is no such class.
        """
        isthing, index = segment.get("isthing"), int(segment["category_id"])
        if isthing is None:
            return index
        classes = self.thing_classes if isthing else self.stuff_classes
        if index not in classes:
            kind = "thing" if isthing else "stuff"
            raise ValueError(f"segment {segment['id']} has the unknown {kind} category_id {index}")
        return classes[index]


class PanopticGroundTruth:
    """The panoptic annotations of a registered dataset.

    They come from the dataset dicts (``pan_seg_file_name`` and ``segments_info``); where these lack them, as in
    Detectron2's "separated" datasets, from ``metadata.panoptic_json`` and ``metadata.panoptic_root``. The image read
    last is remembered, so that evaluators that share one object decode each file once.
    """

    def __init__(self, dataset_name: str, *, cache: bool = False) -> None:
        """Takes a registered dataset; nothing is read before it is needed.

        Args:
            dataset_name: name in Detectron2's catalogs.
            cache: keep every image that was read, as runs (8 bytes each; some 50 kB an image of COCO).
        """
        self.dataset_name = dataset_name
        self.metadata = MetadataCatalog.get(dataset_name)
        self._cache = cache
        self._kept: dict[Hashable, SegmentedImage] = {}
        self._records: dict[Hashable, dict[str, Any]] | None = None
        self._categories: EvaluatedCategories | None = None

    @property
    def categories(self) -> EvaluatedCategories:
        """The categories and what class indices mean."""
        if self._categories is None:
            self._categories = EvaluatedCategories.from_metadata(self.metadata)
        return self._categories

    @property
    def records(self) -> Mapping[Hashable, Mapping[str, Any]]:
        """By image id: "file_name", "pan_seg_file_name", and "segments_info" with the dataset's own category ids.

        Raises:
            DatasetError: an image has no panoptic annotation, or a segment an unknown category.
        """
        if self._records is None:
            self._records = self._read_records()
        return self._records

    def image(self, image_id: Hashable) -> SegmentedImage:
        """The annotation of an image; the id map is ``.runs.decode()``.

        Raises:
            DatasetError: the file cannot be read, or its segments are contradictory.
            ValueError: the dataset has no such image.
        """
        if image_id not in self._kept:
            if image_id not in self.records:
                raise ValueError(f"image {image_id!r} is not in dataset {self.dataset_name!r}")
            record = self.records[image_id]
            id_map = read_panoptic_map(record["pan_seg_file_name"])
            try:
                image = segmented_image(id_map, record["segments_info"], self.categories.positions)
            except ValueError as error:
                where = f"{record['pan_seg_file_name']}: image {image_id!r}: segments_info"
                raise DatasetError(f"{where}: {error}") from error
            if not self._cache:
                self._kept.clear()
            self._kept[image_id] = image
        return self._kept[image_id]

    def _read_records(self) -> dict[Hashable, dict[str, Any]]:
        dicts = DatasetCatalog.get(self.dataset_name)
        from_json = {} if all("pan_seg_file_name" in record for record in dicts) else self._read_panoptic_json()
        records: dict[Hashable, dict[str, Any]] = {}
        for record in dicts:
            image_id = record["image_id"]
            if image_id in records:
                raise DatasetError(f"dataset {self.dataset_name!r}: image_id {image_id!r} occurs twice")
            if "pan_seg_file_name" in record:
                annotation = self._converted(record)
            elif image_id in from_json:
                annotation = from_json[image_id]
            else:
                raise DatasetError(f"dataset {self.dataset_name!r}: image {image_id!r} has no panoptic annotation")
            records[image_id] = {"file_name": record["file_name"], **annotation}
        return records

    def _converted(self, record: Mapping[str, Any]) -> dict[str, Any]:
        try:
            segments = [
                {**segment, "category_id": self.categories.category_id(segment)} for segment in record["segments_info"]
            ]
        except ValueError as error:
            raise DatasetError(
                f"dataset {self.dataset_name!r}: image {record['image_id']!r}: segments_info: {error}"
            ) from error
        return {"pan_seg_file_name": record["pan_seg_file_name"], "segments_info": segments}

    def _read_panoptic_json(self) -> dict[Hashable, dict[str, Any]]:
        panoptic_json, root = self.metadata.get("panoptic_json"), self.metadata.get("panoptic_root")
        if panoptic_json is None or root is None:
            raise DatasetError(
                f"dataset {self.dataset_name!r} has no panoptic annotations: neither pan_seg_file_name in its dicts "
                "nor panoptic_json and panoptic_root in its metadata"
            )
        annotations = read_json(panoptic_json, ("annotations",))["annotations"]
        return {
            annotation["image_id"]: {
                "pan_seg_file_name": os.path.join(root, annotation["file_name"]),
                "segments_info": annotation["segments_info"],
            }
            for annotation in annotations
        }
