#!/usr/bin/env python
"""Merges saved instance and semantic predictions, for instance of two networks, into panoptic ones.

    python tools/merge_panoptic.py --dataset convmask_coco_2017_val_panoptic --output merged --evaluate
        --instances output/instance/inference/coco_instances_results.json
        --semantic output/semantic/inference/sem_seg_predictions.json

Writes panoptic_predictions.json and panoptic_predictions/*.png in COCO's format.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import DatasetCatalog
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from rich.progress import track

import convmask.data  # noqa: F401
from convmask.data.categories import PanopticCategories, SemanticLayout
from convmask.data.class_counts import categories_of
from convmask.data.errors import DatasetError
from convmask.data.images import read_semantic_map
from convmask.data.rle import checked_rle
from convmask.data.user_modules import import_user_module
from convmask.evaluation import PanopticEvaluator
from convmask.evaluation.panoptic_dump import PanopticDump
from convmask.ops import panoptic_merge

Record = Mapping[str, Any]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", metavar="NAME", required=True, help="registered panoptic dataset")
    parser.add_argument("--import", dest="module", metavar="MODULE", help="Python module or file that registers it")
    parser.add_argument("--instances", metavar="FILE", required=True, help="COCO results json with RLE masks")
    parser.add_argument(
        "--semantic",
        metavar="PATH",
        required=True,
        help="Detectron2's sem_seg_predictions.json, or a folder of PNG files named like the images, one label a pixel",
    )
    parser.add_argument(
        "--layout", choices=("separated", "all"), default="separated", help="labels of the PNG files: %(default)s"
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the result")
    parser.add_argument("--overlap-threshold", type=float, default=0.5, help="%(default)s")
    parser.add_argument("--stuff-area-limit", type=int, default=4096, help="in pixels: %(default)s")
    parser.add_argument("--score-threshold", type=float, default=0.5, help="%(default)s")
    parser.add_argument("--evaluate", action="store_true", help="also compute the panoptic quality")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class InstancePredictions:
    """Instances of a COCO results json by image."""

    by_image: Mapping[Hashable, list[Record]]
    categories: PanopticCategories

    @classmethod
    def read(cls, path: str, categories: PanopticCategories, records: Mapping[Hashable, Record]) -> InstancePredictions:
        """Reads and checks the file.

        Raises:
            DatasetError: it cannot be read, or an entry lacks a field or names an image or category that is unknown.
        """
        by_image: dict[Hashable, list[Record]] = defaultdict(list)
        for index, entry in enumerate(_entries(path, ("image_id", "category_id", "score", "segmentation"))):
            image_id, category_id, score = entry["image_id"], entry["category_id"], entry["score"]
            if not _is_id(image_id) or image_id not in records:
                raise DatasetError(f"{path}: entry {index} names the image {image_id!r:.80}, not of the dataset")
            if not _is_id(category_id) or category_id not in categories.thing_ids:
                raise DatasetError(f"{path}: entry {index} has the category {category_id!r:.80}, which is no thing")
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
                raise DatasetError(f"{path}: entry {index} has the score {score!r:.80}, which is no finite number")
            by_image[entry["image_id"]].append(entry)
        return cls(by_image, categories)

    def of_image(self, image_id: Hashable, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masks (N, H, W) bool, scores (N,) and contiguous thing classes (N,)."""
        entries = self.by_image.get(image_id, [])
        masks = torch.zeros(len(entries), height, width, dtype=torch.bool)
        for mask, entry in zip(masks, entries, strict=True):
            mask.copy_(torch.from_numpy(_mask(image_id, entry["segmentation"], height, width)))
        scores = torch.tensor([entry["score"] for entry in entries], dtype=torch.float64)
        classes = [self.categories.thing_ids[entry["category_id"]] for entry in entries]
        return masks, scores, torch.tensor(classes, dtype=torch.int64)


def semantic_reader(
    path: str, layout: SemanticLayout, categories: PanopticCategories, records: Mapping[Hashable, Record]
) -> Callable[[Record], np.ndarray]:
    """A function from a record of the dataset to its map (H, W) int64 of stuff classes 1..S, 0 elsewhere.

    Raises:
        DatasetError: the predictions cannot be read, or name an image that is unknown. The function raises it for
            predictions that are missing or do not fit their image.
    """
    if PathManager.isdir(path):
        return lambda record: _semantic_png(path, layout, categories, record)
    image_of_name = _images_by_name(records)
    by_image: dict[Hashable, list[Record]] = defaultdict(list)
    for index, entry in enumerate(_entries(path, ("category_id", "segmentation"))):
        name = str(entry.get("file_name"))
        image_id = entry.get("image_id", image_of_name.get(name, image_of_name.get(_stem(name))))
        if not _is_id(image_id) or image_id not in records:
            given = entry.get("image_id", name)
            raise DatasetError(f"{path}: entry {index} names the image {given!r:.80}, not of the dataset")
        if not _is_id(entry["category_id"]):
            raise DatasetError(f"{path}: entry {index} has the category {entry['category_id']!r:.80}")
        by_image[image_id].append(entry)

    def read(record: Record) -> np.ndarray:
        if record["image_id"] not in by_image:
            raise DatasetError(f"{path}: no semantic prediction for image {record['image_id']!r}")
        labels = np.zeros((record["height"], record["width"]), dtype=np.int64)
        for entry in by_image[record["image_id"]]:
            stuff = categories.stuff_ids.get(entry["category_id"])
            if stuff is not None:
                labels[_mask(record["image_id"], entry["segmentation"], *labels.shape).astype(bool)] = stuff
        return labels

    return read


def _semantic_png(folder: str, layout: SemanticLayout, categories: PanopticCategories, record: Record) -> np.ndarray:
    path = os.path.join(folder, f"{_stem(record['file_name'])}.png")
    labels = read_semantic_map(path)
    if labels.shape != (record["height"], record["width"]):
        raise DatasetError(f"{path}: has the shape {labels.shape}, the image {(record['height'], record['width'])}")
    class_of_label = np.zeros(65536, dtype=np.int64)
    class_of_label[list(categories.stuff_labels(layout))] = np.arange(1, categories.num_stuff + 1)
    return class_of_label[labels]


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _mask(image_id: Hashable, segmentation: Any, height: int, width: int) -> np.ndarray:
    """(H, W) uint8, decoded."""
    if not isinstance(segmentation, Mapping):
        raise DatasetError(f"image {image_id!r}: a segmentation is no RLE: {segmentation!r:.80}")
    try:
        return np.asarray(mask_util.decode(checked_rle(segmentation, height, width)))
    except DatasetError as error:
        raise DatasetError(f"image {image_id!r}: a segmentation: {error}") from error


def _images_by_name(records: Mapping[Hashable, Record]) -> dict[str, Hashable]:
    """File names, and what is before the suffix of those that only one image has, to image ids."""
    images = {record["file_name"]: image_id for image_id, record in records.items()}
    times = Counter(map(_stem, images))
    return {**{_stem(name): image_id for name, image_id in images.items() if times[_stem(name)] == 1}, **images}


def _entries(path: str, fields: Sequence[str]) -> list[Record]:
    try:
        with PathManager.open(path, "r") as file:
            entries = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: cannot be read ({error or type(error).__name__})") from error
    if not isinstance(entries, list):
        raise DatasetError(f"{path}: holds a {type(entries).__name__}, not a list of predictions")
    for index, entry in enumerate(entries):
        absent = [field for field in fields if not isinstance(entry, dict) or field not in entry]
        if absent:
            raise DatasetError(f"{path}: entry {index} has no {absent[0]}")
    return entries


def _stem(file_name: str) -> str:
    return os.path.splitext(os.path.basename(file_name))[0]


def merge(options: argparse.Namespace) -> dict[str, float]:
    """Merges all images of the dataset and writes the result; returns the panoptic quality where it is asked for.

    Raises:
        DatasetError: the dataset or the predictions are not as they must be; the message names file and entry.
    """
    categories = categories_of(options.dataset)
    if not categories.num_things or not categories.num_stuff:
        raise DatasetError(f"dataset {options.dataset!r} is not panoptic: it has no things, or no stuff")
    records = {record["image_id"]: record for record in DatasetCatalog.get(options.dataset)}
    instances = InstancePredictions.read(options.instances, categories, records)
    semantic = semantic_reader(options.semantic, options.layout, categories, records)
    dump = PanopticDump(options.output, records)
    evaluator = PanopticEvaluator(options.dataset, distributed=False) if options.evaluate else None
    dump.start(remove_json=True)
    annotations = []
    for image_id, record in track(records.items(), description="Merging", total=len(records)):
        ids, segments = panoptic_merge(
            *instances.of_image(image_id, record["height"], record["width"]),
            torch.from_numpy(semantic(record)),
            overlap_threshold=options.overlap_threshold,
            stuff_area_limit=options.stuff_area_limit,
            score_threshold=options.score_threshold,
        )
        in_dataset_ids = [
            {"id": s["id"], "category_id": categories.category_id(s["category_id"], s["isthing"])} for s in segments
        ]
        annotations.append(dump.write_image(image_id, ids.numpy(), in_dataset_ids))
        if evaluator:
            evaluator.process([record], [{"panoptic_seg": (ids, segments)}])
    dump.write_json(annotations)
    results = evaluator.evaluate() if evaluator else None
    return results["panoptic_seg"] if results else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Merges; returns the exit code."""
    options = parse_arguments(arguments)
    setup_logger(name="convmask")
    try:
        if options.module:
            import_user_module(options.module)
        quality = merge(options)
    except (DatasetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if quality:
        print("PQ {PQ:.2f} (things {PQ_th:.2f}, stuff {PQ_st:.2f})".format(**quality))
    print(f"predictions in {os.path.join(os.path.abspath(options.output), 'panoptic_predictions.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
