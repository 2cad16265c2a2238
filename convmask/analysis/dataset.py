"""The ground truth that saved predictions are analysed against."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

from convmask.analysis.regions import Region, box_code
from convmask.data.errors import DatasetError
from convmask.data.images import read_image
from convmask.evaluation.coco import true_instances
from convmask.evaluation.ground_truth import PanopticGroundTruth
from convmask.utils.label_runs import encode_masks


class AnalysedDataset:
    """A registered dataset with instances or panoptic annotations; read when it is needed.

    Attributes:
        name: in Detectron2's catalogs.
        metadata: of the dataset.
    """

    def __init__(self, name: str) -> None:
        """Takes a registered dataset.

        Raises:
            DatasetError: no dataset has this name.
        """
        if name not in DatasetCatalog.list():
            raise DatasetError(f"no dataset named {name!r} is registered")
        self.name = name
        self.metadata = MetadataCatalog.get(name)

    @cached_property
    def records(self) -> Mapping[Hashable, Mapping[str, Any]]:
        """Dataset dicts by image id."""
        return {record["image_id"]: record for record in DatasetCatalog.get(self.name)}

    @cached_property
    def is_panoptic(self) -> bool:
        """There are panoptic annotations."""
        has_map = any("pan_seg_file_name" in record for record in self.records.values())
        return has_map or bool(self.metadata.get("panoptic_json"))

    @cached_property
    def panoptic(self) -> PanopticGroundTruth:
        """The panoptic annotations."""
        return PanopticGroundTruth(self.name, cache=True)

    @cached_property
    def instances(self) -> COCO:
        """The instances, for pycocotools; every image has its size.

        Raises:
            DatasetError: there are no annotations, as in a test set, or an image without a size cannot be read.
        """
        api = true_instances(self.name, self.panoptic if self.is_panoptic else None)
        if "annotations" not in api.dataset:
            raise DatasetError(f"the dataset {self.name!r} has no annotations to compare with")
        for image_id, image in api.imgs.items():
            if "height" not in image or "width" not in image:
                image["height"], image["width"] = self._size(image_id)
        return api

    def _size(self, image_id: Hashable) -> tuple[int, int]:
        record = self.records[image_id]
        if "height" in record and "width" in record:
            return int(record["height"]), int(record["width"])
        height, width = read_image(record["file_name"], "RGB").shape[:2]
        return height, width

    @cached_property
    def thing_names(self) -> dict[int, str]:
        """Category id to name of the things, in order of class."""
        mapping = self.metadata.get("thing_dataset_id_to_contiguous_id")
        names = {category["id"]: category["name"] for category in self.instances.loadCats(self.instances.getCatIds())}
        ids = sorted(mapping, key=mapping.__getitem__) if mapping else sorted(names)
        return {identity: names.get(identity, str(identity)) for identity in ids}

    @cached_property
    def segment_names(self) -> dict[int, str]:
        """Category id to name of things and stuff."""
        categories = self.panoptic.categories
        return dict(zip(categories.ids, categories.names, strict=True))

    def true_objects(self, image_id: Hashable) -> list[Region]:
        """The instances of an image."""
        api = self.instances
        return [
            Region(entry["category_id"], self._code(entry), crowd=bool(entry.get("iscrowd", 0)))
            for entry in api.loadAnns(api.getAnnIds(imgIds=[image_id]))
            if entry["category_id"] in self.thing_names
        ]

    def _code(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        if entry.get("segmentation"):
            return self.instances.annToRLE(entry)
        image = self.instances.imgs[entry["image_id"]]
        return box_code(entry["bbox"], image["height"], image["width"])

    def true_segments(self, image_id: Hashable) -> list[Region]:
        """The panoptic segments of an image."""
        image = self.panoptic.image(image_id)
        codes = encode_masks(image.runs.decode(), image.ids.tolist())
        ids = self.panoptic.categories.ids
        return [
            Region(ids[category], code, crowd=bool(crowd))
            for category, code, crowd in zip(image.categories.tolist(), codes, image.crowd.tolist(), strict=True)
        ]

    def is_thing(self, category_id: int) -> bool:
        """Whether a category is a thing."""
        return category_id in (self.metadata.get("thing_dataset_id_to_contiguous_id") or self.thing_names)

    def class_index(self, category_id: int) -> int:
        """The contiguous class of a category, among things or among stuff."""
        kind = "thing" if self.is_thing(category_id) else "stuff"
        mapping = self.metadata.get(f"{kind}_dataset_id_to_contiguous_id") or {}
        return int(mapping.get(category_id, category_id))


def size_ranges(areas: np.ndarray, quantiles: int = 4) -> dict[str, tuple[float, float]]:
    """Parts of a dataset by the size of its objects, each with as many as the others, as far as equal areas allow it.

    Args:
        areas: of the objects, in pixels.
        quantiles: number of parts.

    Returns:
        Name ("Q1", ...) to least and greatest area; limits lie between whole numbers. Empty parts are left out.
    """
    if not len(areas) or quantiles < 2:
        return {}
    inner = np.floor(np.quantile(areas, np.linspace(0, 1, quantiles + 1)[1:-1])) + 0.5
    limits = np.concatenate([[0.0], inner, [1e10]])
    return {
        f"Q{index + 1}": (low, high)
        for index, (low, high) in enumerate(itertools.pairwise(limits.tolist()))
        if high > low
    }
