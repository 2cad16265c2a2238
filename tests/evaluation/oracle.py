"""panopticapi as the oracle, and random panoptic images."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from panopticapi.evaluation import pq_compute_single_core
from panopticapi.utils import id2rgb
from PIL import Image

CATEGORIES = [
    {"id": 3, "name": "disc", "isthing": 1},
    {"id": 7, "name": "ring", "isthing": 1},
    {"id": 11, "name": "sky", "isthing": 0},
    {"id": 20, "name": "wall", "isthing": 0},
]
CATEGORY_IDS = [category["id"] for category in CATEGORIES]


def draw_segments(
    rng: np.random.Generator, shape: tuple[int, int], count: int, max_id: int, *, crowds: bool = False
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Up to ``count`` random rectangles on VOID: an id map and its segments, each of which has pixels."""
    id_map = np.zeros(shape, dtype=np.int32)
    ids = rng.choice(np.arange(1, max_id + 1), size=count, replace=False)
    for identity in ids:
        top, left = rng.integers(0, shape[0]), rng.integers(0, shape[1])
        height, width = rng.integers(1, shape[0] + 1), rng.integers(1, shape[1] + 1)
        id_map[top : top + height, left : left + width] = identity
    return id_map, describe_segments(rng, id_map, crowds=crowds)


def describe_segments(rng: np.random.Generator, id_map: np.ndarray, *, crowds: bool = False) -> list[dict[str, Any]]:
    """Random categories for the ids of a map."""
    segments = []
    for identity in rng.permutation(np.unique(id_map)):
        if identity == 0:
            continue
        rows, columns = np.nonzero(id_map == identity)
        left, top = int(columns.min()), int(rows.min())
        segments.append(
            {
                "id": int(identity),
                "category_id": int(rng.choice(CATEGORY_IDS)),
                "iscrowd": int(crowds and rng.random() < 0.4),
                "area": int(rows.size),
                "bbox": [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1],
            }
        )
    return segments


def perturb(
    rng: np.random.Generator, id_map: np.ndarray, segments: list[dict[str, Any]], category_ids: list[int]
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A prediction made from ground truth: shifted, with segments dropped, split and given other categories."""
    predicted = np.roll(id_map, tuple(rng.integers(-2, 3, size=2)), axis=(0, 1)).copy()
    next_id = int(predicted.max()) + 1
    categories = {segment["id"]: segment["category_id"] for segment in segments}
    for identity in list(categories):
        draw = rng.random()
        if draw < 0.1:
            predicted[predicted == identity] = 0
        elif draw < 0.3:
            inside = (predicted == identity) & (np.arange(id_map.shape[1])[None] % 5 < 2)
            predicted[inside] = next_id
            categories[next_id] = categories[identity]
            next_id += 1
        elif draw < 0.5:
            categories[identity] = int(rng.choice(category_ids))
    present = np.setdiff1d(np.unique(predicted), [0])
    return predicted, [{"id": int(i), "category_id": categories[int(i)]} for i in present]


def write_map(folder: Path, name: str, id_map: np.ndarray) -> str:
    """Writes an id map as COCO's PNG; returns the file name within the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(id2rgb(id_map.astype(np.uint32))).save(folder / f"{name}.png")
    return f"{name}.png"


def panopticapi_counts(
    folder: Path, images: list[tuple[Any, ...]], categories: list[dict[str, Any]]
) -> dict[str, np.ndarray]:
    """iou, tp, fp, fn per category of panopticapi for (true map, segments, predicted map, segments) of each image."""
    pairs = []
    for number, (true_map, true_segments, predicted_map, predicted_segments) in enumerate(images):
        pairs.append(
            (
                {
                    "image_id": number,
                    "file_name": write_map(folder / "gt", str(number), true_map),
                    "segments_info": [dict(segment) for segment in true_segments],
                },
                {
                    "image_id": number,
                    "file_name": write_map(folder / "pred", str(number), predicted_map),
                    "segments_info": [dict(segment) for segment in predicted_segments],
                },
            )
        )
    by_id = {category["id"]: category for category in categories}
    with contextlib.redirect_stdout(io.StringIO()):
        stat = pq_compute_single_core(0, pairs, str(folder / "gt"), str(folder / "pred"), by_id)
    return {
        name: np.array([getattr(stat[category["id"]], name) for category in categories])
        for name in ("iou", "tp", "fp", "fn")
    }


def write_panoptic_set(
    root: Path, images: list[tuple[np.ndarray, list[dict[str, Any]]]], categories: list[dict[str, Any]]
) -> Path:
    """Writes images (random pixels), id maps and panoptic.json of a COCO panoptic set; returns the json's path."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True, exist_ok=True)
    infos, annotations = [], []
    for number, (id_map, segments) in enumerate(images, start=1):
        height, width = id_map.shape
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"image{number}.jpg")
        name = write_map(root / "panoptic", f"image{number}", id_map)
        infos.append({"id": number, "file_name": f"image{number}.jpg", "height": height, "width": width})
        annotations.append({"image_id": number, "file_name": name, "segments_info": segments})
    json_file = root / "panoptic.json"
    json_file.write_text(json.dumps({"images": infos, "annotations": annotations, "categories": categories}))
    return json_file
