from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from convmask.evaluation import VOCInstanceEvaluator
from convmask.evaluation.voc_instances import average_precision, true_masks

NAME = "few_voc_instances"
SIZE = (20, 30)
Box = tuple[int, int, int, int]


def mask(box: Box) -> np.ndarray:
    result = np.zeros(SIZE, np.uint8)
    result[box[1] : box[3], box[0] : box[2]] = 1
    return result


def record(image: str, objects: list[tuple[int, Box]]) -> dict[str, Any]:
    annotations = [
        {"category_id": category, "segmentation": mask_util.encode(np.asfortranarray(mask(box)))}
        for category, box in objects
    ]
    return {"image_id": image, "height": SIZE[0], "width": SIZE[1], "annotations": annotations}


RECORDS = [
    record("a", [(0, (0, 0, 10, 10)), (0, (12, 0, 22, 10)), (1, (0, 12, 10, 20))]),
    record("b", [(0, (5, 5, 15, 15))]),
]


@pytest.fixture
def dataset() -> Iterator[str]:
    DatasetCatalog.register(NAME, lambda: RECORDS)
    MetadataCatalog.get(NAME).thing_classes = ["x", "y", "z"]
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def output(found: list[tuple[int, float, Box]]) -> dict[str, Any]:
    instances = Instances(SIZE)
    instances.pred_classes = torch.tensor([f[0] for f in found], dtype=torch.int64)
    instances.scores = torch.tensor([f[1] for f in found])
    instances.pred_masks = torch.from_numpy(np.stack([mask(f[2]) for f in found])).bool()
    return {"instances": instances}


def evaluate(name: str, outputs: dict[str, list[tuple[int, float, Box]]]) -> dict[str, float]:
    evaluator = VOCInstanceEvaluator(name, distributed=False)
    for image, found in outputs.items():
        evaluator.process([{"image_id": image}], [output(found)])
    return evaluator.evaluate()["mAPr"]


def test_perfect_masks(dataset: str) -> None:
    outputs = {
        "a": [(0, 0.9, (0, 0, 10, 10)), (0, 0.8, (12, 0, 22, 10)), (1, 0.7, (0, 12, 10, 20))],
        "b": [(0, 0.6, (5, 5, 15, 15))],
    }
    results = evaluate(dataset, outputs)
    for metric in ("AP50-07", "AP50-area", "AP70-07", "AP70-area"):
        assert results[metric] == pytest.approx(100)
        assert math.isnan(results[f"{metric}-z"])  # no objects, no part in the mean


def test_a_second_detection_of_an_object_is_wrong(dataset: str) -> None:
    """Three objects of the class; right, wrong (the same object), right: precisions 1, 1/2, 2/3 at recalls 1/3, 2/3."""
    outputs = {"a": [(0, 0.9, (0, 0, 10, 10)), (0, 0.8, (0, 0, 10, 9)), (0, 0.7, (12, 0, 22, 10))], "b": []}
    results = evaluate(dataset, {"a": outputs["a"]})
    assert results["AP50-area-x"] == pytest.approx(100 * (1 / 3 + 1 / 3 * 2 / 3))
    assert results["AP50-07-x"] == pytest.approx(100 * (4 * 1 + 3 * 2 / 3) / 11)  # recalls 0 to .3, .4 to .6
    assert results["AP50-07-y"] == 0
    assert results["AP50-07"] == pytest.approx(results["AP50-07-x"] / 2)


def test_thresholds_differ(dataset: str) -> None:
    results = evaluate(dataset, {"b": [(0, 0.9, (5, 5, 15, 11))]})  # IoU 0.6
    assert results["AP50-area-x"] == pytest.approx(100 / 3)
    assert results["AP70-area-x"] == 0


def test_a_model_without_masks_gives_no_results(dataset: str) -> None:
    evaluator = VOCInstanceEvaluator(dataset, distributed=False)
    evaluator.process([{"image_id": "a"}], [{}])
    assert evaluator.evaluate() == {}


@pytest.mark.parametrize("thresholds", [(), (0.0,), (1.5,)])
def test_thresholds_are_checked(dataset: str, thresholds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="thresholds are"):
        VOCInstanceEvaluator(dataset, thresholds)


@settings(max_examples=30, deadline=None)
@given(
    found=st.lists(
        st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 20), st.integers(0, 10), st.integers(1, 12)), max_size=8
    ),
    threshold=st.sampled_from([0.3, 0.5, 0.7]),
)
def test_equals_a_plain_computation(found: list[tuple[str, int, int, int]], threshold: float) -> None:
    """Bitmap IoU, one detection after the other, and the area under the interpolated curve by its definition."""
    boxes = [(image, (x, y, x + side, y + side)) for image, x, y, side in found]
    detections = [
        (image, 0, 1 - i / 10, mask_util.encode(np.asfortranarray(mask(box)))) for i, (image, box) in enumerate(boxes)
    ]
    actual = average_precision(true_masks(RECORDS), detections, 0, threshold, eleven_points=False)
    taken, precision, recall, hits = set(), [], [], 0
    objects = {"a": [mask((0, 0, 10, 10)), mask((12, 0, 22, 10))], "b": [mask((5, 5, 15, 15))]}
    for number, (image, box) in enumerate(boxes, start=1):
        own = mask(box)
        overlaps = [(own & other).sum() / (own | other).sum() for other in objects[image]]
        best = int(np.argmax(overlaps))
        if overlaps[best] >= threshold and (image, best) not in taken:
            taken.add((image, best))
            hits += 1
        precision.append(hits / number)
        recall.append(hits / 3)
    area = sum(
        max((p for p, r in zip(precision, recall, strict=True) if r >= level), default=0) / 3
        for level in (1 / 3, 2 / 3, 1)
    )
    assert actual == pytest.approx(area)
