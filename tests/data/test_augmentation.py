from __future__ import annotations

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from convmask.config import get_cfg
from convmask.data.augmentation import (
    RandomRotate90,
    RandomSegmentationCrop,
    ResizeScale,
    ResizeShortestEdge,
    Rotate90Transform,
    build_augmentations,
)
from convmask.data.color_augmentation import SSDColorAugmentation
from convmask.data.targets import IGNORE_LABEL, SegmentationInput, SegmentTable


@pytest.fixture
def cfg() -> CfgNode:
    return get_cfg()


def sample(height: int = 60, width: int = 80, objects: int = 3) -> SegmentationInput:
    """Stuff 1 and 2 side by side, with small objects in it."""
    rng = np.random.default_rng(height)
    ids = np.where(np.arange(width) < width // 2, 901, 902)[None].repeat(height, axis=0).astype(np.int32)
    for number in range(objects):
        y, x = rng.integers(height - 2), rng.integers(width - 2)
        ids[y : y + 2, x : x + 2] = number + 1
    segments = [{"id": 901, "category_id": 1, "isthing": False}, {"id": 902, "category_id": 2, "isthing": False}]
    segments += [{"id": n, "category_id": 0, "isthing": True} for n in range(1, objects + 1)]
    # Brighter than padding.
    image = np.stack([130 + ids % 100] * 3, axis=-1).astype(np.uint8)
    return SegmentationInput(image, ids=ids, table=SegmentTable.from_segments(segments, "separated", None))


def test_the_default_is_detectron2s(cfg: CfgNode) -> None:
    resize, flip = build_augmentations(cfg, True)
    assert isinstance(resize, T.ResizeShortestEdge)
    assert isinstance(flip, T.RandomFlip)
    assert (flip.horizontal, flip.vertical) == (True, False)
    (test_time,) = build_augmentations(cfg, False)
    assert isinstance(test_time, T.ResizeShortestEdge)
    assert test_time.get_transform(np.zeros((100, 200, 3), dtype=np.uint8)).new_h == 667


def test_everything_in_order(cfg: CfgNode) -> None:
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.SCALE_JITTER.ENABLED = True
    cfg.INPUT.ROTATE_90 = True
    cfg.INPUT.COLOR_AUG_SSD = True
    cfg.INPUT.RANDOM_FLIP = "vertical"
    kinds = [RandomSegmentationCrop, ResizeScale, T.FixedSizeCrop, T.RandomFlip, RandomRotate90, SSDColorAugmentation]
    augmentations = build_augmentations(cfg, True)
    assert [type(a) for a in augmentations] == kinds
    assert augmentations[3].vertical
    assert len(build_augmentations(cfg, False)) == 1
    assert "RandomRotate90()" in str(augmentations)


def test_wrong_values_name_their_key(cfg: CfgNode) -> None:
    cfg.INPUT.RANDOM_FLIP = "both"
    with pytest.raises(ValueError, match=r"INPUT\.RANDOM_FLIP is 'both'"):
        build_augmentations(cfg, True)
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.SCALE_JITTER.ENABLED = True
    cfg.INPUT.SCALE_JITTER.MIN_SCALE = 3.0
    with pytest.raises(ValueError, match=r"INPUT\.SCALE_JITTER"):
        build_augmentations(cfg, True)


@pytest.mark.parametrize(("size", "scale"), [((40, 50), (0.5, 0.6)), ((40, 50), (3.0, 4.0)), ((200, 30), (0.1, 2.0))])
def test_scale_jitter_pads_with_void(cfg: CfgNode, size: tuple[int, int], scale: tuple[float, float]) -> None:
    jitter = cfg.INPUT.SCALE_JITTER
    jitter.ENABLED, jitter.TARGET_SIZE, jitter.CROP_SIZE = True, (64, 96), (64, 80)
    jitter.MIN_SCALE, jitter.MAX_SCALE = scale
    augment = T.AugmentationList(build_augmentations(cfg, True)[:-1])
    for _ in range(5):
        data = sample(*size)
        augment(data)
        assert data.image.shape == (64, 80, 3)
        assert data.sem_seg is not None
        assert data.sem_seg.shape == (64, 80)
        padded = (data.image == 128).all(axis=-1)
        assert not padded.any() or set(data.sem_seg[padded]) == {IGNORE_LABEL}
        assert (data.sem_seg[~padded] != IGNORE_LABEL).all()
        assert not (data.instances().gt_masks.tensor.numpy() & padded).any()


def test_long_thin_images_keep_a_pixel() -> None:
    for augmentation in (ResizeShortestEdge(8, 8, "choice"), ResizeScale(0.1, 0.1, 64, 64)):
        for shape in ((1, 500, 3), (500, 1, 3)):
            tfm = augmentation.get_transform(np.zeros(shape, dtype=np.uint8))
            assert min(tfm.apply_image(np.zeros(shape, dtype=np.uint8)).shape) >= 1
    image = np.zeros((5, 6, 3), dtype=np.uint8)
    assert ResizeShortestEdge(0, 100, "choice").get_transform(image).apply_image(image).shape == image.shape


CROPS = [("absolute", (10, 12)), ("relative", (0.2, 0.1)), ("relative_range", (0.1, 0.1)), ("absolute_range", (5, 20))]


@pytest.mark.parametrize(("kind", "size"), CROPS)
def test_a_crop_holds_an_instance_if_it_must(kind: str, size: tuple[float, float]) -> None:
    free = RandomSegmentationCrop(kind, size)
    bound = RandomSegmentationCrop(kind, size, require_instance=True)
    held = []
    for _ in range(30):
        data = sample(objects=1)
        bound(data)
        assert len(data.instances()) == 1
        data = sample(objects=1)
        free(data)
        held.append(len(data.instances()))
    assert 0 in held


def test_a_crop_without_instances_is_any_crop() -> None:
    data = sample(objects=0)
    RandomSegmentationCrop("absolute", (10, 12), require_instance=True)(data)
    assert data.image.shape == (10, 12, 3)
    image_only = SegmentationInput(np.zeros((20, 20, 3), dtype=np.uint8))
    RandomSegmentationCrop("absolute", (10, 12), True, 0.5)(image_only)
    assert image_only.image.shape == (10, 12, 3)


def test_crops_reach_every_place() -> None:
    corners = set()
    crop = RandomSegmentationCrop("absolute", (58, 78))
    for _ in range(200):
        tfm = crop(sample())
        corners.add((tfm.x0, tfm.y0))
    assert corners == {(x, y) for x in range(3) for y in range(3)}


def test_a_crop_holds_two_categories_if_one_must_not_fill_it() -> None:
    crop = RandomSegmentationCrop("absolute", (20, 30), single_category_max_area=0.9)
    shares = []
    for _ in range(40):
        data = sample(objects=0)
        crop(data)
        counts = np.unique(data.sem_seg, return_counts=True)[1]
        shares.append(counts.max() / counts.sum())
    # Half of all crops hold two categories, so ten trials in vain are rare.
    assert np.mean(np.array(shares) <= 0.9) > 0.9


def test_both_demands_hold_together() -> None:
    crop = RandomSegmentationCrop("absolute", (20, 60), True, 0.9)
    for _ in range(20):
        data = sample(objects=1)
        crop(data)
        assert len(data.instances()) == 1


@pytest.mark.parametrize("turns", [-1, 0, 1, 2, 3])
def test_quarter_turns(turns: int) -> None:
    image = np.random.default_rng(0).integers(0, 255, (4, 7, 3), dtype=np.uint8)
    tfm = Rotate90Transform(4, 7, turns)
    turned = tfm.apply_image(image)
    np.testing.assert_array_equal(turned, np.rot90(image, turns))
    np.testing.assert_array_equal(tfm.inverse().apply_image(turned), image)
    # Pixel centres go where the pixels go.
    y, x = np.divmod(np.arange(28), 7)
    moved = tfm.apply_coords(np.stack([x + 0.5, y + 0.5], axis=1))
    columns, rows = np.floor(moved).astype(int).T
    np.testing.assert_array_equal(turned[rows, columns], image[y, x])
    np.testing.assert_allclose(tfm.inverse().apply_coords(moved), np.stack([x + 0.5, y + 0.5], axis=1))


def test_all_quarter_turns_are_drawn() -> None:
    image = np.zeros((4, 7, 3), dtype=np.uint8)
    assert {RandomRotate90().get_transform(image).turns for _ in range(60)} == {0, 1, 2, 3}


def test_colour_changes_colour_only() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    results = []
    for _ in range(20):
        tfm = SSDColorAugmentation("BGR").get_transform(image)
        changed = tfm.apply_image(image)
        assert changed.shape == image.shape
        assert changed.dtype == np.uint8
        # A transform is a function: it does not draw again.
        np.testing.assert_array_equal(tfm.apply_image(image), changed)
        ids = np.arange(4, dtype=np.uint8).reshape(2, 2)
        np.testing.assert_array_equal(tfm.apply_segmentation(ids), ids)
        results.append(changed.astype(int).mean())
    assert np.std(results) > 5


def test_colour_of_both_channel_orders_agrees() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for seed in range(10):
        changed = []
        for order, pixels in (("RGB", image), ("BGR", image[:, :, ::-1])):
            np.random.seed(seed)
            changed.append(SSDColorAugmentation(order).get_transform(pixels).apply_image(pixels))
        np.testing.assert_array_equal(changed[0], changed[1][:, :, ::-1])
    with pytest.raises(ValueError, match="'L'"):
        SSDColorAugmentation("L")
