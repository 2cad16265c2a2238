"""What is measured of a trained method: its operating point, pictures, size and speed."""

from __future__ import annotations

import json
from typing import Any

from detectron2.config import CfgNode

from convmask.benchmark import benchmark_config
from convmask.benchmark.images import images_of_dataset
from convmask.comparison.operating_point import best_threshold
from convmask.comparison.pictures import draw_predictions
from convmask.comparison.records import MethodFolder
from convmask.engine.predictor import Predictor
from convmask.evaluation.coco import panoptic_coco_api

# Images of the test set that the model is timed on, twice each.
_TIMED = 10


def measure(cfg: CfgNode, folder: MethodFolder, indices: list[int]) -> dict[str, Any]:
    """Measures the model that :func:`~convmask.comparison.training.train_within` has left, and keeps the record.

    Args:
        cfg: complete, with the weights in ``MODEL.WEIGHTS``.
        folder: of the method; ``pictures`` in it is written.
        indices: of the images of the test set that are drawn.

    Returns:
        ``threshold`` and ``f1`` of :func:`~convmask.comparison.operating_point.best_threshold`, and ``benchmark`` of
        :func:`~convmask.benchmark.benchmark_config` on images of the test set.
    """
    dataset = cfg.DATASETS.TEST[0]
    detections = json.loads((folder.path / "inference" / "coco_instances_results.json").read_text())
    threshold, f1 = best_threshold(panoptic_coco_api(dataset), detections, cfg.TEST.AP_MAX_DETECTIONS)
    draw_predictions(Predictor(cfg), dataset, indices, threshold, folder.path / "pictures")
    cost = benchmark_config(cfg, images_of_dataset(cfg, _TIMED), repeats=2 * _TIMED)
    record = {"threshold": threshold, "f1": f1, "benchmark": cost}
    folder.write("measured", record)
    return record
