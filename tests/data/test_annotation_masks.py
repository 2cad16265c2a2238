from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import transforms as T
from fvcore.transforms.transform import PadTransform

from convmask.data.annotation_masks import instances_from_annotations, transform_mask
from convmask.data.errors import DatasetError

TRANSFORMS = {
    "flip": T.HFlipTransform(11),
    "vertical flip": T.VFlipTransform(9),
    "larger": T.ResizeTransform(9, 11, 20, 31),
    "crop": T.CropTransform(2, 1, 5, 6),
}
TRANSFORMS["all"] = T.TransformList([TRANSFORMS["flip"], TRANSFORMS["larger"], T.CropTransform(3, 3, 20, 9)])


@pytest.mark.parametrize("value", [0, 255])
def test_padding_is_outside(value: int) -> None:
    pad = PadTransform(1, 2, 3, 4, pad_value=128, seg_pad_value=value)
    expected = np.zeros((8, 6), dtype=bool)
    expected[2:4, 1:3] = True
    rle = mask_util.encode(np.ones((2, 2), dtype=np.uint8, order="F"))
    np.testing.assert_array_equal(transform_mask(rle, pad, (2, 2), (8, 6)), expected)
    instances = instances_from_annotations([{"segmentation": rle, "category_id": 0}], pad, (2, 2), (8, 6))
    np.testing.assert_array_equal(instances.gt_masks.tensor[0].numpy(), expected)


def encoded(mask: np.ndarray, how: str) -> dict:
    compressed = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    if how == "bytes":
        return compressed
    if how == "text":
        return {**compressed, "counts": compressed["counts"].decode()}
    flat = np.concatenate(([0], mask.ravel(order="F").astype(np.int8), [2]))
    changes = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate(([0], changes))).tolist()
    return {"size": list(mask.shape), "counts": counts}


@pytest.mark.parametrize("how", ["bytes", "text", "list"])
def test_every_form_of_rle(how: str) -> None:
    mask = np.random.default_rng(0).random((9, 11)) < 0.5
    moved = transform_mask(encoded(mask, how), T.NoOpTransform(), (9, 11), (9, 11))
    np.testing.assert_array_equal(moved, mask)


@pytest.mark.parametrize("name", ["flip", "vertical flip", "larger", "crop", "all"])
def test_polygons_move_with_the_image(name: str) -> None:
    polygon = [2.0, 1.0, 8.0, 1.0, 8.0, 7.0, 2.0, 7.0]
    filled = np.zeros((9, 11), dtype=np.uint8)
    filled[1:7, 2:8] = 1
    expected = TRANSFORMS[name].apply_segmentation(filled)
    moved = transform_mask([polygon, np.array(polygon)], TRANSFORMS[name], (9, 11), expected.shape)
    np.testing.assert_array_equal(moved, expected == 1)


def test_the_part_of_a_polygon_in_the_crop_is_exact() -> None:
    triangle = [-5.0, 2.0, 18.0, -3.0, 9.0, 15.0]
    whole = mask_util.decode(mask_util.frPyObjects([triangle], 9, 11))[..., 0]
    crop = T.CropTransform(3, 2, 6, 5)
    np.testing.assert_array_equal(transform_mask([triangle], crop, (9, 11), (5, 6)), whole[2:7, 3:9] == 1)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        3,
        "polygon",
        [[0.0, float("nan"), 1.0, 1.0, 2.0, 2.0]],
        [[0.0, 0.0, 1e9, 1.0, 2.0, 2.0]],
        [["a", "b", "c", "d", "e", "f"]],
        [3],
        {"size": [9, 12], "counts": "abc"},
        {"size": [9, 11]},
        {"size": [9, 11], "counts": [5, 5]},
        {"size": [9, 11], "counts": "PPPP"},
        {"size": [9, 11], "counts": [-3, 102]},
    ],
)
def test_malformed_segmentations_are_named(wrong: object) -> None:
    annotations = [
        {"segmentation": [[0.0, 0, 4, 0, 4, 4]], "category_id": 0},
        {"segmentation": wrong, "category_id": 1},
    ]
    with pytest.raises(DatasetError, match=r"annotations\[1\]\.segmentation"):
        instances_from_annotations(annotations, T.NoOpTransform(), (9, 11), (9, 11))


def test_annotations_overlap_and_crowds_and_empty_ones_are_left_out() -> None:
    mask = np.zeros((9, 11), dtype=bool)
    mask[2:5, 3:9] = True
    annotations = [
        {"segmentation": encoded(mask, "text"), "category_id": 4, "iscrowd": 1},
        {"segmentation": [[2.0, 1, 8, 1, 8, 7, 2, 7]], "category_id": 2},
        {"segmentation": encoded(mask, "bytes"), "category_id": 1},
        {"segmentation": encoded(np.zeros((9, 11), dtype=bool), "text"), "category_id": 3},
        {"segmentation": [], "category_id": 3},
        {"segmentation": [[1.0, 1.0, 2.0, 2.0]], "category_id": 3},
    ]
    instances = instances_from_annotations(annotations, T.NoOpTransform(), (9, 11), (9, 11))
    assert instances.gt_classes.tolist() == [2, 1]
    np.testing.assert_array_equal(instances.gt_masks.tensor[1].numpy(), mask)
    assert instances.gt_boxes.tensor.tolist() == [[2, 1, 8, 7], [3, 2, 9, 5]]
    assert (instances.gt_masks.tensor[0] & instances.gt_masks.tensor[1]).any()
    empty = instances_from_annotations([], T.NoOpTransform(), (9, 11), (4, 5))
    assert empty.gt_masks.tensor.shape == (0, 4, 5)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("share", [0.05, 0.7])
def test_many_overlapping_masks_move_as_each_would(name: str, share: float) -> None:
    """With a share of 0.7 almost all of 30 masks overlap, more than there are layers for them."""
    rng = np.random.default_rng(0)
    masks = rng.random((30, 9, 11)) < share
    annotations = [{"segmentation": encoded(mask, "text"), "category_id": k} for k, mask in enumerate(masks)]
    expected = [TRANSFORMS[name].apply_segmentation(mask.astype(np.uint8)) == 1 for mask in masks]
    instances = instances_from_annotations(annotations, TRANSFORMS[name], (9, 11), expected[0].shape)
    kept = [k for k, mask in enumerate(expected) if mask.any()]
    assert instances.gt_classes.tolist() == kept
    np.testing.assert_array_equal(instances.gt_masks.tensor.numpy(), np.stack([expected[k] for k in kept]))
    assert (instances.gt_boxes.tensor == instances.gt_masks.get_bounding_boxes().tensor).all()
