from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from convmask.inference import merge_instances

SIZE = (40, 50)


def instances(*found: tuple[int, float, tuple[int, int, int, int]], size: tuple[int, int] = SIZE) -> Instances:
    """Rectangles (class, score, (x1, y1, x2, y2))."""
    result = Instances(size)
    result.pred_boxes = Boxes(torch.tensor([box for *_, box in found], dtype=torch.float32).reshape(-1, 4))
    result.scores = torch.tensor([score for _, score, _ in found])
    result.pred_classes = torch.tensor([category for category, *_ in found], dtype=torch.int64)
    result.pred_masks = torch.zeros(len(found), *size, dtype=torch.bool)
    for mask, (*_, (x1, y1, x2, y2)) in zip(result.pred_masks, found, strict=True):
        mask[y1:y2, x1:x2] = True
    return result


def reference(views: list[Instances], threshold: float) -> list[tuple[float, int, np.ndarray, np.ndarray]]:
    """The rules with whole masks, one detection after the other: score, class, box, mask of each result."""
    found = []
    for index, view in enumerate(views):
        for detection in range(len(view)):
            mask = view.pred_masks[detection].numpy()
            box = view.pred_boxes.tensor[detection].double().numpy()
            found.append((float(view.scores[detection]), index, int(view.pred_classes[detection]), mask, box))
    found.sort(key=lambda item: -item[0])
    groups: list[list[tuple]] = []
    for item in found:
        best, group_of = threshold, None
        for group in groups:
            leader = group[0]
            if leader[2] != item[2] or any(member[1] == item[1] for member in group):
                continue
            iou = (leader[3] & item[3]).sum() / (leader[3] | item[3]).sum()
            if iou > best or (iou == best and group_of is None):
                best, group_of = iou, group
        if group_of is None:
            groups.append([item])
        else:
            group_of.append(item)
    results = []
    for group in groups:
        scores = np.array([member[0] for member in group])
        votes = sum(score * member[3] for score, member in zip(scores, group, strict=True))
        box = sum(score * member[4] for score, member in zip(scores, group, strict=True)) / scores.sum()
        results.append((scores.sum() / len(views), group[0][2], box, votes >= scores.sum() / 2 - 1e-9))
    return sorted(results, key=lambda item: -item[0])


def random_views(rng: np.random.Generator, number: int) -> list[Instances]:
    views = []
    for _ in range(number):
        found = []
        for _ in range(int(rng.integers(0, 12))):
            x, y = int(rng.integers(0, 3)) * 12 + int(rng.integers(0, 4)), int(rng.integers(0, 24))
            found.append((int(rng.integers(2)), float(rng.random() + 0.01), (x, y, x + 14, y + 14)))
        views.append(instances(*found))
    return views


@pytest.mark.parametrize("seed", range(8))
def test_the_rules_done_plainly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    views = random_views(rng, int(rng.integers(1, 5)))
    merged, expected = merge_instances(views, 0.4), reference(views, 0.4)
    assert len(merged) == len(expected)
    for index, (score, category, box, mask) in enumerate(expected):
        assert float(merged.scores[index]) == pytest.approx(score)
        assert int(merged.pred_classes[index]) == category
        assert merged.pred_boxes.tensor[index].tolist() == pytest.approx(box.tolist())
        assert np.array_equal(merged.pred_masks[index].numpy(), mask)


def test_what_all_views_see_keeps_its_score_and_what_one_sees_loses() -> None:
    both, lone = (0, 0.8, (5, 5, 15, 15)), (0, 0.6, (30, 20, 40, 30))
    merged = merge_instances([instances(both, lone), instances((0, 0.6, (5, 5, 15, 17)))])
    assert merged.scores.tolist() == pytest.approx([0.7, 0.3])
    assert merged.pred_boxes.tensor[0].tolist() == pytest.approx([5, 5, 15, (0.8 * 15 + 0.6 * 17) / 1.4])
    assert merged.pred_masks[0].sum() == 100


def test_classes_are_kept_apart_and_so_is_what_one_view_gives_twice() -> None:
    box = (5, 5, 15, 15)
    assert merge_instances([instances((0, 0.9, box)), instances((1, 0.9, box))]).scores.tolist() == pytest.approx(
        [0.45, 0.45]
    )
    twice = instances((0, 0.9, box), (0, 0.8, box))
    assert merge_instances([twice, twice]).scores.tolist() == pytest.approx([0.9, 0.8])


def test_boxes_stand_in_for_masks_that_are_empty_or_absent() -> None:
    views = [instances((0, 0.5, (5, 5, 15, 15))), instances((0, 0.5, (5, 5, 15, 16)))]
    for view in views:
        view.pred_masks[:] = False
    merged = merge_instances(views)
    assert len(merged) == 1 and not merged.pred_masks.any()
    for view in views:
        view.remove("pred_masks")
    merged = merge_instances(views)
    assert len(merged) == 1 and not merged.has("pred_masks")
    nothing = instances((0, 0.5, (5, 5, 5, 5)))
    assert len(merge_instances([nothing, nothing])) == 0


def test_the_limit_keeps_the_best() -> None:
    found = [(0, 0.1 * k, (3 * k, 0, 3 * k + 3, 3)) for k in range(1, 6)]
    assert merge_instances([instances(*found)], limit=2).scores.tolist() == pytest.approx([0.5, 0.4])


def test_no_detections() -> None:
    merged = merge_instances([instances(), instances()])
    assert len(merged) == 0 and merged.pred_masks.shape == (0, *SIZE)


def test_views_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no view"):
        merge_instances([])
    with pytest.raises(ValueError, match=r"sizes \[\(30, 30\), \(40, 50\)\]"):
        merge_instances([instances(), instances(size=(30, 30))])


def test_hundreds_of_objects_in_eight_views() -> None:
    rng = np.random.default_rng(0)
    places = rng.integers(0, 240, (400, 2))
    views = []
    for _ in range(8):
        found = [(0, float(rng.random()), (x, y, x + 12, y + 12)) for x, y in (places + rng.integers(0, 2, 2)).tolist()]
        views.append(instances(*found, size=(256, 256)))
    merged = merge_instances(views, limit=400)
    assert len(merged) == 400 and merged.scores[0] > 0.5
