from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from convmask.analysis import AnalysedDataset
from convmask.data.panoptic import register_panoptic
from convmask.evaluation.panoptic_dump import encode_panoptic_png

CATEGORIES = [
    {"id": 3, "name": "cat", "isthing": 1},
    {"id": 7, "name": "d<o>g", "isthing": 1},
    {"id": 11, "name": "sky", "isthing": 0},
]
# (id, category, (x1, y1, x2, y2)) of things; the rest is sky, but for column 0, which is void
TRUTH = {
    1: [(1, 3, (5, 5, 15, 15)), (2, 7, (30, 5, 50, 35))],
    2: [(1, 3, (5, 5, 15, 15)), (2, 3, (30, 20, 40, 30))],
    3: [],
}
SIZE = (40, 60)
SKY = 9


def id_map(things: list[tuple[int, int, tuple[int, int, int, int]]]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    ids = np.full(SIZE, SKY)
    ids[:, 0] = 0
    segments = [{"id": SKY, "category_id": 11}]
    for identity, category, (x1, y1, x2, y2) in things:
        ids[y1:y2, x1:x2] = identity
        segments.append({"id": identity, "category_id": category})
    for segment in segments:
        rows, columns = np.nonzero(ids == segment["id"])
        left, top = int(columns.min()), int(rows.min())
        box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
        segment |= {"area": len(rows), "bbox": box, "iscrowd": 0}
    return ids, segments


def write_set(root: Path) -> None:
    (root / "images").mkdir(parents=True)
    (root / "maps").mkdir()
    images, annotations = [], []
    for image_id, things in TRUTH.items():
        name = f"{image_id}.png"
        Image.fromarray(np.full((*SIZE, 3), 90, np.uint8)).save(root / "images" / name)
        ids, segments = id_map(things)
        (root / "maps" / name).write_bytes(encode_panoptic_png(ids))
        images.append({"id": image_id, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        annotations.append({"image_id": image_id, "file_name": name, "segments_info": segments})
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (root / "panoptic.json").write_text(json.dumps(content))


def write_run(folder: Path, found: dict[int, list[tuple[int, int, tuple[int, int, int, int], float]]]) -> Path:
    """Things (id, category, box, score) of each image, in both files of an ``inference`` folder."""
    inference = folder / "inference"
    (inference / "panoptic_predictions").mkdir(parents=True)
    detections, annotations = [], []
    for image_id, things in found.items():
        for _, category, (x1, y1, x2, y2), score in things:
            mask = np.zeros(SIZE, dtype=np.uint8, order="F")
            mask[y1:y2, x1:x2] = 1
            code = {"size": list(SIZE), "counts": mask_util.encode(mask)["counts"].decode()}
            entry = {"image_id": image_id, "category_id": category, "score": score, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            detections.append({**entry, "segmentation": code})
        ids, segments = id_map([thing[:3] for thing in things])
        (inference / "panoptic_predictions" / f"{image_id}.png").write_bytes(encode_panoptic_png(ids))
        annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments})
    (inference / "coco_instances_results.json").write_text(json.dumps(detections))
    (inference / "panoptic_predictions.json").write_text(json.dumps({"annotations": annotations}))
    return folder


PERFECT = {image_id: [(*thing, 0.9) for thing in things] for image_id, things in TRUTH.items()}
# Image 1: the dog is a cat. Image 2: one of two is missed, and one too many is found. Image 3: nothing, rightly.
FLAWED = {
    1: [(1, 3, (5, 5, 15, 15), 0.9), (2, 3, (30, 5, 50, 35), 0.8)],
    2: [(1, 3, (5, 5, 15, 15), 0.9), (4, 7, (45, 2, 55, 10), 0.7)],
    3: [],
}


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[AnalysedDataset]:
    name = "set_for_analysis"
    write_set(tmp_path / "set")
    register_panoptic(name, tmp_path / "set/images", tmp_path / "set/panoptic.json", tmp_path / "set/maps")
    yield AnalysedDataset(name)
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    return write_run(tmp_path / "flawed", FLAWED)


@pytest.fixture
def perfect(tmp_path: Path) -> Path:
    return write_run(tmp_path / "perfect", PERFECT)


@pytest.fixture
def registered() -> Iterator[Callable[[str], str]]:
    """``registered(name)`` removes the dataset from Detectron2's catalogs after the test; returns the name."""
    names: list[str] = []
    yield lambda name: names.append(name) or name
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
