from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from convmask.config import get_cfg
from convmask.evaluation import COCOEvaluator, build_evaluator
from convmask.evaluation.boundary import boundary_of, boundary_overlaps, dilation, encode_crop
from convmask.evaluation.coco import _coco_api, evaluate_detections

from .model_outputs import inputs_of, instances_output


def encode(mask: np.ndarray) -> dict[str, Any]:
    return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))


def plain_boundary(mask: np.ndarray, ratio: float) -> np.ndarray:
    """On the whole image, one pixel after the other, what is outside being 0."""
    steps = max(1, round(ratio * math.hypot(*mask.shape)))
    eroded = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=steps, border_value=0)
    return mask & ~eroded


def plain_overlap(found: np.ndarray, truth: np.ndarray, crowd: bool, ratio: float) -> float:
    values = []
    for a, b in ((found, truth), (plain_boundary(found, ratio), plain_boundary(truth, ratio))):
        union = a.sum() if crowd else (a | b).sum()
        values.append((a & b).sum() / union if union else 0.0)
    return float(min(values))


@st.composite
def shapes(draw: st.DrawFn, size: tuple[int, int]) -> np.ndarray:
    """Some rectangles and holes, perhaps with noise, anywhere in the image, perhaps nothing."""
    mask = np.zeros(size, dtype=bool)
    for _ in range(draw(st.integers(0, 4))):
        y, x = draw(st.integers(0, size[0] - 1)), draw(st.integers(0, size[1] - 1))
        height, width = draw(st.integers(1, size[0])), draw(st.integers(1, size[1]))
        mask[y : y + height, x : x + width] = draw(st.booleans()) or not mask.any()
    if draw(st.booleans()):
        mask &= np.random.default_rng(draw(st.integers(0, 99))).random(size) < 0.95
    return mask


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 50))
RATIOS = st.sampled_from([0.0, 0.02, 0.05, 0.2])


@settings(max_examples=80, deadline=None)
@given(data=st.data(), size=SIZES, ratio=RATIOS)
def test_boundaries_are_those_of_an_erosion_of_the_whole_image(data: Any, size: tuple[int, int], ratio: float) -> None:
    mask = data.draw(shapes(size))
    found = boundary_of(encode(mask), ratio)
    expected = plain_boundary(mask, ratio)
    assert np.array_equal(mask_util.decode(found).astype(bool), expected)
    assert found["counts"] == encode(expected)["counts"]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=SIZES, ratio=RATIOS)
def test_overlaps_against_the_plain_ones(data: Any, size: tuple[int, int], ratio: float) -> None:
    found, truths = ([data.draw(shapes(size)) for _ in range(2)] for _ in range(2))
    crowd = [0, 1]
    overlaps = boundary_overlaps([encode(x) for x in found], [encode(x) for x in truths], crowd, ratio)
    for (i, j), value in np.ndenumerate(overlaps):
        assert value == pytest.approx(plain_overlap(found[i], truths[j], bool(crowd[j]), ratio))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=SIZES)
def test_a_part_is_encoded_as_the_whole(data: Any, size: tuple[int, int]) -> None:
    mask = data.draw(shapes(size))
    top, left = data.draw(st.integers(0, size[0] - 1)), data.draw(st.integers(0, size[1] - 1))
    bottom, right = data.draw(st.integers(top + 1, size[0])), data.draw(st.integers(left + 1, size[1]))
    whole = np.zeros_like(mask)
    whole[top:bottom, left:right] = mask[top:bottom, left:right]
    assert encode_crop(mask[top:bottom, left:right], top, left, *size)["counts"] == encode(whole)["counts"]


def test_known_cases() -> None:
    assert [dilation(*size) for size in ((10, 10), (300, 400), (480, 640))] == [1, 10, 16]
    square = np.zeros((300, 400), dtype=bool)
    square[100:200, 100:200] = True
    assert mask_util.area(boundary_of(encode(square))) == 100 * 100 - 80 * 80
    grown = np.zeros_like(square)
    grown[95:205, 95:205] = True
    # rings of 10 pixels, of which the inner half of one is the outer half of the other
    inner, outer = 100**2 - 80**2, 110**2 - 90**2
    shared = 100**2 - 90**2
    found = boundary_overlaps([encode(grown)], [encode(square)], [0])[0, 0]
    assert found == pytest.approx(shared / (inner + outer - shared))
    assert found < mask_util.iou([encode(grown)], [encode(square)], [0])[0, 0]
    assert boundary_overlaps([encode(square)], [encode(square)], [0])[0, 0] == 1


def shifted(images: list[Any], shift: int) -> list[dict[str, Any]]:
    outputs = []
    for id_map, segments in images:
        things = [s for s in segments if s["category_id"] in (3, 7) and not s["iscrowd"]]
        masks = np.array([np.roll(id_map == s["id"], shift, axis=1) for s in things]).reshape(-1, *id_map.shape)
        classes = [(3, 7).index(s["category_id"]) for s in things]
        outputs.append(instances_output(masks, classes, np.linspace(0.9, 0.5, len(things)).tolist()))
    return outputs


def test_boundary_ap_beside_the_others(small_set: Any) -> None:
    name, _, images = small_set
    cfg = get_cfg()
    cfg.TEST.BOUNDARY_AP = True
    found = []
    for shift in (0, 1):
        evaluator = build_evaluator(cfg, name)
        evaluator = next(e for e in evaluator._evaluators if isinstance(e, COCOEvaluator))
        evaluator.reset()
        evaluator.process(inputs_of(name), shifted(images, shift))
        found.append(evaluator.evaluate())
        assert list(found[-1]) == ["bbox", "segm", "boundary_segm"]
        assert found[-1]["boundary_segm"].keys() == found[-1]["segm"].keys()
    assert found[0]["boundary_segm"]["AP"] == pytest.approx(found[0]["segm"]["AP"])
    assert found[1]["boundary_segm"]["AP"] < found[1]["segm"]["AP"] < found[0]["segm"]["AP"]


def test_images_without_a_size() -> None:
    square = [20.0, 20.0, 60.0, 20.0, 60.0, 60.0, 20.0, 60.0]
    truths = [
        {"id": i, "image_id": i, "category_id": 1, "iscrowd": 0, "area": 1600, "segmentation": [square]} for i in (1, 2)
    ]
    dataset = {"images": [{"id": 1}, {"id": 2}], "annotations": truths, "categories": [{"id": 1, "name": "a"}]}
    mask = np.zeros((80, 100), dtype=bool)
    mask[20:60, 20:60] = True
    code = {"size": [80, 100], "counts": encode(mask)["counts"]}
    detection = {"image_id": 1, "category_id": 1, "score": 0.9, "segmentation": code}
    for task in ("segm", "boundary_segm"):
        api = _coco_api(copy.deepcopy(dataset))
        stats = evaluate_detections(api, [detection], task, 100).stats
        assert stats[0] == pytest.approx(51 / 101)  # one of two is found: recall 0 to 0.5
        assert (api.imgs[1]["height"], api.imgs[1]["width"]) == (80, 100)
