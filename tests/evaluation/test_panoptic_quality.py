from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from panopticapi.utils import rgb2id
from PIL import Image

from convmask.evaluation.panoptic_quality import QualityCounts, image_quality

from .oracle import CATEGORIES, CATEGORY_IDS, draw_segments, panopticapi_counts, perturb


def check_equal(counts: QualityCounts, oracle: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(counts.true_positives, oracle["tp"])
    np.testing.assert_array_equal(counts.false_positives, oracle["fp"])
    np.testing.assert_array_equal(counts.false_negatives, oracle["fn"])
    np.testing.assert_allclose(counts.iou, oracle["iou"], rtol=0, atol=1e-9)


def total(images, category_ids=CATEGORY_IDS) -> QualityCounts:
    counts = QualityCounts.zeros(len(category_ids))
    for image in images:
        counts += image_quality(*image, category_ids)
    return counts


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    true_segments=st.integers(0, 8),
    predicted_segments=st.integers(0, 8),
    independent=st.booleans(),
)
def test_counts_equal_panopticapi_on_random_images(seed, height, width, true_segments, predicted_segments, independent):
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(2):
        truth = draw_segments(rng, (height, width), true_segments, 2**24 - 1, crowds=True)
        if independent:
            prediction = draw_segments(rng, (height, width), predicted_segments, 300)
        else:
            prediction = perturb(rng, *truth, CATEGORY_IDS)
        images.append((*truth, *prediction))
    with tempfile.TemporaryDirectory() as folder:
        check_equal(total(images), panopticapi_counts(Path(folder), images, CATEGORIES))


def segment(identity: int, category: int, id_map: np.ndarray, crowd: int = 0) -> dict:
    return {"id": identity, "category_id": category, "iscrowd": crowd, "area": int((id_map == identity).sum())}


def test_prediction_on_void_and_crowd_is_ignored(tmp_path):
    truth = np.zeros((10, 10), dtype=np.int32)
    truth[:, 4:7] = 1  # crowd of discs
    truth[:, 7:] = 2
    prediction = np.zeros_like(truth)
    prediction[0, :9] = 1  # seven of nine pixels on VOID or crowd: ignored
    prediction[1, 3:9] = 2  # four of six: ignored
    prediction[2, 4:] = 3  # three of six, not more than half: a false positive
    prediction[3, 4:9] = 4  # a ring, so that discs' crowd does not excuse it
    true_segments = [segment(1, 3, truth, crowd=1), segment(2, 11, truth)]
    predicted_segments = [{"id": i, "category_id": c} for i, c in ((1, 3), (2, 3), (3, 3), (4, 7))]
    image = (truth, true_segments, prediction, predicted_segments)
    counts = total([image])
    check_equal(counts, panopticapi_counts(tmp_path, [image], CATEGORIES))
    assert counts.false_positives.tolist() == [1, 1, 0, 0]
    assert counts.false_negatives.tolist() == [0, 0, 1, 0]


def test_void_under_a_prediction_does_not_enlarge_the_union():
    truth = np.zeros((4, 10), dtype=np.int32)
    truth[:, :5] = 9
    prediction = np.full_like(truth, 1)
    counts = total([(truth, [segment(9, 11, truth)], prediction, [{"id": 1, "category_id": 11}])])
    assert counts.iou.tolist() == [0, 0, 1, 0]


def test_iou_of_exactly_one_half_is_no_match():
    truth = np.full((1, 4), 1, dtype=np.int32)
    prediction = np.array([[1, 1, 2, 2]], dtype=np.int32)
    segments = [{"id": 1, "category_id": 3}, {"id": 2, "category_id": 3}]
    counts = total([(truth, [segment(1, 3, truth)], prediction, segments)])
    assert (counts.true_positives[0], counts.false_positives[0], counts.false_negatives[0]) == (0, 2, 1)


@pytest.mark.parametrize("crowd_order", [(1, 2), (2, 1)])
def test_only_the_last_crowd_region_of_a_category_counts(tmp_path, crowd_order):
    truth = np.array([[1, 1, 1, 2, 2, 3]], dtype=np.int32)
    prediction = np.array([[5, 5, 5, 5, 0, 0]], dtype=np.int32)
    true_segments = [segment(i, 3, truth, crowd=1) for i in crowd_order] + [segment(3, 11, truth)]
    image = (truth, true_segments, prediction, [{"id": 5, "category_id": 3}])
    counts = total([image])
    check_equal(counts, panopticapi_counts(tmp_path, [image], CATEGORIES))
    assert counts.false_positives[0] == (0 if crowd_order[-1] == 1 else 1)


def test_true_segment_without_pixels_and_unlisted_ids_follow_panopticapi(tmp_path):
    truth = np.array([[4, 4, 6, 6]], dtype=np.int32)  # 6 is not listed
    prediction = np.array([[1, 1, 1, 2]], dtype=np.int32)
    true_segments = [segment(4, 3, truth), {"id": 5, "category_id": 7, "iscrowd": 0, "area": 3}]
    image = (truth, true_segments, prediction, [{"id": 1, "category_id": 3}, {"id": 2, "category_id": 3}])
    counts = total([image])
    check_equal(counts, panopticapi_counts(tmp_path, [image], CATEGORIES))
    assert counts.false_negatives.tolist() == [0, 1, 0, 0]


def test_stated_area_is_used_as_panopticapi_does(tmp_path):
    truth = np.array([[4, 4, 4, 0]], dtype=np.int32)
    true_segments = [{"id": 4, "category_id": 3, "iscrowd": 0, "area": 5}]
    image = (truth, true_segments, truth.copy(), [{"id": 4, "category_id": 3}])
    counts = total([image])
    check_equal(counts, panopticapi_counts(tmp_path, [image], CATEGORIES))
    assert counts.iou[0] == pytest.approx(3 / 5)


def test_means_leave_out_categories_that_never_occur():
    counts = QualityCounts(
        np.array([1.5, 0, 0.9, 0]), np.array([2, 0, 1, 0]), np.array([1, 0, 0, 2]), np.array([0] * 4)
    )
    values = counts.mean(np.ones(4, dtype=bool))
    assert values["N"] == 3
    assert values["PQ"] == pytest.approx((1.5 / 2.5 + 0.9 + 0) / 3)
    assert values["SQ"] == pytest.approx((0.75 + 0.9 + 0) / 3)
    assert values["RQ"] == pytest.approx((0.8 + 1 + 0) / 3)
    assert np.isnan(counts.per_category()["PQ"]).tolist() == [False, True, False, False]
    nothing = counts.mean(np.array([False, True, False, False]))
    assert nothing["N"] == 0 and np.isnan(nothing["PQ"])


@pytest.mark.parametrize(
    ("true_map", "predicted_map", "segments", "message"),
    [
        ([[1, 1]], [[1, 1, 1]], [{"id": 1, "category_id": 3}], "prediction has 1 x 3 pixels, the ground truth 1 x 2"),
        ([[1, 1]], [[1, 2]], [{"id": 1, "category_id": 3}], "holds the id 2, which is not among the segments"),
        ([[1, 1]], [[-1, -1]], [], "holds the id -1"),
        ([[1, 1]], [[1, 1]], [{"id": i, "category_id": 3} for i in (1, 2)], "segment 2 is listed but has no pixel"),
        ([[1, 1]], [[1, 1]], [{"id": 1, "category_id": 5}], "segment 1 has the unknown category_id 5"),
        ([[1, 1]], [[1, 1]], [{"id": 1, "category_id": 3}] * 2, "id 1 is listed more than once"),
        ([[1, 1]], [[0, 1]], [{"id": i, "category_id": 3} for i in (0, 1)], "a segment has the id 0"),
    ],
)
def test_wrong_prediction_is_one_clear_error(true_map, predicted_map, segments, message):
    truth = [{"id": 1, "category_id": 3, "area": 2, "iscrowd": 0}]
    with pytest.raises(ValueError, match=message):
        image_quality(np.array(true_map), truth, np.array(predicted_map), segments, CATEGORY_IDS)


@pytest.mark.parametrize(
    ("name", "json_name", "folder"),
    [
        ("coco_panoptic_sample", "panoptic_examples.json", "panoptic_examples"),
        ("nuclei", "panoptic_val.json", "panoptic"),
    ],
)
def test_counts_equal_panopticapi_on_perturbed_real_annotations(dataset_root, tmp_path, name, json_name, folder):
    root = dataset_root(name)
    content = json.loads((root / json_name).read_text())
    categories = content["categories"]
    ids = [category["id"] for category in categories]
    rng = np.random.default_rng(0)
    images = []
    for annotation in content["annotations"][:12]:
        true_map = rgb2id(np.array(Image.open(root / folder / annotation["file_name"]))).astype(np.int32)
        segments = annotation["segments_info"]
        images.append((true_map, segments, *perturb(rng, true_map, segments, ids)))
    images.append((*images[0][:2], np.zeros_like(images[0][0]), []))
    counts = total(images, ids)
    check_equal(counts, panopticapi_counts(tmp_path, images, categories))
    assert counts.true_positives.sum() > 10 and counts.false_positives.sum() > 10
