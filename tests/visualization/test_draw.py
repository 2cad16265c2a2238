"""Pictures: their sizes, what is painted and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from PIL import Image

from convmask.data.images import read_image
from convmask.visualization import contact_sheet, draw_prediction, ground_truth, save_image, side_by_side


@pytest.fixture
def metadata() -> Metadata:
    return Metadata(thing_classes=["nucleus"], stuff_classes=["things", "ground"])


def _square(size: int = 40) -> tuple[np.ndarray, dict[str, Any]]:
    ids = np.zeros((size, size), dtype=np.int32)
    ids[10:20, 10:30] = 1
    image = np.full((size, size, 3), 100, dtype=np.uint8)
    return image, {"panoptic_seg": (torch.from_numpy(ids), [{"id": 1, "isthing": True, "category_id": 0}])}


def test_only_the_segment_is_painted(metadata: Metadata) -> None:
    image, prediction = _square()
    picture = draw_prediction(image, prediction, metadata, scale=1, labels=False)
    assert picture.shape == image.shape
    changed = (picture != image).any(axis=2)
    assert changed[10:20, 10:30].all()
    # The contour is antialiased: it reaches a pixel or two beyond.
    changed[8:22, 8:32] = False
    assert not changed.any()
    assert (image == 100).all()


def test_small_images_are_enlarged(metadata: Metadata) -> None:
    image, prediction = _square(128)
    assert draw_prediction(image, prediction, metadata).shape == (512, 512, 3)
    assert draw_prediction(np.zeros((600, 30, 3), np.uint8), {}, metadata).shape == (600, 30, 3)


def test_enlarging_keeps_area_and_neighbours_meet(metadata: Metadata) -> None:
    ids = np.ones((32, 32), dtype=np.int32)
    ids[:, 16:] = 2
    info = [{"id": i, "isthing": True, "category_id": 0} for i in (1, 2)]
    image = np.zeros((32, 32, 3), np.uint8)
    picture = draw_prediction(image, {"panoptic_seg": (ids, info)}, metadata, scale=4, labels=False)
    assert (picture.sum(axis=2) > 0).all()


def test_an_object_of_one_pixel_is_seen(metadata: Metadata) -> None:
    ids = np.zeros((20, 20), dtype=np.int32)
    ids[7, 7] = 1
    info = [{"id": 1, "isthing": True, "category_id": 0}]
    picture = draw_prediction(np.zeros((20, 20, 3), np.uint8), {"panoptic_seg": (ids, info)}, metadata, scale=4)
    assert picture[28:32, 28:32].any(axis=2).all()


def test_labels_are_few_where_objects_are_many(metadata: Metadata) -> None:
    # 400 nuclei of 24 x 24 pixels: none has room for its name at this size.
    ids = np.kron(np.arange(1, 401).reshape(20, 20), np.ones((24, 24), dtype=np.int32)).astype(np.int32)
    info = [{"id": i, "isthing": True, "category_id": 0} for i in range(1, 401)]
    image = np.zeros((480, 480, 3), np.uint8)
    prediction = {"panoptic_seg": (ids, info)}
    picture = draw_prediction(image, prediction, metadata, labels=True)
    np.testing.assert_array_equal(picture, draw_prediction(image, prediction, metadata, labels=False))


def test_a_label_is_written_where_there_is_room(metadata: Metadata) -> None:
    image, prediction = _square(128)
    named = draw_prediction(image, prediction, metadata, scale=6)
    bare = draw_prediction(image, prediction, metadata, scale=6, labels=False)
    rows, columns = np.nonzero((named != bare).any(axis=2))
    assert len(rows) > 50
    # Within the segment's 60 rows, around a place within its 120 columns.
    assert rows.min() >= 60 and rows.max() < 120
    assert 60 <= columns.mean() < 180


def test_nothing_predicted_is_the_image(metadata: Metadata) -> None:
    image, _ = _square(500)
    np.testing.assert_array_equal(draw_prediction(image, {}, metadata), image)
    empty = {"panoptic_seg": (np.zeros((500, 500), np.int32), [])}
    np.testing.assert_array_equal(draw_prediction(image, empty, metadata), image)


def test_side_by_side_shows_three_panels(metadata: Metadata) -> None:
    image, prediction = _square(60)
    picture = side_by_side(image, prediction, prediction, metadata, scale=2)
    assert picture.dtype == np.uint8
    assert picture.shape[1] > 3 * 120 and picture.shape[0] > 120
    without = side_by_side(image, prediction, None, metadata, scale=2)
    assert 2 * 120 < without.shape[1] < 3 * 120


def test_a_sheet_takes_pictures_of_any_size() -> None:
    rows = [[np.full((h, w, 3), 30, np.uint8)] * 3 for h, w in ((10, 40), (40, 10), (5, 5))]
    sheet = contact_sheet(rows, groups=2, panel_height=40)
    # Two rows and two groups of three cells, each as wide as the widest picture at that height.
    assert sheet.shape[0] > 80 and sheet.shape[1] > 6 * 160
    assert contact_sheet(rows[:1]).shape[0] > 10
    with pytest.raises(ValueError, match="no pictures"):
        contact_sheet([])


def test_saving_leaves_one_file(tmp_path: Path) -> None:
    image, _ = _square()
    path = save_image(tmp_path / "new" / "a.png", image)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    with pytest.raises(ValueError, match="unknown file extension"):
        save_image(tmp_path / "a.nothing", image)
    assert not (tmp_path / "a.nothing").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


def test_ground_truth_of_a_panoptic_set(few_images: str) -> None:
    entry = DatasetCatalog.get(few_images)[0]
    truth = ground_truth(entry)
    image = read_image(entry["file_name"], "RGB")
    ids, info = truth["panoptic_seg"]
    assert tuple(ids.shape) == image.shape[:2]
    assert {segment["id"] for segment in info} == set(ids.unique().tolist()) - {0}
    picture = draw_prediction(image, truth, MetadataCatalog.get(few_images), scale=1)
    assert (picture != image).any()


def test_ground_truth_of_polygons() -> None:
    polygon = {"segmentation": [[2.0, 2.0, 8.0, 2.0, 8.0, 6.0, 2.0, 6.0]], "category_id": 3}
    entry = {"file_name": "a.png", "height": 10, "width": 12, "annotations": [polygon]}
    instances = ground_truth(entry)["instances"]
    assert instances.pred_masks.shape == (1, 10, 12)
    assert instances.pred_masks.sum() == 24
    assert instances.pred_classes.tolist() == [3]
    assert len(ground_truth({**entry, "annotations": []})["instances"]) == 0
