from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks
from fvcore.transforms.transform import PadTransform
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from convmask.data.errors import DatasetError
from convmask.data.masks import (
    instances_from_index,
    segment_index,
    split_masks,
    tight_boxes,
    transform_id_map,
)

IDS = [70_001, 3, 256, 2**24 - 1]
id_maps = arrays.arrays(
    np.int32, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.sampled_from([0, -1, 5, *IDS])
)


@settings(max_examples=40, deadline=None)
@given(id_maps)
def test_index_boxes_and_masks_agree_with_one_mask_each(ids: np.ndarray) -> None:
    index = segment_index(ids, IDS)
    boxes = tight_boxes(index, len(IDS))
    masks = np.stack([ids == segment_id for segment_id in IDS])
    np.testing.assert_array_equal(np.stack([index == k for k in range(1, 5)]), masks)
    np.testing.assert_array_equal(boxes, BitMasks(torch.from_numpy(masks)).get_bounding_boxes().tensor.numpy())
    split = split_masks(index, [4, 2], boxes[[3, 1]])
    assert split.dtype == torch.bool
    np.testing.assert_array_equal(split.numpy(), masks[[3, 1]])


def test_no_segments() -> None:
    index = segment_index(np.full((2, 3), 9, dtype=np.int32), [])
    assert not index.any()
    assert tight_boxes(index, 0).shape == (0, 4)
    instances = instances_from_index(index, {}, 0)
    assert instances.image_size == (2, 3)
    assert instances.gt_masks.tensor.shape == (0, 2, 3)
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.shape == (0,)
    assert instances.gt_classes.dtype == torch.int64


@pytest.mark.parametrize("wrong", [[0], [-4], [2**24], [7, 7]])
def test_impossible_ids_are_refused(wrong: list[int]) -> None:
    with pytest.raises(DatasetError, match="segment id"):
        segment_index(np.zeros((2, 2), dtype=np.int32), wrong)


def test_one_pixel_survives_and_absent_ones_go_with_their_class() -> None:
    ids = np.zeros((5, 6), dtype=np.int32)
    ids[3, 4] = 9
    ids[0, :2] = 11
    index = segment_index(ids, [8, 9, 10, 11, 12])
    instances = instances_from_index(index, {5: 50, 4: 40, 2: 20, 1: 10}, 5)
    assert instances.gt_classes.tolist() == [20, 40]
    assert instances.gt_boxes.tensor.tolist() == [[4, 3, 5, 4], [0, 0, 2, 1]]
    assert instances.gt_masks.tensor.sum(dim=(1, 2)).tolist() == [1, 2]


TRANSFORMS = {
    "flip": T.HFlipTransform(11),
    "vertical flip": T.VFlipTransform(9),
    "smaller": T.ResizeTransform(9, 11, 5, 4),
    "larger": T.ResizeTransform(9, 11, 20, 31),
    "crop": T.CropTransform(2, 1, 5, 6),
    "turn": T.RotationTransform(9, 11, 30),
    "colour": T.BlendTransform(np.zeros(1), 0.5, 0.5),
    "nothing": T.NoOpTransform(),
}
TRANSFORMS["all"] = T.TransformList([TRANSFORMS["flip"], TRANSFORMS["larger"], T.CropTransform(3, 3, 20, 9)])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_id_map_moves_as_each_mask_would(name: str) -> None:
    rng = np.random.default_rng(0)
    ids = rng.choice(np.array([0, *IDS], dtype=np.int32), (9, 11))
    moved = transform_id_map(TRANSFORMS[name], ids)
    assert moved.dtype == np.int32
    index = transform_id_map(TRANSFORMS[name], segment_index(ids, IDS))
    assert index.dtype == np.uint8
    np.testing.assert_array_equal(index, segment_index(moved, IDS))
    for segment_id in IDS:
        mask = TRANSFORMS[name].apply_segmentation((ids == segment_id).astype(np.uint8))
        np.testing.assert_array_equal(moved == segment_id, mask == 1)


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_padding_is_no_segment(value: int, dtype: type) -> None:
    pad = PadTransform(1, 2, 3, 4, pad_value=128, seg_pad_value=value)
    moved = transform_id_map(pad, np.full((2, 2), 254, dtype=dtype))
    expected = np.zeros((8, 6), dtype=dtype)
    expected[2:4, 1:3] = 254
    np.testing.assert_array_equal(moved, expected)
    assert moved.dtype == dtype


@pytest.mark.parametrize("count", [254, 255, 300])
def test_more_segments_than_a_byte_counts(count: int) -> None:
    ids = np.arange(1, count + 1, dtype=np.int32).reshape(1, -1) * 1000
    index = segment_index(ids, ids[0].tolist())
    assert index.dtype == (np.uint8 if count < 255 else np.int32)
    np.testing.assert_array_equal(index[0], np.arange(1, count + 1))
    flipped = transform_id_map(T.HFlipTransform(count), index)
    np.testing.assert_array_equal(flipped, index[:, ::-1])
    assert len(instances_from_index(flipped, dict.fromkeys(range(1, count + 1), 0), count)) == count


_PEAK = """
import resource
import numpy as np
import torch
from detectron2.data import transforms as T
import pycocotools.mask as mask_util
from convmask.data import masks, targets

rows, columns = np.divmod(np.arange(1024 * 1024).reshape(1024, 1024), 1024)
ids = (1 + rows // 52 * 20 + np.minimum(columns // 51, 19)).astype(np.int32)
segments = [{"id": k, "category_id": 0, "isthing": True} for k in np.unique(ids).tolist()]
image = np.zeros((1024, 1024, 3), dtype=np.uint8)
annotations = None
if %r:
    annotations = [
        {"segmentation": mask_util.encode(np.asfortranarray(ids == s["id"])), "category_id": 0} for s in segments
    ]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
table = targets.SegmentTable.from_segments(segments, "separated", None)
sample = targets.SegmentationInput(image, ids=ids, table=table, annotations=annotations)
sample.transform(T.HFlipTransform(1024))
sample.transform(T.ResizeTransform(1024, 1024, 1024, 1024))
instances = sample.instances()
sem_seg = sample.sem_seg
assert len(instances) == len(segments) == 400, len(instances)
assert instances.gt_masks.tensor.shape == (400, 1024, 1024)
assert instances.gt_masks.tensor[0].sum() == instances.gt_boxes.area()[0]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("from_annotations", [False, True])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the unit of ru_maxrss and lazy pages are Linux's")
def test_400_instances_take_far_less_than_a_gigabyte(from_annotations: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PEAK % from_annotations], capture_output=True, text=True, check=True
    )
    # 400 masks of 1024x1024 are 420 MB; a second copy of them would be 420 MB more.
    assert int(done.stdout) < 550
