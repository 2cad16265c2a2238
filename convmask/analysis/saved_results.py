"""Predictions that an evaluation has written, read and checked before anything is computed from them."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from convmask.analysis.dataset import AnalysedDataset
from convmask.analysis.regions import Region, box_code
from convmask.data.errors import DatasetError
from convmask.data.images import read_panoptic_map
from convmask.data.json_files import read_json
from convmask.data.rle import checked_rle
from convmask.evaluation.panoptic_quality import SegmentedImage, check_ids_agree, segmented_image
from convmask.utils.label_runs import encode_masks

INSTANCES, PANOPTIC = "coco_instances_results.json", "panoptic_predictions.json"
# Scores and coordinates are smaller; greater numbers overflow in arithmetic, 10**400 even as a float.
NUMBER_LIMIT = 1e15
# Segment ids are the three bytes of a pixel.
ID_LIMIT = 2**24


@dataclass(frozen=True)
class SavedResults:
    """What lies in the ``inference`` folder of a run.

    Attributes:
        folder: that was read.
        dataset: that was predicted on.
        detections: COCO's results in the order of the file, or None.
        panoptic: by image id the file name of the map and its segments, or None.
    """

    folder: str
    dataset: AnalysedDataset
    detections: list[dict[str, Any]] | None
    panoptic: Mapping[Hashable, tuple[str, list[dict[str, Any]]]] | None

    @classmethod
    def read(cls, folder: str, dataset: AnalysedDataset) -> SavedResults:
        """Reads ``coco_instances_results.json`` and ``panoptic_predictions.json``, as far as they are there.

        Args:
            folder: with these files, or with a folder ``inference`` that has them.
            dataset: that was predicted on.

        Raises:
            DatasetError: there is neither file, or one is broken or of another dataset; the message names file and
                entry.
        """
        for place in (folder, os.path.join(folder, "inference")):
            paths = [os.path.join(place, name) for name in (INSTANCES, PANOPTIC)]
            if any(map(os.path.isfile, paths)):
                break
        else:
            raise DatasetError(f"{folder}: holds neither {INSTANCES} nor {PANOPTIC}, nor does a folder inference in it")
        detections = _read_detections(paths[0], dataset) if os.path.isfile(paths[0]) else None
        panoptic = None
        if os.path.isfile(paths[1]):
            if not dataset.is_panoptic:
                raise DatasetError(f"{paths[1]}: the dataset {dataset.name!r} has no panoptic annotations")
            panoptic = _read_panoptic(paths[1], dataset)
        return cls(place, dataset, detections, panoptic)

    @cached_property
    def _by_image(self) -> dict[Hashable, list[dict[str, Any]]]:
        found: dict[Hashable, list[dict[str, Any]]] = {image_id: [] for image_id in self.dataset.instances.getImgIds()}
        for entry in self.detections or ():
            found[entry["image_id"]].append(entry)
        return found

    def found_objects(self, image_id: Hashable, threshold: float) -> list[Region]:
        """Detections of an image with at least this score."""
        return [
            Region(entry["category_id"], self._code(entry), entry["score"])
            for entry in self._by_image[image_id]
            if entry["score"] >= threshold
        ]

    def _code(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        if "segmentation" in entry:
            return entry["segmentation"]
        image = self.dataset.instances.imgs[entry["image_id"]]
        return box_code(entry["bbox"], image["height"], image["width"])

    def segmented_image(self, image_id: Hashable) -> SegmentedImage:
        """The panoptic prediction for an image.

        Raises:
            DatasetError: the map cannot be read or does not fit its segments or its image.
        """
        assert self.panoptic is not None
        path, segments = self.panoptic[image_id]
        id_map = read_panoptic_map(path)
        expected = self.dataset.panoptic.image(image_id).runs.shape
        try:
            image = segmented_image(id_map, segments, self.dataset.panoptic.categories.positions)
            check_ids_agree(image)
        except ValueError as error:
            raise DatasetError(f"{path}: image {image_id!r}: {error}") from error
        if image.runs.shape != expected:
            raise DatasetError(f"{path}: has {image.runs.shape} pixels, image {image_id!r} has {expected}")
        return image

    def found_segments(self, image: SegmentedImage) -> list[Region]:
        """The segments of a panoptic prediction."""
        codes = encode_masks(image.runs.decode(), image.ids.tolist())
        ids = self.dataset.panoptic.categories.ids
        return [Region(ids[category], code) for category, code in zip(image.categories.tolist(), codes, strict=True)]


def _read_detections(path: str, dataset: AnalysedDataset) -> list[dict[str, Any]]:
    try:
        with open(path, "rb") as file:
            entries = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: cannot be read ({error or type(error).__name__})") from error
    if not isinstance(entries, list):
        raise DatasetError(f"{path}: holds a {type(entries).__name__}, not a list of detections")
    checked = []
    for index, entry in enumerate(entries):
        try:
            checked.append(_checked_detection(entry, dataset))
        except DatasetError as error:
            raise DatasetError(f"{path}: entry {index} {error}") from error
    if len({"segmentation" in entry for entry in checked}) > 1:
        raise DatasetError(f"{path}: some detections have a segmentation and some have none")
    return checked


def _checked_detection(entry: Any, dataset: AnalysedDataset) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise DatasetError(f"is no object but {entry!r:.60}")
    for field in ("image_id", "category_id", "score"):
        if field not in entry:
            raise DatasetError(f"has no {field}")
    image_id, category, score = entry["image_id"], entry["category_id"], entry["score"]
    if not isinstance(image_id, (int, str)) or image_id not in dataset.instances.imgs:
        raise DatasetError(f"names the image {image_id!r:.60}, which is not in {dataset.name!r}")
    if not isinstance(category, int) or isinstance(category, bool) or category not in dataset.thing_names:
        raise DatasetError(f"has the category {category!r:.60}, which is no thing of {dataset.name!r}")
    if not _is_number(score):
        raise DatasetError(f"has the score {score!r:.60}, which is no number below {NUMBER_LIMIT:.0e}")
    checked = {"image_id": image_id, "category_id": category, "score": float(score)}
    if "segmentation" in entry:
        segmentation = entry["segmentation"]
        if not isinstance(segmentation, dict):
            raise DatasetError(f"has a segmentation that is no run-length code: {segmentation!r:.60}")
        image = dataset.instances.imgs[image_id]
        try:
            return {**checked, "segmentation": checked_rle(segmentation, image["height"], image["width"])}
        except DatasetError as error:
            raise DatasetError(f"has a wrong segmentation: {error}") from error
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise DatasetError(
            f"has neither a segmentation nor a bbox of four numbers below {NUMBER_LIMIT:.0e}: {box!r:.60}"
        )
    return {**checked, "bbox": box}


def _is_number(value: Any) -> bool:
    # False for NaN, too
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < NUMBER_LIMIT


def _read_panoptic(path: str, dataset: AnalysedDataset) -> dict[Hashable, tuple[str, list[dict[str, Any]]]]:
    found: dict[Hashable, tuple[str, list[dict[str, Any]]]] = {}
    records = dataset.panoptic.records
    for index, entry in enumerate(read_json(path, ("annotations",))["annotations"]):
        where = f"{path}: entry {index} of annotations"
        if not isinstance(entry, dict) or not isinstance(entry.get("segments_info"), list):
            raise DatasetError(f"{where} has no list segments_info")
        image_id, name = entry.get("image_id"), entry.get("file_name")
        if not isinstance(image_id, (int, str)) or image_id not in records:
            raise DatasetError(f"{where} names the image {image_id!r:.60}, which is not in {dataset.name!r}")
        if image_id in found:
            raise DatasetError(f"{where} is a second one of image {image_id!r}")
        if not isinstance(name, str) or os.path.basename(name) != name or not name:
            raise DatasetError(f"{where} has the file_name {name!r:.60}, which is no plain name")
        for segment in entry["segments_info"]:
            ids: list[Any] = (
                [segment.get(key) for key in ("id", "category_id")] if isinstance(segment, dict) else [None]
            )
            if not all(isinstance(value, int) and not isinstance(value, bool) for value in ids):
                raise DatasetError(f"{where} has a segment without id and category_id: {segment!r:.60}")
            if not 0 <= ids[0] < ID_LIMIT:
                raise DatasetError(f"{where} has the segment id {ids[0]!r:.60}, not from 0 to {ID_LIMIT - 1}")
            if ids[1] not in dataset.segment_names:
                raise DatasetError(f"{where} has the category {ids[1]}, which is not in {dataset.name!r}")
        segments = [{"id": s["id"], "category_id": s["category_id"]} for s in entry["segments_info"]]
        found[image_id] = (os.path.join(os.path.splitext(path)[0], name), segments)
    missing = next((image_id for image_id in records if image_id not in found), None)
    if missing is not None:
        raise DatasetError(f"{path}: has no prediction for image {missing!r} of {dataset.name!r}")
    return found
