"""Time of a whole panoptic evaluation (process + evaluate): ConvMask's evaluator beside Detectron2's.

    OMP_NUM_THREADS=1 python benchmarks/bench_panoptic_quality.py

Random segmentations of 480 x 640 to 800 x 1333 pixels; both evaluators get the same predictions and the same ground
truth in one run, in turn; medians. Detectron2's evaluator encodes each prediction as a PNG in ``process``, and
panopticapi decodes and compares in one process per core; ConvMask's uses one process and one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOPanopticEvaluator, DatasetEvaluator

from convmask.data.panoptic import register_panoptic
from convmask.evaluation import PanopticEvaluator
from convmask.evaluation.panoptic_dump import encode_panoptic_png

SIZES = [(480, 640), (427, 640), (640, 480), (600, 800), (800, 1067), (800, 1333)]
THINGS, STUFF = 80, 53
SEGMENTS = 20


def wobbly_regions(rng: np.random.Generator, shape: tuple[int, int], count: int) -> np.ndarray:
    """(H, W) labels 0 to count - 1: the nearest of ``count`` random points, in coordinates that waver as borders do.

    Args:
        rng: draws the points and the noise.
        shape: (H, W).
        count: number of regions, some of which may be empty.
    """
    coordinates = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij"))
    for cell, strength in ((8, 2.0), (64, 15.0)):
        coarse = rng.normal(size=(2, shape[0] // cell + 2, shape[1] // cell + 2)).astype(np.float32)
        waver = [cv2.resize(plane, shape[::-1], interpolation=cv2.INTER_CUBIC) for plane in coarse]
        coordinates += strength * np.stack(waver)
    points = rng.random((count, 2)) * shape
    labels, nearest = np.zeros(shape, dtype=np.int32), np.full(shape, np.inf, dtype=np.float32)
    for label, (row, column) in enumerate(points):
        distance = (coordinates[0] - row) ** 2 + (coordinates[1] - column) ** 2
        labels[distance < nearest] = label
        nearest = np.minimum(nearest, distance)
    return labels


def make_image(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A true id map with random ids of 24 bits, as COCO's, and its segments; a tenth of the regions is VOID."""
    regions = wobbly_regions(rng, shape, SEGMENTS)
    ids = rng.choice(2**24 - 1, size=SEGMENTS, replace=False).astype(np.int32) + 1
    ids[rng.random(SEGMENTS) < 0.1] = 0
    id_map = ids[regions]
    segments = []
    for identity in np.unique(id_map[id_map > 0]).tolist():
        rows, columns = np.nonzero(id_map == identity)
        box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
        segments.append(
            {
                "id": identity,
                "category_id": int(rng.integers(1, THINGS + STUFF + 1)),
                "iscrowd": int(rng.random() < 0.05),
                "area": int(rows.size),
                "bbox": box,
            }
        )
    return id_map, segments


def make_prediction(
    rng: np.random.Generator, id_map: np.ndarray, segments: list[dict[str, Any]]
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """``panoptic_seg`` made from the truth: shifted by some pixels, renumbered from 1, a third of the classes wrong."""
    shift = tuple(rng.integers(-6, 7, size=2))
    predicted = np.zeros(id_map.shape, dtype=np.int32)
    segments_info = []
    for number, segment in enumerate(segments, start=1):
        predicted[np.roll(id_map == segment["id"], shift, axis=(0, 1))] = number
        category = segment["category_id"] if rng.random() < 0.67 else int(rng.integers(1, THINGS + STUFF + 1))
        isthing = category <= THINGS
        contiguous = category - 1 if isthing else category - THINGS
        segments_info.append({"id": number, "isthing": isthing, "category_id": contiguous})
    return torch.as_tensor(predicted), segments_info


def make_dataset(root: Path, count: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Writes and registers "bench_panoptic"; returns model inputs and outputs."""
    rng = np.random.default_rng(seed)
    categories = [{"id": i, "name": f"c{i}", "isthing": int(i <= THINGS)} for i in range(1, THINGS + STUFF + 1)]
    (root / "panoptic").mkdir()
    infos, annotations, outputs = [], [], []
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        id_map, segments = make_image(rng, (height, width))
        name = f"{number:06d}.png"
        (root / "panoptic" / name).write_bytes(encode_panoptic_png(id_map))
        infos.append({"id": number, "file_name": name, "height": height, "width": width})
        annotations.append({"image_id": number, "file_name": name, "segments_info": segments})
        outputs.append({"panoptic_seg": make_prediction(rng, id_map, segments)})
    json_file = root / "panoptic.json"
    json_file.write_text(json.dumps({"images": infos, "annotations": annotations, "categories": categories}))
    register_panoptic("bench_panoptic", root / "images", json_file, root / "panoptic")
    inputs = [{k: d[k] for k in ("file_name", "image_id")} for d in DatasetCatalog.get("bench_panoptic")]
    return inputs, outputs


def timed(
    evaluator: DatasetEvaluator, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]
) -> tuple[float, dict[str, float]]:
    """Seconds of one evaluation, and its results. Detectron2's evaluator changes the predictions: it gets a copy."""
    outputs = copy.deepcopy(outputs)
    start = time.perf_counter()
    evaluator.reset()
    for given, output in zip(inputs, outputs, strict=True):
        evaluator.process([given], [output])
    results = evaluator.evaluate()["panoptic_seg"]
    return time.perf_counter() - start, results


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("convmask").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        inputs, outputs = make_dataset(Path(folder), arguments.images, arguments.seed)
        cached = PanopticEvaluator("bench_panoptic", cache_ground_truth=True)
        timed(cached, inputs, outputs)
        variants: dict[str, Callable[[], DatasetEvaluator]] = {
            "Detectron2 COCOPanopticEvaluator": lambda: COCOPanopticEvaluator("bench_panoptic"),
            "ConvMask, ground truth decoded from PNG": lambda: PanopticEvaluator("bench_panoptic"),
            "ConvMask, ground truth cached": lambda: cached,
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        results: dict[str, dict[str, float]] = {}
        for _ in range(arguments.repeats):
            for name, make in variants.items():
                elapsed, results[name] = timed(make(), inputs, outputs)
                seconds[name].append(elapsed)
    reference = next(iter(variants))
    for name in variants:
        for key, value in results[reference].items():
            assert abs(results[name][key] - value) < 1e-9, (name, key)
    pixels = sum(output["panoptic_seg"][0].numel() for output in outputs) / len(outputs)
    print(
        f"{arguments.images} images of {pixels / 1e6:.2f} million pixels on average, {arguments.repeats} repeats; "
        f"panopticapi in {multiprocessing.cpu_count()} processes, everything else on 1 thread "
        f"(OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}); PQ {results[reference]['PQ']:.2f} by all.\n"
    )
    print("| evaluator | ms per image (median) | times faster |\n|---|---:|---:|")
    base = statistics.median(seconds[reference])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"| {name} | {1000 * median / len(inputs):.1f} | {base / median:.1f} |")


if __name__ == "__main__":
    main()
