from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest

from convmask.comparison.operating_point import best_threshold
from convmask.evaluation.coco import _coco_api


def square(x: int, image: int = 1) -> dict[str, Any]:
    mask = np.zeros((40, 200), np.uint8, order="F")
    mask[10:30, x : x + 20] = 1
    return {"image_id": image, "category_id": 1, "segmentation": mask_util.encode(mask)}


def truth_of(*annotations: dict[str, Any]) -> Any:
    full = [
        {**annotation, "id": i, "iscrowd": 0, "area": 400, "bbox": [0, 0, 20, 20]}
        for i, annotation in enumerate(annotations, 1)
    ]
    images = [{"id": i, "height": 40, "width": 200} for i in (1, 2)]
    return _coco_api({"images": images, "annotations": full, "categories": [{"id": 1, "name": "square"}]})


def test_false_positives_below_the_threshold_do_not_count() -> None:
    truth = truth_of(square(0), square(30), square(0, image=2))
    detections = [{**square(0), "score": 0.9}, {**square(30), "score": 0.7}, {**square(0, 2), "score": 0.6}]
    wrong = [{**square(100), "score": 0.3}, {**square(130), "score": 0.2}]
    threshold, f1 = best_threshold(truth, detections + wrong, 100)
    assert threshold == pytest.approx(0.6) and f1 == pytest.approx(1.0, abs=1e-6)


def test_against_every_threshold_in_turn() -> None:
    # precision falls monotonically here, so that COCO's interpolation changes nothing
    truth = truth_of(*(square(25 * i) for i in range(8)))
    detections = [{**square(25 * i), "score": 0.95 - 0.1 * i} for i in range(6)]
    detections += [{**square(25 * i, image=2), "score": 0.52 - 0.1 * i} for i in range(5)]
    plain = {}
    for score in [d["score"] for d in detections]:
        kept = [d for d in detections if d["score"] >= score]
        hits = sum(d["image_id"] == 1 for d in kept)
        plain[score] = 2 * hits / (len(kept) + 8)
    threshold, f1 = best_threshold(truth, detections, 100)
    assert threshold == pytest.approx(max(plain, key=plain.__getitem__))
    assert f1 == pytest.approx(max(plain.values()), abs=0.01)  # recalls are in steps of 0.01


def test_without_a_match() -> None:
    assert best_threshold(truth_of(square(0)), [{**square(90), "score": 0.9}], 100) == (1.0, 0.0)
    assert best_threshold(truth_of(square(0)), [], 100) == (1.0, 0.0)
