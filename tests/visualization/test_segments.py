"""Predictions of every kind as segments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from convmask.visualization import Segment, segments_of


@pytest.fixture(scope="module")
def metadata() -> Metadata:
    return Metadata(
        thing_classes=["cat", "dog"],
        stuff_classes=["things", "grass", "sky"],
        thing_colors=[[250, 0, 0], [0, 0, 250]],
    )


def _whole(segment: Segment, shape: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    height, width = segment.mask.shape
    mask[segment.top : segment.top + height, segment.left : segment.left + width] = segment.mask
    return mask


def test_panoptic_segments_have_names_places_and_scores(metadata: Metadata) -> None:
    ids = torch.zeros(6, 8, dtype=torch.int32)
    ids[1:3, 2:5] = 7
    ids[4:, :] = 9
    info = [
        {"id": 7, "isthing": True, "category_id": 1, "score": 0.8},
        {"id": 9, "isthing": False, "category_id": 2},
        {"id": 11, "isthing": True, "category_id": 0, "score": 0.9},
    ]
    dog, sky = segments_of({"panoptic_seg": (ids, info)}, metadata)
    assert (dog.name, dog.score, dog.top, dog.left, dog.mask.shape) == ("dog", 0.8, 1, 2, (2, 3))
    assert (sky.name, sky.score, sky.is_thing) == ("sky", None, False)
    assert [s.name for s in segments_of({"panoptic_seg": (ids, info)}, metadata, threshold=0.81)] == ["sky"]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 5), st.randoms(use_true_random=False))
def test_the_masks_are_those_of_the_id_map(height: int, width: int, count: int, random: object) -> None:
    rng = np.random.default_rng(random.randrange(2**32))  # type: ignore[attr-defined]
    ids = rng.integers(0, count + 1, (height, width)) * 1000
    info = [{"id": 1000 * i, "isthing": True, "category_id": i} for i in range(1, count + 1)]
    segments = segments_of({"panoptic_seg": (ids, info)}, Metadata())
    found = {segment.name: _whole(segment, (height, width)) for segment in segments}
    for i in range(1, count + 1):
        expected = ids == 1000 * i
        assert expected.any() == (f"class {i}" in found)
        if expected.any():
            np.testing.assert_array_equal(found[f"class {i}"], expected)


def test_instances_without_masks_are_their_boxes(metadata: Metadata) -> None:
    instances = Instances((10, 12))
    instances.pred_boxes = Boxes(torch.tensor([[2.0, 1.0, 5.0, 4.0], [-3.0, -3.0, -1.0, -1.0]]))
    instances.pred_classes = torch.tensor([0, 1])
    instances.scores = torch.tensor([0.9, 0.9])
    (cat,) = segments_of({"instances": instances}, metadata)
    assert (cat.name, cat.top, cat.left, cat.mask.shape) == ("cat", 1, 2, (3, 3))


def test_no_instance_is_no_segment(metadata: Metadata) -> None:
    instances = Instances((4, 4))
    instances.pred_masks = torch.zeros(0, 4, 4, dtype=torch.bool)
    instances.pred_classes = torch.zeros(0, dtype=torch.int64)
    instances.scores = torch.zeros(0)
    assert segments_of({"instances": instances}, metadata) == []
    assert segments_of({}, metadata) == []


def test_semantic_labels_of_both_layouts(metadata: Metadata) -> None:
    separated = np.array([[0, 1], [2, 255]])
    assert [s.name for s in segments_of({"sem_seg": separated}, metadata)] == ["grass", "sky"]
    # Logits of the layout "all": 2 things and 2 kinds of stuff.
    logits = torch.zeros(4, 2, 2)
    for label, (y, x) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        logits[label, y, x] = 1.0
    segments = segments_of({"sem_seg": logits}, metadata)
    assert [(s.name, s.is_thing) for s in segments] == [("cat", True), ("dog", True), ("grass", False), ("sky", False)]


def test_colours_belong_to_the_class_and_hardly_move_with_the_object(metadata: Metadata) -> None:
    def color_at(x: int, category: int) -> np.ndarray:
        ids = np.zeros((100, 100), dtype=np.int32)
        ids[40:50, x : x + 10] = 1
        info = [{"id": 1, "isthing": True, "category_id": category}]
        return np.array(segments_of({"panoptic_seg": (ids, info)}, metadata)[0].color)

    assert color_at(10, 0).argmax() == 0
    assert color_at(10, 1).argmax() == 2
    assert np.abs(color_at(10, 0) - color_at(11, 0)).max() <= 12
    np.testing.assert_array_equal(color_at(10, 0), color_at(10, 0))
