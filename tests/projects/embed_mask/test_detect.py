"""Boxes from the predictions of FCOS, against loops over locations, classes and boxes."""

from __future__ import annotations

import pytest
import torch

from convmask.projects.embed_mask.fcos_head import FCOSOutputs
from convmask.projects.embed_mask.fcos_inference import Detections, FCOSInferenceOptions, detect, to_instances
from convmask.projects.embed_mask.fcos_targets import Locations, make_locations

SIZES, STRIDES, CLASSES = [(6, 7), (3, 4)], (8, 16), 3
# of the image, without its padding
SIZE = (44, 50)


def predictions() -> tuple[FCOSOutputs, Locations]:
    """Large boxes that overlap, of one image."""
    generator = torch.Generator().manual_seed(3)

    def draw(channels: int) -> list[torch.Tensor]:
        return [torch.randn(1, channels, *size, generator=generator) for size in SIZES]

    distances = [x.abs() + 0.5 for x in draw(4)]
    outputs = FCOSOutputs(draw(CLASSES), distances, draw(1), [], tuple(float(s) for s in STRIDES))
    return outputs, make_locations(SIZES, STRIDES, torch.device("cpu"))


def iou(a: list[float], b: list[float], extent: float) -> float:
    def area(box: list[float]) -> float:
        return max(box[2] - box[0] + extent, 0) * max(box[3] - box[1] + extent, 0)

    common = [max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])]
    if common[2] - common[0] + extent < 0 or common[3] - common[1] + extent < 0:
        return 0.0
    return area(common) / (area(a) + area(b) - area(common))


def by_loops(outputs: FCOSOutputs, locations: Locations, options: FCOSInferenceOptions) -> list[tuple]:
    """(score, class, location, box), the best first."""
    extent = 1.0 if options.inclusive else 0.0
    candidates, first = [], 0
    for level, (height, width) in enumerate(SIZES):
        of_level = []
        for cell in range(height * width):
            y, x = divmod(cell, width)
            point = locations.points[first + cell].tolist()
            left, top, right, bottom = (outputs.distances[level][0, :, y, x] * STRIDES[level]).tolist()
            box = [point[0] - left, point[1] - top, point[0] + right, point[1] + bottom]
            box = [min(max(v, 0.0), SIZE[1 - i % 2] - extent) for i, v in enumerate(box)]
            centerness = outputs.centerness[level][0, 0, y, x].sigmoid().item()
            for c in range(CLASSES):
                probability = outputs.logits[level][0, c, y, x].sigmoid().item()
                if probability > options.score_threshold:
                    of_level.append((probability * centerness, c, first + cell, box))
        candidates += sorted(of_level, reverse=True)[: options.pre_nms_topk]
        first += height * width
    kept: list[tuple] = []
    for candidate in sorted(candidates, reverse=True):
        if all(c[1] != candidate[1] or iou(c[3], candidate[3], extent) <= options.nms_threshold for c in kept):
            kept.append(candidate)
    return kept[: options.detections]


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("topk", [1000, 9])
def test_detections_are_those_of_loops(inclusive: bool, topk: int) -> None:
    outputs, locations = predictions()
    options = FCOSInferenceOptions(0.3, topk, nms_threshold=0.4, detections=20, inclusive=inclusive)
    expected = by_loops(outputs, locations, options)
    (found,) = detect(outputs, locations, [SIZE], options)
    assert 5 < len(expected) <= 20
    assert found.locations.tolist() == [x[2] for x in expected]
    assert found.classes.tolist() == [x[1] for x in expected]
    torch.testing.assert_close(found.scores, torch.tensor([x[0] for x in expected]))
    torch.testing.assert_close(found.boxes, torch.tensor([x[3] for x in expected]))


def test_boxes_are_scaled_and_end_with_their_last_pixel() -> None:
    boxes = torch.tensor([[0.0, 2.0, 9.0, 19.0], [5.0, 5.0, 39.0, 19.0]])
    detections = Detections(boxes, torch.tensor([0.9, 0.5]), torch.tensor([1, 0]), torch.tensor([7, 3]))
    inclusive = to_instances(detections, (20, 40), (40, 120), inclusive=True)
    assert inclusive.pred_boxes.tensor.tolist() == [[0, 4, 28, 39], [15, 10, 118, 39]]
    exclusive = to_instances(detections, (20, 40), (40, 120), inclusive=False)
    assert exclusive.pred_boxes.tensor.tolist() == [[0, 4, 27, 38], [15, 10, 117, 38]]
